"""The package's only second derivatives, as products with vectors.

Everything here is matrix-free and takes pytrees. ``loss(w, alpha, batch)`` is
twice differentiable, ``H = d²L/dw²`` is its Hessian in ``w`` and
``J = d²L/dw dalpha`` the cross derivative. All products are forward over reverse:
one forward-mode derivative of one gradient, about two gradients of work.

For several right-hand sides, ``jax.vmap`` over the vector: the gradient at the
point is evaluated once and the columns share one matrix product.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

Loss = Callable[[PyTree, PyTree, PyTree], Any]


def hvp(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree) -> PyTree:
    """Hessian-vector product ``H v``; same structure as ``w``. Costs two gradients."""
    gradient = lambda w: jax.grad(loss)(w, alpha, batch)
    return jax.jvp(gradient, (w,), (v,))[1]


def cross_vjp(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree) -> PyTree:
    """Cross product ``Jᵀ v``; same structure as ``alpha``. Costs two gradients.

    Second derivatives commute, so ``Jᵀ v`` is the derivative of ``dL/dalpha`` along
    ``v``: no reverse pass over a reverse pass.
    """
    gradient = lambda w: jax.grad(loss, argnums=1)(w, alpha, batch)
    return jax.jvp(gradient, (w,), (v,))[1]


def cross_jvp(
    loss: Loss, w: PyTree, args: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> PyTree:
    """Derivative of ``dL/dw`` along ``tangents`` of ``args``; like ``w``.

    ``args`` are all arguments of the loss after ``w``; integer leaves have ``float0``
    tangents. Costs two gradients.
    """
    gradient = lambda *args: jax.grad(loss)(w, *args)
    return jax.jvp(gradient, args, tangents)[1]


def hvp_and_cross(
    loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """``dL/dw``, ``H v`` and ``Jᵀ v`` from one derivative of one gradient."""
    gradient = lambda w: jax.grad(loss, argnums=(0, 1))(w, alpha, batch)
    (g, _), (Hv, JTv) = jax.jvp(gradient, (w,), (v,))
    return g, Hv, JTv


def gauss_newton_product(
    outputs: Callable[..., PyTree], cost: Callable[..., Any], w: PyTree, v: PyTree
) -> PyTree:
    """``Zᵀ C Z v`` of ``cost(outputs(w))``; same structure as ``w``.

    ``Z = d outputs / dw`` and ``C`` is the Hessian of ``cost`` in the outputs, so the
    product is that of ``H`` without the curvature of ``outputs``. Costs two gradients.
    """
    z, forward = jax.linearize(outputs, w)
    backward = jax.linear_transpose(forward, w)
    (product,) = backward(jax.jvp(jax.grad(cost), (z,), (forward(v),))[1])
    return product


def pushforward(
    f: Callable[[Array], PyTree], x: Array, directions: Array
) -> tuple[PyTree, PyTree]:
    """``f(x)`` and its derivatives along ``directions`` ``[n, ...]``, leading with n.

    ``f`` may take gradients: its derivative then goes forward over reverse. Costs ``f``
    once and n tangents of it, batched.
    """
    along = lambda direction: jax.jvp(f, (x,), (direction,))
    return jax.vmap(along, out_axes=(None, 0))(directions)
