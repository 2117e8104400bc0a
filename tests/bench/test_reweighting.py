"""The network, the weights and the data of the table `reweighting`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import reweighting as table
from benchmarks.shared import binary_lenet as network
from hypergrad import datasets


def sample_batch(num: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    x = rng.random((num, 784), np.float32)
    return {"x": x, "y": (np.arange(num) % 2).astype(np.float32)}


def test_the_scores_are_those_of_the_convolutions_of_jax():
    w = network.sample_w(jax.random.key(0))
    x = jnp.asarray(sample_batch(3)["x"], float)
    h = x.reshape(-1, 28, 28, 1)
    for name in ("conv1", "conv2", "conv3"):
        h = jax.lax.conv_general_dilated(
            h, w[name]["kernel"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        h = jax.lax.reduce_window(
            h + w[name]["bias"][None, None, None], -jnp.inf, jax.lax.max,
            (1, 3, 3, 1), (1, 2, 2, 1), "SAME",
        )  # fmt: skip
        h = jax.nn.relu(h)
    assert h.shape == (3, 4, 4, 64)
    h = jax.nn.relu(h.reshape(3, -1) @ w["fc1"]["kernel"] + w["fc1"]["bias"][None])
    expected = (h @ w["fc2"]["kernel"] + w["fc2"]["bias"][None])[:, 0]
    np.testing.assert_allclose(network.scores(w, x), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_by_chunks_is_that_of_the_weighted_loss():
    w, batch = network.sample_w(jax.random.key(0)), sample_batch(50)
    weights = jnp.linspace(0.0, 1.0, 50)
    expected = jax.grad(network.weighted_loss)(w, weights, batch)
    actual = network.weighted_grad(w, weights, batch)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_weights_are_the_hypergradient_of_one_unrolled_step():
    """Reverse mode through a step of rate 1 from weights 0 is the paper's algorithm."""
    w, batch, clean = (
        network.sample_w(jax.random.key(0)),
        sample_batch(50),
        sample_batch(10, seed=1),
    )
    problem = hg.Bilevel(
        network.weighted_loss,
        lambda w, alpha, clean: jnp.mean(network.losses(w, clean)),
        batch,
        clean,
    )
    step = hg.Unrolled(hg.Descent(optax.sgd(1.0), 1), warm_start=False)
    hypergradient = hg.hypergradient(problem, step)(w, jnp.zeros(50)).hypergradient
    expected = np.maximum(-hypergradient, 0)
    assert 5 < np.sum(expected > 0) < 45
    expected /= expected.sum()
    actual = jax.jit(table.reweighted)(w, batch, clean)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)


def test_weights_that_are_all_zero_stay_zero():
    np.testing.assert_array_equal(table.normalized(jnp.zeros(3)), np.zeros(3))


def test_fixed_weights():
    batch = {"y": jnp.array([0.0, 1.0, 1.0])}
    np.testing.assert_allclose(table.uniform(None, batch, None), 1 / 3)
    actual = table.inverse_frequency(None, batch, None)
    np.testing.assert_allclose(actual, [0.995, 0.005, 0.005], rtol=1e-6)
    actual = table.weigh_fours(jnp.log(8.0), None, batch, None)
    np.testing.assert_allclose(actual, [0.8, 0.1, 0.1], rtol=1e-6)


def test_passes_contain_each_example_once():
    batches = table.passes(np.random.default_rng(0), 250, 5)
    assert batches.shape == (5, 100)
    for part in (batches.ravel()[:250], batches.ravel()[250:]):
        np.testing.assert_array_equal(np.sort(part), np.arange(250))


def test_a_step_of_a_training():
    """One step of rate 0.001 along the gradient of the mean loss."""
    w, data = network.sample_w(jax.random.key(0)), sample_batch(50)
    mean_loss = lambda w: jnp.mean(network.losses(w, data))
    expected = optax.tree.add_scale(w, -0.001, jax.grad(mean_loss)(w))
    indices = jnp.arange(50)[None]
    actual, share = table.train(table.EQUAL, w, data, data, indices)
    assert share == pytest.approx(0.5)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_split_is_that_of_the_authors():
    """The first shuffle of their generator, and the sizes that their code prints."""
    try:
        arrays = datasets.load("mnist")
    except OSError:
        # It is neither in the package nor on PyPI.
        pytest.skip("MNIST is not at hand, and its source cannot be reached")
    data, clean, test = table.split(3)
    count = lambda part: np.bincount(part["y"].astype(int)).tolist()
    assert (count(data), count(clean), count(test)) == ([20, 4970], [5, 5], [250, 250])
    fours = arrays["x"][5_000:60_000][arrays["y"][5_000:60_000] == 4]
    order = np.arange(len(fours))
    np.random.RandomState(3 * 123456789 % 100000).shuffle(order)
    np.testing.assert_array_equal(clean["x"][:5], fours[order[:5]])
    np.testing.assert_array_equal(data["x"][:20], fours[order[5:25]])
    whole = table.split(3, num_clean=0)[0]
    assert count(whole) == [25, 4975]
    np.testing.assert_array_equal(whole["x"][:25], fours[order[:25]])
