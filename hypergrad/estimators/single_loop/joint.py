"""A step of ``w``, of the adjoint and of ``alpha``, along directions that are given."""

from typing import Any

import equinox as eqx
import optax
from jaxtyping import PyTree

from ...problem import Bilevel, EstimateData
from ..base import Estimate
from .directions import Inner, Outer, Point, combine
from .shared import move, report, start

Optimizers = tuple[optax.GradientTransformation, optax.GradientTransformation]


def optimizers(estimator: Any) -> Optimizers:
    """Of ``w`` and of ``v``, which is of the same kind where it is None."""
    return estimator.optimizer, estimator.adjoint_optimizer or estimator.optimizer


class JointState(eqx.Module):
    """``w``, the adjoint ``v`` like it, their optimizers' states, a method's memory."""

    w: PyTree
    v: PyTree
    w_optimizer: PyTree
    v_optimizer: PyTree
    memory: Any


def begin(
    name: str, optimizers: Optimizers, problem: Bilevel, w: PyTree, alpha: PyTree
) -> JointState:
    """From ``w``, or the start made of it, and a zero adjoint; no memory yet."""
    w = start(name, problem, w, alpha)
    v = optax.tree.zeros_like(w)
    of_w, of_v = optimizers
    return JointState(w, v, of_w.init(w), of_v.init(v), None)


def advance(
    optimizers: Optimizers,
    state: JointState,
    memory: Any,
    data: EstimateData,
    parts: tuple[Inner, Outer],
    **counts: Any,
) -> tuple[Estimate, JointState]:
    """The third direction for `minimize`, and a step along the first two."""
    directions, outer = combine(*parts), parts[1]
    of_w, of_v = optimizers
    w, w_optimizer = move(of_w, directions.w, state.w_optimizer, state.w)
    v, v_optimizer = move(of_v, directions.v, state.v_optimizer, state.v)
    estimate = report(
        data,
        outer.value,
        directions.alpha,
        state.w,
        gradient=directions.w,
        residual=directions.v,
        b=outer.b,
        **counts,
    )
    return estimate, JointState(w, v, w_optimizer, v_optimizer, memory)


def point(state: JointState, alpha: PyTree) -> Point:
    """Where the state is."""
    return Point(state.w, state.v, alpha)
