"""The step that MRBO and SUSTAIN share, and the directions that VRBO estimates too."""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ...batches import sample_in_pass
from ...problem import Bilevel, EstimateData
from .base import SingleLoop, SingleLoopState, Step, batch_fractions
from .inner_loops import Points, StochasticNeumann, alpha_direction
from .variance_reduction import storm_estimate, storm_momentum


class BatchDirections(eqx.Module):
    """Directions of ``w`` and of ``alpha`` on one batch of each loss.

    Attributes:
      value: Outer value.
      directions: ``dL/dw``, and ``dM/dalpha - J' v`` with ``v`` of a Neumann series.
      num_products: Number of Hessian-vector products of the series.
    """

    value: Array
    directions: tuple[PyTree, PyTree]
    num_products: Int[Array, ""]


class StormState(eqx.Module):
    """The previous estimates of the two directions.

    Attributes:
      directions: Estimates of the directions of ``w`` and of ``alpha``.
      point: The ``(w, alpha)`` at which they were made.
      num_steps: Number of outer steps made.
    """

    directions: tuple[PyTree, PyTree]
    point: tuple[PyTree, PyTree]
    num_steps: Int[Array, ""]


def init_storm(w: PyTree, alpha: PyTree) -> StormState:
    """Returns zero directions, which the first step does not use."""
    zeros = optax.tree.zeros_like((w, alpha))
    return StormState(zeros, (w, alpha), jnp.asarray(0))


def evaluate_batch(
    problem: Bilevel, series: StochasticNeumann, points: Points, data: EstimateData
) -> tuple[BatchDirections, ...]:
    """Returns both directions at each ``(w, alpha)``, all on the same batches."""
    batch_key, series_key = jax.random.split(data.inner_key)
    batch = sample_in_pass(data.inner_data, batch_key)
    outer_batch = sample_in_pass(data.outer_data, data.outer_key)
    outer = [problem.outer_value_and_grads(*point, outer_batch) for point in points]
    bs = tuple(b for _, b, _ in outer)
    # v = H^-1 b, approximately
    vs, num_products = series.solve(problem, points, bs, data.inner_data, series_key)

    def directions_at(w, alpha, v, direct):
        inner_grad = jax.grad(problem.inner_loss)(w, alpha, batch)
        # dM/dalpha - J' v
        return inner_grad, alpha_direction(problem, w, v, alpha, direct, batch)

    return tuple(
        BatchDirections(value, directions_at(*point, v, direct), num_products)
        for point, v, (value, _, direct) in zip(points, vs, outer, strict=True)
    )


def storm_step(
    method: SingleLoop,
    momentum: Array | float | Callable,
    series: StochasticNeumann,
    problem: Bilevel,
    state: SingleLoopState,
    alpha: PyTree,
    data: EstimateData,
) -> tuple[Step, SingleLoopState]:
    """Estimates both directions by STORM and moves ``w`` along the first.

    Args:
      method: The method, which has the optimizer of ``w``.
      momentum: A number in [0, 1), or a schedule of the outer step.
      series: The series that approximates the adjoint.
      problem, state, alpha, data: As in `SingleLoop.step`.
    """
    memory, point = state.memory, (state.w, alpha)
    # D(t) and D(t-1) on the same batches, so that their noise cancels
    new, old = evaluate_batch(problem, series, (point, memory.point), data)
    # d_t = D(t) + momentum (d_{t-1} - D(t-1))
    directions = storm_estimate(
        new.directions,
        old.directions,
        memory.directions,
        storm_momentum(momentum, memory.num_steps),
    )
    w_direction, direction = directions
    inner_fraction, outer_fraction = batch_fractions(data)
    counts = {
        "num_grads": 2 * inner_fraction,
        # One product more per point, for the cross term J' v.
        "num_hvps": 2 * inner_fraction * (new.num_products + 1),
        "num_outer_grads": 2 * outer_fraction,
    }
    step = Step(new.value, direction, state.w, w_direction, counts)
    memory = StormState(directions, point, memory.num_steps + 1)
    # w <- w - rho d_t
    return step, replace(method.move_w(state, w_direction), memory=memory)
