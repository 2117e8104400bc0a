"""Newton steps of a certificate, and which of their solves judge."""

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

MAX_RATE = 0.9  # of two changes that are both down to rounding
NUM_SCALE_PROBES = 8


class NewtonCorrection(NamedTuple):
    """The result of Newton steps.

    Attributes:
      w, result: ``w`` after the last step, and the derivatives there.
      remaining_change: Relative change of the hypergradient by the last step and all
        that would follow, if each changed it by the same fraction of the one before.
      previous_w, previous_grad: ``w`` and ``dL/dw`` before the last step.
      solves: Statistics of the two solves of each step.
    """

    w: PyTree
    result: ImplicitResult
    remaining_change: Scalar
    previous_w: PyTree
    previous_grad: PyTree
    solves: list[LinearStats]

    def last_solves(
        self, loss: Loss, alpha: PyTree, batch: PyTree
    ) -> tuple[list[LinearStats], Array]:
        """Returns the statistics of the solves of the last step, and the products made.

        If the gradient before the step is at the level of rounding, the step had
        nothing to correct. Its solve may then fail along a zero eigenvalue, such as
        that of a rotation that changes no loss, and counts as solved.
        """
        newton_stats, adjoint_stats = self.solves[-2:]
        is_solved, w = newton_stats["is_solved"], self.previous_w
        matvec = functools.partial(hvp, loss, w, alpha, batch)
        grad_scale = apply_unless(is_solved, lambda w: gradient_scale(matvec, w), w)
        is_rounding = ~is_solved & is_stationary(self.previous_grad, grad_scale)
        newton_stats = newton_stats | {
            "is_solved": is_solved | is_rounding,
            "negative_curvature": newton_stats["negative_curvature"] & ~is_rounding,
        }
        num_products = jnp.where(is_solved, 0, NUM_SCALE_PROBES)
        return [newton_stats, adjoint_stats], num_products


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

    Args:
      w, hypergradient, adjoint, inner_grad: Where the steps start.
      take_step: ``(w, dL/dw) -> (w, statistics)``, one Newton step.
      differentiate: ``(w, v) -> result``, which corrects the adjoint ``v``.
      relative_change: ``(old hypergradient, new hypergradient) -> number``.
      num_newton_steps: Number of steps, 1 at least.
    """
    solves: list[LinearStats] = []
    result, change = None, jnp.asarray(0.0)
    before_last = w, inner_grad, change
    for _ in range(num_newton_steps):
        before_last = w, inner_grad, change
        # H d = dL/dw,  w <- w - d
        w, newton_stats = take_step(w, inner_grad)
        # H e = b - H v,  v <- v + e
        result = differentiate(w, adjoint)
        solves += [newton_stats, result.linear_stats]
        change = relative_change(hypergradient, result.hypergradient)
        hypergradient, adjoint = result.hypergradient, result.adjoint
        inner_grad = result.inner_grad
    assert result is not None  # there is one step at least
    previous_w, previous_grad, previous_change = before_last
    return NewtonCorrection(
        w=w,
        result=result,
        remaining_change=sum_of_changes(previous_change, change),
        previous_w=previous_w,
        previous_grad=previous_grad,
        solves=solves,
    )


def sum_of_changes(previous: Scalar, last: Scalar) -> Scalar:
    """Returns ``c (1 + r + r^2 + ...) = c / (1 - r)``, ``r`` the ratio of two changes.

    Newton steps towards a minimum with a singular Hessian converge linearly, so that
    one small change does not say that the next ones are smaller. ``r`` is zero if there
    was no earlier change, and at most 0.9.

    Source: Aitken 1926.
    """
    has_previous = previous > 0
    ratio = jnp.where(has_previous, last / jnp.where(has_previous, previous, 1.0), 0.0)
    return last / (1 - jnp.minimum(ratio, MAX_RATE))


def gradient_scale(matvec: MatVec, w: PyTree) -> PyTree:
    """Returns estimates of ``(sum_j (H_ij w_j)^2)^(1/2)``, structured like ``w``.

    If ``|g_i|`` is at most ``tau`` times this root for every entry of a gradient, then
    ``w`` is stationary for a Hessian whose entries differ by about ``tau``. The root is
    the standard deviation of ``(H D z)_i`` with ``D = diag(w)`` and a standard normal
    ``z``, estimated from the mean of the absolute values.

    Args:
      matvec: Function ``v -> H v``.
      w: Where ``H`` was evaluated.

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


def is_stationary(grad: PyTree, grad_scale: PyTree) -> Array:
    """Returns whether each entry of a gradient is at most ``eps^(3/4)`` of its scale.

    Solvers stop by default at this fraction of a right-hand side.
    """

    def is_small(g, scale):
        tol = float(jnp.finfo(g.dtype).eps) ** 0.75
        return jnp.all((jnp.abs(g) <= tol * scale) & jnp.isfinite(scale))

    leaves = jax.tree.leaves(jax.tree.map(is_small, grad, grad_scale))
    return jnp.all(jnp.stack(leaves))
