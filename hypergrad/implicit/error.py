"""Estimates of the error of a hypergradient by implicit differentiation.

Let ``w* = w - d`` with ``H d = dL/dw`` be the argmin to first order, and ``w+`` an
approximation of it. With ``r+ = dM/dw(w+) - H(w+) v``, ``psi+ = dM/dalpha(w+) - J(w+)'
v`` and the hypergradient ``h = dM/dalpha - J' v`` at ``w``, the error of ``h`` is

    h* - h = psi+ - h - J' H^-1 r+,    u'(h* - h) = u'(psi+ - h) - y'r+

for any direction ``u`` of ``alpha``, with the dual vector ``y = H^-1 J u``. Both the
error of ``w`` and that of the adjoint are in it, and neither depends on the units of
``w``. Conjugate gradients for the adjoint approximate ``d`` and ``y`` in the same
iterations; ``J u`` costs two products, and a last step of ``d`` one.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree, Scalar

from ..linear.base import MatVec
from ..linear.equilibration import Scaling
from ..linear.scaled_cg import ScaledSolution, add_gradient_step, scaled_cg
from ..problem import Bilevel
from ..products import hvp_and_cross_vjp, pushforward
from ..trees import (
    add_scale,
    as_row,
    concatenate,
    divide,
    hash_normal,
    is_zero,
    machine_eps,
    norm,
    norm_ratio,
    power_of_two_scale,
    ratio,
    safe_norm,
    underflows,
    vdot,
)
from .differentiation import ImplicitResult, Point
from .minimum import (
    curvature_vanishes,
    gradient_rounding,
    is_cancelled,
    perturb_by_rounding,
    scales_of_rounding,
    uses_w_in_each_loss,
)

NUM_DIRECTIONS = 2  # random directions ``u`` of ``alpha``
# With two random directions the norm of an error exceeds six times its estimate with a
# probability of 1 - exp(-1/36) = 3%. Three times the estimate must be within tolerance,
# so that an error of twice the tolerance is rarely trusted.
CORRECTION_FACTOR = 3.0
MAX_CONDITION = 0.25  # of S H S in units of 1 / eps, above which rounding decides
NUM_CHECK_STEPS = 25  # CG steps for the terms where the adjoint solver yields none
NUM_ERROR_PRODUCTS = 2  # of `estimate_error` for each loss, at least
# Errors up to which a Newton correction is near the argmin, so that negative curvature
# that vanishes on the way to it is ignored.
MAX_ERROR_NEAR_ARGMIN = 0.1


class CorrectionTerms(NamedTuple):
    """Approximations from which the error of a hypergradient is estimated.

    With K outer losses each leaf has a leading axis of size K.

    Attributes:
      inner_step: ``d``, structured like ``w``.
      grad_residual: ``dL/dw - H d``, what ``d`` leaves of ``dL/dw``.
      duals: ``y`` for each direction, ``[2, ...]``.
      adjoint_change: The ``expected_error`` of `ScaledSolution`: how much ``v`` would
        still change, estimated from its last changes in the solve.
      last_direction: ``p``, the last direction of the solve, in scaled coordinates.
      curvature_min: The smallest curvature that the solve met, which is that along
        ``p`` if it is negative.
      is_negative: Whether the solve met negative curvature.
      is_ill_conditioned: Whether it met a curvature so small, compared with the
        largest, that rounding errors of products change it much.
    """

    inner_step: PyTree
    grad_residual: PyTree
    duals: PyTree
    adjoint_change: PyTree
    last_direction: PyTree
    curvature_min: Scalar
    is_negative: Scalar
    is_ill_conditioned: Scalar


class HypergradientError(NamedTuple):
    """Estimated relative errors of a hypergradient, the maximum over K losses.

    Attributes:
      correction: ``||h* - h|| / ||h||`` from two random directions ``u``.
      correction_bound: ``correction`` times `CORRECTION_FACTOR`; without the factor if
        ``alpha`` is one or two numbers, for which ``correction`` is the norm itself.
      relative_change: The change of ``h`` from ``w`` to ``w+`` at a fixed adjoint, and
        the change of the residual of the adjoint times ``||J' v||``, over ``||h||``.
        Infinite if nothing is known of the distance to the argmin.
      adjoint_change: ``||J' dv|| / ||h||`` with the change ``dv`` that is still
        expected of the adjoint.
      adjoint_residual: ``||S (b - H v)|| / ||S b||``.
      negative_curvature: Whether the solve for the terms met negative curvature that
        does not vanish near the argmin.
      ill_conditioned: ``is_ill_conditioned`` of `CorrectionTerms`, `is_cancelled`, or
        `underflows` for the gradient of an outer loss that uses ``w``.
    """

    correction: Scalar
    correction_bound: Scalar
    relative_change: Scalar
    adjoint_change: Scalar
    adjoint_residual: Scalar
    negative_curvature: Scalar
    ill_conditioned: Scalar

    @property
    def inner_error(self) -> Scalar:
        """The error that is attributed to ``w`` if the adjoint is accurate."""
        return jnp.maximum(self.correction_bound, self.relative_change)

    @property
    def adjoint_error(self) -> Scalar:
        """The larger one of the expected change and the residual of the adjoint."""
        return jnp.maximum(self.adjoint_change, self.adjoint_residual)

    @property
    def error_estimate(self) -> Scalar:
        """The estimated relative error of the hypergradient."""
        return jnp.maximum(self.correction, self.adjoint_change)

    def flags(self, rtol: Scalar | float) -> dict[str, Scalar]:
        """Returns which of the two solves is too inaccurate for ``rtol``.

        The correction contains the error of the adjoint, so that it says nothing about
        the inner solve unless the adjoint is accurate.
        """
        is_adjoint_accurate = self.adjoint_error <= rtol
        return {
            "inner_error": is_adjoint_accurate & ~(self.inner_error <= rtol),
            "adjoint_residual": ~is_adjoint_accurate,
            "ill_conditioned": self.ill_conditioned,
        }


def correction_targets(point: Point) -> PyTree:
    """Returns ``dL/dw`` and ``J u`` for two directions, with a leading axis of size 3.

    The solutions of ``H x = target`` are ``d`` and the duals.

    Cost: two products.
    """
    problem, w, alpha, batch, _ = point
    loss = eqx.filter_jit(problem.inner_loss)  # traced once, as by all products
    grad_fn = lambda alpha: jax.grad(loss)(w, alpha, batch)
    inner_grad, columns = pushforward(grad_fn, alpha, random_directions(alpha))
    return concatenate(as_row(inner_grad), columns)


def correction_terms(
    matvec: MatVec, solution: ScaledSolution, scaling: Scaling
) -> CorrectionTerms:
    """Returns the terms from an adjoint solve with `correction_targets`.

    ``d`` and the duals have one step along the rest of ``dL/dw``, because ``dM/dw`` may
    have no part in a direction on which ``dM/dalpha`` or ``dM/dw(w+)`` depends.

    Cost: one product.
    """
    row = lambda rows, tree: jax.tree.map(lambda leaf: leaf[rows], tree)
    rows = slice(0, 1 + NUM_DIRECTIONS)
    solutions, residuals = add_gradient_step(
        matvec,
        row(rows, solution.target_solutions),
        row(rows, solution.target_residuals),
        scaling,
        solution.curvature_max,
    )
    eps = machine_eps(solution.v)
    curvature_min = solution.curvature_min
    rounding = eps / MAX_CONDITION * solution.curvature_max
    return CorrectionTerms(
        inner_step=row(0, solutions),
        grad_residual=row(0, residuals),
        duals=row(slice(1, 1 + NUM_DIRECTIONS), solutions),
        adjoint_change=solution.expected_error,
        last_direction=solution.last_direction,
        curvature_min=curvature_min,
        is_negative=solution.is_negative,
        is_ill_conditioned=(curvature_min < rounding) & ~solution.is_negative,
    )


def random_directions(alpha: PyTree) -> PyTree:
    """Returns two directions of ``alpha`` with a leading axis, always the same ones.

    They are pseudo-random, orthogonal where ``alpha`` has more than one number, and so
    long that the mean of ``(u'x)^2`` is ``||x||^2`` in expectation. For one or two
    numbers it is equal to it.
    """
    flat, unravel = ravel_pytree(alpha)
    u = hash_normal(0, jnp.zeros((NUM_DIRECTIONS, flat.size), float))
    u0 = u[0] / jnp.linalg.norm(u[0])
    u1 = u0 if flat.size == 1 else u[1] - u0 * jnp.vdot(u0, u[1])
    u = jnp.stack([u0, u1 / jnp.linalg.norm(u1)]) * flat.size**0.5
    return jax.vmap(unravel)(u.astype(flat.dtype))


def zero_duals(problem: Bilevel, w: PyTree) -> PyTree:
    """Returns the first duals: zeros ``[2, ...]``, with K losses ``[K, 2, ...]``."""
    lead = (*problem.value_shape, NUM_DIRECTIONS)
    zeros = lambda leaf: jnp.zeros(lead + leaf.shape, leaf.dtype)
    return jax.tree.map(zeros, w)


def short_correction_terms(
    point: Point, scaling: Scaling, result: ImplicitResult
) -> tuple[CorrectionTerms, Scalar]:
    """Returns terms for an adjoint of any solver, from 25 steps of `scaled_cg`.

    They replace the expected change of ``v`` by ``H^-1 (b - H v)``.

    Returns:
      The terms, and the number of products.
    """
    matvec, targets = point.matvec, correction_targets(point)

    def solve(b, residual):
        solution = scaled_cg(
            matvec,
            b,
            scaling,
            rtol=0.0,
            max_steps=NUM_CHECK_STEPS,
            targets=concatenate(targets, as_row(residual)),
        )
        terms = correction_terms(matvec, solution, scaling)
        change = jax.tree.map(lambda leaf: leaf[-1], solution.target_solutions)
        return terms._replace(adjoint_change=change), solution.num_products + 1

    per_loss = point.problem.for_each_loss
    terms, num_products = per_loss(solve)(result.b, result.residual)
    # K right-hand sides take K times the products of the slowest of them.
    num_products = jnp.size(num_products) * jnp.max(num_products)
    return terms, num_products + NUM_DIRECTIONS


def estimate_error(
    point: Point,
    scaling: Scaling,
    result: ImplicitResult,
    terms: CorrectionTerms,
) -> tuple[HypergradientError, Array]:
    """Returns the estimated relative error of a hypergradient, and the products made.

    Near a minimum ``dL/dw`` at ``w - d`` is ``dL/dw - H d`` up to second order. If the
    difference exceeds ``dL/dw`` itself, and rounding, a Newton step says nothing about
    where the minimum is, as at a point that oscillates around a kink.

    No estimate sees a direction in which neither ``dM/dw`` nor ``dL/dw`` has a part
    that the solve resolved, another minimum than the nearest, or noise of batches.

    Cost: two products and one outer gradient; a third product after negative curvature;
    `scales_of_rounding` if the difference exceeds ``dL/dw``.

    Source: the dual-weighted residual, Becker & Rannacher 2001, applied to the pair of
    ``w`` and its adjoint.
    """
    problem, w, alpha, *_ = point
    is_moving = ~is_zero(result.inner_grad)
    scaled_norm = lambda x: safe_norm(scaling.multiply(x))
    correct = problem.for_each_loss(lambda d: add_scale(w, -1, d))
    new_w = correct(terms.inner_step)  # w+ = w - d
    # An outer gradient that the numbers of w do not resolve is changed by rounding.
    new_b, new_direct = _outer_grads(point, perturb_by_rounding(new_w))

    def error_of_loss(parts, terms, new_w, new_b, new_direct, reads_w):
        new_grad, *products = _products_at_correction(
            point._replace(w=new_w), parts.adjoint, terms
        )
        model_error = scaled_norm(optax.tree.sub(new_grad, terms.grad_residual))
        # Without b there is no Krylov space that could contain a part of d.
        is_blind = is_zero(parts.b) & is_moving & reads_w
        derivatives = _DerivativesAtCorrection(new_b, new_direct, *products)
        error = _relative_errors(alpha, scaling, parts, terms, derivatives, is_blind)
        max_error = jnp.maximum(error.inner_error, error.adjoint_error)
        vanishes = curvature_vanishes(
            point,
            scaling,
            jnp.where(terms.is_negative, terms.curvature_min, 0.0),
            terms.last_direction,
            terms.inner_step,
        )
        vanishes &= max_error <= MAX_ERROR_NEAR_ARGMIN
        is_negative = terms.is_negative & ~vanishes
        return error._replace(negative_curvature=is_negative), model_error

    parts = _Parts(
        result.hypergradient, result.b, result.adjoint, result.cross, result.residual
    )
    reads_w = uses_w_in_each_loss(point)
    errors, model_errors = problem.for_each_loss(error_of_loss)(
        parts, terms, new_w, new_b, new_direct, reads_w
    )
    is_suspect = reads_w & ~(model_errors <= scaled_norm(result.inner_grad))
    grad_scale, residual_scale, num_scale_products = scales_of_rounding(
        point, scaling, jnp.any(is_suspect)
    )
    rounding = gradient_rounding(grad_scale, residual_scale, scaling)
    is_wrong = is_suspect & ~(model_errors <= rounding)
    changes = jnp.where(is_wrong, jnp.inf, errors.relative_change)
    # All losses make the product if one of them needs it.
    is_checked = terms.is_negative & (terms.curvature_min < 0)
    num_negative = is_checked.size * jnp.any(is_checked)
    num_products = (
        NUM_ERROR_PRODUCTS * is_checked.size + num_negative + num_scale_products
    )
    is_lost = reads_w & problem.for_each_loss(underflows)(result.b)
    errors = errors._replace(
        relative_change=changes, ill_conditioned=errors.ill_conditioned | is_lost
    )
    return jax.tree.map(jnp.max, errors), num_products


class _Parts(NamedTuple):
    """The parts of an `ImplicitResult` that differ between outer losses."""

    h: PyTree
    b: PyTree
    adjoint: PyTree
    cross: PyTree
    residual: PyTree


class _DerivativesAtCorrection(NamedTuple):
    """Derivatives at ``w+``.

    Attributes:
      b, direct: ``dM/dw`` and ``dM/dalpha``.
      Hv, cross: ``H v`` and ``J' v`` with the adjoint.
      cross_change: ``J' dv`` with the expected change of the adjoint.
    """

    b: PyTree
    direct: PyTree
    Hv: PyTree
    cross: PyTree
    cross_change: PyTree


def _relative_errors(
    alpha: PyTree,
    scaling: Scaling,
    result: _Parts,
    terms: CorrectionTerms,
    new: _DerivativesAtCorrection,
    is_blind: Array,
) -> HypergradientError:
    """Returns the errors of the hypergradient of one outer loss.

    ``is_blind`` says that nothing is known of the distance to the argmin.
    """
    # psi+ - h and r+, the latter in the coordinates of S H S
    change = optax.tree.sub(optax.tree.sub(new.direct, new.cross), result.h)
    new_residual = scaling.multiply(optax.tree.sub(new.b, new.Hv))
    residual = scaling.multiply(result.residual)
    residual_change = optax.tree.sub(new_residual, residual)
    scaled_b = scaling.multiply(result.b)
    unit = power_of_two_scale(result.h)
    relative_to_h = lambda x: ratio(x, norm(divide(result.h, unit)))

    def directional_error(u, y):
        # u'(h* - h) = u'(psi+ - h) - y'r+
        return vdot(u, divide(change, unit)) - _safe_vdot(
            scaling.divide(y), new_residual, unit
        )

    errors = jax.vmap(directional_error)(random_directions(alpha), terms.duals)
    correction = relative_to_h(jnp.sqrt(jnp.mean(errors**2)))
    adjoint_change = relative_to_h(norm(divide(new.cross_change, unit)))
    has_change = ~is_zero(terms.adjoint_change)  # else J(w+) may be NaN all the same
    relative_change = relative_to_h(
        norm(divide(change, unit))
        + norm(divide(result.cross, unit)) * norm_ratio(residual_change, scaled_b)
    )
    return HypergradientError(
        correction=correction,
        correction_bound=_correction_factor(alpha) * correction,
        relative_change=jnp.where(is_blind, jnp.inf, relative_change),
        adjoint_change=jnp.where(has_change, adjoint_change, 0.0),
        adjoint_residual=norm_ratio(residual, scaled_b),
        negative_curvature=terms.is_negative,
        ill_conditioned=terms.is_ill_conditioned
        | is_cancelled(result.h, result.cross, result.adjoint),
    )


def _correction_factor(alpha: PyTree) -> float:
    """Returns the factor of ``correction_bound`` in `HypergradientError`."""
    num_alpha = optax.tree.size(alpha)
    return CORRECTION_FACTOR if num_alpha > NUM_DIRECTIONS else 1.0


def _outer_grads(point: Point, new_w: PyTree) -> tuple[PyTree, PyTree]:
    """Returns ``dM/dw`` and ``dM/dalpha`` at ``w+``, of each of K losses at its own."""
    problem, _, alpha, _, outer_batch = point
    grads = lambda loss, w: jax.grad(loss, argnums=(0, 1))(w, alpha, outer_batch)
    if problem.num_objectives is None:
        return grads(problem.outer_loss, new_w)
    row = lambda k: jax.tree.map(lambda leaf: leaf[k], new_w)
    per_loss = [grads(loss, row(k)) for k, loss in enumerate(problem.outer_losses)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_loss)


def _products_at_correction(
    point: Point, adjoint: PyTree, terms: CorrectionTerms
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """Returns ``dL/dw``, ``H v``, ``J' v`` and ``J' dv`` at a point, that of ``w+``.

    ``dv`` is the expected change of the adjoint.
    """
    problem, w, alpha, batch, _ = point
    products = lambda v: hvp_and_cross_vjp(problem.inner_loss, w, alpha, batch, v)
    vectors = jax.tree.map(lambda *v: jnp.stack(v), adjoint, terms.adjoint_change)
    grad, Hv, cross = jax.vmap(products, out_axes=(None, 0, 0))(vectors)
    row = lambda i, tree: jax.tree.map(lambda leaf: leaf[i], tree)
    return grad, row(0, Hv), row(0, cross), row(1, cross)


def _safe_vdot(x: PyTree, y: PyTree, unit: Array) -> Array:
    """Returns ``x'y / unit``, where the product of single entries may overflow."""
    x_unit, y_unit = power_of_two_scale(x), power_of_two_scale(y)
    return vdot(divide(x, x_unit), divide(y, y_unit)) * (x_unit / unit) * y_unit
