"""What estimators of the finite procedure share: T inner steps, then the outer loss."""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..certificate import certificate
from ..checks import (
    KEY,
    check_problem,
    check_seen,
    check_solver,
    solver_reads_alpha,
    start_reads_alpha,
    unread,
)
from ..cost import ledger
from ..drawn import Drawn, drawn
from ..inner.descent import NOT_DIFFERENTIATED, holds, iterate
from ..inner.protocol import InnerSolver, InnerStats, IterativeSolver
from ..problem import Bilevel, fraction, held_fraction
from ..trees import all_finite, norm
from .protocol import Estimate, make_stats


class ProcedureState(eqx.Module):
    """Where the next inner run begins; same structure as ``w``."""

    w: PyTree


def check_differentiable(solver: Any) -> None:
    """Refuses a solver whose iterations have no derivative."""
    check_solver(solver)
    if not solver.differentiable:
        raise _not_differentiable(solver)


def _not_differentiable(solver: Any) -> ValueError:
    return ValueError(
        f"the iterations of {solver} cannot be differentiated (line searches and "
        "L-BFGS give NaN or wrong derivatives when unrolled); use hg.Implicit with "
        "this solver, or hg.Descent with a plain optimizer"
    )


def check_procedure(
    solver: IterativeSolver,
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    *,
    sees_start: bool = True,
) -> None:
    """Refuses line searches, bad losses, and a leaf of ``alpha`` that is not seen."""
    # What an optimizer made from alpha is, only its state tells.
    inner_data, _ = problem.data(jax.random.key(0))
    first = lambda w, alpha, key: solver.init(
        problem.inner_loss, w, alpha, inner_data, key
    )
    if holds(jax.eval_shape(first, w, alpha, KEY), NOT_DIFFERENTIATED):
        raise _not_differentiable(solver)
    check_problem(problem, w, alpha, solver)
    beside = solver_reads_alpha(solver, problem, w, alpha, inner_data)
    advice = "nor does the optimizer; take it out of alpha"
    if sees_start:
        start = start_reads_alpha(problem, w, alpha)
        beside = list(map(operator.or_, beside, start))
        advice = "nor does the optimizer or the start; take it out of alpha"
    check_seen(problem, w, alpha, beside, advice)


def whole_run(
    solver: InnerSolver,
    problem: Bilevel,
    data: Drawn,
    w: PyTree,
    outer_batch: PyTree,
) -> Callable[[PyTree], tuple[Array, PyTree, InnerStats]]:
    """``alpha -> (M(w(alpha), alpha), w(alpha), cost)``, a run from ``w``."""

    def run(alpha: PyTree) -> tuple[Array, PyTree, InnerStats]:
        found, spent = solver.solve(
            problem.inner_loss,
            problem.initial(w, alpha),
            alpha,
            data.inner_data,
            data.solver_key,
        )
        return problem.outer(found, alpha, outer_batch), found, spent

    return run


def check_read(solver: InnerSolver, problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Refuses a leaf of ``alpha`` on which the outer value cannot depend.

    For methods that need no derivative: what is read anywhere in a run counts.
    """
    data = drawn(problem, jax.random.key(0))
    run = whole_run(solver, problem, data, w, data.outer_batch())
    if names := unread(lambda alpha: run(alpha)[0], alpha):
        raise ValueError(
            f"neither the losses nor the solver nor the start reads "
            f"{', '.join(names)}; take it out of alpha"
        )


def response(
    solver: IterativeSolver,
    problem: Bilevel,
    data: Drawn,
    w: PyTree,
    outer_batch: PyTree,
    *,
    last: int | None = None,
    checkpoint: bool = False,
) -> Callable[..., tuple[Array, PyTree]]:
    """``alpha -> (M(w_T(alpha), alpha), w_T(alpha))``, by T differentiable steps.

    With ``last`` two more arguments are what the older and the newer half of those
    steps read in place of ``alpha``.
    """

    def run(alpha: PyTree, *halves: PyTree) -> tuple[Array, PyTree]:
        found, _ = iterate(
            solver,
            problem.inner_loss,
            problem.initial(w, alpha),
            alpha,
            data.inner_data,
            data.solver_key,
            last=last,
            halves=halves or None,
            checkpoint=checkpoint,
        )
        return problem.outer(found, alpha, outer_batch), found

    return run


def inner_residual(problem: Bilevel, data: Drawn, w: PyTree, alpha: PyTree) -> Array:
    """``||dL/dw||`` on all of the data, for one gradient."""
    return norm(jax.grad(problem.inner_loss)(w, alpha, data.inner_batch()))


def next_state(
    problem: Bilevel, state: ProcedureState, w: PyTree, warm_start: bool
) -> ProcedureState:
    """``w`` where runs are warm-started, unless the problem has a start of its own."""
    return ProcedureState(w) if warm_start and problem.start is None else state


def report(
    problem: Bilevel,
    data: Drawn,
    state: ProcedureState,
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
) -> tuple[Estimate, ProcedureState]:
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
    part = fraction(data.inner_data)
    costs = ledger(
        data.inner_data,
        data.outer_data,
        num_grads=num_grads * part + 1,
        num_hvps=num_hvps * part,
        num_outer_grads=value.size * held_fraction(data.outer_data, outer_batch_size),
    )
    distance = jnp.nan
    if certify and not (reads_alpha or any(start_reads_alpha(problem, w, alpha))):
        found = certificate(problem, data, w, alpha, hypergradient)
        distance = found.error_estimate
        costs = jax.tree.map(jnp.add, costs, found.stats)
    stats = make_stats(
        trusted is not False and all_finite(value, hypergradient, w) & trusted,
        inner_residual=inner_residual(problem, data, w, alpha),
        inner_steps=num_steps,
        error_estimate=error_estimate,
        distance_to_implicit=distance,
        **costs,
    )
    warm = not reads_alpha if warm_start is None else warm_start
    estimate = Estimate(value, hypergradient, w, stats)
    return estimate, next_state(problem, state, w, warm)
