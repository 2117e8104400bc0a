"""Implicit differentiation: the implicit function theorem and a linear solve."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..adjoint import (
    NOTHING_SEEN,
    At,
    Curvature,
    damped_product,
    differentiate,
    newton_steps,
    together,
    usable,
    zero_adjoint,
)
from ..certificate import CORRECTIONS, NEWTON, TRUST, UNSEEN, certificate
from ..checks import check_problem, check_seen, check_solver, is_traced
from ..cost import ledger
from ..drawn import drawn
from ..guide import Guide
from ..inner.protocol import InnerSolver
from ..linear import CG
from ..linear.operator import check as check_linear_solver
from ..problem import Bilevel, held_fraction
from ..settings import check_steps, number, refuse_changing
from ..trees import all_finite, norm, scale
from .accuracy import Rounds, more, stepwise
from .protocol import Estimate, make_stats
from .trust import drift


class ImplicitState(eqx.Module):
    """The warm starts: ``w`` and the adjoint, like ``w`` (leaves lead with K).

    ``num_estimates`` so far; ``goal`` is the gradient norm at which the inner steps may
    stop, NaN where that is not known yet; ``prepared`` is what the linear solver goes
    on using, None where it begins anew.
    """

    w: PyTree
    adjoint: PyTree
    num_estimates: Array
    goal: Array
    prepared: PyTree = None


class Implicit(eqx.Module):
    """``dM/dalpha - Jᵀ v`` with ``(H + damping I) v = dM/dw`` at ``w ~ w*(alpha)``.

    ``H = d²L/dw²`` and ``J = d²L/dw dalpha`` are those of the inner loss on all inner
    data.

    Args:
      solver: the inner solver; it is never differentiated.
      linear_solver: any of lineax's, or `CG` (default), `Neumann`, `Nystrom`,
        `NystromCG`, `Identity`.
      damping: added to ``H`` in the solve. ``adjoint_residual`` is that of ``H``
        itself, so it shows the bias that damping brings.
      curvature: ``(w, alpha, batch, v) -> product`` that stands for ``H v`` in the
        solve, such as `Composition.gauss_newton`. The bias shows like damping's; as
        nothing is seen of the spectrum of ``H``, only ``certify`` can trust it.
      correct: Newton steps on ``w`` after the inner solve, each a solve by `CG`; one
        that does not make ``dL/dw`` smaller, or meets negative curvature, is not taken.
        On all data; keyed batches have one key an estimate, so the minimum for that.
      rel_err: work until the hypergradient's relative error is estimated to be at most
        this: a number, or an array ``[n]`` of them for the first n estimates, the last
        of which stays (HOAG's schedules). Inner steps, of which the solver's
        ``num_steps`` are then the most, and adjoint products are made until the
        estimate meets it, in at most eight rounds. ``error_estimate`` and ``trusted``
        tell whether it is met.
      certify: let a certificate judge each estimate (`hypergrad.certify`):
        ``error_estimate`` and ``trusted`` are its; it costs two solves for each of two
        corrections and a probe, counted.
      warm_start: begin each inner solve and each adjoint solve where the last ended.
      adjoint_batch_size: examples for ``H`` and ``J``, drawn once an estimate; None
        means all.
      outer_batch_size: examples for the outer gradient, likewise.

    Cost: the inner solve, two outer gradients, the linear solver's products and one
    more, which yields the cross term and the true residual together. With ``rel_err`` a
    look at the whole gradient for every ten that the steps cost, and in each round an
    adjoint solve from the last one and two outer gradients. Memory: the linear solver's
    vectors, flat in the number of inner steps.

    Target: argmin. Bias: first order in what the inner and the adjoint solve leave,
    both reported. What the optimizer or the start read of ``alpha`` is not seen: a leaf
    that neither loss reads is an error. ``trusted`` needs: all finite,
    ``adjoint_residual`` and ``inner_residual / (curvature ||w||)`` below 1e-2, no
    negative curvature, and a change of ``dM/dw`` over a step ``dL/dw / curvature`` that
    is worth less than 1e-2 of the hypergradient; the curvature is the smaller of
    ``ritz_min`` and ``||b|| / ||v||``. That is what the solve happened to see: warm
    solves of few steps and solvers other than `CG` may miss a flat or a negative
    direction. The noise that a batch size brings is not judged (`Average` does), and in
    bfloat16 the residual rarely gets below 1e-2. With ``rel_err``, ``trusted`` needs an
    ``error_estimate`` of at most that, all finite, and no negative curvature in the
    last round.

    Source: Pedregosa 2016 (arXiv 1602.02355), algorithm 1; Lorraine et al. 2020 (arXiv
    1911.02590), equation 2.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 100))
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3)
    9.0
    """

    solver: InnerSolver
    linear_solver: lx.AbstractLinearSolver
    damping: float | Array
    rel_err: float | Array | None
    correct: int = eqx.field(static=True)
    curvature: Curvature | None = eqx.field(static=True)
    certify: bool = eqx.field(static=True)
    warm_start: bool = eqx.field(static=True)
    adjoint_batch_size: int | None = eqx.field(static=True)
    outer_batch_size: int | None = eqx.field(static=True)

    target = "argmin"
    citations = ("pedregosa2016",)
    guide = (
        Guide(
            "Implicit(solver, lineax.LU())",
            gradients="T",
            hvps="d + 1",
            memory="d^2 numbers",
            bias="none if solved",
            sees=("losses",),
            use="a small w on which CG stalls; any solver of lineax may stand here",
            avoid="a large w",
            why="the matrix H is made, one product a column",
        ),
    )

    def __init__(
        self,
        solver: InnerSolver,
        linear_solver: lx.AbstractLinearSolver | None = None,
        damping: float | Array = 0.0,
        *,
        curvature: Curvature | None = None,
        correct: int = 0,
        rel_err: float | Array | None = None,
        certify: bool = False,
        warm_start: bool = True,
        adjoint_batch_size: int | None = None,
        outer_batch_size: int | None = None,
    ):
        self.solver = solver
        self.linear_solver = CG() if linear_solver is None else linear_solver
        check_linear_solver(self.linear_solver)
        check_steps("adjoint_batch_size", adjoint_batch_size, optional=True)
        check_steps("outer_batch_size", outer_batch_size, optional=True)
        self.damping = number("damping", optional=False)(damping)
        if not (curvature is None or callable(curvature)):
            raise TypeError(
                "curvature must be a function (w, alpha, batch, v) -> product, such as "
                f"Composition(...).gauss_newton; got {curvature!r}"
            )
        refuse_changing("curvature", curvature)
        self.curvature = curvature
        check_steps("correct", correct, least=0)
        self.correct = correct
        self.rel_err = number("rel_err")(rel_err)
        if rel_err is not None:
            self._check_pursuit(jnp.asarray(rel_err))
        if adjoint_batch_size is not None and (correct or rel_err is not None):
            raise ValueError(
                "adjoint_batch_size goes with neither correct nor rel_err: Newton's "
                "steps on a batch lead to the minimum of that batch; leave it out"
            )
        self.certify = certify
        self.warm_start = warm_start
        self.adjoint_batch_size = adjoint_batch_size
        self.outer_batch_size = outer_batch_size

    def _check_pursuit(self, rel_err: Array) -> None:
        """Refuses what could not be made more accurate."""
        check_solver(self.solver)
        if self.curvature is not None:
            raise ValueError(
                "curvature does not go with rel_err: the adjoint of another curvature "
                "does not become more accurate; leave one of them out"
            )
        if self._refresh > 1:
            raise ValueError(
                f"refresh={self._refresh} does not go with rel_err, whose rounds solve "
                "at several points; leave one of them out"
            )
        tells = getattr(self.linear_solver, "exact", False)
        if not (tells and hasattr(self.linear_solver, "rtol")):
            raise ValueError(
                "rel_err needs a linear solver with a tolerance that tells what it saw "
                "of the spectrum, hg.CG() or hg.NystromCG(rank); with "
                f"{type(self.linear_solver).__name__} leave rel_err out, use correct="
            )
        if not (stepwise(self.solver) or self.correct):
            raise ValueError(
                f"rel_err needs a solver that goes step by step, such as hg.Descent, "
                f"or correct=1; {type(self.solver).__name__} runs once"
            )
        if rel_err.ndim > 1 or rel_err.size == 0:
            raise ValueError(
                "rel_err must be a number or one number an estimate, [n]; got shape "
                f"{rel_err.shape}"
            )
        if not (is_traced(rel_err) or bool(jnp.all((rel_err > 0) & (rel_err < 1)))):
            raise ValueError(f"rel_err must lie between 0 and 1; got {rel_err}")

    @property
    def _refresh(self) -> int:
        """In how many estimates the linear solver's preparation serves."""
        return getattr(self.linear_solver, "refresh", 1)

    def error_factor(self, smallest: float, largest: float) -> float:
        """Relative error of the adjoint for a spectrum in [smallest, largest].

        The solver's on the damped spectrum, and what damping itself changes, at most
        ``damping / (smallest + damping)``; with ``rel_err`` that, at its largest.
        """
        if self.rel_err is not None:
            return float(jnp.max(jnp.asarray(self.rel_err)))
        damping = float(self.damping)
        factor = getattr(self.linear_solver, "error_factor", lambda *_: 0.0)
        solved = factor(smallest + damping, largest + damping)
        return solved + damping / (smallest + damping)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> ImplicitState:
        """Starts from ``w`` and a zero adjoint."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_seen(problem, w, alpha, None, UNSEEN)
        data = drawn(problem, jax.random.key(0))
        jax.eval_shape(lambda: data.inner_batch(self.adjoint_batch_size))
        jax.eval_shape(lambda: data.outer_batch(self.outer_batch_size))
        prepared = None
        if self._refresh > 1:
            prepare = lambda w: self._prepare(lambda v: v, w)
            prepared = optax.tree.zeros_like(jax.eval_shape(prepare, w))
        goal = jnp.asarray(jnp.nan, float)
        return ImplicitState(
            w, zero_adjoint(problem, w), jnp.asarray(0), goal, prepared
        )

    def estimate(
        self, problem: Bilevel, state: ImplicitState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ImplicitState]:
        """One inner solve, one adjoint solve, one cross term; or rounds of them."""
        data = drawn(problem, key)
        find = self._once if self.rel_err is None else self._until_accurate
        w, at, seen, spent, judged, goal, prepared = find(problem, state, alpha, data)
        trusted, error_estimate = judged
        part = held_fraction(data.inner_data, self.adjoint_batch_size)
        outer_part = held_fraction(data.outer_data, self.outer_batch_size)
        costs = ledger(
            data.inner_data,
            data.outer_data,
            num_grads=spent["num_grads"],
            num_hvps=spent["num_hvps"] + part * seen["num_products"],
            num_values=spent["num_values"],
            num_outer_grads=spent["num_outer_grads"] * outer_part * at.value.size,
        )
        if self.certify:
            found = certificate(
                problem,
                data,
                w,
                alpha,
                at.hypergradient,
                adjoint=at.adjoint,
                rel_err=TRUST if self.rel_err is None else self._due(state),
            )
            trusted, error_estimate = found.trusted, found.error_estimate
            costs = jax.tree.map(jnp.add, costs, found.stats)
        stats = make_stats(
            trusted,
            inner_residual=norm(at.gradient),
            inner_steps=spent["num_steps"],
            adjoint_residual=jnp.max(at.adjoint_residual),
            ritz_min=seen["ritz_min"],
            ritz_max=seen["ritz_max"],
            error_estimate=error_estimate,
            **costs,
        )
        estimate = Estimate(at.value, at.hypergradient, w, stats)
        # A start that depends on alpha begins each inner solve anew.
        warm = self.warm_start and problem.start is None
        state = ImplicitState(
            w if warm else state.w,
            at.adjoint if self.warm_start else state.adjoint,
            state.num_estimates + 1,
            goal,
            prepared,
        )
        return estimate, state

    def refine(
        self, problem: Bilevel, state: ImplicitState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ImplicitState]:
        """The estimate that left ``state``, made again with more work.

        On the same data, from where it ended if ``warm_start``: the inner solve, two
        Newton steps beside ``correct`` and an adjoint of ``H`` itself on all inner
        data, by `CG` to its tolerance; with ``rel_err`` its rounds, with a Newton step
        in each. Not sure to be trusted: where ``H`` is singular or indefinite nothing
        is. Cost: as any estimate's.
        """
        if self.rel_err is None:
            linear_solver, damping, correct = CG(), 0.0, self.correct + CORRECTIONS
        else:
            linear_solver, damping = self.linear_solver, self.damping
            correct = max(self.correct, 1)
        thorough = dataclasses.replace(
            self,
            linear_solver=linear_solver,
            damping=damping,
            curvature=None,
            correct=correct,
            adjoint_batch_size=None,
        )
        before = eqx.tree_at(lambda s: s.num_estimates, state, state.num_estimates - 1)
        estimate, then = thorough.estimate(problem, before, alpha, key)
        # CG uses nothing prepared; what is there serves the next estimate.
        return estimate, dataclasses.replace(then, prepared=state.prepared)

    def _once(self, problem, state, alpha, data):
        """The inner solver as it is, ``correct`` Newton steps, the adjoint."""
        loss, batch = problem.inner_loss, data.inner_batch(self.adjoint_batch_size)
        outer_batch = data.outer_batch(self.outer_batch_size)
        w, spent = self.solver.solve(
            loss, problem.initial(state.w, alpha), alpha, data.inner_data,
            data.solver_key,
        )  # fmt: skip
        seen = NOTHING_SEEN
        if self.correct:
            gradient = jax.grad(loss)(w, alpha, batch)
            rtols = [NEWTON] * self.correct
            w, seen = newton_steps(loss, w, alpha, batch, gradient, rtols, seen)
            spent = more(spent, num_grads=self.correct + 1)
        prepared, num_products = self._prepared(problem, state, w, alpha, batch)
        at = differentiate(
            problem,
            self.linear_solver,
            w,
            alpha,
            batch,
            outer_batch,
            usable(state.adjoint),
            self.damping,
            prepared,
            self.curvature,
        )
        trusted, num_outer_grads = jnp.asarray(False), 1
        if not (self.certify or self.curvature is not None):
            trusted = self._judge(problem, w, alpha, at, outer_batch)
            num_outer_grads = 2
        spent = spent | {"num_outer_grads": num_outer_grads}
        seen = together(seen, at.solved)
        seen["num_products"] += num_products
        return w, at, seen, spent, (trusted, jnp.nan), state.goal, prepared

    def _prepare(self, matvec, like):
        solver: Any = self.linear_solver  # one with a `refresh` has a `prepare`
        return solver.prepare(matvec, like)

    def _prepared(self, problem, state, w, alpha, batch):
        """What the linear solver goes on using, made anew if due, and its products."""
        if self._refresh == 1:
            return None, 0
        due = state.num_estimates % self._refresh == 0
        due |= ~all_finite(state.prepared)
        product = damped_product(problem, w, alpha, batch, self.damping, self.curvature)
        make = lambda: self._prepare(product, w)
        _, s = prepared = jax.lax.cond(due, make, lambda: state.prepared)
        return prepared, jnp.where(due, s.size, 0)

    def _due(self, state: ImplicitState) -> Array:
        """The ``rel_err`` of the next estimate."""
        rel_err = jnp.atleast_1d(jnp.asarray(self.rel_err, dtype=float))
        return rel_err[jnp.minimum(state.num_estimates, rel_err.size - 1)]

    def _until_accurate(self, problem, state, alpha, data):
        """Rounds of inner steps, Newton steps and an adjoint until ``rel_err``."""
        rel_err = self._due(state)
        rounds = Rounds(self, problem, data, alpha, rel_err)
        start = problem.initial(state.w, alpha)
        found = rounds.run(start, usable(state.adjoint), state.goal)
        at, seen = found.at, found.seen
        trusted = (
            all_finite(at.value, at.hypergradient, at.gradient)
            & (found.error <= rel_err)
            & ~seen["negative_curvature"]
        )
        judged = trusted, found.error
        w, goal = found.carry[0], found.first_goal
        return w, at, seen, found.spent, judged, goal, None

    def _judge(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, at: At, outer_batch: PyTree
    ) -> Array:
        """Whether what the solves saw speaks for the estimate."""
        off = drift(
            problem,
            w,
            alpha,
            outer_batch,
            at.b,
            at.cross,
            at.hypergradient,
            scale(-1, at.gradient),
            jnp.fmin(at.mean_curvature, at.solved["ritz_min"]),
        )
        return (
            all_finite(at.value, at.hypergradient, at.gradient, at.adjoint_residual)
            & jnp.all(at.adjoint_residual <= TRUST)
            & (off <= TRUST)
            & ~jnp.any(at.solved["negative_curvature"])
        )
