"""Surrogates of traced values that are not valid, and of extreme ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypergrad import surrogates as sg
from tests.surrogates.surrogate_cases import (
    CASES,
    NUM_CLASSES,
    N,
    evaluate,
    expand,
    make_rng,
    sample,
)

by_name = lambda surrogate: type(surrogate).__name__

# Targets and weights.


@pytest.mark.parametrize("name", CASES)
def test_a_traced_value_that_is_not_valid_gives_nan_if_it_counts(name, key):
    """Targets of -1, of 2 or of the number of classes, and negative weights."""
    kind = CASES[name].kind
    scores, targets = sample(kind, make_rng(key))
    is_bad = np.arange(N) == 1
    if scores.shape[0] != N:
        is_bad = np.broadcast_to(is_bad, scores.shape)
    remainder = evaluate(name, scores, targets, where=~is_bad)
    too_high = {"classes": NUM_CLASSES, "gains": -2}.get(kind, 2)
    for bad in (-1, too_high):
        dirty = np.where(expand(is_bad, targets), bad, targets)
        result = evaluate(name, scores, dirty)
        assert np.isnan(result.value) & np.isnan(result.exact)
        assert np.any(np.isnan(result.gradients[0]))
        for options in ({"where": ~is_bad}, {"weights": 1.0 - is_bad}):
            result = evaluate(name, scores, dirty, **options)
            np.testing.assert_allclose(result.value, remainder.value, rtol=1e-12)
            np.testing.assert_allclose(result.exact, remainder.exact, rtol=1e-12)
            assert np.all(np.isfinite(result.gradients[0]))
    result = evaluate(name, scores, targets, weights=1.0 - 2.0 * is_bad)
    assert np.isnan(result.value) & np.isnan(result.exact)


@pytest.mark.parametrize(
    ("surrogate", "bad"),
    [(sg.Accuracy(), 255), (sg.FBeta(), -1), (sg.NDCG(2), np.nan)],
    ids=["Accuracy", "FBeta", "NDCG"],
)
def test_a_concrete_target_of_weight_zero_is_not_checked(surrogate, bad):
    """As under `jit`; an invalid target that counts raises an error."""
    scores, targets = jnp.array([1.0, -1.0, 2.0]), np.array([1.0, 0.0, bad])
    weights = jnp.array([1.0, 1.0, 0.0])
    for metric in (surrogate.exact, functools.partial(surrogate, temperature=0.5)):
        actual = metric(scores, targets, weights=weights)
        expected = metric(scores[:2], targets[:2], weights=weights[:2])
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
        with pytest.raises(ValueError, match="targets"):
            metric(scores, targets)


LABELS, MASK = jnp.array([[1, 0], [0, 1], [1, 1]]), jnp.array([True, True, False])


def test_constant_labels_and_masks_are_checked_inside_jit():
    scores = jnp.array([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]])
    run = lambda targets: jax.jit(
        lambda s: sg.FBeta()(s, targets, temperature=0.5, where=MASK)
    )
    expected = sg.FBeta()(scores[:2], LABELS[:2], temperature=0.5)
    np.testing.assert_allclose(run(LABELS)(scores), expected)
    with pytest.raises(ValueError, match="targets"):
        run(2 * LABELS - 1)(scores)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(
    "surrogate",
    [sg.FBeta(average="micro"), sg.Accuracy(), sg.Accuracy(balanced=True),
     sg.TopKAccuracy(256)],
    ids=["FBeta", "Accuracy", "balanced", "TopKAccuracy"],
)  # fmt: skip
def test_small_integers_index_more_classes_than_they_can_hold(surrogate, dtype):
    scores = jnp.zeros((2, 300)).at[0, 256].set(1.0).at[1, 1].set(1.0)
    targets = np.array([0, 1])
    run = jax.jit(surrogate.exact)
    expected = run(scores, targets)
    assert run(scores, targets.astype(dtype)) == expected
    assert surrogate.exact(scores, targets.astype(dtype)) == expected


# Thresholds.

SCORES, TARGETS = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("threshold", lambda x: sg.Accuracy(x)),
        ("threshold", lambda x: sg.FBeta(threshold=x)),
        ("threshold", lambda x: sg.Dice(x)),
        ("min_confidence", lambda x: sg.Coverage(x)),
    ],
    ids=["Accuracy", "FBeta", "Dice", "Coverage"],
)
@pytest.mark.parametrize("shape", [(4, 1), (3,)], ids=["column", "length"])
def test_a_threshold_does_not_broadcast_the_scores(argument, make, shape):
    surrogate = make(jnp.zeros(shape))
    with pytest.raises(ValueError, match=argument):
        surrogate.exact(SCORES, TARGETS)
    with pytest.raises(ValueError, match=argument):
        surrogate(SCORES, TARGETS, temperature=0.5)


# Extreme numbers.


@pytest.mark.parametrize("beta", [1e20, 1e30, np.inf])
def test_f_beta_tends_to_recall(beta):
    scores, targets = SCORES.astype(jnp.float32), TARGETS
    f_beta, recall = sg.FBeta(beta), sg.Recall()
    np.testing.assert_allclose(
        f_beta.exact(scores, targets), recall.exact(scores, targets)
    )
    smooth = functools.partial(f_beta, temperature=0.5)
    np.testing.assert_allclose(
        smooth(scores, targets), recall(scores, targets, temperature=0.5), rtol=1e-6
    )


HUGE = 3.3e38  # the difference of two such scores is infinite in float32
RANKED = jnp.array([HUGE, 1.0, 2.0, -3.0, 0.5, -HUGE], jnp.float32)
RANKED_TARGETS = jnp.array([1, 0, 1, 0, 1, 0])
CLASSES = jnp.array([[HUGE, 1, -HUGE], [0, -HUGE, 1], [2, 1, -HUGE]], jnp.float32)
CLASS_TARGETS = jnp.array([0, 2, 1])
EXTREME = [
    *((surrogate, RANKED, RANKED_TARGETS) for surrogate in (
        sg.Accuracy(), sg.FBeta(), sg.Dice(), sg.AUC(), sg.SmoothAP(), sg.FastAP(20),
        sg.SoftRankAP(), sg.RecallAtK(2), sg.NDCG(3), sg.MRR(), sg.DetectionAP(4.0),
        sg.CalibrationError(5),
    )),
    *((surrogate, CLASSES, CLASS_TARGETS) for surrogate in (
        sg.Accuracy(), sg.ExpectedAccuracy(), sg.TopKAccuracy(2), sg.SelectiveRisk(0.5),
        sg.FBeta(), sg.CalibrationError(5),
    )),
]  # fmt: skip


@pytest.mark.parametrize(
    ("surrogate", "scores", "targets"),
    EXTREME,
    ids=[f"{by_name(surrogate)}-{scores.ndim}" for surrogate, scores, _ in EXTREME],
)
def test_scores_near_the_ends_of_the_range_have_a_derivative(
    surrogate, scores, targets
):
    smooth = lambda s, t: surrogate(s, targets, temperature=t)
    run = jax.jit(jax.value_and_grad(smooth, argnums=(0, 1)))
    for temperature in (0.05, 1e-25):
        value, gradients = run(scores, jnp.float32(temperature))
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(leaf)) for leaf in gradients)


@pytest.mark.parametrize("extra_score", [1e30, -1e30, 0.0])
@pytest.mark.parametrize("name", ["hinge", "auc", "soft-rank-ap", "detection"])
def test_an_item_of_weight_zero_costs_no_digits(name, extra_score):
    """Its score is far from all others; a masked one has the score 0."""
    scores = (-1e4 + 0.25 * np.arange(6)).astype(np.float32)
    targets = np.array([1, 0, 0, 1, 0, 1])
    smooth = functools.partial(CASES[name].surrogate, temperature=0.25)
    dirty, labels = np.append(scores, np.float32(extra_score)), np.append(targets, 0)
    weights = np.append(np.ones(6, np.float32), 0)
    run = lambda s, y, w: jax.jit(jax.grad(lambda s: smooth(s, y, weights=w)))(s)
    expected = run(scores, targets, weights[:6])
    np.testing.assert_allclose(run(dirty, labels, weights)[:6], expected, rtol=1e-5)
    value = smooth(dirty, labels, weights=weights)
    np.testing.assert_allclose(value, smooth(scores, targets), rtol=1e-6)


@pytest.mark.parametrize("labels", [[1, 1, 0, 0], [0, 0, 1, 1]], ids=str)
@pytest.mark.parametrize("temperature", [1e-30, 1e-10, 1.0])
def test_squared_hinges_of_distant_scores_are_finite(temperature, labels):
    """The derivative at 1e-30, of about 1e48, is no number of float32."""
    scores = jnp.array([1e25, 2.0, 1e25, -1e25], jnp.float32)
    smooth = lambda s: sg.SquaredHingeAUC()(
        s, jnp.array(labels), temperature=temperature
    )
    value, gradient = jax.jit(jax.value_and_grad(smooth))(scores)
    assert np.isfinite(value)
    assert value < 0
    is_valid = ~np.isnan(gradient) if temperature == 1e-30 else np.isfinite(gradient)
    assert np.all(is_valid)


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, np.inf, np.nan])
def test_a_temperature_that_is_no_normal_number_is_an_error_or_nan(temperature):
    """Processors round 1e-38 to 0 in float32, and 0 / 0 is NaN without a reason."""
    scores = SCORES.astype(jnp.float32)
    with pytest.raises(ValueError, match="temperature"):
        sg.AUC()(scores, TARGETS, temperature=temperature)
    traced = jax.jit(lambda t: sg.AUC()(scores, TARGETS, temperature=t))
    assert np.isnan(traced(temperature))


@pytest.mark.parametrize("surrogate", [sg.NDCG(2), sg.Accuracy()], ids=by_name)
def test_weights_and_gains_are_finite_real_numbers(surrogate):
    good, bad = jnp.ones(4), jnp.array([1.0, np.inf, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"^weights"):
        surrogate.exact(SCORES, TARGETS, weights=bad)
    with pytest.raises(TypeError, match=r"^weights.*real"):
        surrogate.exact(SCORES, TARGETS, weights=1j * good)
    with pytest.raises(TypeError, match=r"^targets.*real"):
        surrogate.exact(SCORES, TARGETS + 0j)
    with pytest.raises(ValueError, match=r"^targets"):
        surrogate.exact(SCORES, bad)
