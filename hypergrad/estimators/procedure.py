"""What estimators of the finite procedure share: T inner steps, then the outer loss."""

import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..certificate import CORRECTIONS, TRUST, certificate
from ..checks import (
    KEY,
    check_problem,
    check_seen,
    check_solver,
    solver_reads_alpha,
    start_reads_alpha,
)
from ..cost import ledger
from ..inner.descent import iterate, searches_a_line
from ..inner.protocol import IterativeSolver
from ..problem import Bilevel, Data, fraction, held, size, whole
from ..trees import all_finite, norm
from .protocol import Estimate, make_stats


class ProcedureState(eqx.Module):
    """Where the next inner run begins; same structure as ``w``."""

    w: PyTree


class Drawn(eqx.Module):
    """The data of one estimate and the keys of its parts."""

    inner_data: Data
    outer_data: Data
    solver_key: Array
    residual_key: Array
    outer_key: Array


def drawn(problem: Bilevel, key: Array) -> Drawn:
    """Splits the key of an estimate and draws its data."""
    data_key, solver_key, residual_key, outer_key = jax.random.split(key, 4)
    return Drawn(*problem.data(data_key), solver_key, residual_key, outer_key)


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
    if searches_a_line(jax.eval_shape(first, w, alpha, KEY)):
        raise _not_differentiable(solver)
    check_problem(problem, w, alpha, solver)
    beside = solver_reads_alpha(solver, problem, w, alpha, inner_data)
    advice = "nor does the optimizer; take it out of alpha"
    if sees_start:
        start = start_reads_alpha(problem, w, alpha)
        beside = list(map(operator.or_, beside, start))
        advice = "nor does the optimizer or the start; take it out of alpha"
    check_seen(problem, w, alpha, beside, advice)


def response(
    solver: IterativeSolver,
    problem: Bilevel,
    data: Drawn,
    w: PyTree,
    alpha: PyTree,
    outer_batch_size: int | None = None,
    *,
    last: int | None = None,
    checkpoint: bool = False,
) -> tuple[Array, PyTree]:
    """``M(w_T(alpha), alpha)`` and ``w_T(alpha)``."""
    w, _ = iterate(
        solver,
        problem.inner_loss,
        problem.initial(w, alpha),
        alpha,
        data.inner_data,
        data.solver_key,
        last=last,
        checkpoint=checkpoint,
    )
    outer_batch = held(data.outer_data, outer_batch_size, data.outer_key)
    return problem.outer(w, alpha, outer_batch), w


def report(
    solver: IterativeSolver,
    problem: Bilevel,
    data: Drawn,
    state: ProcedureState,
    alpha: PyTree,
    value: Array,
    hypergradient: PyTree,
    w: PyTree,
    *,
    num_grads: Array | float,
    num_hvps: Array | float,
    error_estimate: Array | float,
    trusted: Array | bool,
    outer_batch_size: int | None,
    warm_start: bool | None,
    certify: bool,
) -> tuple[Estimate, ProcedureState]:
    """The estimate with its stats, and the next state.

    Args:
      solver, problem, data, state, alpha: of the estimate.
      value, hypergradient, w: what was found.
      num_grads, num_hvps: mini-batch calls made, each counted as ``fraction`` of one.
      error_estimate, trusted: what the estimator says for its own target.
      outer_batch_size: as given to the estimator.
      warm_start: None means True unless the solver itself reads ``alpha``.
      certify: fill in ``distance_to_implicit``.
    """
    inner_data, outer_data = data.inner_data, data.outer_data
    part = fraction(inner_data)
    batch = whole(inner_data, data.residual_key)
    costs = ledger(
        inner_data,
        outer_data,
        num_grads=num_grads * part + 1,
        num_hvps=num_hvps * part,
        num_outer_grads=value.size
        * fraction(outer_data, outer_batch_size or size(outer_data)),
    )
    reads = any(solver_reads_alpha(solver, problem, w, alpha, inner_data))
    distance = jnp.nan
    if certify and not (reads or any(start_reads_alpha(problem, w, alpha))):
        found = certificate(
            problem,
            (inner_data, outer_data),
            w,
            alpha,
            hypergradient,
            None,
            CORRECTIONS,
            TRUST,
            data.residual_key,
        )
        distance = found.error_estimate
        costs = jax.tree.map(jnp.add, costs, found.stats)
    stats = make_stats(
        all_finite(value, hypergradient, w) & trusted,
        inner_residual=norm(jax.grad(problem.inner_loss)(w, alpha, batch)),
        inner_steps=solver.num_steps,
        error_estimate=error_estimate,
        distance_to_implicit=distance,
        **costs,
    )
    keep = not reads if warm_start is None else warm_start
    keep = keep and problem.start is None
    next_state = ProcedureState(w) if keep else state
    return Estimate(value, hypergradient, w, stats), next_state
