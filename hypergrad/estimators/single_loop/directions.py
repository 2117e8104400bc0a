"""The three directions that every single-loop method follows, or estimates."""

import equinox as eqx
import optax
from jaxtyping import Array, PyTree

from ...problem import Bilevel
from ...products import hvp_and_cross


class Directions(eqx.Module):
    """At one ``(w, v, alpha)``, on one inner and one outer batch.

    Attributes:
      value: the outer value.
      w: ``dL/dw``.
      v: ``H v - dM/dw``, whose zero is the adjoint.
      alpha: ``dM/dalpha - Jᵀ v``, the hypergradient where both others are zero.
      b: ``dM/dw``.
    """

    value: Array
    w: PyTree
    v: PyTree
    alpha: PyTree
    b: PyTree


def directions(
    problem: Bilevel,
    w: PyTree,
    v: PyTree,
    alpha: PyTree,
    batch: PyTree,
    outer_batch: PyTree,
) -> Directions:
    """All three, for one Hessian-vector product and one outer gradient."""
    value, b, direct = problem.outer_gradients(w, alpha, outer_batch)
    gradient, Hv, cross = hvp_and_cross(problem.inner_loss, w, alpha, batch, v)
    return Directions(
        value, gradient, optax.tree.sub(Hv, b), optax.tree.sub(direct, cross), b
    )
