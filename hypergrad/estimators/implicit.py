"""Implicit differentiation: the implicit function theorem and a linear solve."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree, Scalar

from ..batches import fixed_batch_fraction
from ..certificate import (
    NO_GRADIENT_ADVICE,
    NUM_NEWTON_STEPS,
    TRUST_RTOL,
    compute_certificate,
)
from ..checks.lost_derivatives import lost_derivative_flags
from ..checks.problem import check_alpha_has_gradient, check_problem
from ..cost import cost_stats
from ..implicit.differentiation import HvpFn, zero_adjoint
from ..implicit.error import zero_duals
from ..inner.base import InnerSolver
from ..linear import CG
from ..linear.base import check_linear_solver
from ..method_summary import MethodSummary
from ..number_checks import boolean, check_positive_int, float_converter, non_negative
from ..problem import Bilevel, EstimateData
from ..trees import safe_norm
from ..validation import check_hashable, check_solver, is_traced
from .adaptive import is_iterative
from .base import Estimate, make_estimate
from .implicit_adjoint import uses_scaled_cg
from .implicit_solve import (
    Solution,
    has_error_estimate,
    needs_scaling,
    refresh_interval,
    result_flags,
    solve_adaptively,
    solve_once,
)


class ImplicitState(eqx.Module):
    """Warm-start state of `Implicit`.

    Attributes:
      w: Inner solution of the previous estimate.
      adjoint: Previous adjoint, structured like ``w``; with K outer losses each leaf
        has a leading axis of size K.
      num_estimates: Number of estimates made so far.
      grad_tol: ``||S dL/dw||`` at which the inner steps may stop; NaN before the first
        estimate, and always without ``rtol``.
      duals: ``H^-1 J u`` for two random directions ``u`` of ``alpha``, by which the
        error of the previous estimate was measured; structured like ``adjoint`` with a
        further axis of size 2. None if the linear solver yields none.
      s: Diagonal scaling ``S`` of the previous ``H``, structured like ``w``; zeros
        before the first estimate. None if no scaling is needed.
      prepared: Data that the linear solver reuses, such as a Nyström sketch, or None.
    """

    w: PyTree
    adjoint: PyTree
    num_estimates: Scalar
    grad_tol: Scalar
    duals: PyTree = None
    s: PyTree = None
    prepared: PyTree = None


class Implicit(eqx.Module):
    """Implicit differentiation at the inner solution.

    At ``w ~ w*(alpha)``, with ``H = d2L/dw2`` and ``J = d2L/dw dalpha`` of the inner
    loss on all inner data, the estimate is

        dM/dalpha - J' v    with    (H + damping I) v = dM/dw.

    Args:
      solver: The inner solver. It is never differentiated.
      linear_solver: Solver of the adjoint system: `CG`, `MINRES`, `Neumann`, `Nystrom`,
        `NystromCG`, `Identity`, or any solver of lineax. Defaults to `CG`, for which
        the units of ``w`` do not matter.
      damping: Number added to the diagonal of ``H`` in the solve. ``adjoint_residual``
        is computed with ``H`` itself, so that it shows the bias of damping. Defaults to
        None, which adds nothing.
      hvp_fn: ``(w, alpha, batch, v) -> product``, which replaces ``H v`` in the solve,
        such as `CompositeLoss.gauss_newton`. Its bias shows in ``adjoint_residual``. As
        the spectrum of ``H`` remains unknown, only ``certify`` can trust the estimate.
      num_newton_steps: Number of Newton-CG steps applied to ``w`` after the inner
        solve, on all inner data. A step that does not decrease ``||S dL/dw||``, or for
        which CG detects negative curvature, is rejected. Batches with a key have one
        key per estimate, so that the steps lead to the minimum for this key.
      rtol: Relative tolerance of the hypergradient. Inner steps (``num_steps`` of the
        solver is then their maximum), Newton steps and adjoint products are made until
        all four estimates of *Trust* are below it, in at most eight rounds. An array of
        shape ``[n]`` sets the tolerance of the first n estimates; the last entry
        applies to all later ones (as in HOAG). Defaults to None: every solve runs once.
      certify: Whether `hypergrad.certify` judges each estimate: ``error_estimate`` and
        ``trusted`` are those of the certificate, whose cost is counted.
      estimate_error: Whether the error of each estimate is estimated. Without it, or
        ``certify``, no estimate is trusted, and its products are saved.
      warm_start: Whether the inner solve and the adjoint solve start where those of the
        previous estimate ended.
      adjoint_batch_size: Number of examples for ``H`` and ``J``, sampled once per
        estimate. Defaults to None, which means all.
      outer_batch_size: Number of examples for the outer loss, sampled once per
        estimate. Defaults to None, which means all.

    Raises:
      TypeError, ValueError: An argument is invalid, or does not go with another.

    Cost:
      The inner solve, two outer gradients, and the products of the linear solver and
      one more, which yields the cross term and the true residual. The diagonal scaling
      takes eight products for the first estimate and two for each later one, or one per
      parameter in every estimate if there are at most eight. The error estimate takes
      five products and the second outer gradient, nine more where a Newton step does
      not change ``dL/dw`` as the Hessian predicts, and a warm start from the previous
      adjoint and duals four products. With a linear solver other than `CG` with its
      diagonal preconditioner, or with damping, the error estimate takes up to 25
      products more. Where its part (2) is between 1e-4 and 1e-2 and decides, it is
      confirmed by two solves to 1e-3 and a third outer gradient. `MINRES` without an
      error estimate, and `CG` or `MINRES` with ``damping`` or ``hvp_fn``, find a
      scaling of their own in each estimate, by eight products. With ``rtol``: up to two
      full gradients and one for every ten of inner steps, and an adjoint solve with its
      error per round. With ``certify``: two Newton and adjoint solves, and a probe.
      Of several outer losses those without ``w``, as a number of FLOPs, take none.
    Memory:
      25 to 30 vectors like ``w`` by default, whatever the number of inner steps.
    Bias:
      First order in the errors of the inner and of the adjoint solve, which are both
      reported. The optimizer and the starting point of the inner solver are not
      differentiated: a leaf of ``alpha`` on which neither loss depends is an error.

    Trust:
      ``trusted`` requires that everything is finite, that no solve met negative
      curvature which does not vanish near the argmin, that the condition number of the
      scaled Hessian is far below the reciprocal of the rounding error, that no
      derivative is lost (as by `jax.lax.stop_gradient`), and that four numbers are at
      most 1e-2, or at most ``rtol`` if it is given: (1) the relative error of the
      hypergradient by a Newton correction of ``w`` and of the adjoint, estimated along
      two random directions of ``alpha``, times three if ``alpha`` has more numbers; (2)
      the change of the hypergradient and of the adjoint's residual over this
      correction, infinite if ``dL/dw`` changes by more than itself otherwise than the
      Hessian predicts; (3) the change of ``J' v`` in the last two steps of the solve,
      times the number of such pairs that may follow; (4) the residual of the adjoint in
      scaled coordinates. Both solutions of (1) are approximate. Where all numbers are
      within the tolerance, but (2) is above a hundredth of it, a Newton step with
      solves of its own therefore takes the place of (1) and (2).
      ``error_estimate`` is the larger one of the error of (1) and (3). None of them
      depends on the units of ``w`` or of a loss, as far as the probed scaling does not.
      They do not see errors along directions that neither ``dM/dw`` nor ``dL/dw``
      contains, another minimum, or the noise of a batch size (see `Average`). In
      bfloat16 the residual rarely falls below 1e-2.

    Target: argmin.

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
    linear_solver: lx.AbstractLinearSolver = eqx.field(default_factory=CG)
    damping: float | Array | None = eqx.field(
        default=None, converter=non_negative("damping", optional=True)
    )
    hvp_fn: HvpFn | None = eqx.field(static=True, default=None, kw_only=True)
    num_newton_steps: int = eqx.field(static=True, default=0, kw_only=True)
    rtol: float | Array | None = eqx.field(
        default=None, converter=float_converter("rtol"), kw_only=True
    )
    certify: bool = eqx.field(
        static=True, default=False, kw_only=True, converter=boolean("certify")
    )
    estimate_error: bool = eqx.field(
        static=True, default=True, kw_only=True, converter=boolean("estimate_error")
    )
    warm_start: bool = eqx.field(
        static=True, default=True, kw_only=True, converter=boolean("warm_start")
    )
    adjoint_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

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
            recommended_for="a small w on which CG stalls; any other solver of lineax",
            not_recommended_for="a large w",
            reason="H is formed as a matrix, with one product per column",
        ),
    )

    def __check_init__(self):
        check_solver(self.solver)
        check_linear_solver(self.linear_solver)
        check_positive_int("adjoint_batch_size", self.adjoint_batch_size, optional=True)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)
        check_positive_int("num_newton_steps", self.num_newton_steps, minimum=0)
        if not (self.hvp_fn is None or callable(self.hvp_fn)):
            raise TypeError(
                "hvp_fn must be a function (w, alpha, batch, v) -> product, such as "
                f"hg.CompositeLoss(...).gauss_newton; got {self.hvp_fn!r}."
            )
        check_hashable("hvp_fn", self.hvp_fn)
        if self.rtol is not None:
            self._check_adaptive(jnp.asarray(self.rtol))
            if not self.estimate_error:
                raise ValueError(
                    "estimate_error must be True with rtol, which is a tolerance of "
                    "the estimated error; got False."
                )
        if self.adjoint_batch_size is not None and (
            self.num_newton_steps or self.rtol is not None
        ):
            raise ValueError(
                "adjoint_batch_size must be None with num_newton_steps or rtol, "
                "because Newton steps on a batch lead to the minimum of this batch; "
                f"got {self.adjoint_batch_size}."
            )

    def _check_adaptive(self, rtol: Array) -> None:
        """Raises an error unless the solves can be repeated until ``rtol`` is met."""
        linear_name = type(self.linear_solver).__name__
        if self.hvp_fn is not None:
            raise ValueError(
                "hvp_fn must be None with rtol, because more work does not make the "
                f"adjoint of another operator more accurate; got {self.hvp_fn!r}."
            )
        if self.damping is not None:
            raise ValueError(
                "damping must be None with rtol, because more work does not remove the "
                f"change by damping; got {self.damping!r}."
            )
        if (refresh_every := refresh_interval(self.linear_solver)) > 1:
            raise ValueError(
                "refresh_every must be 1 with rtol, which solves at several points per "
                f"estimate; got {refresh_every}."
            )
        reports_spectrum = getattr(self.linear_solver, "exact", False)
        if not (reports_spectrum and hasattr(self.linear_solver, "rtol")):
            raise ValueError(
                "linear_solver must have a tolerance and report the spectrum if rtol "
                f"is given, as hg.CG() and hg.NystromCG(rank) do; got {linear_name}. "
                "Use num_newton_steps instead of rtol."
            )
        if not (is_iterative(self.solver) or self.num_newton_steps):
            raise ValueError(
                "num_newton_steps must be at least 1 if rtol is given and solver does "
                "not consist of steps, as hg.Descent does; got 0 with "
                f"{type(self.solver).__name__}."
            )
        if rtol.ndim > 1 or rtol.size == 0:
            raise ValueError(
                "rtol must be a number, or an array [n] with one number per estimate; "
                f"got shape {rtol.shape}."
            )
        if not (is_traced(rtol) or bool(jnp.all((rtol > 0) & (rtol < 1)))):
            raise ValueError(f"rtol must lie between 0 and 1; got {rtol}.")

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns a bound on the relative error of the adjoint.

        The bound is the sum of the linear solver's on the damped spectrum and of the
        change by damping, at most ``damping / (eig_min + damping)``. With ``rtol`` it
        is the largest tolerance.
        """
        if self.rtol is not None:
            return float(jnp.max(jnp.asarray(self.rtol)))
        damping = 0.0 if self.damping is None else float(self.damping)
        solver_bound = getattr(self.linear_solver, "error_bound", lambda *_: 0.0)
        solver_error = solver_bound(eig_min + damping, eig_max + damping)
        return solver_error + damping / (eig_min + damping)

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> ImplicitState:
        """Returns the state of a first estimate from ``w`` and a zero adjoint."""
        del key
        check_problem(problem, w, alpha, self.solver)
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)
        # Raises an error for a batch size that the data does not admit.
        data = EstimateData.sample(problem, jax.random.key(0))
        jax.eval_shape(lambda: data.inner_batch(self.adjoint_batch_size))
        jax.eval_shape(lambda: data.outer_batch(self.outer_batch_size))
        prepared = None
        if refresh_interval(self.linear_solver) > 1:
            linear_solver: Any = self.linear_solver
            prepare = lambda w: linear_solver.prepare(lambda v: v, w)[0]
            prepared = optax.tree.zeros_like(jax.eval_shape(prepare, w))
        return ImplicitState(
            w,
            zero_adjoint(problem, w),
            num_estimates=jnp.zeros((), int),
            grad_tol=jnp.asarray(jnp.nan, float),
            duals=self._zero_duals(problem, w),
            s=optax.tree.zeros_like(w) if needs_scaling(self) else None,
            prepared=prepared,
        )

    def estimate(
        self, problem: Bilevel, state: ImplicitState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ImplicitState]:
        """Solves the inner problem and the adjoint system, once or to ``rtol``."""
        data = EstimateData.sample(problem, key)
        if self.rtol is None:
            rtol = TRUST_RTOL
            solution = solve_once(self, problem, state, alpha, data)
        else:
            rtol = self._current_rtol(state)
            solution = solve_adaptively(self, problem, state, alpha, data, rtol)
        w, result = solution.w, solution.adjoint_solution.result
        error_estimate: Any = jnp.nan
        costs = self._costs(data, solution)
        if self.certify:
            certificate = compute_certificate(
                problem,
                data,
                w,
                alpha,
                result.hypergradient,
                adjoint=result.adjoint,
                init_s=solution.s,
                rtol=rtol,
            )
            flags = {"certificate": ~certificate.trusted}
            error_estimate = certificate.error_estimate
            costs = jax.tree.map(jnp.add, costs, certificate.stats)
        elif self.hvp_fn is not None:
            flags = {"other_curvature": True}
        elif not self.estimate_error:
            flags = {"no_error_estimate": True}
        else:
            flags = result_flags(solution, rtol)
            error_estimate = solution.adjoint_solution.error.error_estimate
        flags |= lost_derivative_flags(problem, w, alpha)
        estimate = make_estimate(
            result.value,
            result.hypergradient,
            w,
            flags,
            inner_grad_norm=safe_norm(result.inner_grad),
            num_inner_steps=solution.counts["num_steps"],
            adjoint_residual=jnp.max(result.adjoint_residual),
            ritz_min=solution.linear_stats["ritz_min"],
            ritz_max=solution.linear_stats["ritz_max"],
            error_estimate=error_estimate,
            **costs,
        )
        # A starting point that depends on alpha is computed for each estimate.
        is_w_warm = self.warm_start and problem.init_fn is None
        next_state = ImplicitState(
            w if is_w_warm else state.w,
            result.adjoint if self.warm_start else state.adjoint,
            state.num_estimates + 1,
            solution.grad_tol,
            solution.adjoint_solution.duals if self.warm_start else state.duals,
            solution.s if self.warm_start else state.s,
            solution.prepared,
        )
        return estimate, next_state

    def refine(
        self, problem: Bilevel, state: ImplicitState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, ImplicitState]:
        """Repeats an estimate with more work and on the same data.

        ``state`` is the one that the estimate returned. The solves start where they
        ended if ``warm_start``. Two Newton steps are added to ``num_newton_steps``, and
        the adjoint of ``H`` itself on all inner data is solved by `CG` to its default
        tolerance. With ``rtol`` every round makes at least one Newton step. The result
        need not be trusted: nothing helps if ``H`` is singular or indefinite.

        Cost: that of an estimate with these settings.
        """
        if self.rtol is None:
            thorough = dataclasses.replace(
                self,
                linear_solver=CG(),
                damping=None,
                hvp_fn=None,
                num_newton_steps=self.num_newton_steps + NUM_NEWTON_STEPS,
                adjoint_batch_size=None,
            )
        else:
            num_newton_steps = max(self.num_newton_steps, 1)
            thorough = dataclasses.replace(self, num_newton_steps=num_newton_steps)
        # The repeated estimate has its old number, which decides its rtol and probes.
        prev_state = eqx.tree_at(
            lambda s: s.num_estimates, state, state.num_estimates - 1
        )
        if prev_state.s is None and needs_scaling(thorough):
            s = optax.tree.zeros_like(state.w)
            prev_state = dataclasses.replace(prev_state, s=s)
        if prev_state.duals is None:
            duals = thorough._zero_duals(problem, state.w)
            prev_state = dataclasses.replace(prev_state, duals=duals)
        estimate, next_state = thorough.estimate(problem, prev_state, alpha, key)
        # The next state has the structure of this estimator's states, and its data.
        return estimate, dataclasses.replace(
            next_state,
            prepared=state.prepared,
            duals=None if state.duals is None else next_state.duals,
            s=None if state.s is None else next_state.s,
        )

    def _zero_duals(self, problem: Bilevel, w: PyTree) -> PyTree | None:
        """Returns the first ``duals`` of the state."""
        has_duals = self.rtol is not None or has_error_estimate(self)
        has_duals = has_duals and uses_scaled_cg(self)
        return zero_duals(problem, w) if has_duals else None

    def _current_rtol(self, state: ImplicitState) -> Scalar:
        """Returns the ``rtol`` of the next estimate."""
        rtol = jnp.atleast_1d(jnp.asarray(self.rtol, dtype=float))
        return rtol[jnp.minimum(state.num_estimates, rtol.size - 1)]

    def _costs(self, data: EstimateData, solution: Solution) -> dict[str, Array]:
        """Returns the cost of an estimate without its certificate."""
        counts = solution.counts
        fraction = fixed_batch_fraction(data.inner_data, self.adjoint_batch_size)
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        num_losses = solution.adjoint_solution.result.value.size
        return cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=counts["num_grads"],
            num_hvps=counts["num_hvps"]
            + fraction * solution.linear_stats["num_products"],
            num_values=counts["num_values"],
            num_outer_grads=counts["num_outer_grads"] * outer_fraction * num_losses,
        )
