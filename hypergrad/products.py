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
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # pyright: ignore
from jaxtyping import Array, PyTree

from .runtime.all_cores import on_all_cores
from .trees import scale

Loss = Callable[[PyTree, PyTree, PyTree], Any]

#: Name of the gradient of a loss in mixed mode, for policies of `jax.checkpoint`.
MIXED_MODE_GRAD = "mixed_mode_grad"


def hvp(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree) -> PyTree:
    """Returns the Hessian-vector product ``H v``, structured like ``w``.

    Cost: two gradients.
    """
    v = on_all_cores(v, batch)  # most products are made in a loop over v
    grad_fn = lambda w: jax.grad(eqx.filter_jit(loss))(w, alpha, batch)
    return jax.jvp(grad_fn, (w,), (v,))[1]


def value_and_hvp(
    loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree
) -> tuple[Array, PyTree]:
    """Returns ``L`` and the Hessian-vector product ``H v``.

    Cost: two gradients.
    """
    v = on_all_cores(v, batch)
    fn = lambda w: jax.value_and_grad(eqx.filter_jit(loss))(w, alpha, batch)
    (value, _), (_, Hv) = jax.jvp(fn, (w,), (v,))
    return value, Hv


def cross_vjp(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree) -> PyTree:
    """Returns the cross product ``J' v``, structured like ``alpha``.

    Second derivatives commute, so ``J' v`` is the derivative of ``dL/dalpha`` along
    ``v``; no reverse pass over a reverse pass is needed.

    Cost: two gradients.
    """
    alpha_grad_fn = lambda w: jax.grad(eqx.filter_jit(loss), argnums=1)(w, alpha, batch)
    return jax.jvp(alpha_grad_fn, (w,), (v,))[1]


def cross_jvp(
    loss: Callable[..., Any],
    w: PyTree,
    args: tuple[PyTree, ...],
    tangents: tuple[PyTree, ...],
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


def hvp_and_cross_vjp(
    loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """Returns ``dL/dw``, ``H v`` and ``J' v`` from one derivative of one gradient.

    Cost: two gradients.
    """
    grads_fn = lambda w: jax.grad(eqx.filter_jit(loss), argnums=(0, 1))(w, alpha, batch)
    (inner_grad, _), (Hv, cross) = jax.jvp(grads_fn, (w,), (v,))
    return inner_grad, Hv, cross


def convert_closure(
    f: Callable[..., Any], *args: PyTree, with_floats: bool = False
) -> tuple[Callable[..., Any], list[Array]]:
    """Returns ``(g, arrays)`` for which ``g(*args, *arrays)`` is ``f(*args)``.

    The arrays are all those that ``f`` closes over and that are traced. A rule of
    `jax.custom_jvp` or `jax.custom_vjp` that closes over them would use them when their
    trace has ended. Unlike `jax.closure_convert` this is so for integers and PRNG keys
    too, which have no derivative.

    Args:
      f: The function.
      args: Its arguments.
      with_floats: Whether arrays of floats that are not traced are among the arrays.

    >>> import jax
    >>> def mean_of_some(x, indices):
    ...     g, arrays = convert_closure(lambda x: x[indices].mean(), x)
    ...     assert len(arrays) == 1
    ...     return g(x, *arrays)
    >>> float(jax.jit(mean_of_some)(jnp.arange(4.0), jnp.array([1, 3])))
    2.0
    """
    jaxpr, result = jax.make_jaxpr(f, return_shape=True)(*args)
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    is_argument = lambda x: isinstance(x, Tracer) or (with_floats and is_float(x))
    arguments, constants = eqx.partition(jaxpr.consts, is_argument)
    arrays, structure = jax.tree.flatten(arguments)

    def g(*args_and_arrays: PyTree) -> Any:
        split = len(args_and_arrays) - len(arrays)
        arguments = jax.tree.unflatten(structure, args_and_arrays[split:])
        consts = eqx.combine(arguments, constants)
        leaves = jax.tree.leaves(args_and_arrays[:split])
        results = jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, consts))(*leaves)
        return jax.tree.unflatten(jax.tree.structure(result), results)

    return g, arrays


