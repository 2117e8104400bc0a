"""A quadratic program of K variables, one for each objective."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def solve_nonnegative_qp(
    A: Float[Array, "K K"], b: Float[Array, " K"]
) -> Float[Array, " K"]:
    """Returns ``argmin_x x'A x / 2 - b'x`` subject to ``x >= 0``.

    An active-set method, exact to rounding: the positive entries of x solve the
    corresponding rows of ``A x = b``.

    Args:
      A: Positive semidefinite matrix.
      b: Vector in the range of A, so that a minimum exists.

    Cost: about one K by K solve per positive entry; at most 10 K solves.

    Source: Lawson & Hanson 1974, on the normal equations.

    >>> solve_nonnegative_qp(jnp.eye(2), jnp.array([3.0, -1.0])).tolist()
    [3.0, 0.0]
    """
    size, identity = b.size, jnp.eye(b.size, dtype=bool)
    rtol = 10 * jnp.finfo(A.dtype).eps

    def body_fun(carry):
        x, is_free, num_solves, _ = carry
        # The minimum over the free variables, with rows of the identity for the others.
        is_free_pair = is_free[:, None] & is_free[None, :]
        free_minimum = jnp.linalg.solve(
            jnp.where(is_free_pair, A, identity.astype(A.dtype)),
            jnp.where(is_free, b, 0),
        )
        # Move towards it until the first variable is 0, which is then fixed at 0.
        is_blocking = is_free & (free_minimum < 0)
        max_step = jnp.where(
            is_blocking, x / jnp.where(is_blocking, x - free_minimum, 1), jnp.inf
        )
        step_size = jnp.minimum(1, jnp.min(max_step))
        x = jnp.where(is_free, x + step_size * (free_minimum - x), 0)
        is_free &= ~(is_blocking & (max_step <= step_size))
        x = jnp.where(is_free, x, 0)
        # At the minimum, free the variable along which the objective decreases fastest.
        descent = jnp.where(is_free, -jnp.inf, b - A @ x)
        rounding_error = rtol * (jnp.abs(b) + jnp.abs(A) @ x)
        is_at_minimum = ~jnp.any(is_blocking)
        is_entering = (
            identity[jnp.argmax(descent)] & (descent > rounding_error) & is_at_minimum
        )
        should_continue = jnp.any(is_blocking) | jnp.any(is_entering)
        return x, is_free | is_entering, num_solves + 1, should_continue

    cond_fun = lambda carry: carry[-1] & (carry[-2] < 10 * size)
    init_carry = (
        jnp.zeros_like(b),
        jnp.zeros(size, bool),
        jnp.asarray(0),
        jnp.asarray(True),
    )
    return jax.lax.while_loop(cond_fun, body_fun, init_carry)[0]
