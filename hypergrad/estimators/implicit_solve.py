"""The solves of `Implicit` (inner problem, Newton steps, adjoint) and their checks."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from ..certificate import TRUST_RTOL
from ..implicit.differentiation import (
    EMPTY_LINEAR_STATS,
    Point,
    damped_hvp_fn,
    finite_or_zero,
    merge_linear_stats,
    safeguarded_newton_steps,
)
from ..linear.base import LinearStats
from ..linear.equilibration import Scaling, equilibrate, no_scaling
from ..one_vector import Layout
from ..problem import Bilevel, EstimateData
from ..trees import all_finite, apply_unless
from .adaptive import AdaptiveSolve, add_counts
from .implicit_adjoint import AdjointSolution, solve_adjoint, uses_scaled_cg

if TYPE_CHECKING:
    from .implicit import Implicit, ImplicitState


#: Residual of the solve of a Newton step, relative to ``||S dL/dw||``.
NEWTON_RTOL = 1e-3


class Solution(NamedTuple):
    """An inner solution, the derivatives at it, and what both cost.

    Attributes:
      w: The inner solution.
      adjoint_solution: The hypergradient with its adjoint, and their error estimate.
      counts: Statistics of the inner solver, and ``num_outer_grads`` per outer loss.
      linear_stats: Statistics of all linear solves.
      grad_tol, prepared, s: The entries of the next `ImplicitState`.
    """

    w: PyTree
    adjoint_solution: AdjointSolution
    counts: dict[str, Any]
    linear_stats: LinearStats
    grad_tol: Scalar
    prepared: PyTree
    s: PyTree


def solve_once(
    estimator: "Implicit",
    problem: Bilevel,
    state: "ImplicitState",
    alpha: PyTree,
    data: EstimateData,
) -> Solution:
    """Runs the inner solver, the Newton steps and one adjoint solve.

    With `CG` all that follows the inner solver works on ``w`` as one vector.
    """
    batch = data.inner_batch(estimator.adjoint_batch_size)
    outer_batch = data.outer_batch(estimator.outer_batch_size)
    init_w = problem.init_inner(state.w, alpha)
    w, counts = estimator.solver.solve(
        problem.inner_loss, init_w, alpha, data.inner_data, data.solver_key
    )
    layout = Layout.from_w(problem, w) if uses_scaled_cg(estimator) else Layout(None)
    problem, w = layout.with_vector(problem), layout.join(w)
    point = Point(problem, w, alpha, batch, outer_batch)
    linear_stats = EMPTY_LINEAR_STATS
    scaling = find_scaling(estimator, point, layout.join(state.s), state.num_estimates)
    if num_newton_steps := estimator.num_newton_steps:
        inner_grad = jax.grad(problem.inner_loss)(w, alpha, batch)
        rtols = [NEWTON_RTOL] * num_newton_steps
        w, linear_stats = safeguarded_newton_steps(
            point, inner_grad, scaling, rtols, linear_stats
        )
        point = point._replace(w=w)
        counts = add_counts(counts, num_grads=num_newton_steps + 1)
    damping = 0.0 if estimator.damping is None else estimator.damping
    matvec = damped_hvp_fn(point, damping, estimator.hvp_fn)
    prepared, num_prepared = _reuse_or_prepare(estimator, state, matvec, w)
    adjoint_solution = solve_adjoint(
        estimator,
        point,
        scaling,
        layout.join(finite_or_zero(state.adjoint)),
        layout.join(finite_or_zero(state.duals)),
        linear_solver=estimator.linear_solver,
        prepared=prepared,
        rtol=TRUST_RTOL if has_error_estimate(estimator) else None,
    )
    new_stats = adjoint_solution.result.linear_stats
    linear_stats = merge_linear_stats(linear_stats, new_stats)
    linear_stats["num_products"] += (
        scaling.num_products + num_prepared + adjoint_solution.num_extra_products
    )
    return Solution(
        layout.split(w),
        _split_vectors(adjoint_solution, layout),
        counts=counts | {"num_outer_grads": adjoint_solution.num_outer_grads},
        linear_stats=linear_stats,
        grad_tol=state.grad_tol,
        prepared=prepared,
        s=layout.split(scaling.s) if needs_scaling(estimator) else None,
    )


def _split_vectors(solution: AdjointSolution, layout: Layout) -> AdjointSolution:
    """Returns the solution with trees like ``w`` in place of vectors."""
    result, split = solution.result, layout.split
    result = dataclasses.replace(
        result,
        b=split(result.b),
        adjoint=split(result.adjoint),
        inner_grad=split(result.inner_grad),
        residual=split(result.residual),
    )
    return solution._replace(result=result, duals=split(solution.duals))


def has_error_estimate(estimator: "Implicit") -> bool:
    """Returns True if an estimate is judged by its own error estimate.

    Otherwise a certificate judges it, or nothing does.
    """
    is_judged_otherwise = estimator.certify or estimator.hvp_fn is not None
    return estimator.estimate_error and not is_judged_otherwise


def needs_scaling(estimator: "Implicit") -> bool:
    """Returns True if a part of an estimate works in scaled coordinates."""
    is_adaptive = estimator.rtol is not None
    has_newton_steps = estimator.num_newton_steps > 0
    has_estimate = has_error_estimate(estimator)
    return has_estimate or has_newton_steps or is_adaptive or uses_scaled_cg(estimator)


def find_scaling(
    estimator: "Implicit", point: Point, init_s: PyTree, num_estimates: Scalar
) -> Scaling:
    """Returns the diagonal scaling of ``H``, from ``init_s`` of an earlier estimate.

    It is the identity if no part of the estimate works in scaled coordinates.
    """
    if not needs_scaling(estimator):
        return no_scaling(point.w)
    return equilibrate(point.matvec, point.w, init_s=init_s, seed=num_estimates)


def result_flags(solution: Solution, rtol: Scalar | float) -> dict[str, Scalar]:
    """Returns the checks of an estimate with an error estimate."""
    result, error = solution.adjoint_solution.result, solution.adjoint_solution.error
    is_finite = all_finite(result.value, result.hypergradient, result.inner_grad)
    is_negative = solution.linear_stats["negative_curvature"]
    flags = {"not_finite": ~is_finite, "negative_curvature": is_negative}
    return flags | error.flags(rtol)


def solve_adaptively(
    estimator: "Implicit",
    problem: Bilevel,
    state: "ImplicitState",
    alpha: PyTree,
    data: EstimateData,
    rtol: Scalar,
) -> Solution:
    """Makes rounds of inner steps, Newton steps and adjoint solves to ``rtol``."""
    init_w = problem.init_inner(state.w, alpha)
    outer_batch = data.outer_batch(estimator.outer_batch_size)
    point = Point(problem, init_w, alpha, data.inner_batch(), outer_batch)
    # One scaling for all rounds, because the tolerances are norms in its coordinates.
    scaling = find_scaling(estimator, point, state.s, state.num_estimates)
    adaptive = AdaptiveSolve(estimator, data, point, rtol, scaling)
    final = adaptive.run(
        finite_or_zero(state.adjoint),
        finite_or_zero(state.duals),
        state.grad_tol,
    )
    linear_stats = final.linear_stats
    linear_stats["num_products"] += scaling.num_products
    w, _ = final.carry  # and the state of the inner optimizer
    return Solution(
        w,
        final.adjoint_solution,
        counts=final.counts,
        linear_stats=linear_stats,
        grad_tol=final.init_grad_tol,
        prepared=None,
        s=scaling.s,
    )


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

    def prepare(_):
        prepared, num_products = linear_solver.prepare(matvec, like)
        return prepared, jnp.asarray(num_products, float)

    reused = state.prepared, jnp.asarray(0, float)
    return apply_unless(~should_refresh, prepare, reused)
