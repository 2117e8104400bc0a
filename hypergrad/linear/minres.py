"""The minimum residual method, for symmetric systems that may be indefinite."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..method_summary import MethodSummary
from ..number_checks import check_positive_int, non_negative
from ..trees import (
    add_scale,
    all_finite,
    divide,
    machine_eps,
    norm,
    power_of_two_scale,
    safe_norm,
    scalar_dtype,
    scale,
    vdot,
)
from .base import MatVec, SymmetricSolver, relative_residual
from .cg import first_residual
from .equilibration import solve_equilibrated

MAX_PASSES = 4  # the first one and restarts from the true residual
ROUNDING_ULPS = 10  # rounding error of H v in units of eps ||H|| ||v||


class MINRES(SymmetricSolver):
    """``v = H^-1 b`` by the minimum residual method, to a relative residual ``rtol``.

    ``H`` is symmetric and may be indefinite, as at a saddle, or singular. Step k
    minimizes ``||b - H v||`` over the k-th Krylov space, so that it needs no more steps
    to a tolerance than `CG`. For a singular ``H`` with ``b`` in its range, the result
    has the minimum norm. For any other ``b`` no residual meets the tolerance, which the
    result reports; ``v`` is near a least-squares solution unless rounding errors, which
    grow along the kernel of ``H``, are larger.

    After convergence, the true residual ``b - H v`` is computed. While it is above the
    tolerance and decreases, the method is restarted from ``v``, three times at most.

    The statistics are ``num_products``, ``residual`` (true and relative),
    ``negative_curvature``, which is True if ``r'Hr < 0`` for some residual ``r``, and
    ``ritz_max``, a lower bound of ``||H||``. ``ritz_min`` remains unknown.

    By default the method is applied to ``(S H S) x = S b`` with ``v = S x`` and the
    diagonal ``S`` of `CG`. The norms above are then those of ``x``, of ``S (b - H v)``
    and of ``S H S``. `Implicit` passes the ``S`` of its error estimate, which changes
    from estimate to estimate; so does then the ``v`` of minimum norm of a singular
    ``H``.

    Args:
      rtol: The solver stops at ``||S (b - H v)|| <= rtol ||S b||``. Defaults to
        ``eps^(3/4)`` of the dtype of ``b``, which is 2e-12 in float64 and 6e-6 in
        float32.
      max_steps: Maximum number of steps. Defaults to ``min(10 dim, 1000)``.
      preconditioner: 'diagonal', the default, or None, which means ``S = I``.

    Cost:
      One Hessian-vector product per step, one more for a warm start, one for the true
      residual, and with 'diagonal' eight for ``S`` where `Implicit` passes none, or one
      per parameter for up to eight parameters.
    Memory: seven vectors like ``w``, eight with 'diagonal'.
    Bias: none at convergence.

    Source: Paige & Saunders 1975, sections 5 and 6; the test for least squares from
    Choi, Paige & Saunders 2011.

    >>> import jax.numpy as jnp, lineax as lx, hypergrad as hg
    >>> H = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, -4.0])), lx.symmetric_tag)
    >>> solution = lx.linear_solve(H, jnp.array([1.0, 2.0]), hg.MINRES())
    >>> bool(jnp.allclose(solution.value, jnp.array([1.0, -0.5]), atol=1e-4))
    True
    """

    rtol: float | Array | None = eqx.field(
        default=None, converter=non_negative("rtol", optional=True)
    )
    max_steps: int | None = eqx.field(static=True, default=None)
    preconditioner: str | None = eqx.field(
        static=True, default="diagonal", kw_only=True
    )

    citations = ("paige1975", "choi2011")
    summary = (
        MethodSummary(
            "Implicit(solver, hg.MINRES())",
            num_grads="T",
            num_hvps="k + 2",
            memory="7 w",
            bias="none if converged",
            alpha_in=("losses",),
            recommended_for=(
                "the derivative of a stationary point that may be a saddle, where it "
                "is right but not trusted"
            ),
            not_recommended_for=(
                "a minimum, where CG needs less memory and reports the smallest "
                "eigenvalue"
            ),
            reason="the residual decreases whatever the signs of the eigenvalues are",
        ),
    )

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps, optional=True)
        if self.preconditioner not in (None, "diagonal"):
            raise ValueError(
                "preconditioner must be None or 'diagonal' for MINRES; got "
                f"{self.preconditioner!r}. CG also takes a function."
            )

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Returns ``(v, result, stats)``; ``options["y0"]`` is the starting point."""
        solve = lambda matvec, b, y0: minimum_residual(
            matvec, b, rtol=self.rtol, max_steps=self.max_steps, y0=y0
        )
        if self.preconditioner is None:
            return solve(state.mv, vector, options.get("y0"))
        return solve_equilibrated(
            solve, state.mv, vector, options.get("y0"), options.get("scaling")
        )


