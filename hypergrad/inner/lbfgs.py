"""L-BFGS for the inner problem."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..batches import Data, full_batch
from ..number_checks import check_positive_int, non_negative
from ..products import Loss
from ..runtime.all_cores import loss_on_all_cores
from ..trees import divide, safe_norm
from .base import InnerStats, inner_stats
from .stopping import has_progressed, make_grad_tolerance, value_rounding_error

MAX_STALLED = 100  # steps in a row without progress; 30 are too few in float32


class LBFGS(eqx.Module):
    """Optax's L-BFGS with its zoom line search, run until the gradient is small.

    The solver uses all of the data, never a mini-batch. Its iterations must not be
    differentiated, because unrolled L-BFGS gives NaN: use `Implicit`.

    Args:
      max_steps: Maximum number of steps.
      tolerance: Relative size t of the gradient g at which the solver stops: when the
        entries with ``|g_i| > t |H w|_i`` have a norm of at most ``t ||g_0||``, with
        ``g_0`` and ``|H w|`` at the start. After a warm start ``g_0`` is small, so that
        the same t leads nearer to the minimum. Defaults to ``eps^(3/4)`` of the
        coarsest dtype of ``w``.
      memory_size: Number of pairs of steps and gradient changes that are kept.

    Cost:
      About one gradient per step; each evaluation of the line search is counted. One
      gradient more unless the start is zero.
    Memory: ``2 memory_size`` vectors like ``w``.
    Bias:
      None at a small enough tolerance. The statistic ``converged`` is 0 if the solver
      stopped above it: after its last step, or where the rounding of the loss hides
      any progress. It then returns the last step with progress.

    Source: Liu & Nocedal 1989.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> w, _ = hg.LBFGS().solve(
    ...     loss, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0)
    ... )
    >>> bool(jnp.allclose(w, 1.0, atol=1e-3))
    True
    """

    max_steps: int = eqx.field(static=True, default=1000)
    tolerance: float | Array | None = eqx.field(
        default=None, converter=non_negative("tolerance", optional=True)
    )
    memory_size: int = eqx.field(static=True, default=10)

    citations = ("liu1989", "deepmind2020jax")
    differentiable = False

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps)
        check_positive_int("memory_size", self.memory_size)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """Returns the minimum, the cost, and whether the tolerance was met."""
        batch = full_batch(data, key)
        inner_loss = loss_on_all_cores(inner_loss)
        loss = lambda w: inner_loss(w, alpha, batch)
        optimizer = optax.lbfgs(memory_size=self.memory_size)
        value, grad = jax.value_and_grad(loss)(w)
        grad_tol = make_grad_tolerance(self.tolerance, jax.grad(loss), w, grad)
        # The length of optax's first step is min(1, ||g||), which has units.
        # Its line search promotes w to the dtype of a step size.
        cast = lambda new_w: jax.tree.map(lambda x, y: x.astype(y.dtype), new_w, w)
        unit = jnp.where(grad_tol.unit > 0, grad_tol.unit, 1.0)
        loss = lambda w: inner_loss(cast(w), alpha, batch) / unit
        value, grad = value / unit, divide(grad, unit)

        def cond_fun(carry):
            _, _, (_, _, grad), num_steps, num_stalled, _ = carry
            can_progress = num_stalled < MAX_STALLED
            is_met = grad_tol.is_met(grad, unit)
            return (num_steps < self.max_steps) & can_progress & ~is_met

        def body_fun(carry):
            state, (w, value, grad), best, num_steps, num_stalled, num_grads = carry
            new_state: Any
            updates, new_state = optimizer.update(
                grad, state, w, value=value, grad=grad, value_fn=loss
            )
            # The line search ended at the new w and keeps its value and gradient.
            line_search = new_state[-1]
            value, grad = line_search.value.astype(value.dtype), line_search.grad
            point = (optax.apply_updates(w, updates), value, grad)
            _, best_value, best_grad = best
            is_progress = has_progressed(best_value, best_grad, value, grad)
            # The loss may hide progress by rounding, but a step that raises it fails.
            is_level = value <= best_value + value_rounding_error(best_value)
            is_level = is_level & jnp.isfinite(safe_norm(grad))
            num_stalled = jnp.where(is_level, num_stalled + 1, MAX_STALLED)
            return (
                new_state,
                point,
                optax.tree.where(is_progress, point, best),
                num_steps + 1,
                jnp.where(is_progress, 0, num_stalled),
                num_grads + line_search.info.num_linesearch_steps,
            )

        zero = jnp.asarray(0)
        point = (w, value, grad)
        init_carry = (optimizer.init(w), point, point, zero, zero, zero)
        final_carry = jax.lax.while_loop(cond_fun, body_fun, init_carry)
        _, _, (w, _, grad), num_steps, _, num_grads = final_carry
        num_grads = num_grads + grad_tol.num_grads + 1
        converged = grad_tol.is_met(grad, unit)
        return w, inner_stats(num_steps, num_grads, converged=converged)
