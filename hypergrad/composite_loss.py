"""An inner loss declared as a composition, for the products of Gauss and Newton."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array, PyTree

from .method_summary import MethodSummary
from .products import gauss_newton_product, hvp
from .validation import check_hashable


@dataclasses.dataclass(frozen=True)
class CompositeLoss:
    """``cost(outputs(w, alpha, batch), alpha, batch) + penalty(w, alpha)``, a loss.

    Args:
      outputs: ``(w, alpha, batch) -> z``, a pytree: what the model says.
      cost: ``(z, alpha, batch) -> loss``, convex in ``z`` for products that are
        positive semi-definite, such as a cross-entropy or a mean of squares.
      penalty: ``(w, alpha) -> loss``, whose Hessian is taken as it is; None for none.

    Called like any inner loss; `gauss_newton` goes to ``hypergrad.Implicit``.

    Raises:
      TypeError: what is no function.

    Source: Schraudolph 2002.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> loss = hg.Composition(
    ...     outputs=lambda w, alpha, batch: jnp.sin(w),
    ...     cost=lambda z, alpha, batch: 0.5 * (z - 2) ** 2,
    ... )
    >>> w = jnp.asarray(0.0)
    >>> float(loss(w, None, None)), float(loss.gauss_newton(w, None, None, w + 1))
    (2.0, 1.0)
    """

    outputs: Callable[[PyTree, PyTree, PyTree], PyTree]
    cost: Callable[[PyTree, PyTree, PyTree], Any]
    penalty: Callable[[PyTree, PyTree], Any] | None = None

    citations = ("schraudolph2002",)
    summary = (
        MethodSummary(
            "Implicit(solver, hvp_fn=loss.gauss_newton)",
            num_grads="T",
            num_hvps="k + 1",
            memory="4 w",
            bias="what H has beside Gauss-Newton's",
            alpha_in=("losses",),
            recommended_for="a network whose H is indefinite where its training ends",
            not_recommended_for="a loss whose H is positive definite",
            reason="convex costs and penalties have products that are never negative",
        ),
    )

    def __post_init__(self):
        for name in ("outputs", "cost", "penalty"):
            value = getattr(self, name)
            if not (callable(value) or (name == "penalty" and value is None)):
                raise TypeError(f"{name} must be a function; got {value!r}")
            check_hashable(name, value)

    def __call__(self, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
        """The loss."""
        loss = self.cost(self.outputs(w, alpha, batch), alpha, batch)
        return loss if self.penalty is None else loss + self.penalty(w, alpha)

    def gauss_newton(
        self, w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree
    ) -> PyTree:
        """``(Zᵀ C Z + P) v``; same structure as ``w``.

        ``Z = dz/dw``, ``C`` is the cost's Hessian in ``z``, ``P`` the penalty's. The
        Hessian's product where ``outputs`` are linear in ``w`` or the cost's slope is
        zero, and else without the part that can be negative. Costs two gradients, and
        two of the penalty.
        """
        product = gauss_newton_product(
            lambda w: self.outputs(w, alpha, batch),
            lambda z: self.cost(z, alpha, batch),
            w,
            v,
        )
        if self.penalty is None:
            return product
        penalty: Any = self.penalty
        of_penalty = hvp(lambda w, alpha, _: penalty(w, alpha), w, alpha, None, v)
        return optax.tree.add(product, of_penalty)
