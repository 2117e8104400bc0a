"""Surrogates of ranking metrics, against scikit-learn, NumPy and theory.

Exact metrics are compared with other implementations on what is left when masked items
are dropped. One program serves nearly all tests of a surrogate: value, both derivatives
and the exact metric of one row of one length.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import sklearn.metrics as skm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

import hypergrad as hg
from benchmarks.known import central, error
from hypergrad import surrogates as sg
from hypergrad.surrogates import pairs
from hypergrad.surrogates.retrieval import memberships
from hypergrad.surrogates.soft_rank import pool
from hypergrad.validation import floats_to_arrays
from tests.surrogate_cases import (
    N,
    check_extremes,
    check_second_derivatives,
    check_slopes,
    check_unsound_scores,
    read,
    rng_of,
)

K = 5
TRUTHS = 48.0
seeds = st.integers(0, 2**32 - 1)


class Case(NamedTuple):
    """A surrogate, and its metric by other means."""

    surrogate: Any
    oracle: Callable[..., float]  # (scores, targets, weights), nothing masked


# Oracles.


def average_precision(s, y, w):
    return skm.average_precision_score(y, s, sample_weight=w) if w @ y > 0 else 0.0


def repeated(oracle):
    """A metric of equal items, one repeated for each unit of its weight."""

    def weighted(s, y, w):
        assert np.all(w == w.astype(int))
        return oracle(np.repeat(s, w.astype(int)), np.repeat(y, w.astype(int)))

    return weighted


def groups(s, y):
    """``(before, size, gain)`` of each group of ties, from the best down."""
    before = 0
    for score in np.unique(s)[::-1]:
        tied = s == score
        yield before, tied.sum(), y[tied].sum()
        before += tied.sum()


def found(s, y, k):
    """Positives among the top k, a group of ties that k cuts in proportion."""
    return sum(
        gain * np.clip((k - before) / size, 0, 1) for before, size, gain in groups(s, y)
    )


def recall(s, y):
    return found(s, y, K) / y.sum() if y.any() else 0.0


def precision(s, y):
    return found(s, y, K) / K


def ndcg(s, y):
    if len(y) < 2:  # which scikit-learn refuses
        return float(y.sum() > 0)
    return skm.ndcg_score(y[None], s[None], k=K)


def reciprocal_rank(s, y):
    """The first of p among t in random order is on average at (t + 1) / (p + 1)."""
    for before, size, gain in groups(s, y):
        if gain:
            return 1 / (before + (size + 1) / (gain + 1))
    return 0.0


def detection(points):
    def oracle(s, y):
        precisions, recalls, hits = [], [], 0
        for before, size, gain in groups(s, y):
            hits += gain
            precisions += [hits / (before + size)] * int(gain)
            recalls += [hits] * int(gain)
        best = lambda least: max(
            (p for p, r in zip(precisions, recalls, strict=True) if r >= least),
            default=0.0,
        )
        if points is None:
            return sum(map(best, recalls)) / TRUTHS
        # In whole numbers of truths and points.
        grid = [-(-i * int(TRUTHS) // (points - 1)) for i in range(points)]
        return np.mean([best(least) for least in grid])

    return oracle


CASES = {
    "smooth": Case(sg.SmoothAP(), average_precision),
    "fast-64": Case(sg.FastAP(64), average_precision),
    "fast-8": Case(sg.FastAP(8), average_precision),
    "blackbox": Case(sg.BlackboxAP(), average_precision),
    "soft-rank": Case(sg.SoftRankAP(), average_precision),
    "recall": Case(sg.RecallAtK(K), repeated(recall)),
    "precision": Case(sg.PrecisionAtK(K), repeated(precision)),
    "ndcg": Case(sg.NDCG(K), repeated(ndcg)),
    "mrr": Case(sg.MRR(), repeated(reciprocal_rank)),
    "101-points": Case(sg.DetectionAP(TRUTHS, 101), repeated(detection(101))),
    "area": Case(sg.DetectionAP(TRUTHS), repeated(detection(None))),
}
each_case = pytest.mark.parametrize("name", CASES)
# Of precision and recall at k, of which all but the last division is one, recall.
one_of_each_form = pytest.mark.parametrize(
    "name",
    ["smooth", "fast-8", "blackbox", "soft-rank", "recall", "ndcg", "mrr", "area"],
)


def all_of(name, scores, targets, temperature=0.1, where=None, weights=None):
    """Value, slopes and exact metric, always by the same program."""
    scores = jnp.asarray(scores)
    where = np.ones(scores.shape, bool) if where is None else where
    weights = np.ones(scores.shape) if weights is None else weights
    return read(
        floats_to_arrays(CASES[name].surrogate), scores, jnp.asarray(targets, scores.dtype),
        jnp.asarray(temperature, scores.dtype), jnp.asarray(where),
        jnp.asarray(weights, scores.dtype),
    )  # fmt: skip


def drawn(rng, name=""):
    """Distinct scores, a hundredth of a unit apart at least, and targets or gains."""
    scores = 0.01 * rng.permutation(400)[:N]
    return scores, rng.integers(0, 4 if name == "ndcg" else 2, size=N)


def clustered(rng, name=""):
    """Six clusters of four: at a temperature of 0.1 each is one block of soft ranks.

    So that it is for weights in [1/2, 3/2], far from where a block splits or merges.
    """
    scores = np.add.outer(np.arange(6.0), 0.01 * np.arange(4)).ravel()
    return rng.permutation(scores), drawn(rng, name)[1]


# The exact metrics.


@each_case
@settings(deadline=None, max_examples=25)
@given(seed=seeds, ties=st.booleans(), masked=st.booleans())
def test_exact_metrics_equal_other_implementations(name, seed, ties, masked):
    """Ties, weights (zeros too), and masks as if the items were dropped."""
    rng = np.random.default_rng(seed)
    scores, targets = drawn(rng, name)
    scores = np.round(scores) if ties else scores
    weights = rng.integers(0, 3, size=N)
    if CASES[name].oracle is average_precision:
        weights = weights * rng.exponential(size=N)
    where = rng.random(N) < 0.6 if masked else np.ones(N, bool)
    dirty = np.where(where, scores, np.nan)
    exact = all_of(name, dirty, targets, where=where, weights=weights)[2]
    expected = CASES[name].oracle(scores[where], targets[where], weights[where])
    np.testing.assert_allclose(exact, expected, atol=1e-12)


# The surrogates.

TENDING = [name for name in CASES if not name.startswith("fast")]


@pytest.mark.parametrize("name", TENDING)
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_below_a_hundredth_of_the_smallest_gap_the_metric_is_met(name, seed):
    """To 1e-3, with weights and a mask."""
    rng = np.random.default_rng(seed)
    scores, targets = drawn(rng, name)
    where, weights = rng.random(N) < 0.8, rng.integers(1, 3, size=N)
    value, _, exact = all_of(name, scores, targets, 0.99e-4, where, weights)
    np.testing.assert_allclose(value, exact, atol=1e-3)


@pytest.mark.parametrize("name", ["recall", "precision", "ndcg", "mrr"])
def test_where_ties_are_shared_the_limit_holds_with_ties(name, key):
    """Each a random order's mean; 100 draws of four scores for 24 items."""
    rng = rng_of(key)
    for _ in range(20):
        _, targets = drawn(rng, name)
        scores = rng.integers(0, 4, size=N).astype(float)
        value, _, exact = all_of(name, scores, targets, 1e-3)
        np.testing.assert_allclose(value, exact, atol=1e-9)


