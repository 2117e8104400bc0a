"""How far to trust a hypergradient: Newton corrections of the point it was taken at."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .cost import cost_stats
from .implicit_diff import (
    implicit_hypergradient,
    max_relative_error,
    newton_step,
    total_products,
    zero_adjoint,
)
from .linear import CG
from .linear.base import LinearStats, solve_linear
from .problem import Bilevel, EstimateData
from .problem_checks import (
    check_alpha_has_gradient,
    check_init,
    check_problem,
    check_problem_type,
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
NEWTON_RTOL = 1e-3  # a correction leaves a thousandth of the distance to the argmin
NUM_NEWTON_STEPS = 2
NUM_PROBE_STEPS = 20  # steps of conjugate gradients that look for negative curvature


class Certificate(PrettyModule):
    """What is known of a hypergradient's error as the derivative at the argmin.

    Attributes:
      error_estimate: ``||h - hypergradient|| / ||hypergradient||`` for the ``h`` that
        was certified, the largest of K.
      trusted: the estimate is at most ``rtol``, the last correction moved the
        hypergradient by no more, its adjoint is solved to a tenth of that, all is
        finite, and no negative curvature was met.
      w, hypergradient: after the corrections.
      inner_grad_norm: ``||dL/dw||`` at the ``w`` that was given; ``corrected_grad_norm``
        is that at the corrected one.
      adjoint_residual: ``||b - H v|| / ||b||`` at the corrected ``w``.
      ritz_min, ritz_max: ends of the spectrum of ``H`` that the solves saw.
      negative_curvature: whether any of them, or a random probe, met some.
      distance_estimate: ``||dL/dw|| / ritz_min``, an estimate of ``||w - w*||``.
      distance_bound, adjoint_error_bound: NaN unless ``strong_convexity`` is given: then
        ``||w - w*||`` is at most the one for the ``w`` given, and
        ``||v - H^-1 b|| / ||b||`` at most the other at the corrected ``w``.
      stats: the ledger of what the certificate cost.

    >>> import hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: 0.5 * w**2
    >>> certificate = hg.certify(hg.Bilevel(inner, outer), 1.5, 1.0)
    >>> float(certificate.error_estimate), float(certificate.hypergradient)
    (0.5, 1.0)
    """

    error_estimate: Array
    trusted: Array
    w: PyTree
    hypergradient: PyTree
    inner_grad_norm: Array
    corrected_grad_norm: Array
    adjoint_residual: Array
    ritz_min: Array
    ritz_max: Array
    negative_curvature: Array
    distance_estimate: Array
    distance_bound: Array
    adjoint_error_bound: Array
    stats: dict[str, Array]


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
    """How far ``hypergradient``, taken at ``w``, is from the derivative at the argmin.

    ``w`` is corrected by Newton steps, ``H d = dL/dw``, ``w <- w - d``; the adjoint is
    solved anew at the corrected point, all by `CG` on all of the data. The change of
    the hypergradient is the estimate of its error.

    Args:
      problem: the two losses and their data.
      w: where the hypergradient was taken, an approximate solution.
      alpha: at which.
      hypergradient: what to certify, from any estimator; None means implicit
        differentiation at ``w`` with the adjoint solved.
      num_newton_steps: Newton steps. One suffices where the inner problem is convex;
        networks need two.
      rtol: relative error up to which to trust.
      strong_convexity: a number below which no eigenvalue of ``H`` lies anywhere. Only
        with it are bounds reported; everything else is an estimate.
      key: PRNG key of ``draw``, of keyed batches, and of the probe.

    Cost: for each correction a solve for ``w``, to 1e-3, and one for the adjoint, as
    far as the dtype allows; a probe of 20 products; all counted in ``stats``. Memory:
    that of `CG`. Bias: that of Newton's method cut short, second order in the distance
    to the argmin.

    Raises:
      TypeError, ValueError: bad input, before anything is traced.

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
    problem, rtol, mu, hypergradient = floats_to_arrays(
        (problem, rtol, strong_convexity, hypergradient)
    )
    check_init(ProblemChecker(), problem, w, alpha)
    if hypergradient is not None:
        count = problem.num_objectives
        lead = () if count is None else (count,)
        like = jax.tree.map(lambda x: jnp.broadcast_to(x, lead + x.shape), alpha)
        check_same_structure("hypergradient", hypergradient, like, "alpha")
    return _certify(
        problem, w, alpha, hypergradient, num_newton_steps, rtol, mu, as_key(key)
    )


