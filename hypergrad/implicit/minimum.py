"""Checks of whether a point is near a minimum, by the gradient and the curvature."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..jaxprs.inspection import uses_w
from ..linear.base import MatVec
from ..linear.equilibration import Scaling
from ..products import value_and_hvp
from ..trees import (
    add_scale,
    apply_unless,
    cast_like,
    divide,
    hash_normal,
    machine_eps,
    norm,
    norm_ratio,
    power_of_two_scale,
    safe_norm,
    scale,
    vdot,
)
from .differentiation import Point

NUM_SCALE_PROBES = 8
ROUNDING_SEED = 7  # of the signs of `perturb_by_rounding`
MAX_ROUNDING_OF_H = 1e-2
# Negative curvature is ignored if at most a quarter of it remains after a correction.
MAX_REMAINING_CURVATURE = 0.25


def gradient_scale(matvec: MatVec, w: PyTree, like: PyTree = None) -> PyTree:
    """Returns estimates of ``(sum_j (H_ij w_j)^2)^(1/2)``, structured like ``H v``.

    If ``|g_i|`` is at most ``tau`` times this root for every entry of a gradient, then
    ``w`` is stationary for a quadratic model whose Hessian entries are changed by about
    a fraction ``tau``. The units of ``w`` do not matter, but its origin does. The root
    is the standard deviation of ``(H D z)_i`` with ``D = diag(w)`` and a standard
    normal ``z``, estimated from the mean of the absolute values.

    Args:
      matvec: Function ``v -> H v``.
      w: Factors of the columns of ``H``, such as the point at which it was evaluated.
      like: Pytree with the structure of ``H v``. Defaults to ``w``.

    Cost: `NUM_SCALE_PROBES` products.

    Source: after Oettli & Prager 1964 (Numer. Math. 6, 405-409), with a root of squares
    in place of their sum of absolute values.
    """

    def probe(i, total):
        Hz = matvec(jax.tree.map(jnp.multiply, w, hash_normal(i, w)))
        return jax.tree.map(lambda total, x: total + jnp.abs(x), total, Hz)

    zeros = optax.tree.zeros_like(w if like is None else like)
    total = jax.lax.fori_loop(0, NUM_SCALE_PROBES, probe, zeros)
    return _normal_deviation(scale(1 / NUM_SCALE_PROBES, total))


def _normal_deviation(mean_abs: PyTree) -> PyTree:
    """Returns ``sigma`` of a normal ``x`` with mean zero and this mean of ``|x|``."""
    # E |x| = (2 / pi)^(1/2) sigma
    return scale((math.pi / 2) ** 0.5, mean_abs)


def is_stationary(grad: PyTree, grad_scale: PyTree, power: float = 0.75) -> Array:
    """Returns whether each entry of a gradient is at most ``eps^power`` of its scale.

    Solvers stop by default at ``eps^(3/4)`` of a right-hand side.
    """

    def is_small(g, scale):
        tol = float(jnp.finfo(g.dtype).eps) ** power
        return jnp.all((jnp.abs(g) <= tol * scale) & jnp.isfinite(scale))

    leaves = jax.tree.leaves(jax.tree.map(is_small, grad, grad_scale))
    return jnp.all(jnp.stack(leaves))


def perturb_by_rounding(w: PyTree) -> PyTree:
    """Returns ``w (1 + eps z)`` with signs ``z``, which equals ``w`` up to rounding."""

    def change(leaf, z):
        return leaf * (1 + float(jnp.finfo(leaf.dtype).eps) * jnp.sign(z))

    return jax.tree.map(change, w, hash_normal(ROUNDING_SEED, w))


def scales_of_rounding(
    point: Point,
    scaling: Scaling,
    is_needed: Array,
) -> tuple[PyTree, Array, Array]:
    """Returns what the rounding errors of ``dL/dw`` are proportional to.

    These are `gradient_scale` and ``(r |L|)^(1/2)`` with the norm r of a row of ``S H
    S``, and the number of products made for them. All three are zero unless
    ``is_needed``.

    Cost: `NUM_SCALE_PROBES` products and one more if needed.
    """
    problem, w, alpha, batch, _ = point

    def probe(i, carry):
        total, value, _ = carry
        is_last, z = i == NUM_SCALE_PROBES, hash_normal(i, w)
        factors = optax.tree.where(is_last, scaling.s, w)
        v = cast_like(jax.tree.map(jnp.multiply, factors, z), w)
        # Each product evaluates the loss anyway.
        value, Hv = value_and_hvp(problem.inner_loss, w, alpha, batch, v)
        add = lambda total, x: total + jnp.where(is_last, 0, jnp.abs(x))
        # The entries of S H S z have the norms of its rows as standard deviations.
        row_norm = norm_ratio(scaling.multiply(Hv), z)
        return jax.tree.map(add, total, Hv), jnp.abs(value), row_norm

    num_probes = NUM_SCALE_PROBES + 1
    init = optax.tree.zeros_like(jax.eval_shape(probe, 0, (w, 0.0, 0.0)))
    measure = lambda init: jax.lax.fori_loop(0, num_probes, probe, init)
    total, value, row_norm = apply_unless(~is_needed, measure, init)
    grad_scale = _normal_deviation(scale(1 / NUM_SCALE_PROBES, total))
    residual_scale = jnp.sqrt(row_norm) * jnp.sqrt(value)
    return grad_scale, residual_scale, jnp.where(is_needed, num_probes, 0)


def gradient_rounding(
    grad_scale: PyTree, residual_scale: Array, scaling: Scaling
) -> Array:
    """Returns a norm of ``S dL/dw`` up to which ``w`` counts as stationary.

    It is ``eps^(3/4) (||S q|| + (r |L|)^(1/2))`` with the ``q`` of `gradient_scale` and
    the norm r of a row of ``S H S``. The first term is the rounding of ``H w``, the
    second one that of the gradient ``X'e`` of a sum of squares ``L = ||e||^2 / 2``
    whose residuals ``e`` do not vanish: ``S X'X S`` has rows of norm r. Neither units
    of ``w`` nor a factor of ``L`` change what it means; a constant that is added to
    ``L`` raises it.

    Args:
      grad_scale, residual_scale: From `scales_of_rounding`.
      scaling: ``S``.
    """
    tol = lambda x: float(jnp.finfo(x.dtype).eps) ** 0.75
    scaled = scaling.multiply(jax.tree.map(lambda q: tol(q) * q, grad_scale))
    rounding = safe_norm(scaled) + tol(residual_scale) * residual_scale
    return jnp.where(jnp.isfinite(rounding), rounding, 0.0)


def uses_w_in_each_loss(point: Point) -> Array:
    """Returns whether each outer loss uses ``w``, ``[*K]``."""
    problem, w, alpha, _, outer_batch = point
    uses = [uses_w(loss, w, alpha, outer_batch) for loss in problem.outer_losses]
    return jnp.array(uses).reshape(problem.value_shape)


def is_cancelled(h: PyTree, cross: PyTree, adjoint: PyTree) -> Array:
    """Returns whether the parts of ``h = dM/dalpha - J'v`` cancel up to rounding.

    It is so if their rounding errors, ``4 eps |J'v|``, may exceed 1% of ``|h|``, and
    ``|J'v|`` exceeds ``2 |h|``.

    Args:
      h: The hypergradient of one outer loss.
      cross: ``J'v``.
      adjoint: ``v``. The coarsest leaf of ``v`` and ``h`` decides on rounding.
    """
    max_ratio = max(2.0, MAX_ROUNDING_OF_H / (4 * machine_eps(h, adjoint)))
    unit = power_of_two_scale(cross)
    return norm(divide(cross, unit)) > max_ratio * norm(divide(h, unit))


def curvature_vanishes(
    point: Point,
    scaling: Scaling,
    curvature: Array,
    last_direction: PyTree,
    inner_step: PyTree,
) -> Array:
    """Returns whether negative curvature along a direction vanishes near the argmin.

    Let ``p`` be this direction and ``w'`` be ``w`` after a Newton correction without
    its part along ``p``. Near minima that form a circle, because a rotation of ``w``
    changes no loss, ``p'Hp`` may be negative of the order of their distance at ``w``,
    and is of second order at ``w'``. Near a saddle point it is about the same at both.
    The part along ``p`` is left out because the solve did not resolve it, and because
    ``w'`` must not leave the saddle point along it.

    Args:
      point: Where the solve met ``p``.
      scaling: Diagonal scaling of ``H``.
      curvature: ``p'S H S p / p'p`` at ``w``.
      last_direction: ``p``, in the coordinates of ``S H S``.
      inner_step: ``d``, the Newton correction as far as the solve resolved it.

    Cost: one product if ``p'Hp`` is negative, none otherwise.
    """
    is_negative = curvature < 0

    def new_curvature(curvature):
        p = divide(last_direction, power_of_two_scale(last_direction))
        # w' = w - S (I - p p' / p'p) S^-1 d
        step = scaling.divide(inner_step)
        step = add_scale(step, -vdot(p, step) / vdot(p, p), p)
        new_w = add_scale(point.w, -1, scaling.multiply(step))
        # p'S H(w') S p / p'p
        Hp = scaling.matvec(point._replace(w=new_w).matvec)(p)
        return (vdot(p, Hp) / vdot(p, p)).astype(curvature.dtype)

    remaining = apply_unless(~is_negative, new_curvature, curvature)
    return is_negative & (remaining > MAX_REMAINING_CURVATURE * curvature)
