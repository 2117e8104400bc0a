"""Newton-CG for the inner problem."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..batches import Data, full_batch
from ..linear.base import MatVec
from ..linear.cg import conjugate_gradients
from ..number_checks import check_positive_int, non_negative
from ..products import Loss, hvp
from ..runtime.all_cores import loss_on_all_cores
from ..trees import (
    add_scale,
    apply_unless,
    divide,
    power_of_two_scale,
    safe_norm,
    scale,
    vdot,
)
from .base import InnerStats, inner_stats
from .stopping import has_progressed, make_grad_tolerance, value_rounding_error

ARMIJO = 1e-4  # fraction of the linear decrease that a step must reach
MAX_TRIALS = 60  # step sizes; from a nearly flat start the first is far too large
MAX_STALLED = 5  # steps in a row without progress, where the curvature is negative
MAX_FORCING_TERM = 0.5


class Newton(eqx.Module):
    """Newton-CG with a line search: ``H d = -dL/dw``, ``w <- w + t d``.

    Conjugate gradients solve for each direction ``d`` to a relative residual of
    ``min(1/2, sqrt(||g|| / ||g_0||))``, with ``g = dL/dw`` and ``g_0`` at the start. If
    they meet a direction of curvature that is not positive, ``d`` is their iterate so
    far, or ``-g`` times ``g'g / |g'Hg|`` if that is not a direction of descent, or
    ``-g / ||g||`` if ``g'Hg`` is zero. The line search halves the step until the loss
    decreases enough, up to rounding. A step without progress ends the run; if the
    curvature is negative, as near a saddle point that is flat in the precision of the
    loss, only the fifth in a row does. The solver uses all of the data, never a
    mini-batch.

    Args:
      max_steps: Maximum number of Newton steps.
      tolerance: Relative size t of the gradient g at which the solver stops: when the
        entries with ``|g_i| > t |H w|_i`` have a norm of at most ``t ||g_0||``, with
        ``g_0`` and ``|H w|`` at the start. After a warm start ``g_0`` is small, so that
        the same t leads nearer to the minimum. Defaults to ``eps^(3/4)`` of the
        coarsest dtype of ``w``.

    Cost:
      A few Hessian-vector products per step, and a gradient per step size that the line
      search tries, mostly one. One gradient more unless the start is zero. On smooth
      problems this is the fastest way to an accurate hypergradient.
    Memory: six vectors like ``w``.
    Bias:
      None at a small enough tolerance. The statistic ``converged`` is 0 if the solver
      stopped above it, after its last step or at the rounding of the loss.

    Source: Dembo, Eisenstat & Steihaug 1982; Nocedal & Wright, algorithm 7.1.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> w, stats = hg.Newton().solve(
    ...     loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0)
    ... )
    >>> bool(jnp.allclose(w, 1.0, atol=1e-4))
    True
    """

    max_steps: int = eqx.field(static=True, default=100)
    tolerance: float | Array | None = eqx.field(
        default=None, converter=non_negative("tolerance", optional=True)
    )

    citations = ("dembo1982",)
    differentiable = False

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns the minimum, the cost, and whether the tolerance was met."""
        batch = full_batch(data, key)
        loss = loss_on_all_cores(inner_loss)
        loss_and_grad = jax.value_and_grad(lambda w: loss(w, alpha, batch))
        value, grad = loss_and_grad(w)
        unit = power_of_two_scale(grad)  # so that the factor of the loss is about 1
        value_and_grad = lambda w: divide(loss_and_grad(w), unit)
        value, grad = divide((value, grad), unit)
        grad_fn = lambda w: value_and_grad(w)[1]
        grad_tol = make_grad_tolerance(self.tolerance, grad_fn, w, grad)

        def cond_fun(carry):
            _, _, grad, num_steps, num_stalled, *_ = carry
            can_progress = num_stalled < MAX_STALLED
            return (num_steps < self.max_steps) & can_progress & ~grad_tol.is_met(grad)

        def body_fun(carry):
            w, value, grad, num_steps, num_stalled, num_hvps, num_grads = carry
            matvec = lambda v: divide(hvp(inner_loss, w, alpha, batch, v), unit)
            # Inexact Newton is superlinear if the residual tolerance falls with ||g||.
            ratio = safe_norm(grad) / grad_tol.init_norm
            rtol = jnp.minimum(MAX_FORCING_TERM, jnp.sqrt(ratio))
            direction, num_products, is_curved = _descent_direction(matvec, grad, rtol)
            trial, is_accepted, num_trials = _line_search(
                value_and_grad, w, value, grad, direction
            )
            select = lambda new, old: optax.tree.where(is_accepted, new, old)
            w, (new_value, new_grad) = select(trial, (w, (value, grad)))
            is_progress = has_progressed(value, grad, new_value, new_grad)
            # Near a saddle the first steps down are below the rounding of the loss.
            may_leave_saddle = is_accepted & is_curved
            num_stalled = jnp.where(may_leave_saddle, num_stalled + 1, MAX_STALLED)
            num_stalled = jnp.where(is_accepted & is_progress, 0, num_stalled)
            return (
                w,
                new_value,
                new_grad,
                num_steps + 1,
                num_stalled,
                num_hvps + num_products,
                num_grads + num_trials,
            )

        zero = jnp.asarray(0)
        num_grads = grad_tol.num_grads + 1
        init_carry = (w, value, grad, zero, zero, zero, num_grads)
        final_carry = jax.lax.while_loop(cond_fun, body_fun, init_carry)
        w, _, grad, num_steps, _, num_hvps, num_grads = final_carry
        converged = grad_tol.is_met(grad)
        return w, inner_stats(num_steps, num_grads, num_hvps, converged=converged)


