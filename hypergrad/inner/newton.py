"""Newton-CG for the inner problem."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..linear.cg import conjugate_gradients
from ..problem import Data, full_batch
from ..products import Loss, hvp
from ..trees import add_scale, apply_unless, norm, scale, vdot
from ..validation import check_positive_int, float_converter
from .base import (
    InnerStats,
    gradient_tolerance,
    inner_stats,
    is_progressing,
    value_rounding_error,
)

ARMIJO = 1e-4
HALVINGS = 60  # a nearly flat start asks for a step of 1/curvature
FORCING = 0.5


class Newton(eqx.Module):
    """Newton-CG with a line search: ``H d = -dL/dw``, ``w <- w + t d``.

    Args:
      max_steps: Newton steps at the most.
      tolerance: stop at ``||dL/dw|| <= tolerance max(1, ||dL/dw at the start||)``;
        None means ``eps^(3/4)`` of the dtype.

    Each direction is solved by conjugate gradients to a relative residual of
    ``min(1/2, sqrt(||g|| / ||g_0||))``, on the same products as the adjoint; where
    the curvature is not positive, the direction is the iterate so far, or else ``-g``
    scaled by ``g'g / |g'Hg|``. The line search halves until the loss falls enough,
    allowing for rounding.

    Cost: a few Hessian-vector products a step, and a gradient for each length that the
    line search tries, mostly one; the fastest road to an accurate hypergradient on
    smooth problems. Memory: six vectors like ``w``. Bias: none at its tolerance. Uses
    all of the data, never a mini-batch.

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
        default=None, converter=float_converter("tolerance", minimum=0)
    )

    citations = ("dembo1982",)
    differentiable = False

    def __check_init__(self):
        check_positive_int("max_steps", self.max_steps)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w*, stats)``; same structure as ``w``."""
        batch = full_batch(data, key)
        loss = lambda w: inner_loss(w, alpha, batch)
        value, gradient = jax.value_and_grad(loss)(w)
        goal = gradient_tolerance(self.tolerance, gradient)
        first = norm(gradient)

        def unfinished(carry):
            _, _, gradient, k, moving, *_ = carry
            return (k < self.max_steps) & moving & (norm(gradient) > goal)

        def step(carry):
            w, value, gradient, k, _, products, grads = carry
            forcing = jnp.minimum(FORCING, jnp.sqrt(norm(gradient) / first))
            matvec = lambda v: hvp(inner_loss, w, alpha, batch, v)
            minus = scale(-1, gradient)
            d, _, solved = conjugate_gradients(
                matvec, minus, forcing, None, {"true_residual": False}, lambda r: r
            )
            blocked = vdot(d, gradient) >= 0

            def scaled_descent(_):  # as long as a step over that much curvature
                curvature = jnp.abs(vdot(minus, matvec(minus)))
                length = jnp.where(curvature > 0, vdot(minus, minus) / curvature, 1.0)
                return scale(length, minus)

            d = apply_unless(~blocked, scaled_descent, d)
            slope = vdot(d, gradient)

            # The whole step is mostly taken, so that a trial's gradient is the next.
            def at(length):
                there = add_scale(w, length, d)
                return length, there, jax.value_and_grad(loss)(there)

            def too_long(search):
                (length, _, (trial, _)), tries = search
                enough = value + ARMIJO * length * slope + value_rounding_error(value)
                return ~(trial <= enough) & (tries < HALVINGS)

            halve = lambda search: (at(search[0][0] / 2), search[1] + 1)
            search = at(jnp.ones((), value.dtype)), jnp.asarray(1)
            trial, tries = jax.lax.while_loop(too_long, halve, search)
            found = ~too_long((trial, 0))
            keep = lambda new, old: optax.tree.where(found, new, old)
            w, after = keep(trial[1:], (w, (value, gradient)))
            moving = found & is_progressing((value, gradient), after)
            products = products + solved["num_products"] + jnp.where(blocked, 1, 0)
            return w, *after, k + 1, moving, products, grads + tries

        zero, one = jnp.asarray(0), jnp.asarray(1)
        carry = (w, value, gradient, zero, jnp.asarray(True), zero, one)
        w, _, _, k, _, products, grads = jax.lax.while_loop(unfinished, step, carry)
        return w, inner_stats(k, grads, products)
