"""Certificates: how far a hypergradient is from the derivative at the argmin."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from .cost import cost_stats
from .implicit_diff import (
    count_products,
    implicit_hypergradient,
    max_relative_error,
    newton_step,
    zero_adjoint,
)
from .linear import CG
from .linear.base import LinearStats, solve_linear
from .problem import Bilevel, EstimateData
from .problem_checks import (
    check_alpha_has_gradient,
    check_on_shapes,
    check_problem,
    check_problem_type,
    lost_derivative_flags,
)
from .products import hvp
from .trees import PrettyModule, all_finite, norm, random_like
from .validation import (
    as_input_arrays,
    as_key,
    check_positive_int,
    check_same_structure,
    float_converter,
    floats_to_arrays,
)

TRUST_RTOL = 1e-2
NO_GRADIENT_ADVICE = (
    "so implicit differentiation cannot see it (it is not zero: it may enter the "
    "optimizer or the start); use hg.Unrolled, or take it out of alpha"
)
NEWTON_RTOL = 1e-3  # residual of the solve of a Newton step, relative to ||dL/dw||
NUM_NEWTON_STEPS = 2
NUM_PROBE_STEPS = 20  # CG steps that search for negative curvature


class Certificate(PrettyModule):
    """The error of a hypergradient as the derivative at the argmin.

    Attributes:
      error_estimate: ``||h - corrected_hypergradient|| / ||corrected_hypergradient||``
        for the certified hypergradient ``h``, the maximum over K losses.
      trusted: True if the error estimate is at most ``rtol``, the last Newton step
        changed the hypergradient by at most ``rtol``, ``adjoint_residual`` is at most
        ``rtol / 10``, everything is finite, and no solve met negative curvature.
      corrected_w: ``w`` after the Newton steps.
      corrected_hypergradient: The hypergradient at ``corrected_w``.
      inner_grad_norm: ``||dL/dw||`` at the given ``w``.
      corrected_grad_norm: ``||dL/dw||`` at ``corrected_w``.
      adjoint_residual: ``||b - H v|| / ||b||`` at ``corrected_w``, the maximum over K
        losses.
      ritz_min, ritz_max: Extreme Ritz values of ``H`` in all solves.
      negative_curvature: Whether a solve or a random probe met negative curvature.
      distance_estimate: ``||dL/dw|| / ritz_min``, an estimate of ``||w - w*||``.
      distance_bound: With ``strong_convexity``, an upper bound on ``||w - w*||`` at the
        given ``w``; NaN without.
      adjoint_error_bound: With ``strong_convexity``, an upper bound on
        ``||v - H^-1 b|| / ||b||`` at ``corrected_w``; NaN without.
      stats: The cost of the certificate.

    >>> import hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: 0.5 * w**2
    >>> certificate = hg.certify(hg.Bilevel(inner, outer), 1.5, 1.0)
    >>> float(certificate.error_estimate)
    0.5
    >>> float(certificate.corrected_hypergradient)
    1.0
    """

    error_estimate: Scalar
    trusted: Scalar
    corrected_w: PyTree
    corrected_hypergradient: PyTree
    inner_grad_norm: Scalar
    corrected_grad_norm: Scalar
    adjoint_residual: Scalar
    ritz_min: Scalar
    ritz_max: Scalar
    negative_curvature: Scalar
    distance_estimate: Scalar
    distance_bound: Scalar
    adjoint_error_bound: Scalar
    stats: dict[str, Scalar]


def certify(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    hypergradient: PyTree = None,
    *,
    num_newton_steps: int = NUM_NEWTON_STEPS,
    rtol: float | Array = TRUST_RTOL,
    strong_convexity: float | Array | None = None,
    key: Array | None = None,
) -> Certificate:
    """Estimates how far a hypergradient is from the derivative at the argmin.

    Newton steps ``w <- w - d`` with ``H d = dL/dw`` move ``w`` towards the argmin, and
    the adjoint is solved again after each of them, all by `CG` on all data. The change
    of the hypergradient is the estimate of its error.

    Args:
      problem: The problem.
      w: Inner solution at which the hypergradient was evaluated.
      alpha: Hyperparameters at which it was evaluated.
      hypergradient: The hypergradient to certify, of any estimator. Defaults to that of
        implicit differentiation at ``w`` with an accurate adjoint.
      num_newton_steps: Number of Newton steps. One suffices for a convex inner loss;
        networks need two.
      rtol: Relative error up to which the hypergradient is trusted.
      strong_convexity: Lower bound on the eigenvalues of ``H`` at every ``w``. The
        bounds of the certificate require it; all other fields are estimates.
      key: PRNG key of ``data_fn``, of batches with a key, and of the probe. Defaults to
        ``jax.random.key(0)``.

    Raises:
      TypeError, ValueError: An argument is invalid; raised before anything is traced.

    Cost:
      Per Newton step one solve for ``w``, to 1e-3, and one for the adjoint, to the
      default tolerance of `CG`; a probe of 20 products. All are counted in ``stats``.
    Memory:
      The vectors of `CG`.
    Bias:
      Second order in the distance to the argmin, the error of truncated Newton steps.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> outer = lambda w, alpha, batch: jnp.sum(w**2)
    >>> problem = hg.Bilevel(inner, outer)
    >>> certificate = hg.certify(problem, jnp.array([1.1, 0.9]), jnp.ones(2))
    >>> bool(certificate.trusted), round(float(certificate.error_estimate), 2)
    (False, 0.1)
    """
    check_problem_type(problem)
    w, alpha = as_input_arrays(w, alpha)
    check_positive_int("num_newton_steps", num_newton_steps)
    rtol = float_converter("rtol", optional=False)(rtol)
    strong_convexity = float_converter("strong_convexity")(strong_convexity)
    problem, rtol, strong_convexity, hypergradient = floats_to_arrays(
        (problem, rtol, strong_convexity, hypergradient)
    )
    check_on_shapes(check_certifiable, problem, w, alpha)
    if hypergradient is not None:
        num_objectives = problem.num_objectives
        lead = () if num_objectives is None else (num_objectives,)
        like = jax.tree.map(lambda x: jnp.broadcast_to(x, lead + x.shape), alpha)
        check_same_structure("hypergradient", hypergradient, like, "alpha")
    return _certify(
        problem,
        w,
        alpha,
        hypergradient,
        num_newton_steps,
        rtol,
        strong_convexity,
        as_key(key),
    )


def check_certifiable(problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Raises an error unless implicit differentiation applies to a problem."""
    check_problem(problem, w, alpha)
    check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)