@one_of_each_form
def test_a_mask_is_dropping(name, key):
    """Values and gradients; what is dropped holds NaN, and gets a gradient of 0."""
    rng = rng_of(key)
    scores, targets = clustered(rng, name)
    where, weights = np.ones(N, bool), rng.random(N) + 0.5
    where[rng.permutation(N)[:7]] = False
    dirty = np.where(where, scores, np.nan)
    value, (slope, *_), exact = all_of(name, dirty, targets, 0.1, where, weights)
    kept = (x[where] for x in (scores, targets))
    value_, (slope_, *_), exact_ = all_of(name, *kept, 0.1, weights=weights[where])
    np.testing.assert_allclose((value, exact), (value_, exact_), rtol=1e-12)
    expected = np.zeros(N)
    expected[where] = slope_
    np.testing.assert_allclose(slope, expected, atol=1e-11)


@pytest.mark.parametrize("name", ["recall", "precision", "ndcg", "mrr"])
def test_a_weight_is_repeating(name, key):
    """Weights 0, 1 and 2, a third each, in the surrogates too."""
    rng = rng_of(key)
    scores, targets = drawn(rng, name)
    counts = rng.permutation(np.repeat([0, 1, 2], N // 3))
    index = np.repeat(np.arange(N), counts)
    value = all_of(name, scores, targets, weights=counts)[0]
    other = all_of(name, scores[index], targets[index])[0]
    np.testing.assert_allclose(value, other, rtol=1e-12)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("blackbox", "fast-64")]
)
def test_gradients_equal_central_differences(name, key):
    """By scores, by temperature and by weights, to 1e-6."""
    rng = rng_of(key)
    data = clustered(rng, name)
    run = functools.partial(all_of, name)
    check_slopes(run, *data, t=0.1, weights=rng.random(N) + 0.5, step=2e-4)


