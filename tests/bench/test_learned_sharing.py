"""The alphabets, the networks and the searches of the table `learned_sharing`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import learned_sharing as table
from benchmarks.shared import rotated_alphabets as data
from benchmarks.shared import sharing_networks as networks
from hypergrad.runtime.compat import enable_x64

N, LAYERS = 3, (5, 4, 3)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    """Fewer networks and steps, in float64; their biases are added to matrices."""
    monkeypatch.setattr(networks, "NUM_NETWORKS", N)
    monkeypatch.setattr(networks, "NUM_STEPS", 8)
    with enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


def sample_problem(seed=0):
    """Returns small weights, matrices, training and held-out data."""
    random = np.random.RandomState(seed)
    z = [
        {"w": random.randn(N, a, b) / 2, "b": random.randn(N, b) / 2}
        for a, b in itertools.pairwise(LAYERS)
    ]
    transform = np.eye(N) / 2 + random.randn(len(z), N, N) / 10
    alpha = {"transform": jnp.asarray(transform), "log_l2": jnp.asarray(-4.0)}
    make_sets = lambda size: [
        {"x": jnp.asarray(random.randn(size, 5)), "y": random.randint(3, size=size)}
        for _ in range(N)
    ]
    return jax.tree.map(jnp.asarray, z), alpha, make_sets(6), make_sets(4)


def expected_losses(z, transform, sets):
    """Returns the loss of each network by loops over networks and examples."""
    losses = []
    for s, examples in enumerate(sets):
        total = 0.0
        for x, y in zip(np.asarray(examples["x"]), examples["y"], strict=True):
            for i, layer in enumerate(z):
                w, b = np.asarray(layer["w"]), np.asarray(layer["b"])
                w = sum(transform[i][s, t] * w[t] for t in range(N))
                b = sum(transform[i][s, t] * b[t] for t in range(N))
                x = x @ w + b
                x = np.tanh(x) if i < len(z) - 1 else x
            total += np.log(np.sum(np.exp(x))) - x[y]
        losses.append(total / len(examples["y"]))
    return np.array(losses)


def test_networks_mix_the_weights_of_their_layer():
    z, alpha, sets, _ = sample_problem()
    expected = expected_losses(z, np.asarray(alpha["transform"]), sets)
    actual = networks.cross_entropies(z, alpha, sets)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
    squares = sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(z))
    loss = networks.inner_loss(z, alpha, sets)
    np.testing.assert_allclose(loss, expected.sum() + np.exp(-4) * squares, rtol=1e-12)
    mean = networks.outer_loss(z, alpha, sets)
    np.testing.assert_allclose(mean, expected.mean(), rtol=1e-12)


def test_training_makes_the_authors_steps_and_records_the_losses_before_them():
    """The authors write v = beta v - (1 - beta) g with rate 1."""
    z, alpha, sets, held_out = sample_problem()
    trained, curves = networks.train(z, alpha, sets, held_out, 3)
    beta, velocity = 58983 / 65536, jax.tree.map(jnp.zeros_like, z)
    values = []
    for _ in range(3):
        values.append(networks.cross_entropies(z, alpha, sets).mean())
        gradient = jax.grad(networks.inner_loss)(z, alpha, sets)
        velocity = jax.tree.map(lambda v, g: beta * v - 0.1 * g, velocity, gradient)
        z = jax.tree.map(jnp.add, z, velocity)
    for actual, expected in zip(*map(jax.tree.leaves, (trained, z)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(curves["train"][:3], values, rtol=1e-10)
    last = networks.outer_loss(z, alpha, held_out)
    np.testing.assert_allclose(curves["held_out"][3], last, rtol=1e-10)
    assert np.all(np.isnan(curves["train"][4:]))


def test_the_hypergradient_is_the_slope_of_the_loss_after_training():
    z, alpha, sets, held_out = sample_problem()
    problem = hg.Bilevel(networks.inner_loss, networks.outer_loss, sets, held_out)
    estimate = networks.estimate_hypergradient(problem, z, alpha)
    direction = jax.random.normal(jax.random.key(0), alpha["transform"].shape, float)

    def loss_after(t):
        moved = alpha | {"transform": alpha["transform"] + t * direction}
        trained, _ = networks.train(z, moved, sets, None, networks.NUM_STEPS)
        return float(networks.outer_loss(trained, moved, held_out))

    np.testing.assert_allclose(estimate.value, loss_after(0.0), rtol=1e-10)
    central = (loss_after(1e-5) - loss_after(-1e-5)) / 2e-5
    slope = jnp.vdot(estimate.hypergradient["transform"], direction)
    np.testing.assert_allclose(slope, central, rtol=1e-6)


def test_degrees_of_sharing_go_from_separate_to_equal_weights():
    z, _, _, _ = sample_problem()
    alpha = {"transform": networks.make_transform([1.0, 0.0]), "log_l2": 0.0}
    w = networks.weights_of(z, alpha["transform"])
    mean = np.mean(z[0]["w"], axis=0)
    for network in range(N):
        np.testing.assert_allclose(w[network][0]["w"], mean, rtol=1e-6)
        np.testing.assert_allclose(w[network][1]["b"], z[1]["b"][network], rtol=1e-6)


def test_starting_weights_have_the_order_of_the_authors_vector():
    z = networks.sample_weights(data.random_state("final_training"))
    sizes = [a * b + b for a, b in ((784, 400), (400, 200), (200, 55))]
    vector = data.random_state("final_training").randn(N * sum(sizes)) * np.exp(-2)
    offset = 2 * sum(sizes) + sizes[0]  # network 2, second layer
    stop = offset + 400 * 200
    expected = vector[offset:stop].reshape(400, 200)
    np.testing.assert_allclose(z[1]["w"][2], expected, rtol=1e-6)
    np.testing.assert_allclose(z[1]["b"][2], vector[stop : stop + 200], rtol=1e-6)


def test_images_shrink_as_by_another_bicubic_filter_and_are_transposed():
    from PIL import Image

    ink = np.random.RandomState(0).rand(105, 105) < 0.2
    image = Image.fromarray(ink.T.astype(np.float32), mode="F")
    expected = np.clip(image.resize((28, 28), Image.Resampling.BICUBIC), 0, 1)
    actual = data.shrink(ink[None].astype(float)).reshape(28, 28)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def sample_examples(seed=0, counts=5, num_labels=4):
    random = np.random.RandomState(seed)
    y = random.permutation(np.repeat(np.arange(num_labels), counts))
    return {"x": random.rand(len(y), 784).astype(np.float16), "y": y}


def test_rotated_images_are_turned_by_a_quarter_and_keep_their_labels():
    examples = sample_examples()
    rotated = data.rotate(examples)
    for x, turned in zip(examples["x"], rotated["x"], strict=True):
        expected = np.rot90(x.reshape(28, 28), -1)
        np.testing.assert_array_equal(turned.reshape(28, 28), expected)
    np.testing.assert_array_equal(rotated["y"], examples["y"])


def test_splits_have_each_label_equally_often_and_no_row_twice():
    examples = sample_examples()
    splits = data.split(examples, (3, 2))
    for part, size in zip(splits, (3, 2), strict=True):
        assert np.bincount(part["y"]).tolist() == [size] * 4
    rows = np.concatenate([part["x"] for part in splits])
    assert len(np.unique(rows, axis=0)) == len(examples["y"])
    wanted = [np.flatnonzero(examples["y"] == c)[:3] for c in range(4)]
    expected = examples["x"][np.sort(np.concatenate(wanted))]
    np.testing.assert_array_equal(splits[0]["x"], expected)


def test_labels_are_renumbered_as_by_a_permutation_of_one_hot_columns():
    examples = sample_examples()
    shuffled = data.shuffle(examples, np.random.RandomState(7))
    random = np.random.RandomState(7)
    one_hot = np.eye(data.NUM_CLASSES)[examples["y"]]
    one_hot = one_hot[:, random.permutation(data.NUM_CLASSES)]
    order = random.permutation(len(one_hot))
    np.testing.assert_array_equal(shuffled["y"], np.argmax(one_hot[order], axis=1))
    np.testing.assert_array_equal(shuffled["x"], examples["x"][order])


def test_penalty_and_steps_are_those_of_the_least_held_out_loss(monkeypatch):
    def train(z, alpha, sets, held_out, num_steps):
        steps = np.arange(num_steps + 1)
        curve = (steps - 17) ** 2 + 100 * (float(alpha["log_l2"]) + 3) ** 2
        curve[0] = -1.0  # no training is no choice
        return z, {"held_out": curve}

    monkeypatch.setattr(table, "train", train)
    monkeypatch.setattr(table, "sample_outer_data", lambda seed, step: ([], [], None))
    row = table.measure_penalty({"method": "separate", "seed": 0}, [])
    assert (row["log_l2"], row["num_steps"], row["outer_loss"]) == (-3, 17, 0.0)


def test_means_of_matrices_are_those_of_their_entries():
    n = np.arange(10)
    layer = 0.1 * np.ones((10, 10)) + 0.5 * np.eye(10)
    layer[n, (n + 5) % 10] = 0.3
    expected = [0.6, (0.3 + 8 * 0.1) / 9, 0.3]
    np.testing.assert_allclose(table.layer_means(layer[None]), [expected], rtol=1e-12)
