"""Conjugate gradients, with what the recurrence knows about the spectrum."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.scipy.linalg import eigh_tridiagonal
from jaxtyping import Array, PyTree

from ..method_summary import MethodSummary
from ..trees import (
    add_scale,
    apply_unless,
    divide,
    norm,
    power_of_two_scale,
    scalar_dtype,
    scale,
    vdot,
)
from ..validation import check_positive_int, float_converter
from .base import MatVec, SymmetricSolver, relative_residual


class CG(SymmetricSolver):
    """``v = H^-1 b`` by conjugate gradients, to a relative residual ``rtol``.

    ``error_k <= 2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^k error_0`` in the H-norm.

    Args:
      rtol: stop at ``||r|| <= rtol ||b||``; None means ``eps^(3/4)`` of the dtype of
        ``b`` (2e-12 in float64, 6e-6 in float32).
      max_steps: None means ``min(10 dim, 1000)``.

    Cost: one Hessian-vector product a step, one more for a warm start and one for the
    true residual. Memory: four vectors like ``w``.

    Bias: none at convergence. Stops, flags ``negative_curvature`` and returns its last
    iterate when ``p'Hp <= 0``. Stats: ``num_products``, ``residual`` (true, relative),
    ``ritz_min`` and ``ritz_max``, the extreme eigenvalues of the Lanczos matrix, which
    lie within the spectrum of ``H`` and approach its ends.

    Source: Hestenes & Stiefel 1952; Ritz values from Golub & Van Loan, section 11.3.

    >>> import jax.numpy as jnp, lineax as lx, hypergrad as hg
    >>> H = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 4.0])), lx.symmetric_tag)
    >>> solution = lx.linear_solve(H, jnp.array([1.0, 2.0]), hg.CG())
    >>> bool(jnp.allclose(solution.value, jnp.array([1.0, 0.5]), atol=1e-4))
    True
    """

    rtol: float | Array | None = eqx.field(
        default=None, converter=float_converter("rtol", minimum=0)
    )
    max_steps: int | None = eqx.field(static=True, default=None)

    citations = ("hestenes1952",)
    exact = True
    summary = (
        MethodSummary(
            "Implicit(solver)",
            num_grads="T",
            num_hvps="k + 1",
            memory="4 w",
            bias="none if solved",
            alpha_in=("losses",),
            recommended_for="the first choice: any N, an inner loop that converges",
            not_recommended_for="an inner loop that stops early, an indefinite H",
            reason="k grows as the root of the condition number, not with N or T",
        ),
    )

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Exact up to its tolerance, on any spectrum."""
        return 0.0

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """``(v, result, stats)``; options: ``y0``, a starting point."""
        return conjugate_gradients(
            state.mv, vector, self.rtol, self.max_steps, options, lambda r: r
        )


