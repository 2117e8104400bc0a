"""Tolerance-driven inner solvers: Newton-CG, L-BFGS, and a closed form."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..control import unless
from ..linear.cg import conjugate_gradients
from ..problem import Data, whole
from ..products import Loss, hvp
from ..settings import check_steps, number, refuse_changing
from ..trees import add_scaled, dot, norm, scale
from .protocol import InnerStats, inner_stats

ARMIJO = 1e-4
HALVINGS = 60  # a nearly flat start asks for a step of 1/curvature
FORCING = 0.5


def _goal(tolerance: float | Array | None, gradient: PyTree) -> Array:
    """The gradient norm at which to stop, relative to the first."""
    first = norm(gradient)
    if tolerance is None:
        tolerance = float(jnp.finfo(first.dtype).eps) ** 0.75
    return jnp.asarray(tolerance, first.dtype) * jnp.maximum(first, 1.0)


def _noise(value: Array) -> Array:
    """How far a value can be off by rounding."""
    return 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)


def _moves(before: tuple[Array, PyTree], after: tuple[Array, PyTree]) -> Array:
    """Whether a step did more than rounding: lowered the value, or the gradient.

    A step that did not ends the run: nothing is left to gain in this precision.
    """
    (value, gradient), (next_value, next_gradient) = before, after
    lower = next_value < value - _noise(value)
    flatter = norm(next_gradient) < norm(gradient)
    return lower | (flatter & (next_value <= value + _noise(value)))


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
        default=None, converter=number("tolerance", least=0)
    )

    citations = ("dembo1982",)
    differentiable = False

    def __check_init__(self):
        check_steps("max_steps", self.max_steps)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w*, stats)``; same structure as ``w``."""
        batch = whole(data, key)
        loss = lambda w: inner_loss(w, alpha, batch)
        value, gradient = jax.value_and_grad(loss)(w)
        goal = _goal(self.tolerance, gradient)
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
            blocked = dot(d, gradient) >= 0

            def scaled_descent(_):  # as long as a step over that much curvature
                curvature = jnp.abs(dot(minus, matvec(minus)))
                length = jnp.where(curvature > 0, dot(minus, minus) / curvature, 1.0)
                return scale(length, minus)

            d = unless(~blocked, scaled_descent, d)
            slope = dot(d, gradient)

            # The whole step is mostly taken, so that a trial's gradient is the next.
            def at(length):
                there = add_scaled(w, length, d)
                return length, there, jax.value_and_grad(loss)(there)

            def too_long(search):
                (length, _, (trial, _)), tries = search
                enough = value + ARMIJO * length * slope + _noise(value)
                return ~(trial <= enough) & (tries < HALVINGS)

            halve = lambda search: (at(search[0][0] / 2), search[1] + 1)
            search = at(jnp.ones((), value.dtype)), jnp.asarray(1)
            trial, tries = jax.lax.while_loop(too_long, halve, search)
            found = ~too_long((trial, 0))
            keep = lambda new, old: optax.tree.where(found, new, old)
            w, after = keep(trial[1:], (w, (value, gradient)))
            moving = found & _moves((value, gradient), after)
            products = products + solved["num_products"] + jnp.where(blocked, 1, 0)
            return w, *after, k + 1, moving, products, grads + tries

        zero, one = jnp.asarray(0), jnp.asarray(1)
        carry = (w, value, gradient, zero, jnp.asarray(True), zero, one)
        w, _, _, k, _, products, grads = jax.lax.while_loop(unfinished, step, carry)
        return w, inner_stats(k, grads, products)


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
        default=None, converter=number("tolerance", least=0)
    )
    memory_size: int = eqx.field(static=True, default=10)

    citations = ("liu1989", "deepmind2020jax")
    differentiable = False

    def __check_init__(self):
        check_steps("max_steps", self.max_steps)
        check_steps("memory_size", self.memory_size)

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(w*, stats)``; same structure as ``w``."""
        batch = whole(data, key)
        loss = lambda w: inner_loss(w, alpha, batch)
        optimizer = optax.lbfgs(memory_size=self.memory_size)
        value, gradient = jax.value_and_grad(loss)(w)
        goal = _goal(self.tolerance, gradient)

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
            moving = _moves((value, gradient), (next_value, next_gradient))
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


class ClosedForm(eqx.Module):
    """``w* = fn(alpha, batch)``, where the inner problem has a formula.

    Args:
      fn: ``(alpha, batch) -> w*``, differentiable.

    Cost: counted as one gradient. Memory and bias: the formula's.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> solver = hg.ClosedForm(lambda alpha, batch: 2 * alpha)
    >>> w, _ = solver.solve(None, jnp.zeros(2), jnp.ones(2), None, jax.random.key(0))
    >>> w.tolist()
    [2.0, 2.0]
    """

    fn: Callable[[PyTree, PyTree], PyTree] = eqx.field(static=True)

    differentiable = True
    num_steps = 1

    def __check_init__(self):
        if not callable(self.fn):
            raise TypeError(f"fn must be a function; got {self.fn!r}")
        refuse_changing("fn", self.fn)

    def init(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, PyTree]:
        """``(w, ())``: a formula remembers nothing."""
        del inner_loss, alpha, data, key
        return w, ()

    def step(
        self,
        inner_loss: Loss,
        carry: tuple[PyTree, PyTree],
        alpha: PyTree,
        data: Data,
        key: Array,
    ) -> tuple[PyTree, PyTree]:
        """``(fn(alpha, batch), ())``, on all of the data."""
        del inner_loss, carry
        return self.fn(alpha, whole(data, key)), ()

    def solve(
        self, inner_loss: Loss, w: PyTree, alpha: PyTree, data: Data, key: Array
    ) -> tuple[PyTree, InnerStats]:
        """``(fn(alpha, batch), stats)``; ``w`` is not read."""
        w, _ = self.step(inner_loss, (w, ()), alpha, data, key)
        return w, inner_stats(1, num_grads=1)
