"""The steps of reversible momentum descent, forward and back."""

import dataclasses
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from ..jaxprs.inspection import uses_w
from ..problem import Bilevel
from ..products import hvp_and_cross_vjp
from ..trees import (
    add_scale,
    cast_like,
    divide,
    norm,
    power_of_two_scale,
    ratio,
    scalar_dtype,
    scale,
    underflows,
    vdot,
    widen,
)
from . import reversible_arithmetic as arithmetic
from .rounding import max_rounding, reference_change, roundings

if TYPE_CHECKING:
    from .reversible import Reversible


class Carry(eqx.Module):
    """A point of the run and the adjoints there.

    Attributes:
      w, v: Weights and velocities as fixed-point integers. Here ``v`` is the velocity
        and not an adjoint.
      buffer: The bits that the multiplications of ``v`` have discarded.
      w_bar, v_bar: The adjoints ``dM/dw_t`` and ``dM/dv_t``; zero on the way forward.
      alpha_bar: ``dM/dalpha`` summed over the steps that were undone. Sums are at least
        float32, whatever the dtypes of ``w`` and ``alpha``.
      direct: ``dM/dalpha`` at ``w_T``, with which this sum begins.
      is_in_range: False once a number or the momentum has left its range.
      rounding_variance: Variance that the rounding of the steps causes in the outer
        value, in units of ``outer_unit^2``.
      momentum_change: Change of the outer value because the momentum of each step was
        rounded to a fraction, in units of ``outer_unit``.
      outer_unit: A power of two near the largest ``|dM/dw|``, so that no square
        underflows.
      reference: ``||(|w_0| + |w_T|) dM/dw||`` in units of ``outer_unit``.
      resolution: Relative change of the outer value if all weights change by the
        resolution of the velocities, or that of their dtype if it is coarser.
      value, final_w: Outer value and weights after the last step.
    """

    w: PyTree
    v: PyTree
    buffer: arithmetic.Buffer
    w_bar: PyTree
    v_bar: PyTree
    alpha_bar: PyTree
    direct: PyTree
    is_in_range: Bool[Array, ""]
    rounding_variance: Array
    momentum_change: Array
    outer_unit: Array
    reference: Array
    resolution: Array
    value: Array
    final_w: PyTree


