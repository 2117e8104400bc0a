"""Single-loop methods on logistic regression with one penalty per feature.

*Question.* Of the methods that move ``w``, the adjoint and ``alpha`` together, which
comes how near to the best ``alpha``, and at what cost?

*System.* ijcnn1 from the folder that HYPERGRAD_DATA_DIR names, else a synthetic
stand-in, and the table states which: 22 features divided by their standard deviations,
8,192 samples to train and 8,192 to validate, one penalty per feature. The losses are

    L(w, a) = mean CE(w) + sum_k exp(a_k) ||w_k||² / 2,   M(w) = CE on other samples

with log-penalties that start from -2 and are kept in [-12, 2]; batches of 64. Which
samples train and which validate depends on the seed. ``h(alpha)`` is the validation
loss at the ``w`` that Newton's method reaches from zero, and ``h*`` the lower result of
two runs of L-BFGS on the exact hypergradient in float64; differences below 1e-7 are
shown as 1e-7.

*Budget.* A run has 100 gradient-equivalents, for every method: as many outer steps as
it pays for at the slowest rates of the grid, and for *implicit* as many as it pays for
at the cost of the dearest of 128. TTSA and SUSTAIN sample how many products they make:
their steps are those at the mean cost of 4,096; steps beyond the budget are left out,
and a run may end some per cent before it. A product yields the inner gradient at the
same point, which is not counted again: a step of SOBA is charged 3 gradients, and takes
nearly 4 in `soba_step`. *random search, total* has the budget of a run and of its
tuning. Seconds are the median of five calls of the warm program without evaluations, on
two CPU cores with no other load. ``h(alpha)`` is evaluated outside the budget, at some
40 steps and after the last one.

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

*Claims*, on seeds 0 to 9. SABA ends lower than SOBA, by any factor: the paired 95%
interval of the geometric mean over seeds lies above 1. SOBA is the first of the
stochastic methods at its plateau, by medians of the cost to come within twice of where
it ends, which must be ten times below where it began.
"""

import functools

import numpy as np

import hypergrad as hg

from .shared.logistic_systems import BATCH, Samples, binary_loss, make_system
from .shared.single_loop_table import (
    compare_with_soba,
    make_table,
)


@functools.cache
def ijcnn1() -> Samples:
    """Returns ijcnn1 with features divided by their standard deviations."""
    size = 8192
    try:
        data = hg.datasets.load("ijcnn1")
    except FileNotFoundError:
        return synthetic(size)
    x, y = data["x"], data["y"]
    name = f"ijcnn1, {size:,} and {size:,} of its 141,691 samples"
    return Samples(name, (x / x.std(axis=0)).astype(np.float32), y, size)


def synthetic(size: int) -> Samples:
    """Returns the stand-in for ijcnn1, in which half of the features matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * size, 22)).astype(np.float32)
    true_w = np.where(np.arange(22) < 11, rng.normal(size=22), 0.0)
    y = (rng.random(4 * size) < 1 / (1 + np.exp(2 - x @ true_w))).astype(np.int32)
    name = f"synthetic, not ijcnn1: {size:,} and {size:,} samples of 22 normal features"
    return Samples(name, x, y, size)


SYSTEM = make_system(
    ijcnn1, binary_loss, (),
    name="logistic", budget=100, points=40, batches=8192 // BATCH,
    rates=(3.0, 1.0, 0.3, 0.1, 0.03),
    ratios=(1e5, 3e4, 1e4, 3e3, 1e3, 300.0, 100.0, 30.0, 10.0),
)  # fmt: skip


table = make_table(
    SYSTEM,
    functools.partial(compare_with_soba, min_ratio=1, other="AmIGO"),
    source="Dagréou et al. 2022 (arXiv 2201.13409)",
    data="ijcnn1, or a synthetic stand-in",
    arrays=lambda: {"x": ijcnn1().x, "y": ijcnn1().y},
    minutes=4,
)
