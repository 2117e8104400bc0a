"""The package's only second derivatives, as products with vectors.

All functions are matrix-free and take pytrees. ``loss(w, alpha, batch)`` is twice
differentiable, ``H = d2L/dw2`` is its Hessian in ``w`` and ``J = d2L/dw dalpha`` its
cross derivative. Every product is forward over reverse: one forward-mode derivative of
one gradient, for about the work of two gradients.

The loss is compiled as a function of its own, so that JAX traces it once for all
products at arguments of the same shapes.

For several right-hand sides, apply `jax.vmap` over the vector: the gradient at w
is evaluated once and the columns share one matrix product.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

Loss = Callable[[PyTree, PyTree, PyTree], Any]


def hvp(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree) -> PyTree:
    """Returns the Hessian-vector product ``H v``, structured like ``w``.

    Cost: two gradients.
    """
    grad_fn = lambda w: jax.grad(eqx.filter_jit(loss))(w, alpha, batch)
    return jax.jvp(grad_fn, (w,), (v,))[1]


def cross_vjp(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree) -> PyTree:
    """Returns the cross product ``J' v``, structured like ``alpha``.

    Second derivatives commute, so ``J' v`` is the derivative of ``dL/dalpha`` along
    ``v``; no reverse pass over a reverse pass is needed.

    Cost: two gradients.
    """
    alpha_grad_fn = lambda w: jax.grad(eqx.filter_jit(loss), argnums=1)(w, alpha, batch)
    return jax.jvp(alpha_grad_fn, (w,), (v,))[1]


def cross_jvp(
    loss: Loss, w: PyTree, args: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> PyTree:
    """Returns the derivative of ``dL/dw`` along ``tangents``, structured like ``w``.

    Args:
      loss: ``(w, *args) -> scalar``.
      w: Point of evaluation.
      args: All arguments of the loss after ``w``.
      tangents: Tangents of ``args``; integer leaves have ``float0`` tangents.

    Cost: two gradients.
    """
    grad_fn = lambda *args: jax.grad(eqx.filter_jit(loss))(w, *args)
    return jax.jvp(grad_fn, args, tangents)[1]


def grad_and_cross_jvps(
    loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, directions: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns ``dL/dw`` and ``J u`` for several directions ``u`` of ``alpha``.

    Args:
      loss, w, alpha, batch: The loss and its arguments.
      directions: Tangents of ``alpha`` with a leading axis, ``[m, ...]``. The products
        have the same leading axis.

    Cost: two gradients per direction.
    """
    grad_fn = lambda alpha: jax.grad(eqx.filter_jit(loss))(w, alpha, batch)
    along = lambda direction: jax.jvp(grad_fn, (alpha,), (direction,))
    return jax.vmap(along, out_axes=(None, 0))(directions)


def hvp_and_cross_vjp(
    loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """Returns ``dL/dw``, ``H v`` and ``J' v`` from one derivative of one gradient.

    Cost: two gradients.
    """
    grads_fn = lambda w: jax.grad(eqx.filter_jit(loss), argnums=(0, 1))(w, alpha, batch)
    (inner_grad, _), (Hv, cross) = jax.jvp(grads_fn, (w,), (v,))
    return inner_grad, Hv, cross


def gauss_newton_product(
    model_fn: Callable[..., PyTree], loss_fn: Callable[..., Any], w: PyTree, v: PyTree
) -> PyTree:
    """Returns ``Z' C Z v`` for ``loss_fn(model_fn(w))``, structured like ``w``.

    ``Z = d model_fn / dw`` and ``C`` is the Hessian of ``loss_fn`` in the outputs of
    model, so that the product is ``H v`` without the curvature of ``model_fn``.

    Cost: two gradients.
    """
    outputs, forward = jax.linearize(model_fn, w)
    backward = jax.linear_transpose(forward, w)
    (product,) = backward(jax.jvp(jax.grad(loss_fn), (outputs,), (forward(v),))[1])
    return product


def pushforward(
    f: Callable[[Array], PyTree], x: Array, directions: Array
) -> tuple[PyTree, PyTree]:
    """Returns ``f(x)`` and its derivatives along ``directions``.

    Args:
      f: Function to differentiate. It may contain gradients; its derivative is then
        forward over reverse.
      x: Point of evaluation.
      directions: Tangents of ``x`` with a leading axis, ``[n, ...]``. The derivatives
        have the same leading axis.

    Cost: ``f`` once, and n of its tangents in one batch.
    """
    along = lambda direction: jax.jvp(f, (x,), (direction,))
    return jax.vmap(along, out_axes=(None, 0))(directions)
