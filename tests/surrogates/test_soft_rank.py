"""Soft ranks against isotonic regression, projections and the published examples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from benchmarks.shared.reference_problems import central
from hypergrad import surrogates as sg
from hypergrad.surrogates.soft_rank import pool_adjacent_violators
from tests.surrogates.surrogate_cases import make_rng, sample_smooth

seeds = st.integers(0, 2**32 - 1)
soft_rank = jax.jit(lambda values, t: sg.soft_rank(values, temperature=t))
weighted_soft_rank = jax.jit(sg.soft_rank)
pool = jax.jit(pool_adjacent_violators)


@pytest.mark.parametrize("n", [1, 2, 60])
@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_block_means_are_the_weighted_isotonic_regression(n, seed):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=n) + rng.choice([-0.1, 0.0, 0.1]) * np.arange(n)
    w = rng.random(n) + 0.1
    block = np.asarray(pool(y, w)[0])
    means = (np.bincount(block, w * y) / np.bincount(block, w))[block]
    isotonic = IsotonicRegression(increasing=False)
    expected = isotonic.fit_transform(np.arange(n), y, sample_weight=w)
    np.testing.assert_allclose(means, expected, atol=1e-8)


def test_pooling_takes_fewer_than_two_steps_per_item(key):
    """Each item is pushed once, and all but one may be merged."""
    for n in (1_000, 100_000):
        noise, up = jax.random.normal(key, (n,)), jnp.arange(n, dtype=float)
        steps = [int(pool(y, jnp.ones(n))[1]) for y in (noise, up, -up)]
        assert steps[2] == n
        assert max(steps) == steps[1] == 2 * n - 1


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_soft_ranks_are_the_projection_onto_the_permutahedron(temperature, key):
    """No vertex is on the far side of the point, which is within by majorization."""
    values = np.asarray(jax.random.normal(key, (6,)))
    ranks = np.asarray(soft_rank(values, temperature))
    vertices = np.array(list(itertools.permutations(range(1, 7))))
    assert np.max((vertices - ranks) @ (-values / temperature - ranks)) < 1e-10
    assert np.all(np.cumsum(np.sort(ranks)) >= np.cumsum(np.arange(1, 7)) - 1e-10)
    np.testing.assert_allclose(ranks.sum(), 21)


def test_soft_ranks_are_the_published_examples():
    """Of the README of google-research/fast-soft-sort, which ranks upwards."""
    values = -jnp.array([[5.0, 1.0, 2.0], [2.0, 1.0, 5.0]])
    expected = [[3.0, 1.25, 1.75], [1.75, 1.25, 3.0]]
    np.testing.assert_allclose(soft_rank(values, 2.0), expected)
    np.testing.assert_allclose(soft_rank(values, 1.0), [[3, 1, 2], [2, 1, 3]])


def test_soft_ranks_go_from_hard_ranks_to_the_mean_rank(key):
    """Hard, exactly, if the temperature is the smallest gap; ties share a rank."""
    values = make_rng(key).permutation(40) / 8
    hard = scipy.stats.rankdata(-values)
    np.testing.assert_array_equal(soft_rank(values, 0.125), hard)
    tied = np.round(values)
    np.testing.assert_allclose(soft_rank(tied, 0.01), scipy.stats.rankdata(-tied))
    np.testing.assert_allclose(soft_rank(values, 1e9), 20.5, atol=1e-7)
    temperatures = np.geomspace(0.1, 100, 20)
    spread = [np.linalg.norm(soft_rank(values, t) - 20.5) for t in temperatures]
    assert np.all(np.diff(spread) <= 1e-12)


def test_a_weight_repeats_an_item_and_a_shift_changes_nothing(key):
    """A weight of 0 leaves an item out; large values keep their ranks in float32."""
    rng = make_rng(key)
    values, counts = rng.normal(size=20), rng.integers(0, 4, size=20)
    ranks = np.asarray(weighted_soft_rank(values, temperature=0.1, weights=counts))
    index = np.repeat(np.arange(20), counts)
    np.testing.assert_allclose(ranks[index], soft_rank(values[index], 0.1), rtol=1e-10)
    assert np.all(ranks[counts == 0] == 0)
    ranks = soft_rank(np.float32(1e4) + np.arange(20, dtype=np.float32), 1e-3)
    np.testing.assert_array_equal(ranks, np.arange(20, 0, -1))
    assert ranks.dtype == jnp.float32


@pytest.mark.parametrize("top", [1e3, 1e8, 3e38])
def test_one_distant_value_leaves_the_ranks_of_the_others(top):
    """In float32, at a temperature that pools some of the others."""
    values = np.array([1.0, 0.9, 0.6, 0.55, 0.5, 0.1], np.float32)
    expected = 1 + soft_rank(values[1:], np.float32(0.1))
    for sign in (1, -1):
        distant = sign * np.where(np.arange(6) == 0, np.float32(top), sign * values)
        ranks = soft_rank(distant, np.float32(0.1))
        offset = 0 if sign > 0 else 1
        np.testing.assert_allclose(ranks[1:] + offset, expected, rtol=1e-5)
        assert ranks[0] == (1 if sign > 0 else 6)


def test_jacobians_in_both_modes_equal_central_differences(key):
    scores = jnp.asarray(sample_smooth("soft-rank-ap", make_rng(key))[0])
    f = lambda s: soft_rank(s, 0.1)
    rows = [central(lambda s, i=i: f(s)[i], scores, 1e-4) for i in range(6)]
    for mode in (jax.jacfwd, jax.jacrev):
        jacobian = jax.jit(mode(f))(scores)
        np.testing.assert_allclose(jacobian[:6], np.stack(rows), atol=1e-7)
        np.testing.assert_allclose(jacobian.sum(axis=1), 0, atol=1e-12)


def test_an_infinite_value_of_weight_zero_has_no_rank():
    values = jnp.array([3.0, jnp.inf, 1.0])
    ranks = sg.soft_rank(values, temperature=0.1, weights=jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(ranks, [1.0, 0.0, 2.0], rtol=1e-6)


def test_rows_are_ranked_one_by_one_under_vmap(key):
    """With derivatives, and by a scan that holds the loop of one row only."""
    values = jax.random.normal(key, (2, 3, 8))
    f = lambda v: jnp.sum(sg.soft_rank(v, temperature=0.3) ** 3)
    value_and_grad = jax.value_and_grad(f)
    batched_values, gradients = jax.jit(jax.vmap(value_and_grad))(values)
    single = jax.jit(value_and_grad)
    for i in range(2):
        row_values, row_gradients = zip(*map(single, values[i]), strict=True)
        np.testing.assert_allclose(batched_values[i], sum(row_values), rtol=1e-12)
        np.testing.assert_allclose(gradients[i], np.stack(row_gradients), rtol=1e-9)
    rows = jax.ShapeDtypeStruct((3, 7, 8), float)
    jaxpr = jax.make_jaxpr(lambda v: sg.soft_rank(v, temperature=0.3))(rows)
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert scan.params["length"] == 21
    body = str(scan.params["jaxpr"])
    assert "[21" not in body
    assert str(jaxpr).count("while[") == body.count("while[") == 1


@pytest.mark.parametrize("num", [1, 2, 3, 5, 7, 10])
@pytest.mark.parametrize("value", [-89478512.0, -1e9, np.finfo(np.float32).min])
def test_distant_ties_share_their_rank_in_float32(value, num):
    """Also those of masks, whose sum is not a number of this precision."""
    values = jnp.array([0.0, *[value] * num, -1.0], jnp.float32)
    for weight in (1.0, 10.0):
        ranks = weighted_soft_rank(
            values, temperature=0.1, weights=jnp.full(num + 2, weight)
        )
        expected = (
            weight * (np.array([0, *[2 + (num - 1) / 2] * num, 1])) + (1 + weight) / 2
        )
        np.testing.assert_allclose(ranks, expected, rtol=1e-6)
