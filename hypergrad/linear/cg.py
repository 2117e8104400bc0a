"""Conjugate gradients, with estimates of the extreme eigenvalues."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.scipy.linalg import eigh_tridiagonal
from jaxtyping import Array, Float, Int, PyTree

from ..method_summary import MethodSummary
from ..number_checks import check_positive_int, non_negative
from ..trees import (
    add_scale,
    apply_unless,
    divide,
    is_zero,
    machine_eps,
    norm,
    norm_ratio,
    power_of_two_scale,
    scalar_dtype,
    scale,
    vdot,
)
from ..validation import check_hashable
from .base import MatVec, SymmetricSolver, relative_residual
from .equilibration import solve_equilibrated


class CG(SymmetricSolver):
    """``v = H^-1 b`` by conjugate gradients, to a relative residual ``rtol``.

    The method is applied to ``(S H S) x = S b`` with ``v = S x``. By default ``S`` is
    a diagonal that gives the rows of ``S H S`` equal norms, so that the units of ``w``
    do not matter. With the condition number ``kappa`` of ``S H S``, the error in the
    H-norm after k steps is

        error_k <= 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k error_0.

    If ``p'Hp <= 0`` for a search direction ``p``, the solver stops and returns its last
    iterate; below 0 it sets ``negative_curvature``. Other statistics are
    ``num_products``, ``residual`` (true and relative), and ``ritz_min`` and
    ``ritz_max``, the extreme eigenvalues of the Lanczos matrix. These lie within the
    spectrum of ``S H S`` and approach its ends.

    Args:
      rtol: The solver stops at ``||S (b - H v)|| <= rtol ||S b||``. Defaults to
        ``eps^(3/4)`` of the dtype of ``b``, which is 2e-12 in float64 and 6e-6 in
        float32.
      max_steps: Maximum number of steps. Defaults to ``min(10 dim, 1000)``.
      preconditioner: 'diagonal', the default; None, which means ``S = I``; or a
        function ``r -> P^-1 r`` with symmetric positive definite ``P`` and ``S = I``,
        where the Ritz values are those of ``P^-1 H``. In an `Implicit` that estimates
        its error on ``H`` itself, None saves no product, because the steps with
        'diagonal' also yield what the estimate needs.

    Cost:
      One Hessian-vector product per step, one more for a warm start, one for the true
      residual, and with 'diagonal' eight for ``S``, or one per parameter for up to
      eight parameters.
    Memory: four vectors like ``w``, five with 'diagonal'.
    Bias: none at convergence.

    Source: Hestenes & Stiefel 1952; Ritz values from Golub & Van Loan, section 11.3.

    >>> import jax.numpy as jnp, lineax as lx, hypergrad as hg
    >>> H = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 4.0])), lx.symmetric_tag)
    >>> solution = lx.linear_solve(H, jnp.array([1.0, 2.0]), hg.CG())
    >>> bool(jnp.allclose(solution.value, jnp.array([1.0, 0.5]), atol=1e-4))
    True
    """

    rtol: float | Array | None = eqx.field(
        default=None, converter=non_negative("rtol", optional=True)
    )
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: str | Callable[[PyTree], PyTree] | None = eqx.field(
        static=True, default="diagonal", kw_only=True
    )

    citations = ("hestenes1952",)
    exact = True
    summary = (
        MethodSummary(
            "Implicit(solver)",
            num_grads="T",
            num_hvps="k + 1",
            memory="4 w",
            bias="none if converged",
            alpha_in=("losses",),
            recommended_for="a first choice for any N, if the inner loop converges",
            not_recommended_for="an inner loop that stops early; an indefinite H",
            reason=(
                "k grows as the square root of the condition number, whatever N and T "
                "are"
            ),
        ),
    )

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps, optional=True)
        preconditioner = self.preconditioner
        if not (preconditioner in (None, "diagonal") or callable(preconditioner)):
            raise ValueError(
                "preconditioner must be None, 'diagonal' or a function r -> P^-1 r; "
                f"got {preconditioner!r}."
            )
        check_hashable("preconditioner", preconditioner)

    @property
    def is_scaled(self) -> bool:
        """True if the steps do not depend on the units of ``w``."""
        return self.preconditioner == "diagonal"

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Returns ``(v, result, stats)``; ``options["y0"]`` is the starting point."""
        run = functools.partial(
            conjugate_gradients, rtol=self.rtol, max_steps=self.max_steps
        )
        preconditioner = self.preconditioner
        if preconditioner is None:
            return run(state.mv, vector, options=options)
        if callable(preconditioner):
            return run(state.mv, vector, options=options, preconditioner=preconditioner)
        solve = lambda matvec, b, y0: run(matvec, b, options=options | {"y0": y0})
        return solve_equilibrated(
            solve, state.mv, vector, options.get("y0"), options.get("scaling")
        )


