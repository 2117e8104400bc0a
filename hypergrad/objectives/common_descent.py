"""Directions along which all K values fall, from the inner products of K gradients.

The weights depend on the gradients by ``G = [g_i . g_j]`` alone.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .quadratic_program import solve_nonnegative_qp


class MGDA(eqx.Module):
    """The shortest vector ``sum_k weights_k g_k`` with weights on the simplex.

    Its inner product with each gradient is at least its own squared length, so all
    values fall at that rate; it is 0 just where ``alpha`` is Pareto stationary. Short
    gradients weigh most: divide the losses by their scale.

    Cost: K² inner products and a quadratic program of K variables, solved to rounding.

    Source: Désidéri 2012; Sener & Koltun 2018 (arXiv 1810.04650).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> gram = jnp.array([[1.0, 0.0], [0.0, 4.0]])
    >>> hg.objectives.MGDA().compute_weights(jnp.zeros(2), gram, None)[0].round(6).tolist()
    [0.8, 0.2]
    """

    citations = ("desideri2012", "sener2018")

    def init(self, num_objectives: int) -> None:
        """No state; any K."""
        del num_objectives

    def compute_weights(
        self, value: Array, gram: Array, state: None
    ) -> tuple[Array, None]:
        """The minimum of ``weights' G weights`` on the simplex."""
        del value
        lengths = jnp.diag(gram)
        c = jnp.min(jnp.where(lengths > 0, lengths, jnp.inf))
        c = jnp.where(jnp.isfinite(c), c, 1)
        # Over x = s weights, x'(G + c 11')x / 2 - c 1'x is least at s = c / (weights' G
        # weights + c), where it is -c s / 2: the same weights, without the constraint.
        # With c the shortest squared length s is in [1/2, 1], and all rows keep digits.
        x = solve_nonnegative_qp(gram + c, jnp.full_like(lengths, c))
        return x / jnp.sum(x), state


class UPGrad(eqx.Module):
    """The mean of the gradients, each projected onto the cone of common descent.

    The cone holds the directions whose inner product with every gradient is at least 0;
    gradients that do not conflict are left as they are, so that the direction is then
    their mean. Each influences it in proportion to its length.

    Cost: K² inner products and K quadratic programs of K variables, solved to rounding.

    Source: Quinton & Rey 2024 (arXiv 2406.16232).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> gram = jnp.array([[1.0, -1.0], [-1.0, 2.0]])
    >>> hg.objectives.UPGrad().compute_weights(jnp.zeros(2), gram, None)[0].round(6).tolist()
    [1.0, 0.75]
    """

    citations = ("quinton2024",)

    def init(self, num_objectives: int) -> None:
        """No state; any K."""
        del num_objectives

    def compute_weights(
        self, value: Array, gram: Array, state: None
    ) -> tuple[Array, None]:
        """The mean of the weights of the K projections."""
        del value
        # The projection of g_k is g_k + sum_i x_i g_i, the shortest with x >= 0.
        added = jax.vmap(lambda row: solve_nonnegative_qp(gram, -row))(gram)
        return jnp.mean(jnp.eye(len(gram), dtype=gram.dtype) + added, axis=0), state
