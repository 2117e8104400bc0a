"""The losses, attacks and splits of the table `poisoning`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared import poisoning_data as data
from benchmarks.shared.poisoning_methods import (
    ApproximateGradient,
    GradientPenalty,
    PenaltyMemory,
    update_penalty,
)
from hypergrad.problem import EstimateData

PIXELS = 3


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    one_hot = lambda n: jnp.asarray(np.eye(10)[rng.integers(0, 10, n)])
    images = lambda n: jnp.asarray(rng.uniform(size=(n, PIXELS)))
    train = {"x": images(20), "y": one_hot(20), "wrong_y": one_hot(20)}
    alpha = (images(2), images(5))
    w = jnp.asarray(rng.normal(size=(2, 10, PIXELS)))
    return train, {"x": images(15), "y": one_hot(15)}, alpha, w


@pytest.fixture(scope="module")
def problem(batches):
    train, val, _, _ = batches
    return hg.Bilevel(data.inner_loss, data.untargeted_loss, train, val)


def test_the_inner_loss_is_that_of_each_attack(batches):
    """The code of the authors in numpy: 0.5 * 0.01 * l2_loss, l2_loss = ||w||^2 / 2."""
    train, _, alpha, w = batches
    expected = 0.0
    for model, images in zip(np.asarray(w), alpha, strict=True):
        x = np.concatenate([train["x"], images])
        y = np.concatenate([train["y"], train["wrong_y"][: len(images)]])
        scores = x @ model.T
        log_p = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
        expected -= np.mean(np.sum(y * log_p, axis=1))
        expected += 0.5 * 0.01 * np.sum(model**2) / 2
    actual = data.inner_loss(w, alpha, train)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_outer_losses_are_opposite_mean_losses(batches):
    _, val, alpha, w = batches
    total = optax.softmax_cross_entropy(
        jnp.einsum("acd,nd->anc", w, val["x"]), val["y"][None]
    )
    expected = jnp.sum(jnp.mean(total, axis=1))
    np.testing.assert_allclose(data.targeted_loss(w, alpha, val), expected, rtol=1e-12)
    np.testing.assert_allclose(
        data.untargeted_loss(w, alpha, val), -expected, rtol=1e-12
    )


@jax.jit
def dense_step(w, alpha, train, val):
    """Returns ``w`` and the direction after two steps of w and v, by dense matrices."""
    inner = lambda x, alpha: data.inner_loss(x.reshape(w.shape), alpha, train)
    outer = lambda x: data.untargeted_loss(x.reshape(w.shape), alpha, val)
    x = w.ravel()
    for _ in range(2):
        x -= 0.1 * jax.grad(inner)(x, alpha)
    A = jax.hessian(inner)(x, alpha) + 0.05 * jnp.eye(x.size)
    b, v = jax.grad(outer)(x), jnp.zeros_like(x)
    for _ in range(2):
        v -= 0.02 * A.T @ (A @ v - b)  # rate 0.01 on the squared residual
    cross = jax.jacfwd(jax.grad(inner, argnums=1))(x, alpha)
    return x, [-J @ v for J in cross]


def test_a_step_of_the_approximate_gradient_is_that_of_dense_matrices(problem, batches):
    train, val, alpha, w = batches
    method = ApproximateGradient(optax.sgd(0.1), optax.sgd(0.01), 2, 0.05)
    state = method.init(problem, w, alpha)
    estimate, _ = jax.jit(method.estimate)(problem, state, alpha, jax.random.key(0))
    x, direction = dense_step(w, alpha, train, val)
    np.testing.assert_allclose(estimate.w.ravel(), x, rtol=1e-9)
    for actual, expected in zip(estimate.hypergradient, direction, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-12)


def penalty_step(problem, batches, eps):
    """Returns a step without moves of w, whose outer optimizer is gradient descent."""
    _, _, alpha, w = batches
    method = GradientPenalty(optax.sgd(0.0), optax.sgd(1e-3), 1, 3.0, 2.0, eps)
    nu = jax.random.normal(jax.random.key(1), w.shape, float)
    state = method.init(problem, w, alpha)
    state = eqx.tree_at(lambda state: state.memory.nu, state, nu)
    sample = EstimateData.sample(problem, jax.random.key(0))
    step, state = method.step(problem, state, alpha, sample)
    return nu, step, state


def test_the_step_of_the_penalty_is_along_the_gradient_of_h(problem, batches):
    train, val, alpha, w = batches
    nu, step, state = penalty_step(problem, batches, 0.0)

    def h(alpha):
        g = jax.grad(data.inner_loss)(w, alpha, train)
        outer = data.untargeted_loss(w, alpha, val)
        return outer + jnp.vdot(nu, g) + 1.5 * jnp.vdot(g, g)

    gradient = jax.grad(h)(alpha)
    for x, moved, expected in zip(alpha, step.direction, gradient, strict=True):
        new = jnp.clip(x - 1e-3 * expected, 0, 1)
        np.testing.assert_allclose(x - moved, new, rtol=1e-9)
    np.testing.assert_array_equal(state.memory.nu, nu)
    np.testing.assert_array_equal(state.memory.rho, [3.0, 3.0])


def test_the_model_of_the_penalty_descends_on_h_and_the_inner_loss(problem, batches):
    train, val, alpha, w = batches
    method = GradientPenalty(optax.sgd(1e-3), optax.sgd(0.0), 1, 3.0, 2.0, 0.0)
    state = method.init(problem, w, alpha)
    sample = EstimateData.sample(problem, jax.random.key(0))
    _, state = method.step(problem, state, alpha, sample)

    def h(w):
        g = jax.grad(data.inner_loss)(w, alpha, train)
        inner = data.inner_loss(w, alpha, train)
        return data.untargeted_loss(w, alpha, val) + 1.5 * jnp.vdot(g, g) + 2 * inner

    np.testing.assert_allclose(state.w, w - 1e-3 * jax.grad(h)(w), rtol=1e-9)


def test_the_penalty_is_updated_where_an_attack_has_converged():
    ones, g = jnp.ones(2), jnp.ones((2, 1, 1))
    memory = PenaltyMemory(None, 0 * g, 10 * ones, 100 * ones, ones, ones)
    new = update_penalty(memory, jnp.array([True, False]), g)
    np.testing.assert_allclose(new.rho, [11, 10])
    np.testing.assert_allclose(new.lam, [90, 100])
    np.testing.assert_allclose(new.eps, [0.9, 1])
    np.testing.assert_allclose(new.rate, [0.9, 1])
    np.testing.assert_allclose(new.nu.ravel(), [11, 0])  # the new rho times g


@pytest.mark.parametrize("attack", data.ATTACKS)
def test_labels_are_wrong_and_every_prefix_is_balanced(attack):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 100)
    order = data.order_images(attack, labels, rng)
    assert np.array_equal(np.sort(order), np.arange(1000))
    ordered = labels[order]
    wrong = data.wrong_labels(attack, ordered, rng)
    for count in data.COUNTS:
        assert np.all(wrong[:count] != ordered[:count])
        if attack == "targeted":
            assert np.sum(ordered[:count] == 3) == np.sum(wrong[:count] == 3)
            assert set(ordered[:count]) == {3, 8}


def test_splits_of_an_untargeted_attack_share_no_image():
    splits = data.split_indices(
        "untargeted", np.zeros(70_000), np.random.default_rng(0)
    )
    assert [len(split) for split in splits] == [1_000, 1_000, 8_000]
    assert len(np.unique(np.concatenate(splits))) == 10_000
    assert max(np.max(split) for split in splits) < 60_000


def test_splits_of_a_targeted_attack_have_the_sizes_of_the_authors():
    y = np.arange(70_000) % 10
    train, val, test = data.split_indices("targeted", y, np.random.default_rng(0))
    assert np.bincount(y[train]).tolist() == [100] * 10
    assert np.max(train) < 2_000 <= np.min(val)
    assert np.max(val) < 60_000 <= np.min(test)
    assert len(np.unique(val)) == 400
    assert len(np.unique(test)) == 500
    assert set(y[val]) == set(y[test]) == {8}
