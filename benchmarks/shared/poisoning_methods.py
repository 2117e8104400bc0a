"""Two attacks of Mehra & Hamm: the approximate gradient and the penalty method.

Both expect losses and variables of `poisoning_data`: ``w`` has an axis of independent
attacks, and the outer variable is a tuple of one array of images for each attack.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from hypergrad.extend import (
    EstimateData,
    SingleLoop,
    SingleLoopState,
    Step,
    hvp,
    hvp_and_cross_vjp,
    sample_batches,
)
from hypergrad.problem import Bilevel

GROWTH, DECAY = 1.1, 0.9  # of the penalty, and of tolerance, lambda and rates


class ApproximateGradient(SingleLoop):
    """Inner steps, then steps on the squared residual of the adjoint system.

    With ``B(v) = ||H v + damping v - dM/dw||^2``, a step makes ``num_steps`` steps of
    ``w`` along ``dL/dw``, as many of ``v`` along ``dB/dv``, and returns the direction
    ``dM/dalpha - J' v``. The authors take Adam for both.
    """

    adjoint_optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    damping: float = eqx.field(static=True)

    uses_adjoint = True

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes the steps of ``w`` and ``v``, on all data."""
        batch, outer_batch = sample_batches(data)
        inner_grad = lambda w: jax.grad(problem.inner_loss)(w, alpha, batch)
        descend = lambda _, state: self.move_w(state, inner_grad(state.w))
        state = jax.lax.fori_loop(0, self.num_steps, descend, state)
        w = state.w
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)

        def apply_damped(v: Array) -> Array:
            return hvp(problem.inner_loss, w, alpha, batch, v) + self.damping * v

        def solve(_: int, state: SingleLoopState) -> SingleLoopState:
            # dB/dv = 2 (H + damping) (H v + damping v - b)
            return self.move_v(state, 2 * apply_damped(apply_damped(state.v) - b))

        state = jax.lax.fori_loop(0, self.num_steps, solve, state)
        gradient, Hv, cross = hvp_and_cross_vjp(
            problem.inner_loss, w, alpha, batch, state.v
        )
        counts = {
            "num_grads": self.num_steps,
            "num_hvps": 2 * self.num_steps + 1,
            "num_outer_grads": 1,
        }
        direction = optax.tree.sub(direct, cross)
        residual = Hv + self.damping * state.v - b
        step = Step(value, direction, w, gradient, counts, residual, b, self.num_steps)
        return step, state


class PenaltyMemory(eqx.Module):
    """State of `GradientPenalty`, with an axis of attacks.

    Attributes:
      alpha_opt_state: State of the optimizer of ``alpha``.
      nu: Multipliers of ``dL/dw = 0``, shaped like ``w``.
      rho: Strengths of the penalty.
      lam: Weights of the inner loss.
      eps: Tolerances.
      rate: Factors of the rates.
    """

    alpha_opt_state: PyTree
    nu: Array
    rho: Array
    lam: Array
    eps: Array
    rate: Array


class GradientPenalty(SingleLoop):
    """The stationarity of the inner problem as a penalty, with multipliers.

    With ``g = dL/dw`` the two functions are

        h(w, alpha) = M + nu . g + rho ||g||^2 / 2,    h_w = h + lam L.

    A step makes ``num_steps`` steps of ``w`` along ``dh_w/dw`` and one of ``alpha``
    along ``dh/dalpha``, projected to [0, 1]. If then
    ``||dh/dalpha||^4 + ||dh_w/dw||^4 < eps^2``, ``rho`` grows by 1.1, ``lam``, ``eps``
    and both rates fall by 0.9, and ``nu`` moves by ``rho g``. The rate of ``alpha``
    depends on the state, so that its optimizer is a field, and the direction is the
    negative step: the optimizer of the outer loop must be ``optax.sgd(1.0)``.
    """

    alpha_optimizer: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    rho: float = eqx.field(static=True)
    lam: float = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> PenaltyMemory:
        """Returns zero multipliers and the first numbers."""
        del problem
        ones = jnp.ones(len(alpha))
        return PenaltyMemory(
            self.alpha_optimizer.init(alpha),
            jnp.zeros_like(state.w),
            self.rho * ones,
            self.lam * ones,
            self.eps * ones,
            ones,
        )

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Moves ``w``, returns the step of ``alpha``, and updates the penalty."""
        batch, outer_batch = sample_batches(data)
        memory: PenaltyMemory = state.memory
        scale = lambda factors, x: factors[:, None, None] * x

        def gradients(w: Array, alpha: PyTree) -> tuple[Array, ...]:
            """Returns M, ``dh_w/dw``, ``dh/dalpha`` and ``dL/dw``."""
            value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
            g = jax.grad(problem.inner_loss)(w, alpha, batch)
            # d/d(w, alpha) (nu . g + rho ||g||^2 / 2) = (H c, J' c), c = nu + rho g
            c = memory.nu + scale(memory.rho, g)
            _, Hc, cross = hvp_and_cross_vjp(problem.inner_loss, w, alpha, batch, c)
            w_grad = b + Hc + scale(memory.lam, g)
            return value, w_grad, optax.tree.add(direct, cross), g

        def descend(_: int, carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            w, opt_state = carry
            w_grad = gradients(w, alpha)[1]
            updates, opt_state = self.optimizer.update(w_grad, opt_state, w)
            return w + scale(memory.rate, updates), opt_state

        w, w_opt_state = jax.lax.fori_loop(
            0, self.num_steps, descend, (state.w, state.w_opt_state)
        )
        value, _, alpha_grad, inner_grad = gradients(w, alpha)
        updates: Any
        updates, alpha_opt_state = self.alpha_optimizer.update(
            alpha_grad, memory.alpha_opt_state, alpha
        )
        new_alpha = tuple(
            jnp.clip(x + rate * update, 0, 1)
            for x, rate, update in zip(alpha, memory.rate, updates, strict=True)
        )
        _, w_grad, alpha_grad, g = gradients(w, new_alpha)
        squares = jnp.stack([jnp.sum(x**2) for x in alpha_grad])
        measure = squares**2 + jnp.sum(w_grad**2, axis=(1, 2)) ** 2
        memory = replace(memory, alpha_opt_state=alpha_opt_state)
        memory = update_penalty(memory, measure < memory.eps**2, g)
        num_calls = self.num_steps + 2
        counts = {
            "num_grads": num_calls,
            "num_hvps": num_calls,
            "num_outer_grads": num_calls,
        }
        direction = optax.tree.sub(alpha, new_alpha)
        step = Step(
            value, direction, w, inner_grad, counts, num_inner_steps=self.num_steps
        )
        return step, replace(state, w=w, w_opt_state=w_opt_state, memory=memory)


def update_penalty(
    memory: PenaltyMemory, has_converged: Array, g: Array
) -> PenaltyMemory:
    """Returns the state in which the attacks that have converged have new numbers."""
    growth = jnp.where(has_converged, GROWTH, 1.0)
    decay = jnp.where(has_converged, DECAY, 1.0)
    rho = growth * memory.rho
    # The authors' program has the new rho before it moves nu.
    nu_step = jnp.where(has_converged, rho, 0.0)[:, None, None] * g
    return PenaltyMemory(
        memory.alpha_opt_state,
        memory.nu + nu_step,
        rho,
        decay * memory.lam,
        decay * memory.eps,
        decay * memory.rate,
    )
