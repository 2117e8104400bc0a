"""The first loss is minimised, the others are kept within limits."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..validation import check_positive_int, float_converter
from .base import check_positive, check_size


class AugmentedLagrangian(eqx.Module):
    """``min M_1`` subject to ``M_k <= limit_k`` for k = 2..K, by multipliers.

    Each step descends along the gradient of
    ``M_1 + sum_k (max(0, m_k + penalty (M_k - limit_k))² - m_k²) / (2 penalty)``; every
    ``period`` steps each multiplier ``m_k`` becomes
    ``max(0, m_k + penalty (M_k - limit_k))``. At the end ``trace.stats["objective_weights"]``
    holds 1 and the multipliers: how much M_1 would fall for each unit that a limit
    rises.

    Args:
      limits: ``[K - 1]``, or one number for all; let them be of order one (FLOPs over
        2e6, at most 1).
      penalty: of a violation; higher meets the limits sooner, by shorter steps.
      period: steps between updates of the multipliers, static.

    Limits hold in the limit of many steps, not at each. No score: ``trace.best_alpha``
    is the last.

    Source: Hestenes 1969; Rockafellar 1973 for inequalities.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.AugmentedLagrangian(1.0, penalty=2.0)
    >>> state = aggregator.init(2)
    >>> for _ in range(2):
    ...     weights, state = aggregator.compute_weights(jnp.array([0.0, 1.5]), jnp.eye(2), state)
    >>> weights.tolist()
    [1.0, 2.0]
    """

    limits: float | Array = eqx.field(
        converter=float_converter("limits", optional=False)
    )
    penalty: float | Array = eqx.field(
        converter=float_converter("penalty", optional=False), default=1.0
    )
    period: int = eqx.field(static=True, default=1)

    citations = ("hestenes1969", "rockafellar1973")

    def __check_init__(self):
        check_positive("penalty", self.penalty)
        check_positive_int("period", self.period)

    def init(self, num_objectives: int) -> tuple[Array, Array]:
        """Multipliers of 0, and how many steps were made."""
        if num_objectives < 2:
            raise ValueError(
                "AugmentedLagrangian needs a loss and at least one more to be kept "
                "within a limit; the problem has one"
            )
        check_size("limits", self.limits, num_objectives - 1, num_objectives)
        return jnp.zeros(num_objectives - 1), jnp.asarray(0)

    def compute_weights(
        self, value: Array, gram: Array, state: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        """1, and the multipliers as they would be next."""
        del gram
        multipliers, count = state
        violation = jnp.asarray(value[1:] - self.limits, multipliers.dtype)
        proposed = jnp.maximum(0, multipliers + self.penalty * violation)
        due = (count + 1) % self.period == 0
        state = jnp.where(due, proposed, multipliers), count + 1
        return jnp.concatenate([jnp.ones_like(proposed[:1]), proposed]), state