def minimum_residual(
    matvec: MatVec,
    b: PyTree,
    *,
    rtol: float | Array | None = None,
    max_steps: int | None = None,
    y0: PyTree | None = None,
) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
    """Solves ``H v = b`` by the minimum residual method.

    Args:
      matvec: Function ``v -> H v`` with symmetric ``H``.
      b: Right-hand side.
      rtol, max_steps: As in `MINRES`.
      y0: Starting point. Defaults to zero.

    Returns:
      ``(v, result, stats)``. The result is successful if the true residual is at most
      ``rtol ||b||``, or at most the rounding error of ``H v`` if that is small.
    """
    eps = machine_eps(b)
    dimension = optax.tree.size(b)
    rtol = eps**0.75 if rtol is None else rtol
    if max_steps is None:
        max_steps = max(min(10 * dimension, 1000), 1)
    unit = power_of_two_scale(b)  # so that no square below underflows or overflows
    b, x = divide(b, unit), divide(y0, unit)
    x, r, num_products = first_residual(matvec, b, x)
    # The matvec rounds as its shortest leaf does.
    tol = jnp.maximum(jnp.asarray(rtol), 4 * machine_eps(b)) * norm(b)

    def cond_fun(carry):
        _, r, _, num_steps, num_passes, is_progressing, *_ = carry
        can_continue = (num_steps < max_steps) & (num_passes < MAX_PASSES)
        return can_continue & is_progressing & (norm(r) > tol)

    def body_fun(carry):
        x, r, num_products, num_steps, num_passes, _, h_norm, is_negative = carry
        # H d = r,  x <- x + d
        final = _run_recurrence(matvec, r, tol, max_steps - num_steps)
        new_x = add_scale(x, 1.0, final.x)
        new_r = optax.tree.sub(b, matvec(new_x))
        is_better = norm(new_r) < norm(r)
        # A NaN in H must not leave the starting point as a result.
        is_accepted = is_better | ~all_finite(new_r)
        select = lambda new, old: optax.tree.where(is_accepted, new, old)
        return (
            select(new_x, x),
            select(new_r, r),
            num_products + final.num_steps + 1,
            num_steps + final.num_steps,
            num_passes + 1,
            norm(new_r) < 0.5 * norm(r),
            jnp.maximum(h_norm, final.h_norm),
            is_negative | final.is_negative,
        )

    zero, false = jnp.asarray(0), jnp.asarray(False)
    init_counts = (zero + num_products, zero, zero)
    h_norm = jnp.zeros((), scalar_dtype(b))
    init_carry = (x, r, *init_counts, ~false, h_norm, false)
    final_carry = jax.lax.while_loop(cond_fun, body_fun, init_carry)
    x, r, num_products, num_steps, _, _, h_norm, is_negative = final_carry
    # A NaN in b ends the loop before it starts.
    x = add_scale(x, jnp.where(jnp.isfinite(norm(r)), 0.0, jnp.nan), x)
    stats = {
        "num_steps": num_steps,
        "num_products": num_products,
        "residual": relative_residual(b, optax.tree.sub(b, r)),
        "ritz_max": jnp.where(num_steps > 0, h_norm, jnp.nan),
        "negative_curvature": is_negative,
    }
    # The residual of the rounded solution is eps ||H|| ||x|| at least. If that is a
    # large part of ||b||, rounding determines x itself.
    rounding_error = ROUNDING_ULPS * eps * (h_norm * safe_norm(x))
    max_residual = jnp.maximum(tol, jnp.minimum(rounding_error, eps**0.5 * norm(b)))
    result = lx.RESULTS.where(
        norm(r) <= max_residual, lx.RESULTS.successful, lx.RESULTS.max_steps_reached
    )
    return scale(unit, x), result, stats


class _LanczosState(NamedTuple):
    """The state of the recurrence after k steps, in the symbols of the source.

    Attributes:
      x: Iterate.
      v, prev_v: Lanczos vectors ``v_{k+1}`` and ``v_k``.
      d, prev_d: Directions ``d_k`` and ``d_{k-1}``, columns of ``V_k R_k^-1``.
      beta: ``beta_{k+1}``, the norm of the Lanczos vector before its normalization.
      c, s: Cosine and sine of the k-th rotation.
      delta: ``delta_{k+1}`` after the k-th rotation, above the diagonal of ``R``.
      epsilon: ``epsilon_{k+1}``, two rows above the diagonal of ``R``.
      phi: Norm of the residual, without its sign.
      h_norm: Lower bound of ``||H||``.
      is_negative: Whether negative curvature was observed.
      is_stalled: Whether the residual has no part in the range of ``H``.
      num_steps: k.
    """

    x: PyTree
    v: PyTree
    prev_v: PyTree
    d: PyTree
    prev_d: PyTree
    beta: Array
    c: Array
    s: Array
    delta: Array
    epsilon: Array
    phi: Array
    h_norm: Array
    is_negative: Array
    is_stalled: Array
    num_steps: Array


