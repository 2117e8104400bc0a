"""Tests of `Average`: means over samples, and their standard error."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    get_reference,
)
from hypergrad.cost.counts import cost_stats
from hypergrad.estimators.error_estimates import standard_error
from tests.estimator_cases import failed_checks
from tests.loops import TO_ONE, TO_ZERO, Stateless, run_loop


def with_batches(reference, batch_size=None):
    """Returns the problem with its data in batches."""
    problem = reference.problem
    return hg.Bilevel(
        problem.inner_loss,
        problem.outer_loss,
        hg.Batches(problem.inner_data, batch_size),
        hg.Batches(problem.outer_data),
    )


def test_an_average_equals_a_loop_over_its_samples():
    """Each sample has its own key and warm start; costs add up, noise is flagged."""
    reference, num_samples = get_reference("ridge per-weight"), 4
    problem, alpha = with_batches(reference, 8), reference.alpha
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 5), outer_batch_size=10)
    average = hg.Average(estimator, num_samples)
    state = average.init(problem, reference.w, alpha)
    states = [estimator.init(problem, reference.w, alpha)] * num_samples
    average_fn, sample_fn = jax.jit(average.estimate), jax.jit(estimator.estimate)
    for key in jax.random.split(jax.random.key(5)):
        estimate, state = average_fn(problem, state, alpha, key)
        keys = jax.random.split(key, num_samples)
        pairs = [
            sample_fn(problem, state, alpha, key)
            for state, key in zip(states, keys, strict=True)
        ]
        samples, states = zip(*pairs, strict=True)

    h = np.stack([sample.hypergradient for sample in samples])
    mean = h.mean(axis=0)
    np.testing.assert_allclose(estimate.hypergradient, mean, rtol=1e-9)
    w = np.mean([sample.w for sample in samples], axis=0)
    np.testing.assert_allclose(estimate.w, w, rtol=1e-9)
    standard_error = np.sqrt(h.var(axis=0, ddof=1).sum() / num_samples)
    standard_error /= np.linalg.norm(mean)
    np.testing.assert_allclose(estimate.stats["standard_error"], standard_error)
    total = sum(sample.stats["gradient_equivalents"] for sample in samples)
    np.testing.assert_allclose(estimate.stats["gradient_equivalents"], total)
    assert estimate.stats["num_inner_steps"] == 5
    assert all(sample.trusted for sample in samples)
    assert failed_checks(estimate) == {"standard_error"}


def slow_in_two_ways(w, alpha, key):
    """An estimate with few gradients and many products, or the reverse."""
    is_first = jax.random.bits(key) % 2 == 0
    calls = {
        "num_grads": jnp.where(is_first, 10.0, 100.0),
        "num_hvps": jnp.where(is_first, 100.0, 10.0),
    }
    return hg.Estimate(alpha**2, alpha, w, cost_stats(None, None, **calls))


def test_the_cost_of_samples_is_that_of_their_executed_calls():
    """The largest numbers of gradients and of products are of different samples."""
    average = hg.Average(Stateless(slow_in_two_ways), 16)
    stats = hg.hypergradient(TO_ZERO, average)(0.0, 1.0).stats
    assert (stats["num_grads"], stats["num_hvps"]) == (1600, 1600)
    assert stats["gradient_equivalents"] == 1600 + 2 * 1600


def test_the_standard_error_equals_numpys():
    samples = np.random.default_rng(0).normal(size=(5, 3))
    mean = samples.mean(0)
    expected = np.linalg.norm(samples.std(0, ddof=1)) / 5**0.5 / np.linalg.norm(mean)
    actual = standard_error(jnp.asarray(samples), jnp.asarray(mean), False)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_standard_error_does_not_depend_on_a_factor(factor):
    """The squares of the numbers leave the range of float32."""
    samples = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    relative = lambda x: standard_error(jnp.asarray(x), jnp.asarray(x).mean(0), False)
    scaled = samples * np.float32(factor)
    np.testing.assert_allclose(relative(scaled), relative(samples), rtol=1e-5)


def test_estimators_without_statistics_can_be_averaged():
    """An estimator that checks nothing is averaged, and not trusted."""
    minimal = Stateless(
        lambda w, alpha, key: hg.Estimate(jnp.sum(alpha**2), 2 * alpha, w)
    )
    average = hg.Average(minimal, 2)
    assert average.target == "argmin"
    assert np.isnan(average.error_bound(0.5, 1.5))
    estimate = hg.hypergradient(TO_ZERO, average)(jnp.ones(2), jnp.ones(2))
    np.testing.assert_array_equal(estimate.hypergradient, [2.0, 2.0])
    assert failed_checks(estimate) == {"unchecked"}


@pytest.mark.parametrize("num_samples", [1, 2.5])
def test_num_samples_must_be_at_least_two(num_samples):
    """A single sample has no standard error."""
    with pytest.raises(ValueError, match="num_samples"):
        hg.Average(hg.Implicit(hg.Newton()), num_samples)


def test_single_steps_of_a_single_loop_method_are_not_averaged():
    average = hg.Average(hg.SOBA(optax.sgd(0.1)))
    with pytest.raises(TypeError, match="single-loop"):
        hg.hypergradient(get_reference("ridge scalar").problem, average)


def test_several_samples_of_the_data_have_no_certificate():
    """A certificate needs one sample of the problem's data per estimate."""
    loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    data_fn = lambda key: (jnp.ones(1), jnp.ones(1))
    average = hg.Average(hg.Implicit(hg.Newton()))
    with pytest.raises(ValueError, match="certify_every"):
        run_loop(
            hg.Bilevel(loss, loss, data_fn=data_fn), average, optax.sgd(0.1), 0.0, 1.0,
            num_steps=1, certify_every=1,
        )  # fmt: skip


def test_a_certificate_does_not_judge_another_sample_than_an_average_saw():
    def data_fn(key):
        shift = jax.random.normal(key)
        return shift, shift

    inner = lambda w, alpha, shift: (w - alpha - shift) ** 2
    outer = lambda w, alpha, shift: (w - 3.0 * shift) ** 2
    problem = hg.Bilevel(inner, outer, data_fn=data_fn)
    estimator = hg.Implicit(hg.Newton())
    estimate = hg.hypergradient(problem, hg.Average(estimator, 4))(0.0, 1.0)
    assert estimate.key is None
    with pytest.raises(ValueError, match="certify=True of the averaged"):
        hg.certify(problem, estimate.w, 1.0, estimate)
    estimate = hg.hypergradient(problem, estimator)(0.0, 1.0)
    certificate = hg.certify(problem, estimate.w, 1.0, estimate)
    assert certificate.error_estimate < 1e-6


def test_equal_samples_of_a_zero_hypergradient_are_trusted():
    estimator = hg.Average(hg.Implicit(hg.Newton()), 2)
    estimate = hg.hypergradient(TO_ONE, estimator)(1.0, 1.0)
    assert estimate.hypergradient == 0
    assert estimate.stats["standard_error"] == 0
    assert not estimate.flags["standard_error"]
