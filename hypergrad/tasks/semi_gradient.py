"""A solver whose updates are not the gradient of any loss, such as TD learning."""

from collections.abc import Callable

import equinox as eqx
import jax
import optax
from jaxtyping import Array, PyTree

from ..batches import Data, batch_fraction, sample_batch
from ..inner import inner_stats
from ..inner.base import InnerStats
from ..inner.descent import run_inner_steps
from ..number_checks import check_positive_int
from ..products import Loss
from ..runtime.equal_optimizers import first_equal


class SemiGradient(eqx.Module):
    """Steps along ``d loss(w, frozen, alpha, batch)/dw`` at ``frozen = w``.

    Temporal-difference learning and actor-critic are such updates, which are not the
    gradient of any loss. After each step ``frozen`` is the new ``w``, so that
    derivatives of the run pass through it; ``jax.lax.stop_gradient`` would drop them.
    Use `Unrolled`, `Forward` or `FixedPoint`: `Implicit` assumes that the update is a
    gradient.

    Args:
      loss: ``(w, frozen, alpha, batch) -> scalar``. Within one step, a target or an
        advantage that depends on ``frozen`` is constant.
      optimizer: Optax transformation.
      num_steps: T, the number of steps, a static integer.

    Cost: T gradients, where mini-batches count in proportion.

    Raises:
      ValueError: ``num_steps`` is not a positive integer.

    >>> import jax, jax.numpy as jnp, optax
    >>> loss = lambda w, frozen, alpha, batch: 0.5 * (alpha + 0.5 * frozen - w) ** 2
    >>> solver = SemiGradient(loss, optax.sgd(1.0), num_steps=30)
    >>> w, _ = solver.solve(None, jnp.array(0.0), 1.0, None, jax.random.key(0))
    >>> round(float(w), 3)
    2.0
    """

    loss: Callable[[PyTree, PyTree, PyTree, PyTree], Array] = eqx.field(static=True)
    optimizer: optax.GradientTransformation = eqx.field(
        static=True, converter=first_equal
    )
    num_steps: int = eqx.field(static=True)

    differentiable = True

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns ``w`` and the first state of the optimizer."""
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
        """Returns the carry after one update on a batch sampled with ``key``."""
        del inner_loss
        w, state = carry
        semi_grad = jax.grad(self.loss)(w, w, alpha, sample_batch(data, key))
        updates, state = self.optimizer.update(semi_grad, state, w)
        return optax.apply_updates(w, updates), state

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns ``w`` after all steps and its cost."""
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        num_grads = self.num_steps * batch_fraction(data)
        return w, inner_stats(self.num_steps, num_grads=num_grads)
