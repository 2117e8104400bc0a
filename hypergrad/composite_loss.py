"""Inner losses with Gauss-Newton products: a function of the outputs of a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array, PyTree

from .keys_in_w import bind_keys_to_function, keys_of, remove_keys
from .method_summary import MethodSummary
from .products import gauss_newton_product, hvp
from .validation import check_hashable


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """``loss_fn(model_fn(w, alpha, batch), alpha, batch) + regularizer(w, alpha)``.

    An object is called like any inner loss. Its method `gauss_newton` is an ``hvp_fn``
    of ``hypergrad.Implicit``.

    Args:
      model_fn: ``(w, alpha, batch) -> z``, the model outputs, a pytree. Leaves that are
        not floating-point are constants.
      loss_fn: ``(z, alpha, batch) -> scalar``. Products are positive semidefinite if it
        is convex in ``z``, such as a cross-entropy or a mean of squares.
      regularizer: ``(w, alpha) -> scalar``, whose Hessian is used unchanged. Defaults
        to none.

    Raises:
      TypeError: An argument is not a hashable function.

    Source: Schraudolph 2002.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> loss = hg.CompositeLoss(
    ...     model_fn=lambda w, alpha, batch: jnp.sin(w),
    ...     loss_fn=lambda z, alpha, batch: 0.5 * (z - 2) ** 2,
    ... )
    >>> w = jnp.asarray(0.0)
    >>> float(loss(w, None, None)), float(loss.gauss_newton(w, None, None, w + 1))
    (2.0, 1.0)
    """

    model_fn: Callable[[PyTree, PyTree, PyTree], PyTree]
    loss_fn: Callable[[PyTree, PyTree, PyTree], Any]
    regularizer: Callable[[PyTree, PyTree], Any] | None = None

    citations = ("schraudolph2002",)
    summary = (
        MethodSummary(
            "Implicit(solver, hvp_fn=loss.gauss_newton)",
            num_grads="T",
            num_hvps="k + 1",
            memory="4 w",
            bias="the part of H that Gauss-Newton leaves out",
            alpha_in=("losses",),
            recommended_for="a network whose H is indefinite at the end of training",
            not_recommended_for="a loss with a positive definite H",
            reason="the products of a convex loss and regularizer are never negative",
        ),
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            function = getattr(self, field.name)
            is_omitted = field.name == "regularizer" and function is None
            if not (callable(function) or is_omitted):
                raise TypeError(f"{field.name} must be a function; got {function!r}.")
            check_hashable(field.name, function)

    def __call__(self, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
        """Returns the loss."""
        loss = self.loss_fn(self.model_fn(w, alpha, batch), alpha, batch)
        if self.regularizer is None:
            return loss
        return loss + self.regularizer(w, alpha)

    def gauss_newton(
        self, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree
    ) -> PyTree:
        """Returns ``(Z' C Z + R) v``, structured like ``w``, with None for its keys.

        ``Z = dz/dw``, ``C`` is the Hessian of ``loss_fn`` in ``z``, and ``R`` is the
        Hessian of the regularizer. The matrix equals the Hessian of the loss where
        ``model_fn`` is linear in ``w`` or the gradient of ``loss_fn`` is zero.
        Elsewhere it lacks the part of the Hessian that can be negative.

        Cost: two gradients, and two of the regularizer.
        """
        keys = keys_of(w)
        w, v = remove_keys(w), remove_keys(v)
        model_fn = bind_keys_to_function(self.model_fn, keys)
        product = gauss_newton_product(
            lambda w: model_fn(w, alpha, batch),
            lambda z: self.loss_fn(z, alpha, batch),
            w,
            v,
        )
        if self.regularizer is None:
            return product
        regularizer = bind_keys_to_function(self.regularizer, keys)
        regularizer_loss = lambda w, alpha, _: regularizer(w, alpha)
        return optax.tree.add(product, hvp(regularizer_loss, w, alpha, None, v))
