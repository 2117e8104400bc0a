"""Surrogates of rankings against the formulas of their papers and brute force."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared.reference_problems import central, error
from hypergrad import surrogates as sg
from hypergrad.surrogates import pairs
from hypergrad.surrogates.retrieval import top_memberships
from tests.surrogates.surrogate_cases import (
    N,
    average_precision,
    make_rng,
    sample,
)

seeds = st.integers(0, 2**32 - 1)


def test_smooth_ap_equals_the_papers_formula_on_all_pairs(key, monkeypatch):
    """Several blocks of rows and columns against an array of all pairs."""
    monkeypatch.setattr(pairs, "COLUMNS", 512)
    rng, n = make_rng(key), 1_500
    y = (rng.random(n) < 0.2).astype(float)
    s, w = jnp.asarray(rng.normal(size=n) + y), jnp.asarray(rng.random(n))

    def paper(s, w):
        g = jax.nn.sigmoid((s[None, :] - s[y > 0][:, None]) / 0.05)
        g = g.at[np.arange(len(g)), np.flatnonzero(y)].set(1)
        precisions = g @ (w * y) / (g @ w)
        return jnp.sum((w * y)[y > 0] * precisions) / jnp.sum(w * y)

    smooth = lambda s, w: sg.SmoothAP()(s, y, temperature=0.05, weights=w)
    run = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))(s, w)
    (value, gradients), (expected, expected_gradients) = run(smooth), run(paper)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert error(gradients, expected_gradients) < 1e-6


@pytest.mark.parametrize(
    ("surrogate", "shape", "megabytes"),
    [
        (sg.SmoothAP(), (100_000,), 200),
        (sg.SmoothAP(), (100, 1_000), 200),
        (sg.FastAP(1000), (25_000, 4), 200),
        (sg.BlackboxAP(), (100_000,), 200),
        (sg.SoftRankAP(), (100_000,), 200),
        (sg.NDCG(200), (100_000,), 100),
        (sg.AUC(), (100_000,), 20),
        (sg.SquaredHingeAUC(), (100_000,), 20),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, sg.Surrogate) else str(x),
)
def test_memory_is_linear_in_the_number_of_scores(surrogate, shape, megabytes):
    """The compiler's count for value and gradient; 100,000 scores are 0.8 MB."""
    value = lambda s, y: surrogate(s, y, temperature=0.1)
    s = jax.ShapeDtypeStruct(shape, jnp.float64)
    compiled = jax.jit(jax.value_and_grad(value)).lower(s, s).compile()
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < megabytes * 1e6


# FastAP.


def test_the_error_of_fast_ap_falls_as_one_over_the_number_of_bins(key):
    rng = make_rng(key)
    y = rng.integers(0, 2, size=20_000) * (rng.random(20_000) < 0.2)
    s = rng.normal(size=20_000) + 1.5 * y
    exact = average_precision(s, y, np.ones_like(s))
    num_bins = np.array([10, 80, 640])
    run = eqx.filter_jit(lambda surrogate: surrogate(s, y, temperature=1.0))
    errors = [abs(float(run(sg.FastAP(int(b)))) - exact) for b in num_bins]
    rate, _ = np.polyfit(np.log(num_bins), np.log(errors), 1)
    assert -1.2 < rate < -0.8
    assert max(errors * num_bins) < 2.5


