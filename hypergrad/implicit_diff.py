"""Implicit differentiation at one point, and Newton steps towards the argmin.

With ``H = d2L/dw2``, ``J = d2L/dw dalpha`` and ``b = dM/dw``, the implicit function
theorem gives the hypergradient ``dM/dalpha - J' v``, where the adjoint ``v`` solves
``H v = b``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, Float, PyTree

from .linear import CG
from .linear.base import LinearStats, relative_residual, solve_linear
from .problem import Bilevel
from .products import Loss, hvp, hvp_and_cross_vjp
from .trees import add_scale, all_finite, norm, relative_error, vdot

#: ``(w, alpha, batch, v) -> product``, a substitute for ``H v`` in the adjoint solve.
HvpFn = Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]

EMPTY_LINEAR_STATS: dict[str, Any] = {
    "num_products": 0.0,
    "ritz_min": jnp.nan,
    "ritz_max": jnp.nan,
    "negative_curvature": False,
}


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
      adjoint_residual: ``||b - H v|| / ||b||``, without damping.
      mean_curvature: ``||b|| / ||v||``, a mean of the eigenvalues of ``H``; NaN for
        ``b = 0``.
      linear_stats: Statistics of the adjoint solve. ``num_products`` includes the
        product that yields the cross term.
    """

    value: Float[Array, "*K"]
    hypergradient: PyTree
    b: PyTree
    adjoint: PyTree
    cross: PyTree
    inner_grad: PyTree
    adjoint_residual: Float[Array, "*K"]
    mean_curvature: Float[Array, "*K"]
    linear_stats: LinearStats


def implicit_hypergradient(
    problem: Bilevel,
    linear_solver: lx.AbstractLinearSolver,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    outer_batch: PyTree,
    init_adjoint: PyTree,
    damping: Array | float = 0.0,
    prepared: PyTree = None,
    hvp_fn: HvpFn | None = None,
) -> ImplicitResult:
    """Returns ``dM/dalpha - J' v`` with ``(H + damping I) v = dM/dw``.

    Args:
      problem: The bilevel problem.
      linear_solver: Solver of the adjoint system.
      w, alpha: Point of differentiation.
      batch, outer_batch: Batches of the inner and the outer loss.
      init_adjoint: Where an iterative solver starts; structured like `zero_adjoint`.
      damping: Number added to the diagonal of ``H`` in the solve.
      prepared: Data that the linear solver reuses from an earlier ``H``, or None.
      hvp_fn: Replaces ``H v`` in the solve. The residual and the sign of ``v'Hv`` are
        still computed with ``H``; nothing else is then known of its spectrum.
    """
    loss = problem.inner_loss
    matvec = damped_hvp_fn(problem, w, alpha, batch, damping, hvp_fn)
    value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)

    def solve_adjoint(b, init_v):
        # (H + damping I) v = b
        v, linear_stats = solve_linear(linear_solver, matvec, b, init_v, prepared)
        # One more product yields dL/dw, J' v, and the H v of the true residual.
        inner_grad, Hv, cross = hvp_and_cross_vjp(loss, w, alpha, batch, v)
        linear_stats["num_products"] += 1
        mean_curvature = norm(b) / norm(v)
        if hvp_fn is not None:  # the solver saw the spectrum of another operator
            unknown = jnp.full_like(mean_curvature, jnp.nan)
            linear_stats |= {"ritz_min": unknown, "ritz_max": unknown}
            linear_stats["negative_curvature"] = jnp.asarray(False)
        linear_stats["negative_curvature"] |= vdot(v, Hv) < 0
        residual = relative_residual(b, Hv)
        return inner_grad, v, cross, residual, mean_curvature, linear_stats

    if problem.num_objectives is not None:
        solve_adjoint = jax.vmap(solve_adjoint, out_axes=(None, 0, 0, 0, 0, 0))
    inner_grad, v, cross, residual, mean_curvature, linear_stats = solve_adjoint(
        b, init_adjoint
    )
    return ImplicitResult(
        value=value,
        # dM/dalpha - J' v
        hypergradient=optax.tree.sub(direct, cross),
        b=b,
        adjoint=v,
        cross=cross,
        inner_grad=inner_grad,
        adjoint_residual=residual,
        mean_curvature=mean_curvature,
        linear_stats=linear_stats,
    )


