"""Augmentation: the transforms against NumPy, hypergradients against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage

import hypergrad as hg
from hypergrad.tasks import augmentation as task_file
from hypergrad.tasks.augmentation import MAX_MAGNITUDES, OPERATIONS

DIGITS = jax.tree.map(jnp.asarray, hg.datasets.load("digits"))
IMAGES = DIGITS["x"][:8].reshape(-1, 8, 8).astype(float)


@jax.jit
def transformed(strength, x=IMAGES):
    strength = jnp.broadcast_to(strength, (len(x), 7))
    return task_file.transform(x, strength, jnp.ones_like(x))


def only(name: str, strength: float):
    return jnp.zeros(7).at[OPERATIONS.index(name)].set(strength)


def test_at_zero_magnitude_images_stay(key):
    """To the bit, whatever the gates."""
    alpha = {"magnitude": jnp.zeros(7), "probability": jnp.full(7, 0.9)}
    found = task_file.augment(alpha, IMAGES, key)
    np.testing.assert_array_equal(found, IMAGES)


def test_a_quarter_turn_is_rot90():
    """All four of them, and -90 degrees."""
    for turns in (1, 2, 3, -1):
        found = transformed(only("rotate", turns * np.pi / 2))
        expected = np.rot90(IMAGES, turns, axes=(1, 2))
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_whole_pixels_shift_and_zeros_come_in():
    """Down two, right three."""
    found = transformed(only("translate_x", 2.0) + only("translate_y", 3.0))
    expected = np.zeros((8, 8, 8))
    expected[:, 2:, 3:] = IMAGES[:, :-2, :-3]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_any_affine_map_is_scipys():
    """Bilinear with zeros outside, inside the frame where both know the same pixels."""
    strength = jnp.array([0.3, -0.7, 0.4, 0.2, -0.3, 0.0, 0.0])
    found = transformed(strength)
    cos, sin = np.cos(0.4), np.sin(0.4)
    matrix = np.exp(0.2) * np.array([[cos, sin], [-sin, cos]])
    matrix = matrix @ np.array([[1, -0.3], [0, 1]])
    centre = np.full(2, 3.5)
    offset = centre - np.array([0.3, -0.7]) - matrix @ centre
    framed = np.pad(IMAGES, ((0, 0), (1, 1), (1, 1)))
    corner = np.ones(2)  # the frame moves the origin
    expected = [
        scipy.ndimage.affine_transform(
            image, matrix, offset + corner - matrix @ corner, order=1, cval=0.0
        )[1:-1, 1:-1]
        for image in framed
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_contrast_and_noise_are_their_formulas():
    """About each image's mean; the noise times its level."""
    mean = IMAGES.mean((1, 2))[:, None, None]
    found = transformed(only("contrast", -0.5) + only("noise", 0.25))
    np.testing.assert_allclose(found, (IMAGES + mean) / 2 + 0.25, rtol=1e-12)


def test_a_gate_is_open_with_its_probability():
    """Above 1/2 for a share p of uniform numbers."""
    uniform = (np.arange(1000) + 0.5) / 1000
    p = jnp.array([0.1, 0.25, 0.8])
    b = task_file.relaxed_gates(p, jnp.broadcast_to(uniform[:, None], (1000, 3)))
    np.testing.assert_allclose(jnp.mean(b > 0.5, axis=0), p, atol=1e-12)


def test_gradients_by_magnitude_and_probability_are_central_differences(key):
    """Of a random linear function of the images, each of the fourteen apart."""
    draw, direction = jax.random.split(key)
    weight = jax.random.normal(direction, IMAGES.shape)
    alpha = {"magnitude": MAX_MAGNITUDES / 3, "probability": np.linspace(0.2, 0.9, 7)}

    @jax.jit
    def value(alpha):
        return jnp.sum(weight * task_file.augment(alpha, IMAGES, draw))

    found = jax.grad(value)(alpha)
    for name in alpha:
        for k in range(7):
            moved = lambda step, name=name, k=k: value(
                alpha | {name: alpha[name] + step * np.eye(7)[k]}
            )
            expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
            assert abs(expected) > 1e-4
            np.testing.assert_allclose(found[name][k], expected, rtol=1e-6)


@pytest.fixture(scope="module")
def task() -> hg.tasks.Task:
    """Twelve images, three hidden units, a penalty that makes the point a minimum."""
    thin = {"x": DIGITS["x"][:40].astype(float), "y": DIGITS["y"][:40]}
    key = jax.random.key(2)
    return task_file.make(key=key, data=thin, sizes=(12, 20, 3), penalty=0.02)


