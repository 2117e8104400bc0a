"""The adjoint solve of `Implicit`, with the estimate of the hypergradient's error."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import PyTree, Scalar

from ..implicit.confirmation import confirm_error
from ..implicit.differentiation import (
    ImplicitResult,
    Point,
    implicit_hypergradient,
    scaled_hypergradient,
)
from ..implicit.error import (
    NUM_DIRECTIONS,
    CorrectionTerms,
    correction_targets,
    correction_terms,
    estimate_error,
    short_correction_terms,
)
from ..linear.equilibration import Scaling
from ..losses_with_w import fill_losses, losses_with_w, take_losses
from ..trees import as_row, concatenate

if TYPE_CHECKING:
    from .implicit import Implicit


class AdjointSolution(NamedTuple):
    """Implicit differentiation at one ``w`` with its error estimate.

    Attributes:
      result: Implicit differentiation.
      error: The estimated error, or None if it was not asked for.
      duals: ``duals`` of `CorrectionTerms` for the next estimate; the given ones if the
        solver yields none.
      num_extra_products: Number of products beside those of ``result``.
      num_outer_grads: Number of gradients of each outer loss, the mean over K losses.
    """

    result: ImplicitResult
    error: Any  # HypergradientError or None
    duals: PyTree
    num_extra_products: Scalar | float
    num_outer_grads: Scalar | float = 1.0


def uses_scaled_cg(estimator: "Implicit") -> bool:
    """Returns True if the adjoint solve is `scaled_cg` on ``H`` itself."""
    is_scaled = getattr(estimator.linear_solver, "is_scaled", False)
    return _solves_with_hessian(estimator) and is_scaled


def _solves_with_hessian(estimator: "Implicit") -> bool:
    """Returns True if the operator of the adjoint solve is ``H`` itself."""
    return estimator.damping is None and estimator.hvp_fn is None


def solve_adjoint(
    estimator: "Implicit",
    point: Point,
    scaling: Scaling,
    adjoint: PyTree,
    duals: PyTree,
    *,
    linear_solver: lx.AbstractLinearSolver,
    prepared: PyTree = None,
    rtol: Scalar | float | None = None,
) -> AdjointSolution:
    """Returns implicit differentiation at a point, and its error estimate if asked for.

    Of K outer losses those without ``w``, such as a number of FLOPs, have the adjoint
    zero, and no system is solved for them.

    Args:
      estimator: The `Implicit` whose ``damping`` and ``hvp_fn`` apply.
      point: Where the derivatives are taken.
      scaling: Diagonal scaling of ``H``.
      adjoint, duals: Solutions of the previous estimate, or zeros.
      linear_solver: The linear solver, whose tolerance may differ from the estimator's.
      prepared: Data that the linear solver reuses.
      rtol: Relative error up to which the hypergradient is trusted; None stands for no
        error estimate.

    Cost:
      For the error estimate with `scaled_cg` five products and one outer gradient, two
      products for the duals of the previous estimate, one after negative curvature, and
      nine where a Newton step does not lower ``dL/dw`` as predicted; with any other
      solver up to 25 steps of `scaled_cg` more. `confirm_error` adds its own.
    """
    solve = functools.partial(
        _solve_adjoint,
        estimator,
        scaling=scaling,
        linear_solver=linear_solver,
        prepared=prepared,
        rtol=rtol,
    )
    problem, w, alpha, _, outer_batch = point
    indices = losses_with_w(problem, w, alpha, outer_batch)
    if len(indices) == len(problem.outer_losses):
        return solve(point, adjoint=adjoint, duals=duals)
    solution = solve(
        point._replace(problem=problem.with_losses(indices)),
        adjoint=take_losses(adjoint, indices),
        duals=take_losses(duals, indices),
    )
    return _with_direct_losses(point, solution, indices)


def _with_direct_losses(
    point: Point, solution: AdjointSolution, indices: Sequence[int]
) -> AdjointSolution:
    """Returns the solution of all K losses from that of those which use ``w``.

    The hypergradient of any other is its ``dM/dalpha``.
    """
    problem, w, alpha, _, outer_batch = point
    num_losses = len(problem.outer_losses)
    direct = [i for i in range(num_losses) if i not in indices]
    from_solved = lambda tree: fill_losses(tree, indices, num_losses)
    value, _, direct_term = problem.with_losses(direct).outer_value_and_grads(
        w, alpha, outer_batch
    )
    from_direct = fill_losses((value, direct_term), direct, num_losses)
    result = solution.result
    from_w = from_solved((result.value, result.hypergradient))
    value, hypergradient = optax.tree.add(from_w, from_direct)
    result = dataclasses.replace(
        result,
        value=value,
        hypergradient=hypergradient,
        b=from_solved(result.b),
        adjoint=from_solved(result.adjoint),
        cross=from_solved(result.cross),
        residual=from_solved(result.residual),
        adjoint_residual=from_solved(result.adjoint_residual),
    )
    num_outer_grads = solution.num_outer_grads * len(indices) + len(direct)
    return solution._replace(
        result=result,
        duals=from_solved(solution.duals),
        num_outer_grads=num_outer_grads / num_losses,
    )


def _solve_adjoint(
    estimator: "Implicit",
    point: Point,
    *,
    scaling: Scaling,
    adjoint: PyTree,
    duals: PyTree,
    linear_solver: lx.AbstractLinearSolver,
    prepared: PyTree,
    rtol: Scalar | float | None,
) -> AdjointSolution:
    """Returns `solve_adjoint` for all outer losses."""
    with_error = rtol is not None
    terms: Any = None
    if uses_scaled_cg(estimator):
        solution, terms = _solve_scaled(
            point, scaling, adjoint, duals, linear_solver, with_error
        )
    else:
        result = implicit_hypergradient(
            point,
            linear_solver,
            adjoint,
            0.0 if estimator.damping is None else estimator.damping,
            prepared,
            estimator.hvp_fn,
            scaling if with_error and _solves_with_hessian(estimator) else None,
        )
        solution = AdjointSolution(result, None, duals, 0)
        if with_error:
            terms, num_extra = short_correction_terms(point, scaling, result)
            solution = solution._replace(num_extra_products=num_extra)
    if not with_error:
        return solution
    error, num_products = estimate_error(point, scaling, solution.result, terms)
    error, num_confirming, num_outer_grads = confirm_error(
        point, scaling, solution.result, error, rtol
    )
    num_products += num_confirming + solution.num_extra_products
    is_negative = solution.result.linear_stats["negative_curvature"]
    return solution._replace(
        result=_with_negative_curvature(
            solution.result, is_negative | error.negative_curvature
        ),
        error=error,
        num_extra_products=jnp.asarray(num_products, float),
        num_outer_grads=jnp.asarray(2 + num_outer_grads, float),
    )


def _solve_scaled(
    point: Point,
    scaling: Scaling,
    adjoint: PyTree,
    duals: PyTree,
    linear_solver: Any,
    with_error: bool,
) -> tuple[AdjointSolution, CorrectionTerms | None]:
    """Returns the solution by `scaled_cg`, and the terms that it yields."""
    per_loss = point.problem.for_each_loss
    subspace = per_loss(as_row)(adjoint)
    targets = None
    if with_error:
        subspace = per_loss(concatenate)(subspace, duals)
        targets = correction_targets(point)
    result, solution = scaled_hypergradient(
        point,
        scaling,
        subspace,
        rtol=linear_solver.rtol,
        max_steps=linear_solver.max_steps,
        targets=targets,
    )
    if not with_error:
        return AdjointSolution(result, None, duals, 0), None
    terms = per_loss(lambda x: correction_terms(point.matvec, x, scaling))(solution)
    # `estimate_error` decides whether that of the solve counts against the estimate.
    is_negative = result.linear_stats["negative_curvature"]
    result = _with_negative_curvature(result, is_negative & ~solution.is_negative)
    num_products = NUM_DIRECTIONS + len(point.problem.outer_losses)
    return AdjointSolution(result, None, terms.duals, num_products), terms


def _with_negative_curvature(
    result: ImplicitResult, is_negative: Scalar
) -> ImplicitResult:
    """Returns the result with this statistic of its solve."""
    linear_stats = result.linear_stats | {"negative_curvature": is_negative}
    return dataclasses.replace(result, linear_stats=linear_stats)
