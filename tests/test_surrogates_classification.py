"""Surrogates of classification metrics, against scikit-learn, NumPy and theory.

Exact metrics are compared with scikit-learn's on what is left when masked examples are
dropped. One program serves nearly all tests of a surrogate: values, both derivatives
and the exact metric of one shape.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics as skm
from hypothesis import given, settings
from hypothesis import strategies as st

import hypergrad as hg
from hypergrad import surrogates as sg
from hypergrad.validation import floats_to_arrays
from tests.loops import run_loop
from tests.surrogate_cases import (
    N,
    check_extremes,
    check_second_derivatives,
    check_slopes,
    check_unsound_scores,
    read,
    rng_of,
)

SHAPES = {"binary": (N,), "classes": (N, 5), "labels": (N, 3), "masks": (3, N)}


few = settings(deadline=None, max_examples=25)


class Case(NamedTuple):
    """A surrogate, the kind of its input, and its metric by other means."""

    surrogate: Any
    kind: str
    oracle: Callable[..., float]  # (scores, targets, weights), nothing masked


# Oracles. Ties are scikit-learn's: the threshold itself is class 0, argmax the first.


def predicted(scores, targets):
    several = scores.ndim == 2 and targets.ndim == 1
    return scores.argmax(1) if several else (scores > 0).astype(int)


def accuracy(s, y, w):
    return skm.accuracy_score(y, predicted(s, y), sample_weight=w)


def balanced_accuracy(s, y, w):
    present = np.unique(y[w > 0])
    recalls = skm.recall_score(
        y, predicted(s, y), labels=present, average=None, sample_weight=w
    )
    return recalls.mean()


def top_k(k):
    return lambda s, y, w: skm.top_k_accuracy_score(
        y, s, k=k, sample_weight=w, labels=range(5)
    )


def confidence(s):
    return (
        np.abs(s) if s.ndim == 1 else np.diff(np.sort(s, axis=1)[:, -2:], axis=1)[:, 0]
    )


def selective_risk(least):
    def oracle(s, y, w):
        kept = w * (confidence(s) >= least)
        wrong = predicted(s, y) != y
        return (kept * wrong).sum() / kept.sum() if kept.sum() else 0.0

    return oracle


def coverage(least):
    return lambda s, y, w: (w * (confidence(s) >= least)).sum() / w.sum()


def counted(metric, average, **kwargs):
    def oracle(s, y, w):
        several = s.ndim == 2
        labels = {"labels": range(s.shape[1])} if several else {}
        return metric(
            y, predicted(s, y), average=average if several else "binary",
            sample_weight=w, zero_division=0, **labels, **kwargs,
        )  # fmt: skip

    return oracle


def per_image(metric):
    def oracle(s, y, w):
        values = [
            metric(a, b > 0, sample_weight=c, zero_division=0)
            for a, b, c in zip(y, s, w, strict=True)
            if c.sum() > 0
        ]
        return np.mean(values)

    return oracle


def auc(max_fpr):
    def oracle(s, y, w):
        if max_fpr == 1:
            return skm.roc_auc_score(y, s, sample_weight=w)
        standard = skm.roc_auc_score(y, s, sample_weight=w, max_fpr=max_fpr)
        chance = 0.5 * max_fpr**2
        return chance + (2 * standard - 1) * (max_fpr - chance)  # McClish, undone

    return oracle


def calibration_error(num_bins):
    def oracle(s, y, w):
        if s.ndim == 1:
            p, right = 1 / (1 + np.exp(-s)), y
        else:
            e = np.exp(s - s.max(1, keepdims=True))
            p, right = (e / e.sum(1, keepdims=True)).max(1), s.argmax(1) == y
        total = 0.0
        for b in range(num_bins):
            here = (b / num_bins < p) & (p <= (b + 1) / num_bins)
            if w[here].sum() > 0:
                mean = lambda x, here=here: np.average(x[here], weights=w[here])
                total += w[here].sum() / w.sum() * abs(mean(right) - mean(p))
        return total

    return oracle


CASES = {
    "accuracy": Case(sg.Accuracy(), "binary", accuracy),
    "accuracy-classes": Case(sg.Accuracy(), "classes", accuracy),
    "balanced": Case(sg.Accuracy(balanced=True), "binary", balanced_accuracy),
    "balanced-classes": Case(
        sg.Accuracy(balanced=True), "classes", balanced_accuracy
    ),
    "expected": Case(sg.ExpectedAccuracy(), "classes", accuracy),
    "top-2": Case(sg.TopKAccuracy(2), "classes", top_k(2)),
    "top-4": Case(sg.TopKAccuracy(4), "classes", top_k(4)),
    "risk": Case(sg.SelectiveRisk(1.0), "binary", selective_risk(1.0)),
    "risk-classes": Case(sg.SelectiveRisk(1.0), "classes", selective_risk(1.0)),
    "coverage": Case(sg.Coverage(1.0), "binary", coverage(1.0)),
    "coverage-classes": Case(sg.Coverage(1.0), "classes", coverage(1.0)),
    "f2": Case(sg.FBeta(2.0), "binary", counted(skm.fbeta_score, "binary", beta=2.0)),
    "f1-macro": Case(sg.FBeta(), "classes", counted(skm.f1_score, "macro")),
    "f1-micro": Case(
        sg.FBeta(average="micro"), "classes", counted(skm.f1_score, "micro")
    ),
    "f1-labels": Case(sg.FBeta(), "labels", counted(skm.f1_score, "macro")),
    "f2-labels": Case(
        sg.FBeta(2.0, average="micro"), "labels",
        counted(skm.fbeta_score, "micro", beta=2.0),
    ),
    "precision": Case(
        sg.Precision(), "classes", counted(skm.precision_score, "macro")
    ),
    "recall": Case(sg.Recall(), "labels", counted(skm.recall_score, "macro")),
    "dice": Case(sg.Dice(), "masks", per_image(skm.f1_score)),
    "iou": Case(sg.IoU(), "masks", per_image(skm.jaccard_score)),
    "auc": Case(sg.AUC(), "binary", auc(1)),
    "partial-auc": Case(sg.AUC(0.3), "binary", auc(0.3)),
    "hinge": Case(sg.SquaredHingeAUC(), "binary", auc(1)),
    "calibration": Case(
        sg.CalibrationError(4), "binary", calibration_error(4)
    ),
    "calibration-classes": Case(
        sg.CalibrationError(4), "classes", calibration_error(4)
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize("name", CASES)
one_of_each_class = pytest.mark.parametrize(
    "name", {type(case.surrogate): name for name, case in CASES.items()}.values()
)
PLAIN = [name for name in CASES if name not in ("auc", "partial-auc")]  # no blocks
SMOOTH = [name for name in CASES if name != "hinge"]  # that tend to the exact one


def all_of(name, scores, targets, temperature=0.5, where=None, weights=None):
    """Value, slopes and exact metric, always by the same program."""
    case = CASES[name]
    scores, targets = jnp.asarray(scores), jnp.asarray(targets)
    shape = scores.shape if case.kind == "masks" else scores.shape[:1]
    where = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    weights = jnp.ones(shape) if weights is None else jnp.asarray(weights)
    return read(
        floats_to_arrays(case.surrogate), scores, targets,
        jnp.asarray(temperature, scores.dtype), where, weights.astype(scores.dtype),
    )  # fmt: skip


def axes_of(kind):
    """The shape of masks and weights."""
    return SHAPES[kind] if kind == "masks" else (N,)


def drawn(kind, rng, ties=False):
    """Scores and targets; among the first two examples are both classes."""
    shape = SHAPES[kind]
    scores = 2 * rng.normal(size=shape)
    if ties:
        scores = np.round(scores)
    if kind == "classes":
        targets = rng.integers(0, 5, size=N)
        targets[:2] = 0, 1
    else:
        targets = rng.integers(0, 2, size=shape)
        targets[..., :2] = 0, 1
        if kind == "labels":
            targets = rng.integers(0, 2, size=shape)
    return scores, targets


SPACE = 3 / 32  # no multiple of it, or of its half, is 1 or a temperature below


def spaced(kind, rng):
    """The same, with all scores SPACE apart and SPACE / 2 from 0."""
    scores, targets = drawn(kind, rng)
    order = scores.ravel().argsort().argsort().reshape(scores.shape)
    return SPACE * (order - scores.size / 2 + 0.5), targets


seeds = st.integers(0, 2**32 - 1)


# The exact metrics.


@each_case
@settings(deadline=None, max_examples=15)
@given(seed=seeds, ties=st.booleans(), masked=st.booleans())
def test_exact_metrics_equal_other_implementations(name, seed, ties, masked):
    """To 1e-6: ties, weights (zeros too), and masks as if the examples were dropped."""
    rng, case = np.random.default_rng(seed), CASES[name]
    scores, targets = drawn(case.kind, rng, ties)
    axes = scores.shape if case.kind == "masks" else scores.shape[:1]
    weights = rng.exponential(size=axes) * (rng.random(axes) < 0.8)
    where = rng.random(axes) < 0.6 if masked else np.ones(axes, bool)
    weights[..., :2], where[..., :2] = 1.0, True
    dirty = np.where(_wide(where, scores), scores, np.nan)
    wrong = np.where(_wide(where, targets), targets, -1)
    exact = all_of(name, dirty, wrong, where=where, weights=weights)[2]
    if case.kind == "masks":
        kept = scores, targets, np.where(where, weights, 0)
    else:
        kept = scores[where], targets[where], weights[where]
    np.testing.assert_allclose(exact, case.oracle(*kept), atol=1e-6)


def _wide(where, like):
    return np.broadcast_to(
        where.reshape(where.shape + (1,) * (like.ndim - where.ndim)), like.shape
    )


@each_case
def test_a_mask_is_dropping_and_a_weight_is_repeating(name, key):
    """Values and gradients; what is dropped holds NaN, and gets a gradient of 0."""
    rng, case = rng_of(key), CASES[name]
    scores, targets = drawn(case.kind, rng)
    axis = 1 if case.kind == "masks" else 0
    # Half of the examples kept is each of these twice.
    keep = np.sort(rng.permutation(N)[: N // 2])
    twice = np.repeat(keep, 2)
    mask = np.isin(np.arange(N), keep)
    mask = np.broadcast_to(mask, (3, N)) if axis else mask
    dirty = np.where(_wide(mask, scores), scores, np.nan)
    value, (slope, *_), exact = all_of(name, dirty, targets, where=mask)
    take = lambda x, index: np.take(np.asarray(x), index, axis)
    value_, (slope_, *_), exact_ = all_of(
        name, take(scores, twice), take(targets, twice)
    )
    np.testing.assert_allclose((value, exact), (value_, exact_), rtol=1e-12)
    expected = np.zeros_like(scores)
    halves = take(slope_, np.arange(0, N, 2)) + take(slope_, np.arange(1, N, 2))
    expected[(slice(None), keep) if axis else keep] = halves
    np.testing.assert_allclose(slope, expected, atol=1e-12)
    # Weights 0, 1 and 2, a third each.
    counts = rng.permutation(np.repeat([0, 1, 2], N // 3))
    weights = np.broadcast_to(counts, (3, N)) if axis else counts
    repeated = np.repeat(np.arange(N), counts)
    one = all_of(name, scores, targets, weights=weights)
    other = all_of(name, take(scores, repeated), take(targets, repeated))
    np.testing.assert_allclose((one[0], one[2]), (other[0], other[2]), rtol=1e-12)


# The surrogates.


@pytest.mark.parametrize("name", SMOOTH)
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_below_a_hundredth_of_the_smallest_gap_the_metric_is_met(name, seed):
    """To 1e-3; gaps between scores, to thresholds, and to the edges of bins."""
    rng, case = np.random.default_rng(seed), CASES[name]
    scores, targets = spaced(case.kind, rng)
    gap = SPACE / 2
    if name.startswith("calibration"):
        logits = scores
        if case.kind == "classes":
            below = np.sort(scores, axis=1) - scores.max(1, keepdims=True)
            logits = -np.log(np.exp(below[:, :-1]).sum(1))
        edges = np.log(np.arange(1, 4) / np.arange(3, 0, -1))
        gap = min(gap, np.abs(logits[:, None] - edges).min())
    if name.startswith(("risk", "coverage")):
        gap = min(gap, np.abs(confidence(scores) - 1).min())
    value, _, exact = all_of(name, scores, targets, temperature=0.99 * gap / 100)
    np.testing.assert_allclose(value, exact, atol=1e-3)


RIGHT = [
    *("accuracy", "accuracy-classes", "balanced", "expected", "top-2", "f2"),
    *("f1-micro", "f1-labels", "f2-labels", "recall", "dice", "iou"),
    *("auc", "partial-auc"),
]


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_traced_temperature_that_is_not_above_zero_is_flagged(temperature):
    """It has no value to refuse while it is traced; the result is NaN."""
    f1, scores, targets = sg.FBeta(), np.array([0.3, -0.2]), np.array([1, 0])
    value = jax.jit(lambda t: f1(scores, targets, temperature=t))
    assert np.isnan(value(temperature))
    assert np.isfinite(value(0.5))


@pytest.mark.parametrize("name", RIGHT)
def test_where_all_are_right_the_surrogate_falls_as_temperature_rises(name, key):
    """From 1 (the partial area: from its range) towards chance."""
    rng, case = rng_of(key), CASES[name]
    scores, targets = drawn(case.kind, rng)
    scores = np.abs(scores) + 0.1
    if case.kind == "classes":
        scores = np.where(np.eye(5, dtype=bool)[targets], scores + 9, scores)
    else:
        scores = np.where(targets > 0, scores, -scores)
    temperatures = np.geomspace(0.02, 20, 15)
    values = np.array([all_of(name, scores, targets, t)[0] for t in temperatures])
    exact = all_of(name, scores, targets)[2]
    assert np.all(np.diff(values) <= 1e-15)
    assert values[-1] < values[0] - 0.1 * exact
    np.testing.assert_allclose(values[0], exact, atol=0.02)


@pytest.mark.parametrize("name", ["accuracy", "accuracy-classes", "top-2", "auc"])
def test_the_gap_is_bounded_by_the_sigmoids_tails(name, key):
    """``mean sigmoid(-|d| / T)``, which falls with T; here by NumPy."""
    rng, case = rng_of(key), CASES[name]
    scores, targets = drawn(case.kind, rng)
    if name == "auc":
        d = scores[targets == 1][:, None] - scores[targets == 0][None, :]
    elif case.kind == "binary":
        d = scores
    else:
        rest = np.where(np.eye(5, dtype=bool)[targets], -np.inf, scores)
        k = 2 if name == "top-2" else 1
        d = scores[np.arange(N), targets] - np.sort(rest, axis=1)[:, -k]
    for t in (0.03, 0.3, 3.0):
        value, _, exact = all_of(name, scores, targets, t)
        tails = np.mean(1 / (1 + np.exp(np.abs(d) / t)))
        assert abs(value - exact) <= tails + 1e-12


@each_case
def test_gradients_equal_central_differences(name, key):
    """By scores, by temperature and by weights, to 1e-6, away from ties."""
    rng, case = rng_of(key), CASES[name]
    scores, targets = spaced(case.kind, rng)
    weights = rng.random(axes_of(case.kind)) + 0.5
    run = functools.partial(all_of, name)
    check_slopes(run, scores, targets, t=0.7, weights=weights, step=1e-3)


@pytest.mark.parametrize(
    "name", ["auc", *(pytest.param(x, marks=pytest.mark.slow) for x in PLAIN)]
)
def test_second_derivatives_in_both_modes(name, key):
    case = CASES[name]
    data = spaced(case.kind, rng_of(key))
    check_second_derivatives(case.surrogate, *data, 0.7)


@each_case
def test_extremes_are_finite_and_float32_stays(name, key):
    """Large scores, one class, one example, none, all tied, nothing predicted."""
    kind, run = CASES[name].kind, functools.partial(all_of, name)
    check_extremes(run, *drawn(kind, rng_of(key)), axes_of(kind))


@each_case
def test_scores_that_are_not_finite_are_flagged(name, key):
    """By NaN, unless they do not count."""
    kind, run = CASES[name].kind, functools.partial(all_of, name)
    check_unsound_scores(run, *drawn(kind, rng_of(key)), axes_of(kind))


@one_of_each_class
def test_vmap_equals_a_loop(name, key):
    """Over data and temperature."""
    rng, case = rng_of(key), CASES[name]
    batch = [drawn(case.kind, rng) for _ in range(2)]
    scores, targets = (
        jnp.stack([jnp.asarray(x) for x in xs]) for xs in zip(*batch, strict=True)
    )
    temperatures = jnp.array([0.3, 1.0])
    call = lambda s, y, t: (
        case.surrogate(s, y, temperature=t), case.surrogate.exact(s, y)
    )  # fmt: skip
    found = jax.jit(jax.vmap(call))(scores, targets, temperatures)
    for i in range(2):
        one = all_of(name, scores[i], targets[i], temperatures[i])
        np.testing.assert_allclose((found[0][i], found[1][i]), (one[0], one[2]))


def test_half_precision_is_computed_in_float32():
    scores = jnp.linspace(-1, 1, 4097, dtype=jnp.bfloat16)
    value = sg.Accuracy().exact(scores, jnp.ones(4097, int))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, float(jnp.mean(scores > 0)), rtol=1e-6)


def test_settings_are_data():
    """A sweep of beta and threshold is one program."""
    rng = np.random.default_rng(0)
    scores, targets = drawn("binary", rng)
    pairs = jnp.array([[0.0, 0.3], [1.0, 0.3], [2.0, -0.4]])
    score = lambda pair: sg.FBeta(pair[0], threshold=pair[1]).exact(scores, targets)
    for (beta, threshold), found in zip(pairs, jax.vmap(score)(pairs), strict=True):
        expected = skm.fbeta_score(targets, scores > threshold, beta=float(beta))
        np.testing.assert_allclose(found, expected)


# One surrogate at a time.


def test_expected_accuracy_is_below_the_margins_and_equal_for_two_classes(key):
    rng = rng_of(key)
    scores, targets = drawn("classes", rng)
    for t in (0.1, 1.0, 10.0):
        expected = all_of("expected", scores, targets, t)[0]
        assert expected < all_of("accuracy-classes", scores, targets, t)[0]
    scores, targets = scores[:, :2], targets % 2
    pair = [
        surrogate(scores, targets, temperature=0.7)
        for surrogate in (sg.ExpectedAccuracy(), sg.Accuracy())
    ]
    two = sg.Accuracy()(scores[:, 1] - scores[:, 0], targets, temperature=0.7)
    np.testing.assert_allclose(pair, [two, two], rtol=1e-12)


def test_sigmoid_f1_is_the_papers_with_its_sign_mended(key):
    """``S = 1 / (1 + exp(b (s + c)))`` with b = -1/T, c = -threshold; b > 0 fails."""
    rng = rng_of(key)
    scores, targets = drawn("binary", rng)

    def printed(scores, b, c):
        S = 1 / (1 + np.exp(b * (scores + c)))
        tp, fp, fn = (
            (S * targets).sum(),
            (S * (1 - targets)).sum(),
            ((1 - S) * targets).sum(),
        )
        return 2 * tp / (2 * tp + fp + fn)

    f1 = sg.FBeta(threshold=0.3)
    value = lambda scores: f1(scores, targets, temperature=0.5)
    np.testing.assert_allclose(value(scores), printed(scores, -2.0, -0.3), rtol=1e-12)
    better = scores + np.where(targets == 1, 0.5, -0.5)
    assert value(better) > value(scores)
    assert printed(better, 2.0, -0.3) < printed(scores, 2.0, -0.3)


def pairs_of(scores, targets, weights):
    """All differences of a positive and a negative, and their weights."""
    p, q = targets == 1, targets == 0
    both = weights[p][:, None] * weights[q][None, :]
    return scores[p][:, None] - scores[q][None, :], both / both.sum()


@pytest.mark.parametrize("size", [1, 7, 16, 512])
def test_blocks_of_pairs_add_up(size, key):
    """Whatever their side, with a remainder, weights and a mask."""
    rng = rng_of(key)
    scores, weights = rng.normal(size=50), rng.random(50) + 0.1
    targets, where = rng.integers(0, 2, size=50), rng.random(50) < 0.9
    d, both = pairs_of(scores[where], targets[where], weights[where])
    found = sg.AUC(block_size=size)(
        scores, targets, temperature=0.3, where=where, weights=weights
    )
    np.testing.assert_allclose(found, (both / (1 + np.exp(-d / 0.3))).sum(), rtol=1e-12)


@pytest.mark.parametrize("surrogate", [sg.AUC(), sg.AUC(0.1), sg.SquaredHingeAUC()])
def test_memory_is_linear_in_the_examples(surrogate):
    """Value and gradient at 100,000: 15 numbers an example and 4 blocks at most."""
    smooth = lambda s, y: surrogate(s, y, temperature=0.1)
    scores = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    targets = jax.ShapeDtypeStruct((100_000,), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(smooth)).lower(scores, targets).compile()
    used = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < used < 4 * (15 * 100_000 + 4 * 512**2)


@few
@given(seed=seeds, temperature=st.floats(1e-3, 1e3), ties=st.booleans())
def test_squared_hinges_bound_the_area(seed, temperature, ties):
    """``1 - AUC <= mean hinge²`` at any temperature; the mean as NumPy has it."""
    rng = np.random.default_rng(seed)
    scores, targets = drawn("binary", rng, ties)
    weights = rng.random(N) + 0.1
    bound, _, exact = all_of("hinge", scores, targets, temperature, weights=weights)
    assert 1 - exact <= 1 - bound + 1e-12
    d, both = pairs_of(scores, targets, weights)
    loss = (both * np.maximum(0, 1 - d / temperature) ** 2).sum()
    np.testing.assert_allclose(1 - bound, loss, rtol=1e-9, atol=1e-12)


def test_sorted_hinges_do_not_cancel(key):
    """Close pairs in two far groups, in float32: sums of squares would lose them."""
    rng = rng_of(key)
    targets = rng.integers(0, 2, size=N)
    targets[:2] = 0, 1
    far = np.where(np.arange(N) < N // 2, -4096.0, 4096.0)
    scores = (far + np.round(rng.normal(size=N), 2)).astype(np.float32)
    scores = np.where((targets == 0) & (far > 0), scores - 8192, scores)
    bound = all_of("hinge", scores.astype(np.float32), targets, 1.0)[0]
    d, both = pairs_of(scores.astype(float), targets, np.ones(N))
    loss = (both * np.maximum(0, 1 - d) ** 2).sum()
    assert 0.01 < loss < 10
    np.testing.assert_allclose(1 - bound, loss, rtol=1e-4)


def population(size=20_000, jump=1 / 3):
    """Confidences spread evenly over (0, 1), and accuracy 0.2 above or below.

    Both targets of each confidence, weighted by their chances: nothing is noise, and
    the calibration error is 0.2, but for what is clipped to a probability.
    """
    p = (np.arange(size) + 0.5) / size
    chance = np.clip(np.where(p < jump, p + 0.2, p - 0.2), 0, 1)
    scores = np.log(p / (1 - p))
    targets = np.repeat([1, 0], size)
    weights = np.concatenate([chance, 1 - chance])
    return np.tile(scores, 2), targets, weights, np.mean(np.abs(chance - p))


def test_calibration_errors_approach_the_truth_as_one_over_the_bins():
    """Soft and hard bins both, and so each other; accuracy jumps within a bin.

    The temperature is a fifth of 4 / num_bins, the narrowest bin in logits.
    """
    scores, targets, weights, truth = population()
    bins = 4 ** np.arange(1, 5)
    errors = {"soft": [], "hard": [], "apart": []}
    for num_bins in bins:
        surrogate = sg.CalibrationError(int(num_bins))
        hard = surrogate.exact(scores, targets, weights=weights)
        soft = surrogate(scores, targets, temperature=0.8 / num_bins, weights=weights)
        errors["soft"].append(abs(soft - truth))
        errors["hard"].append(abs(hard - truth))
        errors["apart"].append(abs(soft - hard))
    slope = lambda e: np.polyfit(np.log(bins), np.log(np.array(e)), 1)[0]
    assert -1.2 < slope(errors["soft"]) < -0.8
    assert -1.2 < slope(errors["hard"]) < -0.8
    assert np.all(np.array(errors["apart"]) * bins < 0.1)


# The temperature that is proposed.

FAMILIES = {
    "normal": lambda rng, y: rng.normal(size=y.size) + rng.uniform(0, 4) * y,
    "cauchy": lambda rng, y: rng.standard_cauchy(size=y.size) + 3 * y,
    "log-normal": lambda rng, y: np.exp(1.5 * rng.normal(size=y.size)) * (2 * y - 1),
    "uniform": lambda rng, y: rng.uniform(0, 1, size=y.size) * (2 * y - 1),
    "separated": lambda rng, y: 10 * (2 * y - 1) + 0.01 * rng.normal(size=y.size),
    "near ties": lambda rng, y: rng.normal(size=y.size) ** 5 + 0.1 * (2 * y - 1),
}
MANY = 300


@eqx.filter_jit
def proposals(scores, targets):
    """For accuracy, AUC and F1: temperature, value, exact, and mean sigmoid' there.

    Where each is differentiated: at the examples, at pairs of opposite classes, and at
    the examples for each of the rarer class.
    """
    opposite = (targets == 1)[:, None] & (targets == 0)[None, :]
    rarer = jnp.minimum(jnp.mean(targets), jnp.mean(1 - targets))
    all_alike = jnp.full(MANY, 1 / MANY)
    pairs = scores[:, None] - scores[None, :]
    rows = []
    for surrogate, temperature, d, mass in (
        (
            sg.Accuracy(),
            sg.temperature_from_scores(scores, threshold=0.0),
            scores,
            all_alike,
        ),
        (
            sg.AUC(),
            sg.temperature_from_scores(scores, targets),
            pairs,
            opposite / opposite.sum(),
        ),
        (
            sg.FBeta(),
            sg.temperature_from_scores(scores, targets, threshold=0.0),
            scores,
            all_alike / (2 * rarer),
        ),
    ):
        share = jax.nn.sigmoid(d / temperature)
        slope = jnp.sum(mass * share * (1 - share))
        value = surrogate(scores, targets, temperature=temperature)
        rows.append([temperature, value, surrogate.exact(scores, targets), slope])
    return jnp.array(rows)


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(seed=seeds, exponent=st.floats(-3, 3), share=st.sampled_from([0.5, 0.2, 0.03]))
def test_the_proposed_temperature_is_near_the_metric_and_not_flat(
    family, seed, exponent, share
):
    """Over six orders of scale; classes separated, overlapping, common and rare.

    Accuracy and AUC are within the gap of 0.05, F1 within three gaps; the mean slope is
    at least half the gap (0.9 of that for pairs, which quantiles stand for).
    """
    rng = np.random.default_rng(seed)
    targets = (rng.random(MANY) < share).astype(int)
    targets[:2] = 0, 1
    scores = 10**exponent * FAMILIES[family](rng, targets)
    found = np.asarray(proposals(scores, targets))
    for (_, value, exact, slope), gap in zip(found, (0.05, 0.055, 0.15), strict=True):
        assert abs(value - exact) <= gap + 1e-9
        assert slope >= 0.9 * 0.025
    assert np.all(found[:, 0] > 0)


@eqx.filter_jit
def proposed(scores, targets, gap):
    """At a threshold and for pairs."""
    at_threshold = sg.temperature_from_scores(scores, threshold=0.0, gap=gap)
    return jnp.stack(
        [at_threshold, sg.temperature_from_scores(scores, targets, gap=gap)]
    )


@few
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_proposals_scale_with_the_scores_and_bear_outliers(seed, scale):
    """A share e of huge scores takes at most e / 2 from the mean that is the gap.

    For pairs, of which a share of nearly 2 e is struck, to a tenth of the gap, since
    quantiles stand for them.
    """
    rng = np.random.default_rng(seed)
    targets = (rng.random(MANY) < 0.5).astype(int)
    targets[:2] = 0, 1
    scores = rng.normal(size=MANY) + targets
    wild = np.where(np.arange(MANY) % 40 == 0, 1e6 * scores, scores)
    propose = lambda scores, gap=0.05: np.asarray(
        proposed(jnp.asarray(scores), targets, jnp.asarray(gap))
    )
    np.testing.assert_allclose(propose(scale * scores), scale * propose(scores))
    (lower, _), (_, lower_pairs) = propose(scores), propose(scores, 0.045)
    (upper, _), (_, upper_pairs) = propose(scores, 0.0635), propose(scores, 0.08)
    struck, struck_pairs = propose(wild)
    assert lower <= struck <= upper
    assert lower_pairs <= struck_pairs <= upper_pairs


def test_a_proposal_is_constant_masked_and_defined_for_ties(key):
    rng = rng_of(key)
    scores, targets = drawn("classes", rng)
    jitted = eqx.filter_jit(sg.temperature_from_scores)
    propose = lambda s, where=None, **kwargs: jitted(
        jnp.asarray(s), where=where, **kwargs
    )
    t = propose(scores)
    value = sg.Accuracy()(scores, scores.argmax(1), temperature=t)
    np.testing.assert_allclose(1 - value, 0.05, rtol=1e-6)
    t = propose(scores, targets=targets)
    judged = sg.Accuracy()(scores, targets, temperature=t)
    assert abs(judged - sg.Accuracy().exact(scores, targets)) <= 0.05
    assert not np.any(jax.grad(lambda s: propose(s, targets=targets))(scores))
    assert propose(np.zeros((N, 5), np.float32)) == 1
    where = np.arange(N) < N // 2
    dirty = np.where(where[:, None], scores, np.nan)
    np.testing.assert_allclose(propose(dirty, where), propose(scores[: N // 2]))
    labels = rng.integers(0, 2, size=(N, 5))
    flat = propose(dirty, where, targets=labels, threshold=0.0)
    rest = scores[: N // 2].ravel(), labels[: N // 2].ravel()
    np.testing.assert_allclose(flat, propose(rest[0], targets=rest[1], threshold=0.0))
    one_class = propose(scores[:, 0], targets=np.ones(N, int), threshold=0.0)
    np.testing.assert_allclose(one_class, propose(scores[:, 0], threshold=0.0))


# Along a run.


def test_the_gap_is_reported_along_a_run():
    """Exact, surrogate and gap at each evaluation, at the temperature of the step."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 2))
    y = (x[:, 0] + 0.5 * rng.normal(size=N) > 0).astype(int)
    predict = lambda w, alpha, batch: batch @ w
    f1, schedule = sg.FBeta(), optax.exponential_decay(0.5, 1, 0.7)

    def inner(w, alpha, batch):
        signs = 2 * batch[1] - 1
        loss = jnp.mean(jax.nn.softplus(-signs * (batch[0] @ w)))
        return loss + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)

    def outer(w, alpha, batch):
        return -f1(batch[0] @ w, batch[1], temperature=batch[2])

    problem = hg.Bilevel(inner, outer, (x, y), (x, y, 0.5))
    trace = run_loop(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.5), jnp.zeros(2), jnp.zeros(2),
        num_steps=3,
        outer_data_fn=lambda step, data: (*data[:2], schedule(step).astype(data[2].dtype)),
        metrics=sg.gap_metrics(
            "f1", f1, predict, x, y, temperature=1.0, schedule=schedule
        )
        | sg.gap_metrics(
            "auc", sg.AUC(), predict, x, y, temperature=sg.temperature_from_scores
        ),
    )  # fmt: skip
    rows = trace.rows()
    np.testing.assert_allclose([-row["f1_surrogate"] for row in rows], trace.value)
    for name, most in (("f1", 1.0), ("auc", 0.055)):
        gaps = [row[f"{name}_surrogate"] - row[name] for row in rows]
        np.testing.assert_allclose([row[f"{name}_gap"] for row in rows], gaps)
        assert 0 < np.abs(gaps).max() <= most
    w = trace.w
    np.testing.assert_allclose(rows[-1]["f1"], skm.f1_score(y, x @ w > 0))
    np.testing.assert_allclose(rows[-1]["auc"], skm.roc_auc_score(y, x @ w))
    assert not np.any(trace.w == 0)


