"""Inner steps, Newton steps and adjoint products until a relative error is met.

Let ``h`` and ``h'`` be the hypergradients before and after ``w`` was moved, and ``rho``
the distance to ``w*`` that is left over the distance moved. Where the error is linear
in the distance, that of ``h'`` is ``||h' - h|| rho / (1 - rho)``. The distance left is
taken as ``||dL/dw||`` over the least curvature seen, which is too much for all but the
flattest directions. What moved need not lie in the direction of what is left (rates may
differ, parts of ``w`` may stand still), so that `drift` is asked too, and the larger of
both counts.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..implicit_diff import (
    EMPTY_LINEAR_STATS,
    ImplicitResult,
    implicit_hypergradient,
    max_relative_error,
    merge_linear_stats,
    newton_steps,
)
from ..inner.base import inner_stats
from ..linear.base import LinearStats
from ..problem import Bilevel, EstimateData, batch_fraction
from ..trees import add_scale, all_finite, norm, scale, vdot
from .error_estimates import stationarity_error

MAX_ROUNDS = 8
GRADS_PER_CHECK = (
    10  # gradients that steps cost between two looks at the whole gradient
)
ROUNDING_ULPS = 10  # units in the last place that are no move
MAX_TOL_CHANGE = 10.0  # the most by which a goal moves from one round to the next


class AdaptiveState(eqx.Module):
    """Where a round ended, and what was seen and spent until then.

    Attributes:
      carry: the inner solver's, ``w`` first.
      at: implicit differentiation at ``w``.
      spent: the inner solver's counts, with looks at the gradient and those of Newton
        steps; ``num_outer_grads`` of one loss.
      seen: products, and the ends of the spectrum.
      goal: gradient norm at which the inner steps of the next round stop.
      first_goal: that with which the first round would just have sufficed.
      rtol: relative residual at which the next adjoint solve stops.
      inner_error, adjoint_error: of the hypergradient, relative, the largest of K.
      moved: whether the round changed ``w``.
      num_rounds: made.
    """

    carry: PyTree
    at: ImplicitResult
    spent: LinearStats
    seen: LinearStats
    goal: Array
    first_goal: Array
    rtol: Array
    inner_error: Array
    adjoint_error: Array
    moved: Array
    num_rounds: Array

    @property
    def error(self) -> Array:
        """Both errors together."""
        return self.inner_error + self.adjoint_error


class AdaptiveSolve(eqx.Module):
    """Rounds of inner steps, Newton steps and an adjoint solve, until ``rtol``.

    A solver that goes step by step is stopped early; another runs once, as it is.

    Attributes:
      implicit: the estimator `Implicit`; its linear solver's ``rtol`` is set anew.
      problem, data, alpha: of the estimate.
      rtol: of the hypergradient.
    """

    implicit: Any
    problem: Bilevel
    data: EstimateData
    alpha: PyTree
    rtol: Array

    def run(self, w: PyTree, adjoint: PyTree, goal: Array) -> AdaptiveState:
        """All rounds, from ``w``, the last ``adjoint`` and the ``first_goal`` of old.

        A NaN goal means what the gradient at ``w`` suggests.
        """

        def unfinished(found):
            met = found.error <= self.rtol
            can_solve = found.adjoint_error > found.inner_error
            can = found.moved | can_solve | self.can_step(found.spent)
            finite = all_finite(found.at.hypergradient)
            return (found.num_rounds < MAX_ROUNDS) & ~met & can & finite

        again = lambda found: self.round(found)  # jax hashes a bound method's arrays
        return jax.lax.while_loop(unfinished, again, self.first(w, adjoint, goal))

    def first(self, w: PyTree, adjoint: PyTree, goal: Array) -> AdaptiveState:
        """Before any round: at the goal, or short of it where only steps follow."""
        if is_iterative(self.implicit.solver):
            gradient = self.slope(w)
            goal = jnp.where(jnp.isnan(goal), self.root * norm(gradient), goal)
            short = goal if self.implicit.num_newton_steps else MAX_TOL_CHANGE * goal
            spent = inner_stats(0, num_grads=1)
            carry, _, spent = self.descend(self.begin(w), gradient, short, spent)
        else:
            w, spent = self.implicit.solver.solve(
                self.problem.inner_loss,
                w,
                self.alpha,
                self.data.inner_data,
                self.data.solver_key,
            )
            carry = w, ()
        at = self.differentiated(carry[0], adjoint, self.root / 10)
        far = jnp.asarray(jnp.inf)
        return AdaptiveState(
            carry=carry,
            at=at,
            spent=spent | {"num_outer_grads": jnp.asarray(1.0)},
            seen=merge_linear_stats(EMPTY_LINEAR_STATS, at.solved),
            goal=goal,
            first_goal=goal,
            rtol=self.rtol / 10,
            inner_error=far,
            adjoint_error=far,
            moved=jnp.asarray(True),
            num_rounds=jnp.asarray(0),
        )

    def round(self, found: AdaptiveState) -> AdaptiveState:
        """Inner steps to the goal, Newton steps, and the adjoint where they lead."""
        carry, gradient, spent = found.carry, found.at.gradient, found.spent
        # Negative curvature where w has been says nothing of where it goes.
        nothing = EMPTY_LINEAR_STATS | {"num_products": found.seen["num_products"]}
        seen = jax.tree.map(
            lambda new, old: jnp.where(found.seen["negative_curvature"], new, old),
            nothing,
            found.seen,
        )
        if is_iterative(self.implicit.solver):
            goal = found.goal
            if (
                not self.implicit.num_newton_steps
            ):  # a round of steps alone has to move w
                goal = jnp.minimum(goal, norm(gradient) / MAX_TOL_CHANGE)
            goal = jnp.maximum(goal, gradient_rounding_error(carry[0], seen))
            carry, gradient, spent = self.descend(carry, gradient, goal, spent)
        w, reached = carry[0], norm(gradient)
        if self.implicit.num_newton_steps:
            # A step squares a distance if its solve is as accurate as that is small.
            rtols = [self.root ** (2**i) for i in range(self.implicit.num_newton_steps)]
            loss = self.problem.inner_loss
            w, seen = newton_steps(
                loss, w, self.alpha, self.batch, gradient, rtols, seen
            )
            spent = add_counts(spent, num_grads=self.implicit.num_newton_steps)
            # With the momentum of before, the next steps would leave again.
            carry = self.begin(w) if is_iterative(self.implicit.solver) else (w, ())

        at = self.differentiated(w, found.at.adjoint, found.rtol)
        seen = merge_linear_stats(seen, at.solved)
        inner_error, adjoint_error, moved = self.errors(found, w, at, seen)
        # What a round leaves goes as this power of the distance that it begins at.
        power = 2**self.implicit.num_newton_steps
        nearer = (self.rtol / (2 * inner_error)) ** (1 / power)
        most = jnp.maximum(MAX_TOL_CHANGE * reached, found.goal)
        goal = jnp.clip(reached * nearer, reached / MAX_TOL_CHANGE, most)
        stricter = jnp.clip(self.rtol / (4 * adjoint_error), 1e-2, 1.0)
        return AdaptiveState(
            carry=carry,
            at=at,
            spent=add_counts(spent, num_outer_grads=2),
            seen=seen,
            goal=goal,
            first_goal=jnp.where(found.num_rounds == 0, goal, found.first_goal),
            rtol=found.rtol * stricter,
            inner_error=inner_error,
            adjoint_error=adjoint_error,
            moved=moved,
            num_rounds=found.num_rounds + 1,
        )

    def errors(
        self, before: AdaptiveState, w: PyTree, at: ImplicitResult, seen: LinearStats
    ) -> tuple[Array, Array, Array]:
        """What the distance to w* and the adjoint's residual bring; whether w moved."""
        dw = add_scale(w, -1, before.carry[0])
        dg = add_scale(at.gradient, -1, before.at.gradient)
        way = norm(dw)
        moved = way > ROUNDING_ULPS * jnp.finfo(way.dtype).eps * norm(w)
        curvature = jnp.fmin(jnp.nanmin(at.mean_curvature), seen["ritz_min"])
        curvature = jnp.where(
            moved, jnp.fmin(curvature, vdot(dw, dg) / way**2), curvature
        )
        rho = norm(at.gradient) / curvature / way
        change = max_relative_error(
            self.problem, before.at.hypergradient, at.hypergradient
        )
        by_change = jnp.where(rho < 1, change * rho / (1 - rho), jnp.inf)
        # With steps left, standing still says nothing: the next round has to move.
        by_change = jnp.where(
            moved, by_change, jnp.where(self.can_step(before.spent), jnp.inf, 0.0)
        )
        settled = norm(at.gradient) <= gradient_rounding_error(w, seen)
        by_change = jnp.where(settled, 0.0, by_change)
        by_drift = stationarity_error(
            self.problem,
            w,
            self.alpha,
            self.outer_batch,
            at.b,
            at.cross,
            at.hypergradient,
            scale(-1, at.gradient),
            curvature,
        )
        inner_error = jnp.where(
            curvature > 0, jnp.maximum(by_change, by_drift), jnp.inf
        )
        # Nothing of the inner problem matters to an outer loss that reads no w.
        inner_error = jnp.where(norm(at.b) == 0, 0.0, inner_error)

        def of_adjoint(residual, mean, cross, h):
            worth = residual * mean / curvature * norm(cross) / norm(h)
            return jnp.where((residual == 0) | (norm(cross) == 0), 0.0, worth)

        if self.problem.num_objectives is not None:
            of_adjoint = jax.vmap(of_adjoint)
        adjoint_error = of_adjoint(
            at.adjoint_residual, at.mean_curvature, at.cross, at.hypergradient
        )
        return inner_error, jnp.max(adjoint_error), moved

    def begin(self, w: PyTree) -> PyTree:
        """The solver's first carry."""
        init_key, _ = jax.random.split(self.data.solver_key)
        return self.implicit.solver.init(
            self.problem.inner_loss, w, self.alpha, self.data.inner_data, init_key
        )

    def can_step(self, spent: LinearStats) -> Array | bool:
        """Whether inner steps are left."""
        return (
            is_iterative(self.implicit.solver)
            and spent["num_steps"] < self.implicit.solver.num_steps
        )

    def descend(
        self, carry: PyTree, gradient: PyTree, goal: Array, spent: LinearStats
    ) -> tuple[PyTree, PyTree, LinearStats]:
        """Steps until a look at the whole gradient finds it at the goal.

        Until a Newton step intervenes, those of a whole run.
        """
        if self.implicit.solver.num_steps == 0:
            return carry, gradient, spent
        _, steps_key = jax.random.split(self.data.solver_key)
        num_steps, cost = (
            self.implicit.solver.num_steps,
            batch_fraction(self.data.inner_data),
        )
        keys = jax.random.split(steps_key, num_steps)
        stride = math.ceil(GRADS_PER_CHECK / cost)

        def unfinished(state):
            _, gradient, index, _ = state
            return (index < num_steps) & (norm(gradient) > goal)

        def some(state):
            carry, _, index, looks = state
            until = jnp.minimum(index + stride, num_steps)
            step = lambda i, carry: self.implicit.solver.step(
                self.problem.inner_loss,
                carry,
                self.alpha,
                self.data.inner_data,
                keys[i],
            )
            carry = jax.lax.fori_loop(index, until, step, carry)
            return carry, self.slope(carry[0]), until, looks + 1

        begun = spent["num_steps"].astype(int)
        first = carry, gradient, begun, jnp.asarray(0)
        carry, gradient, index, looks = jax.lax.while_loop(unfinished, some, first)
        num_grads = (index - begun) * cost + looks
        spent = add_counts(spent, num_steps=index - begun, num_grads=num_grads)
        return carry, gradient, spent

    def differentiated(self, w: PyTree, adjoint: PyTree, rtol: Array) -> ImplicitResult:
        """Implicit differentiation with the adjoint solved to ``rtol``."""
        linear_solver = eqx.tree_at(
            lambda s: s.rtol,
            self.implicit.linear_solver,
            rtol,
            is_leaf=lambda x: x is None,
        )
        return implicit_hypergradient(
            self.problem,
            linear_solver,
            w,
            self.alpha,
            self.batch,
            self.outer_batch,
            adjoint,
            self.implicit.damping,
        )

    def slope(self, w: PyTree) -> PyTree:
        """``dL/dw``."""
        return jax.grad(self.problem.inner_loss)(w, self.alpha, self.batch)

    @property
    def root(self) -> Array:
        """The distance from which one round leaves ``rtol``."""
        return self.rtol ** (1 / 2**self.implicit.num_newton_steps)

    @property
    def batch(self) -> PyTree:
        """All inner data."""
        return self.data.inner_batch()

    @property
    def outer_batch(self) -> PyTree:
        """Where the outer loss is taken."""
        return self.data.outer_batch(self.implicit.outer_batch_size)


def gradient_rounding_error(w: PyTree, seen: LinearStats) -> Array:
    """A gradient norm that is rounding: an error of ``w`` in the last places."""
    eps = jnp.finfo(norm(w).dtype).eps
    return jnp.nan_to_num(ROUNDING_ULPS * eps * seen["ritz_max"] * norm(w))


def is_iterative(solver: Any) -> bool:
    """Whether a solver can be stopped after any step."""
    return hasattr(solver, "step")


def add_counts(spent: LinearStats, **counts: Any) -> LinearStats:
    """The counts with others added."""
    return spent | {name: spent[name] + count for name, count in counts.items()}
