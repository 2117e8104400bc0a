"""One number made of K values: its gradient by the values weighs the hypergradients."""

import equinox as eqx
import jax
from jaxtyping import Array

from ..validation import float_converter
from .base import check_positive, check_size, check_weights


class WeightedSum(eqx.Module):
    """``sum_k weights_k M_k``.

    Args:
      weights: ``[K]``, none negative.

    Its minimisers are Pareto optimal where no weight is 0; the concave parts of a front
    it does not reach (`SmoothTchebycheff` does).

    Cost: an adjoint solve for each loss, as for every combiner, since the trace tells
    their values apart. One loss that sums them, ``lambda w, alpha, batch: weights[0] *
    M_0(w, alpha, batch) + ...``, takes the same steps with one adjoint solve.

    Source: Zadeh 1963.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.WeightedSum(jnp.array([1.0, 3.0]))
    >>> float(aggregator.score(jnp.array([2.0, 0.5])))
    3.5
    """

    weights: Array = eqx.field(converter=float_converter("weights", optional=False))

    citations = ("zadeh1963",)

    def __check_init__(self):
        check_weights(self.weights)

    def init(self, num_objectives: int) -> None:
        """No state; K weights."""
        check_size("weights", self.weights, num_objectives, num_objectives)

    def score(self, value: Array) -> Array:
        """What is minimised."""
        return self.weights @ value

    def compute_weights(
        self, value: Array, gram: Array, state: None
    ) -> tuple[Array, None]:
        """The same weights at every step."""
        del value, gram
        return self.weights, state


class SmoothTchebycheff(eqx.Module):
    """``T log sum_k exp(weights_k (M_k - ideal_k) / T)``, a smooth maximum.

    Args:
      weights: ``[K]``, none negative: at the optimum ``weights_k (M_k - ideal_k)`` are
        about equal, so they are a preference among the losses.
      temperature: T, in units of ``weights_k M_k``; the score lies at most ``T log K``
        above the maximum.
      ideal: ``[K]`` or a number, below what each loss can reach.

    Reaches every Pareto optimum at a low temperature, those of a concave front
    included; the lower it is, the shorter must the steps be.

    Source: Lin et al. 2024 (arXiv 2402.19078).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.SmoothTchebycheff(jnp.ones(2), temperature=0.01)
    >>> round(float(aggregator.score(jnp.array([2.0, 0.5]))), 6)
    2.0
    """

    weights: Array = eqx.field(converter=float_converter("weights", optional=False))
    temperature: float | Array = eqx.field(
        converter=float_converter("temperature", optional=False), default=0.1
    )
    ideal: float | Array = eqx.field(
        converter=float_converter("ideal", optional=False), default=0.0
    )

    citations = ("lin2024",)

    def __check_init__(self):
        check_weights(self.weights)
        check_positive("temperature", self.temperature)

    def init(self, num_objectives: int) -> None:
        """No state; K weights."""
        check_size("weights", self.weights, num_objectives, num_objectives)
        check_size("ideal", self.ideal, num_objectives, num_objectives)

    def score(self, value: Array) -> Array:
        """What is minimised."""
        return self.temperature * jax.nn.logsumexp(self._scaled(value))

    def compute_weights(
        self, value: Array, gram: Array, state: None
    ) -> tuple[Array, None]:
        """``weights * softmax(weights (M - ideal) / T)``, the gradient of the score."""
        del gram
        return self.weights * jax.nn.softmax(self._scaled(value)), state

    def _scaled(self, value: Array) -> Array:
        return self.weights * (value - self.ideal) / self.temperature
