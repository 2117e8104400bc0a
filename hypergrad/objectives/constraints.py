"""Minimization of the first loss subject to limits on the others."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..number_checks import check_positive_int, float_converter, positive
from ..validation import is_traced
from .base import check_size

State = tuple[Float[Array, " K-1"], Int[Array, ""]]


class AugmentedLagrangian(eqx.Module):
    """The augmented Lagrangian of ``min M_1`` subject to ``M_k <= limit_k``, k = 2..K.

    Each step follows the gradient of

        M_1 + sum_k (max(0, m_k + penalty (M_k - limit_k))² - m_k²) / (2 penalty),

    and every ``period`` steps the multipliers are updated,

        m_k <- max(0, m_k + penalty (M_k - limit_k)).

    After convergence ``trace.stats["objective_weights"]`` holds 1 and the multipliers:
    the decrease of M_1 per unit by which a limit is raised.

    Args:
      limits: Limits, ``[K - 1]`` or one number for all. Scale the losses so that they
        are of order one, such as FLOPs over 2e6 with a limit of 1.
      penalty: Weight of a violation, above 0. A higher one meets the limits sooner but
        needs shorter steps. Defaults to 1.
      period: Number of steps between updates of the multipliers. Static. Defaults to 1.

    Bias: limits hold in the limit of many steps, not at each step. The aggregator has
    no score, so that ``trace.best_alpha`` is the last ``alpha``.

    Raises:
      TypeError, ValueError: An argument is invalid.

    Source: Hestenes 1969; Rockafellar 1973 for inequalities.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.AugmentedLagrangian(1.0, penalty=2.0)
    >>> state, value = aggregator.init(2), jnp.array([0.0, 1.5])
    >>> for _ in range(2):
    ...     weights, state = aggregator.compute_weights(value, jnp.eye(2), state)
    >>> weights.tolist()
    [1.0, 2.0]
    """

    limits: float | Array = eqx.field(
        converter=float_converter("limits", optional=False)
    )
    penalty: float | Array = eqx.field(converter=positive("penalty"), default=1.0)
    period: int = eqx.field(static=True, default=1)

    citations = ("hestenes1969", "rockafellar1973")

    def __check_init__(self):
        limits = self.limits
        if not is_traced(limits) and np.any(np.isnan(limits) | (limits == -np.inf)):
            raise ValueError(
                f"limits must not be NaN or -inf, which no loss keeps; got {limits}."
            )
        check_positive_int("period", self.period)

    def init(self, num_objectives: int) -> State:
        """Returns multipliers of 0, and the number of steps made."""
        if num_objectives < 2:
            raise ValueError(
                "outer_loss must have at least two losses for AugmentedLagrangian; got "
                "1. Pass the loss to be minimized, then the losses to be kept within "
                "limits."
            )
        check_size("limits", self.limits, num_objectives - 1, num_objectives)
        return jnp.zeros(num_objectives - 1), jnp.asarray(0)

    def compute_weights(
        self, value: Float[Array, " K"], gram: Float[Array, "K K"], state: State
    ) -> tuple[Float[Array, " K"], State]:
        """Returns 1 and the updated multipliers, which become the state if due."""
        del gram
        multipliers, step = state
        violation = jnp.asarray(value[1:] - self.limits, multipliers.dtype)
        # The derivative of the augmented term of M_k is the updated multiplier.
        updated = jnp.maximum(0, multipliers + self.penalty * violation)
        should_update = (step + 1) % self.period == 0
        state = jnp.where(should_update, updated, multipliers), step + 1
        return jnp.concatenate([jnp.ones_like(updated[:1]), updated]), state
