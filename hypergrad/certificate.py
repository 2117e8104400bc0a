"""How far to trust a hypergradient: Newton corrections of the point it was taken at."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .adjoint import (
    differentiate,
    error_between,
    newton_step,
    total_products,
    zero_adjoint,
)
from .checks import (
    as_inputs,
    as_key,
    check_problem,
    check_problem_is,
    check_same_structure,
    check_seen,
    rehearse,
    traced,
)
from .cost import ledger
from .drawn import Drawn, drawn
from .linear import CG
from .linear.operator import Stats, solve
from .problem import Bilevel
from .products import hvp
from .settings import check_steps, number
from .shown import Shown
from .trees import all_finite, norm, normal

TRUST = 1e-2
UNSEEN = (
    "so implicit differentiation cannot see it (it is not zero: it may enter the "
    "optimizer or the start); use hg.Unrolled, or take it out of alpha"
)
NEWTON = 1e-3  # a correction leaves a thousandth of the distance to the argmin
CORRECTIONS = 2
PROBE = 20  # steps of conjugate gradients that look for negative curvature


class Certificate(Shown):
    """What is known of a hypergradient's error as the derivative at the argmin.

    Attributes:
      error_estimate: ``||h - hypergradient|| / ||hypergradient||`` for the ``h`` that
        was certified, the largest of K.
      trusted: the estimate is at most ``rel_err``, the last correction moved the
        hypergradient by no more, its adjoint is solved to a tenth of that, all is
        finite, and no negative curvature was met.
      w, hypergradient: after the corrections.
      inner_residual: ``||dL/dw||`` at the ``w`` that was given; ``corrected_residual``
        is that at the corrected one.
      adjoint_residual: ``||b - H v|| / ||b||`` at the corrected ``w``.
      ritz_min, ritz_max: ends of the spectrum of ``H`` that the solves saw.
      negative_curvature: whether any of them, or a random probe, met some.
      distance_estimate: ``||dL/dw|| / ritz_min``, an estimate of ``||w - w*||``.
      distance_bound, adjoint_bound: NaN unless ``strong_convexity`` is given: then
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
    inner_residual: Array
    corrected_residual: Array
    adjoint_residual: Array
    ritz_min: Array
    ritz_max: Array
    negative_curvature: Array
    distance_estimate: Array
    distance_bound: Array
    adjoint_bound: Array
    stats: dict[str, Array]


def certify(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    hypergradient: PyTree = None,
    *,
    corrections: int = CORRECTIONS,
    rel_err: float | Array = TRUST,
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
      corrections: Newton steps. One suffices where the inner problem is convex;
        networks need two.
      rel_err: relative error up to which to trust.
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
    check_problem_is(problem)
    w, alpha = as_inputs(w, alpha)
    check_steps("corrections", corrections)
    rel_err = number("rel_err", optional=False)(rel_err)
    strong_convexity = number("strong_convexity")(strong_convexity)
    problem, rel_err, mu, hypergradient = traced(
        (problem, rel_err, strong_convexity, hypergradient)
    )
    rehearse(Claim(), problem, w, alpha)
    if hypergradient is not None:
        count = problem.num_objectives
        lead = () if count is None else (count,)
        like = jax.tree.map(lambda x: jnp.broadcast_to(x, lead + x.shape), alpha)
        check_same_structure("hypergradient", hypergradient, like, "alpha")
    return _certify(
        problem, w, alpha, hypergradient, corrections, rel_err, mu, as_key(key)
    )


class Claim(eqx.Module):
    """Checks a problem as an estimator would, without a solver."""

    def init(self, problem: Bilevel, w: PyTree, alpha: PyTree, key: Array) -> None:
        """Refuses what has no certificate."""
        check_problem(problem, w, alpha)
        check_seen(problem, w, alpha, None, UNSEEN)


@eqx.filter_jit
def _certify(problem, w, alpha, hypergradient, corrections, rel_err, mu, key):
    return certificate(
        problem,
        drawn(problem, key),
        w,
        alpha,
        hypergradient,
        corrections=corrections,
        rel_err=rel_err,
        strong_convexity=mu,
    )


def certificate(
    problem: Bilevel,
    data: Drawn,
    w: PyTree,
    alpha: PyTree,
    hypergradient: PyTree | None,
    *,
    adjoint: PyTree | None = None,
    corrections: int = CORRECTIONS,
    rel_err: Array | float = TRUST,
    strong_convexity: Array | None = None,
) -> Certificate:
    """`certify` within a compiled program, on ``data`` and from an ``adjoint``."""
    batch, outer_batch = data.inner_batch(), data.outer_batch()
    loss = problem.inner_loss
    solve_at = lambda w, start: differentiate(
        problem, CG(), w, alpha, batch, outer_batch, start
    )
    if adjoint is None:
        adjoint = zero_adjoint(problem, w)

    solves: list[Stats] = []
    num_grads, num_outer_grads = 0, corrections
    if hypergradient is None:
        at = solve_at(w, adjoint)
        solves.append(at.solved)
        num_outer_grads += 1
        hypergradient, adjoint, gradient = at.hypergradient, at.adjoint, at.gradient
    else:
        gradient, num_grads = jax.grad(loss)(w, alpha, batch), 1
    inner_residual = norm(gradient)

    corrected = hypergradient
    change = residual = jnp.asarray(jnp.nan)
    for _ in range(corrections):
        w, solved = newton_step(loss, w, alpha, batch, gradient, CG(rtol=NEWTON))
        at = solve_at(w, adjoint)
        solves += [solved, at.solved]
        change = error_between(problem, corrected, at.hypergradient)
        residual = jnp.max(at.adjoint_residual)
        corrected, adjoint, gradient = at.hypergradient, at.adjoint, at.gradient

    probe = normal(data.solver_key, w)
    matvec = lambda v: hvp(loss, w, alpha, batch, v)
    look = CG(rtol=0.0, max_steps=PROBE)
    solves.append(solve(look, matvec, probe, optax.tree.zeros_like(w))[1])

    over = lambda reduce, name: reduce(jnp.stack([reduce(s[name]) for s in solves]))
    ritz_min, ritz_max = over(jnp.nanmin, "ritz_min"), over(jnp.nanmax, "ritz_max")
    negative = over(jnp.any, "negative_curvature")
    error = error_between(problem, hypergradient, corrected)
    mu = jnp.nan if strong_convexity is None else strong_convexity
    return Certificate(
        error_estimate=error,
        trusted=(
            all_finite(hypergradient, corrected, error, norm(gradient))
            & (jnp.maximum(error, change) <= rel_err)
            & (residual <= rel_err / 10)
            & ~negative
        ),
        w=w,
        hypergradient=corrected,
        inner_residual=inner_residual,
        corrected_residual=norm(gradient),
        adjoint_residual=residual,
        ritz_min=ritz_min,
        ritz_max=ritz_max,
        negative_curvature=negative,
        distance_estimate=inner_residual / ritz_min,
        distance_bound=inner_residual / mu,
        adjoint_bound=residual / mu,
        stats=ledger(
            data.inner_data,
            data.outer_data,
            num_grads=num_grads,
            num_hvps=sum(map(total_products, solves)),
            num_outer_grads=num_outer_grads * (problem.num_objectives or 1),
        ),
    )