def differences(value, alpha, step):
    """Of ``value(alpha)``, along every one of the fourteen."""
    flat, unravel = jax.flatten_util.ravel_pytree(alpha)
    ahead = [value(unravel(flat + step * e)) for e in np.eye(flat.size)]
    behind = [value(unravel(flat - step * e)) for e in np.eye(flat.size)]
    return unravel((jnp.array(ahead) - jnp.array(behind)) / (2 * step))


def close(found, expected, rtol):
    for name in expected:
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], atol=rtol * size)


def test_the_unrolled_hypergradient_is_that_of_the_whole_pipeline(task):
    """With fresh noise at every step, the same in every run by the same key."""
    descent = hg.Descent(optax.sgd(0.2, momentum=0.9), num_steps=3)
    estimator, key = hg.Unrolled(descent), jax.random.key(4)
    state = estimator.init(task.problem, task.w, task.alpha)

    @jax.jit
    def estimate(alpha):
        return estimator.estimate(task.problem, state, alpha, key)[0]

    found = estimate(task.alpha).hypergradient
    expected = differences(lambda alpha: estimate(alpha).value, task.alpha, 1e-6)
    close(found, expected, 1e-6)


@pytest.mark.slow
def test_the_implicit_hypergradient_is_that_of_the_whole_pipeline(task):
    """With one draw of the noise, on which training converges."""
    problem = task.problem
    batch = problem.inner_data.data, jax.random.key(3)
    still = hg.Bilevel(
        task_file.train_loss, task_file.val_loss, batch, problem.outer_data
    )
    solver = hg.Newton()

    @jax.jit
    def trained(w, alpha):
        return solver.solve(still.inner_loss, w, alpha, batch, jax.random.key(0))[0]

    @jax.jit
    def value(alpha):
        return still.outer_loss(trained(w, alpha), alpha, still.outer_data)

    w = trained(task.w, task.alpha)
    found = hg.hypergradient(still, hg.Implicit(solver))(w, task.alpha)
    assert found.stats["trusted"]
    close(found.hypergradient, differences(value, task.alpha, 1e-5), 1e-5)


def test_each_step_of_training_sees_fresh_noise(task):
    """Two draws of the batch differ, and the same key gives the same one."""
    data = task.problem.inner_data
    one, same, other = (data.sample(jax.random.key(i)) for i in (1, 1, 2))
    loss = jax.jit(lambda batch: task_file.train_loss(task.w, task.alpha, batch))
    assert loss(one) == loss(same) != loss(other)


def test_only_validation_and_test_images_are_posed():
    """And the test images are the upright ones, posed within their bounds."""
    parts = task_file.split(DIGITS, jax.random.key(3), (100, 200), True)
    pixels = np.asarray(DIGITS["x"]).reshape(-1, 8, 8)
    among = lambda x: np.any(np.all(np.asarray(x) == pixels, axis=(1, 2)))
    assert all(among(x) for x in parts["train"]["x"][:5])
    assert not any(among(x) for x in parts["val"]["x"][:5])
    assert parts["test"]["x"].shape == parts["upright"]["x"].shape == (1497, 8, 8)
    np.testing.assert_array_equal(parts["test"]["y"], parts["upright"]["y"])
    assert jnp.sum(parts["held_out"]["use"]) == 50
    np.testing.assert_array_equal(parts["held_out"]["use"] + parts["val"]["use"], 1)


def test_the_paper_scale_takes_the_papers_counts():
    """On shapes alone: 4,000 images of 32 x 32 to train on."""
    data = {"x": jnp.zeros((5100, 1024)), "y": jnp.zeros(5100, int)}
    make = lambda: task_file.make(key=jax.random.key(0), scale="paper", data=data)
    task = jax.eval_shape(lambda: (make().w, make().problem))
    assert task[0]["W1"].shape == (1024, 512)
    assert task[1].inner_data.data["x"].shape == (4000, 32, 32)


def test_bad_sizes_and_scales_are_refused():
    """With what to do."""
    with pytest.raises(ValueError, match=r"'paper' needs data=.*5,001"):
        task_file.make(key=jax.random.key(0), scale="paper")
    with pytest.raises(ValueError, match="'small' or 'paper'; got 'large'"):
        task_file.make(key=jax.random.key(0), scale="large")
    with pytest.raises(ValueError, match="pass more data or smaller sizes"):
        task_file.make(key=jax.random.key(0), sizes=(1000, 797, 3))
