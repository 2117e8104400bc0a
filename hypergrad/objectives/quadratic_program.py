"""A quadratic program of K variables, one an objective."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def solve_nonnegative_qp(A: Array, b: Array) -> Array:
    """``argmin x'A x / 2 - b'x`` over ``x >= 0``, by an active-set method.

    Args:
      A: ``[K, K]``, positive semidefinite.
      b: ``[K]``, in the range of A, so that there is a minimum.

    Returns:
      ``x``, exact to rounding: the variables that are not 0 solve ``A x = b``.

    Cost: about as many K by K solves as variables are not 0; at most 10 K.

    Source: Lawson & Hanson 1974, on the normal equations.

    >>> nonnegative(jnp.eye(2), jnp.array([3.0, -1.0])).tolist()
    [3.0, 0.0]
    """
    size, identity = b.size, jnp.eye(b.size, dtype=bool)
    rounding = 10 * jnp.finfo(A.dtype).eps

    def step(carry):
        x, free, count, _ = carry
        among = free[:, None] & free[None, :]
        goal = jnp.linalg.solve(
            jnp.where(among, A, identity.astype(A.dtype)), jnp.where(free, b, 0)
        )
        # As far towards the goal as all stay nonnegative; what gets to 0 stays there.
        blocked = free & (goal < 0)
        reach = jnp.where(blocked, x / jnp.where(blocked, x - goal, 1), jnp.inf)
        length = jnp.minimum(1, jnp.min(reach))
        x = jnp.where(free, x + length * (goal - x), 0)
        free &= ~(blocked & (reach <= length))
        x = jnp.where(free, x, 0)
        # At the goal: free the variable along which the objective falls the most.
        slope = jnp.where(free, -jnp.inf, b - A @ x)
        noise = rounding * (jnp.abs(b) + jnp.abs(A) @ x)
        enters = identity[jnp.argmax(slope)] & (slope > noise) & ~jnp.any(blocked)
        going = jnp.any(blocked) | jnp.any(enters)
        return x, free | enters, count + 1, going

    going = lambda carry: carry[-1] & (carry[-2] < 10 * size)
    start = jnp.zeros_like(b), jnp.zeros(size, bool), jnp.asarray(0), jnp.asarray(True)
    return jax.lax.while_loop(going, step, start)[0]
