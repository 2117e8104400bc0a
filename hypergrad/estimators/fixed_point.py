"""Implicit differentiation of the solver's update map instead of the gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..batches import fixed_batch_fraction, without_sampling
from ..certificate import NO_GRADIENT_ADVICE, TRUST_RTOL
from ..checks.lost_derivatives import lost_derivative_flags, lost_in_step_flags
from ..checks.problem import check_steps_use_alpha
from ..cost import cost_stats
from ..implicit.differentiation import finite_or_zero, zero_adjoint
from ..implicit.minimum import is_cancelled
from ..inner.base import IterativeSolver, grads_per_step, step_fraction
from ..inner.descent import run_inner_steps
from ..method_summary import MethodSummary
from ..number_checks import boolean, check_positive_int
from ..problem import Bilevel, EstimateData
from ..trees import (
    all_finite,
    divide,
    machine_eps,
    norm_ratio,
    power_of_two_scale,
    ratio,
    safe_distance,
    safe_norm,
    vdot,
)
from .base import Estimate, make_estimate
from .error_estimates import remaining_change
from .inner_run import (
    check_differentiable,
    check_differentiable_run,
    inner_grad_norm,
)

#: Part of the steps of ``w`` by which they may differ from what a derivative predicts.
MAX_DEVIATION = 0.5
NUM_ROUNDINGS = 16  # of an iterate, by which its steps may differ


class FixedPointState(eqx.Module):
    """Warm-start state of `FixedPoint`.

    Attributes:
      w: Inner solution of the previous estimate.
      adjoint: Previous adjoint, structured like the floating-point leaves of the
        solver's carry; with K outer losses each leaf has a leading axis of size K.
    """

    w: PyTree
    adjoint: PyTree


class _Step(NamedTuple):
    """A step of the solver at a carry ``x``, and the derivatives there.

    With K outer losses ``value``, ``b`` and ``direct`` have a leading axis of size K.

    Attributes:
      next_x: ``Phi(x, alpha)``.
      pullback: Function ``v -> ((dPhi/dx)' v, (dPhi/dalpha)' v)``.
      value, direct: Outer value and ``dM/dalpha``.
      b: ``dM/dw``, and zero for the state of the optimizer.
    """

    next_x: PyTree
    pullback: Callable[[PyTree], tuple[PyTree, PyTree]]
    value: Array
    b: PyTree
    direct: PyTree


class _Adjoint(NamedTuple):
    """The adjoint after K iterations, with K outer losses on a leading axis.

    Attributes:
      v, next_v: The adjoint, and the result of one more iteration.
      cross: ``(dPhi/dalpha)' v``.
      changes: ``||(dPhi/dalpha)' (v_k - v_{k-1})||`` of each iteration.
      residual: ``adjoint_residual`` of `FixedPoint`, for the part of ``v`` that belongs
        to ``w``.
    """

    v: PyTree
    next_v: PyTree
    cross: PyTree
    changes: Float[Array, " num_terms"]
    residual: Array


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

    Cost: the inner run; K + 1 products with the derivative of a step, each a
      Hessian-vector product with its cross term; and for the error estimate m = K // 2
      + 4 further steps with a product and an outer gradient each.
    Memory: three carries of the solver, for any number of steps.
    Target: argmin. The derivative includes the dependence of the optimizer on
      ``alpha``, which adds nothing where the gradient is zero. A leaf of ``alpha`` that
      the state of the optimizer holds, as with `optax.inject_hyperparams`, raises
      ValueError, because the derivative of a step at a fixed state would miss it.
    Bias: ``q^K`` if a step contracts by ``q``, and the error that the inner run leaves.
    Trust: the error is estimated by m further steps of ``w`` and ``v`` at once,

        h_k = dM/dalpha(w_k) + (dPhi/dalpha)' v_k
        w_{k+1} = Phi(w_k, alpha),    v_{k+1} = b(w_k) + (dPhi/dw(w_k))' v_k

      from ``h_0 = h``. Their limit is the exact hypergradient, whose distance is

        error_estimate = (||h_m - h|| + p R / (1 - R)) / ||h||,

      where ``p`` is the length of the path of the last ``m / 4`` values and ``R`` the
      factor by which such lengths contract. The K iterations for ``v`` at a fixed ``w``
      are continued in the same way, and the larger estimate counts. An estimate is
      trusted if it is at most 1e-2, the last steps of ``w`` change along ``v`` as
      ``dPhi/dw`` predicts to within half of their length, which an oscillation around a
      kink does not, and ``adjoint_residual`` is at most 1e-2, which is

        ||s (b + (dPhi/dw)' v - v)|| / ||s b||    with the entries ``s = |w_0| + |w_T|``

      but at least ``eps / 2 ||s v|| / ||s b||``, by which rounding may hold up the
      iterations for ``v``. Leaves of ``w`` with ``s b = 0`` but ``b != 0``, such as
      leaves that are 0 at both ends of the run, have a residual of their own, with
      ``s = 1``. Otherwise no units matter, as far as the solver's steps do not depend
      on them. A direction is missed in which the error contracts so slowly that the
      other ones hide it in all m steps. The step that is differentiated is the one
      after the run, with the optimizer's count there: after a schedule that ends at a
      rate of 0 it changes nothing, so that ``v`` does not converge and the estimate is
      not trusted.

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
    warm_start: bool = eqx.field(
        static=True, default=True, kw_only=True, converter=boolean("warm_start")
    )
    outer_batch_size: int | None = eqx.field(static=True, default=None, kw_only=True)

    target = "argmin"
    citations = ("grazzi2020",)
    summary = (
        MethodSummary(
            "FixedPoint(solver, K)",
            num_grads="T + K / 2 + 6",
            num_hvps="3 * K / 2 + 5",
            memory="3 carries",
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
        check_differentiable_run(self.solver, problem, w, alpha)
        inner_data, _ = problem.sample_data(jax.random.key(0))
        check_steps_use_alpha(self.solver, problem, w, alpha, NO_GRADIENT_ADVICE)
        carry = self.solver.init(problem.inner_loss, w, alpha, inner_data, key)
        dynamic = eqx.filter(carry, eqx.is_inexact_array)
        return FixedPointState(w, zero_adjoint(problem, dynamic))

    @property
    def num_check_steps(self) -> int:
        """Number of further steps by which the error is estimated (m)."""
        return self.num_terms // 2 + 4

    def estimate(
        self, problem: Bilevel, state: FixedPointState, alpha: PyTree, key: Array
    ) -> tuple[Estimate, FixedPointState]:
        """Makes an inner run, K + 1 products, and m further steps with a product."""
        data = EstimateData.sample(problem, key)
        loss = problem.inner_loss
        init_w = problem.init_inner(state.w, alpha)
        carry = run_inner_steps(
            self.solver, loss, init_w, alpha, data.inner_data, data.solver_key
        )
        w = carry[0]
        make_step = self._make_step_fn(problem, data, carry, alpha)
        step = make_step(eqx.filter(carry, eqx.is_inexact_array))
        per_loss = problem.for_each_loss
        scales = jax.tree.map(lambda x, y: jnp.abs(x) + jnp.abs(y), init_w, w)
        solve = functools.partial(self._solve_adjoint, step.pullback, scales)
        adjoint = per_loss(solve)(step.b, finite_or_zero(state.adjoint), step.direct)
        # h = dM/dalpha + (dPhi/dalpha)' v
        hypergradient = optax.tree.add(step.direct, adjoint.cross)
        final_h, changes, leaves_model = self._continue_steps(
            make_step, per_loss, eqx.filter(carry, eqx.is_inexact_array), step, adjoint,
            hypergradient,
        )  # fmt: skip
        cancels = functools.partial(is_cancelled, adjoint=w)
        is_lost = per_loss(cancels)(hypergradient, adjoint.cross)

        def relative_errors(h, adjoint_changes, final_h, changes):
            eps, h_norm = machine_eps(w), safe_norm(h)
            adjoint_error = remaining_change(adjoint_changes, eps)
            error = safe_distance(final_h, h) + remaining_change(changes, eps)
            return ratio(adjoint_error, h_norm), ratio(error, h_norm)

        adjoint_error, error = jax.tree.map(
            jnp.max,
            per_loss(relative_errors)(hypergradient, adjoint.changes, final_h, changes),
        )
        adjoint_residual = jnp.max(adjoint.residual)
        is_adjoint_accurate = jnp.maximum(adjoint_error, adjoint_residual) <= TRUST_RTOL
        estimate = make_estimate(
            step.value,
            hypergradient,
            w,
            flags={
                "not_finite": ~all_finite(step.value, hypergradient, w),
                "adjoint_residual": ~is_adjoint_accurate,
                # This error contains that of the adjoint.
                "inner_error": is_adjoint_accurate & ~(error <= TRUST_RTOL)
                | leaves_model,
                "rounding_error": jnp.any(is_lost),
                **lost_derivative_flags(problem, w, alpha),
                **lost_in_step_flags(self.solver, problem, w, alpha),
            },
            inner_grad_norm=inner_grad_norm(problem, data, w, alpha),
            num_inner_steps=self.solver.num_steps,
            adjoint_residual=adjoint_residual,
            error_estimate=jnp.maximum(adjoint_error, error),
            **self._costs(data, step.value.size),
        )
        if self.warm_start:
            next_w = w if problem.init_fn is None else state.w
            state = FixedPointState(next_w, adjoint.v)
        return estimate, state

    def _make_step_fn(
        self, problem: Bilevel, data: EstimateData, carry: PyTree, alpha: PyTree
    ) -> Callable[[PyTree], _Step]:
        """Returns the function that makes a step on all inner data from ``x``.

        ``x`` stands for the floating-point leaves of ``carry``.
        """
        inner_data = without_sampling(data.inner_data)
        outer_batch = data.outer_batch(self.outer_batch_size)
        _, static = eqx.partition(carry, eqx.is_inexact_array)

        def phi(x, alpha):
            carry = self.solver.step(
                problem.inner_loss,
                eqx.combine(x, static),
                alpha,
                inner_data,
                data.inner_key,
            )
            return eqx.filter(carry, eqx.is_inexact_array)

        def make_step(x):
            w = eqx.combine(x, static)[0]
            value, outer_grad, direct = problem.outer_value_and_grads(
                w, alpha, outer_batch
            )
            b = eqx.tree_at(lambda x: x[0], zero_adjoint(problem, x), outer_grad)
            return _Step(*jax.vjp(phi, x, alpha), value, b, direct)

        return make_step

    def _solve_adjoint(
        self,
        pullback: Callable[[PyTree], Any],
        scales: PyTree,
        b: PyTree,
        v: PyTree,
        like: PyTree,
    ) -> _Adjoint:
        """Makes K iterations and one more product; ``like`` is a hypergradient."""

        def iterate(carry, _):
            # v <- b + (dPhi/dw)' v
            v, prev_cross = carry
            phi_v, cross = pullback(v)
            change = safe_distance(cross, prev_cross)
            return (optax.tree.add(b, phi_v), cross), change

        init_carry = v, optax.tree.zeros_like(like)
        (v, prev_cross), changes = jax.lax.scan(
            iterate, init_carry, length=self.num_terms
        )
        phi_v, cross = pullback(v)
        # No product came before the one of the starting point.
        changes = jnp.append(changes[1:], safe_distance(cross, prev_cross))
        next_v = optax.tree.add(b, phi_v)
        residual = _relative_to_b(scales, optax.tree.sub(next_v, v)[0], b[0])
        # An iteration stalls where its steps are below half a unit in the last place.
        rounding = 0.5 * machine_eps(v) * _relative_to_b(scales, v[0], b[0])
        residual = jnp.maximum(residual, rounding)
        return _Adjoint(v, next_v, cross, changes, residual)

    def _continue_steps(
        self,
        make_step: Callable[[PyTree], _Step],
        per_loss: Callable[..., Any],
        x: PyTree,
        step: _Step,
        adjoint: _Adjoint,
        hypergradient: PyTree,
    ) -> tuple[PyTree, Float[Array, "*K m"], Array]:
        """Continues with m further steps of ``w`` and ``v``.

        Returns:
          The last hypergradient, its changes, and whether the steps of ``w`` change
          otherwise than the derivative of a step predicts.
        """

        def body_fun(carry, _):
            prev_x, x, v, prev_h = carry
            step = make_step(x)
            phi_v, cross = per_loss(step.pullback)(v)
            h = optax.tree.add(step.direct, cross)
            change = per_loss(safe_distance)(h, prev_h)
            deviation_fn = functools.partial(_deviation, prev_x, x, step.next_x)
            deviation = per_loss(deviation_fn)(v, phi_v)
            next_v = optax.tree.add(step.b, phi_v)
            return (x, step.next_x, next_v, h), (change, deviation)

        init_carry = x, step.next_x, adjoint.next_v, hypergradient
        (*_, final_h), (changes, deviations) = jax.lax.scan(
            body_fun, init_carry, length=self.num_check_steps
        )
        num_final = self.num_check_steps // 4
        deviation, path, rounding = (
            jnp.sum(x[-num_final:], axis=0) for x in deviations
        )
        leaves_model = (deviation > MAX_DEVIATION * path) & (deviation > rounding)
        return final_h, jnp.moveaxis(changes, 0, -1), jnp.any(leaves_model)

    def _costs(self, data: EstimateData, num_objectives: int) -> dict[str, Array]:
        """Returns the cost of an estimate."""
        num_grads = grads_per_step(self.solver)
        num_checks = self.num_check_steps
        # T steps on batches, m + 1 on all data, and the gradient of inner_grad_norm.
        num_passes = self.solver.num_steps * step_fraction(self.solver, data.inner_data)
        num_passes += num_checks + 1
        outer_fraction = fixed_batch_fraction(data.outer_data, self.outer_batch_size)
        return cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=num_grads * num_passes + 1,
            num_hvps=num_grads * (self.num_terms + 1 + num_checks) * num_objectives,
            num_outer_grads=(1 + num_checks) * num_objectives * outer_fraction,
        )


def _deviation(
    prev_x: PyTree, x: PyTree, next_x: PyTree, v: PyTree, phi_v: PyTree
) -> tuple[Array, Array, Array]:
    """Compares two steps along ``v`` with the derivative of a step.

    Returns:
      ``|v'(Phi(x) - x) - ((dPhi/dx)' v)'(x - prev_x)|``, which is of second order in
      smooth steps; the sum of the absolute values of both terms' entries; and the
      rounding error of the first.
    """
    prev_step, step = optax.tree.sub(x, prev_x), optax.tree.sub(next_x, x)
    unit = power_of_two_scale((v, phi_v))
    v, phi_v = divide((v, phi_v), unit)
    absolute = lambda tree: jax.tree.map(jnp.abs, tree)
    deviation = jnp.abs(vdot(v, step) - vdot(phi_v, prev_step))
    path = vdot(absolute(v), absolute(step))
    path += vdot(absolute(phi_v), absolute(prev_step))
    rounding = NUM_ROUNDINGS * machine_eps(x) * vdot(absolute(v), absolute(x))
    return deviation * unit, path * unit, rounding * unit


def _relative_to_b(scales: PyTree, x: PyTree, b: PyTree) -> Array:
    """Returns ``||s x|| / ||s b||``, or ``||x|| / ||b||`` of entries without scale.

    These are the entries with ``s b = 0`` but ``b != 0``. The larger ratio is returned.
    """
    scale_w = lambda x: jax.tree.map(jnp.multiply, scales, x)
    has_no_scale = jax.tree.map(lambda s, b: (s * b == 0) & (b != 0), scales, b)
    select = lambda x: jax.tree.map(
        lambda is_selected, x: jnp.where(is_selected, x, 0), has_no_scale, x
    )
    return jnp.maximum(
        norm_ratio(scale_w(x), scale_w(b)), norm_ratio(select(x), select(b))
    )
