"""Reverse mode through momentum descent that is run backwards, bit for bit."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ..batches import at_draw, sample_batch
from ..certificate import TRUST_RTOL
from ..checks.lost_derivatives import lost_in_rates_flags
from ..checks.problem import check_problem
from ..implicit.minimum import is_cancelled
from ..jaxprs.inspection import used_inputs
from ..method_summary import MethodSummary
from ..number_checks import check_positive_int, float_converter
from ..problem import Bilevel, EstimateData
from ..trees import all_finite, cast_like
from ..validation import check_not_optax_factory
from . import reversible_arithmetic as arithmetic
from .inner_run import InnerRunState, RunDerivative, RunEstimator
from .reversible_steps import MomentumSteps
from .rounding import loses_half_of_digits

MIN_MOMENTUM = 1 / arithmetic.MAX_DIVISOR


def _to_learning_rate(value: Any) -> Any:
    return _to_function_or_number("learning_rate", value)


def _to_momentum(value: Any) -> Any:
    return _to_function_or_number("momentum", value)


def _to_function_or_number(name: str, value: Any) -> Any:
    """Returns a function as it is, and a number as data."""
    check_not_optax_factory(name, value)
    return value if callable(value) else _to_number(name, value)


def _to_number(name: str, value: Any) -> Any:
    """Returns a number; raises an error for anything else."""
    value = float_converter(name, optional=False)(value)
    if np.ndim(value):
        raise ValueError(f"{name} must be one number; got shape {np.shape(value)}.")
    return value


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
      outer_batch_size: As in `Unrolled`.

    Cost: 2 T inner gradients and T Hessian-vector products with their cross term.
    Memory: six vectors like ``w`` and the buffer: 0.15 bits per number and step at a
      momentum of 0.9.
    Target: solver.
    Bias: a resolution. Steps are rounded to 2^-46 and velocities to 2^-34 in float64,
      to 2^-23 and 2^-15 in float32, which is coarse. An estimate is trusted if no
      number left the range of the integers (65,536, or 128 in float32), the momentum
      stayed in its range, the run came back to its starting point in every bit, and
      ``error_estimate`` is at most 1e-2. It is twice the standard deviation of the
      outer value by the rounding of all steps, computed from the adjoints, relative to
      ``||(|w_0| + |w_T|) dM/dw||``. Without the rounding of the momentum it must also
      be at most the root of the relative change of the outer value by one unit of the
      velocities, so that this value keeps half of its digits. Numbers that the integers
      do not resolve, and runs that amplify rounding errors, are therefore not trusted,
      nor are hypergradients whose two parts cancel up to rounding.

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

    learning_rate: float | Array | Callable[[PyTree], Any] = eqx.field(
        converter=_to_learning_rate
    )
    momentum: float | Callable[[PyTree], Any] = eqx.field(
        static=True, converter=_to_momentum
    )
    num_steps: int = eqx.field(static=True)
    min_momentum: float | None = eqx.field(static=True, default=None)

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

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)
        if self.min_momentum is None:
            if callable(self.momentum):
                raise ValueError(
                    "min_momentum must be given if momentum is a function, because the "
                    "buffer holds log2(1 / min_momentum) bits per number and step."
                )
        else:
            max_momentum: Any = 1.0 if callable(self.momentum) else self.momentum
            if _to_number("min_momentum", self.min_momentum) > max_momentum:
                raise ValueError(
                    f"min_momentum must be at most the momentum {max_momentum}; got "
                    f"{self.min_momentum}."
                )
        if not MIN_MOMENTUM <= self._smallest_momentum < 1:
            raise ValueError(
                f"momentum must be in [1/16, 1); got {self._smallest_momentum!r}. Use "
                "hg.Unrolled for descent with less momentum."
            )

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns a bound far above the error of the resolution."""
        return 1e-3

    @property
    def num_buffer_bytes(self) -> int:
        """Bytes of the buffer per number of ``w``, besides its 32 bits."""
        return arithmetic.num_stack_bytes(self.num_steps, self._smallest_momentum)

    @property
    def _smallest_momentum(self) -> float:
        """``min_momentum``, or the momentum if it is the only one."""
        momentum: Any = self.momentum
        return float(momentum) if self.min_momentum is None else self.min_momentum

    def rate_and_momentum(
        self, alpha: PyTree, step: Array | int
    ) -> tuple[Array, Array]:
        """Returns ``r`` and ``m`` of a step."""

        def evaluate(name: str) -> Array:
            value = getattr(self, name)
            value = value(alpha) if callable(value) else value
            value = value(step) if callable(value) else value
            if value is None or np.ndim(value):
                got = "None" if value is None else f"shape {np.shape(value)}"
                raise ValueError(
                    f"{name} must be a function of alpha that returns a number, or a "
                    f"schedule of numbers; got {got}."
                )
            return jnp.asarray(value, dtype=float)

        return evaluate("learning_rate"), evaluate("momentum")

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
        steps = MomentumSteps(self, problem, alpha, outer_batch, init_w)
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
            step_data = at_draw(
                data.inner_data, data.solver_key, t, self.num_steps, stream="w"
            )
            batch = sample_batch(step_data, keys[t])
            # Both directions share one gradient, so that it cannot round in two ways.
            current_w = steps.to_floats(carry.w)
            g = jax.grad(problem.inner_loss)(current_w, alpha, batch)
            carry = jax.lax.cond(
                is_forward, steps.update_v, steps.undo_update_v, carry, t, g, batch
            )
            return jax.lax.cond(is_forward, identity, steps.undo_update_w, carry, t)

        carry = jax.lax.fori_loop(0, 2 * self.num_steps, body_fun, init_carry)
        rounding_error, error_estimate = steps.relative_rounding_errors(carry)
        (init_term,) = init_pullback(cast_like(carry.w_bar, init_w))
        hypergradient = cast_like(optax.tree.add(carry.alpha_bar, init_term), alpha)
        indirect = optax.tree.sub(hypergradient, carry.direct)
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
                "rounding_error": ~(error_estimate <= TRUST_RTOL)
                | loses_half_of_digits(rounding_error, carry.resolution)
                | is_cancelled(hypergradient, indirect, carry.final_w),
                **lost_in_rates_flags(self, alpha),
            },
            num_steps=self.num_steps,
            num_grads=2 * self.num_steps,
            num_hvps=self.num_steps,
            error_estimate=error_estimate,
        )
