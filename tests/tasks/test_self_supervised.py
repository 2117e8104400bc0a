"""Tests of contrastive learning: hypergradients, views, the loss and the probe."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
from jax.flatten_util import ravel_pytree
from sklearn.linear_model import Ridge

import hypergrad as hg
from hypergrad import datasets
from hypergrad.tasks import self_supervised

SOLVER = hg.Descent(optax.sgd(0.3, momentum=0.9), 5)


@pytest.fixture(scope="module")
def task():
    return self_supervised.make(key=jax.random.key(0), width=3, dimension=2)


def run_estimator(problem, estimator, task, key):
    state = estimator.init(problem, task.w, task.alpha, key)
    estimate, _ = jax.jit(estimator.estimate)(problem, state, task.alpha, key)
    return estimate


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(hg.Unrolled(SOLVER), id="unrolled"),
        pytest.param(hg.Forward(SOLVER), id="forward", marks=pytest.mark.slow),
    ],
)
def test_hypergradients_equal_central_differences(estimator, task, key):
    """Five steps on random views, the probe and its error are differentiated."""
    estimate = run_estimator(task.problem, estimator, task, key)
    # The interpolation has kinks at whole pixels. A step of 1e-7 rarely crosses one.
    oracle = hg.CentralDifference(SOLVER, 1e-7)
    expected = run_estimator(task.problem, oracle, task, key)
    assert jnp.min(jnp.abs(ravel_pytree(expected.hypergradient)[0])) > 1e-6
    chex.assert_trees_all_close(
        estimate.hypergradient, expected.hypergradient, rtol=1e-5
    )


def test_probe_is_ridge_regression(key):
    """It equals scikit-learn's on the examples to fit, with a penalized constant."""
    f = jax.random.normal(key, (60, 5))
    y = jnp.arange(60) % 10
    fit = (jnp.arange(60) < 40).astype(float)
    batch = {"y": y, "fit": fit, "penalty": jnp.asarray(0.3)}
    f_with_one = np.concatenate([f, np.ones((60, 1))], axis=1)[:40]
    ridge = Ridge(alpha=0.3, fit_intercept=False).fit(f_with_one, np.eye(10)[y[:40]])
    actual = self_supervised.probe(f, batch)
    np.testing.assert_allclose(actual, ridge.coef_.T, rtol=1e-8)


def test_views_have_the_strengths_of_the_augmentation(key):
    """Zero strengths return the image; noise has its standard deviation."""
    x = jax.random.uniform(key, (8, 8))
    augment = lambda noise: self_supervised.augment(
        {"noise": noise, "crop": 0.0, "shift": 0.0}, x, key
    )
    np.testing.assert_allclose(augment(0.0), x, atol=1e-12)
    noise = augment(2.0) - x
    np.testing.assert_allclose(noise, 2 * (augment(1.0) - x))
    assert 1 < jnp.std(noise) < 3


def test_views_equal_the_linear_interpolation_of_scipy(key):
    """Pixel i shows the position ``c + (i - c)(1 - crop u) + shift v`` of each axis."""
    x = jax.random.uniform(key, (8, 8))
    alpha = {"noise": 0.0, "crop": 0.7, "shift": 1.5}
    crop_key, shift_key, _ = jax.random.split(key, 3)
    u = jax.random.uniform(crop_key)
    v = jax.random.uniform(shift_key, (2, 1), minval=-1)
    positions = 3.5 + (np.arange(8)[None] - 3.5) * (1 - 0.7 * u) + 1.5 * v
    grid = np.meshgrid(*positions, indexing="ij")
    expected = scipy.ndimage.map_coordinates(x, grid, order=1, mode="grid-constant")
    actual = self_supervised.augment(alpha, x, key)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_info_nce_equals_the_published_formula():
    """The formula is evaluated pair by pair in both directions."""
    z = np.random.default_rng(0).normal(size=(2, 5, 3))
    a, b = z / np.linalg.norm(z, axis=2, keepdims=True)
    expected = 0.0
    for queries, targets in ((a, b), (b, a)):
        for i in range(5):
            scores = np.exp(targets @ queries[i] / 0.3)
            expected -= np.log(scores[i] / scores.sum()) / 10
    actual = self_supervised.info_nce(jnp.asarray(a), jnp.asarray(b), 0.3)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_split_is_a_partition():
    """800 images have no labels; 100, 300 and 597 have some, with their own labels."""
    digits = datasets.load("digits")
    # Each pixel is the index of its example.
    indexed = digits | {"x": np.repeat(np.arange(1797)[:, None], 64, axis=1)}
    parts = self_supervised.split(indexed, jax.random.key(1), 1.0)
    train, val, test = (
        np.asarray(parts[name]["x"][:, 0, 0]).astype(int)
        for name in ("train", "val", "test")
    )
    assert [len(train), len(val), len(test)] == [800, 400, 697]
    np.testing.assert_array_equal(val[:100], test[:100])
    assert sorted([*train, *val, *test[100:]]) == list(range(1797))
    for name, indices in (("val", val), ("test", test)):
        part = parts[name]
        np.testing.assert_array_equal(part["y"], digits["y"][indices])
        np.testing.assert_array_equal(part["fit"], np.arange(len(indices)) < 100)
        np.testing.assert_array_equal(part["evaluate"], 1 - part["fit"])
