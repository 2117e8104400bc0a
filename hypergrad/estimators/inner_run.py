"""What estimators of the finite procedure share: T inner steps, then the outer loss."""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..certificate import compute_certificate
from ..cost import cost_stats
from ..inner.base import InnerSolver, InnerStats, IterativeSolver
from ..inner.descent import NON_DIFFERENTIABLE_STATES, contains_state, run_inner_steps
from ..jaxpr import unused_leaves
from ..problem import (
    Bilevel,
    EstimateData,
    batch_fraction,
    fixed_batch_fraction,
)
from ..problem_checks import (
    check_alpha_has_gradient,
    check_problem,
    init_uses_alpha,
    solver_uses_alpha,
)
from ..trees import all_finite, norm
from ..validation import KEY_SHAPE, check_solver
from .base import Estimate, make_stats


class InnerRunState(eqx.Module):
    """Where the next inner run begins; same structure as ``w``."""

    w: PyTree


def check_differentiable(solver: Any) -> None:
    """Refuses a solver whose iterations have no derivative."""
    check_solver(solver)
    if not getattr(solver, "differentiable", False):
        raise _not_differentiable(solver)


def _not_differentiable(solver: Any) -> ValueError:
    return ValueError(
        f"the iterations of {solver} cannot be differentiated (line searches and "
        "L-BFGS give NaN or wrong derivatives when unrolled); use hg.Implicit with "
        "this solver, or hg.Descent with a plain optimizer"
    )


def check_inner_run(
    solver: IterativeSolver,
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    *,
    sees_start: bool = True,
) -> None:
    """Refuses line searches, bad losses, and a leaf of ``alpha`` that is not seen."""
    # What an optimizer made from alpha is, only its state tells.
    inner_data, _ = problem.sample_data(jax.random.key(0))
    first = lambda w, alpha, key: solver.init(
        problem.inner_loss, w, alpha, inner_data, key
    )
    if contains_state(
        jax.eval_shape(first, w, alpha, KEY_SHAPE), NON_DIFFERENTIABLE_STATES
    ):
        raise _not_differentiable(solver)
    check_problem(problem, w, alpha, solver)
    beside = solver_uses_alpha(solver, problem, w, alpha, inner_data)
    advice = "nor does the optimizer; take it out of alpha"
    if sees_start:
        start = init_uses_alpha(problem, w, alpha)
        beside = list(map(operator.or_, beside, start))
        advice = "nor does the optimizer or the start; take it out of alpha"
    check_alpha_has_gradient(problem, w, alpha, beside, advice)


def make_run_fn(
    solver: InnerSolver,
    problem: Bilevel,
    data: EstimateData,
    w: PyTree,
    outer_batch: PyTree,
) -> Callable[[PyTree], tuple[Array, PyTree, InnerStats]]:
    """``alpha -> (M(w(alpha), alpha), w(alpha), cost)``, a run from ``w``."""

    def run(alpha: PyTree) -> tuple[Array, PyTree, InnerStats]:
        found, spent = solver.solve(
            problem.inner_loss,
            problem.init_inner(w, alpha),
            alpha,
            data.inner_data,
            data.solver_key,
        )
        return problem.outer_value(found, alpha, outer_batch), found, spent

    return run


def check_run_uses_alpha(
    solver: InnerSolver, problem: Bilevel, w: PyTree, alpha: PyTree
) -> None:
    """Refuses a leaf of ``alpha`` on which the outer value cannot depend.

    For methods that need no derivative: what is read anywhere in a run counts.
    """
    data = EstimateData.sample(problem, jax.random.key(0))
    run = make_run_fn(solver, problem, data, w, data.outer_batch())
    if names := unused_leaves(lambda alpha: run(alpha)[0], alpha):
        raise ValueError(
            f"neither the losses nor the solver nor the start reads "
            f"{', '.join(names)}; take it out of alpha"
        )


def make_response_fn(
    solver: IterativeSolver,
    problem: Bilevel,
    data: EstimateData,
    w: PyTree,
    outer_batch: PyTree,
    *,
    truncation_length: int | None = None,
    checkpoint: bool = False,
) -> Callable[..., tuple[Array, PyTree]]:
    """``alpha -> (M(w_T(alpha), alpha), w_T(alpha))``, by T differentiable steps.

    With ``last`` two more arguments are what the older and the newer half of those
    steps read in place of ``alpha``.
    """

    def run(alpha: PyTree, *halves: PyTree) -> tuple[Array, PyTree]:
        found, _ = run_inner_steps(
            solver,
            problem.inner_loss,
            problem.init_inner(w, alpha),
            alpha,
            data.inner_data,
            data.solver_key,
            truncation_length=truncation_length,
            halves=halves or None,
            checkpoint=checkpoint,
        )
        return problem.outer_value(found, alpha, outer_batch), found

    return run


def inner_grad_norm(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
) -> Array:
    """``||dL/dw||`` on all of the data, for one gradient."""
    return norm(jax.grad(problem.inner_loss)(w, alpha, data.inner_batch()))


def next_state(
    problem: Bilevel, state: InnerRunState, w: PyTree, warm_start: bool
) -> InnerRunState:
    """``w`` where runs are warm-started, unless the problem has a start of its own."""
    return InnerRunState(w) if warm_start and problem.init_fn is None else state


def make_run_estimate(
    problem: Bilevel,
    data: EstimateData,
    state: InnerRunState,
    alpha: PyTree,
    value: Array,
    hypergradient: PyTree,
    w: PyTree,
    *,
    num_steps: int,
    num_grads: Array | float,
    num_hvps: Array | float,
    reads_alpha: bool,
    error_estimate: Array | float,
    trusted: Array | bool,
    outer_batch_size: int | None,
    warm_start: bool | None,
    certify: bool,
) -> tuple[Estimate, InnerRunState]:
    """The estimate of a procedure's derivative with its stats, and the next state.

    Args:
      problem, data, state, alpha: of the estimate.
      value, hypergradient, w: what was found.
      num_steps: T.
      num_grads, num_hvps: calls on the batches of inner steps.
      reads_alpha: whether the steps read ``alpha`` beside the loss.
      error_estimate: relative, of the derivative as the procedure's own.
      trusted: what the estimator says beside all being finite.
      outer_batch_size: as given to the estimator.
      warm_start: None means True unless ``reads_alpha``.
      certify: fill in ``distance_to_implicit``, which is NaN where the steps or the
        start read ``alpha``.
    """
    part = batch_fraction(data.inner_data)
    costs = cost_stats(
        data.inner_data,
        data.outer_data,
        num_grads=num_grads * part + 1,
        num_hvps=num_hvps * part,
        num_outer_grads=value.size
        * fixed_batch_fraction(data.outer_data, outer_batch_size),
    )
    distance = jnp.nan
    if certify and not (reads_alpha or any(init_uses_alpha(problem, w, alpha))):
        found = compute_certificate(problem, data, w, alpha, hypergradient)
        distance = found.error_estimate
        costs = jax.tree.map(jnp.add, costs, found.stats)
    stats = make_stats(
        trusted is not False and all_finite(value, hypergradient, w) & trusted,
        inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
        num_inner_steps=num_steps,
        error_estimate=error_estimate,
        distance_to_implicit=distance,
        **costs,
    )
    warm = not reads_alpha if warm_start is None else warm_start
    estimate = Estimate(value, hypergradient, w, stats)
    return estimate, next_state(problem, state, w, warm)
