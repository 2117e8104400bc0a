"""Implicit differentiation at one point, and Newton steps towards the argmin.

With ``H = d2L/dw2``, ``J = d2L/dw dalpha`` and ``b = dM/dw``, the implicit function
theorem gives the hypergradient ``dM/dalpha - J' v``, where the adjoint ``v`` solves
``H v = b``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, Float, PyTree

from ..keys_in_w import remove_keys, restore_keys
from ..linear.base import LinearStats, MatVec, relative_residual, solve_linear
from ..linear.equilibration import Scaling
from ..linear.scaled_cg import ScaledSolution, scaled_cg
from ..problem import Bilevel
from ..products import hvp, hvp_and_cross_vjp
from ..trees import (
    add_scale,
    all_finite,
    apply_unless,
    is_zero,
    machine_eps,
    norm_ratio,
    relative_error,
    safe_norm,
    vdot,
)

#: ``(w, alpha, batch, v) -> product``, a substitute for ``H v`` in the adjoint solve.
HvpFn = Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]

EMPTY_LINEAR_STATS: dict[str, Any] = {
    "num_products": 0.0,
    "ritz_min": jnp.nan,
    "ritz_max": jnp.nan,
    "negative_curvature": False,
}


class Point(NamedTuple):
    """A problem and the point at which it is differentiated.

    Attributes:
      problem: The bilevel problem.
      w, alpha: The point.
      batch, outer_batch: Batches of the inner and the outer loss.
    """

    problem: Bilevel
    w: PyTree
    alpha: PyTree
    batch: PyTree
    outer_batch: PyTree

    @property
    def matvec(self) -> MatVec:
        """The function ``v -> H v``."""
        # A lambda, because JAX hashes bound methods by value, arrays included.
        return lambda v: hvp(self.problem.inner_loss, self.w, self.alpha, self.batch, v)


class ImplicitResult(eqx.Module):
    """The hypergradient by implicit differentiation at one ``w``, and its parts.

    With K outer losses each leaf has a leading axis of size K, except ``inner_grad``.

    Attributes:
      value: Outer value ``M(w, alpha)``.
      hypergradient: ``dM/dalpha - J' v``, which assumes that ``dL/dw = 0`` at ``w``.
      b: Outer gradient ``dM/dw``.
      adjoint: ``v``, structured like ``w``.
      cross: ``J' v``, structured like ``alpha``.
      inner_grad: ``dL/dw``.
      residual: ``b - H v``, without damping.
      adjoint_residual: ``||residual|| / ||b||``.
      linear_stats: Statistics of the adjoint solve. ``num_products`` includes the
        product that yields the cross term.
    """

    value: Float[Array, "*K"]
    hypergradient: PyTree
    b: PyTree
    adjoint: PyTree
    cross: PyTree
    inner_grad: PyTree
    residual: PyTree
    adjoint_residual: Float[Array, "*K"]
    linear_stats: LinearStats


def implicit_hypergradient(
    point: Point,
    linear_solver: lx.AbstractLinearSolver,
    init_adjoint: PyTree,
    damping: Array | float = 0.0,
    prepared: PyTree = None,
    hvp_fn: HvpFn | None = None,
    scaling: Scaling | None = None,
) -> ImplicitResult:
    """Returns ``dM/dalpha - J' v`` with ``(H + damping I) v = dM/dw``.

    Args:
      point: Where the derivatives are taken.
      linear_solver: Solver of the adjoint system.
      init_adjoint: Where an iterative solver starts; structured like `zero_adjoint`.
      damping: Number added to the diagonal of ``H`` in the solve.
      prepared: Data that the linear solver reuses from an earlier ``H``, or None.
      hvp_fn: Replaces ``H v`` in the solve. The residual and the sign of ``v'Hv`` are
        still computed with ``H``; nothing else is then known of its spectrum.
      scaling: Diagonal scaling of ``H + damping I``, if it is known.
    """
    matvec = damped_hvp_fn(point, damping, hvp_fn)

    def solve(b, init_v):
        # (H + damping I) v = b
        v, linear_stats = solve_linear(
            linear_solver, matvec, b, init_v, prepared, scaling
        )
        if hvp_fn is not None:  # the solver saw the spectrum of another operator
            unknown = jnp.full_like(linear_stats["ritz_min"], jnp.nan)
            linear_stats |= {"ritz_min": unknown, "ritz_max": unknown}
            linear_stats["negative_curvature"] = jnp.asarray(False)
        return v, linear_stats, None

    result, _ = _differentiate(point, solve, init_adjoint, relative_residual)
    return result


def scaled_hypergradient(
    point: Point,
    scaling: Scaling,
    subspace: PyTree,
    *,
    rtol: Array | float | None = None,
    max_steps: int | None = None,
    targets: PyTree | None = None,
) -> tuple[ImplicitResult, ScaledSolution]:
    """Returns ``dM/dalpha - J' v`` with ``H v = dM/dw`` solved by `scaled_cg`.

    Args:
      point: Where the derivatives are taken.
      scaling: Diagonal scaling ``S`` of ``H``.
      subspace: Vectors ``[k, ...]`` that the search space contains, such as earlier
        solutions; with K outer losses ``[K, k, ...]``.
      rtol, max_steps, targets: As for `scaled_cg`.

    Returns:
      The result, whose ``adjoint_residual`` is ``||S (b - H v)|| / ||S b||``, and the
      solution of the adjoint system, with a leading axis of size K for K outer losses.
    """

    def solve(b, subspace):
        solution = scaled_cg(
            point.matvec,
            b,
            scaling,
            rtol=rtol,
            max_steps=max_steps,
            targets=targets,
            subspace=subspace,
        )
        return solution.v, solution.linear_stats, solution

    residual = lambda b, Hv: relative_residual(
        scaling.multiply(b), scaling.multiply(Hv)
    )
    return _differentiate(point, solve, subspace, residual)


def corrected_hypergradient(
    point: Point,
    scaling: Scaling,
    adjoint: PyTree,
    rtol: float,
    max_steps: Array | int | None = None,
) -> ImplicitResult:
    """Returns ``dM/dalpha - J' (v + e)`` with ``H e = dM/dw - H v``, by `scaled_cg`.

    Args:
      point, scaling: As for `scaled_hypergradient`.
      adjoint: ``v``, structured like `zero_adjoint`.
      rtol: Residual of the solve relative to its own right-hand side, which resolves
        slow directions that the solve for ``v`` left.
      max_steps: As for `scaled_cg`.

    Cost: one product in addition to those of the solve, if ``v`` is not zero.
    """
    matvec = point.matvec

    def solve(b, v):
        has_no_v = is_zero(v)
        r = apply_unless(has_no_v, lambda b: optax.tree.sub(b, matvec(v)), b)
        # What is below the rounding of H v is noise.
        eps = machine_eps(b)
        noise = 4 * eps * norm_ratio(scaling.multiply(b), scaling.multiply(r))
        min_rtol = jnp.fmin(noise, 1.0)  # r may be zero
        solution = scaled_cg(
            matvec,
            r,
            scaling,
            rtol=jnp.maximum(rtol, min_rtol),
            max_steps=max_steps,
        )
        linear_stats = solution.linear_stats
        linear_stats["num_products"] += jnp.where(has_no_v, 0, 1)
        return optax.tree.add(v, solution.v), linear_stats, None

    result, _ = _differentiate(point, solve, adjoint, relative_residual)
    return result


def _differentiate(
    point: Point,
    solve: Callable[[PyTree, PyTree], tuple[PyTree, LinearStats, Any]],
    init: PyTree,
    residual_fn: Callable[[PyTree, PyTree], Array],
) -> tuple[ImplicitResult, Any]:
    """Returns implicit differentiation, and the solver's own result.

    ``solve(b, init)`` returns ``v``, statistics and anything else for one outer loss;
    ``residual_fn(b, H v)`` is the statistic ``adjoint_residual``.
    """
    problem, w, alpha, batch, outer_batch = point
    value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)

    def solve_adjoint(b, init):
        v, linear_stats, solution = solve(b, init)
        # One more product yields dL/dw, J' v, and the H v of the true residual.
        inner_grad, Hv, cross = hvp_and_cross_vjp(
            problem.inner_loss, w, alpha, batch, v
        )
        linear_stats["num_products"] += 1
        linear_stats["negative_curvature"] |= vdot(v, Hv) < 0
        residuals = optax.tree.sub(b, Hv), residual_fn(b, Hv)
        return inner_grad, v, cross, residuals, linear_stats, solution

    if problem.num_objectives is not None:
        solve_adjoint = jax.vmap(solve_adjoint, out_axes=(None, 0, 0, 0, 0, 0))
    inner_grad, v, cross, residuals, linear_stats, solution = solve_adjoint(b, init)
    residual, adjoint_residual = residuals
    result = ImplicitResult(
        value=value,
        # dM/dalpha - J' v
        hypergradient=optax.tree.sub(direct, cross),
        b=b,
        adjoint=v,
        cross=cross,
        inner_grad=inner_grad,
        residual=residual,
        adjoint_residual=adjoint_residual,
        linear_stats=linear_stats,
    )
    return result, solution


def damped_hvp_fn(point: Point, damping: Array | float, hvp_fn: HvpFn | None) -> MatVec:
    """Returns the function ``v -> (H + damping I) v``.

    ``hvp_fn`` replaces ``H v`` unless it is None.
    """
    matvec = point.matvec
    if hvp_fn is not None:
        product = _with_keys(hvp_fn, point.problem.keys_of_w)
        matvec = lambda v: product(point.w, point.alpha, point.batch, v)
    return lambda v: add_scale(matvec(v), damping, v)


def _with_keys(hvp_fn: HvpFn, keys: PyTree | None) -> HvpFn:
    """Returns ``hvp_fn`` as a function of parameters alone, for the keys in ``w``.

    Like a loss, ``hvp_fn`` gets a ``w`` with its keys, and a ``v`` of this structure.
    """
    if keys is None:
        return hvp_fn

    def product(w: PyTree, alpha: PyTree, batch: PyTree, v: PyTree) -> PyTree:
        Hv = hvp_fn(restore_keys(w, keys), alpha, batch, restore_keys(v, keys))
        return remove_keys(Hv)

    return product


def zero_adjoint(problem: Bilevel, w: PyTree) -> PyTree:
    """Returns the first adjoint: zeros like ``w``, with K losses on a leading axis."""
    zeros = lambda leaf: jnp.zeros(problem.value_shape + leaf.shape, leaf.dtype)
    return jax.tree.map(zeros, w)


def finite_or_zero(adjoint: PyTree | None) -> PyTree | None:
    """Returns the adjoint, or zeros if an earlier estimate left a NaN in it."""
    if adjoint is None:
        return None
    zeros = optax.tree.zeros_like(adjoint)
    return optax.tree.where(all_finite(adjoint), adjoint, zeros)


def max_relative_error(problem: Bilevel, actual: PyTree, expected: PyTree) -> Array:
    """Returns ``||actual - expected|| / ||expected||``, the maximum over K losses."""
    return jnp.max(problem.for_each_loss(relative_error)(actual, expected))


# Newton steps towards the argmin.


def newton_step(
    point: Point,
    inner_grad: PyTree,
    scaling: Scaling,
    rtol: Array | float,
    max_steps: Array | int | None = None,
) -> tuple[PyTree, LinearStats]:
    """Returns ``w - d`` with ``H d = dL/dw``, and the statistics of `scaled_cg`."""
    solution = scaled_cg(
        point.matvec, inner_grad, scaling, rtol=rtol, max_steps=max_steps
    )
    return add_scale(point.w, -1, solution.v), solution.linear_stats


def safeguarded_newton_steps(
    point: Point,
    inner_grad: PyTree,
    scaling: Scaling,
    rtols: Sequence[Array | float],
    total_linear_stats: LinearStats,
) -> tuple[PyTree, LinearStats]:
    """Returns ``w`` after Newton-CG steps, and the accumulated statistics.

    A step that does not decrease ``||S dL/dw||``, or for which CG detects negative
    curvature, is rejected.

    Args:
      point: Where the first step starts.
      inner_grad: ``dL/dw`` there.
      scaling: Diagonal scaling ``S`` of ``H``.
      rtols: Tolerance of CG in each step; as many steps are made.
      total_linear_stats: Statistics of earlier solves.

    Cost: one gradient per step in addition to the products.
    """
    for rtol in rtols:
        new_w, linear_stats = newton_step(point, inner_grad, scaling, rtol)
        new_grad = jax.grad(point.problem.inner_loss)(new_w, point.alpha, point.batch)
        scaled_norm = lambda grad: safe_norm(scaling.multiply(grad))
        is_accepted = scaled_norm(new_grad) < scaled_norm(inner_grad)
        is_accepted = is_accepted & ~linear_stats["negative_curvature"]
        point = point._replace(w=optax.tree.where(is_accepted, new_w, point.w))
        inner_grad = optax.tree.where(is_accepted, new_grad, inner_grad)
        total_linear_stats = merge_linear_stats(total_linear_stats, linear_stats)
    return point.w, total_linear_stats


# Statistics of several solves.


def count_products(linear_stats: LinearStats) -> Array:
    """Returns the products made for all right-hand sides, shared ones counted once.

    Under `jax.vmap` each step of a solver makes a product for every right-hand side, so
    that K right-hand sides take K times the products of the slowest of them.
    """
    num_shared = linear_stats["num_shared"]
    num_unshared = linear_stats["num_products"] - num_shared
    return num_unshared.size * jnp.max(num_unshared) + jnp.max(num_shared)


def all_solved(solves: list[LinearStats]) -> Array:
    """Returns whether every solve reached its tolerance."""
    return jnp.all(jnp.stack([jnp.all(stats["is_solved"]) for stats in solves]))


def any_negative_curvature(solves: list[LinearStats]) -> Array:
    """Returns whether a solve met negative curvature."""
    return jnp.any(
        jnp.stack([jnp.any(stats["negative_curvature"]) for stats in solves])
    )


def merge_linear_stats(total: LinearStats, new: LinearStats) -> LinearStats:
    """Returns the statistics of earlier solves extended by another solve."""
    return {
        "num_products": total["num_products"] + count_products(new),
        "ritz_min": jnp.fmin(total["ritz_min"], jnp.nanmin(new["ritz_min"])),
        "ritz_max": jnp.fmax(total["ritz_max"], jnp.nanmax(new["ritz_max"])),
        "negative_curvature": total["negative_curvature"]
        | jnp.any(new["negative_curvature"]),
    }