@eqx.filter_jit
def _certify(
    problem, w, alpha, hypergradient, num_newton_steps, rtol, strong_convexity, key
):
    return compute_certificate(
        problem,
        EstimateData.sample(problem, key),
        w,
        alpha,
        hypergradient,
        num_newton_steps=num_newton_steps,
        rtol=rtol,
        strong_convexity=strong_convexity,
    )


def compute_certificate(
    problem: Bilevel,
    data: EstimateData,
    w: PyTree,
    alpha: PyTree,
    hypergradient: PyTree | None,
    *,
    adjoint: PyTree | None = None,
    num_newton_steps: int = NUM_NEWTON_STEPS,
    rtol: Scalar | float = TRUST_RTOL,
    strong_convexity: Scalar | None = None,
) -> Certificate:
    """Returns the certificate of `certify`, inside a compiled program.

    Args:
      problem, w, alpha, hypergradient: As for `certify`.
      data: The data on which the hypergradient was evaluated.
      adjoint: Where the first adjoint solve starts. Defaults to zero.
      num_newton_steps, rtol, strong_convexity: As for `certify`.
    """
    batch, outer_batch = data.inner_batch(), data.outer_batch()
    differentiate = lambda w, adjoint: implicit_hypergradient(
        problem, CG(), w, alpha, batch, outer_batch, adjoint
    )
    if adjoint is None:
        adjoint = zero_adjoint(problem, w)

    solves: list[LinearStats] = []
    num_grads, num_outer_grads = 0, num_newton_steps
    if hypergradient is None:
        result = differentiate(w, adjoint)
        solves.append(result.linear_stats)
        num_outer_grads += 1
        hypergradient, adjoint = result.hypergradient, result.adjoint
        inner_grad = result.inner_grad
    else:
        inner_grad = jax.grad(problem.inner_loss)(w, alpha, batch)
        num_grads = 1
    inner_grad_norm = norm(inner_grad)

    corrected = hypergradient
    last_change = residual = jnp.asarray(jnp.nan)
    for _ in range(num_newton_steps):
        # H d = dL/dw, w <- w - d
        w, newton_stats = newton_step(
            problem.inner_loss, w, alpha, batch, inner_grad, CG(rtol=NEWTON_RTOL)
        )
        result = differentiate(w, adjoint)
        solves += [newton_stats, result.linear_stats]
        last_change = max_relative_error(problem, corrected, result.hypergradient)
        residual = jnp.max(result.adjoint_residual)
        corrected, adjoint = result.hypergradient, result.adjoint
        inner_grad = result.inner_grad
    solves.append(_probe_curvature(problem, w, alpha, batch, data.solver_key))

    linear_stats = _reduce_solves(solves)
    # ||h - h_corrected|| / ||h_corrected||
    error = max_relative_error(problem, hypergradient, corrected)
    is_finite = all_finite(hypergradient, corrected, error, norm(inner_grad))
    is_accurate = jnp.maximum(error, last_change) <= rtol
    is_solved = (residual <= rtol / 10) & ~linear_stats["negative_curvature"]
    is_complete = not lost_derivative_flags(problem, w, alpha)
    mu = jnp.nan if strong_convexity is None else strong_convexity
    return Certificate(
        error_estimate=error,
        trusted=is_finite & is_accurate & is_solved & is_complete,
        corrected_w=w,
        corrected_hypergradient=corrected,
        inner_grad_norm=inner_grad_norm,
        corrected_grad_norm=norm(inner_grad),
        adjoint_residual=residual,
        ritz_min=linear_stats["ritz_min"],
        ritz_max=linear_stats["ritz_max"],
        negative_curvature=linear_stats["negative_curvature"],
        # ||w - w*|| <= ||dL/dw|| / mu and ||v - H^-1 b|| / ||b|| <= residual / mu
        distance_estimate=inner_grad_norm / linear_stats["ritz_min"],
        distance_bound=inner_grad_norm / mu,
        adjoint_error_bound=residual / mu,
        stats=_cost_stats(problem, data, linear_stats, num_grads, num_outer_grads),
    )