def _descent_direction(
    matvec: MatVec, grad: PyTree, rtol: Array
) -> tuple[PyTree, Array, Array]:
    """Returns a direction ``d`` with ``g'd < 0``, and how it was found.

    Returns:
      ``(d, num_products, is_curved)``; the last is True if the conjugate gradients met
      negative curvature.
    """
    negative_grad = scale(-1, grad)
    # H d = -g
    direction, _, stats = conjugate_gradients(
        matvec, negative_grad, rtol=rtol, options={"true_residual": False}
    )
    is_ascent = vdot(direction, grad) >= 0

    def scaled_negative_grad(_):
        # d = -g g'g / |g'Hg|, the Newton step along g for the curvature |g'Hg| / g'g.
        # Without curvature its length is 1, as that of the first step of L-BFGS.
        g = divide(grad, power_of_two_scale(grad))
        curvature, squared_norm = jnp.abs(vdot(g, matvec(g))), vdot(g, g)
        unit_step_size = 1 / safe_norm(grad)
        newton_step_size = squared_norm / curvature
        step_size = jnp.where(curvature > 0, newton_step_size, unit_step_size)
        return scale(step_size, negative_grad)

    direction = apply_unless(~is_ascent, scaled_negative_grad, direction)
    num_products = stats["num_products"] + jnp.where(is_ascent, 1, 0)
    return direction, num_products, stats["negative_curvature"]


def _line_search(
    value_and_grad: Callable[[PyTree], tuple[Array, PyTree]],
    w: PyTree,
    value: Array,
    grad: PyTree,
    direction: PyTree,
) -> tuple[tuple[PyTree, tuple[Array, PyTree]], Array, Array]:
    """Halves the step size, starting with 1, until the loss decreases enough.

    Returns:
      ``(new_w, (value, grad))`` of the last trial, whether it decreases the loss
      enough, and the number of trials.
    """
    slope = vdot(direction, grad)

    def evaluate(step_size):
        # The first trial is mostly accepted, and its gradient is that of the next step.
        new_w = add_scale(w, step_size, direction)
        return step_size, (new_w, value_and_grad(new_w))

    def is_sufficient(trial):
        # Armijo's condition L(w + t d) <= L(w) + c t g'd, up to rounding
        step_size, (_, (new_value, _)) = trial
        max_value = value + ARMIJO * step_size * slope + value_rounding_error(value)
        return new_value <= max_value

    def cond_fun(carry):
        trial, num_trials = carry
        return ~is_sufficient(trial) & (num_trials < MAX_TRIALS)

    def body_fun(carry):
        (step_size, _), num_trials = carry
        return evaluate(step_size / 2), num_trials + 1

    init_carry = evaluate(jnp.ones((), value.dtype)), jnp.asarray(1)
    trial, num_trials = jax.lax.while_loop(cond_fun, body_fun, init_carry)
    return trial[1], is_sufficient(trial), num_trials
