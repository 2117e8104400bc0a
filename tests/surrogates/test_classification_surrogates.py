"""Surrogates of classification against the formulas of their papers and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypergrad import surrogates as sg
from tests.surrogates.surrogate_cases import N, evaluate, make_rng, sample


def test_expected_accuracy_is_below_accuracy_and_equal_for_two_classes(key):
    scores, targets = sample("classes", make_rng(key))
    for t in (0.1, 1.0, 10.0):
        expected = evaluate("expected", scores, targets, t).value
        assert expected < evaluate("accuracy-classes", scores, targets, t).value
    scores, targets = scores[:, :2], targets % 2
    of_classes = [
        evaluate(name, scores, targets).value
        for name in ("expected", "accuracy-classes")
    ]
    of_differences = evaluate("accuracy", scores[:, 1] - scores[:, 0], targets).value
    np.testing.assert_allclose(of_classes, of_differences, rtol=1e-12)


def test_f1_is_the_papers_formula_with_the_sign_of_b_corrected(key):
    """``S = 1 / (1 + exp(b (s + c)))`` rewards low scores for the printed b > 0."""
    scores, targets = sample("binary", make_rng(key))

    def printed(scores, b, c):
        S = 1 / (1 + np.exp(b * (scores + c)))
        tp, fp = (S * targets).sum(), (S * (1 - targets)).sum()
        return 2 * tp / (2 * tp + fp + ((1 - S) * targets).sum())

    f1 = sg.FBeta(threshold=0.3)
    value = jax.jit(lambda scores: f1(scores, targets, temperature=0.5))
    np.testing.assert_allclose(value(scores), printed(scores, -2.0, -0.3), rtol=1e-12)
    better = scores + np.where(targets == 1, 0.5, -0.5)
    assert value(better) > value(scores)
    assert printed(better, 2.0, -0.3) < printed(scores, 2.0, -0.3)


# Area under the ROC curve.


def pair_differences(scores, targets, weights):
    """Returns all differences of a positive and a negative, with weights."""
    is_positive, is_negative = targets == 1, targets == 0
    pair_weights = weights[is_positive][:, None] * weights[is_negative][None, :]
    differences = scores[is_positive][:, None] - scores[is_negative][None, :]
    return differences, pair_weights / pair_weights.sum()


@pytest.mark.parametrize("block_size", [1, 7, 16, 512])
def test_blocks_of_pairs_add_up_to_all_pairs(block_size, key):
    """With a last block that is not full, weights and a mask."""
    rng = make_rng(key)
    scores, weights = rng.normal(size=50), rng.random(50) + 0.1
    targets, where = rng.integers(0, 2, size=50), rng.random(50) < 0.9
    d, w = pair_differences(scores[where], targets[where], weights[where])
    auc = sg.AUC(block_size=block_size)
    value = auc(scores, targets, temperature=0.3, where=where, weights=weights)
    np.testing.assert_allclose(value, (w / (1 + np.exp(-d / 0.3))).sum(), rtol=1e-12)


def test_ties_that_the_largest_rate_cuts_count_less_in_the_exact_area():
    """The rate 1/2 takes the wrong negative and one of the two tied with positives."""
    scores = jnp.array([3.0, 2.0, 2.0, 2.0, 2.0, 1.0])
    targets = jnp.array([0, 1, 1, 0, 0, 0])
    auc = sg.AUC(0.5)
    # Half of the share 1/4, and a triangle below the line with the slope 1 / (1/2).
    for temperature in (1e-1, 1e-6):
        value = auc(scores, targets, temperature=temperature)
        np.testing.assert_allclose(value, 0.125, rtol=1e-3)
    np.testing.assert_allclose(auc.exact(scores, targets), 0.0625, rtol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(1e-3, 1e3),
    ties=st.booleans(),
)
def test_squared_hinges_bound_the_area_from_below(seed, temperature, ties):
    """And are the mean over all pairs, at any temperature."""
    rng = np.random.default_rng(seed)
    scores, targets = sample("binary", rng, ties)
    weights = rng.random(N) + 0.1
    result = evaluate("hinge", scores, targets, temperature, weights=weights)
    assert result.value <= result.exact + 1e-12
    d, w = pair_differences(scores, targets, weights)
    loss = (w * np.maximum(0, 1 - d / temperature) ** 2).sum()
    np.testing.assert_allclose(1 - result.value, loss, rtol=1e-9, atol=1e-12)


def test_sorted_hinges_do_not_cancel_in_float32(key):
    """For close pairs in two distant groups, which sums of squares would lose."""
    rng = make_rng(key)
    targets = rng.integers(0, 2, size=N)
    targets[:2] = 0, 1
    center = np.where(np.arange(N) < N // 2, -4096.0, 4096.0)
    center = np.where((targets == 0) & (center > 0), center - 8192, center)
    scores = (center + np.round(rng.normal(size=N), 2)).astype(np.float32)
    d, w = pair_differences(scores.astype(float), targets, np.ones(N))
    loss = (w * np.maximum(0, 1 - d) ** 2).sum()
    assert 0.01 < loss < 10
    value = evaluate("hinge", scores, targets, 1.0).value
    np.testing.assert_allclose(1 - value, loss, rtol=1e-4)


@pytest.mark.parametrize("top", [1.0, 1e6, 1e8])
def test_one_distant_positive_costs_hinges_no_digits(top):
    """In float32, where the scores relative to the highest are all equal."""
    scores = np.array([top, 0.9, 0.6, 0.3, 0.1], np.float32)
    targets = np.array([1, 0, 1, 0, 0])
    d, w = pair_differences(scores.astype(float), targets, np.ones(5))
    loss = (w * np.maximum(0, 1 - d) ** 2).sum()
    smooth = lambda s: sg.SquaredHingeAUC()(s, targets, temperature=1.0)
    value, gradient = jax.jit(jax.value_and_grad(smooth))(scores)
    np.testing.assert_allclose(value, 1 - loss, rtol=1e-5)
    # Pairs of the second positive: dL/ds_i = -2 (1 - d) / pairs.
    np.testing.assert_allclose(gradient[2], 2 * (1.3 + 0.7 + 0.5) / 6, rtol=1e-5)


# Calibration.


def test_calibration_errors_approach_the_truth_as_one_over_the_number_of_bins():
    """With soft and hard bins, and so each other, where accuracy jumps within a bin.

    Confidences are spread evenly over (0, 1), and accuracy is 0.2 above or below. Each
    confidence occurs with both targets, weighted by their probabilities, so that no
    error is noise. The temperature is a fifth of the narrowest bin in logits.
    """
    size = 5_000
    p = (np.arange(size) + 0.5) / size
    accuracy = np.clip(np.where(p < 1 / 3, p + 0.2, p - 0.2), 0, 1)
    true_error = np.mean(np.abs(accuracy - p))
    scores, targets = np.tile(np.log(p / (1 - p)), 2), np.repeat([1, 0], size)
    weights = np.concatenate([accuracy, 1 - accuracy])

    def errors(num_bins):
        surrogate = sg.CalibrationError(num_bins)
        options = {"weights": weights}
        smooth = surrogate(scores, targets, temperature=0.8 / num_bins, **options)
        exact = surrogate.exact(scores, targets, **options)
        return jnp.abs(
            jnp.stack([smooth - true_error, exact - true_error, smooth - exact])
        )

    num_bins = 4 ** np.arange(1, 5)
    errors = jax.jit(errors, static_argnums=0)
    smooth, exact, gap = np.array([errors(int(n)) for n in num_bins]).T
    for error in (smooth, exact):
        rate, _ = np.polyfit(np.log(num_bins), np.log(error), 1)
        assert -1.2 < rate < -0.8
    assert np.all(gap * num_bins < 0.1)