def test_fast_ap_is_exact_if_scores_are_two_bins_apart(key):
    """So that each item counts whole in its own rank; the range is 23 gaps, 63 bins."""
    rng = make_rng(key)
    scores, targets = 0.1 * rng.permutation(N), sample("ranking", rng)[1]
    fast_ap = sg.FastAP(64)
    smooth = lambda s: fast_ap(s, targets, temperature=1.0)
    value, gradient = jax.jit(jax.value_and_grad(smooth))(scores)
    np.testing.assert_allclose(value, fast_ap.exact(scores, targets), rtol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_fast_ap_is_the_papers_sum_for_scores_at_bin_centers(key):
    """``sum_b h+_b H+_b / H_b / positives`` with NumPy's histogram; a range clips."""
    rng = make_rng(key)
    scores, targets = rng.integers(0, 9, size=200) / 8, rng.integers(0, 2, size=200)
    edges = np.arange(10) / 8 - 1 / 16
    h = np.histogram(scores, edges)[0][::-1]
    h_positive = np.histogram(scores[targets > 0], edges)[0][::-1]
    precisions = np.cumsum(h_positive) / np.cumsum(h)
    paper = np.sum(h_positive * precisions) / targets.sum()
    fast_ap = eqx.filter_jit(sg.FastAP(9, low=0.0, high=1.0))
    for s in (scores, np.where(scores == 1, 7.0, scores)):
        value = fast_ap(s, targets, temperature=1.0)
        np.testing.assert_allclose(value, paper, rtol=1e-12)


def test_fast_ap_of_an_empty_range_is_nan():
    """Where ``low`` is above the highest score, which would hide every gradient."""
    scores, targets = -jnp.arange(1.0, 5.0), jnp.array([1, 0, 1, 0])
    smooth = lambda s, low: sg.FastAP(low=low)(s, targets, temperature=1.0)
    run = jax.jit(jax.value_and_grad(smooth))
    value, gradient = run(scores, 0.0)
    assert np.isnan(value) & np.all(np.isnan(gradient))
    value, gradient = run(scores, -5.0)
    assert np.isfinite(value) & np.all(np.isfinite(gradient))


# BlackboxAP.


@pytest.mark.parametrize("weighted", [False, True])
def test_blackbox_ap_has_the_gradient_of_the_papers_interpolation(key, weighted):
    """Vlastelica et al. 2020, with the minimum over all rankings of six items.

    ``f_T(s) = min_r [c(s, r) / T + f(r)] - c(s, r(s)) / T`` with ``c(s, r) = sum_i w_i
    s_i r_i`` and the loss f linearized at r(s0). The gradient is that of ``-f_T``, and
    f_T is at most f, equal if no rank changes.
    """
    n, rng = 6, make_rng(key)
    w = rng.random(n) + 0.5 if weighted else np.ones(n)
    orders = np.array(list(itertools.permutations(range(n))))
    all_ranks = np.empty(orders.shape)
    np.put_along_axis(all_ranks, orders, np.cumsum(w[orders], axis=1), axis=1)
    smooth = lambda s, y, t: sg.BlackboxAP()(s, y, temperature=t, weights=w)
    value_and_grad = jax.jit(jax.value_and_grad(smooth))
    num_moved = 0
    for t in (0.3, 1.0, 3.0, 10.0, 30.0):
        s0, y = rng.normal(size=n), rng.permutation([0, 0, 0, 1, 1, rng.integers(2)])
        ranks = all_ranks[np.argmin(all_ranks @ (w * s0))]
        rank_among_positives = np.array([(w * y)[s0 >= s].sum() for s in s0])
        loss = 1 - np.sum(w * y * rank_among_positives / ranks) / (w @ y)
        slope = w * y * rank_among_positives / ranks**2 / (w @ y)
        f = loss + (all_ranks - ranks) @ slope

        def interpolation(s, t=t, f=f):
            costs = all_ranks @ (w * np.asarray(s)) / t
            return np.min(costs + f) - np.min(costs)

        value, gradient = value_and_grad(s0, y, t)
        np.testing.assert_allclose(value, 1 - loss, rtol=1e-12)
        expected = -central(interpolation, jnp.asarray(s0), 1e-7)
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        assert interpolation(s0) <= loss + 1e-12
        has_moved = bool(np.any(np.asarray(gradient) != 0))
        assert has_moved != np.isclose(interpolation(s0), loss, atol=1e-12)
        num_moved += has_moved
    assert num_moved > 0


def test_blackbox_ap_is_as_accurate_in_float32(key):
    """For 100,000 scores, whose rounding is above most perturbations."""
    rng, n = make_rng(key), 100_000
    y = (rng.random(n) < 0.1).astype(float)
    s = (rng.normal(size=n) + y).astype(np.float32)
    gradient_fn = jax.jit(jax.grad(lambda s: sg.BlackboxAP()(s, y, temperature=100.0)))
    single, double = (gradient_fn(s.astype(dtype)) for dtype in (np.float32, float))
    assert single.dtype == jnp.float32
    assert error(single, double) < 1e-3


# The top k.


@settings(deadline=None, max_examples=30)
@given(seed=seeds, k=st.integers(1, N - 1))
def test_memberships_sum_to_the_mass_at_brents_threshold(seed, k):
    rng = np.random.default_rng(seed)
    u, w = rng.normal(size=N) * 10.0 ** rng.integers(-2, 4), rng.random(N) + 0.5
    mass = k * w.sum() / N
    p = jax.jit(top_memberships)(u, w, mass)
    np.testing.assert_allclose(w @ p, mass, rtol=1e-12)
    sigmoid = lambda c: 1 / (1 + np.exp(np.clip(c - u, -700, 700)))
    bracket = u.min() - 40, u.max() + 40
    c = scipy.optimize.brentq(lambda c: w @ sigmoid(c) - mass, *bracket, xtol=1e-14)
    np.testing.assert_allclose(p, sigmoid(c), atol=1e-9)


# Detection.


def overlap(a, b):
    side = lambda low, high: max(0.0, min(a[high], b[high]) - max(a[low], b[low]))
    intersection = side(0, 2) * side(1, 3)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return intersection / (area(a) + area(b) - intersection)


def match_greedily(boxes, scores, true_boxes, threshold):
    """Returns the matches of one image without padding, one box after the other."""
    is_match, free = np.zeros(len(boxes), bool), set(range(len(true_boxes)))
    for i in np.argsort(-scores):
        overlaps = {j: overlap(boxes[i], true_boxes[j]) for j in sorted(free)}
        best = max(overlaps, key=overlaps.get, default=None)
        if best is not None and overlaps[best] >= threshold:
            is_match[i] = True
            free.remove(best)
    return is_match


def test_boxes_are_matched_greedily_within_their_image(key):
    """In crowded images with padding that would match."""
    rng, num_images, sizes = make_rng(key), 40, (9, 5)
    corners = [rng.uniform(0, 1, size=(num_images, size, 2)) for size in sizes]
    boxes, true_boxes = (
        np.concatenate([low, low + rng.uniform(1, 2, low.shape)], axis=2)
        for low in corners
    )
    scores = rng.normal(size=(num_images, sizes[0]))
    where, where_true = (rng.random((num_images, size)) < 0.7 for size in sizes)
    match = jax.jit(sg.match_boxes)
    for threshold in (0.1, 0.3, 0.5):
        options = {"threshold": threshold, "where": where, "where_true": where_true}
        is_match = np.asarray(match(boxes, scores, true_boxes, **options))
        assert not is_match[~where].any()
        for i in range(num_images):
            image = (
                boxes[i][where[i]],
                scores[i][where[i]],
                true_boxes[i][where_true[i]],
            )
            expected = match_greedily(*image, threshold)
            np.testing.assert_array_equal(is_match[i][where[i]], expected)
        assert 0 < is_match.sum() < where.sum()


@pytest.mark.parametrize("sizes", [(2, 0, 3), (2, 3, 0), (0, 2, 3)])
def test_nothing_matches_if_an_array_is_empty(sizes):
    num_images, num_boxes, num_true = sizes
    shape = num_images, num_boxes
    is_match = sg.match_boxes(
        jnp.zeros((*shape, 4)), jnp.zeros(shape), jnp.zeros((num_images, num_true, 4))
    )
    assert is_match.shape == shape
    assert not is_match.any()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "float32"])