def conjugate_gradients(
    matvec: MatVec,
    b: PyTree,
    rtol: float | Array | None,
    max_steps: int | None,
    options: dict[str, Any],
    preconditioner: Callable[[PyTree], PyTree],
) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
    """Preconditioned CG; Ritz values are those of the preconditioned operator."""
    dtype = scalar_dtype(b)
    dimension = sum(leaf.size for leaf in jax.tree.leaves(b))
    if rtol is None:
        rtol = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(b))).eps) ** 0.75
    if max_steps is None:
        max_steps = max(min(10 * dimension, 1000), 1)
    kept = max(min(dimension, max_steps), 1)  # Lanczos coefficients
    # Below rounding a residual has no direction, and its curvature no sign.
    eps = jnp.finfo(jnp.result_type(*jax.tree.leaves(b))).eps
    unit = power_of_two_scale(b)
    b, x = divide(b, unit), divide(options.get("y0"), unit)
    goal = (jnp.maximum(jnp.asarray(rtol), 4 * float(eps)) * norm(b)) ** 2

    if x is None:
        x, r, num_products = optax.tree.zeros_like(b), b, 0
    else:  # a warm start pays for its residual, a start at zero does not
        cold = norm(x) == 0
        r = apply_unless(cold, lambda b: optax.tree.sub(b, matvec(x)), b)
        num_products = jnp.where(cold, 0, 1)
        worse = ~(norm(r) <= norm(b))  # than a start at zero
        x = optax.tree.where(worse, optax.tree.zeros_like(x), x)
        r = optax.tree.where(worse, b, r)
    z = preconditioner(r)

    def unfinished(carry):
        _, r, _, rz, k, negative, *_ = carry
        return (k < max_steps) & ~negative & (rz > 0) & (vdot(r, r) > goal)

    def step(carry):
        x, r, p, rz, k, _, steps, ratios = carry
        Hp = matvec(p)
        curvature = vdot(p, Hp)
        negative = curvature <= 0
        length = jnp.where(negative, 0.0, rz / jnp.where(negative, 1.0, curvature))
        x = add_scale(x, length, p)
        r = add_scale(r, -length, Hp)
        z = preconditioner(r)
        rz_next = vdot(r, z)
        ratio = rz_next / rz
        p = add_scale(z, ratio, p)
        steps = steps.at[k].set(length, mode="drop")
        ratios = ratios.at[k].set(ratio, mode="drop")
        return x, r, p, rz_next, k + 1, negative, steps, ratios

    empty = jnp.zeros((kept,), dtype)
    rz = vdot(r, z)
    carry = (x, r, z, rz, jnp.asarray(0), jnp.asarray(False), empty, empty)
    x, r, _, rz, k, negative, steps, ratios = jax.lax.while_loop(
        unfinished, step, carry
    )

    # A NaN in b or H ends the loop at once, and must not leave its start for a result.
    x = add_scale(x, jnp.where(jnp.isfinite(rz), 0.0, jnp.nan), x)

    num_products = num_products + k
    if options.get("true_residual", True):
        residual = relative_residual(b, matvec(x))
        num_products = num_products + 1
    else:
        residual = relative_residual(r, optax.tree.zeros_like(r))
    ritz_min, ritz_max = extreme_ritz_values(steps, ratios, k - negative)
    result = lx.RESULTS.where(
        ~negative & (vdot(r, r) <= goal),
        lx.RESULTS.successful,
        lx.RESULTS.max_steps_reached,
    )
    stats = {
        "num_steps": k,
        "num_products": num_products,
        "residual": residual,
        "ritz_min": jnp.where(negative, jnp.fmin(ritz_min, 0.0), ritz_min),
        "ritz_max": ritz_max,
        "negative_curvature": negative,
    }
    return scale(unit, x), result, stats


def extreme_ritz_values(
    steps: Array, ratios: Array, num_steps: Array
) -> tuple[Array, Array]:
    """Ends of the Lanczos spectrum from CG's step lengths and ratios; NaN if no step.

    ``T[k, k] = 1/steps[k] + ratios[k-1]/steps[k-1]`` and
    ``T[k, k+1] = sqrt(ratios[k])/steps[k]``; rows beyond ``num_steps`` repeat
    ``T[0, 0]``, which lies within the spectrum and so moves neither end.
    """
    taken = jnp.arange(steps.size) < num_steps
    inverse = 1.0 / jnp.where(taken, steps, 1.0)
    diagonal = inverse.at[1:].add((ratios * inverse)[:-1])
    diagonal = jnp.where(taken, diagonal, inverse[0])
    beside = jnp.where(taken[1:], jnp.sqrt(ratios[:-1]) * inverse[:-1], 0.0)
    if steps.size == 1:
        ends = diagonal[0], diagonal[0]
    else:
        end = lambda i: eigh_tridiagonal(
            diagonal, beside, eigvals_only=True, select="i", select_range=(i, i)
        )[0]
        ends = end(0), end(steps.size - 1)
    low, high = (jnp.where(num_steps > 0, ritz, jnp.nan) for ritz in ends)
    return low, high