class ProblemChecker(eqx.Module):
    """Checks a problem as an estimator would, without a solver."""

    def init(self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array) -> None:
        """Refuses what has no certificate."""
        check_problem(problem, w, alpha)
        check_alpha_has_gradient(problem, w, alpha, None, NO_GRADIENT_ADVICE)


@eqx.filter_jit
def _certify(problem, w, alpha, hypergradient, num_newton_steps, rtol, mu, key):
    return compute_certificate(
        problem,
        EstimateData.sample(problem, key),
        w,
        alpha,
        hypergradient,
        num_newton_steps=num_newton_steps,
        rtol=rtol,
        strong_convexity=mu,
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
    rtol: Array | float = TRUST_RTOL,
    strong_convexity: Array | None = None,
) -> Certificate:
    """`certify` within a compiled program, on ``data`` and from an ``adjoint``."""
    batch, outer_batch = data.inner_batch(), data.outer_batch()
    loss = problem.inner_loss
    solve_at = lambda w, start: implicit_hypergradient(
        problem, CG(), w, alpha, batch, outer_batch, start
    )
    if adjoint is None:
        adjoint = zero_adjoint(problem, w)

    solves: list[LinearStats] = []
    num_grads, num_outer_grads = 0, num_newton_steps
    if hypergradient is None:
        at = solve_at(w, adjoint)
        solves.append(at.solved)
        num_outer_grads += 1
        hypergradient, adjoint, gradient = at.hypergradient, at.adjoint, at.gradient
    else:
        gradient, num_grads = jax.grad(loss)(w, alpha, batch), 1
    inner_grad_norm = norm(gradient)

    corrected = hypergradient
    change = residual = jnp.asarray(jnp.nan)
    for _ in range(num_newton_steps):
        w, solved = newton_step(loss, w, alpha, batch, gradient, CG(rtol=NEWTON_RTOL))
        at = solve_at(w, adjoint)
        solves += [solved, at.solved]
        change = max_relative_error(problem, corrected, at.hypergradient)
        residual = jnp.max(at.adjoint_residual)
        corrected, adjoint, gradient = at.hypergradient, at.adjoint, at.gradient

    probe = random_like(data.solver_key, w)
    matvec = lambda v: hvp(loss, w, alpha, batch, v)
    look = CG(rtol=0.0, max_steps=NUM_PROBE_STEPS)
    solves.append(solve_linear(look, matvec, probe, optax.tree.zeros_like(w))[1])

    over = lambda reduce, name: reduce(jnp.stack([reduce(s[name]) for s in solves]))
    ritz_min, ritz_max = over(jnp.nanmin, "ritz_min"), over(jnp.nanmax, "ritz_max")
    negative = over(jnp.any, "negative_curvature")
    error = max_relative_error(problem, hypergradient, corrected)
    mu = jnp.nan if strong_convexity is None else strong_convexity
    return Certificate(
        error_estimate=error,
        trusted=(
            all_finite(hypergradient, corrected, error, norm(gradient))
            & (jnp.maximum(error, change) <= rtol)
            & (residual <= rtol / 10)
            & ~negative
        ),
        w=w,
        hypergradient=corrected,
        inner_grad_norm=inner_grad_norm,
        corrected_grad_norm=norm(gradient),
        adjoint_residual=residual,
        ritz_min=ritz_min,
        ritz_max=ritz_max,
        negative_curvature=negative,
        distance_estimate=inner_grad_norm / ritz_min,
        distance_bound=inner_grad_norm / mu,
        adjoint_error_bound=residual / mu,
        stats=cost_stats(
            data.inner_data,
            data.outer_data,
            num_grads=num_grads,
            num_hvps=sum(map(total_products, solves)),
            num_outer_grads=num_outer_grads * (problem.num_objectives or 1),
        ),
    )
