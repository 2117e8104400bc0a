"""Implicit differentiation: the implicit function theorem and a linear solve."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from ..certificate import (
    NEWTON_RTOL,
    NO_GRADIENT_ADVICE,
    NUM_NEWTON_STEPS,
    TRUST_RTOL,
    compute_certificate,
)
from ..cost import cost_stats
from ..implicit_diff import (
    EMPTY_LINEAR_STATS,
    HvpFn,
    ImplicitResult,
    damped_hvp_fn,
    finite_or_zero,
    implicit_hypergradient,
    merge_linear_stats,
    newton_steps,
    zero_adjoint,
)
from ..inner.base import InnerSolver
from ..linear import CG
from ..linear.base import check_linear_solver as check_linear_solver
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData, fixed_batch_fraction
from ..problem_checks import check_alpha_has_gradient, check_problem
from ..trees import all_finite, norm, scale
from ..validation import (
    check_hashable,
    check_positive_int,
    check_solver,
    float_converter,
    is_traced,
)
from .adaptive import AdaptiveSolve, add_counts, is_iterative
from .base import Estimate, make_stats
from .error_estimates import stationarity_error


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
      hvp_fn: ``(w, alpha, batch, v) -> product`` that stands for ``H v`` in the
        solve, such as `Composition.gauss_newton`. The bias shows like damping's; as
        nothing is seen of the spectrum of ``H``, only ``certify`` can trust it.
      num_newton_steps: Newton steps on ``w`` after the inner solve, each a solve by `CG`; one
        that does not make ``dL/dw`` smaller, or meets negative curvature, is not taken.
        On all data; keyed batches have one key an estimate, so the minimum for that.
      rtol: work until the hypergradient's relative error is estimated to be at most
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
    more, which yields the cross term and the true residual together. With ``rtol`` a
    look at the whole gradient for every ten that the steps cost, and in each round an
    adjoint solve from the last one and two outer gradients. Memory: the linear solver's
    vectors, flat in the number of inner steps.

    Target: argmin. Bias: first order in what the inner and the adjoint solve leave,
    both reported. What the optimizer or the start read of ``alpha`` is not seen: a leaf
    that neither loss reads is an error. ``trusted`` needs: all finite,
    ``adjoint_residual`` and ``inner_grad_norm / (curvature ||w||)`` below 1e-2, no
    negative curvature, and a change of ``dM/dw`` over a step ``dL/dw / curvature`` that
    is worth less than 1e-2 of the hypergradient; the curvature is the smaller of
    ``ritz_min`` and ``||b|| / ||v||``. That is what the solve happened to see: warm
    solves of few steps and solvers other than `CG` may miss a flat or a negative
    direction. The noise that a batch size brings is not judged (`Average` does), and in
    bfloat16 the residual rarely gets below 1e-2. With ``rtol``, ``trusted`` needs an
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
    rtol: float | Array | None
    num_newton_steps: int = eqx.field(static=True)
    hvp_fn: HvpFn | None = eqx.field(static=True)
    certify: bool = eqx.field(static=True)
    warm_start: bool = eqx.field(static=True)
    adjoint_batch_size: int | None = eqx.field(static=True)
    outer_batch_size: int | None = eqx.field(static=True)

    target = "argmin"
    citations = ("pedregosa2016",)
    summary = (
        MethodSummary(
            "Implicit(solver, lineax.LU())",
            num_grads="T",
            num_hvps="d + 1",
            memory="d^2 numbers",
            bias="none if solved",
            alpha_in=("losses",),
            recommended_for="a small w on which CG stalls; any solver of lineax may stand here",
            not_recommended_for="a large w",
            reason="the matrix H is made, one product a column",
        ),
    )

    def __init__(
        self,
        solver: InnerSolver,
        linear_solver: lx.AbstractLinearSolver | None = None,
        damping: float | Array = 0.0,
        *,
        hvp_fn: HvpFn | None = None,
        num_newton_steps: int = 0,
        rtol: float | Array | None = None,
        certify: bool = False,
        warm_start: bool = True,
        adjoint_batch_size: int | None = None,
        outer_batch_size: int | None = None,
    ):
        self.solver = solver
        self.linear_solver = CG() if linear_solver is None else linear_solver
        check_linear_solver(self.linear_solver)
        check_positive_int("adjoint_batch_size", adjoint_batch_size, optional=True)
        check_positive_int("outer_batch_size", outer_batch_size, optional=True)
        self.damping = float_converter("damping", optional=False)(damping)
        if not (hvp_fn is None or callable(hvp_fn)):
            raise TypeError(
                "hvp_fn must be a function (w, alpha, batch, v) -> product, such as "
                f"Composition(...).gauss_newton; got {hvp_fn!r}"
            )
        check_hashable("hvp_fn", hvp_fn)
        self.hvp_fn = hvp_fn
        check_positive_int("num_newton_steps", num_newton_steps, minimum=0)
        self.num_newton_steps = num_newton_steps
        self.rtol = float_converter("rtol")(rtol)
        if rtol is not None:
            self._check_pursuit(jnp.asarray(rtol))
        if adjoint_batch_size is not None and (num_newton_steps or rtol is not None):
            raise ValueError(
                "adjoint_batch_size goes with neither num_newton_steps nor rtol: Newton's "
                "steps on a batch lead to the minimum of that batch; leave it out"
            )
        self.certify = certify
        self.warm_start = warm_start
        self.adjoint_batch_size = adjoint_batch_size
        self.outer_batch_size = outer_batch_size

    def _check_pursuit(self, rtol: Array) -> None:
        """Refuses what could not be made more accurate."""
        check_solver(self.solver)
        if self.hvp_fn is not None:
            raise ValueError(
                "hvp_fn does not go with rtol: the adjoint of another hvp_fn "
                "does not become more accurate; leave one of them out"
            )
        if self._refresh > 1:
            raise ValueError(
                f"refresh_every={self._refresh} does not go with rtol, whose rounds solve "
                "at several points; leave one of them out"
            )
        tells = getattr(self.linear_solver, "exact", False)
        if not (tells and hasattr(self.linear_solver, "rtol")):
            raise ValueError(
                "rtol needs a linear solver with a tolerance that tells what it saw "
                "of the spectrum, hg.CG() or hg.NystromCG(rank); with "
                f"{type(self.linear_solver).__name__} leave rtol out, use num_newton_steps="
            )
        if not (is_iterative(self.solver) or self.num_newton_steps):
            raise ValueError(
                f"rtol needs a solver that goes step by step, such as hg.Descent, "
                f"or num_newton_steps=1; {type(self.solver).__name__} runs once"
            )
        if rtol.ndim > 1 or rtol.size == 0:
            raise ValueError(
                "rtol must be a number or one number an estimate, [n]; got shape "
                f"{rtol.shape}"
            )
        if not (is_traced(rtol) or bool(jnp.all((rtol > 0) & (rtol < 1)))):
            raise ValueError(f"rtol must lie between 0 and 1; got {rtol}")

    @property
    def _refresh(self) -> int:
        """In how many estimates the linear solver's preparation serves."""
        return getattr(self.linear_solver, "refresh_every", 1)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Relative error of the adjoint for a spectrum in [eig_min, eig_max].

        The solver's on the damped spectrum, and what damping itself changes, at most
        ``damping / (eig_min + damping)``; with ``rtol`` that, at its eig_max.
        """
        if self.rtol is not None:
            return float(jnp.max(jnp.asarray(self.rtol)))
        damping = float(self.damping)
        factor = getattr(self.linear_solver, "error_bound", lambda *_: 0.0)
        solved = factor(eig_min + damping, eig_max + damping)
        return solved + damping / (eig_min + damping)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> ImplicitState:
        """Starts from ``w`` and a zero adjoint."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
        data = EstimateData.sample(problem, jax.random.key(0))
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
        data = EstimateData.sample(problem, key)
        find = self._once if self.rtol is None else self._until_accurate
        w, at, seen, spent, judged, goal, prepared = find(problem, state, alpha, data)
        trusted, error_estimate = judged
        part = fixed_batch_fraction(data.inner_data, self.adjoint_batch_size)
        outer_part = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=spent["num_grads"],
            num_hvps=spent["num_hvps"] + part * seen["num_products"],
            num_values=spent["num_values"],
            num_outer_grads=spent["num_outer_grads"] * outer_part * at.value.size,
        )
        if self.certify:
            found = compute_certificate(
                problem,
                data,
                w,
                alpha,
                at.hypergradient,
                adjoint=at.adjoint,
                rtol=TRUST_RTOL if self.rtol is None else self._due(state),
            )
            trusted, error_estimate = found.trusted, found.error_estimate
            costs = jax.tree.map(jnp.add, costs, found.stats)
        stats = make_stats(
            trusted,
            inner_grad_norm=norm(at.gradient),
            num_inner_steps=spent["num_steps"],
            adjoint_residual=jnp.max(at.adjoint_residual),
            ritz_min=seen["ritz_min"],
            ritz_max=seen["ritz_max"],
            error_estimate=error_estimate,
            **costs,
        )
        estimate = Estimate(at.value, at.hypergradient, w, stats)
        # A start that depends on alpha begins each inner solve anew.
        warm = self.warm_start and problem.init_fn is None
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
        Newton steps beside ``num_newton_steps`` and an adjoint of ``H`` itself on all inner
        data, by `CG` to its tolerance; with ``rtol`` its rounds, with a Newton step
        in each. Not sure to be trusted: where ``H`` is singular or indefinite nothing
        is. Cost: as any estimate's.
        """
        if self.rtol is None:
            linear_solver, damping, num_newton_steps = (
                CG(),
                0.0,
                self.num_newton_steps + NUM_NEWTON_STEPS,
            )
        else:
            linear_solver, damping = self.linear_solver, self.damping
            num_newton_steps = max(self.num_newton_steps, 1)
        thorough = dataclasses.replace(
            self,
            linear_solver=linear_solver,
            damping=damping,
            hvp_fn=None,
            num_newton_steps=num_newton_steps,
            adjoint_batch_size=None,
        )
        before = eqx.tree_at(lambda s: s.num_estimates, state, state.num_estimates - 1)
        estimate, then = thorough.estimate(problem, before, alpha, key)
        # CG uses nothing prepared; what is there serves the next estimate.
        return estimate, dataclasses.replace(then, prepared=state.prepared)

    def _once(self, problem, state, alpha, data):
        """The inner solver as it is, ``num_newton_steps`` Newton steps, the adjoint."""
        loss, batch = problem.inner_loss, data.inner_batch(self.adjoint_batch_size)
        outer_batch = data.outer_batch(self.outer_batch_size)
        w, spent = self.solver.solve(
            loss, problem.init_inner(state.w, alpha), alpha, data.inner_data,
            data.solver_key,
        )  # fmt: skip
        seen = EMPTY_LINEAR_STATS
        if self.num_newton_steps:
            gradient = jax.grad(loss)(w, alpha, batch)
            rtols = [NEWTON_RTOL] * self.num_newton_steps
            w, seen = newton_steps(loss, w, alpha, batch, gradient, rtols, seen)
            spent = add_counts(spent, num_grads=self.num_newton_steps + 1)
        prepared, num_products = self._prepared(problem, state, w, alpha, batch)
        at = implicit_hypergradient(
            problem,
            self.linear_solver,
            w,
            alpha,
            batch,
            outer_batch,
            finite_or_zero(state.adjoint),
            self.damping,
            prepared,
            self.hvp_fn,
        )
        trusted, num_outer_grads = jnp.asarray(False), 1
        if not (self.certify or self.hvp_fn is not None):
            trusted = self._judge(problem, w, alpha, at, outer_batch)
            num_outer_grads = 2
        spent = spent | {"num_outer_grads": num_outer_grads}
        seen = merge_linear_stats(seen, at.solved)
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
        product = damped_hvp_fn(problem, w, alpha, batch, self.damping, self.hvp_fn)
        make = lambda: self._prepare(product, w)
        _, s = prepared = jax.lax.cond(due, make, lambda: state.prepared)
        return prepared, jnp.where(due, s.size, 0)

    def _due(self, state: ImplicitState) -> Array:
        """The ``rtol`` of the next estimate."""
        rtol = jnp.atleast_1d(jnp.asarray(self.rtol, dtype=float))
        return rtol[jnp.minimum(state.num_estimates, rtol.size - 1)]

    def _until_accurate(self, problem, state, alpha, data):
        """Rounds of inner steps, Newton steps and an adjoint until ``rtol``."""
        rtol = self._due(state)
        rounds = AdaptiveSolve(self, problem, data, alpha, rtol)
        start = problem.init_inner(state.w, alpha)
        found = rounds.run(start, finite_or_zero(state.adjoint), state.goal)
        at, seen = found.at, found.seen
        trusted = (
            all_finite(at.value, at.hypergradient, at.gradient)
            & (found.error <= rtol)
            & ~seen["negative_curvature"]
        )
        judged = trusted, found.error
        w, goal = found.carry[0], found.first_goal
        return w, at, seen, found.spent, judged, goal, None

    def _judge(
        self,
        problem: Bilevel,
        w: PyTree,
        alpha: PyTree,
        at: ImplicitResult,
        outer_batch: PyTree,
    ) -> Array:
        """Whether what the solves saw speaks for the estimate."""
        off = stationarity_error(
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
            & jnp.all(at.adjoint_residual <= TRUST_RTOL)
            & (off <= TRUST_RTOL)
            & ~jnp.any(at.solved["negative_curvature"])
        )