def test_the_best_of_equal_boxes_matches_for_scores_of_any_type(dtype):
    """Also if the lowest number of the type is among the scores."""
    low = 0.0 if dtype == "float32" else np.iinfo(dtype).min
    scores = np.array([[low, 100, 50, 100]], dtype)
    boxes = jnp.ones((1, 4, 4)).at[..., :2].set(0.0)
    is_match = sg.match_boxes(boxes, scores, boxes[:, :1])
    assert is_match.tolist() == [[False, True, False, False]]


def test_detection_ap_is_the_mean_over_classes_with_true_boxes():
    """As in COCO: with or without detections, and no class without true boxes."""
    scores = jnp.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4], [0.3, 0.2, 0.1]])
    is_match = jnp.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]])

    @jax.jit
    def run(num_true, where):
        ap = sg.DetectionAP(num_true)
        smooth = ap(scores, is_match, temperature=0.05, where=where)
        return ap.exact(scores, is_match, where=where), smooth

    for num_true, num_classes in ((0.0, 2), (3.0, 3)):
        for is_detected in (True, False):
            where = jnp.array([[True] * 3, [True] * 3, [is_detected] * 3])
            values = run(jnp.array([2.0, 1.0, num_true]), where)
            np.testing.assert_allclose(values, (5 / 6 + 1 / 2) / num_classes, rtol=1e-6)
    assert np.all(np.isnan(run(jnp.array([2.0, 0.0, 3.0]), where)))
    assert np.all(np.isnan(run(jnp.array([2.0, 1.0, jnp.nan]), where)))


@pytest.mark.parametrize(("num_points", "num_reached"), [(101, 8), (11, 1)])
def test_a_recall_at_a_point_reaches_it(num_points, num_reached):
    """7 of 100 boxes are found, and 100 * 0.07 is above 7 in floating point."""
    exact = eqx.filter_jit(sg.DetectionAP(100, num_points).exact)
    value = exact(jnp.arange(7.0), jnp.ones(7))
    np.testing.assert_allclose(value, num_reached / num_points)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_points", [11, 101])
@pytest.mark.parametrize("n", [10, 30, 10_000])
def test_matches_of_fractional_weight_reach_the_last_recall(n, num_points, dtype):
    """Their sum is below the number of true boxes by rounding."""
    exact = eqx.filter_jit(sg.DetectionAP(0.1 * n, num_points).exact)
    scores, weights = -np.arange(n, dtype=dtype), np.full(n, 0.1, dtype)
    assert exact(scores, np.ones(n), weights=weights) == 1.0


@pytest.mark.parametrize("num_points", [None, 101])
def test_too_few_true_boxes_give_nan_if_traced(num_points):
    exact = jax.jit(lambda n: sg.DetectionAP(n, num_points).exact([0.2, 0.1], [1, 1]))
    assert [bool(np.isnan(exact(n))) for n in (-1, 0, 1, 2)] == [True] * 3 + [False]


def test_matches_are_counted_exactly_in_a_long_row():
    """The rounding error of 500,000 numbers in float32 would hide 50 matches."""
    scores = -np.arange(500_000, dtype=np.float32)
    is_match = np.arange(500_000) < 1050
    exact = lambda n: sg.DetectionAP(n).exact(scores, is_match)
    assert exact(1050.0) == pytest.approx(1)
    assert np.isnan(jax.jit(exact)(1049.0))
    with pytest.raises(ValueError, match="num_true"):
        exact(1049.0)
