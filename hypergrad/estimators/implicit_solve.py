"""The solves of `Implicit` (inner problem, Newton steps, adjoint) and their checks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from ..certificate import NEWTON_RTOL, TRUST_RTOL
from ..implicit_diff import (
    EMPTY_LINEAR_STATS,
    ImplicitResult,
    damped_hvp_fn,
    finite_or_zero,
    implicit_hypergradient,
    merge_linear_stats,
    safeguarded_newton_steps,
)
from ..linear.base import LinearStats
from ..problem import Bilevel, EstimateData
from ..trees import all_finite, scale
from .adaptive import AdaptiveSolve, add_counts
from .error_estimates import stationarity_error

if TYPE_CHECKING:
    from .implicit import Implicit, ImplicitState


class Solution(NamedTuple):
    """An inner solution, the derivatives at it, and what both cost.

    Attributes:
      w: The inner solution.
      result: Implicit differentiation at ``w``.
      counts: Statistics of the inner solver, and ``num_outer_grads`` per outer loss.
      linear_stats: Statistics of all linear solves.
      error_estimate: Estimated relative error of the hypergradient; NaN if unknown.
      grad_tol, prepared: The entries of the next `ImplicitState`.
    """

    w: PyTree
    result: ImplicitResult
    counts: dict[str, Any]
    linear_stats: LinearStats
    error_estimate: Scalar
    grad_tol: Scalar
    prepared: PyTree


def solve_once(
    estimator: "Implicit",
    problem: Bilevel,
    state: "ImplicitState",
    alpha: PyTree,
    data: EstimateData,
) -> Solution:
    """Runs the inner solver, the Newton steps and one adjoint solve."""
    loss, batch = problem.inner_loss, data.inner_batch(estimator.adjoint_batch_size)
    outer_batch = data.outer_batch(estimator.outer_batch_size)
    init_w = problem.init_inner(state.w, alpha)
    w, counts = estimator.solver.solve(
        loss, init_w, alpha, data.inner_data, data.solver_key
    )
    linear_stats = EMPTY_LINEAR_STATS
    if num_newton_steps := estimator.num_newton_steps:
        inner_grad = jax.grad(loss)(w, alpha, batch)
        rtols = [NEWTON_RTOL] * num_newton_steps
        w, linear_stats = safeguarded_newton_steps(
            loss, w, alpha, batch, inner_grad, rtols, linear_stats
        )
        counts = add_counts(counts, num_grads=num_newton_steps + 1)
    damping, hvp_fn = estimator.damping, estimator.hvp_fn
    matvec = damped_hvp_fn(problem, w, alpha, batch, damping, hvp_fn)
    prepared, num_products = _reuse_or_prepare(estimator, state, matvec, w)
    result = implicit_hypergradient(
        problem,
        estimator.linear_solver,
        w,
        alpha,
        batch,
        outer_batch,
        finite_or_zero(state.adjoint),
        damping,
        prepared,
        hvp_fn,
    )
    linear_stats = merge_linear_stats(linear_stats, result.linear_stats)
    linear_stats["num_products"] += num_products
    # `result_flags` evaluates a second outer gradient.
    has_result_flags = not estimator.certify and hvp_fn is None
    return Solution(
        w,
        result,
        counts=counts | {"num_outer_grads": 2 if has_result_flags else 1},
        linear_stats=linear_stats,
        error_estimate=jnp.asarray(jnp.nan),
        grad_tol=state.grad_tol,
        prepared=prepared,
    )


def result_flags(
    estimator: "Implicit",
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    data: EstimateData,
    result: ImplicitResult,
) -> dict[str, Scalar]:
    """Returns the checks of an estimate whose solves ran once."""
    inner_error = stationarity_error(
        problem,
        w,
        alpha,
        data.outer_batch(estimator.outer_batch_size),
        result.b,
        result.cross,
        result.hypergradient,
        scale(-1, result.inner_grad),
        jnp.fmin(result.mean_curvature, result.linear_stats["ritz_min"]),
    )
    is_finite = all_finite(
        result.value, result.hypergradient, result.inner_grad, result.adjoint_residual
    )
    return {
        "not_finite": ~is_finite,
        "adjoint_residual": ~jnp.all(result.adjoint_residual <= TRUST_RTOL),
        "inner_error": ~(inner_error <= TRUST_RTOL),
        "negative_curvature": jnp.any(result.linear_stats["negative_curvature"]),
    }


def solve_adaptively(
    estimator: "Implicit",
    problem: Bilevel,
    state: "ImplicitState",
    alpha: PyTree,
    data: EstimateData,
    rtol: Scalar,
) -> Solution:
    """Makes rounds of inner steps, Newton steps and adjoint solves to ``rtol``."""
    adaptive = AdaptiveSolve(estimator, problem, data, alpha, rtol)
    init_w = problem.init_inner(state.w, alpha)
    final = adaptive.run(init_w, finite_or_zero(state.adjoint), state.grad_tol)
    return Solution(
        final.carry[0],
        final.result,
        counts=final.counts,
        linear_stats=final.linear_stats,
        error_estimate=final.error,
        grad_tol=final.init_grad_tol,
        prepared=None,
    )


def adaptive_flags(solution: Solution, rtol: Scalar | float) -> dict[str, Scalar]:
    """Returns the checks of an estimate that was made to ``rtol``."""
    result = solution.result
    is_finite = all_finite(result.value, result.hypergradient, result.inner_grad)
    return {
        "not_finite": ~is_finite,
        "tolerance": ~(solution.error_estimate <= rtol),
        "negative_curvature": solution.linear_stats["negative_curvature"],
    }


def refresh_interval(linear_solver: Any) -> int:
    """Returns the number of estimates in which a linear solver reuses prepared data."""
    return getattr(linear_solver, "refresh_every", 1)


def _reuse_or_prepare(
    estimator: "Implicit",
    state: "ImplicitState",
    matvec: Callable[[PyTree], PyTree],
    like: PyTree,
) -> tuple[PyTree, Scalar | int]:
    """Returns the data that the linear solver reuses, and the products it cost."""
    linear_solver: Any = estimator.linear_solver
    refresh_every = refresh_interval(linear_solver)
    if refresh_every == 1:
        return None, 0
    should_refresh = state.num_estimates % refresh_every == 0
    should_refresh |= ~all_finite(state.prepared)
    prepare = lambda: linear_solver.prepare(matvec, like)
    _, eigenvalues = prepared = jax.lax.cond(
        should_refresh, prepare, lambda: state.prepared
    )
    return prepared, jnp.where(should_refresh, eigenvalues.size, 0)