def damped_hvp_fn(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    damping: Array | float,
    hvp_fn: HvpFn | None,
) -> Callable[[PyTree], PyTree]:
    """Returns the function ``v -> (H + damping I) v``.

    ``hvp_fn`` replaces ``H v`` unless it is None.
    """
    loss_hvp = lambda *args: hvp(problem.inner_loss, *args)
    product = loss_hvp if hvp_fn is None else hvp_fn
    return lambda v: add_scale(product(w, alpha, batch, v), damping, v)


def zero_adjoint(problem: Bilevel, w: PyTree) -> PyTree:
    """Returns the first adjoint: zeros like ``w``, with K losses on a leading axis."""
    lead = () if problem.num_objectives is None else (problem.num_objectives,)
    return jax.tree.map(lambda leaf: jnp.zeros(lead + leaf.shape, leaf.dtype), w)


def finite_or_zero(adjoint: PyTree) -> PyTree:
    """Returns the adjoint, or zeros if an earlier estimate left a NaN in it."""
    zeros = optax.tree.zeros_like(adjoint)
    return optax.tree.where(all_finite(adjoint), adjoint, zeros)


def max_relative_error(problem: Bilevel, actual: PyTree, expected: PyTree) -> Array:
    """Returns ``||actual - expected|| / ||expected||``, the maximum over K losses."""
    has_one_loss = problem.num_objectives is None
    error = relative_error if has_one_loss else jax.vmap(relative_error)
    return jnp.max(error(actual, expected))


# Newton steps towards the argmin.


def newton_step(
    loss: Loss,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    inner_grad: PyTree,
    linear_solver: lx.AbstractLinearSolver,
) -> tuple[PyTree, LinearStats]:
    """Returns ``w - d`` with ``H d = dL/dw``, and the statistics of the solve."""
    matvec = lambda v: hvp(loss, w, alpha, batch, v)
    zeros = optax.tree.zeros_like(w)
    d, linear_stats = solve_linear(linear_solver, matvec, inner_grad, zeros)
    return add_scale(w, -1, d), linear_stats


def safeguarded_newton_steps(
    loss: Loss,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    inner_grad: PyTree,
    rtols: Sequence[Array | float],
    total_linear_stats: LinearStats,
) -> tuple[PyTree, LinearStats]:
    """Returns ``w`` after Newton-CG steps, and the accumulated statistics.

    A step that does not decrease ``||dL/dw||``, or for which CG detects negative
    curvature, is rejected.

    Args:
      loss, w, alpha, batch: The inner loss and its arguments.
      inner_grad: ``dL/dw`` at ``w``.
      rtols: Tolerance of CG in each step; as many steps are made.
      total_linear_stats: Statistics of earlier solves.

    Cost: one gradient per step in addition to the products.
    """
    for rtol in rtols:
        new_w, linear_stats = newton_step(
            loss, w, alpha, batch, inner_grad, CG(rtol=rtol)
        )
        new_grad = jax.grad(loss)(new_w, alpha, batch)
        is_accepted = norm(new_grad) < norm(inner_grad)
        is_accepted = is_accepted & ~linear_stats["negative_curvature"]
        w = optax.tree.where(is_accepted, new_w, w)
        inner_grad = optax.tree.where(is_accepted, new_grad, inner_grad)
        total_linear_stats = merge_linear_stats(total_linear_stats, linear_stats)
    return w, total_linear_stats


# Statistics of several solves.


def count_products(linear_stats: LinearStats) -> Array:
    """Returns the products made for all right-hand sides, shared ones counted once."""
    num_shared = linear_stats["num_shared"]
    return jnp.sum(linear_stats["num_products"] - num_shared) + jnp.max(num_shared)


def merge_linear_stats(total: LinearStats, new: LinearStats) -> LinearStats:
    """Returns the statistics of earlier solves extended by another solve."""
    return {
        "num_products": total["num_products"] + count_products(new),
        "ritz_min": jnp.fmin(total["ritz_min"], jnp.min(new["ritz_min"])),
        "ritz_max": jnp.fmax(total["ritz_max"], jnp.max(new["ritz_max"])),
        "negative_curvature": total["negative_curvature"]
        | jnp.any(new["negative_curvature"]),
    }