class MomentumSteps:
    """The halves of a step of momentum descent, and how they are undone.

    Step t is ``v_{t+1} = m_t v_t + g(w_t)``, then ``w_{t+1} = w_t - r_t v_{t+1}``.

    Attributes:
      estimator, problem, alpha, outer_batch: Those of the estimate.
      init_w: Weights before the first step.
      dtype: Dtype of the fixed-point integers.
    """

    def __init__(
        self,
        estimator: "Reversible",
        problem: Bilevel,
        alpha: PyTree,
        outer_batch: PyTree,
        init_w: PyTree,
    ):
        self.estimator, self.problem = estimator, problem
        self.alpha, self.outer_batch, self.init_w = alpha, outer_batch, init_w
        self.dtype = arithmetic.integer_dtype(jax.tree.leaves(init_w)[0])

    def init_carry(self) -> Carry:
        """Returns the carry before the first step: no velocity, an empty buffer."""
        init_w, estimator = self.init_w, self.estimator
        w = jax.tree.map(arithmetic.to_fixed_point, init_w)
        value = jax.eval_shape(
            lambda w: self.problem.outer_value(w, self.alpha, self.outer_batch), init_w
        )
        zero = jnp.zeros((), scalar_dtype(init_w))
        return Carry(
            w=w,
            v=optax.tree.zeros_like(w),
            buffer=arithmetic.empty_buffer(
                init_w, estimator.num_buffer_bytes, estimator.num_steps
            ),
            w_bar=optax.tree.zeros_like(widen(init_w)),
            v_bar=optax.tree.zeros_like(widen(init_w)),
            alpha_bar=optax.tree.zeros_like(widen(self.alpha)),
            direct=optax.tree.zeros_like(widen(self.alpha)),
            is_in_range=jnp.asarray(True),
            rounding_variance=zero,
            momentum_change=zero,
            outer_unit=zero + 1,
            reference=zero,
            resolution=zero,
            value=jnp.zeros(value.shape, value.dtype),
            final_w=init_w,
        )

    def to_floats(self, integers: PyTree) -> PyTree:
        """Returns fixed-point integers as numbers in the dtypes of ``w``."""
        return jax.tree.map(arithmetic.from_fixed_point, integers, self.init_w)

    def update_w(self, carry: Carry, t: Array | int) -> Carry:
        """Moves from ``w_{t-1}`` to ``w_t = w_{t-1} - r_{t-1} v_t``."""
        displacement = self._displacement(carry, t)
        w = jax.tree.map(jnp.subtract, carry.w, displacement)
        is_in_range = arithmetic.integers_are_in_range((displacement, w))
        is_in_range &= carry.is_in_range
        return dataclasses.replace(carry, w=w, is_in_range=is_in_range)

    def undo_update_w(self, carry: Carry, t: Array | int) -> Carry:
        """Undoes `update_w`, and pulls the adjoints back through it."""
        w = jax.tree.map(jnp.add, carry.w, self._displacement(carry, t))
        rate, pullback = jax.vjp(lambda alpha: self._rate_before(alpha, t), self.alpha)
        # The displacement was rounded to a unit.
        variance = self._variance(carry, carry.w_bar) / 12
        # v_bar <- v_bar - r w_bar,   r_bar = -<w_bar, v_t>
        v_bar = add_scale(carry.v_bar, -rate, carry.w_bar)
        rate_bar = -vdot(carry.w_bar, self.to_floats(carry.v)).astype(rate.dtype)
        (rate_term,) = pullback(rate_bar)
        alpha_bar = optax.tree.add(carry.alpha_bar, rate_term)
        return dataclasses.replace(
            carry,
            w=w,
            v_bar=v_bar,
            alpha_bar=alpha_bar,
            rounding_variance=carry.rounding_variance + variance,
        )

    def update_v(self, carry: Carry, t: Array, g: PyTree, batch: PyTree) -> Carry:
        """Moves from ``v_t`` to ``v_{t+1} = m_t v_t + g``."""
        del batch
        _, momentum = self.estimator.rate_and_momentum(self.alpha, t)
        buffer, v = arithmetic.multiply(carry.buffer, carry.v, momentum, t)
        v = jax.tree.map(lambda v, g: v + arithmetic.to_fixed_point(g), v, g)
        is_in_range = arithmetic.floats_are_in_range(g)
        is_in_range &= arithmetic.integers_are_in_range(v)
        is_in_range &= arithmetic.is_valid_momentum(momentum)
        is_in_range &= carry.is_in_range
        return dataclasses.replace(carry, v=v, buffer=buffer, is_in_range=is_in_range)

    def undo_update_v(self, carry: Carry, t: Array, g: PyTree, batch: PyTree) -> Carry:
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

    def evaluate_outer(self, carry: Carry) -> Carry:
        """Moves to ``w_T``, evaluates the outer loss there, and moves back."""
        num_steps = self.estimator.num_steps
        carry = self.update_w(carry, num_steps)
        final_w = self.to_floats(carry.w)
        # w_bar = dM/dw and alpha_bar = dM/dalpha at w_T
        value, w_bar, alpha_bar = self.problem.outer_value_and_grads(
            final_w, self.alpha, self.outer_batch
        )
        outer_unit = power_of_two_scale(w_bar).astype(carry.outer_unit.dtype)
        scaled_bar = divide(w_bar, outer_unit)
        reference = reference_change(scaled_bar, self.init_w, final_w)
        num_bits = arithmetic.num_fraction_bits(self.dtype)
        unit = arithmetic.denominator(self.dtype) * 2.0**-num_bits
        resolution = ratio(unit * norm(widen(scaled_bar)), reference)
        # The error of a dM/dw that rounding may have made zero is not known.
        point = final_w, self.alpha, self.outer_batch
        depends_on_w = any(uses_w(loss, *point) for loss in self.problem.outer_losses)
        is_lost = depends_on_w & (underflows(w_bar) | (reference == 0))
        variance = jnp.where(is_lost, jnp.inf, carry.rounding_variance)
        carry = dataclasses.replace(
            carry,
            value=value,
            rounding_variance=variance,
            outer_unit=outer_unit,
            reference=reference.astype(carry.reference.dtype),
            resolution=jnp.maximum(resolution, max_rounding(final_w)).astype(
                carry.resolution.dtype
            ),
            w_bar=widen(w_bar),
            alpha_bar=widen(alpha_bar),
            direct=widen(alpha_bar),
            final_w=final_w,
        )
        return self.undo_update_w(carry, num_steps)

    def relative_rounding_errors(self, carry: Carry) -> tuple[Array, Array]:
        """Returns twice the standard deviation of the outer value by ``reference``.

        The second number includes the change by the rounding of the momentum, which is
        no noise that the steps amplify. Rounding changes the adjoints about as much as
        ``w``.
        """
        # The starting point was rounded to a unit.
        variance = carry.rounding_variance + self._variance(carry, carry.w_bar) / 12
        # 0 if M does not depend on w, and infinite if w is 0 in fixed point.
        relative = lambda variance: ratio(2 * jnp.sqrt(variance), carry.reference)
        return relative(variance), relative(variance + carry.momentum_change**2)

    def _variance(
        self, carry: Carry, adjoint: PyTree, error: PyTree | None = None
    ) -> Array:
        """Returns ``||error * adjoint||^2``, by default for an error of one unit."""
        adjoint = divide(widen(adjoint), carry.outer_unit)
        if error is None:
            unit = 2.0 ** -arithmetic.num_fraction_bits(self.dtype)
            return unit**2 * vdot(adjoint, adjoint)
        product = jax.tree.map(jnp.multiply, adjoint, widen(error))
        return vdot(product, product)

    def _rate_before(self, alpha: PyTree, t: Array | int) -> Array:
        """Returns ``r_{t-1}``, and ``r_0`` at ``t = 0``, where ``v_0`` is zero.

        A schedule need not be defined before the first step.
        """
        rate, _ = self.estimator.rate_and_momentum(alpha, jnp.maximum(t - 1, 0))
        return rate

    def _displacement(self, carry: Carry, t: Array | int) -> PyTree:
        """Returns ``r_{t-1} v_t``, rounded to integers."""
        rate = self._rate_before(self.alpha, t)
        to_integer = lambda v: jnp.round(rate * v.astype(rate.dtype)).astype(self.dtype)
        return jax.tree.map(to_integer, carry.v)
