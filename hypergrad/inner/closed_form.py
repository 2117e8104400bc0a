"""Inner problems whose solution has a formula."""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, PyTree

from ..batches import Data, full_batch
from ..products import Loss
from ..validation import check_hashable
from .base import InnerStats, inner_stats


class ClosedForm(eqx.Module):
    """The formula ``w* = fn(alpha, batch)`` of an inner problem that has one.

    The formula is evaluated on all of the data.

    Args:
      fn: Differentiable function ``(alpha, batch) -> w*``.

    Cost: counted as one gradient.
    Memory: that of the formula.
    Bias: that of the formula.

    Raises:
      TypeError: ``fn`` is not a hashable function.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> solver = hg.ClosedForm(lambda alpha, batch: 2 * alpha)
    >>> w, _ = solver.solve(None, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> w.tolist()
    [2.0, 2.0]
    """

    fn: Callable[[PyTree, PyTree], PyTree] = eqx.field(static=True)

    differentiable = True
    ignores_loss = True  # so that it cannot minimize a sum of losses
    num_steps = 1
    uses_all_data = True

    def __check_init__(self):
        if not callable(self.fn):
            raise TypeError(f"fn must be a function; got {self.fn!r}.")
        check_hashable("fn", self.fn)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """Returns ``(w, ())``, because a formula has no state."""
        del inner_loss, alpha, data, key
        return w, ()

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """Returns ``(fn(alpha, batch), ())``."""
        del inner_loss, carry
        return self.fn(alpha, full_batch(data, key)), ()

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns ``fn(alpha, batch)`` and its cost; ``w`` is not used."""
        w, _ = self.step(inner_loss, (w, ()), alpha, data, key)
        return w, inner_stats(1, num_grads=1)
