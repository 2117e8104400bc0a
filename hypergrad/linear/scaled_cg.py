"""Conjugate gradients in scaled coordinates, for several right-hand sides at once.

The Krylov space of one right-hand side ``b`` yields approximate solutions for any other
right-hand side ``z`` without a product: the directions ``p_j`` are H-conjugate, so that
the sum of ``p_j (p_j'z) / (p_j'H p_j)`` is the projection of ``H^-1 z`` on this space
in the norm of ``H``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from ..trees import (
    add_scale,
    apply_unless,
    divide,
    is_zero,
    machine_eps,
    norm,
    power_of_two_scale,
    scale,
    vdot,
)
from .base import LinearStats, MatVec
from .equilibration import Scaling

MIN_STEPS = 2  # after which the last change says something about the error
DEFAULT_RTOL_EXPONENT = 0.75  # of the machine epsilon
# An epsilon above that of float32 says nothing about what a residual leaves unsolved:
# 4 eps of float16 is 4e-3, which a slow direction turns into an error of any size.
MAX_EPS_OF_RESIDUAL = 2.0**-23
EXHAUSTED_RATIO = 1e-6  # of residuals in two steps, after which nothing is left


class ScaledSolution(NamedTuple):
    """The result of `scaled_cg`.

    Attributes:
      v: Solution of ``H v = b``.
      target_solutions: Approximate solutions for the targets, with their leading axis.
      target_residuals: What the solutions leave of the targets.
      expected_error: Estimate of the error of ``v``: its change in the last two steps
        times the number of pairs of steps that may follow, k / 4 after k steps, but no
        more than half of the dimensions that are left, and 1 at least. It is zero if
        ``b - H v`` is down to rounding or fell by 1e-6 in these steps, because the
        Krylov space is then exhausted, as it is after as many steps as dimensions with
        a residual of ``eps^(3/4)``.
      residual: ``||S (b - H v)|| / ||S b||`` by the recurrence.
      curvature_min, curvature_max: Extreme values of ``p'S H S p / p'p`` over the
        directions ``p``, which lie within the spectrum of ``S H S``.
      is_negative: Whether a direction or the subspace had negative curvature. The
        method stopped there, as it does at a direction without any.
      last_direction: The last ``p``, in the coordinates of ``S H S``. If
        ``curvature_min`` is negative, it is the curvature along this direction.
      is_solved: Whether the residual reached the tolerance.
      num_products: Number of products.
      num_steps: Number of steps.
    """

    v: PyTree
    target_solutions: PyTree
    target_residuals: PyTree
    expected_error: PyTree
    residual: Scalar
    curvature_min: Scalar
    curvature_max: Scalar
    is_negative: Scalar
    last_direction: PyTree
    is_solved: Scalar
    num_products: Scalar
    num_steps: Scalar

    @property
    def linear_stats(self) -> LinearStats:
        """The statistics that `solve_linear` returns for any solver."""
        return {
            "num_products": jnp.asarray(self.num_products, float),
            "num_shared": jnp.zeros((), float),
            "ritz_min": jnp.asarray(self.curvature_min, float),
            "ritz_max": jnp.asarray(self.curvature_max, float),
            "negative_curvature": self.is_negative,
            "is_solved": self.is_solved,
        }


class _State(NamedTuple):
    """The state after k steps; all vectors are those of ``S H S``."""

    x: PyTree
    r: PyTree
    p: PyTree
    rr: Array
    prev_rr: Array
    earlier_rr: Array  # of the step before the previous one
    targets: PyTree
    solutions: PyTree
    change: PyTree
    prev_change: PyTree
    curvature_min: Array
    curvature_max: Array
    is_negative: Array
    is_stopped: Array
    num_steps: Array


def scaled_cg(
    matvec: MatVec,
    b: PyTree,
    scaling: Scaling,
    *,
    rtol: Array | float | None = None,
    max_steps: Array | int | None = None,
    targets: PyTree | None = None,
    subspace: PyTree | None = None,
) -> ScaledSolution:
    """Solves ``H v = b`` by conjugate gradients on ``(S H S) x = S b``, ``v = S x``.

    Every step is unchanged in other units of ``w``, with the ``S`` of these units.

    Args:
      matvec: Function ``v -> H v`` with symmetric ``H``.
      b: Right-hand side.
      scaling: ``S``.
      rtol: The method stops at ``||S (b - H v)|| <= rtol ||S b||``, but not before two
        steps unless the residual is down to rounding. Defaults to ``eps^(3/4)``.
      max_steps: Maximum number of steps. Defaults to ``min(10 dim, 1000)``.
      targets: Further right-hand sides with a leading axis ``[m, ...]``, for which the
        Krylov space of ``b`` yields approximate solutions. Defaults to none.
      subspace: Vectors ``[k, ...]`` that the space contains besides, such as earlier
        solutions. Zeros are ignored. Defaults to none.

    Cost: one product a step, and k + 1 for a subspace that is not zero.

    Source: Hestenes & Stiefel 1952; the projections follow from the conjugacy of the
    directions, Golub & Van Loan, section 11.3.
    """
    eps = machine_eps(b)
    dimension = optax.tree.size(b)
    rtol = eps**DEFAULT_RTOL_EXPONENT if rtol is None else rtol
    if max_steps is None:
        max_steps = max(min(10 * dimension, 1000), MIN_STEPS)
    if targets is None:
        targets = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), b)
    # All right-hand sides have entries of order one: no square under- or overflows.
    all_rhs = jax.tree.map(lambda b, z: jnp.concatenate([b[None], z]), b, targets)
    all_rhs = jax.vmap(scaling.multiply)(all_rhs)
    units = jax.vmap(power_of_two_scale)(all_rhs)
    all_rhs = jax.vmap(divide)(all_rhs, units)
    b_norm = norm(_row(all_rhs, 0))
    rounding = 4 * min(eps, MAX_EPS_OF_RESIDUAL) * b_norm
    tol = jnp.maximum(jnp.asarray(rtol), 4 * eps) * b_norm
    scaled_matvec = scaling.matvec(matvec)
    if subspace is not None:
        subspace = jax.vmap(scaling.divide)(subspace)
    init_state, num_products = _init_state(scaled_matvec, all_rhs, subspace)

    def cond_fun(state):
        is_short = (state.num_steps < MIN_STEPS) & (state.rr > rounding**2)
        can_continue = (state.num_steps < max_steps) & ~state.is_stopped
        return can_continue & ((state.rr > tol**2) | is_short)

    body_fun = lambda state: _step(scaled_matvec, state)
    state = jax.lax.while_loop(cond_fun, body_fun, init_state)
    residual = jnp.sqrt(state.rr)
    # A NaN in b or H ends the loop, and must not leave the starting point as a result.
    x = add_scale(state.x, jnp.where(jnp.isfinite(residual), 0.0, jnp.nan), state.x)
    unscale = lambda x: scale(units[0], scaling.multiply(x))
    unscale_all = lambda fn, rows: jax.vmap(fn)(jax.vmap(scale)(units[1:], rows))
    return ScaledSolution(
        v=unscale(x),
        target_solutions=unscale_all(scaling.multiply, state.solutions),
        target_residuals=unscale_all(scaling.divide, state.targets),
        expected_error=unscale(_expected_error(state, dimension, b_norm, eps)),
        residual=jnp.where(b_norm == 0, 0.0, residual / b_norm),
        curvature_min=state.curvature_min,
        curvature_max=state.curvature_max,
        is_negative=state.is_negative,
        last_direction=state.p,
        is_solved=~state.is_negative & (residual <= tol),
        num_products=num_products + state.num_steps,
        num_steps=state.num_steps,
    )


def _init_state(
    matvec: MatVec, all_rhs: PyTree, subspace: PyTree | None
) -> tuple[_State, Array]:
    """Returns the state before the first step, and the products that it cost."""
    solutions, residuals = optax.tree.zeros_like(all_rhs), all_rhs
    is_negative, num_products = jnp.asarray(False), jnp.asarray(0)
    if subspace is not None:
        solutions, residuals, is_negative, num_products = _project(
            matvec, subspace, all_rhs
        )
    x, b = _row(solutions, 0), _row(all_rhs, 0)
    # The difference b - (H W) c would be off by the rounding of a large c.
    r = apply_unless(is_zero(x), lambda b: optax.tree.sub(b, matvec(x)), b)
    num_products = num_products + jnp.where(is_zero(x), 0, 1)
    zeros = optax.tree.zeros_like(b)
    rr = vdot(r, r)
    nan = jnp.full_like(rr, jnp.nan)
    state = _State(
        x=x,
        r=r,
        p=r,
        rr=rr,
        prev_rr=rr,
        earlier_rr=rr,
        targets=_row(residuals, slice(1, None)),
        solutions=_row(solutions, slice(1, None)),
        change=zeros,
        prev_change=zeros,
        curvature_min=nan,
        curvature_max=nan,
        is_negative=is_negative,
        is_stopped=is_negative,
        num_steps=jnp.asarray(0),
    )
    return state, num_products


def _step(matvec: MatVec, state: _State) -> _State:
    """Returns the state after one step of conjugate gradients."""
    # q = p'H p,  a = r'r / q
    p = state.p
    Hp = matvec(p)
    curvature = vdot(p, Hp)
    # Along a direction without curvature a step would be infinite, or noise.
    rayleigh = curvature / vdot(p, p)
    eps = machine_eps(p)
    noise = eps * jnp.fmax(state.curvature_max, jnp.abs(rayleigh))
    is_stopped = ~(rayleigh > noise)
    safe_curvature = jnp.where(is_stopped, 1.0, curvature)
    step_size = jnp.where(is_stopped, 0.0, state.rr / safe_curvature)
    # x <- x + a p,  r <- r - a H p
    change = scale(step_size, p)
    r = add_scale(state.r, -step_size, Hp)

    def project(z, y):
        # y <- y + p (p'z) / q,  z <- z - H p (p'z) / q
        coefficient = jnp.where(is_stopped, 0.0, vdot(p, z) / safe_curvature)
        return add_scale(z, -coefficient, Hp), add_scale(y, coefficient, p)

    targets, solutions = jax.vmap(project)(state.targets, state.solutions)
    rr = vdot(r, r) + 0.0 * curvature  # a NaN in H must reach the result
    return _State(
        x=optax.tree.add(state.x, change),
        r=r,
        p=optax.tree.where(is_stopped, p, add_scale(r, rr / state.rr, p)),
        rr=rr,
        prev_rr=state.rr,
        earlier_rr=state.prev_rr,
        targets=targets,
        solutions=solutions,
        change=change,
        prev_change=state.change,
        curvature_min=jnp.fmin(state.curvature_min, rayleigh),
        curvature_max=jnp.fmax(state.curvature_max, rayleigh),
        is_negative=rayleigh < -noise,
        is_stopped=is_stopped,
        num_steps=state.num_steps + 1,
    )


def _expected_error(state: _State, dimension: int, b_norm: Array, eps: float) -> PyTree:
    """Returns `ScaledSolution.expected_error`, in the coordinates of ``S H S``."""
    residual = jnp.sqrt(state.rr)
    has_error = residual > 40 * min(eps, MAX_EPS_OF_RESIDUAL) * b_norm
    has_error &= state.rr > EXHAUSTED_RATIO**2 * state.earlier_rr
    is_solved = residual <= eps**DEFAULT_RTOL_EXPONENT * b_norm
    has_error &= ~((state.num_steps >= dimension) & is_solved)
    num_pairs = jnp.minimum(state.num_steps / 4, (dimension - state.num_steps) / 2)
    num_changes = jnp.maximum(num_pairs, 1.0)
    change = optax.tree.add(state.change, state.prev_change)
    return scale(jnp.where(has_error, num_changes, 0.0), change)


def _row(vectors: PyTree, index: int | slice) -> PyTree:
    """Returns one or several vectors of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], vectors)


