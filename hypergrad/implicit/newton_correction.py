"""Newton steps towards the minimum, and the statistics that decide on trust."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from ..linear.base import LinearStats
from ..linear.equilibration import Scaling
from ..trees import norm_ratio, safe_norm
from .differentiation import (
    ImplicitResult,
    Point,
    corrected_hypergradient,
    max_relative_error,
    newton_step,
)
from .minimum import (
    gradient_rounding,
    is_stationary,
    perturb_by_rounding,
    scales_of_rounding,
)


class NewtonCorrection(NamedTuple):
    """The result of Newton steps.

    Attributes:
      w, result: ``w`` after the last step, and the derivatives there.
      last_change: Relative change of the hypergradient by the last step.
      previous_w, previous_grad: ``w`` and ``dL/dw`` before the last step.
      solves: Statistics of the two solves of each step.
    """

    w: PyTree
    result: ImplicitResult
    last_change: Scalar
    previous_w: PyTree
    previous_grad: PyTree
    solves: list[LinearStats]


def correct_by_newton(
    point: Point,
    scaling: Scaling,
    hypergradient: PyTree,
    adjoint: PyTree,
    inner_grad: PyTree,
    num_newton_steps: int,
    rtol: float,
    max_steps: Array | None = None,
    *,
    changes_rounding: bool = False,
) -> NewtonCorrection:
    """Returns ``w`` and implicit differentiation after Newton steps.

    With ``H = d2L/dw2`` and ``b = dM/dw`` the adjoint ``v`` solves ``H v = b``.

    Args:
      point: Where the steps start.
      scaling: ``S``.
      hypergradient, adjoint, inner_grad: Derivatives at the point.
      num_newton_steps: Number of steps, 1 at least.
      rtol, max_steps: Tolerance and number of steps of each solve.
      changes_rounding: Whether each step also changes ``w`` by `perturb_by_rounding`.
    """
    w = point.w
    solves: list[LinearStats] = []
    result, change = None, jnp.asarray(jnp.nan)
    previous_w, previous_grad = w, inner_grad
    for _ in range(num_newton_steps):
        previous_w, previous_grad = w, inner_grad
        # H d = dL/dw,  w <- w - d
        w, newton_stats = newton_step(
            point._replace(w=w), inner_grad, scaling, rtol, max_steps
        )
        if changes_rounding:
            w = perturb_by_rounding(w)
        # H e = b - H v,  v <- v + e
        result = corrected_hypergradient(
            point._replace(w=w), scaling, adjoint, rtol, max_steps
        )
        solves += [newton_stats, result.linear_stats]
        change = max_relative_error(point.problem, hypergradient, result.hypergradient)
        hypergradient, adjoint = result.hypergradient, result.adjoint
        inner_grad = result.inner_grad
    assert result is not None  # there is one step at least
    return NewtonCorrection(w, result, change, previous_w, previous_grad, solves)


class CorrectionChecks(NamedTuple):
    """Checks of Newton steps that decide on trust.

    Attributes:
      solves: Statistics of the two solves of the last step.
      is_far: Whether more than ``max_ratio`` of ``||S dL/dw||`` remains after the
        steps, and more than rounding.
      num_products: Number of products that this took.
    """

    solves: list[LinearStats]
    is_far: Array
    num_products: Array


def check_correction(
    correction: NewtonCorrection,
    inner_grad: PyTree,
    scaling: Scaling,
    point: Point,
    *,
    max_ratio: float = 1.0,
) -> CorrectionChecks:
    """Returns what decides on trust in Newton steps.

    Each solve corrects what earlier ones left, so that the last ones decide. If the
    gradient before the step is at the level of rounding, the step had nothing to
    correct. Its solve may then fail along a zero eigenvalue, such as that of a rotation
    that changes no loss; it counts as solved, and as without negative curvature, which
    the adjoint solve and the probe look for at the corrected ``w``.

    Args:
      correction: The steps.
      inner_grad: ``dL/dw`` before the first one.
      scaling: ``S``.
      point: Where the steps started.
      max_ratio: Part of ``||S dL/dw||`` that may remain, unless it is rounding.
    """
    newton_stats, adjoint_stats = correction.solves[-2:]
    is_solved = newton_stats["is_solved"]
    scaled_norm = lambda grad: safe_norm(scaling.multiply(grad))
    new_norm = scaled_norm(correction.result.inner_grad)
    is_far = new_norm > max_ratio * scaled_norm(inner_grad)
    grad_scale, residual_scale, num_products = scales_of_rounding(
        point._replace(w=correction.previous_w), scaling, ~is_solved | is_far
    )
    is_rounding = ~is_solved & is_stationary(correction.previous_grad, grad_scale)
    newton_stats = newton_stats | {
        "is_solved": is_solved | is_rounding,
        "negative_curvature": newton_stats["negative_curvature"] & ~is_rounding,
    }
    is_far &= new_norm > gradient_rounding(grad_scale, residual_scale, scaling)
    return CorrectionChecks([newton_stats, adjoint_stats], is_far, num_products)


def outer_gradient_rounding(point: Point, scaling: Scaling, b: PyTree) -> Array:
    """Returns the relative change of ``S b`` within the rounding of ``w``.

    It is the maximum over K outer losses. An example where it is large is a regression
    in float32 whose targets have a mean a million times their deviation.

    Args:
      point: Where ``S b`` is evaluated.
      scaling: ``S``.
      b: ``dM/dw`` at the point.

    Cost: one outer gradient of each loss.
    """
    problem, w, alpha, _, outer_batch = point
    _, new_b, _ = problem.outer_value_and_grads(
        perturb_by_rounding(w), alpha, outer_batch
    )

    def relative_change(new_b, b):
        change = scaling.multiply(optax.tree.sub(new_b, b))
        return norm_ratio(change, scaling.multiply(b))

    return jnp.max(problem.for_each_loss(relative_change)(new_b, b))
