"""The kernel regression of the table `kip`, its data, and its solved labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import kip
from benchmarks.shared import kernel_regression as regression
from benchmarks.shared import mnist
from benchmarks.shared.kernel_regression import tangent_kernel
from hypergrad.runtime.compat import enable_x64


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def sample(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, float)


def test_the_kernel_has_its_values_by_hand_for_equal_and_orthogonal_inputs():
    """With d = 2 the covariance of x and y is x . y + 0.01."""
    x, y = jnp.array([[3.0, 0.0]]), jnp.array([[-0.01 / 3, 2.0]])
    variance = 9.01
    np.testing.assert_allclose(tangent_kernel(x, x), 2 * variance + 0.01, rtol=1e-7)
    product = variance * (4.01 + (0.01 / 3) ** 2)
    expected = np.sqrt(product) / np.pi + 0.01
    np.testing.assert_allclose(tangent_kernel(x, y), expected, rtol=1e-7)


def test_the_kernel_is_the_limit_of_wide_networks():
    x, width = sample(4, 3), 200_000

    def network(weights, x):
        w1, b1, w2, b2 = weights
        hidden = jax.nn.relu(w1 @ x * np.sqrt(2 / x.size) + 0.1 * b1)
        return jnp.vdot(w2, hidden) * np.sqrt(2 / width) + 0.1 * b2

    weights = sample(width, 3, seed=1), sample(width, seed=2), sample(width, seed=3)
    gradients = jax.vmap(jax.grad(network), (None, 0))((*weights, jnp.ones(())), x)
    inner = lambda g: jnp.einsum("n...,m...->nm", g, g)
    actual = sum(map(inner, gradients))
    np.testing.assert_allclose(actual, tangent_kernel(x, x), rtol=0.02)


def test_the_kernel_has_exact_derivatives_where_inputs_are_equal():
    x, v = sample(3, 5), sample(3, 5, seed=1)
    f = lambda t: jnp.sum(jnp.sin(tangent_kernel(x + t * v, x + t * v)))
    central = (f(1e-5) - f(-1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(f)(0.0), central, rtol=1e-5)


def test_the_hypergradient_is_that_of_the_composed_loss():
    alpha = {"x": sample(6, 4), "y": sample(6, 2, seed=1)}
    t, y = sample(9, 4, seed=2), sample(9, 2, seed=3)
    outer_loss = lambda w, alpha, batch: regression.squared_error(w, alpha, *batch)
    problem = hg.Bilevel(regression.inner_loss, outer_loss, None, (t, y))

    def composed(alpha):
        kernel = tangent_kernel(alpha["x"], alpha["x"])
        ridge = regression.RIDGE * jnp.trace(kernel) / 6
        dual = jnp.linalg.solve(kernel + ridge * jnp.eye(6), alpha["y"])
        return 0.5 * jnp.mean((tangent_kernel(t, alpha["x"]) @ dual - y) ** 2)

    estimator = regression.make_estimator()
    estimate = hg.hypergradient(problem, estimator)(regression.solution(alpha), alpha)
    value, expected = jax.value_and_grad(composed)(alpha)
    np.testing.assert_allclose(estimate.value, value, rtol=1e-7)
    for name in alpha:
        actual = estimate.hypergradient[name]
        np.testing.assert_allclose(actual, expected[name], rtol=1e-5)


def test_solved_labels_are_a_minimum_of_the_loss_on_all_training_images(monkeypatch):
    train = {"x": sample(40, 4), "y": np.arange(40) % mnist.NUM_CLASSES}
    monkeypatch.setattr(kip, "load", lambda: (train, None, None))
    monkeypatch.setattr(kip, "standardize", jnp.asarray)
    monkeypatch.setattr(kip, "NUM_TRAIN", 40)
    monkeypatch.setattr(kip, "NUM_TARGETS", 10)
    alpha = kip.solve_labels({"x": sample(6, 4, seed=1), "y": None})
    loss = lambda y: regression.squared_error(
        regression.solution(alpha | {"y": y}),
        alpha,
        train["x"],
        mnist.targets_of(train["y"]),
    )
    np.testing.assert_allclose(jax.grad(loss)(alpha["y"]), 0.0, atol=1e-10)
    assert loss(alpha["y"]) < loss(1.01 * alpha["y"])


def test_augmentation_moves_ink_by_at_most_its_shift_and_keeps_flat_images():
    flat = jnp.full((3, mnist.SIDE**2), 0.5)
    moved = mnist.augment(flat, jax.random.key(0), kip.ROTATION, kip.SHIFT)
    np.testing.assert_allclose(moved, flat, rtol=1e-12)
    dot = np.zeros((200, mnist.SIDE, mnist.SIDE))
    dot[:, 13:15, 13:15] = 1.0
    moved = mnist.augment(
        jnp.asarray(dot.reshape(200, -1)), jax.random.key(1), 0.0, 2.0
    )
    moved = np.asarray(moved).reshape(dot.shape)
    rows = (moved.sum(2) @ np.arange(mnist.SIDE)) / moved.sum((1, 2)) - 13.5
    assert np.abs(rows).max() <= 2.0 + 1e-6
    np.testing.assert_allclose(np.std(rows), 2 / np.sqrt(3), rtol=0.15)


def test_samples_have_each_class_equally_often_and_no_image_twice(monkeypatch):
    counts = [5 + c for c in range(mnist.NUM_CLASSES)]
    monkeypatch.setattr(mnist, "load", lambda: (None, None, counts))
    indices = np.asarray(mnist.balanced_indices(jax.random.key(0), 4))
    labels = np.repeat(np.arange(mnist.NUM_CLASSES), counts)[indices]
    assert len(set(indices.tolist())) == 4 * mnist.NUM_CLASSES
    assert np.bincount(labels).tolist() == [4] * mnist.NUM_CLASSES