def _run_recurrence(
    matvec: MatVec, b: PyTree, tol: Array, max_steps: Array | int
) -> _LanczosState:
    """Runs the loop from zero until ``||b - H x|| <= tol``."""
    eps = machine_eps(b)

    def cond_fun(state):
        is_running = (state.num_steps < max_steps) & ~state.is_stalled
        return is_running & (state.phi > tol)

    def body_fun(state):
        v, beta = state.v, state.beta
        # Lanczos, eq. (2.1): beta_{k+1} v_{k+1} = H v_k - alpha_k v_k - beta_k v_{k-1}
        next_v = add_scale(matvec(v), -beta, state.prev_v)
        alpha = vdot(v, next_v)
        next_v = add_scale(next_v, -alpha, v)
        next_beta = _norm_of_any_size(next_v)
        # Without a next vector the Krylov space contains the solution.
        safe_beta = jnp.where(next_beta > 0, next_beta, 1.0)
        next_v = scale(1.0 / safe_beta, next_v)
        # Rotation k-1 applied to column k of T, eq. (5.2)
        delta = state.c * state.delta + state.s * alpha
        gamma_bar = state.s * state.delta - state.c * alpha
        epsilon = state.s * next_beta
        next_delta = -state.c * next_beta
        # Rotation k: (gamma_bar, beta_{k+1}) -> (gamma, 0)
        gamma = jnp.hypot(gamma_bar, next_beta)
        safe_gamma = jnp.where(gamma > 0, gamma, 1.0)
        c, s = gamma_bar / safe_gamma, next_beta / safe_gamma
        # d_k = (v_k - epsilon_k d_{k-2} - delta_k d_{k-1}) / gamma_k, eq. (6.7)
        d = add_scale(v, -state.epsilon, state.prev_d)
        d = scale(1.0 / safe_gamma, add_scale(d, -delta, state.d))
        # x_k = x_{k-1} + tau_k d_k with tau_k = c_k phi_{k-1};  phi_k = s_k phi_{k-1}
        x = add_scale(state.x, c * state.phi, d)
        column_norm = safe_norm((alpha, beta, next_beta))
        h_norm = jnp.maximum(state.h_norm, column_norm)
        # ||H r_{k-1}|| / ||r_{k-1}||, Choi et al. 2011, section 3.3. It is zero for a
        # least-squares solution, which the previous iterate then is. An ill-conditioned
        # H alone does not stop the decrease ||r_{k-1}|| = |s_{k-1}| ||r_{k-2}||.
        Hr_ratio = jnp.hypot(gamma_bar, next_delta)
        is_constant = jnp.abs(state.c) < eps**0.25
        rounding_error = ROUNDING_ULPS * eps * h_norm
        is_stalled = is_constant & (Hr_ratio <= eps**0.5 * h_norm)
        is_stalled = is_stalled | ~(Hr_ratio > rounding_error)
        # r'Hr / r'r = -c_{k-1} gamma_bar_k for the residual r_{k-1}
        is_negative = state.is_negative | (state.c * gamma_bar > rounding_error)
        return _LanczosState(
            x=optax.tree.where(is_stalled & jnp.isfinite(gamma), state.x, x),
            v=next_v,
            prev_v=v,
            d=d,
            prev_d=state.d,
            beta=next_beta,
            c=c,
            s=s,
            delta=next_delta,
            epsilon=epsilon,
            phi=jnp.where(is_stalled, state.phi, s * state.phi),
            h_norm=h_norm,
            is_negative=is_negative,
            is_stalled=is_stalled,
            num_steps=state.num_steps + 1,
        )

    return jax.lax.while_loop(cond_fun, body_fun, _init_lanczos(b))


def _norm_of_any_size(x: PyTree) -> Array:
    """Returns `norm`, and `safe_norm` where squares may underflow or overflow."""
    x_norm = norm(x)
    min_norm = float(jnp.finfo(x_norm.dtype).tiny) ** 0.25
    is_accurate = (x_norm > min_norm) & (x_norm < 1 / min_norm)
    return jnp.where(is_accurate, x_norm, safe_norm(x))


def _init_lanczos(b: PyTree) -> _LanczosState:
    """Returns the state of the recurrence before the first step."""
    b_norm = norm(b)
    zeros = optax.tree.zeros_like(b)
    zero = jnp.zeros((), scalar_dtype(b))
    return _LanczosState(
        x=zeros,
        v=divide(b, jnp.where(b_norm > 0, b_norm, 1.0)),
        prev_v=zeros,
        d=zeros,
        prev_d=zeros,
        beta=zero,
        c=-jnp.ones_like(zero),
        s=zero,
        delta=zero,
        epsilon=zero,
        phi=b_norm,
        h_norm=zero,
        is_negative=jnp.asarray(False),
        is_stalled=jnp.asarray(False),
        num_steps=jnp.asarray(0),
    )