def _cost_stats(
    problem: Bilevel,
    data: EstimateData,
    linear_stats: dict[str, Any],
    num_grads: int,
    num_outer_grads: int,
) -> dict[str, Array]:
    """Returns the cost of the solves and of the gradients of each outer loss."""
    return cost_stats(
        data.inner_data,
        data.outer_data,
        num_grads=num_grads,
        num_hvps=linear_stats["num_products"],
        num_outer_grads=num_outer_grads * (problem.num_objectives or 1),
    )


def _probe_curvature(
    problem: Bilevel, w: PyTree, alpha: PyTree, batch: PyTree, key: Array
) -> LinearStats:
    """Returns the statistics of a few CG steps from a random vector.

    The adjoint solve meets negative curvature only along directions that ``b``
    contains; a random vector contains all of them.
    """
    matvec = lambda v: hvp(problem.inner_loss, w, alpha, batch, v)
    probe_solver = CG(rtol=0.0, max_steps=NUM_PROBE_STEPS)
    zeros = optax.tree.zeros_like(w)
    _, linear_stats = solve_linear(probe_solver, matvec, random_like(key, w), zeros)
    return linear_stats


def _reduce_solves(solves: list[LinearStats]) -> dict[str, Any]:
    """Returns the number of products and the spectrum of several solves."""
    reduce = lambda fn, name: fn(jnp.stack([fn(stats[name]) for stats in solves]))
    return {
        "num_products": sum(map(count_products, solves)),
        "ritz_min": reduce(jnp.nanmin, "ritz_min"),
        "ritz_max": reduce(jnp.nanmax, "ritz_max"),
        "negative_curvature": reduce(jnp.any, "negative_curvature"),
    }
