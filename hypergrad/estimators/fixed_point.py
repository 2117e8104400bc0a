"""Implicit differentiation of the solver's update map instead of the gradient."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..certificate import NO_GRADIENT_ADVICE, TRUST_RTOL
from ..cost import cost_stats
from ..implicit_diff import finite_or_zero, zero_adjoint
from ..inner.base import IterativeSolver, grads_per_step
from ..inner.descent import run_inner_steps
from ..linear.base import relative_residual
from ..method_summary import MethodSummary
from ..problem import (
    Bilevel,
    EstimateData,
    batch_fraction,
    fixed_batch_fraction,
    without_sampling,
)
from ..problem_checks import (
    check_alpha_has_gradient,
    check_problem,
    lost_derivative_flags,
    lost_in_step_flags,
    solver_uses_alpha,
)
from ..trees import all_finite, norm
from ..validation import check_positive_int
from .base import Estimate, make_estimate
from .error_estimates import stationarity_error
from .inner_run import check_differentiable, inner_grad_norm


class FixedPointState(eqx.Module):
    """Warm-start state of `FixedPoint`.

    Attributes:
      w: Inner solution of the previous estimate.
      adjoint: Previous adjoint, structured like the floating-point leaves of the
        solver's carry; with K outer losses each leaf has a leading axis of size K.
    """

    w: PyTree
    adjoint: PyTree


class FixedPoint(eqx.Module):
    """The derivative at a fixed point of the inner solver's update map.

    ``w <- Phi(w, alpha)`` is one step of the inner solver on all inner data, with the
    state of its optimizer as a part of ``w``. With ``b = dM/dw``:

        v = b + (dPhi/dw)' v
        h = dM/dalpha + (dPhi/dalpha)' v

    The equation for ``v`` is iterated K times. K iterations from zero give the
    derivative through the last K steps at the fixed point.

    Args:
      solver: Inner solver with differentiable iterations.
      num_terms: Number of iterations for the adjoint (K).
      warm_start: Whether each inner run and each adjoint starts where the previous one
        ended.
      outer_batch_size: Number of examples for the outer gradient, sampled once per
        estimate. Defaults to all examples.

    Cost: the inner run, one more step and gradient, K + 1 products with the derivative
      of a step, each a Hessian-vector product, and two outer gradients.
    Memory: two carries of the solver, for any number of steps.
    Target: argmin. The derivative includes the dependence of the optimizer on
      ``alpha``, which adds nothing where the gradient is zero.
    Bias: ``q^K`` if a step contracts by ``q``, and the error that the inner run leaves.
      ``adjoint_residual`` is ``||b + (dPhi/dw)' v - v|| / ||b||``. An estimate is
      trusted if both are small, as for `Implicit`.

    Source: Grazzi et al. 2020 (arXiv 2006.16218), AID by the fixed-point method.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.FixedPoint(hg.Descent(optax.sgd(0.5), 100), num_terms=50)
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3)
    9.0
    """

    solver: IterativeSolver
    num_terms: int = eqx.field(static=True)
    warm_start: bool = eqx.field(static=True, default=True, kw_only=True)
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "argmin"
    citations = ("grazzi2020",)
    summary = (
        MethodSummary(
            "FixedPoint(solver, K)",
            num_grads="T + 2",
            num_hvps="K + 1",
            memory="2 carries",
            bias="q^K",
            alpha_in=("losses", "optimizer"),
            recommended_for="an optimizer that moves the limit, as weight decay does",
            not_recommended_for="learning rates, starts, inner loops that stop early",
            reason="a single step is differentiated, at its fixed point",
        ),
    )

    def __check_init__(self):
        check_differentiable(self.solver)
        check_positive_int("num_terms", self.num_terms)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns NaN, because the contraction depends on the solver."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> FixedPointState:
        """Returns the state with starting point ``w`` and a zero adjoint."""
        key = jax.random.key(0) if key is None else key
        check_problem(problem, w, alpha, self.solver)
        inner_data, _ = problem.sample_data(jax.random.key(0))
        has_gradient = solver_uses_alpha(self.solver, problem, w, alpha, inner_data)
        check_alpha_has_gradient(problem, w, alpha, has_gradient, NO_GRADIENT_ADVICE)
        carry = self.solver.init(problem.inner_loss, w, alpha, inner_data, key)
        dynamic = eqx.filter(carry, eqx.is_inexact_array)
        return FixedPointState(w, zero_adjoint(problem, dynamic))

    def estimate(
        self, problem: Bilevel, state: FixedPointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, FixedPointState]:
        """Makes an inner run and K + 1 products with the derivative of a step."""
        data = EstimateData.sample(problem, key)
        loss = problem.inner_loss
        init_w = problem.init_inner(state.w, alpha)
        carry = run_inner_steps(
            self.solver, loss, init_w, alpha, data.inner_data, data.solver_key
        )
        w = carry[0]
        inner_data = without_sampling(data.inner_data)
        dynamic, static = eqx.partition(carry, eqx.is_inexact_array)

        def phi(dynamic, alpha):
            carry = eqx.combine(dynamic, static)
            carry = self.solver.step(loss, carry, alpha, inner_data, data.inner_key)
            return eqx.filter(carry, eqx.is_inexact_array)

        outer_batch = data.outer_batch(self.outer_batch_size)
        value, outer_grad, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        next_dynamic, pullback = jax.vjp(phi, dynamic, alpha)

        def solve_adjoint(outer_grad, v):
            # b is dM/dw, and zero for the state of the optimizer.
            zero = optax.tree.zeros_like(dynamic)
            b = eqx.tree_at(lambda carry: carry[0], zero, outer_grad)
            # v <- b + (dPhi/dw)' v
            iterate = lambda v, _: (optax.tree.add(b, pullback(v)[0]), None)
            v, _ = jax.lax.scan(iterate, v, length=self.num_terms)
            phi_v, cross = pullback(v)
            residual = relative_residual(b, optax.tree.sub(v, phi_v))
            return v, cross, residual, norm(b) / norm(v)

        if problem.num_objectives is not None:
            solve_adjoint = jax.vmap(solve_adjoint)
        v, cross, adjoint_residual, mean_curvature = solve_adjoint(
            outer_grad, finite_or_zero(state.adjoint)
        )
        # h = dM/dalpha + (dPhi/dalpha)' v
        hypergradient = optax.tree.add(direct, cross)

        inner_error = stationarity_error(
            problem,
            w,
            alpha,
            outer_batch,
            outer_grad,
            cross,
            hypergradient,
            optax.tree.sub(next_dynamic[0], w),
            mean_curvature,
        )
        estimate = make_estimate(
            value,
            hypergradient,
            w,
            flags={
                "not_finite": ~all_finite(value, hypergradient, w),
                "adjoint_residual": ~jnp.all(adjoint_residual <= TRUST_RTOL),
                "inner_error": ~(inner_error <= TRUST_RTOL),
                **lost_derivative_flags(problem, w, alpha),
                **lost_in_step_flags(self.solver, problem, w, alpha),
            },
            inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
            num_inner_steps=self.solver.num_steps,
            adjoint_residual=jnp.max(adjoint_residual),
            **self._costs(data, value.size),
        )
        if self.warm_start:
            next_w = w if problem.init_fn is None else state.w
            state = FixedPointState(next_w, v)
        return estimate, state

    def _costs(self, data: EstimateData, num_objectives: int) -> dict[str, Array]:
        """Returns the cost of an estimate."""
        num_grads = grads_per_step(self.solver)
        # T steps on batches, one on all data, and the gradient of inner_grad_norm.
        num_passes = self.solver.num_steps * batch_fraction(data.inner_data) + 1
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        return cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=num_grads * num_passes + 1,
            num_hvps=num_grads * (self.num_terms + 1) * num_objectives,
            num_outer_grads=2 * num_objectives * outer_fraction,
        )