def with_mixed_mode(loss: Loss) -> Loss:
    """Returns the loss with a gradient in ``w`` that is differentiated in mixed mode.

    A reverse pass through the gradient ``g = dL/dw`` has a cotangent ``u`` of ``g`` and
    needs the derivatives of ``<g, u>``. Second derivatives commute, so these are the
    derivatives of all first derivatives of the loss along ``u``: one forward derivative
    of one gradient, for which only the arguments of the loss are stored. Reverse mode
    stores the intermediate values of ``g`` and of its reverse pass instead.

    The gradient has the name `MIXED_MODE_GRAD`, so that a policy of `jax.checkpoint`
    can store it. A forward derivative of the loss raises TypeError. Rules inside the
    loss that are no derivatives of one function, as of a straight-through estimator,
    need not commute; the derivative may then differ from that of autodiff.

    Cost: two gradients in the reverse pass. Reverse mode needs as many without the
    values of the forward pass, which are computed anew here.

    Source: Kemaev et al. 2025 (arXiv 2505.00793).

    >>> import jax, jax.numpy as jnp
    >>> loss = with_mixed_mode(lambda w, alpha, batch: jnp.exp(alpha) * w**3)
    >>> w_grad, alpha_grad = jax.grad(jax.grad(loss), argnums=(0, 1))(2.0, 0.0, None)
    >>> float(w_grad), float(alpha_grad)
    (12.0, 12.0)
    """

    def mixed_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Any:
        arrays, static = eqx.partition((alpha, batch), eqx.is_array)
        floats, non_floats = eqx.partition(arrays, eqx.is_inexact_array)
        split_loss = lambda w, floats, non_floats: loss(
            w, *eqx.combine(floats, non_floats, static)
        )
        # What is traced is an argument of the rules, also what the loss closes over.
        closed_loss, closed_over = convert_closure(split_loss, w, floats, non_floats)
        more_floats, remainder = eqx.partition(closed_over, eqx.is_inexact_array)
        return _mixed_mode_value(
            lambda w, floats, non_floats: closed_loss(
                w, floats[0], non_floats[0], *eqx.combine(floats[1], non_floats[1])
            ),
            w,
            (floats, more_floats),
            (non_floats, remainder),
        )

    return mixed_loss


def _mixed_mode_value(loss: Loss, *args: PyTree) -> Any:
    """Returns ``loss(w, floats, non_floats)``, differentiable in the first two."""

    def named_grad(*args):
        name = lambda u: checkpoint_name(u, MIXED_MODE_GRAD)
        return jax.tree.map(name, jax.grad(loss)(*args))

    def with_residuals(f):
        """Returns the forward rule of ``f``, which sorts floats by their perturbation.

        Derivatives by floats that are constant, such as the data, are not computed.
        """

        def forward(*primals):
            args = jax.tree.map(lambda x: x.value, primals)
            varying = jax.tree.map(lambda x: x.value if x.perturbed else None, primals)
            constant = jax.tree.map(lambda x: None if x.perturbed else x.value, primals)
            w, _, non_floats = args
            return f(*args), (w, varying[1], (constant[1], non_floats))

        return forward

    def split_loss(w, varying, batch):
        constant, non_floats = batch
        return loss(w, eqx.combine(varying, constant), non_floats)

    def pull_back_grad(residuals, v):
        is_zero = lambda u: isinstance(u, jax.custom_derivatives.SymbolicZero)
        v = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype) if is_zero(u) else u, v)
        w, varying, batch = residuals
        v = on_all_cores(v, batch)  # most reverse passes are loops
        _, Hv, cross = hvp_and_cross_vjp(split_loss, w, varying, batch, v)
        return Hv, cross, None

    def pull_back_value(residuals, y):
        w, varying, (constant, non_floats) = residuals
        w_grad = grad_fn(w, eqx.combine(varying, constant), non_floats)
        varying_grad = jax.grad(split_loss, argnums=1)(*residuals)
        return scale(y, w_grad), scale(y, varying_grad), None

    grad_fn = jax.custom_vjp(named_grad)
    grad_fn.defvjp(with_residuals(named_grad), pull_back_grad, symbolic_zeros=True)
    value_fn = jax.custom_vjp(loss)
    value_fn.defvjp(with_residuals(loss), pull_back_value, symbolic_zeros=True)
    return value_fn(*args)


def gauss_newton_product(
    model_fn: Callable[..., PyTree], loss_fn: Callable[..., Any], w: PyTree, v: PyTree
) -> PyTree:
    """Returns ``Z' C Z v`` for ``loss_fn(model_fn(w))``, structured like ``w``.

    ``Z = d model_fn / dw`` and ``C`` is the Hessian of ``loss_fn`` in the outputs of
    model, so that the product is ``H v`` without the curvature of ``model_fn``.

    Cost: two gradients.
    """
    outputs, tangents_fn = jax.linearize(model_fn, w)
    # Integers and booleans among the outputs have no derivative.
    is_float = jax.tree.map(eqx.is_inexact_array, outputs)
    floats, constants = eqx.partition(outputs, is_float)
    forward = lambda v: eqx.filter(tangents_fn(v), is_float)
    backward = jax.linear_transpose(forward, w)
    grad_fn = jax.grad(lambda floats: loss_fn(eqx.combine(floats, constants)))
    (product,) = backward(jax.jvp(grad_fn, (floats,), (forward(v),))[1])
    return product


def pushforward(
    f: Callable[[PyTree], PyTree], x: PyTree, directions: PyTree
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