def add_gradient_step(
    matvec: MatVec,
    solutions: PyTree,
    residuals: PyTree,
    scaling: Scaling,
    curvature_max: Array,
) -> tuple[PyTree, PyTree]:
    """Returns solutions after one step along the residual ``r = b - H x`` of the first.

    The residuals that remain are returned too.

    Each step minimizes along ``S S r``, which is a direction that the Krylov space of
    another right-hand side may not contain. The solutions stay as they are if ``H`` is
    not positive along it, up to rounding.

    Args:
      matvec: Function ``v -> H v``.
      solutions, residuals: ``x`` and ``b - H x`` for right-hand sides ``[m, ...]``.
      scaling: ``S``.
      curvature_max: A large curvature of ``S H S``, or NaN.

    Cost: one product.
    """
    residuals = jax.vmap(scaling.multiply)(residuals)
    units = jax.vmap(power_of_two_scale)(residuals)
    residuals = jax.vmap(divide)(residuals, units)
    p = _row(residuals, 0)
    Hp = scaling.matvec(matvec)(p)
    curvature = vdot(p, Hp)
    # Along a direction without curvature a step would be infinite, or noise.
    eps = machine_eps(p)
    is_positive = curvature > eps * jnp.fmax(curvature_max, 0.0) * vdot(p, p)
    safe_curvature = jnp.where(is_positive, curvature, 1.0)
    direction = scaling.multiply(p)

    def add_step(x, residual, unit):
        # x <- x + S p (p'S r) / p'S H S p
        step_size = vdot(p, residual) / safe_curvature
        x = add_scale(x, jnp.where(is_positive, step_size * unit, 0.0), direction)
        # S r <- S r - S H S p (p'S r) / p'S H S p
        residual = add_scale(residual, -jnp.where(is_positive, step_size, 0.0), Hp)
        return x, scaling.divide(scale(unit, residual))

    return jax.vmap(add_step)(solutions, residuals, units)


