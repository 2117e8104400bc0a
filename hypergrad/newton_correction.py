"""The Newton steps of a certificate, and the statistics that decide on trust."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from .implicit_diff import ImplicitResult
from .linear.base import LinearStats, MatVec
from .products import Loss, hvp
from .trees import apply_unless, hash_normal, scale

NUM_SCALE_PROBES = 8


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


def last_solve_stats(
    correction: NewtonCorrection, loss: Loss, alpha: PyTree, batch: PyTree
) -> tuple[list[LinearStats], Array]:
    """Returns the statistics of the solves of the last step, and the products made.

    Each solve corrects what earlier ones left, so that the last ones decide on trust.
    If the gradient before the step is at the level of rounding, the step had nothing to
    correct. Its solve may then fail along a zero eigenvalue, such as that of a rotation
    that changes no loss; it counts as solved, and as without negative curvature, which
    the adjoint solve and the probe look for at the corrected ``w``.
    """
    newton_stats, adjoint_stats = correction.solves[-2:]
    is_solved, w = newton_stats["is_solved"], correction.previous_w
    matvec = functools.partial(hvp, loss, w, alpha, batch)
    grad_scale = apply_unless(is_solved, lambda w: gradient_scale(matvec, w), w)
    is_rounding = ~is_solved & is_stationary(correction.previous_grad, grad_scale)
    newton_stats = newton_stats | {
        "is_solved": is_solved | is_rounding,
        "negative_curvature": newton_stats["negative_curvature"] & ~is_rounding,
    }
    num_products = jnp.where(is_solved, 0, NUM_SCALE_PROBES)
    return [newton_stats, adjoint_stats], num_products


def gradient_scale(matvec: MatVec, w: PyTree) -> PyTree:
    """Returns estimates of ``(sum_j (H_ij w_j)^2)^(1/2)``, structured like ``w``.

    If ``|g_i|`` is at most ``tau`` times this root for every entry of a gradient, then
    ``w`` is stationary for a quadratic model whose Hessian entries are changed by about
    a fraction ``tau``. The units of ``w`` do not matter, but its origin does. The root
    is the standard deviation of ``(H D z)_i`` with ``D = diag(w)`` and a standard
    normal ``z``, estimated from the mean of the absolute values.

    Args:
      matvec: Function ``v -> H v``.
      w: Factors of the columns of ``H``, such as the point at which it was evaluated.

    Cost: `NUM_SCALE_PROBES` products.

    Source: after Oettli & Prager 1964 (Numer. Math. 6, 405-409), with a root of squares
    in place of their sum of absolute values.
    """

    def probe(i, total):
        Hz = matvec(jax.tree.map(jnp.multiply, w, hash_normal(i, w)))
        return jax.tree.map(lambda total, x: total + jnp.abs(x), total, Hz)

    zeros = optax.tree.zeros_like(w)
    total = jax.lax.fori_loop(0, NUM_SCALE_PROBES, probe, zeros)
    # E |x| = (2 / pi)^(1/2) sigma for a normal x with mean zero
    return scale((math.pi / 2) ** 0.5 / NUM_SCALE_PROBES, total)


def is_stationary(grad: PyTree, grad_scale: PyTree, power: float = 0.75) -> Array:
    """Returns whether each entry of a gradient is at most ``eps^power`` of its scale.

    Solvers stop by default at ``eps^(3/4)`` of a right-hand side.
    """

    def is_small(g, scale):
        tol = float(jnp.finfo(g.dtype).eps) ** power
        return jnp.all((jnp.abs(g) <= tol * scale) & jnp.isfinite(scale))

    leaves = jax.tree.leaves(jax.tree.map(is_small, grad, grad_scale))
    return jnp.all(jnp.stack(leaves))
