"""Computation of a single hypergradient, without a state to carry."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .checks.problem import check_init, check_problem_type
from .checks.shard_map import check_problem_on_devices
from .estimators.base import (
    Estimate,
    Estimator,
    keys_of_samples,
    normalize_estimate,
)
from .keys_in_w import bind_keys, restore_keys
from .problem import Bilevel
from .validation import (
    as_input_arrays,
    as_key,
    check_estimator_type,
    check_no_nan,
    floats_to_arrays,
    is_traced,
)

#: Number of programs that calls of `hypergradient` share; the least recently used one
#: is dropped.
MAX_PROGRAMS = 256


def hypergradient(problem: Bilevel, estimator: Estimator) -> Callable[..., Estimate]:
    """Returns the compiled function ``(w, alpha, key=None) -> Estimate``.

    The function starts the inner solver at ``w``. It may itself be jitted and vmapped.
    Do not differentiate its results, but use `argmin` for higher derivatives: reverse
    mode fails in the loop of a solver, and where a derivative exists, it lacks what the
    estimator cuts off. Calls with the same functions, settings and shapes share one
    program.

    Args:
      problem: The problem.
      estimator: The estimator of the hypergradient.

    Raises:
      TypeError, ValueError: An argument is invalid; raised before anything is compiled.
      TypeError: ``w`` or a loss varies over mesh axes of `jax.shard_map`.
      TypeError: The estimator is a single-loop method, of which a single step is
        meaningless; use `minimize`.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2)
    >>> gradient = hg.hypergradient(hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()))
    >>> gradient(jnp.zeros(2), jnp.array([2.0, 3.0])).hypergradient.tolist()
    [2.0, 4.0]
    """
    check_problem_type(problem)
    check_estimator_type(estimator)
    if getattr(estimator, "is_single_loop", False):
        raise TypeError(
            f"estimator must not be a single-loop method; got "
            f"{type(estimator).__name__}, which makes one step of w, the adjoint and "
            "alpha at a time. Use hg.minimize(problem, estimator, optimizer, w, alpha, "
            "num_steps=...)."
        )
    estimator, problem = floats_to_arrays((estimator, problem))
    # The program is looked up once, so that a repeated call costs little more than it.
    arrays, static = eqx.partition((estimator, problem), eqx.is_array)
    arrays, structure = jax.tree.flatten(arrays)
    static_leaves, static_structure = jax.tree.flatten(static)
    program = _make_program(structure, static_structure, tuple(static_leaves))
    checked_shapes = set()
    with jax.ensure_compile_time_eval():  # do not keep a tracer of an enclosing jit
        default_key = as_key(None)

    def estimate_fn(w: PyTree, alpha: PyTree, key: Array | None = None) -> Estimate:
        leaves, input_structure = jax.tree.flatten((w, alpha))
        has_arrays = all(isinstance(leaf, jax.Array) for leaf in leaves)
        if has_arrays and _shapes_of(input_structure, leaves) in checked_shapes:
            check_no_nan(w, alpha)
        else:
            w, alpha = as_input_arrays(w, alpha)
            leaves, input_structure = jax.tree.flatten((w, alpha))
            shapes = _shapes_of(input_structure, leaves)
            if shapes not in checked_shapes:
                check_init(estimator, *bind_keys(problem, w), alpha)
                checked_shapes.add(shapes)
        key = default_key if key is None else as_key(key)
        if is_traced(arrays, leaves, key):
            check_problem_on_devices(*bind_keys(problem, w), alpha, key)
        return program(arrays, w, alpha, key)

    return estimate_fn


def _shapes_of(structure: Any, leaves: list[Array]) -> tuple[Any, ...]:
    """Returns all that the checks of the arguments depend on, apart from NaN."""
    is_weak = lambda x: getattr(x, "weak_type", None)  # which PRNG keys do not have
    return structure, *((x.shape, x.dtype, is_weak(x)) for x in leaves)


@functools.lru_cache(MAX_PROGRAMS)
def _make_program(
    structure: Any, static_structure: Any, static_leaves: tuple[Any, ...]
) -> Callable[..., Estimate]:
    """Returns the compiled function ``(arrays, w, alpha, key) -> Estimate``.

    Args:
      structure: Structure of the arrays of the pair ``(estimator, problem)``.
      static_structure, static_leaves: The pair without its arrays.
    """
    static = jax.tree.unflatten(static_structure, static_leaves)

    @jax.jit
    def estimate(arrays, w, alpha, key):
        arrays = jax.tree.unflatten(structure, arrays)
        estimator, problem = eqx.combine(arrays, static)
        init_key, estimate_key = jax.random.split(key)
        problem, parameters = bind_keys(problem, w)
        state = estimator.init(problem, parameters, alpha, init_key)
        estimate, _ = estimator.estimate(problem, state, alpha, estimate_key)
        final_w = restore_keys(estimate.w, problem.keys_of_w)
        keys = keys_of_samples(estimator, estimate_key)
        key = keys[0] if len(keys) == 1 else None  # no certificate sees several samples
        return normalize_estimate(dataclasses.replace(estimate, w=final_w, key=key))

    return estimate
