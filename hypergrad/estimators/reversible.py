"""Reverse mode through momentum descent that is run backwards, bit for bit."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from ..certificate import TRUST_RTOL
from ..jaxpr import used_inputs
from ..method_summary import MethodSummary
from ..problem import Bilevel, EstimateData, sample_batch
from ..problem_checks import check_problem
from ..products import hvp_and_cross_vjp
from ..trees import (
    add_scale,
    all_finite,
    cast_like,
    divide,
    power_of_two_scale,
    scalar_dtype,
    scale,
    vdot,
    widen,
)
from ..validation import check_not_optax_factory, check_positive_int, float_converter
from . import reversible_arithmetic as arithmetic
from .inner_run import InnerRunState, RunDerivative, RunEstimator
from .rounding import reference_change, roundings

MIN_MOMENTUM = 1 / arithmetic.MAX_DIVISOR


class Reversible(RunEstimator):
    """The derivative of ``M(w_T(alpha), alpha)`` through reversible momentum descent.

    The steps are ``v <- m v + g`` with ``g = dL/dw``, then ``w <- w - r v``. ``w`` and
    ``v`` are fixed-point integers, and the bits of ``v`` that a multiplication by
    ``m < 1`` discards are kept in a buffer, ``log2(1 / m)`` bits per number and step.
    So each step can be undone exactly, and no trajectory is stored.

    Args:
      learning_rate: A number, or a function ``alpha -> r`` where ``r`` is a number or
        an optax schedule.
      momentum: A static number in [1/16, 1), or a function ``alpha -> m`` where ``m``
        is a number or a schedule. Steps alternate between the two nearest multiples of
        1/4096, in float32 of 1/256, so that their mean is the momentum.
      num_steps: Number of inner steps (T).
      min_momentum: Smallest ``m`` that occurs; it determines the size of the buffer.
        Required if ``momentum`` is a function, and defaults to ``momentum`` otherwise.
      warm_start: As in `Unrolled`; None means True unless the learning rate or the
        momentum depends on ``alpha``.
      certify, outer_batch_size: As in `Unrolled`.

    Cost: 2 T inner gradients and T Hessian-vector products with their cross term. Under
      ``vmap`` both directions are computed at every step, at twice the cost.
    Memory: six vectors like ``w`` and the buffer: 0.15 bits per number and step at a
      momentum of 0.9.
    Target: solver.
    Bias: a resolution. Steps are rounded to 2^-46 and velocities to 2^-34 in float64,
      to 2^-23 and 2^-15 in float32, which is coarse. An estimate is trusted if no
      number left the range of the integers (65,536, or 128 in float32), the momentum
      stayed in its range, the run came back to its starting point in every bit, and
      ``error_estimate`` is at most 1e-2. It is twice the standard deviation that the
      rounding of all steps causes in the outer value, by its adjoints, relative to
      ``||(|w_0| + |w_T|) dM/dw||``. So numbers that the integers do not resolve, and
      runs that amplify rounding errors, are not trusted.

    Raises:
      TypeError: ``learning_rate`` or ``momentum`` is an optax function.
      ValueError: A number is out of its range, or ``min_momentum`` is missing.

    Source: Maclaurin, Duvenaud & Adams 2015 (arXiv 1502.03492), algorithms 2 and 3.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    >>> estimator = hg.Reversible(learning_rate=0.1, momentum=0.5, num_steps=200)
    >>> estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(0.0, 1.0)
    >>> round(float(estimate.hypergradient), 3), bool(estimate.trusted)
    (9.0, True)
    """

    learning_rate: float | Array | Callable[[PyTree], Any]
    momentum: float | Callable[[PyTree], Any] = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    min_momentum: float = eqx.field(static=True)

    citations = ("maclaurin2015",)
    summary = (
        MethodSummary(
            "Reversible(rate, m, T)",
            num_grads="2 * T + 1",
            num_hvps="T",
            memory="6 w, log2(1/m) bits a number and step",
            bias="rounding to 2^-34, in float64",
            alpha_in=("losses", "optimizer", "start"),
            recommended_for="thousands of steps of momentum descent, all of them seen",
            not_recommended_for="other optimizers, float32, several outer losses",
            reason="steps are undone bit by bit instead of being stored",
        ),
    )

    def __init__(
        self,
        learning_rate: float | Array | Callable[[PyTree], Any],
        momentum: float | Callable[[PyTree], Any],
        num_steps: int,
        min_momentum: float | None = None,
        *,
        warm_start: bool | None = None,
        certify: bool = False,
        outer_batch_size: int | None = None,
    ):
        check_positive_int("num_steps", num_steps)
        check_not_optax_factory("learning_rate", learning_rate)
        check_not_optax_factory("momentum", momentum)
        if not callable(learning_rate):
            to_number = float_converter("learning_rate", optional=False)
            learning_rate = to_number(learning_rate)
        if min_momentum is None:
            if callable(momentum):
                raise ValueError(
                    "min_momentum must be given if momentum is a function, because the "
                    "buffer holds log2(1 / min_momentum) bits per number and step."
                )
            min_momentum = float(momentum)
        if not MIN_MOMENTUM <= min_momentum < 1:
            raise ValueError(
                f"momentum must be in [1/16, 1); got {min_momentum!r}. Use hg.Unrolled "
                "for descent with less momentum."
            )
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.num_steps = num_steps
        self.min_momentum = min_momentum
        self.warm_start = warm_start
        self.certify = certify
        self.outer_batch_size = outer_batch_size

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns a bound far above the error of the resolution."""
        return 1e-3

    @property
    def num_buffer_bytes(self) -> int:
        """Bytes of the buffer per number of ``w``, besides its 32 bits."""
        return arithmetic.num_stack_bytes(self.num_steps, self.min_momentum)

    def rate_and_momentum(
        self, alpha: PyTree, step: Array | int
    ) -> tuple[Array, Array]:
        """Returns ``r`` and ``m`` of a step."""

        def evaluate(hyperparameter: Any) -> Array:
            value = hyperparameter
            value = value(alpha) if callable(value) else value
            value = value(step) if callable(value) else value
            return jnp.asarray(value, dtype=float)

        return evaluate(self.learning_rate), evaluate(self.momentum)

    def optimizer_uses_alpha(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, inner_data: PyTree
    ) -> Sequence[bool]:
        """Returns which leaves of ``alpha`` the rate or the momentum depends on."""
        del problem, w, inner_data
        first_step = jnp.asarray(0)
        return used_inputs(
            lambda alpha: self.rate_and_momentum(alpha, first_step), alpha
        )

    def init(
        self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array | None = None
    ) -> InnerRunState:
        """Returns the state in which the first run starts from ``w``."""
        if problem.num_objectives is not None:
            raise ValueError(
                "outer_loss must be a single loss for Reversible; got "
                f"{problem.num_objectives}. Combine them into one, or use hg.Unrolled."
            )
        if len(set(map(arithmetic.integer_dtype, jax.tree.leaves(w)))) > 1:
            raise ValueError(
                "w must not mix float64 with shorter leaves, because their integers "
                "differ. Cast w to one dtype, or use hg.Unrolled."
            )
        check_problem(problem, w, alpha)
        return super().init(problem, w, alpha, key)

    def differentiate(
        self, problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
    ) -> RunDerivative:
        """Returns the derivative by T steps forward and T steps back."""
        outer_batch = data.outer_batch(self.outer_batch_size)
        keys = jax.random.split(data.solver_key, self.num_steps)
        init_fn = lambda alpha: problem.init_inner(w, alpha)
        init_w, init_pullback = jax.vjp(init_fn, alpha)
        steps = _MomentumSteps(self, problem, alpha, outer_batch, init_w)
        init_carry = steps.init_carry()

        def body_fun(index, carry):
            """Makes step t forward if index < T, else undoes step t."""
            is_forward = index < self.num_steps
            t = jnp.where(is_forward, index, 2 * self.num_steps - 1 - index)
            identity = lambda carry, t: carry
            carry = jax.lax.cond(
                index == self.num_steps,
                steps.evaluate_outer,
                lambda carry: carry,
                carry,
            )
            carry = jax.lax.cond(is_forward, steps.update_w, identity, carry, t)
            batch = sample_batch(data.inner_data, keys[t])
            # Both directions share one gradient, so that it cannot round in two ways.
            current_w = steps.to_floats(carry.w)
            g = jax.grad(problem.inner_loss)(current_w, alpha, batch)
            carry = jax.lax.cond(
                is_forward, steps.update_v, steps.undo_update_v, carry, t, g, batch
            )
            return jax.lax.cond(is_forward, identity, steps.undo_update_w, carry, t)

        carry = jax.lax.fori_loop(0, 2 * self.num_steps, body_fun, init_carry)
        error_estimate = steps.relative_rounding_error(carry)
        (init_term,) = init_pullback(cast_like(carry.w_bar, init_w))
        hypergradient = cast_like(optax.tree.add(carry.alpha_bar, init_term), alpha)
        is_equal = jax.tree.map(
            jnp.array_equal, (carry.w, carry.v), (init_carry.w, init_carry.v)
        )
        is_reversed = jnp.all(jnp.stack(jax.tree.leaves(is_equal)))
        is_reversed &= arithmetic.is_empty(carry.buffer)
        return RunDerivative(
            carry.value,
            hypergradient,
            carry.final_w,
            flags={
                "not_finite": ~all_finite(carry.value, hypergradient, carry.final_w),
                "out_of_range": ~carry.is_in_range,
                "not_reversed": ~is_reversed,
                "rounding_error": ~(error_estimate <= TRUST_RTOL),
            },
            num_steps=self.num_steps,
            num_grads=2 * self.num_steps,
            num_hvps=self.num_steps,
            error_estimate=error_estimate,
        )