def test_the_gap_is_of_what_is_not_masked(key):
    """A rule of temperature sees the mask and the weights too."""
    scores, targets = drawn("binary", rng_of(key))
    where, weights = np.arange(N) % 3 > 0, np.arange(N) % 4 + 0.5
    dirty = np.where(where, scores, np.nan), np.where(where, targets, -1)
    temperature = functools.partial(sg.temperature_from_scores, threshold=0.0)
    predict = lambda w, alpha, batch: batch * w
    f1 = sg.FBeta()
    readings = sg.gap_metrics(
        "f1", f1, predict, *dirty, temperature=temperature, where=where,
        weights=weights,
    )  # fmt: skip
    kept = scores[where], targets[where]
    t = temperature(*kept, weights=weights[where])
    smooth = f1(*kept, temperature=t, weights=weights[where])
    found = readings["f1_surrogate"](jnp.ones(()), None, key)
    np.testing.assert_allclose(found, smooth, rtol=1e-12)


def test_a_run_with_scores_that_are_nan_stops(key):
    """No longer a perfect model with a gradient of 0, and trusted."""
    scores, targets = drawn("binary", rng_of(key))
    auc = sg.AUC()

    def inner(w, alpha, batch):
        return jnp.sum((w - alpha) ** 2)

    def outer(w, alpha, batch):
        return -auc(batch[0] + jnp.log(w), batch[1], temperature=0.5)

    problem = hg.Bilevel(inner, outer, outer_data=(jnp.asarray(scores), targets))
    solver = hg.ClosedForm(lambda alpha, batch: alpha)
    trace = hg.minimize(
        problem, hg.Implicit(solver), optax.sgd(1.0), jnp.ones(()), -jnp.ones(()),
        num_steps=3,
    )  # fmt: skip
    assert trace.status == "stopped: the outer value is not finite"
    assert not trace.stats["trusted"][0]


