"""Implicit differentiation that works until the hypergradient meets a tolerance.

HOAG (Pedregosa 2016, arXiv 1602.02355, algorithm 1) solves the inner problem and the
adjoint system inexactly, both to a tolerance that the user prescribes. Here the user
prescribes the relative error of the hypergradient itself, and the two tolerances follow
from `estimate_error`: the inner error is the larger one of ``correction`` and
``relative_change``, the adjoint error that of ``adjoint_change`` and
``adjoint_residual``. Norms of inner gradients are those of scaled coordinates.
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree, Scalar

from ..batches import at_draw
from ..implicit.differentiation import (
    EMPTY_LINEAR_STATS,
    Point,
    merge_linear_stats,
    safeguarded_newton_steps,
)
from ..inner.base import InnerStats, grads_per_step, inner_stats, step_fraction
from ..inner.stopping import make_grad_tolerance
from ..linear.base import LinearStats
from ..linear.equilibration import Scaling
from ..problem import EstimateData
from ..trees import all_finite, apply_unless, machine_eps, safe_norm
from .implicit_adjoint import AdjointSolution, solve_adjoint, uses_scaled_cg

MAX_ROUNDS = 8
GRADS_PER_CHECK = 10  # gradients that steps cost between checks of the full gradient
ROUNDING_ULPS = 10  # units in the last place that count as rounding
ADJOINT_FACTOR = 100.0  # tolerance of the hypergradient over that of the adjoint solve
MAX_TOL_CHANGE = 10.0  # largest factor between grad_tol and the gradient norm reached


class AdaptiveState(eqx.Module):
    """The state after a round, and the work done so far.

    Attributes:
      carry: Carry of the inner solver; its first entry is ``w``.
      adjoint_solution: The hypergradient with its adjoint, and their error estimate,
        which is infinite before the first round.
      counts: Statistics of the inner solver, including the gradients of checks and
        Newton steps; ``num_outer_grads`` counts the gradients of one outer loss.
      linear_stats: Number of products, and the spectrum that the solves found.
      grad_tol: Norm ``||S dL/dw||`` at which the inner steps of the next round stop.
      init_grad_tol: The ``grad_tol`` with which one round would have sufficed.
      adjoint_rtol: Relative residual at which the next adjoint solve stops.
      has_moved: Whether the round changed ``w`` by more than rounding.
      num_rounds: Number of rounds made.
    """

    carry: PyTree
    adjoint_solution: AdjointSolution
    counts: InnerStats
    linear_stats: LinearStats
    grad_tol: Scalar
    init_grad_tol: Scalar
    adjoint_rtol: Scalar
    has_moved: Scalar
    num_rounds: Scalar

    @property
    def inner_grad(self) -> PyTree:
        """``dL/dw``."""
        return self.adjoint_solution.result.inner_grad


class AdaptiveSolve(eqx.Module):
    """Rounds of inner steps, Newton steps and an adjoint solve.

    An iterative inner solver is stopped early; any other solver runs once.

    Attributes:
      estimator: The `Implicit` whose settings apply, except the tolerance of its linear
        solver.
      data: The data of the estimate.
      point: Where the inner solver starts, with all inner data.
      rtol: Relative tolerance of the hypergradient.
      scaling: Diagonal scaling ``S`` of ``H``.
    """

    estimator: Any
    data: EstimateData
    point: Point
    rtol: Scalar
    scaling: Scaling

    def run(self, adjoint: PyTree, duals: PyTree, grad_tol: Scalar) -> AdaptiveState:
        """Makes rounds, at least one, until the tolerance is met or no work is left.

        Args:
          adjoint, duals: Where the first adjoint solve starts.
          grad_tol: ``init_grad_tol`` of the previous estimate. NaN stands for the
            default of `_init_grad_tol`.
        """

        def cond_fun(state):
            result, error = state.adjoint_solution.result, state.adjoint_solution.error
            is_adjoint_dominant = error.adjoint_error > error.inner_error
            has_steps_left = self.has_steps_left(state.counts)
            # Inner steps may leave a maximum or a saddle at which no step was made.
            is_saddle = state.linear_stats["negative_curvature"] & has_steps_left
            is_saddle &= state.counts["num_steps"] == 0
            is_saddle &= self.grad_norm(state.inner_grad) > state.grad_tol
            largest_error = jnp.maximum(error.inner_error, error.adjoint_error)
            is_met = (largest_error <= self.rtol) & ~is_saddle
            can_move = state.has_moved & (self.estimator.num_newton_steps > 0)
            can_continue = can_move | is_adjoint_dominant | has_steps_left
            can_continue |= state.num_rounds == 0
            is_finite = all_finite(result.hypergradient)
            return (state.num_rounds < MAX_ROUNDS) & ~is_met & can_continue & is_finite

        # A lambda, because JAX hashes bound methods by value, arrays included.
        body_fun = lambda state: self.step(state)
        init_state = self.init(adjoint, duals, grad_tol)
        return jax.lax.while_loop(cond_fun, body_fun, init_state)

    def init(self, adjoint: PyTree, duals: PyTree, grad_tol: Scalar) -> AdaptiveState:
        """Returns the state before the first round, whose errors are infinite."""
        problem, w, alpha, *_ = self.point
        if is_iterative(self.solver):
            carry, counts = self.init_carry(w), inner_stats(0, num_grads=0)
        else:
            data = self.data
            w, counts = self.solver.solve(
                problem.inner_loss, w, alpha, data.inner_data, data.solver_key
            )
            carry = w, ()
        inner_grad = self.inner_grad(w)
        grad_tol, num_unit_grads = self._init_grad_tol(w, inner_grad, grad_tol)
        # The first round computes everything else of the adjoint.
        adjoint_rtol = self.rtol / ADJOINT_FACTOR
        solve = lambda: self.solve_adjoint(w, adjoint, duals, adjoint_rtol)
        empty = optax.tree.zeros_like(jax.eval_shape(solve))
        result = dataclasses.replace(
            empty.result, adjoint=adjoint, inner_grad=inner_grad
        )
        infinite = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), empty.error)
        return AdaptiveState(
            carry=carry,
            adjoint_solution=empty._replace(result=result, error=infinite, duals=duals),
            counts=add_counts(counts, num_grads=1 + num_unit_grads)
            | {"num_outer_grads": jnp.asarray(0.0)},
            linear_stats=jax.tree.map(jnp.asarray, EMPTY_LINEAR_STATS),
            grad_tol=grad_tol,
            init_grad_tol=grad_tol,
            adjoint_rtol=adjoint_rtol,
            has_moved=jnp.asarray(True),
            num_rounds=jnp.asarray(0),
        )

    def step(self, state: AdaptiveState) -> AdaptiveState:
        """Makes one round: inner steps, Newton steps, and an adjoint solve."""
        linear_stats = _without_negative_curvature(state.linear_stats)
        carry, inner_grad, counts = self._run_inner_steps(state, linear_stats)
        grad_norm = self.grad_norm(inner_grad)
        carry, linear_stats, counts = self._apply_newton_steps(
            carry, inner_grad, linear_stats, counts
        )
        w = carry[0]
        previous = state.adjoint_solution
        solution = self.solve_adjoint(
            w, previous.result.adjoint, previous.duals, state.adjoint_rtol
        )
        error = solution.error
        linear_stats = merge_linear_stats(linear_stats, solution.result.linear_stats)
        linear_stats["num_products"] += solution.num_extra_products
        grad_tol = self._next_grad_tol(
            state, counts, linear_stats, grad_norm, error.inner_error
        )
        rtol_factor = jnp.clip(self.rtol / (4 * error.adjoint_error), 1e-2, 1.0)
        is_first = state.num_rounds == 0
        return AdaptiveState(
            carry=carry,
            adjoint_solution=solution,
            counts=add_counts(counts, num_outer_grads=solution.num_outer_grads),
            linear_stats=linear_stats,
            grad_tol=grad_tol,
            init_grad_tol=jnp.where(is_first, grad_tol, state.init_grad_tol),
            adjoint_rtol=state.adjoint_rtol * rtol_factor,
            has_moved=differs_beyond_rounding(w, state.carry[0]),
            num_rounds=state.num_rounds + 1,
        )

    def _init_grad_tol(
        self, w: PyTree, inner_grad: PyTree, grad_tol: Scalar
    ) -> tuple[Scalar, Scalar | float]:
        """Returns the gradient norm at which the first inner steps stop, and its cost.

        Unless ``grad_tol`` is positive, the norm is relative to that at ``w``. If ``w``
        already meets `GradTolerance`, it is relative to the unit of that tolerance.
        """

        def find_default(_):
            grad_fn = lambda w: self.scaling.multiply(self.inner_grad(w))
            grad = self.scaling.multiply(inner_grad)
            scale = make_grad_tolerance(self.pre_newton_tol, grad_fn, w, grad)
            norm = jnp.where(scale.is_met(grad), scale.unit, scale.init_norm)
            default_tol = (self.pre_newton_tol * norm).astype(grad_tol.dtype)
            return default_tol, scale.num_grads.astype(float)

        if not is_iterative(self.solver):
            return self.pre_newton_tol * self.grad_norm(inner_grad), 0.0
        return apply_unless(grad_tol > 0, find_default, (grad_tol, jnp.asarray(0.0)))

    # The parts of a round.

    def _run_inner_steps(
        self, state: AdaptiveState, linear_stats: LinearStats
    ) -> tuple[PyTree, PyTree, InnerStats]:
        """Runs inner steps until a check of the full gradient finds it small enough.

        It is at most ``grad_tol`` then, or the error that rounding causes. The steps
        have the keys of an uninterrupted run of the solver. Returns the carry,
        ``dL/dw`` at its ``w``, and the counts with the new steps.
        """
        carry, inner_grad, counts = state.carry, state.inner_grad, state.counts
        if not is_iterative(self.solver) or self.solver.num_steps == 0:
            return carry, inner_grad, counts
        rounding_error = self.rounding_error(carry[0], linear_stats)
        grad_tol = jnp.maximum(state.grad_tol, rounding_error)
        num_steps = self.solver.num_steps
        loss, inner_data = self.point.problem.inner_loss, self.data.inner_data
        _, steps_key = jax.random.split(self.data.solver_key)
        num_grads = grads_per_step(self.solver) * step_fraction(self.solver, inner_data)
        keys = jax.random.split(steps_key, num_steps)
        steps_per_check = math.ceil(GRADS_PER_CHECK / num_grads)

        def cond_fun(loop_state):
            _, inner_grad, index, _ = loop_state
            return (index < num_steps) & (self.grad_norm(inner_grad) > grad_tol)

        def body_fun(loop_state):
            carry, _, index, num_checks = loop_state
            stop = jnp.minimum(index + steps_per_check, num_steps)
            step_data = lambda i: at_draw(
                inner_data, steps_key, i, num_steps, stream="w"
            )
            step = lambda i, carry: self.solver.step(
                loss, carry, self.point.alpha, step_data(i), keys[i]
            )
            carry = jax.lax.fori_loop(index, stop, step, carry)
            return carry, self.inner_grad(carry[0]), stop, num_checks + 1

        init_index = counts["num_steps"].astype(int)
        carry, inner_grad, index, num_checks = jax.lax.while_loop(
            cond_fun, body_fun, (carry, inner_grad, init_index, jnp.asarray(0))
        )
        num_new_steps = index - init_index
        counts = add_counts(
            counts,
            num_steps=num_new_steps,
            num_grads=num_new_steps * num_grads + num_checks,
        )
        return carry, inner_grad, counts

    def _apply_newton_steps(
        self,
        carry: PyTree,
        inner_grad: PyTree,
        linear_stats: LinearStats,
        counts: InnerStats,
    ) -> tuple[PyTree, LinearStats, InnerStats]:
        """Applies Newton steps to ``w``; returns carry, statistics and counts."""
        num_newton_steps = self.estimator.num_newton_steps
        if not num_newton_steps:
            return carry, linear_stats, counts
        # Newton-CG is quadratic only if the CG tolerance shrinks with the error.
        rtols = [self.pre_newton_tol ** (2**i) for i in range(num_newton_steps)]
        point = self.point._replace(w=carry[0])
        w, linear_stats = safeguarded_newton_steps(
            point, inner_grad, self.scaling, rtols, linear_stats
        )
        counts = add_counts(counts, num_grads=num_newton_steps)
        # Reset the optimizer state: old momentum would undo the Newton correction.
        carry = self.init_carry(w) if is_iterative(self.solver) else (w, ())
        return carry, linear_stats, counts

    def _next_grad_tol(
        self,
        state: AdaptiveState,
        counts: InnerStats,
        linear_stats: LinearStats,
        grad_norm: Scalar,
        inner_error: Scalar,
    ) -> Scalar:
        """Returns the gradient norm from which the next round should suffice.

        ``state`` is that before the round, ``counts`` and ``linear_stats`` are those
        after it, and ``grad_norm`` is ``||S dL/dw||`` before its Newton steps.
        """
        # k Newton steps reduce an error e to O(e^(2^k)); aim at 2/3 of the tolerance.
        order = 2**self.estimator.num_newton_steps
        tol_factor = (self.rtol / (1.5 * inner_error)) ** (1 / order)
        tol_factor = jnp.nan_to_num(tol_factor)  # NaN outside of the loss's domain
        max_tol = jnp.maximum(MAX_TOL_CHANGE * grad_norm, state.grad_tol)
        default_tol = self.pre_newton_tol * grad_norm
        untested_tol = jnp.where(inner_error <= self.rtol, state.grad_tol, default_tol)
        has_steps = counts["num_steps"] > state.counts["num_steps"]
        min_tol = jnp.where(has_steps, grad_norm / MAX_TOL_CHANGE, untested_tol)
        tol = jnp.clip(grad_norm * tol_factor, min_tol, max_tol)
        is_negative = linear_stats["negative_curvature"]
        return jnp.where(~has_steps & is_negative, default_tol, tol)

    def solve_adjoint(
        self, w: PyTree, adjoint: PyTree, duals: PyTree, adjoint_rtol: Scalar
    ) -> AdjointSolution:
        """Returns implicit differentiation with the adjoint solved to a tolerance."""
        linear_solver = eqx.tree_at(
            lambda s: s.rtol,
            self.estimator.linear_solver,
            adjoint_rtol,
            is_leaf=lambda x: x is None,
        )
        return solve_adjoint(
            self.estimator,
            self.point._replace(w=w),
            self.scaling,
            adjoint,
            duals,
            linear_solver=linear_solver,
            rtol=self.rtol,
        )

    def grad_norm(self, inner_grad: PyTree) -> Scalar:
        """Returns ``||S dL/dw||``."""
        return safe_norm(self.scaling.multiply(inner_grad))

    def rounding_error(self, w: PyTree, linear_stats: LinearStats) -> Scalar:
        """Returns the norm of ``S dL/dw`` that rounding of ``w`` causes.

        It is 0 as long as the largest curvature of ``S H S`` is not known, and for
        linear solvers whose ``ritz_max`` is that of another matrix.
        """
        if not uses_scaled_cg(self.estimator):
            return jnp.asarray(0.0)
        eps, w_norm = machine_eps(w), safe_norm(self.scaling.divide(w))
        return jnp.nan_to_num(ROUNDING_ULPS * eps * linear_stats["ritz_max"] * w_norm)

    # Quantities that do not change between rounds.

    @property
    def solver(self) -> Any:
        """The inner solver."""
        return self.estimator.solver

    def init_carry(self, w: PyTree) -> PyTree:
        """Returns the first carry of the inner solver."""
        init_key, _ = jax.random.split(self.data.solver_key)
        problem, _, alpha, *_ = self.point
        return self.solver.init(
            problem.inner_loss, w, alpha, self.data.inner_data, init_key
        )

    def inner_grad(self, w: PyTree) -> PyTree:
        """Returns ``dL/dw`` on all inner data."""
        problem, _, alpha, batch, _ = self.point
        return jax.grad(problem.inner_loss)(w, alpha, batch)

    def has_steps_left(self, counts: InnerStats) -> Scalar | bool:
        """Returns True if the inner solver may make further steps."""
        return is_iterative(self.solver) and counts["num_steps"] < self.solver.num_steps

    @property
    def pre_newton_tol(self) -> Scalar:
        """Error that ``num_newton_steps`` Newton steps reduce to ``rtol``."""
        return self.rtol ** (1 / 2**self.estimator.num_newton_steps)


def differs_beyond_rounding(w: PyTree, prev_w: PyTree) -> Scalar:
    """Returns whether an entry of ``w`` has changed by more than rounding."""
    exceeds = lambda x, prev: jnp.any(
        jnp.abs(x - prev) > ROUNDING_ULPS * jnp.finfo(x.dtype).eps * jnp.abs(x)
    )
    return jnp.any(jnp.stack(jax.tree.leaves(jax.tree.map(exceeds, w, prev_w))))


def is_iterative(solver: Any) -> bool:
    """Returns True if a solver can be stopped after any step."""
    return hasattr(solver, "step")


def add_counts(counts: InnerStats, **increments: Any) -> InnerStats:
    """Returns the counts with increments added."""
    return counts | {
        name: counts[name] + increment for name, increment in increments.items()
    }


def _without_negative_curvature(linear_stats: LinearStats) -> LinearStats:
    """Returns the statistics, reset if they contain negative curvature.

    Negative curvature at an earlier ``w`` implies nothing about the argmin.
    """
    empty = EMPTY_LINEAR_STATS | {"num_products": linear_stats["num_products"]}
    is_negative = linear_stats["negative_curvature"]
    return jax.tree.map(
        lambda new, old: jnp.where(is_negative, new, old), empty, linear_stats
    )
