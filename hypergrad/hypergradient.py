"""Computation of a single hypergradient, without a state to carry."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
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


def hypergradient(problem: Bilevel, estimator: Estimator) -> Callable[..., Estimate]:
    """Returns the compiled function ``(w, alpha, key=None) -> Estimate``.

    The function starts the inner solver at ``w``. It may itself be jitted and vmapped.
    Do not differentiate its results, but use `argmin` for higher derivatives: reverse
    mode fails in the loop of a solver, and where a derivative exists, it lacks what the
    estimator cuts off. Calls with the same objects and shapes share one program.

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
    # What all calls share is flattened and hashed once, so that a repeated call costs
    # little more than its program.
    arrays, static = eqx.partition((estimator, problem), eqx.is_array)
    arrays, structure = jax.tree.flatten(arrays)
    static_part, checked_shapes = _StaticPart(structure, static), set()
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
        return _estimate(static_part, arrays, w, alpha, key)

    return estimate_fn


def _shapes_of(structure: Any, leaves: list[Array]) -> tuple[Any, ...]:
    """Returns all that the checks of the arguments depend on, apart from NaN."""
    is_weak = lambda x: getattr(x, "weak_type", None)  # which PRNG keys do not have
    return structure, *((x.shape, x.dtype, is_weak(x)) for x in leaves)


class _StaticPart:
    """The static part of an estimator and a problem, with a hash computed once."""

    def __init__(self, structure: Any, static: PyTree):
        self.structure, self.static = structure, static
        leaves, static_structure = jax.tree.flatten(static)
        self.parts = structure, static_structure, *leaves
        self.hash = hash((*self.parts, *_static_field_hashes(static_structure)))

    def combine(self, arrays: list[Array]) -> Any:
        """Returns ``(estimator, problem)``."""
        return eqx.combine(jax.tree.unflatten(self.structure, arrays), self.static)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _StaticPart) and self.parts == other.parts
        )


def _static_field_hashes(structure: Any) -> Iterator[int]:
    """Yields the hashes of static fields, which that of a `PyTreeDef` leaves out."""
    _, fields = structure.node_data() or (None, None)
    for field in fields if isinstance(fields, tuple) else (fields,):
        with contextlib.suppress(TypeError):
            yield hash(field)
    for child in structure.children():
        yield from _static_field_hashes(child)


@functools.partial(jax.jit, static_argnums=0)
def _estimate(static_part, arrays, w, alpha, key):
    estimator, problem = static_part.combine(arrays)
    init_key, estimate_key = jax.random.split(key)
    problem, parameters = bind_keys(problem, w)
    state = estimator.init(problem, parameters, alpha, init_key)
    estimate, _ = estimator.estimate(problem, state, alpha, estimate_key)
    final_w = restore_keys(estimate.w, problem.keys_of_w)
    keys = keys_of_samples(estimator, estimate_key)
    key = keys[0] if len(keys) == 1 else None  # no certificate sees several samples
    return normalize_estimate(dataclasses.replace(estimate, w=final_w, key=key))
