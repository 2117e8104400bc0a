"""L-BFGS for the inner problem."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..problem import Data, full_batch
from ..products import Loss
from ..trees import norm
from ..validation import check_positive_int, float_converter
from .base import InnerStats, gradient_tolerance, inner_stats, is_progressing


class LBFGS(eqx.Module):
    """Optax's L-BFGS with its zoom line search, run until the gradient is small.

    Args:
      max_steps: steps at the most.
      tolerance: stop at ``||dL/dw|| <= tolerance max(1, ||dL/dw at the start||)``;
        None means ``eps^(3/4)`` of the dtype.
      memory_size: pairs kept.

    Not differentiable step by step (unrolled L-BFGS gives NaN): use `Implicit`.

    Cost: about one gradient a step, each evaluation of the line search counted.
    Memory: ``2 memory_size`` vectors like ``w``. Bias: none at its tolerance. Uses all
    of the data, never a mini-batch.

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
        default=None, converter=float_converter("tolerance", minimum=0)
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
        """``(w*, stats)``; same structure as ``w``."""
        batch = full_batch(data, key)
        loss = lambda w: inner_loss(w, alpha, batch)
        optimizer = optax.lbfgs(memory_size=self.memory_size)
        value, gradient = jax.value_and_grad(loss)(w)
        goal = gradient_tolerance(self.tolerance, gradient)

        def unfinished(carry):
            _, _, _, gradient, k, moving, _ = carry
            return (k < self.max_steps) & moving & (norm(gradient) > goal)

        def step(carry):
            w, state, value, gradient, k, _, evaluations = carry
            next_state: Any
            updates, next_state = optimizer.update(
                gradient, state, w, value=value, grad=gradient, value_fn=loss
            )
            next_w = optax.apply_updates(w, updates)
            search = next_state[-1]  # the zoom line search's, which ended at next_w
            next_value, next_gradient = search.value, search.grad
            evaluations = evaluations + search.info.num_linesearch_steps
            moving = is_progressing((value, gradient), (next_value, next_gradient))
            keep = lambda new, old: optax.tree.where(moving, new, old)
            return (
                keep(next_w, w),
                next_state,
                keep(next_value, value),
                keep(next_gradient, gradient),
                k + 1,
                moving,
                evaluations,
            )

        zero = jnp.asarray(0)
        true = jnp.asarray(True)
        carry = (w, optimizer.init(w), value, gradient, zero, true, zero)
        w, _, _, _, k, _, evaluations = jax.lax.while_loop(unfinished, step, carry)
        return w, inner_stats(k, num_grads=evaluations + 1)
