"""A linear program of K variables, the weights of K objectives."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def solve_vertex_lp(c: Array, A: Array, b: Array) -> tuple[Array, Array]:
    """``argmax c'x`` over ``x >= 0, sum(x) = 1, A x >= b``, and whether there is one.

    Args:
      c: ``[K]``.
      A: ``[M, K]``.
      b: ``[M]``; minus infinity where a row asks for nothing.

    Returns:
      ``x``, exact to rounding, NaN or not feasible where nothing is; and a flag.

    Cost: every vertex is tried, ``(K + M choose K - 1)`` solves, K by K: for few
    variables.

    >>> import jax.numpy as jnp
    >>> c, A, b = jnp.array([2.0, 1.0]), jnp.array([[-1.0, 1.0]]), jnp.array([-0.5])
    >>> x, found = best_vertex(c, A, b)
    >>> x.tolist(), bool(found)
    ([0.75, 0.25], True)
    """
    rows = jnp.concatenate([jnp.eye(c.size, dtype=A.dtype), A])
    least = jnp.concatenate([jnp.zeros_like(c), b])
    scale = jnp.where(jnp.isfinite(least), jnp.abs(least), 0)
    rounding = 100 * jnp.finfo(A.dtype).eps

    def vertex(tight):
        """Where K - 1 inequalities are equations, beside the sum."""
        equations = jnp.concatenate([rows[tight], jnp.ones_like(rows[:1])])
        x = jnp.linalg.solve(equations, jnp.append(least[tight], 1))
        noise = rounding * (jnp.abs(rows) @ jnp.abs(x) + scale)
        satisfied = (rows @ x >= least - noise).at[tight].set(True)
        return jnp.maximum(x, 0), jnp.all(satisfied) & jnp.all(jnp.isfinite(x))

    choices = list(combinations(range(len(rows)), c.size - 1))
    x, feasible = jax.vmap(vertex)(np.array(choices, int).reshape(len(choices), -1))
    return x[jnp.argmax(jnp.where(feasible, x @ c, -jnp.inf))], jnp.any(feasible)
