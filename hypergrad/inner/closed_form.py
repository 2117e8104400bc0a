"""Inner problems whose solution has a formula."""

from collections.abc import Callable

import equinox as eqx
from jaxtyping import Array, PyTree

from ..problem import Data, full_batch
from ..products import Loss
from ..validation import check_hashable
from .base import (
    InnerStats,
    inner_stats,
)


class ClosedForm(eqx.Module):
    """``w* = fn(alpha, batch)``, where the inner problem has a formula.

    Args:
      fn: ``(alpha, batch) -> w*``, differentiable.

    Cost: counted as one gradient. Memory and bias: the formula's.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> solver = hg.ClosedForm(lambda alpha, batch: 2 * alpha)
    >>> w, _ = solver.solve(None, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> w.tolist()
    [2.0, 2.0]
    """

    fn: Callable[[PyTree, PyTree], PyTree] = eqx.field(static=True)

    differentiable = True
    num_steps = 1

    def __check_init__(self):
        if not callable(self.fn):
            raise TypeError(f"fn must be a function; got {self.fn!r}")
        check_hashable("fn", self.fn)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, ())``: a formula remembers nothing."""
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
        """``(fn(alpha, batch), ())``, on all of the data."""
        del inner_loss, carry
        return self.fn(alpha, full_batch(data, key)), ()

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(fn(alpha, batch), stats)``; ``w`` is not read."""
        w, _ = self.step(inner_loss, (w, ()), alpha, data, key)
        return w, inner_stats(1, num_grads=1)
