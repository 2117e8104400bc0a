"""Implicit differentiation at one point, and Newton's correction of that point."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jaxtyping import Array, PyTree

from .linear import CG
from .linear.base import LinearStats, relative_residual, solve_linear
from .problem import Bilevel
from .products import Loss, hvp, hvp_and_cross_vjp
from .trees import add_scale, all_finite, norm, relative_error, vdot

#: ``(w, alpha, batch, v) -> product``: another curvature than the inner loss's.
HvpFn = Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]

EMPTY_LINEAR_STATS: dict[str, Any] = {
    "num_products": 0.0,
    "ritz_min": jnp.nan,
    "ritz_max": jnp.nan,
    "negative_curvature": False,
}


class ImplicitResult(eqx.Module):
    """What implicit differentiation found at one ``w``; with K losses K leads.

    Attributes:
      value, hypergradient: at ``w``, as if ``dL/dw`` were zero there.
      b: ``dM/dw``.
      adjoint: ``v``, like ``w``.
      cross: ``Jᵀ v``, minus the indirect term.
      gradient: ``dL/dw``, the same for all K.
      adjoint_residual: ``||b - H v|| / ||b||``, without damping.
      mean_curvature: ``||b|| / ||v||``.
      solved: the solve's ``num_products``, the cross term's included, ``num_shared``,
        ``ritz_min``, ``ritz_max`` and ``negative_curvature``.
    """

    value: Array
    hypergradient: PyTree
    b: PyTree
    adjoint: PyTree
    cross: PyTree
    gradient: PyTree
    adjoint_residual: Array
    mean_curvature: Array
    solved: LinearStats


def implicit_hypergradient(
    problem: Bilevel,
    linear_solver: lx.AbstractLinearSolver,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    outer_batch: PyTree,
    start: PyTree,
    damping: Array | float = 0.0,
    prepared: PyTree = None,
    hvp_fn: HvpFn | None = None,
) -> ImplicitResult:
    """``dM/dalpha - Jᵀ v`` with ``(H + damping I) v = dM/dw``, begun at ``start``.

    ``prepared`` is what the linear solver may have made of an ``H`` like this one, and
    ``curvature`` may stand for ``H`` in the solve; the residual and the sign of
    ``v'Hv`` are those of ``H``, of whose spectrum nothing else is seen then.
    """
    loss = problem.inner_loss
    product = damped_hvp_fn(problem, w, alpha, batch, damping, hvp_fn)
    value, b, direct = problem.outer_value_and_grads(w, alpha, outer_batch)

    def adjoint(b, v):
        v, solved = solve_linear(linear_solver, product, b, v, prepared)
        gradient, Hv, cross = hvp_and_cross_vjp(loss, w, alpha, batch, v)
        solved["num_products"] += 1
        mean = norm(b) / norm(v)  # NaN for b = 0, which says nothing
        if hvp_fn is not None:  # it was not H that the solve saw
            unseen = jnp.full_like(mean, jnp.nan)
            solved |= {"ritz_min": unseen, "ritz_max": unseen}
            solved["negative_curvature"] = jnp.asarray(False)
        solved["negative_curvature"] |= vdot(v, Hv) < 0
        return gradient, v, cross, relative_residual(b, Hv), mean, solved

    if problem.num_objectives is not None:
        adjoint = jax.vmap(adjoint, out_axes=(None, 0, 0, 0, 0, 0))
    gradient, v, cross, residual, mean, solved = adjoint(b, start)
    hypergradient = optax.tree.sub(direct, cross)
    return ImplicitResult(
        value, hypergradient, b, v, cross, gradient, residual, mean, solved
    )


def damped_hvp_fn(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    damping: Array | float,
    hvp_fn: HvpFn | None,
) -> Callable[[PyTree], PyTree]:
    """``v -> (H + damping I) v``, with ``curvature`` for ``H`` where there is one."""
    of_loss = lambda *at: hvp(problem.inner_loss, *at)
    product = of_loss if hvp_fn is None else hvp_fn
    return lambda v: add_scale(product(w, alpha, batch, v), damping, v)


def total_products(solved: LinearStats) -> Array:
    """Products made for all right-hand sides, the shared ones once."""
    shared = solved["num_shared"]
    return jnp.sum(solved["num_products"] - shared) + jnp.max(shared)


def zero_adjoint(problem: Bilevel, w: PyTree) -> PyTree:
    """Where the first adjoint solve begins: like ``w``, leaves lead with K."""
    lead = () if problem.num_objectives is None else (problem.num_objectives,)
    return jax.tree.map(lambda leaf: jnp.zeros(lead + leaf.shape, leaf.dtype), w)


def finite_or_zero(adjoint: PyTree) -> PyTree:
    """``adjoint``, or zero: one that an earlier step spoilt is no start."""
    zeros = optax.tree.zeros_like(adjoint)
    return optax.tree.where(all_finite(adjoint), adjoint, zeros)


def newton_step(
    loss: Loss,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    gradient: PyTree,
    linear_solver: lx.AbstractLinearSolver,
) -> tuple[PyTree, LinearStats]:
    """``w - d`` with ``H d = dL/dw``, and what the solve saw."""
    matvec = lambda v: hvp(loss, w, alpha, batch, v)
    d, solved = solve_linear(linear_solver, matvec, gradient, optax.tree.zeros_like(w))
    return add_scale(w, -1, d), solved


def newton_steps(
    loss: Loss,
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
    gradient: PyTree,
    rtols: Sequence[Array | float],
    seen: LinearStats,
) -> tuple[PyTree, LinearStats]:
    """``w`` after a Newton step to each of ``rtols``, and all that was seen by then.

    A step that does not make the gradient smaller is not taken, nor one along which H
    is not positive. Costs a gradient a step beside the products.
    """
    for rtol in rtols:
        there, solved = newton_step(loss, w, alpha, batch, gradient, CG(rtol=rtol))
        slope_there = jax.grad(loss)(there, alpha, batch)
        closer = norm(slope_there) < norm(gradient)
        closer = closer & ~solved["negative_curvature"]
        w = optax.tree.where(closer, there, w)
        gradient = optax.tree.where(closer, slope_there, gradient)
        seen = merge_linear_stats(seen, solved)
    return w, seen


def merge_linear_stats(seen: LinearStats, solved: LinearStats) -> LinearStats:
    """Products and ends of the spectrum, of what was seen and of one more solve."""
    return {
        "num_products": seen["num_products"] + total_products(solved),
        "ritz_min": jnp.fmin(seen["ritz_min"], jnp.min(solved["ritz_min"])),
        "ritz_max": jnp.fmax(seen["ritz_max"], jnp.max(solved["ritz_max"])),
        "negative_curvature": seen["negative_curvature"]
        | jnp.any(solved["negative_curvature"]),
    }


def max_relative_error(problem: Bilevel, h: PyTree, true: PyTree) -> Array:
    """``||h - true|| / ||true||`` of hypergradients, the largest of K."""
    one = relative_error if problem.num_objectives is None else jax.vmap(relative_error)
    return jnp.max(one(h, true))