@one_of_each_form
def test_second_derivatives_in_both_modes(name, key):
    """Those of custom rules equal central differences of the gradient."""
    scores, targets = clustered(rng_of(key), name)
    surrogate = CASES[name].surrogate
    product, direction = check_second_derivatives(surrogate, scores, targets, 0.3)
    if name in ("smooth", "recall", "mrr"):
        slope = jax.jit(jax.grad(lambda s: surrogate(s, targets, temperature=0.3)))
        along = lambda s: slope(s) @ direction
        assert error(product, central(along, jnp.asarray(scores), 1e-3)) < 1e-6


def test_temperature_alone_moves_what_theory_says():
    """One positive above all: its rank worsens with temperature; below all: improves.

    Every sigmoid then moves the same way; with more positives nothing is promised.
    """
    scores = np.linspace(0, 1, N)
    temperatures = np.geomspace(1e-3, 10, 12)
    for name, (best, sign) in itertools.product(("smooth", "mrr"), ((-1, 1), (0, -1))):
        targets = np.zeros(N)
        targets[best] = 1
        values = [float(all_of(name, scores, targets, t)[0]) for t in temperatures]
        assert np.all(sign * np.diff(values) <= 1e-15)
        assert abs(values[-1] - values[0]) > 0.01


@each_case
def test_extremes_are_finite_and_float32_stays(name, key):
    """At any temperature; masked out is 0."""
    run = functools.partial(all_of, name)
    check_extremes(run, *drawn(rng_of(key), name), (N,))


@each_case
def test_scores_that_are_not_finite_are_flagged(name, key):
    """By NaN, unless they do not count."""
    run = functools.partial(all_of, name)
    check_unsound_scores(run, *clustered(rng_of(key), name), (N,))


@pytest.mark.parametrize("name", ["smooth", "fast-8", "soft-rank", "ndcg"])
def test_a_single_item(name):
    """Of its own shape."""
    for target in (0, 1):
        value, slopes, exact = all_of(name, [0.3], [target])
        np.testing.assert_allclose((value, exact), target, rtol=1e-12)
        assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize("name", ["smooth", "ndcg", "area"])
def test_rows_are_averaged(name, key):
    """Over leading axes; one without positives is 0, one masked out does not count."""
    rng = rng_of(key)
    rows = [clustered(rng, name) for _ in range(3)]
    scores, targets = map(np.stack, zip(*rows, strict=True))
    targets[1] = 0
    each = [all_of(name, s, y) for s, y in rows[::2]]
    where = np.any(targets > 0, axis=1, keepdims=True) & (scores >= 0)
    for mask, counted in ((None, 3), (where, 2)):
        value, (slope, *_), exact = all_of(name, scores, targets, where=mask)
        np.testing.assert_allclose(value, sum(x[0] for x in each) / counted, rtol=1e-12)
        np.testing.assert_allclose(exact, sum(x[2] for x in each) / counted, rtol=1e-12)
        slopes = [each[0][1][0], np.zeros(N), each[1][1][0]]
        np.testing.assert_allclose(slope, np.stack(slopes) / counted, atol=1e-12)