def _project(
    matvec: MatVec, subspace: PyTree, all_rhs: PyTree
) -> tuple[PyTree, PyTree, Array, Array]:
    """Solves ``W'H W c = W'b`` for each right-hand side ``b``.

    Args:
      matvec: Function ``v -> H v``.
      subspace: ``W``, vectors with a leading axis of size k.
      all_rhs: Right-hand sides with a leading axis.

    Returns:
      The solutions ``W c``, the residuals ``b - H W c``, whether ``H`` is negative
      along a vector of the subspace, and the number of products: 0 if ``W`` is zero.
    """
    units = jax.vmap(power_of_two_scale)(subspace)
    W = jax.vmap(divide)(subspace, units)
    size = jax.tree.leaves(W)[0].shape[0]
    is_empty = is_zero(W)
    HW = apply_unless(is_empty, jax.vmap(matvec), W)
    inner_products = jax.vmap(jax.vmap(vdot, (None, 0)), (0, None))
    # Eigenvectors of the Gram matrix with unit diagonal, so that lengths do not matter.
    gram = inner_products(W, HW)
    diagonal = jnp.diagonal(gram)
    is_negative = jnp.any(diagonal < 0)
    d = jnp.where(diagonal > 0, 1 / jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1)), 0)
    pseudo_inverse = jnp.outer(d, d)
    if size > 1:
        eps = machine_eps(W)
        gram = jnp.nan_to_num(jnp.outer(d, d) * (gram + gram.T) / 2)
        eigenvalues, q = jnp.linalg.eigh(gram)
        # Smaller eigenvalues are those of nearly dependent vectors, mostly rounding.
        is_negative |= jnp.any(eigenvalues < -(eps**0.5))
        is_used = eigenvalues > eps**0.5
        inverse = jnp.where(is_used, 1 / jnp.where(is_used, eigenvalues, 1), 0)
        pseudo_inverse *= q @ jnp.diag(inverse) @ q.T
    coefficients = inner_products(all_rhs, W) @ pseudo_inverse
    combine = lambda vectors: jax.tree.map(
        lambda leaf: jnp.tensordot(coefficients, leaf, 1).astype(leaf.dtype), vectors
    )
    residuals = optax.tree.sub(all_rhs, combine(HW))
    num_products = jnp.where(is_empty, 0, size)
    return combine(W), residuals, is_negative & ~is_empty, num_products
