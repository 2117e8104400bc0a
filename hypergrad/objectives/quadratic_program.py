"""Quadratic programs of K variables, one for each objective."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Vector = Float[Array, " K"]
Matrix = Float[Array, "K K"]


def solve_nonnegative_qp(A: Matrix, b: Vector) -> Vector:
    """Returns ``argmin_x x'A x / 2 - b'x`` subject to ``x >= 0``.

    An active-set method, exact to rounding: the positive entries of x solve the
    corresponding rows of ``A x = b``. They belong to linearly independent rows, also
    where A has a lower rank than K.

    Args:
      A: Positive semidefinite matrix.
      b: Vector in the range of A, so that a minimum exists.

    Cost: about one K by K solve with K + 1 right-hand sides per positive entry; at most
      10 K solves.

    Source: Lawson & Hanson 1974, on the normal equations.

    >>> solve_nonnegative_qp(jnp.eye(2), jnp.array([3.0, -1.0])).tolist()
    [3.0, 0.0]
    """
    rtol = 4 * jnp.finfo(A.dtype).eps

    def minimum_over(is_free):
        # Rows of the identity for the variables that are not free.
        matrix = jnp.where(_pairs(is_free), A, jnp.eye(b.size, dtype=A.dtype))
        free_rows = jnp.where(is_free[:, None], A, 0)
        rhs = jnp.column_stack([jnp.where(is_free, b, 0), free_rows])
        minimum, coefficients = jnp.split(jnp.linalg.solve(matrix, rhs), [1], axis=1)
        # What the free variables leave of each other one: A_jj - A_jF A_FF^-1 A_Fj.
        # Without a rest the objective does not decrease along it, but for rounding.
        remaining = jnp.diag(A) - jnp.sum(free_rows * coefficients, axis=0)
        return minimum[:, 0], remaining > rtol * jnp.diag(A)

    def descent(x):
        return b - A @ x, jnp.abs(b) + jnp.abs(A) @ x

    is_free = jnp.zeros(b.size, bool)
    return _minimize_by_active_set(minimum_over, descent, jnp.zeros_like(b), is_free)


def solve_simplex_qp(A: Matrix) -> Vector:
    """Returns ``argmin_x x'A x`` subject to ``x >= 0`` and ``sum(x) = 1``.

    The same method: the positive entries have equal entries of ``A x``.

    Args:
      A: Positive semidefinite matrix.

    Cost: about one solve of K + 1 rows per positive entry; at most 10 K solves.

    >>> solve_simplex_qp(jnp.diag(jnp.array([1.0, 3.0]))).tolist()
    [0.75, 0.25]
    """
    size = len(A)
    # A contains the inner products of vectors g_k with the lengths |g_k|. The program
    # is solved for y with x_k = r_k y_k and r_k = min |g| / |g_k|, whose entries y_k
    # are of one order, so that neither a long nor a short vector loses digits.
    has_length = jnp.diag(A) > 0
    lengths = jnp.sqrt(jnp.where(has_length, jnp.diag(A), 1))
    min_length = jnp.min(jnp.where(has_length, lengths, jnp.inf))
    r = jnp.where(has_length, min_length / lengths, 1)
    cosines = A / lengths[:, None] / lengths[None, :]

    def minimum_over(is_free):
        #   [ C   r ] [ y ]   [ 0 ]
        #   [ r'  0 ] [ m ] = [ 1 ]     for the free variables, with the cosines C
        identity = jnp.eye(size + 1, dtype=A.dtype)
        block = jnp.where(_pairs(is_free), cosines, identity[:-1, :-1])
        border = jnp.where(is_free, r, 0)[:, None]
        matrix = jnp.block([[block, border], [border.T, jnp.zeros((1, 1), A.dtype)]])
        y = jnp.linalg.solve(matrix, identity[-1])[:-1]
        return r * y, jnp.ones(size, bool)

    def descent(x):
        Ax, size_of_Ax = A @ x, jnp.abs(A) @ x
        return x @ Ax - Ax, x @ size_of_Ax + size_of_Ax

    is_free = jnp.arange(size) == jnp.argmin(jnp.diag(A))  # the shortest vector alone
    return _minimize_by_active_set(
        minimum_over, descent, is_free.astype(A.dtype), is_free
    )


def _pairs(is_free: Bool[Array, " K"]) -> Bool[Array, "K K"]:
    return is_free[:, None] & is_free[None, :]


def _minimize_by_active_set(
    minimum_over: Callable[[Array], tuple[Vector, Bool[Array, " K"]]],
    descent_fn: Callable[[Vector], tuple[Vector, Vector]],
    x: Vector,
    is_free: Bool[Array, " K"],
) -> Vector:
    """Returns the minimum of a convex quadratic program over entries of at least 0.

    Args:
      minimum_over: ``is_free -> (x, can_enter)``: the minimum over the free variables,
        and whether each other variable may become free.
      descent_fn: ``x -> (descent, magnitude)``: how fast the objective decreases along
        each variable, and the sum of the absolute values of its terms.
      x, is_free: The first point, and the variables that are free there.
    """
    rtol = 10 * jnp.finfo(x.dtype).eps

    def body_fun(carry):
        x, is_free, num_solves, _ = carry
        minimum, can_enter = minimum_over(is_free)
        # A singular system is that of a variable which has entered by rounding alone.
        is_solved = jnp.all(jnp.isfinite(minimum))
        minimum = jnp.where(is_solved, minimum, x)
        # Move towards it until the first variable is 0, which is then fixed at 0.
        is_blocking = is_free & (minimum < 0)
        max_step = jnp.where(
            is_blocking, x / jnp.where(is_blocking, x - minimum, 1), jnp.inf
        )
        step_size = jnp.minimum(1, jnp.min(max_step))
        x = jnp.where(is_free, x + step_size * (minimum - x), 0)
        is_free &= ~(is_blocking & (max_step <= step_size))
        x = jnp.where(is_free, x, 0)
        # At the minimum, free the variable along which the objective decreases fastest.
        descent, magnitude = descent_fn(x)
        is_candidate = ~is_free & can_enter & (descent > rtol * magnitude)
        best = jnp.argmax(jnp.where(is_candidate, descent, -jnp.inf))
        is_at_minimum = ~jnp.any(is_blocking)
        is_entering = (jnp.arange(x.size) == best) & is_candidate & is_at_minimum
        should_continue = is_solved & (jnp.any(is_blocking) | jnp.any(is_entering))
        return x, is_free | is_entering, num_solves + 1, should_continue

    cond_fun = lambda carry: carry[-1] & (carry[-2] < 10 * x.size)
    init_carry = x, is_free, jnp.asarray(0), jnp.asarray(True)
    return jax.lax.while_loop(cond_fun, body_fun, init_carry)[0]
