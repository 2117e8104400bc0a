"""Surrogates of ranking metrics, against scikit-learn, NumPy and theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from hypergrad import surrogates as sg
from hypergrad.surrogates.soft_rank import pool
from tests.problems import central

N = 24
seeds = st.integers(0, 2**32 - 1)


def _rng(key):
    return np.random.default_rng(int(jax.random.bits(key)))


def drawn(rng):
    """Distinct scores, a hundredth of a unit apart at least, and targets."""
    scores = 0.01 * rng.permutation(400)[:N]
    return scores, rng.integers(0, 2, size=N)


def clustered(rng):
    """Six clusters of four: at a temperature of 0.1 each is one block of soft ranks.

    So that it is for weights in [1/2, 3/2], far from where a block splits or merges.
    """
    scores = np.add.outer(np.arange(6.0), 0.01 * np.arange(4)).ravel()
    return rng.permutation(scores), drawn(rng)[1]


# Soft ranks.


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
    soft = jax.jit(lambda values, t: sg.soft_rank(values, temperature=t))
    values = _rng(key).permutation(40) / 8
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
    rng = _rng(key)
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
    scores = jnp.asarray(clustered(_rng(key))[0])
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
