"""Updates that are the gradient of no loss, such as temporal differences."""

from collections.abc import Callable

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PyTree

from ..inner import inner_stats
from ..inner.base import InnerStats
from ..inner.descent import run_inner_steps
from ..problem import Data, batch_fraction, sample_batch
from ..products import Loss
from ..validation import check_positive_int

SOURCE = "Xu, van Hasselt & Silver 2018 (arXiv 1805.09801)"


class SemiGradient(eqx.Module):
    """Steps along ``d loss(w, frozen, alpha, batch)/dw`` at ``frozen = w``.

    Args:
      loss: ``(w, frozen, alpha, batch) -> scalar``; what it makes of ``frozen``, a
        target or an advantage, a step takes for constant.
      optimizer: an optax transformation.
      num_steps: T, static.

    Temporal differences and actor-critic are such updates, and the gradient of no loss.
    From step to step ``frozen`` moves with ``w`` and ``alpha``, and derivatives of the
    steps go through it, as they would not through ``jax.lax.stop_gradient``. Use
    `Unrolled`, `Forward` or `FixedPoint`: `Implicit` takes the update for a gradient.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w, frozen, alpha, batch: 0.5 * (alpha + 0.5 * frozen - w) ** 2
    >>> solver = SemiGradient(loss, optax.sgd(1.0), num_steps=30)
    >>> w, _ = solver.solve(None, jnp.array(0.0), 1.0, None, jax.random.key(0))
    >>> round(float(w), 3)
    2.0
    """

    loss: Callable[[PyTree, PyTree, PyTree, PyTree], Array] = eqx.field(static=True)
    optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    differentiable = True

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, optimizer state)``."""
        del inner_loss, alpha, data, key
        return w, self.optimizer.init(w)

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """One update from the batch drawn with ``key``."""
        del inner_loss
        w, state = carry
        gradient = jax.grad(self.loss)(w, w, alpha, sample_batch(data, key))
        updates, state = self.optimizer.update(gradient, state, w)
        return optax.apply_updates(w, updates), state

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w_T, stats)``; same structure as ``w``."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        steps = self.num_steps
        return w, inner_stats(steps, num_grads=steps * batch_fraction(data))
