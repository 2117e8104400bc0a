"""Implicit differentiation of the update map instead of the gradient."""

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
from ..problem_checks import check_alpha_has_gradient, check_problem, solver_uses_alpha
from ..trees import all_finite, norm
from ..validation import check_positive_int
from .base import Estimate, make_stats
from .error_estimates import stationarity_error
from .inner_run import check_differentiable, inner_grad_norm


class FixedPointState(eqx.Module):
    """The warm starts: ``w``, and the adjoint like the carry (leaves lead with K)."""

    w: PyTree
    adjoint: PyTree


class FixedPoint(eqx.Module):
    """``dM/dalpha + (dPhi/dalpha)ᵀ v`` with ``v = b + (dPhi/dw)ᵀ v``, by iteration.

    ``w <- Phi(w, alpha)`` is a step of the inner solver on all of the data, its
    optimizer's state included; ``b`` is ``dM/dw``. K terms of ``v`` from zero are the
    derivative of the last K steps at the fixed point.

    Args:
      solver: an inner solver whose iterations may be differentiated.
      num_terms: K.
      warm_start: begin each inner run and each adjoint where the last ended.
      outer_batch_size: examples for the outer gradient, drawn once an estimate; None
        means all.

    Cost: the inner run, a step and a gradient more, K + 1 products with that step's
    derivative, each a Hessian-vector product, and two outer gradients. Memory: two
    carries, flat in the number of steps.

    Target: argmin. Bias: ``q^K`` under a contraction ``q``, and what the inner run
    leaves; ``adjoint_residual`` is ``||b + (dPhi/dw)ᵀ v - v|| / ||b||``. ``trusted``
    judges by both, as `Implicit` does. What the optimizer reads of ``alpha`` is seen,
    and adds nothing where the gradient is zero.

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
            recommended_for="an optimizer that moves where the loop ends, as weight decay does",
            not_recommended_for="learning rates, starts, an inner loop that stops early",
            reason="one step is differentiated, at the point that it leads back to",
        ),
    )

    def __check_init__(self):
        check_differentiable(self.solver)
        check_positive_int("num_terms", self.num_terms)
        check_positive_int("outer_batch_size", self.outer_batch_size, optional=True)

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """NaN: the contraction is the solver's."""
        return float("nan")

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> FixedPointState:
        """Starts from ``w`` and a zero adjoint."""
        key = jax.random.key(0) if key is None else key
        check_problem(problem, w, alpha, self.solver)
        inner_data, _ = problem.sample_data(jax.random.key(0))
        beside = solver_uses_alpha(self.solver, problem, w, alpha, inner_data)
        check_alpha_has_gradient(problem, w, alpha, beside, NO_GRADIENT_ADVICE)
        carry = self.solver.init(problem.inner_loss, w, alpha, inner_data, key)
        moving, _ = eqx.partition(carry, eqx.is_inexact_array)
        return FixedPointState(w, zero_adjoint(problem, moving))

    def estimate(
        self, problem: Bilevel, state: FixedPointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, FixedPointState]:
        """One inner run, K + 1 products with the derivative of a step."""
        data = EstimateData.sample(problem, key)
        loss = problem.inner_loss
        start = problem.init_inner(state.w, alpha)
        carry = run_inner_steps(
            self.solver, loss, start, alpha, data.inner_data, data.solver_key
        )
        w = carry[0]
        everything = without_sampling(data.inner_data)
        moving, fixed = eqx.partition(carry, eqx.is_inexact_array)

        def phi(moving, alpha):
            carry = eqx.combine(moving, fixed)
            carry = self.solver.step(loss, carry, alpha, everything, data.inner_key)
            return eqx.filter(carry, eqx.is_inexact_array)

        outer_batch = data.outer_batch(self.outer_batch_size)
        value, b_w, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        after, pullback = jax.vjp(phi, moving, alpha)

        def adjoint(b_w, v):
            b = eqx.tree_at(lambda c: c[0], optax.tree.zeros_like(moving), b_w)
            step = lambda v, _: (optax.tree.add(b, pullback(v)[0]), None)
            v, _ = jax.lax.scan(step, v, length=self.num_terms)
            back, cross = pullback(v)
            residual = relative_residual(b, optax.tree.sub(v, back))
            return v, cross, residual, norm(b) / norm(v)

        if problem.num_objectives is not None:
            adjoint = jax.vmap(adjoint)
        v, cross, adjoint_residual, mean = adjoint(b_w, finite_or_zero(state.adjoint))
        hypergradient = optax.tree.add(direct, cross)

        move = optax.tree.sub(after[0], w)
        off = stationarity_error(
            problem, w, alpha, outer_batch, b_w, cross, hypergradient, move, mean
        )
        of_step, steps = grads_per_step(self.solver), self.solver.num_steps
        outer_part = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        costs = cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=of_step * (steps * batch_fraction(data.inner_data) + 1) + 1,
            num_hvps=of_step * (self.num_terms + 1) * value.size,
            num_outer_grads=2 * value.size * outer_part,
        )
        stats = make_stats(
            all_finite(value, hypergradient, w)
            & jnp.all(adjoint_residual <= TRUST_RTOL)
            & (off <= TRUST_RTOL),
            inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
            num_inner_steps=steps,
            adjoint_residual=jnp.max(adjoint_residual),
            **costs,
        )
        estimate = Estimate(value, hypergradient, w, stats)
        if self.warm_start:
            warm = w if problem.init_fn is None else state.w
            state = FixedPointState(warm, v)
        return estimate, state
