"""Relaxations of choices against exact expectations by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import hypergrad as hg
from hypergrad.spaces import gumbel_softmax, score_function, straight_through

KEYS = jax.random.split(jax.random.key(0), 20_000)
LOGITS = jnp.array([[0.3, -0.5, 1.0], [0.0, 0.7, -0.2]])
P = np.asarray(jax.nn.softmax(LOGITS))
ALL_SAMPLES = [
    np.eye(3)[list(cells)] for cells in itertools.product(range(3), repeat=2)
]
W = jnp.array([[1.0, -2.0, 0.5], [0.2, 3.0, -1.0]])


def linear(w, x):
    return jnp.sum(w * x)


def interacting(w, x):
    """Returns a loss with both rows in one term, nonlinear in ``w``."""
    return jnp.sum(w**2 * x) + 3 * x[0, 1] * x[1, 2] * w[0, 0]


def expectation(loss, w, logits):
    """Returns the mean of a loss over the nine pairs of choices."""
    p = jax.nn.softmax(logits)
    return sum(jnp.prod(jnp.sum(p * x, axis=-1)) * loss(w, x) for x in ALL_SAMPLES)


def assert_samples_of_p(one_hot):
    """Checks by a chi-square test that rows are one-hot samples of P."""
    for counts, p in zip(np.asarray(one_hot).sum(0).round(), P, strict=True):
        assert scipy.stats.chisquare(counts, p * len(KEYS)).pvalue > 1e-4


def test_the_score_function_accepts_a_value_that_is_never_chosen():
    """Its logit is -inf, which makes no product NaN."""
    logits, values = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([2.0, 5.0, 3.0])
    masked = lambda logits, key: score_function(lambda x: x @ values, logits, key)
    free = lambda pair, key: masked(jnp.array([pair[0], -jnp.inf, pair[1]]), key)
    for key in jax.random.split(jax.random.key(0), 5):
        assert masked(logits, key) in (2.0, 3.0)
        gradient = jax.grad(free)(jnp.array([0.0, 1.0]), key)
        p = jax.nn.softmax(jnp.array([0.0, 1.0]))
        value = masked(logits, key)
        one_hot = jnp.array([value == 2.0, value == 3.0])
        np.testing.assert_allclose(gradient, value * (one_hot - p), rtol=1e-12)


def test_the_score_function_refuses_a_value_for_each_row():
    """The probability of all rows would weight each value."""
    with pytest.raises(ValueError, match=r"loss must return a scalar.*\(2,\)"):
        score_function(lambda x: x @ VALUES, jnp.zeros((2, 4)), jax.random.key(0))


@pytest.mark.parametrize("baseline", [0.0, 1.5])
@pytest.mark.parametrize("loss", [linear, interacting])
def test_the_score_function_has_unbiased_derivatives_of_second_order(loss, baseline):
    """Means of value, gradients, cross derivative and Hessian are the exact ones.

    Each entry is within five standard errors.
    """

    def sampled_loss(w, logits, key):
        return score_function(lambda x: loss(w, x), logits, key, baseline)

    def derivatives(f, *args):
        gradients = jax.grad(f, (0, 1))(W, LOGITS, *args)
        cross = jax.jacfwd(jax.grad(f, 0), 1)(W, LOGITS, *args)
        hessian = jax.hessian(f, 1)(W, LOGITS, *args)
        return f(W, LOGITS, *args), *gradients, cross, hessian

    exact = jax.jit(lambda: derivatives(lambda w, a: expectation(loss, w, a)))()
    samples = jax.jit(jax.vmap(lambda key: derivatives(sampled_loss, key)))(KEYS)
    for sample, expected in zip(samples, exact, strict=True):
        sample = np.asarray(sample)
        standard_error = sample.std(axis=0) / np.sqrt(len(sample))
        error = np.abs(sample.mean(axis=0) - expected)
        assert np.all(error <= 5 * standard_error + 1e-12)


def test_straight_through_has_the_exact_gradient_of_a_linear_loss():
    """The values are one-hot samples of p."""
    sampled_loss = lambda logits, key: linear(W, straight_through(logits, key))
    expected = jax.grad(lambda logits: expectation(linear, W, logits))(LOGITS)
    for key in KEYS[:3]:
        gradient = jax.grad(sampled_loss)(LOGITS, key)
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    x = jax.vmap(lambda key: straight_through(LOGITS, key))(KEYS)
    np.testing.assert_allclose(np.sort(x, -1) - np.array([0, 0, 1.0]), 0, atol=1e-15)
    assert_samples_of_p(x)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0])
def test_the_largest_weight_of_gumbel_softmax_is_a_sample(temperature):
    weights = jax.vmap(lambda key: gumbel_softmax(LOGITS, key, temperature))(KEYS)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-12)
    assert_samples_of_p(np.eye(3)[np.argmax(weights, axis=-1)])
    if temperature == 0.01:  # almost one-hot, so the mean is almost p
        assert np.mean(np.max(weights, -1) > 0.99) > 0.9
        np.testing.assert_allclose(weights.mean(0), P, atol=0.02)


def test_the_gradient_of_gumbel_softmax_is_the_central_difference():
    loss = jax.jit(lambda logits: linear(W, gumbel_softmax(logits, KEYS[0], 0.7)))
    gradient = jax.grad(loss)(LOGITS)
    for i, j in np.ndindex(2, 3):
        step = jnp.zeros((2, 3)).at[i, j].set(1e-6)
        expected = (loss(LOGITS + step) - loss(LOGITS - step)) / 2e-6
        np.testing.assert_allclose(gradient[i, j], expected, rtol=1e-7, atol=1e-9)


VALUES = jnp.array([0.4, 0.1, 0.9, 0.6])
RELAXED_VALUES = {
    "score_function": lambda a, key: score_function(lambda x: x @ VALUES, a, key, 0.5),
    "straight_through": lambda a, key: straight_through(a, key) @ VALUES,
    "gumbel_softmax": lambda a, key: gumbel_softmax(a, key, 0.5) @ VALUES,
}


@pytest.mark.parametrize("name", RELAXED_VALUES)
def test_minimize_finds_the_lowest_of_four_values(name):
    """Each estimate samples a choice."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - jnp.sum(alpha)) ** 2,
        lambda w, alpha, key: RELAXED_VALUES[name](alpha, key) + 0 * w,
        outer_data=hg.Batches(None, with_key=True),
    )
    trace = hg.minimize(
        problem, hg.Implicit(hg.Newton()), optax.adam(0.1), 0.0, jnp.zeros(4),
        num_steps=200, key=jax.random.key(0),
    )  # fmt: skip
    assert jax.nn.softmax(trace.alpha)[1] > 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_samples_of_low_precision_have_the_same_distribution(dtype, key):
    """A thousand equal logits, in eight groups; 4.5 deviations of 4,000 samples."""
    logits = jnp.zeros(1000, dtype)
    keys = jax.random.split(key, 4000)
    for sample in (
        straight_through,
        lambda logits, key: gumbel_softmax(logits, key, 1.0),
    ):
        assert sample(logits, key).dtype == dtype
        samples = jax.lax.map(functools.partial(sample, logits), keys)
        index = jnp.argmax(samples, axis=-1)
        shares = np.bincount(np.asarray(index) // 125, minlength=8) / len(keys)
        np.testing.assert_allclose(shares, 1 / 8, atol=4.5 * (7 / 64 / 4000) ** 0.5)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        gumbel_softmax(jnp.zeros(3), KEYS[0], temperature)
