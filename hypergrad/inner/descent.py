"""Gradient descent by any optax transformation, and the loop it runs in."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..problem import Data, draw, fraction
from ..products import Loss
from ..settings import check_steps, refuse_changing, refuse_optax
from .protocol import InnerStats, inner_stats

Optimizer = optax.GradientTransformation | Callable[[PyTree], Any]


class Descent(eqx.Module):
    """``num_steps`` steps of an optax optimizer on the inner loss.

    Args:
      optimizer: an `optax.GradientTransformation`, or ``alpha -> one``, so that
        learning rates and whole schedules can be hyperparameters.
      num_steps: T, the number of steps, a static integer.

    Each step draws its own batch where the data is `Batches` with a batch size, from
    a key split off the given one: same key, same result to the bit.

    Cost: T gradients, mini-batches in proportion; what an optimizer that searches along
    a line evaluates beside them is not counted (`LBFGS` counts). Memory: ``w`` and the
    optimizer's state. Bias: what T steps leave of the inner problem.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> solver = hg.Descent(optax.sgd(0.5), num_steps=50)
    >>> w, _ = solver.solve(loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> bool(jnp.allclose(w, 1.0))
    True
    """

    optimizer: Optimizer = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    citations = ("deepmind2020jax",)

    def __check_init__(self):
        check_steps("num_steps", self.num_steps, least=0)
        if isinstance(self.optimizer, optax.GradientTransformation):
            return
        refuse_optax("optimizer", self.optimizer)
        if not callable(self.optimizer):
            raise TypeError(
                "optimizer must be an optax.GradientTransformation such as "
                "optax.sgd(0.1), or a function alpha -> one; got "
                f"{type(self.optimizer).__name__}"
            )
        refuse_changing("optimizer", self.optimizer)

    @property
    def differentiable(self) -> bool:
        """False for optax transformations that search along a line or keep L-BFGS."""
        if not isinstance(self.optimizer, optax.GradientTransformation):
            return True
        try:
            state = jax.eval_shape(self.optimizer.init, jnp.zeros(()))
        except Exception:  # a mask or labels that fit the user's w only
            return True
        return not holds(state, NOT_DIFFERENTIATED)

    def _transformation(self, alpha: PyTree) -> optax.GradientTransformationExtraArgs:
        optimizer = self.optimizer
        if not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(alpha)
            if not isinstance(optimizer, optax.GradientTransformation):
                raise TypeError(
                    "optimizer(alpha) must return an optax.GradientTransformation; got "
                    f"{type(optimizer).__name__}"
                )
        return optax.with_extra_args_support(optimizer)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, optimizer state)``."""
        del inner_loss, data, key
        return w, self._transformation(alpha).init(w)

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """One update from the gradient on a batch drawn with ``key``."""
        w, state = carry
        batch = draw(data, key)
        value_fn = lambda w: inner_loss(w, alpha, batch)
        value, gradient = jax.value_and_grad(value_fn)(w)
        updates, state = self._transformation(alpha).update(
            gradient, state, w, value=value, grad=gradient, value_fn=value_fn
        )
        return optax.apply_updates(w, updates), state

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w_T, stats)``; same structure as ``w``."""
        w, _ = iterate(self, inner_loss, w, alpha, data, key)
        steps = self.num_steps
        return w, inner_stats(steps, num_grads=steps * fraction(data))


LINE_SEARCHES = (
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
)
NOT_DIFFERENTIATED = (*LINE_SEARCHES, optax.ScaleByLBFGSState)


def holds(state: PyTree, kinds: tuple[type, ...]) -> bool:
    """Whether an optax state is one of these, or has one within."""
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(node, kinds) for node in found)


def iterate(
    solver: Any,
    inner_loss: Loss,
    w: PyTree,
    alpha: PyTree,
    data: Data,
    key: Array,
    *,
    last: int | None = None,
    halves: tuple[PyTree, PyTree] | None = None,
    checkpoint: bool = False,
) -> tuple[PyTree, PyTree]:
    """The carry after all of an iterative solver's steps.

    Args:
      solver: an `IterativeSolver`.
      inner_loss, w, alpha, data, key: as for its ``solve``.
      last: let derivatives see only the last so many steps.
      halves: what the older and the newer half of those read in place of ``alpha``, to
        tell apart what each contributes; of an odd number the middle one reads it.
      checkpoint: store two levels of ``sqrt(T)`` carries for the reverse pass instead
        of every step's intermediates, for one more run of the steps.
    """
    init_key, steps_key = jax.random.split(key)
    keys = jax.random.split(steps_key, solver.num_steps)
    carry = solver.init(inner_loss, w, alpha, data, init_key)

    def run(alpha, carry, keys):
        step = lambda carry, key: (
            solver.step(inner_loss, carry, alpha, data, key),
            None,
        )
        return _scan(step, carry, keys, checkpoint)

    if last is None or last >= solver.num_steps:
        return run(alpha, carry, keys)
    early = solver.num_steps - last
    frozen = jax.lax.stop_gradient(alpha)
    carry = jax.lax.stop_gradient(run(frozen, carry, keys[:early]))
    if halves is None:
        return run(alpha, carry, keys[early:])
    older, newer = halves
    for seen, length in zip((older, alpha, newer), thirds(last), strict=True):
        carry = run(seen, carry, keys[early : early + length])
        early += length
    return carry


def thirds(last: int) -> tuple[int, int, int]:
    """Steps in the older half, between, and in the newer half."""
    return last // 2, last % 2, last // 2


def is_segmented(num_steps: int) -> bool:
    """Whether so many steps are worth segments; fewer are all stored."""
    return num_steps >= 4


def _scan(step: Callable, carry: PyTree, keys: Array, checkpoint: bool) -> PyTree:
    """``lax.scan`` over keys, for the carry only; in ``sqrt(T)`` segments if asked."""
    scan = lambda carry, keys: jax.lax.scan(step, carry, keys)[0]
    if not (checkpoint and is_segmented(len(keys))):
        return scan(carry, keys)
    length = math.isqrt(len(keys))
    whole = len(keys) - len(keys) % length
    segment = jax.checkpoint(scan)
    segments = keys[:whole].reshape(-1, length)
    carry, _ = jax.lax.scan(lambda c, k: (segment(c, k), None), carry, segments)
    return segment(carry, keys[whole:]) if whole < len(keys) else carry
