"""The confirmation of an error estimate by a Newton step.

`estimate_error` approximates ``d`` and the duals by what the solve for the adjoint
resolves of them. That is all of them if ``w`` has few parameters, and else it may miss
most of the error. Where an estimate would be trusted, and its distance to the argmin is
not negligible, both systems are therefore solved as by `hypergrad.certify`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Scalar

from ..linear.equilibration import Scaling
from ..trees import apply_unless
from .differentiation import (
    ImplicitResult,
    Point,
    all_solved,
    any_negative_curvature,
    count_products,
)
from .error import HypergradientError
from .newton_correction import check_correction, correct_by_newton

#: Part of the tolerance below which ``relative_change`` needs no confirmation. On
#: random quadratics of 60 to 200 parameters no error was a hundred times as large.
NEGLIGIBLE_PART = 1e-2
SOLVE_RTOL = 1e-3  # of both solves, relative to their own right-hand sides
#: Part of ``||S dL/dw||`` that a Newton step may leave. A step towards a minimum of
#: fourth order, which covers a third of the distance, leaves (2/3)^3 = 0.3, and one in
#: the tail of an exponential 1/e. Between a second and a fourth power the distance is
#: at most 4/3 of a step that leaves a fifth.
MAX_REMAINING_PART = 0.2
MIN_MAX_STEPS = 25  # that both solves may take, however short that of the adjoint was


def confirm_error(
    point: Point,
    scaling: Scaling,
    result: ImplicitResult,
    error: HypergradientError,
    rtol: Scalar | float,
) -> tuple[HypergradientError, Array, Array]:
    """Returns the error that a Newton step confirms, and the cost of the step.

    If all errors are at most ``rtol``, and the change of ``h`` from ``w`` to ``w+`` is
    above a hundredth of it, the error is that of ``w+ = w - d`` and ``v + e`` with

        H d = dL/dw,    H(w+) e = dM/dw(w+) - H(w+) v,

    where ``w+`` is known up to rounding. It is infinite if one of them is not solved in
    twice as many products as the adjoint took, or 25 at least, meets negative
    curvature, or leaves more than a fifth of ``||S dL/dw||``, and more than rounding.
    Any other error stays as it is.

    Args:
      point, scaling: As for `scaled_hypergradient`.
      result: Implicit differentiation at this point.
      error: Its error as `estimate_error` returns it.
      rtol: Relative error up to which the hypergradient is trusted.

    Returns:
      The error, the number of products, and that of gradients of each outer loss.

    Cost: two solves, two products and an outer gradient per loss where it decides, and
    nine products if the step leaves more than a fifth of the gradient or is not solved.
    """
    largest_error = jnp.maximum(error.inner_error, error.adjoint_error)
    # A confirmation costs at most four solves as long as the one for the adjoint. A
    # direct solver makes a product per dimension, and CG makes more by rounding.
    num_products = jnp.max(result.linear_stats["num_products"])
    max_steps = jnp.maximum(2 * num_products, MIN_MAX_STEPS)
    is_decisive = (error.relative_change > NEGLIGIBLE_PART * rtol) & (
        (largest_error <= rtol) & ~error.negative_curvature
    )

    def confirm(_):
        correction = correct_by_newton(
            point,
            scaling,
            result.hypergradient,
            result.adjoint,
            result.inner_grad,
            num_newton_steps=1,
            rtol=SOLVE_RTOL,
            max_steps=max_steps,
            changes_rounding=True,
        )
        checks = check_correction(
            correction, result.inner_grad, scaling, point, max_ratio=MAX_REMAINING_PART
        )
        is_confirmed = all_solved(checks.solves) & ~checks.is_far
        is_confirmed &= ~any_negative_curvature(checks.solves)
        change = jnp.where(is_confirmed, correction.last_change, jnp.inf)
        change = change.astype(error.correction.dtype)
        confirmed = error._replace(
            correction=change, correction_bound=change, relative_change=change
        )
        num_products = sum(map(count_products, correction.solves))
        return confirmed, jnp.asarray(num_products + checks.num_products, float)

    confirmed, num_products = apply_unless(
        ~is_decisive, confirm, (error, jnp.zeros((), float))
    )
    return confirmed, num_products, is_decisive.astype(int)
