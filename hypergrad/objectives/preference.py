"""The Pareto optimum on a given ray, reached from either side of it."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..number_checks import finite, positive
from .base import check_size, check_weights
from .common_descent import MGDA
from .linear_program import solve_vertex_lp

MAX_OBJECTIVES = 6


class EPO(eqx.Module):
    """Exact preference: the Pareto optimum at which all ``weights_k M_k`` are equal.

    Let ``r = weights / sum(weights)`` and ``s_k = r_k M_k / sum_j r_j M_j``. The
    non-uniformity

        mu = sum_k s_k log(K s_k)

    is 0 on the ray, and ``a_k = r_k (log(K s_k) - mu)`` weighs the hypergradients
    towards it. With ``G = [g_i . g_j]``, the weights x of a step solve a linear program
    on the simplex. Off the ray (``mu > tolerance``) it is

        max x'G a  subject to  (G x)_k >= (G a)_k  for each k with (G a)_k <= 0,
                               (G x)_k >= 0        for the k with the largest s_k,

    so that no value rises faster than along the direction of a. If no ``(G a)_k`` is
    above 0, the constraint is ``G x >= 0``. On the ray all values fall:
    ``max sum_k (G x)_k`` subject to ``G x >= 0``.

    A value thus rises where it must, also along the front, unlike under a weighted sum
    or MGDA. If the ray does not meet the front, the run leaves the front to reach it.

    Args:
      weights: Weights of the losses, ``[K]``, each above 0; only their ratios matter. K
        is at most 6.
      tolerance: Non-uniformity up to which the values count as on the ray: about half
        the mean squared relative difference of the ``weights_k M_k``. Defaults to 1e-6.
      ideal: Numbers subtracted from the values, ``[K]`` or one for all. Defaults to 0.
        Each value must stay above it: otherwise the weights are NaN and the run ends
        with a status that says so. A loss that may fall below 0, such as the seconds
        of a `LatencyTable` beyond its knots, needs an ideal below its infimum.

    Cost: K² inner products and a linear program of K variables, solved to rounding by
    enumerating its ``(2K choose K - 1)`` vertices.

    Bias: the aggregator has no score, so that ``trace.best_alpha`` is the last
    ``alpha``.

    Raises:
      TypeError, ValueError: An argument is invalid.

    Source: Mahapatra & Rajan 2020, the linear programs of their published code; on the
    ray the relaxed one, which is always feasible.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> aggregator = hg.objectives.EPO(jnp.array([1.0, 1.0]))
    >>> gram = jnp.array([[4.0, -4.0], [-4.0, 4.0]])  # opposite, so on the front
    >>> weights, _ = aggregator.compute_weights(jnp.array([3.0, 1.0]), gram, None)
    >>> bool(weights[0] > weights[1])
    True
    """

    weights: Float[Array, " K"] = eqx.field(
        converter=finite("weights", allow_array=True)
    )
    tolerance: float | Array = eqx.field(converter=positive("tolerance"), default=1e-6)
    ideal: float | Array = eqx.field(
        converter=finite("ideal", allow_array=True), default=0.0
    )

    citations = ("mahapatra2020",)

    def __check_init__(self):
        check_weights(self.weights, positive=True)

    def init(self, num_objectives: int) -> None:
        """Returns None: the aggregator has no state."""
        check_size("weights", self.weights, num_objectives, num_objectives)
        check_size("ideal", self.ideal, num_objectives, num_objectives)
        if num_objectives > MAX_OBJECTIVES:
            raise ValueError(
                f"outer_loss must have at most {MAX_OBJECTIVES} losses for EPO, which "
                f"enumerates vertices; got {num_objectives}. Use SmoothTchebycheff."
            )

    def compute_weights(
        self, value: Float[Array, " K"], gram: Float[Array, "K K"], state: None
    ) -> tuple[Float[Array, " K"], None]:
        """Returns the solution of the linear program off the ray or on it."""
        r = (self.weights / jnp.sum(self.weights)).astype(gram.dtype)
        s = r * jnp.asarray(value - self.ideal, gram.dtype)
        s = s / jnp.sum(s)
        log_ratios = jnp.log(s.size * s)
        non_uniformity = s @ log_ratios  # mu
        a = r * (log_ratios - non_uniformity)
        Ga = gram @ a

        # Values that fall along the direction of a are free, except the largest s_k.
        is_largest = s == jnp.max(s)
        is_free = (Ga > 0) & (s < jnp.max(s))
        lower_bounds = jnp.where(is_free, -jnp.inf, jnp.minimum(Ga, 0))
        lower_bounds = jnp.where(is_largest | ~jnp.any(Ga > 0), 0, lower_bounds)
        is_off_ray = non_uniformity > self.tolerance
        x, is_feasible = solve_vertex_lp(
            jnp.where(is_off_ray, Ga, jnp.sum(gram, axis=0)),
            gram,
            jnp.where(is_off_ray, lower_bounds, 0),
        )
        # If rounding excludes all vertices: the shortest vector satisfies G x >= 0.
        shortest, _ = MGDA().compute_weights(value, gram, None)
        x = jnp.where(is_feasible, x, shortest)
        is_defined = jnp.all(value > self.ideal) & jnp.isfinite(non_uniformity)
        return jnp.where(is_defined, x, jnp.nan), state
