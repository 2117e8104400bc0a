"""A linear program of K variables, the weights of K objectives."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def solve_vertex_lp(
    c: Float[Array, " K"], A: Float[Array, "M K"], b: Float[Array, " M"]
) -> tuple[Float[Array, " K"], Bool[Array, ""]]:
    """Returns ``argmax_x c'x`` subject to ``x >= 0``, ``sum(x) = 1`` and ``A x >= b``.

    All vertices of the feasible set are enumerated.

    Args:
      c: Objective.
      A, b: Constraints; an entry of ``b`` of minus infinity removes its row.

    Returns:
      ``x``, exact to rounding, and whether a feasible point was found. If not, ``x`` is
      NaN or infeasible.

    Cost: ``(K + M choose K - 1)`` solves, K by K; for few variables.

    >>> import jax.numpy as jnp
    >>> c, A, b = jnp.array([2.0, 1.0]), jnp.array([[-1.0, 1.0]]), jnp.array([-0.5])
    >>> x, is_feasible = solve_vertex_lp(c, A, b)
    >>> x.tolist(), bool(is_feasible)
    ([0.75, 0.25], True)
    """
    rows = jnp.concatenate([jnp.eye(c.size, dtype=A.dtype), A])
    lower_bounds = jnp.concatenate([jnp.zeros_like(c), b])
    scale = jnp.where(jnp.isfinite(lower_bounds), jnp.abs(lower_bounds), 0)
    rtol = 100 * jnp.finfo(A.dtype).eps

    def solve_vertex(active):
        """Returns the point at which K - 1 constraints are active, and feasibility."""
        equations = jnp.concatenate([rows[active], jnp.ones_like(rows[:1])])
        x = jnp.linalg.solve(equations, jnp.append(lower_bounds[active], 1))
        rounding_error = rtol * (jnp.abs(rows) @ jnp.abs(x) + scale)
        is_satisfied = (rows @ x >= lower_bounds - rounding_error).at[active].set(True)
        return jnp.maximum(x, 0), jnp.all(is_satisfied) & jnp.all(jnp.isfinite(x))

    active_sets = list(combinations(range(len(rows)), c.size - 1))
    active_sets = np.array(active_sets, int).reshape(len(active_sets), -1)
    x, is_feasible = jax.vmap(solve_vertex)(active_sets)
    best = jnp.argmax(jnp.where(is_feasible, x @ c, -jnp.inf))
    return x[best], jnp.any(is_feasible)
