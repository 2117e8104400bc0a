"""Single-loop methods on quadratics of many samples with closed-form optima.

*Question.* Of the methods that move ``w``, the adjoint and ``alpha`` together, which
comes how near to the best ``alpha``, and at what cost?

*System.* Ridge regression on 4,096 samples of 100 features, whose spectrum falls from 1
to 0.01; an ``alpha`` of ten numbers moves the targets; 1,024 outer samples; batches of
64. Samples depend on the seed. The losses are

    L(w, a) = mean_i (x_i . w - z_i . a - y_i)² / 2 + mu ||w||² / 2
    M(w, a) = mean_j (x'_j . w - y'_j)² / 2 + delta ||a||² / 2

so that ``w*(a) = H^-1 (C a + c)`` with ``H = X'X / n + mu``, ``C = X'Z / n``, ``c = X'y
/ n``, and ``M(w*(a), a)`` is a quadratic: ``h(a) - h(a*)`` is ``(a - a*)' Q (a - a*) /
2`` with ``Q = (H^-1 C)' H' (H^-1 C) + delta``. Every method keeps ``alpha`` in the box
[-10, 10].

*Budget.* A run has 400 gradient-equivalents, for every method: as many outer steps as
it pays for at the slowest rates of the grid, and for *implicit* as many as it pays for
at the cost of the dearest of 128. TTSA and SUSTAIN sample how many products they make:
their steps are those at the mean cost of 4,096; steps beyond the budget are left out,
and a run may end some per cent before it. A product yields the inner gradient at the
same point, which is not counted again: a step of SOBA is charged 3 gradients, and takes
nearly 4 in `soba_step`. *random search, total* has the budget of a run and of its
tuning. Seconds are the median of five calls of the warm program without evaluations, on
two CPU cores with no other load. ``h(alpha)`` is evaluated outside the budget, at some
100 steps and after the last one.

*Rows.* Every method uses gradient descent throughout; inner loops and series have ten
steps, VRBO's three; the periods of SRBA and VRBO are one pass; the step size of a
series is the rate of ``w``; the penalty of F2SA is ``10 (1 + t)^(1/7)``; FSLA, MRBO,
SUSTAIN and VRBO have the momentum of their defaults, constant, BOME ``eta = 0.5``,
PZOBO one direction and ``sigma = 0.01``; a poor row may be due to these values. DARTS
of first order follows ``dM/dalpha`` alone, which is zero here, so that it stays where
it starts. Rates are constant; SOBA alone has a second row in which they fall, as ``rate
/ sqrt(1 + t / 100)``. *implicit* solves on all data: ten steps and ten products of
conjugate gradients, warm-started. *random search* tries the initial alpha, then samples
uniformly from the box, and trains each alpha by Newton's method; where the first
training costs more than the budget it has no final value.

*Tuning, the same for every row.* On seeds 100 and 101, which are not reported, each
method runs at every pair of a rate of ``w`` and a ratio, of the rate of ``alpha`` to
it. The pair whose worse run is lowest at its last step is chosen. The methods whose
choice is at an edge of the grid, with no inner pair as good, are named. A reported run
ends at the geometric mean of the evaluations in the last tenth of its cost; a run that
broke off counts as infinite, in medians too, and supports no claim.

*Claims*, on seeds 0 to 9. SABA ends at least 10 times lower than SOBA: the paired 95%
interval of the geometric mean over seeds lies above 10. SOBA is the first of the
stochastic methods at its plateau, by medians of the cost to come within twice of where
it ends, which must be ten times below where it began.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg

from .shared.single_loop import SeedProblem, System
from .shared.single_loop_table import (
    compare_with_soba,
    make_table,
)

NUM_INNER, NUM_OUTER, NUM_W, NUM_ALPHA = 4096, 1024, 100, 10
MU, DELTA, BATCH = 0.1, 0.1, 64


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the loss of ridge regression whose targets ``alpha`` moves."""
    residual = batch["x"] @ w - batch["z"] @ alpha - batch["y"]
    return 0.5 * jnp.mean(residual**2) + 0.5 * MU * jnp.vdot(w, w)


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the squared error on other samples, plus the penalty on ``alpha``."""
    residual = batch["x"] @ w - batch["y"]
    return 0.5 * jnp.mean(residual**2) + 0.5 * DELTA * jnp.vdot(alpha, alpha)


def samples(seed: int) -> tuple[PyTree, PyTree]:
    """Returns inner and outer samples; their spectrum falls from 1 to 0.01."""
    rng = np.random.default_rng(seed)
    inputs = lambda n: np.logspace(0, -1, NUM_W) * rng.normal(size=(n, NUM_W))
    true_w = rng.normal(size=NUM_W)
    inner = {"x": inputs(NUM_INNER)}
    inner["z"] = inner["x"][:, :NUM_ALPHA] + rng.normal(size=(NUM_INNER, NUM_ALPHA))
    inner["y"] = inner["x"] @ true_w + rng.normal(size=NUM_INNER)
    outer = {"x": inputs(NUM_OUTER)}
    outer["y"] = outer["x"] @ (true_w + 1) + rng.normal(size=NUM_OUTER)
    return inner, outer


def closed_form(inner: PyTree, outer: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """Returns ``(a*, Q)``."""
    H = inner["x"].T @ inner["x"] / NUM_INNER + MU * np.eye(NUM_W)
    response = np.linalg.solve(H, inner["x"].T @ inner["z"] / NUM_INNER)
    w_at_zero = np.linalg.solve(H, inner["x"].T @ inner["y"] / NUM_INNER)
    predictions = outer["x"] @ response
    Q = predictions.T @ predictions / NUM_OUTER + DELTA * np.eye(NUM_ALPHA)
    residual = outer["y"] - outer["x"] @ w_at_zero
    return np.linalg.solve(Q, predictions.T @ residual / NUM_OUTER), Q


@functools.cache
def prepare(seed: int) -> PyTree:
    """Returns samples and closed form in float32."""
    inner, outer = samples(seed)
    best, Q = closed_form(inner, outer)
    arrays = {"inner": inner, "outer": outer, "best": best, "Q": Q}
    return jax.tree.map(np.float32, arrays)


def suboptimality(best: Array, Q: Array, w: Array, alpha: Array, key: Array) -> Array:
    """Returns ``h(alpha) - h(a*)``."""
    del w, key
    error = alpha - best
    return 0.5 * jnp.vdot(error, Q @ error)


def make_problem(arrays: PyTree) -> SeedProblem:
    """Returns the problem of a seed, starting from zero."""
    data = (hg.Batches(arrays[name], BATCH) for name in ("inner", "outer"))
    return SeedProblem(
        hg.Bilevel(inner_loss, outer_loss, *data),
        jnp.zeros(NUM_W),
        jnp.zeros(NUM_ALPHA),
        jax.tree_util.Partial(suboptimality, arrays["best"], arrays["Q"]),
    )


SYSTEM = System(
    name="quadratics",
    data_name=lambda: (
        f"simulated, {NUM_INNER:,} and {NUM_OUTER:,} samples of 100 numbers"
    ),
    prepare=prepare,
    make_problem=make_problem,
    budget=400,
    points=100,
    batches=NUM_INNER // BATCH,
    rates=(1.0, 0.3, 0.1, 0.03, 0.01),
    ratios=(3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003),
    low=-10.0,
    high=10.0,
)


table = make_table(
    SYSTEM,
    functools.partial(compare_with_soba, min_ratio=10, other="SOBA, falling"),
    source="after the quadratics of Dagréou et al. 2022 (arXiv 2201.13409)",
    data="simulated samples",
    minutes=4,
)
