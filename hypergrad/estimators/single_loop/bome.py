"""BOME, first-order bilevel optimization with a dynamic barrier (Liu et al. 2022)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...number_checks import check_positive_int, positive, positive_up_to
from ...problem import Bilevel, EstimateData
from ...runtime.all_cores import loss_on_all_cores
from ...trees import add_scale, divide, power_of_two_scale, vdot
from .base import SingleLoop, SingleLoopState, Step, batch_fractions, sample_batches


class BOME(SingleLoop):
    """Moves ``(w, alpha)`` along the outer gradient, with a barrier on the inner loss.

    The direction is ``grad M + mu grad q`` with the value-function constraint
    ``q = L(w, alpha) - L(w_m, alpha)``, where ``w_m`` is the result of ``num_steps``
    steps of gradient descent from ``w`` and is held constant, and

        mu = max((eta ||grad q||^2 - <grad M, grad q>) / ||grad q||^2, 0),

    the smallest multiplier for which ``q`` decreases at the rate ``eta ||grad q||^2``.

    Args:
      optimizer: Optax transformation for ``w``. The paper uses one rate for ``w`` and
        ``alpha``; that of ``alpha`` is the optimizer of `minimize`.
      num_steps: Number m of steps of gradient descent.
      step_size: Step size of the gradient descent.
      eta: Rate of the barrier, in (0, 1]. Defaults to 0.5.

    Cost: ``m + 1`` gradients and one outer gradient on a batch each; no Hessian-vector
      product.
    Memory: three vectors like ``w``.
    Bias: the lag of ``w`` behind ``alpha``. The direction for ``alpha`` estimates the
      hypergradient only together with the direction for ``w``. Target: argmin.

    Source: Liu, Ye, Wright, Stone & Liu 2022 (arXiv 2209.08709).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.BOME(optax.sgd(0.1), 10, step_size=0.5),
    ...     optax.sgd(0.1), 0.0, 3.0, num_steps=1000,
    ... )
    >>> round(float(trace.alpha), 2)
    1.0
    """

    num_steps: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(kw_only=True, converter=positive("step_size"))
    eta: Array | float = eqx.field(
        default=0.5, kw_only=True, converter=positive_up_to("eta", 1)
    )

    citations = ("liu2022",)
    summary = (
        MethodSummary(
            "BOME(optimizer, m)",
            num_grads="m + 1",
            num_hvps="0",
            memory="3 w and the optimizer's",
            bias="what w lags behind",
            alpha_in=("losses",),
            recommended_for="several inner minima, first derivatives only",
            not_recommended_for="noisy batches: the barrier is a ratio of noisy terms",
            reason="a barrier on the inner loss in place of an inverse",
        ),
    )

    def __check_init__(self):
        check_positive_int("num_steps", self.num_steps)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Evaluates both directions on one batch of each loss and moves ``w``."""
        w = state.w
        batch, outer_batch = sample_batches(data)
        inner_loss = loss_on_all_cores(problem.inner_loss)
        inner_grads = jax.grad(inner_loss, argnums=(0, 1))

        # w_m: m steps of gradient descent from w
        w_grad, alpha_grad = inner_grads(w, alpha, batch)
        w_1 = add_scale(w, -self.step_size, w_grad)
        descend = lambda _, w: add_scale(
            w, -self.step_size, inner_grads(w, alpha, batch)[0]
        )
        w_m = jax.lax.fori_loop(1, self.num_steps, descend, w_1)

        # grad q = (dL/dw(w), dL/dalpha(w) - dL/dalpha(w_m))
        _, alpha_grad_m = inner_grads(w_m, alpha, batch)
        grad_q = w_grad, optax.tree.sub(alpha_grad, alpha_grad_m)
        value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)
        grad_M = b, direct

        # If grad q = 0, the constraint cannot decrease further, and mu = 0.
        # mu = max((eta ||grad q||^2 - <grad M, grad q>) / ||grad q||^2, 0)
        # Divided by its size, grad q has squares that do not underflow; mu is
        # multiplied by that size in turn.
        unit = power_of_two_scale(grad_q)
        grad_q = divide(grad_q, unit)
        square = vdot(grad_q, grad_q)
        numerator = self.eta * unit * square - vdot(grad_M, grad_q)
        unit_mu = jnp.where(square > 0, numerator / jnp.where(square > 0, square, 1), 0)
        # grad M + mu grad q
        w_direction, direction = add_scale(grad_M, jnp.maximum(unit_mu, 0), grad_q)

        inner_fraction, outer_fraction = batch_fractions(data)
        counts = {
            "num_grads": inner_fraction * (self.num_steps + 1),
            "num_outer_grads": outer_fraction,
        }
        step = Step(value, direction, w, w_grad, counts)
        return step, self.move_w(state, w_direction)
