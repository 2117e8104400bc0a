"""Certificates: how far a hypergradient is from the derivative at the argmin."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Scalar

from .checks.lost_derivatives import lost_derivative_flags
from .checks.problem import (
    check_alpha_has_gradient,
    check_on_shapes,
    check_problem,
    check_problem_type,
    check_sample_is_known,
)
from .checks.shard_map import check_problem_on_devices
from .cost import cost_stats
from .display.tables import ResultModule, Row, certificate_rows, sentences_of_flags
from .implicit.curvature_probe import probe_curvature
from .implicit.differentiation import (
    Point,
    all_solved,
    any_negative_curvature,
    corrected_hypergradient,
    count_products,
    max_relative_error,
    zero_adjoint,
)
from .implicit.minimum import is_cancelled, uses_w_in_each_loss
from .implicit.newton_correction import (
    CorrectionChecks,
    check_correction,
    correct_by_newton,
    outer_gradient_rounding,
)
from .keys_in_w import bind_keys, restore_keys
from .linear.equilibration import equilibrate
from .number_checks import check_positive_int, positive
from .one_vector import Layout
from .problem import Bilevel, EstimateData
from .trees import all_finite, safe_norm, underflows
from .validation import as_input_arrays, as_key, check_same_structure, floats_to_arrays

TRUST_RTOL = 1e-2
NO_GRADIENT_ADVICE = (
    "so implicit differentiation cannot compute its hypergradient, which need not be "
    "zero (the leaf may enter the optimizer or the start); use hg.Unrolled, or take it "
    "out of alpha"
)
CERTIFY_ADVICE = (
    "so there is no certificate, which compares with implicit differentiation; certify "
    "where every leaf of alpha enters a loss, as without a learned rate"
)
SOLVE_RTOL = 1e-6  # of the solves of a certificate, each relative to its own side
NUM_NEWTON_STEPS = 2
#: Largest last change, as a fraction of ``rtol``. If each step makes 0.9 of the change
#: before, all steps from the last one on make ten times the last change.
LAST_CHANGE_RATIO = 0.1
MIN_PROBE_STEPS = 20  # of the CG that searches for negative curvature
#: Seed of the probes of the scaling. Estimates count theirs from zero, so that a
#: certificate sees other random vectors than the estimate.
SCALING_SEED = -1

#: The sentence for each flag of a certificate.
CERTIFICATE_REASONS = {
    "not_finite": "a hypergradient or a derivative is not finite",
    "error": (
        "error_estimate exceeds rtol (if this is the only reason, "
        "corrected_hypergradient is nearer to the derivative at the minimum; the "
        "derivative of a run that stops early is another number)"
    ),
    "last_change": (
        "the last Newton step changed the hypergradient by more than a tenth of rtol, "
        "or the only step by more than rtol (certify at a more accurate w)"
    ),
    "not_solved": (
        "a linear solve did not reach its tolerance (certify at a more accurate w, or "
        "in float64)"
    ),
    "larger_gradient": (
        "the Newton steps increased the norm of dL/dw, so w is not near a minimum of a "
        "smooth loss (allow the inner solver more steps, or smooth a kink of the loss)"
    ),
    "negative_curvature": (
        "the inner Hessian has negative curvature, so w is not a minimum (allow the "
        "inner solver more steps, start elsewhere, or add a penalty on w)"
    ),
    "rounding_error": (
        "rounding of w changes dM/dw by more than rtol, the parts of the hypergradient "
        "cancel up to rounding, or dM/dw underflows in float16 (use float64, or center "
        "the data)"
    ),
    "lost_derivative": (
        "a loss uses stop_gradient, sign, round, a comparison or an integer made from "
        "w or alpha, whose derivative is treated as zero (use a smooth surrogate)"
    ),
}


class Certificate(ResultModule):
    """The error of a hypergradient as the derivative at the argmin.

    Attributes:
      error_estimate: ``||h - corrected_hypergradient|| / ||corrected_hypergradient||``
        for the certified hypergradient ``h``, the maximum over K losses.
      trusted: True if the error estimate is at most ``rtol``, the last Newton step
        changed the hypergradient by at most ``rtol / 10`` (``rtol`` if it is the only
        one), its solves reached their tolerances, the steps did not increase
        ``||S dL/dw||``, everything is finite, neither these solves nor the random probe
        met negative curvature, the rounding of ``w`` changes ``dM/dw`` by at most
        ``rtol``, the two parts of ``h`` do not cancel up to rounding, ``dM/dw`` does
        not underflow in float16, and no derivative is lost on the way to a loss. A
        Newton step from a gradient at the level of rounding need not be solved, and one
        to such a gradient may increase it.
      corrected_w: ``w`` after the Newton steps.
      corrected_hypergradient: The hypergradient at ``corrected_w``.
      inner_grad_norm: ``||dL/dw||`` at the given ``w``.
      corrected_grad_norm: ``||dL/dw||`` at ``corrected_w``.
      adjoint_residual: ``||b - H v|| / ||b||`` at ``corrected_w``, the maximum over K
        losses. ``trusted`` does not use it, because it depends on the units of ``w``.
      ritz_min, ritz_max: Extreme Ritz values of ``S H S`` from a random vector, with
        the diagonal scaling ``S`` of the solves.
      curvature_resolution: A fraction ``r``, which says how far the spectrum may reach
        below ``ritz_min``: with a probability of at least 99% no eigenvalue of
        ``S H S`` is below ``ritz_min - r (ritz_max - ritz_min) / (1 - 2 r)``. From 1/2
        on, the probe says nothing.
      negative_curvature: Whether a solve of the last step, or the random probe, met
        negative curvature that is not rounding.
      distance_bound: With ``strong_convexity``, an upper bound on ``||w - w*||`` at the
        given ``w``; NaN without.
      adjoint_error_bound: With ``strong_convexity``, an upper bound on
        ``||v - H^-1 b|| / ||b||`` at ``corrected_w``; NaN without.
      stats: The cost of the certificate.
      flags: ``{name: bool}``, one per condition of ``trusted``; True if it failed.

    >>> import hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: 0.5 * w**2
    >>> certificate = hg.certify(hg.Bilevel(inner, outer), 1.5, 1.0)
    >>> float(certificate.error_estimate)
    0.5
    >>> float(certificate.corrected_hypergradient)
    1.0
    >>> certificate.reasons
    ('error_estimate exceeds rtol (if this is the only reason, ...)',)
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
    curvature_resolution: Scalar
    negative_curvature: Scalar
    distance_bound: Scalar
    adjoint_error_bound: Scalar
    stats: dict[str, Scalar]
    flags: dict[str, Scalar]

    @property
    def distance(self) -> Scalar:
        """The error estimate, or NaN if a condition but that of the error fails."""
        failed = [flag for name, flag in self.flags.items() if name != "error"]
        return jnp.where(jnp.any(jnp.stack(failed)), jnp.nan, self.error_estimate)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the hypergradient is not trusted, in words; empty if it is trusted."""
        return sentences_of_flags(self.flags, CERTIFICATE_REASONS, "certificate")

    def _rows(self) -> list[Row] | None:
        return certificate_rows(self)


def certify(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    hypergradient: Any = None,
    *,
    num_newton_steps: int = NUM_NEWTON_STEPS,
    rtol: float | Array = TRUST_RTOL,
    strong_convexity: float | Array | None = None,
    key: Array | None = None,
) -> Certificate:
    """Estimates how far a hypergradient is from the derivative at the argmin.

    This derivative is ``dM/dalpha - J' v``, with ``H = d2L/dw2``, ``J = d2L/dw
    dalpha``, ``b = dM/dw`` and ``H v = b``. Newton steps ``w <- w - d``, with ``H d =
    dL/dw``, approach the argmin. Each is followed by ``v <- v + e``, with ``H e = b - H
    v``. Solves work with ``S H S``, whose diagonal ``S`` is probed. The change of the
    hypergradient is the estimate of its error.

    Args:
      problem: The problem.
      w, alpha: Inner solution and hyperparameters at which it was evaluated.
      hypergradient: The hypergradient to certify, of any estimator, or its `Estimate`,
        whose samples the certificate then sees. Defaults to that of implicit
        differentiation at ``w`` with an accurate adjoint.
      num_newton_steps: Number of Newton steps. One suffices for an inner loss that is
        nearly quadratic, and does not show whether it sufficed; networks need two.
      rtol: Relative error up to which the hypergradient is trusted.
      strong_convexity: Lower bound on the eigenvalues of ``H`` at every ``w``. The
        bounds of the certificate require it; all other fields are estimates.
      key: PRNG key of ``data_fn``, of batches with a key, and of the probe. Defaults to
        that of the estimate, or else to ``jax.random.key(0)``.

    Raises:
      TypeError, ValueError: An argument is invalid; raised before anything is compiled.

    Cost:
      Per Newton step two solves, each to 1e-6 of its own right-hand side; eight
      products for the scaling; a probe of as many as the longest solve, 20 to 1,000;
      nine more if the solve of the last Newton step fails or ``dL/dw`` increases; an
      outer gradient per Newton step and another one, or two without an estimate.
    Memory:
      Ten vectors like ``w``.
    Bias:
      Second order in the distance to the argmin. Another minimum is missed. So is a
      direction in which ``dL/dw`` and ``b - H v`` are both below 1e-6 of their norms,
      or in which the curvature and ``dL/dw`` are both down to rounding.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha))
    >>> outer = lambda w, alpha, batch: jnp.sum(w**2)
    >>> problem = hg.Bilevel(inner, outer)
    >>> certificate = hg.certify(problem, jnp.array([1.1, 0.9]), jnp.ones(2))
    >>> bool(certificate.trusted), round(float(certificate.error_estimate), 2)
    (False, 0.1)
    """
    check_problem_type(problem)
    if hasattr(hypergradient, "hypergradient"):  # an Estimate
        key = hypergradient.key if key is None else key
        check_sample_is_known(problem, key)
        hypergradient = hypergradient.hypergradient
    w, alpha = as_input_arrays(w, alpha)
    check_positive_int("num_newton_steps", num_newton_steps)
    rtol = positive("rtol")(rtol)
    strong_convexity = positive("strong_convexity", optional=True)(strong_convexity)
    problem, rtol, strong_convexity, hypergradient = floats_to_arrays(
        (problem, rtol, strong_convexity, hypergradient)
    )
    problem, parameters = bind_keys(problem, w)
    check_on_shapes(check_certifiable, problem, parameters, alpha)
    key = as_key(key)
    check_problem_on_devices(problem, parameters, alpha, key)
    if hypergradient is not None:
        _check_hypergradient(problem, hypergradient, alpha)
    numbers = num_newton_steps, rtol, strong_convexity
    certificate = _certify(problem, parameters, alpha, hypergradient, *numbers, key)
    corrected_w = restore_keys(certificate.corrected_w, problem.keys_of_w)
    return dataclasses.replace(certificate, corrected_w=corrected_w)


def _check_hypergradient(
    problem: Bilevel, hypergradient: PyTree, alpha: PyTree
) -> None:
    """Raises an error unless each leaf has the shape of ``alpha``, once per loss."""
    lead = problem.value_shape
    like = jax.tree.map(lambda x: jnp.broadcast_to(x, lead + x.shape), alpha)
    like_name = "alpha, with a leading axis of losses" if lead else "alpha"
    check_same_structure("hypergradient", hypergradient, like, like_name, "have")


def check_certifiable(problem: Bilevel, w: PyTree, alpha: PyTree) -> None:
    """Raises an error unless implicit differentiation applies to a problem."""
    check_problem(problem, w, alpha)
    check_alpha_has_gradient(problem, w, alpha, None, CERTIFY_ADVICE)


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
    init_s: PyTree | None = None,
    num_newton_steps: int = NUM_NEWTON_STEPS,
    rtol: Scalar | float = TRUST_RTOL,
    strong_convexity: Scalar | None = None,
) -> Certificate:
    """Returns the certificate of `certify`, inside a compiled program.

    The first solve starts from ``adjoint``, or zero; ``init_s`` is as in `equilibrate`.
    """
    layout, point = _point_of_vector(problem, data, w, alpha)
    adjoint = zero_adjoint(problem, w) if adjoint is None else adjoint
    init_s, adjoint = layout.join(init_s), layout.join(adjoint)
    scaling = equilibrate(point.matvec, point.w, init_s=init_s, seed=SCALING_SEED)
    is_given, solves = hypergradient is not None, []
    if is_given:
        inner_grad = jax.grad(point.problem.inner_loss)(point.w, alpha, point.batch)
    else:
        result = corrected_hypergradient(point, scaling, adjoint, SOLVE_RTOL)
        hypergradient, adjoint = result.hypergradient, result.adjoint
        inner_grad, solves = result.inner_grad, [result.linear_stats]
    inner_grad_norm = safe_norm(inner_grad)
    correction = correct_by_newton(
        point, scaling, hypergradient, adjoint, inner_grad, num_newton_steps, SOLVE_RTOL
    )
    corrected_point, result = point._replace(w=correction.w), correction.result
    solves += correction.solves
    lengths = [jnp.max(stats["num_products"]) for stats in solves]
    curvatures = [jnp.nanmax(stats["ritz_max"]) for stats in solves]
    probe = probe_curvature(
        corrected_point,
        scaling,
        data.solver_key,
        num_steps=jnp.maximum(jnp.max(jnp.stack(lengths)), MIN_PROBE_STEPS),
        curvature_max=jnp.nanmax(jnp.stack(curvatures)),
    )
    checks = check_correction(correction, inner_grad, scaling, point)
    num_products = scaling.num_products + probe.num_products
    num_products += sum(map(count_products, solves)) + checks.num_products
    is_negative = probe.is_negative | any_negative_curvature(checks.solves)
    corrected, residual = result.hypergradient, jnp.max(result.adjoint_residual)
    corrected_grad_norm = safe_norm(result.inner_grad)
    error = max_relative_error(problem, hypergradient, corrected)  # |h - h*| / |h*|
    is_finite = all_finite(hypergradient, corrected, error, corrected_grad_norm)
    has_converged = correction.last_change <= _max_last_change(rtol, num_newton_steps)
    rounding = outer_gradient_rounding(corrected_point, scaling, result.b)
    corrected_w = layout.split(correction.w)
    flags = lost_derivative_flags(problem, corrected_w, alpha) | _failed_checks(
        is_finite, error <= rtol, has_converged, checks, is_negative
    )
    per_loss = problem.for_each_loss
    is_lost = per_loss(is_cancelled)(corrected, result.cross, result.adjoint)
    is_lost |= uses_w_in_each_loss(corrected_point) & per_loss(underflows)(result.b)
    flags["rounding_error"] = is_finite & (~(rounding <= rtol) | jnp.any(is_lost))
    mu = jnp.nan if strong_convexity is None else strong_convexity
    return Certificate(
        error_estimate=error,
        trusted=~jnp.any(jnp.stack(list(flags.values()))),
        corrected_w=corrected_w,
        corrected_hypergradient=corrected,
        inner_grad_norm=inner_grad_norm,
        corrected_grad_norm=corrected_grad_norm,
        adjoint_residual=residual,
        ritz_min=probe.ritz_min,
        ritz_max=probe.ritz_max,
        curvature_resolution=probe.resolution,
        negative_curvature=is_negative,
        # ||w - w*|| <= ||dL/dw|| / mu and ||v - H^-1 b|| / ||b|| <= residual / mu
        distance_bound=inner_grad_norm / mu,
        adjoint_error_bound=residual / mu,
        stats=_cost_stats(problem, data, num_products, is_given, num_newton_steps),
        flags=flags,
    )


def _point_of_vector(
    problem: Bilevel, data: EstimateData, w: PyTree, alpha: PyTree
) -> tuple[Layout, Point]:
    """Returns the point with ``w`` as one vector, and the layout of the vector."""
    layout = Layout.from_w(problem, w)
    batches = data.inner_batch(), data.outer_batch()
    problem, w = layout.with_vector(problem), layout.join(w)
    return layout, Point(problem, w, alpha, *batches)


def _max_last_change(rtol: Scalar | float, num_newton_steps: int) -> Scalar | float:
    """Returns how much the last Newton step may change a hypergradient, relatively.

    The change by the only step is the error estimate itself.
    """
    return rtol if num_newton_steps == 1 else LAST_CHANGE_RATIO * rtol


def _failed_checks(
    is_finite: Array,
    is_accurate: Array,
    has_converged: Array,
    checks: CorrectionChecks,
    is_negative: Array,
) -> dict[str, Array]:
    """Returns ``{name: bool}`` for what the numbers of a certificate decide."""
    return {
        "not_finite": ~is_finite,
        "error": is_finite & ~is_accurate,
        "last_change": is_finite & ~has_converged,
        "not_solved": ~all_solved(checks.solves),
        "larger_gradient": checks.is_far,
        "negative_curvature": is_negative,
    }


def _cost_stats(
    problem: Bilevel,
    data: EstimateData,
    num_products: Array,
    is_given: bool,
    num_newton_steps: int,
) -> dict[str, Array]:
    """Returns the cost of the solves and of the gradients of each outer loss."""
    num_outer_grads = num_newton_steps + (1 if is_given else 2)
    return cost_stats(
        data.inner_data,
        data.outer_data,
        num_grads=1 if is_given else 0,
        num_hvps=num_products,
        num_outer_grads=num_outer_grads * len(problem.outer_losses),
    )