class _Carry(eqx.Module):
    """A point of the run and the adjoints there.

    Attributes:
      w, v: Weights and velocities as fixed-point integers.
      buffer: The bits that the multiplications of ``v`` have discarded.
      w_bar, v_bar: The adjoints ``dM/dw_t`` and ``dM/dv_t``; zero on the way forward.
      alpha_bar: ``dM/dalpha`` summed over the steps that were undone. Sums are at least
        float32, whatever the dtypes of ``w`` and ``alpha``.
      is_in_range: False once a number or the momentum has left its range.
      rounding_variance: Variance that the rounding of the steps causes in the outer
        value, in units of ``outer_unit^2``.
      momentum_change: Change of the outer value because the momentum of each step was
        rounded to a fraction, in units of ``outer_unit``.
      outer_unit: A power of two near the largest ``|dM/dw|``, so that no square
        underflows.
      reference: ``||(|w_0| + |w_T|) dM/dw||`` in units of ``outer_unit``.
      value, final_w: Outer value and weights after the last step.
    """

    w: PyTree
    v: PyTree
    buffer: arithmetic.Buffer
    w_bar: PyTree
    v_bar: PyTree
    alpha_bar: PyTree
    is_in_range: Bool[Array, ""]
    rounding_variance: Array
    momentum_change: Array
    outer_unit: Array
    reference: Array
    value: Array
    final_w: PyTree