def conjugate_gradients(
    matvec: MatVec,
    b: PyTree,
    *,
    rtol: float | Array | None = None,
    max_steps: int | None = None,
    options: dict[str, Any],
    preconditioner: Callable[[PyTree], PyTree] = lambda r: r,
) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
    """Solves ``H v = b`` by preconditioned conjugate gradients.

    Args:
      matvec: Function ``v -> H v`` with symmetric ``H``.
      b: Right-hand side.
      rtol, max_steps: As in `CG`.
      options: As for `SymmetricSolver`.
      preconditioner: Function ``r -> P^-1 r`` with symmetric positive definite ``P``.

    Returns:
      ``(v, result, stats)``. The Ritz values are those of ``P^-1 H``.
    """
    eps = machine_eps(b)
    dimension = optax.tree.size(b)
    if rtol is None:
        rtol = eps**0.75
    if max_steps is None:
        max_steps = max(min(10 * dimension, 1000), 1)
    unit = power_of_two_scale(b)  # so that no square below underflows or overflows
    b, x = divide(b, unit), divide(options.get("y0"), unit)
    # The direction of a residual below rounding is noise, as is its curvature.
    squared_tol = (jnp.maximum(jnp.asarray(rtol), 4 * eps) * norm(b)) ** 2
    x, r, num_init_products = first_residual(matvec, b, x)
    num_coefficients = max(min(dimension, max_steps), 1)
    x, r, rz, k, curvature, step_sizes, ratios = run_recurrence(
        matvec, preconditioner, x, r, squared_tol, max_steps, num_coefficients
    )
    is_stopped = curvature <= 0
    # A NaN in b or H ends the loop, and must not leave the starting point as a result.
    x = add_scale(x, jnp.where(jnp.isfinite(rz), 0.0, jnp.nan), x)
    is_solved = ~is_stopped & (vdot(r, r) <= squared_tol)
    result = lx.RESULTS.where(
        is_solved, lx.RESULTS.successful, lx.RESULTS.max_steps_reached
    )
    num_products = num_init_products + k
    if options.get("true_residual", True):
        residual = relative_residual(b, matvec(x))
        num_products = num_products + 1
    else:
        residual = norm_ratio(r, b)
    ritz_min, ritz_max = extreme_ritz_values(step_sizes, ratios, k - is_stopped)
    stats = {
        "num_steps": k,
        "num_products": num_products,
        "residual": residual,
        "ritz_min": jnp.where(is_stopped, jnp.fmin(ritz_min, 0.0), ritz_min),
        "ritz_max": ritz_max,
        "negative_curvature": curvature < 0,
    }
    return scale(unit, x), result, stats


