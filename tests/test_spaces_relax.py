"""Relaxations of choices against exact expectations by enumeration."""

import itertools
import re

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
EVERY = [np.eye(3)[list(cells)] for cells in itertools.product(range(3), repeat=2)]
TABLE = jnp.array([[1.0, -2.0, 0.5], [0.2, 3.0, -1.0]])


def linear(w, x):
    return jnp.sum(w * x)


def interacting(w, x):
    """A loss with both rows in one term, and curved in ``w``."""
    return jnp.sum(w**2 * x) + 3 * x[0, 1] * x[1, 2] * w[0, 0]


def expected(loss, w, logits):
    """Over the nine pairs of choices."""
    p = jax.nn.softmax(logits)
    return sum(jnp.prod(jnp.sum(p * x, axis=-1)) * loss(w, x) for x in EVERY)


def assert_mean(samples, exact):
    """Within five standard errors, entry by entry."""
    samples = np.asarray(samples)
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(axis=0) - exact) <= 5 * error + 1e-12)


@pytest.mark.parametrize("baseline", [0.0, 1.5])
@pytest.mark.parametrize("loss", [linear, interacting])
def test_the_score_function_has_every_derivative_of_the_expectation(loss, baseline):
    """Value, both gradients, the cross derivative, and the Hessian in the logits."""

    def sampled(w, logits, key):
        return score_function(lambda x: loss(w, x), logits, key, baseline)

    def derivatives(f, *rest):
        gradients = jax.grad(f, (0, 1))(TABLE, LOGITS, *rest)
        cross = jax.jacfwd(jax.grad(f, 0), 1)(TABLE, LOGITS, *rest)
        hessian = jax.hessian(f, 1)(TABLE, LOGITS, *rest)
        return f(TABLE, LOGITS, *rest), *gradients, cross, hessian

    exact = derivatives(lambda w, logits: expected(loss, w, logits))
    drawn = jax.vmap(lambda key: derivatives(sampled, key))(KEYS)
    for samples, number in zip(drawn, exact, strict=True):
        assert_mean(samples, number)


def test_straight_through_is_a_sample_with_the_gradient_of_the_mean():
    """Of a loss linear in the sample: for each key alone, and to rounding."""
    sampled = lambda logits, key: linear(TABLE, straight_through(logits, key))
    slope = jax.grad(lambda logits: expected(linear, TABLE, logits))(LOGITS)
    for key in KEYS[:3]:
        np.testing.assert_allclose(jax.grad(sampled)(LOGITS, key), slope, rtol=1e-12)
    x = jax.vmap(lambda key: straight_through(LOGITS, key))(KEYS)
    np.testing.assert_allclose(np.sort(x, -1) - np.array([0, 0, 1.0]), 0, atol=1e-15)
    for row, p in zip(np.asarray(x).sum(0).round(), P, strict=True):
        assert scipy.stats.chisquare(row, p * len(KEYS)).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0])
def test_gumbel_softmax_points_to_a_sample(temperature):
    weights = jax.vmap(lambda key: gumbel_softmax(LOGITS, key, temperature))(KEYS)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-12)
    largest = np.eye(3)[np.argmax(weights, axis=-1)]
    for row, p in zip(largest.sum(0), P, strict=True):
        assert scipy.stats.chisquare(row, p * len(KEYS)).pvalue > 1e-4
    if temperature == 0.01:  # almost one-hot, so the mean is almost p
        assert np.mean(np.max(weights, -1) > 0.99) > 0.9
        np.testing.assert_allclose(weights.mean(0), P, atol=0.02)


def test_gumbel_softmax_is_differentiated_as_a_softmax():
    """At fixed noise, by central differences."""
    loss = lambda logits: linear(TABLE, gumbel_softmax(logits, KEYS[0], 0.7))
    slope = jax.grad(loss)(LOGITS)
    for i, j in itertools.product(range(2), range(3)):
        d = jnp.zeros((2, 3)).at[i, j].set(1e-6)
        central = (loss(LOGITS + d) - loss(LOGITS - d)) / 2e-6
        np.testing.assert_allclose(slope[i, j], central, rtol=1e-7, atol=1e-9)


def test_minimize_learns_a_choice_by_any_of_them():
    """Of four values the least, drawn afresh for every estimate."""
    values = jnp.array([0.4, 0.1, 0.9, 0.6])
    ways = {
        "score": lambda a, key: score_function(lambda x: x @ values, a, key, 0.5),
        "straight": lambda a, key: straight_through(a, key) @ values,
        "gumbel": lambda a, key: gumbel_softmax(a, key, 0.5) @ values,
    }
    for way in ways.values():
        problem = hg.Bilevel(
            lambda w, alpha, batch: (w - jnp.sum(alpha)) ** 2,
            lambda w, alpha, key, way=way: way(alpha, key) + 0 * w,
            outer_data=hg.Batches(None, with_key=True),
        )
        trace = hg.minimize(
            problem, hg.Implicit(hg.Newton()), optax.adam(0.1), 0.0, jnp.zeros(4),
            num_steps=200, key=jax.random.key(0),
        )  # fmt: skip
        assert int(jnp.argmax(trace.alpha)) == 1
        assert jax.nn.softmax(trace.alpha)[1] > 0.5


@pytest.mark.parametrize(
    ("relaxation", "keys"),
    [
        (gumbel_softmax, {"jang2017", "maddison2017"}),
        (straight_through, {"bengio2013"}),
        (score_function, {"williams1992", "foerster2018"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_each_relaxation_rests_on_is_cited(relaxation, keys):
    """Named or held by something else, as a loss that samples would hold it."""
    for holder in (relaxation, [relaxation]):
        text = hg.citation(holder)
        assert set(re.findall(r"@\w+{(\w+),", text)) == {"hypergrad"} | keys