@one_of_each_form
def test_vmap_equals_a_loop(name, key):
    """Over scores and targets, with gradients."""
    rng, surrogate = rng_of(key), CASES[name].surrogate
    rows = [clustered(rng, name) for _ in range(3)]
    value = lambda s, y: surrogate(s, y, temperature=0.1)
    batched = jax.jit(jax.vmap(jax.value_and_grad(value)))
    values, slopes = batched(
        *(jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    )
    for row, found, slope in zip(rows, values, slopes, strict=True):
        expected, (expected_slope, *_), _ = all_of(name, *row)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_allclose(slope, expected_slope, atol=1e-12)


@pytest.mark.parametrize("name", ["smooth", "area"])
def test_items_may_lie_along_any_axis(name, key):
    """Labels in columns; a mask [n] counts for each."""
    rng = rng_of(key)
    scores, targets = map(
        np.stack, zip(*(clustered(rng, name) for _ in range(3)), strict=True)
    )
    where = rng.random(N) < 0.7
    across = dataclasses.replace(CASES[name].surrogate, axis=0)
    value = jax.jit(across)(scores.T, targets.T, temperature=0.1, where=where)
    expected = all_of(name, scores, targets, where=np.stack([where] * 3))[0]
    np.testing.assert_allclose(value, expected, rtol=1e-12)


# Average precision.


def test_smooth_ap_equals_the_paper_on_all_pairs(key, monkeypatch):
    """Three blocks by three, against an array of all pairs at 5,000; 7% positives."""
    monkeypatch.setattr(pairs, "COLUMNS", 2_048)
    rng, n = rng_of(key), 5_000
    y = (rng.random(n) < 0.07).astype(float)
    s, w = jnp.asarray(rng.normal(size=n) + y), jnp.asarray(rng.random(n))

    def paper(s, w):
        g = jax.nn.sigmoid((s[None, :] - s[y > 0][:, None]) / 0.05)
        own = g.at[np.arange(len(g)), np.flatnonzero(y)].set(1)
        precisions = own @ (w * y) / (own @ w)
        return jnp.sum((w * y)[y > 0] * precisions) / jnp.sum(w * y)

    ours = lambda s, w: sg.SmoothAP()(s, y, temperature=0.05, weights=w)
    both = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))(s, w)
    (value, slopes), (expected, expected_slopes) = both(ours), both(paper)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert error(slopes, expected_slopes) < 1e-6


AP = [sg.SmoothAP(), sg.FastAP(1000), sg.BlackboxAP(), sg.SoftRankAP()]
AP += [sg.NDCG(10)]