def run_recurrence(
    matvec: MatVec,
    preconditioner: Callable[[PyTree], PyTree],
    x: PyTree,
    r: PyTree,
    squared_tol: Array,
    max_steps: Array | int,
    num_coefficients: int,
) -> tuple[PyTree, PyTree, Array, Array, Array, Array, Array]:
    """Runs the loop of conjugate gradients from ``x`` with the residual ``r``.

    Returns:
      ``(x, r, r'z, num_steps, p'Hp, step_sizes, ratios)``. A step with ``p'Hp <= 0``
      changes nothing and is the last. Of the step sizes ``a_k`` and the ratios ``c_k``
      the first ``num_coefficients`` are recorded.
    """

    def cond_fun(carry):
        _, r, _, rz, k, curvature, *_ = carry
        has_residual = vdot(r, r) > squared_tol
        return (k < max_steps) & ~(curvature <= 0) & (rz > 0) & has_residual

    def body_fun(carry):
        x, r, p, rz, k, _, step_sizes, ratios = carry
        # a_k = r'z / p'Hp
        Hp = matvec(p)
        curvature = vdot(p, Hp)
        is_stopped = curvature <= 0
        safe_curvature = jnp.where(is_stopped, 1.0, curvature)
        step_size = jnp.where(is_stopped, 0.0, rz / safe_curvature)
        # x <- x + a_k p,  r <- r - a_k H p,  z = P^-1 r
        x = add_scale(x, step_size, p)
        r = add_scale(r, -step_size, Hp)
        z = preconditioner(r)
        # c_k = r'z (new) / r'z (old),  p <- z + c_k p
        new_rz = vdot(r, z)
        ratio = new_rz / rz
        p = add_scale(z, ratio, p)
        step_sizes = step_sizes.at[k].set(step_size, mode="drop")
        ratios = ratios.at[k].set(ratio, mode="drop")
        return x, r, p, new_rz, k + 1, curvature, step_sizes, ratios

    z = preconditioner(r)
    zeros = jnp.zeros((num_coefficients,), scalar_dtype(r))
    init_carry = (
        x,
        r,
        z,
        vdot(r, z),
        jnp.asarray(0),
        jnp.ones_like(vdot(r, z)),
        zeros,
        zeros,
    )
    final_carry = jax.lax.while_loop(cond_fun, body_fun, init_carry)
    x, r, _, rz, k, curvature, step_sizes, ratios = final_carry
    return x, r, rz, k, curvature, step_sizes, ratios


def first_residual(
    matvec: MatVec, b: PyTree, x: PyTree | None
) -> tuple[PyTree, PyTree, Array | int]:
    """Returns the first iterate, its residual and the number of products.

    A starting point that is zero costs no product. One whose residual exceeds that of
    zero, or is NaN, is replaced by zero.
    """
    if x is None:
        return optax.tree.zeros_like(b), b, 0
    starts_at_zero = is_zero(x)
    r = apply_unless(starts_at_zero, lambda b: optax.tree.sub(b, matvec(x)), b)
    is_worse = ~(norm(r) <= norm(b))
    x = optax.tree.where(is_worse, optax.tree.zeros_like(x), x)
    r = optax.tree.where(is_worse, b, r)
    return x, r, jnp.where(starts_at_zero, 0, 1)


def extreme_ritz_values(
    step_sizes: Float[Array, " n"],
    ratios: Float[Array, " n"],
    num_steps: Int[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the extreme eigenvalues of the Lanczos matrix; NaN if no step was made.

    With the step sizes ``a`` and the ratios ``c`` of conjugate gradients, the matrix is

        T[k, k] = 1 / a[k] + c[k-1] / a[k-1],    T[k, k+1] = sqrt(c[k]) / a[k].

    Rows beyond ``num_steps`` repeat ``T[0, 0]``, which lies within the spectrum and so
    changes neither of the extreme eigenvalues.

    Args:
      step_sizes, ratios: Coefficients, of which the first ``num_steps`` are used.
      num_steps: Number of steps made.
    """
    is_used = jnp.arange(step_sizes.size) < num_steps
    inverse = 1.0 / jnp.where(is_used, step_sizes, 1.0)
    diagonal = inverse.at[1:].add((ratios * inverse)[:-1])
    diagonal = jnp.where(is_used, diagonal, inverse[0])
    off_diagonal = jnp.where(is_used[1:], jnp.sqrt(ratios[:-1]) * inverse[:-1], 0.0)
    if step_sizes.size == 1:
        eigenvalues = diagonal[0], diagonal[0]
    else:
        # Its squares would underflow or overflow in float32.
        unit = power_of_two_scale((diagonal, off_diagonal))
        eigenvalue = lambda i: (
            unit
            * eigh_tridiagonal(
                diagonal / unit,
                off_diagonal / unit,
                eigvals_only=True,
                select="i",
                select_range=(i, i),
            )[0]
        )
        eigenvalues = eigenvalue(0), eigenvalue(step_sizes.size - 1)
    ritz_min, ritz_max = (jnp.where(num_steps > 0, x, jnp.nan) for x in eigenvalues)
    return ritz_min, ritz_max
