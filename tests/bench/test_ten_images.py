"""The network of the table `ten_images`, its hypergradient, and its search."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import ten_images
from benchmarks.shared import lenet


def sample(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, float)


@pytest.fixture(scope="module")
def w():
    w = lenet.sample_lenet(jax.random.key(1))
    add_bias = lambda x: x + 0.1 * sample(*x.shape, seed=2) * (x.ndim == 1)
    return jax.tree.map(lambda x: add_bias(x.astype(float)), w)


def scores_by_convolutions(w, x):
    """LeNet with the convolutions and the pooling of JAX."""
    x = x.reshape(-1, 28, 28, 1)
    for name, padding in (("conv1", [(2, 2), (2, 2)]), ("conv2", "VALID")):
        x = jax.lax.conv_general_dilated(
            x, w[name]["kernel"], (1, 1), padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x + w[name]["bias"][None, None, None, :])
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first, as in PyTorch
    for name in ("fc1", "fc2", "fc3"):
        x = x @ w[name]["kernel"] + w[name]["bias"][None, :]
        x = x if name == "fc3" else jax.nn.relu(x)
    return x


def test_scores_and_their_derivatives_are_those_of_convolutions(w):
    x, v = sample(3, 784), sample(3, 10, seed=4)
    expected, pullback = jax.vjp(scores_by_convolutions, w, x)
    actual, actual_pullback = jax.vjp(lenet.scores, w, x)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    for a, b in zip(
        jax.tree.leaves(actual_pullback(v)), jax.tree.leaves(pullback(v)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-10)


@pytest.fixture
def linear(monkeypatch):
    """Replaces the network by softmax regression, which compiles quickly."""
    monkeypatch.setattr(lenet, "scores", lambda w, x: x @ w)
    return 0.1 * sample(4, 10)


def test_the_chunked_loss_has_value_and_gradient_of_the_loss(linear):
    x, y = sample(2 * lenet.CHUNK, 4), np.arange(2 * lenet.CHUNK) % 10
    chunked = lambda w: 3 * lenet.chunked_cross_entropy(w, x, y)
    loss = lambda w: -3 * jnp.mean(jax.nn.log_softmax(x @ w)[np.arange(len(y)), y])
    actual, expected = (jax.value_and_grad(f)(linear) for f in (chunked, loss))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-12)


def test_first_weights_have_the_variances_of_xavier():
    w = lenet.sample_lenet(jax.random.key(0))
    for name, fans in (("conv2", 25 * (6 + 16)), ("fc1", 520), ("fc2", 204)):
        np.testing.assert_allclose(np.var(w[name]["kernel"]), 2 / fans, rtol=0.1)
        assert not np.any(w[name]["bias"])


def three_steps(alpha, w):
    """Three steps of softmax regression, with its gradient by hand."""
    for t in range(3):
        p = jax.nn.softmax(alpha["images"] @ w, axis=1)
        grad = alpha["labels"].sum(1)[:, None] * p - alpha["labels"]
        size = jnp.log1p(jnp.exp(alpha["raw_step_sizes"][t]))
        w = w - size * alpha["images"].T @ grad / len(grad)
    return w


def outer_value(alpha, w, x, y):
    """M after three steps."""
    scores = x @ three_steps(alpha, w)
    return -jnp.mean(jax.nn.log_softmax(scores)[np.arange(len(y)), y])


def test_the_hypergradient_is_that_of_three_explicit_steps(linear):
    x, y = sample(lenet.CHUNK, 4, seed=3), np.arange(lenet.CHUNK) % 10
    alpha = ten_images.with_step_size(sample(2, 4, seed=5), 0.5)
    alpha["raw_step_sizes"] += jnp.array([0.3, 0.0, -0.4])
    alpha["labels"] = sample(2, 10, seed=6)
    problem = hg.Bilevel(
        ten_images.inner_loss, ten_images.outer_loss, None, {"x": x, "y": y}
    )
    estimator = hg.Unrolled(ten_images.SOLVER)
    estimate = hg.hypergradient(problem, estimator)(linear, alpha)
    value, expected = jax.value_and_grad(outer_value)(alpha, linear, x, y)
    np.testing.assert_allclose(estimate.value, value, rtol=1e-10)
    for name in alpha:
        actual = estimate.hypergradient[name]
        np.testing.assert_allclose(actual, expected[name], atol=1e-10)
        assert np.abs(actual).max() > 1e-4


def test_the_outer_rate_is_halved_after_each_tenth():
    optimizer = ten_images.outer_optimizer(ten_images.Length(40, 64, 0.01))
    state, sizes = optimizer.init(0.0), []
    for _ in range(40):  # Adam moves by its rate where all gradients are equal
        update, state = optimizer.update(jnp.asarray(1.0), state)
        sizes.append(-np.asarray(update))
    expected = 0.01 * 0.5 ** (np.arange(40) // 4)
    np.testing.assert_allclose(sizes, expected, rtol=1e-6)


def test_inner_step_sizes_are_used_in_their_order():
    alpha = {"raw_step_sizes": jnp.log(jnp.expm1(jnp.array([0.1, 0.2, 0.4])))}
    optimizer = ten_images.inner_optimizer(alpha)
    state, updates = optimizer.init(0.0), []
    for _ in range(3):
        update, state = optimizer.update(jnp.asarray(1.0), state)
        updates.append(-np.asarray(update))
    np.testing.assert_allclose(updates, [0.1, 0.2, 0.4], rtol=1e-6)
    assert isinstance(optimizer, optax.GradientTransformation)


def test_the_search_takes_the_best_of_all_sets_and_sizes(linear, monkeypatch):
    train = {"x": sample(70, 4, seed=3), "y": np.arange(70) % 10}
    monkeypatch.setattr(ten_images, "load_data", lambda: (train, None))
    monkeypatch.setattr(ten_images, "NUM_SCORED", 70)
    monkeypatch.setattr(ten_images, "STEP_SIZES", (0.01, 3.0))
    sets = [train["x"][:10], train["x"][10:20]]
    trained, _, fields = ten_images.best_step_size(sets, linear, jax.random.key(0))
    pairs = [(x, size) for x in sets for size in (0.01, 3.0)]
    labels = jnp.eye(10)

    def accuracy(images, size):
        raw = jnp.log(jnp.expm1(jnp.full(3, size)))
        alpha = {"images": images, "labels": labels, "raw_step_sizes": raw}
        w = three_steps(alpha, linear)
        return 100 * float(np.mean(np.argmax(train["x"] @ w, 1) == train["y"]))

    values = [accuracy(*pair) for pair in pairs]
    assert len(set(values)) > 1
    actual = ten_images.accuracy(trained(linear), train["x"], train["y"])
    np.testing.assert_allclose(actual, max(values), rtol=1e-6)
    best = pairs[int(np.argmax(values))][1]
    np.testing.assert_allclose(fields["step_size_3"], best, rtol=1e-6)