@pytest.mark.parametrize(
    "shape",
    [(100_000,), (25_000, 4), pytest.param((100, 1_000), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("surrogate", AP, ids=lambda s: type(s).__name__)
def test_memory_is_linear_at_100_000_scores(surrogate, shape):
    """Value and gradient: under 200 MiB beside the input, by the compiler's count."""
    value = lambda s, y: surrogate(s, y, temperature=0.1)
    s = jax.ShapeDtypeStruct(shape, jnp.float64)
    compiled = jax.jit(jax.value_and_grad(value)).lower(s, s).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < needed < 200 * 2**20


def test_the_error_of_fast_ap_falls_as_one_over_bins(key):
    """Slope -1 in logarithms over 10 to 640 bins of 20,000 scores, and then to 0."""
    rng = rng_of(key)
    y = rng.integers(0, 2, size=20_000) * (rng.random(20_000) < 0.2)
    s = rng.normal(size=20_000) + 1.5 * y
    exact = average_precision(s, y, np.ones_like(s))
    bins = np.array([10, 40, 160, 640])
    binned = eqx.filter_jit(lambda surrogate: surrogate(s, y, temperature=1.0))
    errors = [abs(float(binned(sg.FastAP(int(b)))) - exact) for b in bins]
    slope, _ = np.polyfit(np.log(bins), np.log(errors), 1)
    assert -1.2 < slope < -0.8
    assert max(errors * bins) < 2.5


def test_fast_ap_is_exact_where_scores_are_two_bins_apart(key):
    """23 gaps are 63 bins."""
    scores = 0.1 * rng_of(key).permutation(N)
    targets = drawn(rng_of(key))[1]
    value, (slope, *_), exact = all_of("fast-64", scores, targets)
    np.testing.assert_allclose(value, exact, rtol=1e-12)
    np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_fast_ap_is_the_papers_sum_for_scores_at_centres(key):
    """``sum_b h+_b H+_b / H_b / positives``, written with NumPy's histogram."""
    rng = rng_of(key)
    scores, targets = rng.integers(0, 9, size=200) / 8, rng.integers(0, 2, size=200)
    edges = np.arange(10) / 8 - 1 / 16
    h = np.histogram(scores, edges)[0][::-1]
    h_pos = np.histogram(scores[targets > 0], edges)[0][::-1]
    paper = np.sum(h_pos * np.cumsum(h_pos) / np.cumsum(h)) / targets.sum()
    fast = eqx.filter_jit(sg.FastAP(9, low=0.0, high=1.0))
    value = fast(scores, targets, temperature=1.0)
    np.testing.assert_allclose(value, paper, rtol=1e-12)
    # A range that is given clips.
    wild = np.where(scores == 1, 7.0, scores)
    value = fast(wild, targets, temperature=1.0)
    np.testing.assert_allclose(value, paper, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_blackbox_ap_has_the_gradient_of_the_papers_interpolation(key, weighted):
    """Vlastelica et al.: all rankings of six items are tried; lambda 0.3 to 30.

    ``f_t(s) = min_r [c(s, r) / t + f(r)] - c(s, r(s)) / t`` with ``c(s, r) = sum_i w_i
    s_i r_i`` and the loss f linearised at the ranks r(s0): our gradient at s0 is that
    of ``-f_t``, f_t is at most f, equal where no rank changes, continuous and affine.
    """
    n, rng = 6, rng_of(key)
    w = rng.random(n) + 0.5 if weighted else np.ones(n)
    orders = np.array(list(itertools.permutations(range(n))))
    all_ranks = np.empty(orders.shape)
    np.put_along_axis(all_ranks, orders, np.cumsum(w[orders], axis=1), axis=1)
    surrogate = sg.BlackboxAP()
    moved = 0
    slopes = jax.jit(jax.value_and_grad(
        lambda s, y, t: surrogate(s, y, temperature=t, weights=w)
    ))  # fmt: skip
    for t in (0.3, 1.0, 3.0, 10.0, 30.0):
        s0, y = rng.normal(size=n), rng.permutation([0, 0, 0, 1, 1, rng.integers(2)])
        ranks = all_ranks[np.argmin(all_ranks @ (w * s0))]
        found = np.array([(w * y)[s0 >= s].sum() for s in s0])
        loss = 1 - np.sum(w * y * found / ranks) / (w @ y)
        slope = w * y * found / ranks**2 / (w @ y)
        f = lambda r, ranks=ranks, loss=loss, slope=slope: loss + (r - ranks) @ slope

        def interpolation(s, t=t, f=f):
            costs = all_ranks @ (w * s)
            return np.min(costs / t + f(all_ranks)) - np.min(costs) / t

        value, gradient = slopes(s0, y, t)
        np.testing.assert_allclose(value, 1 - loss, rtol=1e-12)
        expected = -central(
            lambda s: interpolation(np.asarray(s)), jnp.asarray(s0), 1e-7
        )
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        assert interpolation(s0) <= loss + 1e-12
        still = np.all(np.asarray(gradient) == 0)
        assert still == np.isclose(interpolation(s0), loss, atol=1e-12)
        moved += not still
    assert moved > 0


def test_blackbox_ap_is_as_good_in_float32(key):
    """100,000 scores: most perturbations are below the rounding of the scores."""
    rng, n = rng_of(key), 100_000
    y = (rng.random(n) < 0.1).astype(float)
    s = (rng.normal(size=n) + y).astype(np.float32)
    slope = jax.jit(jax.grad(lambda s: sg.BlackboxAP()(s, y, temperature=100.0)))
    single, double = (np.asarray(slope(s.astype(x))) for x in (np.float32, float))
    assert single.dtype == np.float32
    assert error(single, double) < 1e-3


# Soft ranks.


soft_ranks = jax.jit(lambda values, t: sg.soft_rank(values, temperature=t))


@pytest.mark.parametrize("n", [1, 2, 60])
@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_blocks_are_those_of_isotonic_regression(n, seed):
    """Scikit-learn's, with weights, to 1e-8."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n) + rng.choice([-0.1, 0.0, 0.1]) * np.arange(n)
    w = rng.random(n) + 0.1
    block = np.asarray(jax.jit(pool)(y, w)[0])
    means = (np.bincount(block, w * y) / np.bincount(block, w))[block]
    isotonic = IsotonicRegression(increasing=False)
    expected = isotonic.fit_transform(np.arange(n), y, sample_weight=w)
    np.testing.assert_allclose(means, expected, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, temperature=st.sampled_from([0.01, 0.3, 3.0]))
def test_soft_ranks_are_those_of_isotonic_regression(seed, temperature):
    """Values less their regression on the hard ranks, both by scikit-learn, to 1e-8."""
    values = np.random.default_rng(seed).normal(size=60)
    u = np.sort(values)[::-1] / temperature
    hard = np.arange(1, 61)
    isotonic = IsotonicRegression(increasing=False)
    expected = isotonic.fit_transform(hard, u + hard) - u
    soft = np.asarray(soft_ranks(values, temperature))
    np.testing.assert_allclose(soft[np.argsort(-values)], expected, atol=1e-8)


def test_steps_grow_linearly(key):
    """Fewer than 2 n after the sort: each item is pushed, all but one may be merged."""
    for n in (1_000, 10_000, 100_000):
        noise = jax.random.normal(key, (n,))
        up = jnp.arange(n, dtype=float)
        steps = jax.jit(lambda y: pool(y, jnp.ones_like(y))[1])
        counts = [int(steps(y)) for y in (noise, up, -up, noise - 1e-3 * up)]
        assert counts[2] == n
        assert max(counts) == counts[1] == 2 * n - 1


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_soft_ranks_are_the_projection_onto_the_permutahedron(temperature, key):
    """The nearest point has no vertex on its far side; it lies within, by majorisation.

    All 720 vertices of six items.
    """
    values = np.asarray(jax.random.normal(key, (6,)))
    soft = np.asarray(jax.jit(sg.soft_rank)(values, temperature=temperature))
    vertices = np.array(list(itertools.permutations(range(1, 7))))
    assert np.max((vertices - soft) @ (-values / temperature - soft)) < 1e-10
    assert np.all(np.cumsum(np.sort(soft)) >= np.cumsum(np.arange(1, 7)) - 1e-10)
    np.testing.assert_allclose(soft.sum(), 21)


def test_soft_ranks_go_from_hard_to_the_mean(key):
    """Hard, exactly, where the temperature is the smallest gap; ties share."""
    soft = soft_ranks
    values = rng_of(key).permutation(40) / 8
    hard = scipy.stats.rankdata(-values)
    np.testing.assert_array_equal(soft(values, 0.125), hard)
    tied = np.round(values)
    np.testing.assert_allclose(soft(tied, 0.01), scipy.stats.rankdata(-tied))
    np.testing.assert_allclose(soft(values, 1e9), 20.5, atol=1e-7)
    # Towards the mean all the way: projections of a ray onto a set about the mean.
    temperatures = np.geomspace(0.1, 100, 20)
    spread = [np.linalg.norm(soft(values, t) - 20.5) for t in temperatures]
    assert np.all(np.diff(spread) <= 1e-12)


def test_soft_ranks_of_weighted_items_are_those_of_repeated_ones(key):
    """A weight of 0 leaves an item out; large values keep their ranks in float32."""
    rng = rng_of(key)
    values, counts = rng.normal(size=20), rng.integers(0, 4, size=20)
    ranked = jax.jit(sg.soft_rank)
    soft = np.asarray(ranked(values, temperature=0.1, weights=counts))
    index = np.repeat(np.arange(20), counts)
    repeats = ranked(values[index], temperature=0.1)
    np.testing.assert_allclose(soft[index], repeats, rtol=1e-10)
    assert np.all(soft[counts == 0] == 0)
    large = np.float32(1e4) + np.arange(20, dtype=np.float32)
    soft = ranked(large, temperature=1e-3)
    np.testing.assert_array_equal(soft, np.arange(20, 0, -1))
    assert soft.dtype == jnp.float32


def test_jacobian_products_of_soft_ranks(key):
    """Both modes equal a dense Jacobian by central differences."""
    scores = jnp.asarray(clustered(rng_of(key))[0])
    f = jax.jit(lambda s: sg.soft_rank(s, temperature=0.1))
    expected = np.stack(
        [central(lambda s, i=i: f(s)[i], scores, 1e-4) for i in range(6)]
    )
    for mode in (jax.jacfwd, jax.jacrev):
        jacobian = jax.jit(mode(f))(scores)
        np.testing.assert_allclose(jacobian[:6], expected, atol=1e-7)
        np.testing.assert_allclose(jacobian.sum(axis=1), 0, atol=1e-12)


def test_rows_of_soft_ranks_are_ranked_one_by_one(key):
    """Leading axes under `vmap`, with derivatives, equal a loop."""
    values = jax.random.normal(key, (2, 3, 8))
    f = lambda v: jnp.sum(sg.soft_rank(v, temperature=0.3) ** 3)
    batched = jax.jit(jax.vmap(jax.value_and_grad(f)))(values)
    one = jax.jit(jax.value_and_grad(f))
    for i in range(2):
        rows = [one(row) for row in values[i]]
        np.testing.assert_allclose(batched[0][i], sum(x for x, _ in rows), rtol=1e-12)
        np.testing.assert_allclose(batched[1][i], np.stack([x for _, x in rows]))


def test_a_batch_of_soft_ranks_is_one_scan_over_its_rows():
    """`jax.lax.map`: no array holds the loop's state of several rows."""
    rows = jax.ShapeDtypeStruct((3, 7, 8), float)
    jaxpr = jax.make_jaxpr(lambda v: sg.soft_rank(v, temperature=0.3))(rows)
    scans = [x for x in jaxpr.eqns if x.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [21]
    of_a_row = str(scans[0].params["jaxpr"])
    assert "[21" not in of_a_row
    assert str(jaxpr).count("while[") == of_a_row.count("while[") == 1


# The top k.


@settings(deadline=None, max_examples=30)
@given(seed=seeds, mass=st.integers(1, 23))
def test_memberships_sum_to_k_at_the_threshold_that_does_it(seed, mass):
    """The root by Brent's method, with weights."""
    rng = np.random.default_rng(seed)
    u, w = rng.normal(size=N) * 10.0 ** rng.integers(-2, 4), rng.random(N) + 0.5
    mass = float(mass) * w.sum() / N
    p = jax.jit(memberships)(u, w, jnp.asarray(mass))
    np.testing.assert_allclose(w @ p, mass, rtol=1e-12)
    sigmoid = lambda c: 1 / (1 + np.exp(np.clip(c - u, -700, 700)))
    ends = u.min() - 40, u.max() + 40
    c = scipy.optimize.brentq(lambda c: w @ sigmoid(c) - mass, *ends, xtol=1e-14)
    np.testing.assert_allclose(p, sigmoid(c), atol=1e-9)


def test_a_larger_temperature_gives_the_top_k_less_score(key):
    """Memberships maximise ``s . p + t entropy(p)``: the first falls with t."""
    s = jax.random.normal(key, (N,))
    best = jax.jit(lambda t: s @ memberships(s / t, jnp.ones(N), jnp.asarray(5.0)))
    totals = [float(best(t)) for t in np.geomspace(1e-4, 100, 20)]
    assert np.all(np.diff(totals) <= 1e-12)
    np.testing.assert_allclose(totals[0], np.sort(s)[-5:].sum(), rtol=1e-6)


# Detection.


def overlap(a, b):
    side = lambda lo, hi: max(0.0, min(a[hi], b[hi]) - max(a[lo], b[lo]))
    both = side(0, 2) * side(1, 3)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return both / (area(a) + area(b) - both)


def greedy(boxes, scores, truths, threshold):
    """One image without padding, one box after the other."""
    hits, taken = np.zeros(len(boxes), bool), set()
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        free = [j for j in range(len(truths)) if j not in taken]
        best = max(free, key=lambda j: overlap(boxes[i], truths[j]), default=None)
        if best is not None and overlap(boxes[i], truths[best]) >= threshold:
            hits[i] = True
            taken.add(best)
    return hits


def test_boxes_are_matched_greedily(key):
    """Crowded images with padding that would match, against loops."""
    rng, images, most = rng_of(key), 40, (9, 5)
    corners = lambda count: rng.uniform(0, 1, size=(images, count, 2))
    box = lambda low: np.concatenate([low, low + rng.uniform(1, 2, low.shape)], axis=2)
    boxes, truths = (box(corners(count)) for count in most)
    scores = rng.normal(size=(images, most[0]))
    where = rng.random((images, most[0])) < 0.7
    where_truths = rng.random((images, most[1])) < 0.7
    match = jax.jit(sg.match_boxes)
    for threshold in (0.1, 0.3, 0.5):
        hits = np.asarray(match(
            boxes, scores, truths,
            threshold=threshold, where=where, where_truths=where_truths,
        ))  # fmt: skip
        assert not hits[~where].any()
        for i in range(images):
            kept = boxes[i][where[i]], scores[i][where[i]], truths[i][where_truths[i]]
            np.testing.assert_array_equal(hits[i][where[i]], greedy(*kept, threshold))
        assert 0 < hits.sum() < where.sum()


def test_several_classes_are_rows():
    """Each with its own number of truths; one that is masked out does not count."""
    scores = jnp.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4], [0.3, 0.2, 0.1]])
    hits = jnp.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])
    exact = eqx.filter_jit(sg.DetectionAP(jnp.array([2, 1, 0])).exact)
    for third, counted in ((True, 3), (False, 2)):
        where = jnp.array([[True] * 3, [True] * 3, [third] * 3])
        value = exact(scores, hits, where=where)
        np.testing.assert_allclose(value, (5 / 6 + 1 / 2) / counted)
    # 7 of 100 truths found: 100 * 0.07 is above 7 in floating point.
    for points, reached in ((101, 8), (11, 1)):
        exact = eqx.filter_jit(sg.DetectionAP(100, points).exact)
        value = exact(jnp.arange(7.0), jnp.ones(7))
        np.testing.assert_allclose(value, reached / points)


