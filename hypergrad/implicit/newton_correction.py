"""The Newton steps of a certificate, and the statistics that decide on trust."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from ..linear.base import LinearStats
from ..linear.equilibration import Scaling
from ..problem import Bilevel
from ..products import Loss
from ..trees import norm_ratio, safe_norm
from .differentiation import ImplicitResult
from .minimum import (
    gradient_rounding,
    is_stationary,
    scales_of_rounding,
    within_rounding,
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
    w: PyTree,
    hypergradient: PyTree,
    adjoint: PyTree,
    inner_grad: PyTree,
    take_step: Callable[[PyTree, PyTree], tuple[PyTree, LinearStats]],
    differentiate: Callable[[PyTree, PyTree], ImplicitResult],
    relative_change: Callable[[PyTree, PyTree], Scalar],
    num_newton_steps: int,
) -> NewtonCorrection:
    """Returns ``w`` and implicit differentiation after Newton steps.

    With ``H = d2L/dw2`` and ``b = dM/dw`` the adjoint ``v`` solves ``H v = b``.

    Args:
      w, hypergradient, adjoint, inner_grad: Where the steps start.
      take_step: ``(w, dL/dw) -> (w, statistics)``, one Newton step.
      differentiate: ``(w, v) -> result``, which corrects the adjoint ``v``.
      relative_change: ``(old hypergradient, new hypergradient) -> number``.
      num_newton_steps: Number of steps, 1 at least.
    """
    solves: list[LinearStats] = []
    result, change = None, jnp.asarray(jnp.nan)
    previous_w, previous_grad = w, inner_grad
    for _ in range(num_newton_steps):
        previous_w, previous_grad = w, inner_grad
        # H d = dL/dw,  w <- w - d
        w, newton_stats = take_step(w, inner_grad)
        # H e = b - H v,  v <- v + e
        result = differentiate(w, adjoint)
        solves += [newton_stats, result.linear_stats]
        change = relative_change(hypergradient, result.hypergradient)
        hypergradient, adjoint = result.hypergradient, result.adjoint
        inner_grad = result.inner_grad
    assert result is not None  # there is one step at least
    return NewtonCorrection(w, result, change, previous_w, previous_grad, solves)


class CorrectionChecks(NamedTuple):
    """Checks of Newton steps that decide on trust.

    Attributes:
      solves: Statistics of the two solves of the last step.
      is_increased: Whether the steps increased ``||S dL/dw||`` beyond rounding.
      num_products: Number of products that this took.
    """

    solves: list[LinearStats]
    is_increased: Array
    num_products: Array


def check_correction(
    correction: NewtonCorrection,
    inner_grad: PyTree,
    scaling: Scaling,
    loss: Loss,
    alpha: PyTree,
    batch: PyTree,
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
      loss, alpha, batch: The inner loss and its arguments.
    """
    newton_stats, adjoint_stats = correction.solves[-2:]
    is_solved, w = newton_stats["is_solved"], correction.previous_w
    scaled_norm = lambda grad: safe_norm(scaling.multiply(grad))
    new_norm = scaled_norm(correction.result.inner_grad)
    is_increased = new_norm > scaled_norm(inner_grad)
    grad_scale, root, num_products = scales_of_rounding(
        loss, w, alpha, batch, scaling, ~is_solved | is_increased
    )
    is_rounding = ~is_solved & is_stationary(correction.previous_grad, grad_scale)
    newton_stats = newton_stats | {
        "is_solved": is_solved | is_rounding,
        "negative_curvature": newton_stats["negative_curvature"] & ~is_rounding,
    }
    is_increased &= new_norm > gradient_rounding(grad_scale, root, scaling)
    return CorrectionChecks([newton_stats, adjoint_stats], is_increased, num_products)


def outer_gradient_rounding(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    outer_batch: PyTree,
    scaling: Scaling,
    b: PyTree,
) -> Array:
    """Returns the relative change of ``S b`` within the rounding of ``w``.

    It is the maximum over K outer losses. An example where it is large is a regression
    in float32 whose targets have a mean a million times their deviation.

    Args:
      problem, w, alpha, outer_batch: The point.
      scaling: ``S``.
      b: ``dM/dw`` at the point.

    Cost: one outer gradient of each loss.
    """
    _, new_b, _ = problem.outer_value_and_grads(within_rounding(w), alpha, outer_batch)

    def relative_change(new_b, b):
        change = scaling.multiply(optax.tree.sub(new_b, b))
        return norm_ratio(change, scaling.multiply(b))

    return jnp.max(problem.for_each_loss(relative_change)(new_b, b))