# Bad input.

S, Y = np.linspace(-1, 1, 4), np.array([0, 1, 0, 1])
C = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: a(S, Y[:, None]), ValueError, r"\(4, 1\).*targets\[\.\.\., 0\]"),
        (lambda a: a(S[:, None], Y), ValueError, r"scores.*2 classes.*\[n\]"),
        (lambda a: sg.AUC().exact(S[:, None], Y), ValueError, r"scores\[:, 0\]"),
        (lambda a: a(Y, Y), TypeError, r"scores is int64.*no derivative"),
        (lambda a: a(np.zeros(0), Y), ValueError, r"scores.*one example"),
        (lambda a: a(S, 2 * Y - 1), ValueError, r"targets must be 0 or 1.*targets > 0"),
        (lambda a: a(S, Y + 0.5), ValueError, r"targets must be 0 or 1, got 0\.5"),
        (lambda a: a(C, Y + 0.0), TypeError, r"targets.*integer.*astype\(int\)"),
        (lambda a: a(C, C), ValueError, r"targets.*argmax\(1\)"),
        (lambda a: a(C, Y[:, None]), ValueError, r"targets\[:, 0\]"),
        (lambda a: a(C, Y + 2), ValueError, r"targets must be in 0\.\.2.*got 3"),
        (lambda a: a(C, Y - 1), ValueError, r"targets must be in 0\.\.2.*got -1"),
        (lambda a: a(S, Y, where=Y), TypeError, r"where.*boolean.*where != 0"),
        (lambda a: a(S, Y, where=Y[:2] > 0), ValueError, r"where.*\(4,\).*\(2,\)"),
        (lambda a: a(S, Y, weights=Y[:2]), ValueError, r"weights.*\(4,\).*\(2,\)"),
        (lambda a: a(S, Y, weights=-Y), ValueError, r"weights must be 0 or above"),
        (lambda a: a(S, "abc"), TypeError, r"targets"),
        (
            lambda a: a(np.where([1, 1, 0, 1], S, np.inf), Y),
            ValueError,
            r"finite, got inf.*where=",
        ),
        (lambda a: sg.Accuracy()(S, Y, temperature=0.0), ValueError, r"temperature.*0"),
        (lambda a: sg.Accuracy()(S, Y, temperature=S), ValueError, r"scalar.*vmap"),
        (lambda a: sg.FBeta().exact(C, C[:, :2]), ValueError, r"targets.*\(4, 3\)"),
        (lambda a: sg.FBeta(average="samples"), ValueError, r"average.*'micro'"),
        (lambda a: sg.FBeta(-1.0), ValueError, r"beta must be 0 or above"),
        (lambda a: sg.AUC(1.5), ValueError, r"max_fpr.*at most 1, got 1\.5"),
        (lambda a: sg.AUC(block_size=0), ValueError, r"block_size must be an integer"),
        (lambda a: sg.TopKAccuracy(3).exact(C, Y), ValueError, r"k must be below.*3"),
        (lambda a: sg.SelectiveRisk(-1.0), ValueError, r"min_confidence"),
        (lambda a: sg.CalibrationError(0), ValueError, r"num_bins"),
        (lambda a: sg.temperature_from_scores(S, gap=0.5), ValueError, r"gap.*0\.1"),
        (
            lambda a: sg.gap_metrics("a", sg.Accuracy(), None, S, Y, temperature=1.0),
            TypeError,
            r"predict must be a function",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call(sg.Accuracy().exact)


def test_bad_shapes_are_refused_before_tracing_too():
    smooth = jax.jit(lambda s, y: sg.Accuracy()(s, y, temperature=1.0))
    with pytest.raises(ValueError, match=r"targets"):
        smooth(S, Y[:, None])


# What is public.


@one_of_each_class
def test_surrogates_cite_their_sources_and_show_an_example(name):
    surrogate = type(CASES[name].surrogate)
    assert surrogate.__name__ in sg.__all__
    assert ">>> " in surrogate.__doc__
    text = hg.citation(surrogate)
    assert surrogate.citations
    assert all(f"{{{key}," in text for key in surrogate.citations)
