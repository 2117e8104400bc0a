"""The promises of all surrogates: oracles, limits, derivatives, masks and extremes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as skm
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from benchmarks.shared.reference_problems import central, error
from hypergrad import surrogates as sg
from tests.surrogates.surrogate_cases import (
    CASES,
    NUM_TRUE,
    RANKINGS,
    SPACING,
    N,
    confidence,
    evaluate,
    expand,
    make_rng,
    sample,
    sample_smooth,
    sample_spaced,
)

cases = lambda *names: pytest.mark.parametrize("name", names)
seeds = st.integers(0, 2**32 - 1)

#: Whose smooth value does not tend to the metric as the temperature falls.
NO_LIMIT = ("hinge", "fast-ap")
#: Whose smooth value for an item of weight 2 differs from two equal items.
NOT_REPEATED = [
    *("smooth-ap", "fast-ap", "blackbox-ap", "soft-rank-ap"),
    *("detection", "detection-101"),
]
#: One case per formula, for tests that compile another program.
FORMULAS = [
    *("balanced-classes", "expected", "top-2", "risk-classes", "f2", "f1-macro"),
    *("dice", "auc", "hinge", "calibration-classes", "smooth-ap", "fast-ap"),
    *("blackbox-ap", "soft-rank-ap", "ndcg", "mrr", "detection"),
]


def assert_close(actual, expected, rtol=1e-12, atol=1e-12):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


# Exact metrics.


@cases(*CASES)
@settings(deadline=None, max_examples=12)
@given(seed=seeds, ties=st.booleans(), masked=st.booleans())
def test_exact_metrics_equal_other_implementations(name, seed, ties, masked):
    """With ties, weights (zeros too), and masks as if the examples were dropped."""
    rng, case = np.random.default_rng(seed), CASES[name]
    scores, targets = sample(case.kind, rng, ties)
    shape = scores.shape if case.kind == "masks" else scores.shape[:1]
    weights = rng.integers(0, 3, size=shape).astype(float)
    if not case.has_integer_weights:
        weights = weights * rng.exponential(size=shape)
    where = rng.random(shape) < 0.6 if masked else np.ones(shape, bool)
    weights[..., :2], where[..., :2] = 1.0, True
    dirty = np.where(expand(where, scores), scores, np.nan)
    wrong = np.where(expand(where, targets), targets, -1)
    exact = evaluate(name, dirty, wrong, where=where, weights=weights).exact
    if case.kind == "masks":
        counted = scores, targets, np.where(where, weights, 0)
    else:
        counted = scores[where], targets[where], weights[where]
    np.testing.assert_allclose(exact, case.oracle(*counted), atol=1e-9)


@cases(*FORMULAS)
def test_a_mask_drops_and_a_weight_repeats(name, key):
    """In values and gradients; masked-out scores are NaN and have the gradient 0."""
    rng, axis = make_rng(key), 1 if CASES[name].kind == "masks" else 0
    scores, targets, *_ = sample_smooth(name, rng)
    take = lambda x, index: np.take(np.asarray(x), index, axis)
    # Half of the examples, each twice if that is the same, for an array of one shape.
    kept = np.sort(rng.permutation(N)[: N // 2])
    index = kept if name in RANKINGS else np.repeat(kept, 2)
    where = np.isin(np.arange(N), kept)
    mask = np.broadcast_to(where, (3, N)) if axis else where
    dirty = np.where(expand(mask, scores), scores, np.nan)
    masked = evaluate(name, dirty, targets, where=mask)
    dropped = evaluate(name, take(scores, index), take(targets, index))
    assert_close((masked.value, masked.exact), (dropped.value, dropped.exact))
    gradient = dropped.gradients[0]
    if name not in RANKINGS:
        pairs = np.arange(0, N, 2)
        gradient = take(gradient, pairs) + take(gradient, pairs + 1)
    expected = np.zeros_like(scores)
    expected[(slice(None), kept) if axis else kept] = gradient
    assert_close(np.asarray(masked.gradients[0]), expected, atol=1e-11)
    if name not in NOT_REPEATED:
        counts = rng.permutation(np.repeat([0, 1, 2], N // 3))
        index = np.repeat(np.arange(N), counts)
        weighted = evaluate(name, scores, targets, weights=counts)
        repeated = evaluate(name, take(scores, index), take(targets, index))
        assert_close((weighted.value, weighted.exact), (repeated.value, repeated.exact))


# Smooth metrics.


@cases(*(name for name in CASES if name not in NO_LIMIT))
@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_the_limit_at_small_temperatures_is_the_metric(name, seed):
    """To 1e-3 below a hundredth of the smallest gap of scores, thresholds and edges."""
    rng, case = np.random.default_rng(seed), CASES[name]
    scores, targets = sample_spaced(case.kind, rng)
    gap = SPACING / 2
    if name.startswith("calibration"):
        logits = scores
        if case.kind == "classes":
            below = np.sort(scores, axis=1) - scores.max(1, keepdims=True)
            logits = -np.log(np.exp(below[:, :-1]).sum(1))
        edges = np.log(np.arange(1, 4) / np.arange(3, 0, -1))
        gap = min(gap, np.abs(logits[:, None] - edges).min())
    if name.startswith(("risk", "coverage")):
        gap = min(gap, np.abs(confidence(scores) - 1).min())
    result = evaluate(name, scores, targets, temperature=0.99 * gap / 100)
    np.testing.assert_allclose(result.value, result.exact, atol=1e-3)


@cases("recall-at-k", "precision-at-k", "ndcg", "mrr")
def test_the_limit_holds_with_ties_where_ties_are_shared(name, key):
    """With three scores for 24 items."""
    rng = make_rng(key)
    for _ in range(20):
        scores = np.round(2 * rng.random(N))
        targets = sample(CASES[name].kind, rng)[1]
        result = evaluate(name, scores, targets, 1e-3)
        np.testing.assert_allclose(result.value, result.exact, atol=1e-9)


# Derivatives.


@cases(*(name for name in CASES if name != "blackbox-ap"))
def test_gradients_equal_central_differences(name, key):
    """Along directions of the scores, the temperature and the weights, off ties."""
    rng = make_rng(key)
    scores, targets, temperature, step = sample_smooth(name, rng)
    weights = rng.random(scores.shape if CASES[name].kind == "masks" else N) + 0.5
    point, unravel = ravel_pytree((scores, temperature, weights))
    block = np.repeat([0, 1, 2], [scores.size, 1, weights.size])
    is_in_block = block == np.array([0, 0, 0, 1, 2, 2])[:, None]
    directions = rng.normal(size=is_in_block.shape) * is_in_block

    def run(x):
        scores, temperature, weights = unravel(x)
        return evaluate(name, scores, targets, temperature, weights=weights)

    value = lambda coefficients: run(point + coefficients @ directions).value
    expected = central(value, jnp.zeros(len(directions)), step)
    actual = directions @ ravel_pytree(run(point).gradients)[0]
    assert float(jnp.linalg.norm(actual[:3])) > 1e-4
    assert error(actual, expected) < 1e-6
    assert error(actual[4:], expected[4:]) < 1e-6


@cases("auc", "smooth-ap", "soft-rank-ap", "recall-at-k")
def test_second_derivatives_agree_in_both_modes(name, key):
    """Reverse over reverse, forward over reverse, and differences of the gradient."""
    scores, targets, *_ = sample_smooth(name, make_rng(key))
    smooth = functools.partial(CASES[name].surrogate, temperature=0.3)
    gradient_fn = jax.grad(lambda s: smooth(s, targets))
    direction = jnp.cos(jnp.arange(N))

    @jax.jit
    def products(s):
        gradient, forward = jax.jvp(gradient_fn, (s,), (direction,))
        reverse = jax.grad(lambda s: jnp.vdot(gradient_fn(s), direction))(s)
        return forward, reverse, jnp.vdot(gradient, direction)

    forward, reverse, _ = products(jnp.asarray(scores))
    assert_close(reverse, forward, rtol=1e-9)
    if name in ("smooth-ap", "recall-at-k"):
        slope = lambda s: products(s)[2]
        assert error(forward, central(slope, jnp.asarray(scores), 1e-3)) < 1e-6


@cases("auc", "smooth-ap", "fast-ap", "soft-rank-ap", "ndcg", "detection")
def test_vmap_equals_a_loop(name, key):
    rng, surrogate = make_rng(key), CASES[name].surrogate
    pairs = [sample_smooth(name, rng)[:2] for _ in range(2)]
    scores, targets = (jnp.asarray(np.stack(x)) for x in zip(*pairs, strict=True))
    temperatures = jnp.array([0.1, 1.0])

    def run(s, y, t):
        smooth = lambda s: surrogate(s, y, temperature=t)
        return *jax.value_and_grad(smooth)(s), surrogate.exact(s, y)

    values, gradients, exact = jax.jit(jax.vmap(run))(scores, targets, temperatures)
    for i, (s, y) in enumerate(pairs):
        single = evaluate(name, s, y, temperatures[i])
        assert_close((values[i], exact[i]), (single.value, single.exact))
        assert_close(gradients[i], single.gradients[0])


# Extremes.

#: Scores, targets, and which of the last axis count.
EXTREMES = {
    "large scores": lambda s, y: (1e4 * s, y, True),
    "all predicted negative": lambda s, y: (-1e4 - np.abs(s), y, True),
    "positives only": lambda s, y: (s, np.ones_like(y), True),
    "negatives only": lambda s, y: (s, np.zeros_like(y), True),
    "all tied": lambda s, y: (np.zeros_like(s), y, True),
    "one example": lambda s, y: (s, y, np.arange(N) == 3),
    "no example": lambda s, y: (s, y, False),
}


@cases(*FORMULAS)
def test_extremes_are_finite_in_float32(name, key):
    """At any temperature; without examples, values and gradients are 0."""
    scores, targets = sample(CASES[name].kind, make_rng(key))
    for extreme, make in EXTREMES.items():
        s, y, where = make(scores.astype(np.float32), targets)
        for temperature in (1e-3, 0.5, 1e4):
            result = evaluate(name, s, y, temperature, where=where)
            chex.assert_type(jax.tree.leaves(result), jnp.float32)
            chex.assert_tree_all_finite(result)
            if extreme == "no example":
                assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))


@cases(*CASES)
def test_scores_that_are_not_finite_give_nan_if_they_count(name, key):
    """With a mask or a weight of 0 they are as if absent."""
    scores, targets = sample(CASES[name].kind, make_rng(key))
    is_bad = np.arange(N) == 1
    if scores.shape[0] != N:
        is_bad = np.broadcast_to(is_bad, scores.shape)
    rest = evaluate(name, scores, targets, where=~is_bad)
    for bad in (np.nan, np.inf, -np.inf):
        dirty = np.where(expand(is_bad, scores), bad, scores)
        all_bad, negatives = np.full_like(scores, bad), np.zeros_like(targets)
        for s, y in ((dirty, targets), (dirty, negatives), (all_bad, targets)):
            result = evaluate(name, s, y)
            assert np.isnan(result.value) & np.isnan(result.exact)
            assert np.any(np.isnan(result.gradients[0]))
        for options in ({"where": ~is_bad}, {"weights": 1.0 - is_bad}):
            result = evaluate(name, dirty, targets, **options)
            assert_close((result.value, result.exact), (rest.value, rest.exact))
            assert_close(result.gradients[0], rest.gradients[0])


@cases("smooth-ap", "fast-ap", "soft-rank-ap")
def test_a_single_item_is_its_target(name):
    for target in (0, 1):
        result = evaluate(name, [0.3], [target])
        assert_close((result.value, result.exact), (float(target),) * 2)
        chex.assert_tree_all_finite(result)


def test_half_precision_is_computed_in_float32():
    value = sg.Accuracy().exact(jnp.ones(4097, jnp.bfloat16), jnp.ones(4097, int))
    assert value.dtype == jnp.float32
    assert value == 1


# Rankings along an axis.


@cases("smooth-ap", "ndcg")
def test_rankings_along_an_axis_are_averaged(name, key):
    """One without positives has the value 0; one that is masked out does not count."""
    rng = make_rng(key)
    rows = [sample_smooth(name, rng)[:2] for _ in range(3)]
    scores, targets = map(np.stack, zip(*rows, strict=True))
    targets[1] = 0
    first, last = (evaluate(name, *row) for row in rows[::2])
    has_positive = np.any(targets > 0, axis=1, keepdims=True)
    for where, num_rows in ((None, 3), (has_positive, 2)):
        result = evaluate(name, scores, targets, where=where)
        assert_close(result.value, (first.value + last.value) / num_rows)
        assert_close(result.exact, (first.exact + last.exact) / num_rows)
        gradients = first.gradients[0], np.zeros(N), last.gradients[0]
        assert_close(result.gradients[0], jnp.stack(gradients) / num_rows)
    # In columns, where a mask [n] applies to each ranking.
    columnwise = dataclasses.replace(CASES[name].surrogate, axis=0)
    where = rng.random(N) < 0.7
    value = jax.jit(columnwise)(scores.T, targets.T, temperature=0.5, where=where)
    expected = evaluate(name, scores, targets, where=np.stack([where] * 3))
    assert_close(value, expected.value)


# The base class, settings and input.


def test_numbers_are_data():
    """Values of beta, threshold and temperature share one program."""
    scores, targets = sample("binary", np.random.default_rng(0))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def exact_f_score(beta, threshold):
        return sg.FBeta(beta, threshold=threshold).exact(scores, targets)

    chex.clear_trace_counter()
    for beta, threshold in ((0.5, 0.3), (2.0, -0.4)):
        expected = skm.fbeta_score(targets, scores > threshold, beta=beta)
        np.testing.assert_allclose(exact_f_score(beta, threshold), expected)
    leaves = {name: jax.tree.leaves(case.surrogate) for name, case in CASES.items()}
    assert sorted(leaves["f2"]) == [0.0, 2.0]
    assert leaves["detection-101"] == [NUM_TRUE]
    assert leaves["ndcg"] == leaves["fast-ap"] == []


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_traced_temperature_that_is_not_positive_gives_nan(temperature):
    smooth = jax.jit(lambda t: sg.FBeta()([0.3, -0.2], [1, 0], temperature=t))
    assert np.isnan(smooth(temperature))
    assert np.isfinite(smooth(0.5))


def test_every_surrogate_has_an_oracle_and_an_example():
    classes = {type(case.surrogate) for case in CASES.values()}
    bases = {sg.Surrogate, sg.RankingSurrogate, sg.CountRatio, sg.AreaRatio}
    exported = {getattr(sg, name) for name in sg.__all__}
    is_surrogate = lambda x: isinstance(x, type) and issubclass(x, sg.Surrogate)
    assert set(filter(is_surrogate, exported)) - bases == classes
    assert all(">>> " in cls.__doc__ for cls in classes)


S, Y = np.linspace(-1, 1, 4), np.array([0, 1, 0, 1])
C = np.arange(12.0).reshape(4, 3)
exact = sg.Accuracy().exact
smooth = sg.Accuracy().__call__
rank = functools.partial(sg.soft_rank, temperature=1.0)
BOXES = np.ones((1, 2, 4)), np.ones((1, 2)), np.ones((1, 1, 4))


BAD_INPUT = [
    (
        lambda: sg.match_boxes(*BOXES, threshold=np.arange(0.5, 1, 0.05)),
        ValueError,
        "threshold must be a single number",
    ),
    (
        lambda: sg.DetectionAP(jnp.array([3.0, 2.0])).exact(jnp.arange(4.0), Y[:4]),
        ValueError,
        "num_true.*row of scores per class",
    ),
    (lambda: exact(S, Y[:, None]), ValueError, "targets"),
    (lambda: exact(Y, Y), TypeError, "scores"),
    (lambda: exact(np.zeros(0), Y), ValueError, "scores"),
    (lambda: exact(np.where(Y > 0, np.inf, S), Y), ValueError, "scores"),
    (lambda: exact(S, 2 * Y - 1), ValueError, "targets"),
    (lambda: exact(S, "abc"), TypeError, "targets"),
    (lambda: exact(C, Y + 0.0), TypeError, "targets"),
    (lambda: exact(C, C), ValueError, "targets"),
    (lambda: exact(C, Y + 2), ValueError, "targets"),
    (lambda: exact(S, Y, where=Y), TypeError, "where"),
    (lambda: exact(S, Y, where=Y[:2] > 0), ValueError, "where"),
    (lambda: exact(S, Y, weights=Y[:2]), ValueError, "weights"),
    (lambda: exact(S, Y, weights=-Y), ValueError, "weights"),
    (lambda: smooth(S, Y, temperature=0.0), ValueError, "temperature"),
    (lambda: smooth(S, Y, temperature=S), ValueError, "temperature"),
    (lambda: sg.FastAP()(S, Y, temperature=0.0), ValueError, "temperature"),
    (lambda: jax.jit(exact)(S, Y[:, None]), ValueError, "targets"),
    (lambda: sg.FBeta(average="samples"), ValueError, "average"),
    (lambda: sg.FBeta(-1.0), ValueError, "beta"),
    (lambda: sg.AUC(1.5), ValueError, "max_fpr"),
    (lambda: sg.AUC(block_size=0), ValueError, "block_size"),
    (lambda: sg.TopKAccuracy(3).exact(C, Y), ValueError, "k must"),
    (lambda: sg.SelectiveRisk(-1.0), ValueError, "min_confidence"),
    (lambda: sg.CalibrationError(0), ValueError, "num_bins"),
    (lambda: sg.FastAP(1), ValueError, "num_bins"),
    (lambda: sg.RecallAtK(0), ValueError, "k must"),
    (lambda: sg.NDCG(1).exact(S, -Y), ValueError, "targets"),
    (lambda: sg.SmoothAP(axis=1).exact(S, Y), ValueError, "axis"),
    (lambda: sg.DetectionAP(3, 1), ValueError, "num_points"),
    (lambda: sg.DetectionAP(-1), ValueError, "num_true"),
    (lambda: sg.DetectionAP(1).exact(S, Y), ValueError, "num_true"),
    (lambda: sg.soft_rank(S, temperature=-1.0), ValueError, "temperature"),
    (lambda: sg.match_boxes(BOXES[0], S, BOXES[2]), ValueError, "boxes"),
    (lambda: sg.match_boxes(*BOXES[:2], S), ValueError, "true_boxes"),
    (lambda: sg.match_boxes(*BOXES, threshold=50), ValueError, "threshold"),
    (lambda: sg.match_boxes(*BOXES, threshold=0.0), ValueError, "threshold"),
    (lambda: sg.FastAP(low=1.0, high=0.0), ValueError, "low must be below high"),
    (lambda: sg.match_boxes(*BOXES, where=Y), ValueError, "where"),
    (lambda: sg.match_boxes(*BOXES, where_true=Y), ValueError, "where_true"),
    (lambda: sg.temperature_from_scores(S, gap=0.5), ValueError, "gap"),
    (
        lambda: sg.gap_metrics("a", sg.MRR(), None, S, Y, temperature=1.0),
        TypeError, "predict",
    ),
    (
        lambda: sg.AUC()(jnp.ones(2, jnp.float32), Y[:2], temperature=1e-50),
        ValueError, "temperature must be above 0",
    ),
    (lambda: rank(Y), TypeError, "values must be floating-point"),
    (lambda: rank(np.where(Y > 0, np.inf, S)), ValueError, "values must be finite"),
    (lambda: rank(S, weights=-Y), ValueError, "weights must be at least 0"),
    (lambda: rank(S, weights=np.ones(3)), ValueError, "weights must have shape"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error_type", "argument"),
    BAD_INPUT,
    ids=[f"{argument} {i}" for i, (_, _, argument) in enumerate(BAD_INPUT)],
)
def test_bad_input_raises_an_error_with_the_argument(call, error_type, argument):
    with pytest.raises(error_type, match=argument):
        call()


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_boxes_match_in_small_types(dtype):
    """The area of 250 by 250 pixels is not a number of float16."""
    box = jnp.array([[[0, 0, 250, 250], [5, 5, 6, 6]]], dtype)
    true_box = jnp.array([[[0, 0, 250, 250]]], dtype)
    matches = hg.surrogates.match_boxes(box, jnp.array([[0.9, 0.8]]), true_box)
    assert matches.tolist() == [[True, False]]
    far = jnp.array([[[100, 100, 110, 110]]], dtype)
    near = jnp.array([[[0, 0, 10, 10]]], dtype)
    assert not hg.surrogates.match_boxes(near, jnp.array([[0.9]]), far).any()


@pytest.mark.parametrize("surrogate", [hg.surrogates.AUC(), hg.surrogates.SmoothAP()])
def test_a_score_near_the_lowest_number_is_the_lowest(surrogate):
    """Such as that of an item that must not be chosen."""
    scores = jnp.array([1.0, jnp.finfo(jnp.float32).min, -1.0], jnp.float32)
    targets = jnp.array([1, 0, 0])
    value = lambda scores: surrogate(scores, targets, temperature=0.05)
    assert value(scores) == pytest.approx(1.0)
    assert np.all(np.isfinite(jax.grad(value)(scores)))


@cases(*RANKINGS)
def test_a_ranking_of_weight_zero_is_absent(name, key):
    """Weights of 0 are a mask, also in the derivatives."""
    rng = make_rng(key)
    rows = [sample_smooth(name, rng)[:2] for _ in range(3)]
    scores, targets = map(np.stack, zip(*rows, strict=True))
    mask = rng.random(scores.shape) < 0.7
    mask[1] = False
    masked = evaluate(name, scores, targets, where=mask)
    weighted = evaluate(name, scores, targets, weights=mask.astype(float))
    assert_close(weighted.value, masked.value)
    assert_close(weighted.exact, masked.exact)
    assert_close(weighted.gradients[:2], masked.gradients[:2])
    assert np.all(np.isfinite(weighted.gradients[2]))


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize(
    "surrogate",
    [sg.IoU(), sg.FBeta(), sg.Dice(), sg.Precision(), sg.SelectiveRisk(0.5),
     sg.SmoothAP(), sg.SoftRankAP(), sg.DetectionAP],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_a_common_factor_of_the_weights_changes_no_gradient(surrogate, factor):
    """Products of the weights would leave the range of float32."""
    scores = jnp.array([2.0, -1.0, 3.0, 0.5, 0.9], jnp.float32)
    targets = jnp.array([1, 0, 1, 0, 1])
    weights = jnp.array([1.0, 0.4, 0.6, 2.7, 1.1], jnp.float32)

    def gradient(factor):
        detection = surrogate is sg.DetectionAP
        scaled = surrogate(4.0 * factor) if detection else surrogate
        value = lambda s: scaled(s, targets, temperature=0.5, weights=factor * weights)
        return jax.jit(jax.grad(value))(scores)

    expected = gradient(jnp.float32(1.0))
    assert np.max(np.abs(expected)) > 1e-3
    np.testing.assert_allclose(
        gradient(jnp.float32(factor)), expected, rtol=1e-4, atol=1e-6
    )


def test_soft_ranks_are_hard_up_to_the_gap_over_the_largest_weight():
    """The smallest gap is 1, and the largest weight 1.9 times the mean."""
    scores, targets = jnp.array([3.0, 2.0, 1.0, 0.0]), jnp.array([0, 1, 0, 1])
    weights = jnp.array([1.9, 1.9, 0.1, 0.1])
    for surrogate in (sg.SoftRankAP(), sg.DetectionAP(2.0)):
        smooth = lambda s, T, f=surrogate: f(s, targets, temperature=T, weights=weights)
        value, gradient = jax.value_and_grad(smooth)(scores, 1 / 1.9)
        exact = surrogate.exact(scores, targets, weights=weights)
        np.testing.assert_allclose(value, exact, rtol=1e-6)
        assert np.max(np.abs(gradient)) < 1e-12
        assert np.max(np.abs(jax.grad(smooth)(scores, 0.99))) > 1e-3


@pytest.mark.parametrize(
    ("surrogate", "shape"),
    [
        (sg.ExpectedAccuracy(), (8, 3)),
        (sg.FBeta(), (8, 3)),
        (sg.SquaredHingeAUC(), (8,)),
    ],
    ids=["ExpectedAccuracy", "FBeta", "SquaredHingeAUC"],
)
def test_a_large_common_shift_of_the_scores_loses_no_digits(surrogate, shape):
    """The differences of the shifted scores are the same numbers."""
    scores = jax.random.randint(jax.random.key(0), shape, 0, 20) / 1024
    scores = scores.astype(jnp.float32)
    targets = jnp.arange(8) % (shape[1] if len(shape) == 2 else 2)
    gradient = jax.jit(
        jax.grad(lambda s: surrogate(s, targets, temperature=jnp.float32(0.01)))
    )
    np.testing.assert_allclose(
        gradient(scores + 4096), gradient(scores), rtol=1e-4, atol=1e-5
    )
