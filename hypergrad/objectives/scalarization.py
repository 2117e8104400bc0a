"""Functions of K values, whose gradients weigh the hypergradients."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from ..number_checks import finite, positive
from .base import check_size, check_weights


class WeightedSum(eqx.Module):
    """The weighted sum of the values, ``sum_k weights_k M_k``.

    Its minimizers are Pareto optimal if no weight is 0. They never lie on a concave
    part of a Pareto front; use `SmoothTchebycheff` there.

    Args:
      weights: Weights of the losses, ``[K]``, none of them negative.

    Cost: an adjoint solve for each loss, as for every aggregator, because the trace
    holds the value of each. One outer loss that sums them, ``lambda w, alpha, batch:
    weights[0] * M_0(w, alpha, batch) + ...``, takes the same steps with one solve.

    Raises:
      TypeError, ValueError: An argument is invalid.

    Source: Zadeh 1963.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.WeightedSum(jnp.array([1.0, 3.0]))
    >>> float(aggregator.score(jnp.array([2.0, 0.5])))
    3.5
    """

    weights: Float[Array, " K"] = eqx.field(
        converter=finite("weights", allow_array=True)
    )

    citations = ("zadeh1963",)

    def __check_init__(self):
        check_weights(self.weights)

    def init(self, num_objectives: int) -> None:
        """Returns None: the aggregator has no state."""
        check_size("weights", self.weights, num_objectives, num_objectives)

    def score(self, value: Float[Array, " K"]) -> Float[Array, ""]:
        """Returns the weighted sum of the values."""
        return self.weights @ value

    def compute_weights(
        self, value: Float[Array, " K"], gram: Float[Array, "K K"], state: None
    ) -> tuple[Float[Array, " K"], None]:
        """Returns the weights, the same at every step."""
        del value, gram
        return self.weights, state


class SmoothTchebycheff(eqx.Module):
    """A smooth maximum, ``T log sum_k exp(weights_k (M_k - ideal_k) / T)``.

    At a low temperature T every Pareto optimum is the minimum for some weights, on
    concave parts of a front as well. The lower T is, the shorter the steps must be.

    Args:
      weights: Weights of the losses, ``[K]``, none of them negative. At the minimum the
        products ``weights_k (M_k - ideal_k)`` are about equal, so that the weights
        state a preference.
      temperature: T, in units of ``weights_k M_k``. The score is at most ``T log K``
        above the maximum. Defaults to 0.1.
      ideal: Lower bounds of the losses, ``[K]`` or one number. Defaults to 0.

    Raises:
      TypeError, ValueError: An argument is invalid.

    Source: Lin et al. 2024, arXiv:2402.19078.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.SmoothTchebycheff(jnp.ones(2), temperature=0.01)
    >>> round(float(aggregator.score(jnp.array([2.0, 0.5]))), 6)
    2.0
    """

    weights: Float[Array, " K"] = eqx.field(
        converter=finite("weights", allow_array=True)
    )
    temperature: float | Array = eqx.field(
        converter=positive("temperature"), default=0.1
    )
    ideal: float | Array = eqx.field(
        converter=finite("ideal", allow_array=True), default=0.0
    )

    citations = ("lin2024",)

    def __check_init__(self):
        check_weights(self.weights)

    def init(self, num_objectives: int) -> None:
        """Returns None: the aggregator has no state."""
        check_size("weights", self.weights, num_objectives, num_objectives)
        check_size("ideal", self.ideal, num_objectives, num_objectives)

    def score(self, value: Float[Array, " K"]) -> Float[Array, ""]:
        """Returns the smooth maximum of the values."""
        return self.temperature * jax.nn.logsumexp(self._scaled(value))

    def compute_weights(
        self, value: Float[Array, " K"], gram: Float[Array, "K K"], state: None
    ) -> tuple[Float[Array, " K"], None]:
        """Returns the gradient of the score by the values."""
        del gram
        # d score / dM = weights * softmax(weights (M - ideal) / T)
        return self.weights * jax.nn.softmax(self._scaled(value)), state

    def _scaled(self, value: Array) -> Array:
        return self.weights * (value - self.ideal) / self.temperature