@pytest.mark.parametrize("points", [None, 101])
def test_too_few_truths_are_flagged_where_traced(points):
    """More hits than true boxes, and fewer than none."""
    value = jax.jit(lambda n: sg.DetectionAP(n, points).exact([0.2, 0.1], [1, 1]))
    assert [bool(np.isnan(value(n))) for n in (-1, 0, 1, 2)] == [True] * 3 + [False]


# Settings and input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sg.RecallAtK(0), "k must be an integer above 0"),
        (lambda: sg.PrecisionAtK(2.0), "k must be an integer above 0"),
        (lambda: sg.NDCG(0), "k must be an integer above 0"),
        (lambda: sg.FastAP(1), "num_bins must be an integer of at least 2"),
        (lambda: sg.DetectionAP(3, 1), "num_points must be an integer above 1"),
        (lambda: sg.DetectionAP(-1), "num_truths must be 0 or above, got -1"),
        (lambda: sg.DetectionAP(1).exact([0.2, 0.1], [1, 1]), "number of hits in each"),
        (lambda: sg.SmoothAP().exact([np.inf], [1]), "scores must be finite, got inf"),
        (lambda: sg.SmoothAP(axis=1).exact([0.1], [1]), "axis 1 is not among those"),
        (lambda: sg.MRR().exact([0.1], [2]), "targets must be 0 or 1"),
        (lambda: sg.NDCG(1).exact([0.1], [-2.0]), "gains of at least 0, got -2"),
        (lambda: sg.NDCG(1).exact([0.1], [1, 2]), "must have the shape of scores"),
        (lambda: sg.FastAP()([0.1], [1], temperature=0.0), "temperature must be above"),
        (lambda: sg.soft_rank([0.1], temperature=-1.0), "temperature must be above 0"),
        *(
            (
                lambda t=t: sg.SmoothAP()(np.eye(2), np.eye(2), temperature=t),
                "temperature must be above 0",
            )
            for t in (0.0, -1, np.float32(-1), np.nan)
        ),
        (
            lambda: sg.match_boxes(np.ones((1, 2, 4)), np.ones(2), np.ones((1, 1, 4))),
            r"boxes must be \[images, boxes, 4\]",
        ),
        (
            lambda: sg.match_boxes(
                np.ones((1, 2, 4)), np.ones((1, 2)), np.ones((1, 4))
            ),
            r"truths must be \[images, truths, 4\]",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    """With an error that says what to do."""
    with pytest.raises(ValueError, match=message):
        make()


@one_of_each_form
def test_settings_are_data_apart_from_counts(name):
    """Numbers are leaves, counts and axes are not; the sources are cited."""
    surrogate = CASES[name].surrogate
    numbers = jax.tree.leaves(surrogate)
    assert len(numbers) == (1 if name == "area" else 0)
    text = hg.citation(surrogate)
    assert all(f"{{{key}," in text for key in type(surrogate).citations)
    if name == "fast-8":
        assert len(jax.tree.leaves(sg.FastAP(9, low=0.0, high=1.0))) == 2
