"""The three directions that single-loop methods follow, or estimate."""

import equinox as eqx
import optax
from jaxtyping import Array, PyTree

from ...problem import Bilevel
from ...products import Loss, hvp_and_cross_vjp


class Point(eqx.Module):
    """Where a method is: ``w``, the adjoint ``v`` like it, and ``alpha``."""

    w: PyTree
    v: PyTree
    alpha: PyTree


class Inner(eqx.Module):
    """Of the inner loss at a point: ``dL/dw``, ``H v`` and ``Jᵀ v``."""

    gradient: PyTree
    Hv: PyTree
    cross: PyTree


class Outer(eqx.Module):
    """Of the outer loss at a point: its value, ``b = dM/dw`` and ``dM/dalpha``."""

    value: Array
    b: PyTree
    direct: PyTree


class Directions(eqx.Module):
    """Along minus which the three variables move.

    Attributes:
      w: ``dL/dw``.
      v: ``H v - dM/dw``, whose zero is the adjoint.
      alpha: ``dM/dalpha - Jᵀ v``, the hypergradient where both others are zero.
    """

    w: PyTree
    v: PyTree
    alpha: PyTree


def inner(loss: Loss, at: Point, batch: PyTree) -> Inner:
    """All three, for one Hessian-vector product."""
    return Inner(*hvp_and_cross_vjp(loss, at.w, at.alpha, batch, at.v))


def outer(problem: Bilevel, at: Point, batch: PyTree) -> Outer:
    """All three, for one outer gradient."""
    return Outer(*problem.outer_value_and_grads(at.w, at.alpha, batch))


def combine(inner: Inner, outer: Outer) -> Directions:
    """The directions of the two losses' parts."""
    return Directions(
        inner.gradient,
        optax.tree.sub(inner.Hv, outer.b),
        optax.tree.sub(outer.direct, inner.cross),
    )
