"""One hypergradient, with no state to carry."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .checks import (
    as_inputs,
    as_key,
    check_estimator_is,
    check_problem_is,
    rehearse,
    traced,
)
from .estimators.protocol import Estimate, Estimator
from .problem import Bilevel


def hypergradient(problem: Bilevel, estimator: Estimator) -> Callable[..., Estimate]:
    """``(w, alpha, key=None) -> Estimate``, compiled, for one shot.

    Args:
      problem: the two losses and their data.
      estimator: how; one that only makes sense over many steps is a TypeError that
        points to `minimize`.

    The returned function starts the inner solver at ``w`` and may itself be jitted and
    vmapped. Calls with the same objects and shapes share one compiled program.

    Raises:
      TypeError, ValueError: bad input, before anything is traced.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2)
    >>> gradient = hg.hypergradient(hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()))
    >>> gradient(jnp.zeros(2), jnp.array([2.0, 3.0])).hypergradient.tolist()
    [2.0, 4.0]
    """
    check_problem_is(problem)
    check_estimator_is(estimator)
    if getattr(estimator, "single_loop", False):
        raise TypeError(
            f"{type(estimator).__name__} makes one step of w, the adjoint and alpha at "
            "a time, and one alone says nothing; run it by hg.minimize(problem, "
            "estimator, optimizer, w, alpha, num_steps=...)"
        )
    estimator, problem = traced((estimator, problem))
    # What every call has in common, once: a ready function costs what its program does.
    arrays, rest = eqx.partition((estimator, problem), eqx.is_array)
    arrays, structure = jax.tree.flatten(arrays)
    setting, rehearsed = _Setting(structure, rest), set()
    with jax.ensure_compile_time_eval():  # a key of an enclosing trace may not stay
        default_key = as_key(None)

    def one_shot(w: PyTree, alpha: PyTree, key: Array | None = None) -> Estimate:
        w, alpha = as_inputs(w, alpha)
        leaves, of_inputs = jax.tree.flatten((w, alpha))
        shapes = of_inputs, *((leaf.shape, leaf.dtype) for leaf in leaves)
        if shapes not in rehearsed:
            rehearse(estimator, problem, w, alpha)
            rehearsed.add(shapes)
        key = default_key if key is None else as_key(key)
        return _one_shot(setting, arrays, w, alpha, key)

    return one_shot


class _Setting:
    """What is no array of an estimator and a problem, hashed once.

    Args:
      structure: of their arrays.
      rest: what is not one.
    """

    def __init__(self, structure: Any, rest: PyTree):
        self.structure, self.rest = structure, rest
        leaves, of_rest = jax.tree.flatten(rest)
        self.parts = structure, of_rest, *leaves
        self.hash = hash((*self.parts, *_hashes(of_rest)))

    def combined(self, arrays: list[Array]) -> Any:
        """``(estimator, problem)``."""
        return eqx.combine(jax.tree.unflatten(self.structure, arrays), self.rest)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        same = self is other
        return same or (isinstance(other, _Setting) and self.parts == other.parts)


def _hashes(structure: Any) -> Iterator[int]:
    """Of static fields, losses among them, which that of a `PyTreeDef` leaves out."""
    _, fields = structure.node_data() or (None, None)
    for field in fields if isinstance(fields, tuple) else (fields,):
        with contextlib.suppress(TypeError):
            yield hash(field)
    for child in structure.children():
        yield from _hashes(child)


@functools.partial(jax.jit, static_argnums=0)
def _one_shot(setting, arrays, w, alpha, key):
    estimator, problem = setting.combined(arrays)
    init_key, estimate_key = jax.random.split(key)
    state = estimator.init(problem, w, alpha, init_key)
    return estimator.estimate(problem, state, alpha, estimate_key)[0]
