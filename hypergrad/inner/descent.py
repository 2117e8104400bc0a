"""Gradient descent by any optax transformation, and the loop it runs in."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..problem import Data, batch_fraction, sample_batch
from ..products import Loss
from ..validation import check_hashable, check_not_optax_factory, check_positive_int
from .base import InnerStats, inner_stats

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
        check_positive_int("num_steps", self.num_steps, minimum=0)
        if isinstance(self.optimizer, optax.GradientTransformation):
            return
        check_not_optax_factory("optimizer", self.optimizer)
        if not callable(self.optimizer):
            raise TypeError(
                "optimizer must be an optax.GradientTransformation such as "
                "optax.sgd(0.1), or a function alpha -> one; got "
                f"{type(self.optimizer).__name__}"
            )
        check_hashable("optimizer", self.optimizer)

    @property
    def differentiable(self) -> bool:
        """False for optax transformations that search along a line or keep L-BFGS."""
        if not isinstance(self.optimizer, optax.GradientTransformation):
            return True
        try:
            state = jax.eval_shape(self.optimizer.init, jnp.zeros(()))
        except Exception:  # a mask or labels that fit the user's w only
            return True
        return not contains_state(state, NON_DIFFERENTIABLE_STATES)

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
        batch = sample_batch(data, key)
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
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        steps = self.num_steps
        return w, inner_stats(steps, num_grads=steps * batch_fraction(data))


LINE_SEARCH_STATES = (
    optax.ScaleByZoomLinesearchState,
    optax.ScaleByBacktrackingLinesearchState,
)
NON_DIFFERENTIABLE_STATES = (*LINE_SEARCH_STATES, optax.ScaleByLBFGSState)


def contains_state(state: PyTree, kinds: tuple[type, ...]) -> bool:
    """Whether an optax state is one of these, or has one within."""
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return any(isinstance(node, kinds) for node in found)


def run_inner_steps(
    solver: Any,
    inner_loss: Loss,
    w: PyTree,
    alpha: PyTree,
    data: Data,
    key: Array,
    *,
    truncation_length: int | None = None,
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

    if truncation_length is None or truncation_length >= solver.num_steps:
        return run(alpha, carry, keys)
    early = solver.num_steps - truncation_length
    frozen = jax.lax.stop_gradient(alpha)
    carry = jax.lax.stop_gradient(run(frozen, carry, keys[:early]))
    if halves is None:
        return run(alpha, carry, keys[early:])
    older, newer = halves
    for seen, length in zip(
        (older, alpha, newer), split_steps(truncation_length), strict=True
    ):
        carry = run(seen, carry, keys[early : early + length])
        early += length
    return carry


def split_steps(last: int) -> tuple[int, int, int]:
    """Steps in the older half, between, and in the newer half."""
    return last // 2, last % 2, last // 2


def uses_checkpoints(num_steps: int) -> bool:
    """Whether so many steps are worth segments; fewer are all stored."""
    return num_steps >= 4


def _scan(step: Callable, carry: PyTree, keys: Array, checkpoint: bool) -> PyTree:
    """``lax.scan`` over keys, for the carry only; in ``sqrt(T)`` segments if asked."""
    scan = lambda carry, keys: jax.lax.scan(step, carry, keys)[0]
    if not (checkpoint and uses_checkpoints(len(keys))):
        return scan(carry, keys)
    length = math.isqrt(len(keys))
    whole = len(keys) - len(keys) % length
    segment = jax.checkpoint(scan)
    segments = keys[:whole].reshape(-1, length)
    carry, _ = jax.lax.scan(lambda c, k: (segment(c, k), None), carry, segments)
    return segment(carry, keys[whole:]) if whole < len(keys) else carry


def piecewise_constant_schedule(
    values: Array, num_steps: int
) -> Callable[[Array], Array]:
    """An optax schedule: ``values[count * len(values) // num_steps]``.

    Args:
      values: ``[W]``, one for each of W windows of equal length.
      num_steps: T of the run; steps beyond it keep the last value.

    One derivative a window is W numbers for `Forward` to carry, and an average over
    the window's steps has less variance than any of its own.

    Source: Micaelli & Storkey 2021 (arXiv 2007.07869).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> schedule = hg.windows(jnp.array([0.1, 0.2]), num_steps=6)
    >>> tuple(round(float(schedule(count)), 2) for count in (0, 2, 3, 5, 9))
    (0.1, 0.1, 0.2, 0.2, 0.2)
    """
    values = jnp.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"values must be a vector, one a window; got {values.shape}")
    check_positive_int("num_steps", num_steps)
    count_windows = values.size

    def schedule(count: Array) -> Array:
        window = jnp.asarray(count) * count_windows // num_steps
        return values[jnp.minimum(window, count_windows - 1)]

    return schedule
