"""Directions along which all K values fall.

The weights depend on the hypergradients only through ``G = [g_i . g_j]``.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .quadratic_program import solve_nonnegative_qp, solve_simplex_qp


class MGDA(eqx.Module):
    """The shortest vector ``sum_k weights_k g_k`` with weights on the simplex.

    Its inner product with each hypergradient is at least its own squared length, so
    that all values fall at that rate. It is 0 exactly where ``alpha`` is Pareto
    stationary. Short hypergradients get the largest weights: divide the losses by their
    scale.

    Cost: K² inner products and a quadratic program of K variables, solved to rounding.

    Source: Désidéri 2012; Sener & Koltun 2018, arXiv:1810.04650.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> gram = jnp.array([[1.0, 0.0], [0.0, 4.0]])
    >>> weights, _ = hg.objectives.MGDA().compute_weights(jnp.zeros(2), gram, None)
    >>> weights.round(6).tolist()
    [0.8, 0.2]
    """

    citations = ("desideri2012", "sener2018")

    def init(self, num_objectives: int) -> None:
        """Returns None: the aggregator has no state."""
        del num_objectives

    def compute_weights(
        self, value: Float[Array, " K"], gram: Float[Array, "K K"], state: None
    ) -> tuple[Float[Array, " K"], None]:
        """Returns the minimum of ``weights' G weights`` on the simplex."""
        del value
        return _nan_unless_finite(gram, solve_simplex_qp(gram)), state


class UPGrad(eqx.Module):
    """The mean of the hypergradients, each projected onto the cone of common descent.

    The cone contains the directions whose inner product with every hypergradient is at
    least 0. Hypergradients that do not conflict remain unchanged, and the direction is
    then their mean. Each influences it in proportion to its length.

    Cost: K² inner products and K quadratic programs of K variables, solved to the
      rounding of the inner products.

    Source: Quinton & Rey 2024, arXiv:2406.16232.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> gram = jnp.array([[1.0, -1.0], [-1.0, 2.0]])
    >>> weights, _ = hg.objectives.UPGrad().compute_weights(jnp.zeros(2), gram, None)
    >>> weights.round(6).tolist()
    [1.0, 0.75]
    """

    citations = ("quinton2024",)

    def init(self, num_objectives: int) -> None:
        """Returns None: the aggregator has no state."""
        del num_objectives

    def compute_weights(
        self, value: Float[Array, " K"], gram: Float[Array, "K K"], state: None
    ) -> tuple[Float[Array, " K"], None]:
        """Returns the mean of the weights of the K projections."""
        del value
        # The projection of g_k is the shortest g_k + sum_i x_i g_i with x >= 0, so that
        # x minimizes x'G x / 2 + (G_k)'x.
        x = jax.vmap(lambda row: solve_nonnegative_qp(gram, -row))(gram)
        weights = jnp.mean(jnp.eye(len(gram), dtype=gram.dtype) + x, axis=0)
        return _nan_unless_finite(gram, weights), state


def _nan_unless_finite(gram: Array, weights: Array) -> Array:
    """Returns the weights, or NaN if an inner product is NaN or infinite."""
    return jnp.where(jnp.all(jnp.isfinite(gram)), weights, jnp.nan)
