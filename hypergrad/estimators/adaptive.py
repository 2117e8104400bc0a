"""Implicit differentiation that works until the hypergradient meets a tolerance.

HOAG (Pedregosa 2016, arXiv 1602.02355, algorithm 1) solves the inner problem and the
adjoint system inexactly, both to a tolerance that the user prescribes. Here the user
prescribes the relative error of the hypergradient ``h`` itself, and the two tolerances
follow from estimates of the two errors:

    inner error:    max(||h_k - h_{k-1}|| / ||h_k|| * rho / (1 - rho),
                        stationarity_error),   rho = ||dL/dw|| / (mu ||w_k - w_{k-1}||)
    adjoint error:  ||b - H v|| / mu * ||J' v|| / (||v|| ||h||)

``mu`` is the smallest curvature of ``L`` observed so far. The first estimate assumes
that the error of ``h`` is linear in the distance to ``w*``, for which
``||dL/dw|| / mu`` stands: too large, except along the flattest directions. The step
``w_k - w_{k-1}`` need not point to ``w*`` (learning rates differ, and parts of ``w``
may not have moved), so that `stationarity_error` is estimated as well.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Scalar

from ..implicit_diff import (
    EMPTY_LINEAR_STATS,
    ImplicitResult,
    implicit_hypergradient,
    max_relative_error,
    merge_linear_stats,
    safeguarded_newton_steps,
)
from ..inner.base import InnerStats, inner_stats
from ..linear.base import LinearStats
from ..problem import Bilevel, EstimateData, batch_fraction
from ..trees import add_scale, all_finite, norm, scale, vdot
from .error_estimates import adjoint_residual_error, stationarity_error

MAX_ROUNDS = 8
GRADS_PER_CHECK = 10  # gradients that steps cost between checks of the full gradient
ROUNDING_ULPS = 10  # units in the last place that count as rounding
MAX_TOL_CHANGE = 10.0  # largest factor between grad_tol and the gradient norm reached


class AdaptiveState(eqx.Module):
    """The state after a round, and the work done so far.

    Attributes:
      carry: Carry of the inner solver; its first entry is ``w``.
      result: Implicit differentiation at ``w``.
      counts: Statistics of the inner solver, including the gradients of checks and
        Newton steps; ``num_outer_grads`` counts the gradients of one outer loss.
      linear_stats: Number of products, and the spectrum that the solves found.
      grad_tol: Gradient norm at which the inner steps of the next round stop.
      init_grad_tol: The ``grad_tol`` with which one round would have sufficed.
      adjoint_rtol: Relative residual at which the next adjoint solve stops.
      inner_error, adjoint_error: Estimated relative errors of the hypergradient, the
        maximum over K losses.
      has_moved: Whether the round changed ``w`` by more than rounding.
      num_rounds: Number of rounds made.
    """

    carry: PyTree
    result: ImplicitResult
    counts: InnerStats
    linear_stats: LinearStats
    grad_tol: Scalar
    init_grad_tol: Scalar
    adjoint_rtol: Scalar
    inner_error: Scalar
    adjoint_error: Scalar
    has_moved: Scalar
    num_rounds: Scalar

    @property
    def error(self) -> Scalar:
        """Estimated relative error of the hypergradient."""
        return self.inner_error + self.adjoint_error


class AdaptiveSolve(eqx.Module):
    """Rounds of inner steps, Newton steps and an adjoint solve.

    An iterative inner solver is stopped early; any other solver runs once.

    Attributes:
      estimator: The `Implicit` whose settings apply, except the tolerance of its linear
        solver.
      problem, data, alpha: Arguments of the estimate.
      rtol: Relative tolerance of the hypergradient.
    """

    estimator: Any
    problem: Bilevel
    data: EstimateData
    alpha: PyTree
    rtol: Scalar

    def run(self, w: PyTree, adjoint: PyTree, grad_tol: Scalar) -> AdaptiveState:
        """Makes rounds until the tolerance is met or nothing is left to do.

        Args:
          w, adjoint: Where the first solves start.
          grad_tol: ``init_grad_tol`` of the previous estimate. NaN stands for a
            tolerance relative to the gradient at ``w``.
        """

        def cond_fun(state):
            is_met = state.error <= self.rtol
            is_adjoint_dominant = state.adjoint_error > state.inner_error
            has_steps_left = self.has_steps_left(state.counts)
            can_continue = state.has_moved | is_adjoint_dominant | has_steps_left
            is_finite = all_finite(state.result.hypergradient)
            return (state.num_rounds < MAX_ROUNDS) & ~is_met & can_continue & is_finite

        # A lambda, because JAX hashes bound methods by value, arrays included.
        body_fun = lambda state: self.step(state)
        init_state = self.init(w, adjoint, grad_tol)
        return jax.lax.while_loop(cond_fun, body_fun, init_state)

    def init(self, w: PyTree, adjoint: PyTree, grad_tol: Scalar) -> AdaptiveState:
        """Returns the state before the first round, whose errors are infinite."""
        if is_iterative(self.solver):
            inner_grad = self.inner_grad(w)
            default_tol = self.pre_newton_tol * norm(inner_grad)
            grad_tol = jnp.where(jnp.isnan(grad_tol), default_tol, grad_tol)
            # Without Newton steps the first round has to move w by inner steps.
            has_newton_steps = self.estimator.num_newton_steps > 0
            init_tol = grad_tol if has_newton_steps else MAX_TOL_CHANGE * grad_tol
            counts = inner_stats(0, num_grads=1)
            carry, _, counts = self.run_inner_steps(
                self.init_carry(w), inner_grad, init_tol, counts
            )
        else:
            loss, data = self.problem.inner_loss, self.data
            w, counts = self.solver.solve(
                loss, w, self.alpha, data.inner_data, data.solver_key
            )
            carry = w, ()
        result = self.solve_adjoint(carry[0], adjoint, self.pre_newton_tol / 10)
        infinity = jnp.asarray(jnp.inf)
        return AdaptiveState(
            carry=carry,
            result=result,
            counts=counts | {"num_outer_grads": jnp.asarray(1.0)},
            linear_stats=merge_linear_stats(EMPTY_LINEAR_STATS, result.linear_stats),
            grad_tol=grad_tol,
            init_grad_tol=grad_tol,
            adjoint_rtol=self.rtol / 10,
            inner_error=infinity,
            adjoint_error=infinity,
            has_moved=jnp.asarray(True),
            num_rounds=jnp.asarray(0),
        )

    def step(self, state: AdaptiveState) -> AdaptiveState:
        """Makes one round: inner steps, Newton steps, and an adjoint solve."""
        linear_stats = _without_negative_curvature(state.linear_stats)
        carry, inner_grad, counts = self._approach_argmin(state, linear_stats)
        grad_norm = norm(inner_grad)
        carry, linear_stats, counts = self._apply_newton_steps(
            carry, inner_grad, linear_stats, counts
        )
        w = carry[0]
        result = self.solve_adjoint(w, state.result.adjoint, state.adjoint_rtol)
        linear_stats = merge_linear_stats(linear_stats, result.linear_stats)
        inner_error, adjoint_error, has_moved = self.estimate_errors(
            state, w, result, linear_stats
        )
        grad_tol = self._next_grad_tol(state, grad_norm, inner_error)
        rtol_factor = jnp.clip(self.rtol / (4 * adjoint_error), 1e-2, 1.0)
        is_first = state.num_rounds == 0
        return AdaptiveState(
            carry=carry,
            result=result,
            counts=add_counts(counts, num_outer_grads=2),
            linear_stats=linear_stats,
            grad_tol=grad_tol,
            init_grad_tol=jnp.where(is_first, grad_tol, state.init_grad_tol),
            adjoint_rtol=state.adjoint_rtol * rtol_factor,
            inner_error=inner_error,
            adjoint_error=adjoint_error,
            has_moved=has_moved,
            num_rounds=state.num_rounds + 1,
        )

    # The parts of a round.

    def _approach_argmin(
        self, state: AdaptiveState, linear_stats: LinearStats
    ) -> tuple[PyTree, PyTree, InnerStats]:
        """Runs inner steps to ``grad_tol``; returns carry, ``dL/dw`` and counts."""
        carry, inner_grad = state.carry, state.result.inner_grad
        if not is_iterative(self.solver):
            return carry, inner_grad, state.counts
        grad_tol = state.grad_tol
        if not self.estimator.num_newton_steps:  # inner steps alone have to move w
            grad_tol = jnp.minimum(grad_tol, norm(inner_grad) / MAX_TOL_CHANGE)
        rounding_error = gradient_rounding_error(carry[0], linear_stats)
        grad_tol = jnp.maximum(grad_tol, rounding_error)
        return self.run_inner_steps(carry, inner_grad, grad_tol, state.counts)

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
        w, linear_stats = safeguarded_newton_steps(
            self.problem.inner_loss,
            carry[0],
            self.alpha,
            self.inner_batch,
            inner_grad,
            rtols,
            linear_stats,
        )
        counts = add_counts(counts, num_grads=num_newton_steps)
        # Reset the optimizer state: old momentum would undo the Newton correction.
        is_restarted = is_iterative(self.solver)
        carry = self.init_carry(w) if is_restarted else (w, ())
        return carry, linear_stats, counts

    def _next_grad_tol(
        self, state: AdaptiveState, grad_norm: Scalar, inner_error: Scalar
    ) -> Scalar:
        """Returns the gradient norm from which the next round should suffice.

        ``grad_norm`` is ``||dL/dw||`` before the Newton steps of the round.
        """
        # k Newton steps reduce an error e to O(e^(2^k)); solve for half the tolerance.
        order = 2**self.estimator.num_newton_steps
        tol_factor = (self.rtol / (2 * inner_error)) ** (1 / order)
        max_tol = jnp.maximum(MAX_TOL_CHANGE * grad_norm, state.grad_tol)
        return jnp.clip(grad_norm * tol_factor, grad_norm / MAX_TOL_CHANGE, max_tol)

    def run_inner_steps(
        self, carry: PyTree, inner_grad: PyTree, grad_tol: Scalar, counts: InnerStats
    ) -> tuple[PyTree, PyTree, InnerStats]:
        """Runs inner steps until a check of the full gradient finds it at ``grad_tol``.

        The steps have the keys of an uninterrupted run of the solver. Returns the
        carry, ``dL/dw`` at its ``w``, and the counts with the new steps.
        """
        num_steps = self.solver.num_steps
        if num_steps == 0:
            return carry, inner_grad, counts
        loss, inner_data = self.problem.inner_loss, self.data.inner_data
        _, steps_key = jax.random.split(self.data.solver_key)
        grads_per_step = batch_fraction(inner_data)
        keys = jax.random.split(steps_key, num_steps)
        steps_per_check = math.ceil(GRADS_PER_CHECK / grads_per_step)

        def cond_fun(loop_state):
            _, inner_grad, index, _ = loop_state
            return (index < num_steps) & (norm(inner_grad) > grad_tol)

        def body_fun(loop_state):
            carry, _, index, num_checks = loop_state
            stop = jnp.minimum(index + steps_per_check, num_steps)
            step = lambda i, carry: self.solver.step(
                loss, carry, self.alpha, inner_data, keys[i]
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
            num_grads=num_new_steps * grads_per_step + num_checks,
        )
        return carry, inner_grad, counts

    def solve_adjoint(
        self, w: PyTree, adjoint: PyTree, adjoint_rtol: Scalar
    ) -> ImplicitResult:
        """Returns implicit differentiation with the adjoint solved to a tolerance."""
        linear_solver = eqx.tree_at(
            lambda s: s.rtol,
            self.estimator.linear_solver,
            adjoint_rtol,
            is_leaf=lambda x: x is None,
        )
        return implicit_hypergradient(
            self.problem,
            linear_solver,
            w,
            self.alpha,
            self.inner_batch,
            self.outer_batch,
            adjoint,
            self.estimator.damping,
        )

    # Error estimates.

    def estimate_errors(
        self,
        prev: AdaptiveState,
        w: PyTree,
        result: ImplicitResult,
        linear_stats: LinearStats,
    ) -> tuple[Scalar, Scalar, Scalar]:
        """Returns the inner error, the adjoint error, and whether ``w`` has moved.

        Args:
          prev: The state before the round.
          w, result: The inner solution after the round, and the derivatives at it.
          linear_stats: The spectrum found by all solves.
        """
        step = add_scale(w, -1, prev.carry[0])
        grad_change = add_scale(result.inner_grad, -1, prev.result.inner_grad)
        step_norm = norm(step)
        has_moved = step_norm > ROUNDING_ULPS * jnp.finfo(step_norm.dtype).eps * norm(w)
        # The smallest eigenvalue is at most any observed curvature, so include the
        # curvature along the step, <dw, dg> / ||dw||^2.
        curvature = jnp.fmin(
            jnp.nanmin(result.mean_curvature), linear_stats["ritz_min"]
        )
        curvature = jnp.where(
            has_moved,
            jnp.fmin(curvature, vdot(step, grad_change) / step_norm**2),
            curvature,
        )
        # Estimated distance to w* over the distance moved; ||w - w*|| ~ ||dL/dw|| / mu.
        rho = norm(result.inner_grad) / curvature / step_norm
        change_error = self._change_error(prev, result, rho, has_moved)
        is_stationary = norm(result.inner_grad) <= gradient_rounding_error(
            w, linear_stats
        )
        change_error = jnp.where(is_stationary, 0.0, change_error)
        distance_error = stationarity_error(
            self.problem,
            w,
            self.alpha,
            self.outer_batch,
            result.b,
            result.cross,
            result.hypergradient,
            scale(-1, result.inner_grad),
            curvature,
        )
        inner_error = jnp.where(
            curvature > 0, jnp.maximum(change_error, distance_error), jnp.inf
        )
        # If the outer loss does not depend on w, the inner error has no effect.
        inner_error = jnp.where(norm(result.b) == 0, 0.0, inner_error)
        adjoint_error = adjoint_residual_error(self.problem, result, curvature)
        return inner_error, adjoint_error, has_moved

    def _change_error(
        self,
        prev: AdaptiveState,
        result: ImplicitResult,
        rho: Scalar,
        has_moved: Scalar,
    ) -> Scalar:
        """Estimates the inner error from the change of the hypergradient in a round."""
        change = max_relative_error(
            self.problem, prev.result.hypergradient, result.hypergradient
        )
        # If the error is linear in the distance, change * rho / (1 - rho) remains.
        change_error = jnp.where(rho < 1, change * rho / (1 - rho), jnp.inf)
        # An unchanged w proves nothing as long as inner steps could still move it.
        is_inconclusive = self.has_steps_left(prev.counts)
        unmoved_error = jnp.where(is_inconclusive, jnp.inf, 0.0)
        return jnp.where(has_moved, change_error, unmoved_error)

    # Quantities that do not change between rounds.

    @property
    def solver(self) -> Any:
        """The inner solver."""
        return self.estimator.solver

    def init_carry(self, w: PyTree) -> PyTree:
        """Returns the first carry of the inner solver."""
        init_key, _ = jax.random.split(self.data.solver_key)
        return self.solver.init(
            self.problem.inner_loss, w, self.alpha, self.data.inner_data, init_key
        )

    def inner_grad(self, w: PyTree) -> PyTree:
        """Returns ``dL/dw`` on all inner data."""
        return jax.grad(self.problem.inner_loss)(w, self.alpha, self.inner_batch)

    def has_steps_left(self, counts: InnerStats) -> Scalar | bool:
        """Returns True if the inner solver may make further steps."""
        return is_iterative(self.solver) and counts["num_steps"] < self.solver.num_steps

    @property
    def pre_newton_tol(self) -> Scalar:
        """Error that ``num_newton_steps`` Newton steps reduce to ``rtol``."""
        return self.rtol ** (1 / 2**self.estimator.num_newton_steps)

    @property
    def inner_batch(self) -> PyTree:
        """The inner data without sampling."""
        return self.data.inner_batch()

    @property
    def outer_batch(self) -> PyTree:
        """The batch of the outer loss."""
        return self.data.outer_batch(self.estimator.outer_batch_size)


def gradient_rounding_error(w: PyTree, linear_stats: LinearStats) -> Scalar:
    """Returns the gradient norm that rounding of ``w`` causes."""
    eps = jnp.finfo(norm(w).dtype).eps
    rounding_error = ROUNDING_ULPS * eps * linear_stats["ritz_max"] * norm(w)
    return jnp.nan_to_num(rounding_error)


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