class _MomentumSteps:
    """The halves of a step of momentum descent, and how they are undone.

    Step t is ``v_{t+1} = m_t v_t + g(w_t)``, then ``w_{t+1} = w_t - r_t v_{t+1}``.

    Attributes:
      estimator, problem, alpha, outer_batch: Those of the estimate.
      init_w: Weights before the first step.
      dtype: Dtype of the fixed-point integers.
    """

    def __init__(
        self,
        estimator: Reversible,
        problem: Bilevel,
        alpha: PyTree,
        outer_batch: PyTree,
        init_w: PyTree,
    ):
        self.estimator, self.problem = estimator, problem
        self.alpha, self.outer_batch, self.init_w = alpha, outer_batch, init_w
        self.dtype = arithmetic.integer_dtype(jax.tree.leaves(init_w)[0])

    def init_carry(self) -> _Carry:
        """Returns the carry before the first step: no velocity, an empty buffer."""
        init_w, estimator = self.init_w, self.estimator
        w = jax.tree.map(arithmetic.to_fixed_point, init_w)
        value = jax.eval_shape(
            lambda w: self.problem.outer_value(w, self.alpha, self.outer_batch), init_w
        )
        zero = jnp.zeros((), scalar_dtype(init_w))
        return _Carry(
            w=w,
            v=optax.tree.zeros_like(w),
            buffer=arithmetic.empty_buffer(
                init_w, estimator.num_buffer_bytes, estimator.num_steps
            ),
            w_bar=optax.tree.zeros_like(widen(init_w)),
            v_bar=optax.tree.zeros_like(widen(init_w)),
            alpha_bar=optax.tree.zeros_like(widen(self.alpha)),
            is_in_range=jnp.asarray(True),
            rounding_variance=zero,
            momentum_change=zero,
            outer_unit=zero + 1,
            reference=zero,
            value=jnp.zeros(value.shape, value.dtype),
            final_w=init_w,
        )

    def to_floats(self, integers: PyTree) -> PyTree:
        """Returns fixed-point integers as numbers in the dtypes of ``w``."""
        return jax.tree.map(arithmetic.from_fixed_point, integers, self.init_w)

    def update_w(self, carry: _Carry, t: Array | int) -> _Carry:
        """Moves from ``w_{t-1}`` to ``w_t = w_{t-1} - r_{t-1} v_t``."""
        displacement = self._displacement(carry, t)
        w = jax.tree.map(jnp.subtract, carry.w, displacement)
        is_in_range = arithmetic.are_in_range((displacement, w)) & carry.is_in_range
        return dataclasses.replace(carry, w=w, is_in_range=is_in_range)

    def undo_update_w(self, carry: _Carry, t: Array | int) -> _Carry:
        """Undoes `update_w`, and pulls the adjoints back through it."""
        w = jax.tree.map(jnp.add, carry.w, self._displacement(carry, t))
        settings_fn = lambda alpha: self.estimator.rate_and_momentum(alpha, t - 1)
        (rate, _), pullback = jax.vjp(settings_fn, self.alpha)
        # The displacement was rounded to a unit.
        variance = self._variance(carry, carry.w_bar) / 12
        # v_bar <- v_bar - r w_bar,   r_bar = -<w_bar, v_t>
        v_bar = add_scale(carry.v_bar, -rate, carry.w_bar)
        rate_bar = -vdot(carry.w_bar, self.to_floats(carry.v)).astype(rate.dtype)
        (rate_term,) = pullback((rate_bar, jnp.zeros_like(rate)))
        alpha_bar = optax.tree.add(carry.alpha_bar, rate_term)
        return dataclasses.replace(
            carry,
            w=w,
            v_bar=v_bar,
            alpha_bar=alpha_bar,
            rounding_variance=carry.rounding_variance + variance,
        )

    def update_v(self, carry: _Carry, t: Array, g: PyTree, batch: PyTree) -> _Carry:
        """Moves from ``v_t`` to ``v_{t+1} = m_t v_t + g``."""
        del batch
        _, momentum = self.estimator.rate_and_momentum(self.alpha, t)
        buffer, v = arithmetic.multiply(carry.buffer, carry.v, momentum, t)
        v = jax.tree.map(lambda v, g: v + arithmetic.to_fixed_point(g), v, g)
        is_in_range = arithmetic.is_in_range(g) & arithmetic.are_in_range(v)
        is_in_range &= arithmetic.is_valid_momentum(momentum)
        is_in_range = carry.is_in_range & is_in_range
        return dataclasses.replace(carry, v=v, buffer=buffer, is_in_range=is_in_range)

    def undo_update_v(
        self, carry: _Carry, t: Array, g: PyTree, batch: PyTree
    ) -> _Carry:
        """Undoes `update_v`, and pulls the adjoints back through it."""
        settings_fn = lambda alpha: self.estimator.rate_and_momentum(alpha, t)
        (_, momentum), pullback = jax.vjp(settings_fn, self.alpha)
        v = jax.tree.map(lambda v, g: v - arithmetic.to_fixed_point(g), carry.v, g)
        buffer, v = arithmetic.divide(carry.buffer, v, momentum, t)
        current_w = self.to_floats(carry.w)
        _, Hv, cross = hvp_and_cross_vjp(
            self.problem.inner_loss,
            current_w,
            self.alpha,
            batch,
            cast_like(carry.v_bar, self.init_w),
        )
        # m_bar = <v_bar, v_t>,   alpha_bar <- alpha_bar + J' v_bar + m_bar dm/dalpha
        momentum_bar = vdot(carry.v_bar, self.to_floats(v)).astype(momentum.dtype)
        (momentum_term,) = pullback((jnp.zeros_like(momentum), momentum_bar))
        alpha_term = optax.tree.add(cross, momentum_term)
        # w_bar <- w_bar + H v_bar,   v_bar <- m v_bar with the rounded m = n / d
        n = arithmetic.numerator(momentum, self.dtype, t)
        d = arithmetic.denominator(self.dtype)
        rounded_momentum = n.astype(momentum.dtype) / d
        momentum_change = momentum_bar * (rounded_momentum - momentum)
        momentum_change = (momentum_change / carry.outer_unit).astype(
            carry.momentum_change.dtype
        )
        # A digit of v, of n values, was replaced by another one, g was rounded to a
        # unit, and w to its dtype: dM = v_bar' H dw.
        num_units = n.astype(carry.rounding_variance.dtype) ** 2 / 6 + 1 / 12
        variance = num_units * self._variance(carry, carry.v_bar)
        variance += self._variance(carry, Hv, roundings(current_w))
        return dataclasses.replace(
            carry,
            v=v,
            buffer=buffer,
            rounding_variance=carry.rounding_variance + variance,
            momentum_change=carry.momentum_change + momentum_change,
            w_bar=optax.tree.add(carry.w_bar, Hv),
            v_bar=scale(rounded_momentum, carry.v_bar),
            alpha_bar=optax.tree.add(carry.alpha_bar, alpha_term),
        )

    def evaluate_outer(self, carry: _Carry) -> _Carry:
        """Moves to ``w_T``, evaluates the outer loss there, and moves back."""
        num_steps = self.estimator.num_steps
        carry = self.update_w(carry, num_steps)
        final_w = self.to_floats(carry.w)
        # w_bar = dM/dw and alpha_bar = dM/dalpha at w_T
        value, w_bar, alpha_bar = self.problem.outer_value_and_grads(
            final_w, self.alpha, self.outer_batch
        )
        outer_unit = power_of_two_scale(w_bar).astype(carry.outer_unit.dtype)
        carry = dataclasses.replace(
            carry,
            value=value,
            outer_unit=outer_unit,
            reference=reference_change(divide(w_bar, outer_unit), self.init_w, final_w),
            w_bar=widen(w_bar),
            alpha_bar=widen(alpha_bar),
            final_w=final_w,
        )
        return self.undo_update_w(carry, num_steps)

    def relative_rounding_error(self, carry: _Carry) -> Array:
        """Returns twice the standard deviation of the outer value by ``reference``.

        Rounding changes the adjoints about as much as ``w``.
        """
        # The starting point was rounded to a unit.
        variance = carry.rounding_variance + self._variance(carry, carry.w_bar) / 12
        variance += carry.momentum_change**2
        # NaN if nothing depends on w, or w is 0 in fixed point.
        return 2 * jnp.sqrt(variance) / carry.reference

    def _variance(
        self, carry: _Carry, adjoint: PyTree, error: PyTree | None = None
    ) -> Array:
        """Returns ``||error * adjoint||^2``, by default for an error of one unit."""
        adjoint = divide(widen(adjoint), carry.outer_unit)
        if error is None:
            unit = 2.0 ** -arithmetic.num_fraction_bits(self.dtype)
            return unit**2 * vdot(adjoint, adjoint)
        product = jax.tree.map(jnp.multiply, adjoint, widen(error))
        return vdot(product, product)

    def _displacement(self, carry: _Carry, t: Array | int) -> PyTree:
        """Returns ``r_{t-1} v_t``, rounded to integers."""
        rate, _ = self.estimator.rate_and_momentum(self.alpha, t - 1)
        to_integer = lambda v: jnp.round(rate * v.astype(rate.dtype)).astype(self.dtype)
        return jax.tree.map(to_integer, carry.v)
