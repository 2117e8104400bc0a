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

from ..adjoint import (
    NOTHING_SEEN,
    At,
    differentiate,
    error_between,
    newton_steps,
    together,
)
from ..drawn import Drawn
from ..inner.protocol import inner_stats
from ..linear.operator import Stats
from ..problem import Bilevel, fraction
from ..trees import add_scaled, all_finite, dot, norm, scale
from .trust import drift

ROUNDS = 8
LOOK = 10  # gradients that steps cost between two looks at the whole gradient
ROUNDING = 10  # units in the last place that are no move
STRIDE = 10.0  # the most by which a goal moves from one round to the next


class Found(eqx.Module):
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
    at: At
    spent: Stats
    seen: Stats
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


class Rounds(eqx.Module):
    """Rounds of inner steps, Newton steps and an adjoint solve, until ``rel_err``.

    A solver that goes step by step is stopped early; another runs once, as it is.

    Attributes:
      implicit: the estimator `Implicit`; its linear solver's ``rtol`` is set anew.
      problem, data, alpha: of the estimate.
      rel_err: of the hypergradient.
    """

    implicit: Any
    problem: Bilevel
    data: Drawn
    alpha: PyTree
    rel_err: Array

    def run(self, w: PyTree, adjoint: PyTree, goal: Array) -> Found:
        """All rounds, from ``w``, the last ``adjoint`` and the ``first_goal`` of old.

        A NaN goal means what the gradient at ``w`` suggests.
        """

        def unfinished(found):
            met = found.error <= self.rel_err
            can_solve = found.adjoint_error > found.inner_error
            can = found.moved | can_solve | self.can_step(found.spent)
            finite = all_finite(found.at.hypergradient)
            return (found.num_rounds < ROUNDS) & ~met & can & finite

        again = lambda found: self.round(found)  # jax hashes a bound method's arrays
        return jax.lax.while_loop(unfinished, again, self.first(w, adjoint, goal))

    def first(self, w: PyTree, adjoint: PyTree, goal: Array) -> Found:
        """Before any round: at the goal, or short of it where only steps follow."""
        if stepwise(self.implicit.solver):
            gradient = self.slope(w)
            goal = jnp.where(jnp.isnan(goal), self.root * norm(gradient), goal)
            short = goal if self.implicit.correct else STRIDE * goal
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
        return Found(
            carry=carry,
            at=at,
            spent=spent | {"num_outer_grads": jnp.asarray(1.0)},
            seen=together(NOTHING_SEEN, at.solved),
            goal=goal,
            first_goal=goal,
            rtol=self.rel_err / 10,
            inner_error=far,
            adjoint_error=far,
            moved=jnp.asarray(True),
            num_rounds=jnp.asarray(0),
        )

    def round(self, found: Found) -> Found:
        """Inner steps to the goal, Newton steps, and the adjoint where they lead."""
        carry, gradient, spent = found.carry, found.at.gradient, found.spent
        # Negative curvature where w has been says nothing of where it goes.
        nothing = NOTHING_SEEN | {"num_products": found.seen["num_products"]}
        seen = jax.tree.map(
            lambda new, old: jnp.where(found.seen["negative_curvature"], new, old),
            nothing,
            found.seen,
        )
        if stepwise(self.implicit.solver):
            goal = found.goal
            if not self.implicit.correct:  # a round of steps alone has to move w
                goal = jnp.minimum(goal, norm(gradient) / STRIDE)
            goal = jnp.maximum(goal, noise(carry[0], seen))
            carry, gradient, spent = self.descend(carry, gradient, goal, spent)
        w, reached = carry[0], norm(gradient)
        if self.implicit.correct:
            # A step squares a distance if its solve is as accurate as that is small.
            rtols = [self.root ** (2**i) for i in range(self.implicit.correct)]
            loss = self.problem.inner_loss
            w, seen = newton_steps(
                loss, w, self.alpha, self.batch, gradient, rtols, seen
            )
            spent = more(spent, num_grads=self.implicit.correct)
            # With the momentum of before, the next steps would leave again.
            carry = self.begin(w) if stepwise(self.implicit.solver) else (w, ())

        at = self.differentiated(w, found.at.adjoint, found.rtol)
        seen = together(seen, at.solved)
        inner_error, adjoint_error, moved = self.errors(found, w, at, seen)
        # What a round leaves goes as this power of the distance that it begins at.
        power = 2**self.implicit.correct
        nearer = (self.rel_err / (2 * inner_error)) ** (1 / power)
        most = jnp.maximum(STRIDE * reached, found.goal)
        goal = jnp.clip(reached * nearer, reached / STRIDE, most)
        stricter = jnp.clip(self.rel_err / (4 * adjoint_error), 1e-2, 1.0)
        return Found(
            carry=carry,
            at=at,
            spent=more(spent, num_outer_grads=2),
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
        self, before: Found, w: PyTree, at: At, seen: Stats
    ) -> tuple[Array, Array, Array]:
        """What the distance to w* and the adjoint's residual bring; whether w moved."""
        dw = add_scaled(w, -1, before.carry[0])
        dg = add_scaled(at.gradient, -1, before.at.gradient)
        way = norm(dw)
        moved = way > ROUNDING * jnp.finfo(way.dtype).eps * norm(w)
        curvature = jnp.fmin(jnp.nanmin(at.mean_curvature), seen["ritz_min"])
        curvature = jnp.where(
            moved, jnp.fmin(curvature, dot(dw, dg) / way**2), curvature
        )
        rho = norm(at.gradient) / curvature / way
        change = error_between(self.problem, before.at.hypergradient, at.hypergradient)
        by_change = jnp.where(rho < 1, change * rho / (1 - rho), jnp.inf)
        # With steps left, standing still says nothing: the next round has to move.
        by_change = jnp.where(
            moved, by_change, jnp.where(self.can_step(before.spent), jnp.inf, 0.0)
        )
        settled = norm(at.gradient) <= noise(w, seen)
        by_change = jnp.where(settled, 0.0, by_change)
        by_drift = drift(
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

    def can_step(self, spent: Stats) -> Array | bool:
        """Whether inner steps are left."""
        return (
            stepwise(self.implicit.solver)
            and spent["num_steps"] < self.implicit.solver.num_steps
        )

    def descend(
        self, carry: PyTree, gradient: PyTree, goal: Array, spent: Stats
    ) -> tuple[PyTree, PyTree, Stats]:
        """Steps until a look at the whole gradient finds it at the goal.

        Until a Newton step intervenes, those of a whole run.
        """
        if self.implicit.solver.num_steps == 0:
            return carry, gradient, spent
        _, steps_key = jax.random.split(self.data.solver_key)
        num_steps, cost = self.implicit.solver.num_steps, fraction(self.data.inner_data)
        keys = jax.random.split(steps_key, num_steps)
        stride = math.ceil(LOOK / cost)

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
        spent = more(spent, num_steps=index - begun, num_grads=num_grads)
        return carry, gradient, spent

    def differentiated(self, w: PyTree, adjoint: PyTree, rtol: Array) -> At:
        """Implicit differentiation with the adjoint solved to ``rtol``."""
        linear_solver = eqx.tree_at(
            lambda s: s.rtol,
            self.implicit.linear_solver,
            rtol,
            is_leaf=lambda x: x is None,
        )
        return differentiate(
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
        """The distance from which one round leaves ``rel_err``."""
        return self.rel_err ** (1 / 2**self.implicit.correct)

    @property
    def batch(self) -> PyTree:
        """All inner data."""
        return self.data.inner_batch()

    @property
    def outer_batch(self) -> PyTree:
        """Where the outer loss is taken."""
        return self.data.outer_batch(self.implicit.outer_batch_size)


def noise(w: PyTree, seen: Stats) -> Array:
    """A gradient norm that is rounding: an error of ``w`` in the last places."""
    eps = jnp.finfo(norm(w).dtype).eps
    return jnp.nan_to_num(ROUNDING * eps * seen["ritz_max"] * norm(w))


def stepwise(solver: Any) -> bool:
    """Whether a solver can be stopped after any step."""
    return hasattr(solver, "step")


def more(spent: Stats, **counts: Any) -> Stats:
    """The counts with others added."""
    return spent | {name: spent[name] + count for name, count in counts.items()}
