"""Tests of augmentation: transforms, gates, splits and hypergradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage

import hypergrad as hg
from hypergrad.tasks import augmentation
from hypergrad.tasks.augmentation import MAX_MAGNITUDES, OPERATIONS
from tests.tasks.task_cases import DIGITS, assert_close, central_differences

IMAGES = DIGITS["x"][:8].reshape(-1, 8, 8).astype(float)
# Twelve images, three hidden units, and a penalty that makes the solution a minimum.
TASK = augmentation.make(
    key=jax.random.key(2),
    data={"x": DIGITS["x"][:40].astype(float), "y": DIGITS["y"][:40]},
    sizes=(12, 20, 3),
    penalty=0.02,
)


@jax.jit
def transform(strength):
    strength = jnp.broadcast_to(strength, (len(IMAGES), 7))
    return augmentation.transform(IMAGES, strength, jnp.ones_like(IMAGES))


def strengths(**values: float) -> jax.Array:
    """Returns the strengths of some operations; all others are 0."""
    return jnp.array([values.get(name, 0.0) for name in OPERATIONS])


# Transforms.


def test_zero_magnitudes_leave_images_unchanged_to_the_bit(key):
    alpha = {"magnitude": jnp.zeros(7), "probability": jnp.full(7, 0.9)}
    np.testing.assert_array_equal(augmentation.augment(alpha, IMAGES, key), IMAGES)


def test_rotation_by_a_quarter_turn_equals_rot90():
    expected = np.rot90(IMAGES, axes=(1, 2))
    actual = transform(strengths(rotate=np.pi / 2))
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_an_affine_map_equals_scipys_bilinear_interpolation():
    """SciPy needs a frame of zeros around the images to interpolate at the border."""
    shift = np.array([0.3, -0.7])
    rotation = [[np.cos(0.4), np.sin(0.4)], [-np.sin(0.4), np.cos(0.4)]]
    matrix = np.exp(0.2) * np.array(rotation) @ np.array([[1, -0.3], [0, 1]])
    framed_center = np.full(2, 4.5)
    offset = framed_center - shift - matrix @ framed_center
    expected = [
        scipy.ndimage.affine_transform(image, matrix, offset, order=1, cval=0.0)
        for image in np.pad(IMAGES, ((0, 0), (1, 1), (1, 1)))
    ]
    actual = transform(
        strengths(translate_y=0.3, translate_x=-0.7, rotate=0.4, scale=0.2, shear=-0.3)
    )
    np.testing.assert_allclose(actual, np.array(expected)[:, 1:-1, 1:-1], atol=1e-12)


def test_contrast_scales_about_the_mean_and_noise_is_added():
    mean = IMAGES.mean((1, 2))[:, None, None]
    actual = transform(strengths(contrast=-0.5, noise=0.25))
    np.testing.assert_allclose(actual, (IMAGES + mean) / 2 + 0.25, rtol=1e-12)


# The policy.


def test_gates_exceed_one_half_with_their_probability():
    uniform = np.tile(((np.arange(1000) + 0.5) / 1000)[:, None], 3)
    probability = jnp.array([0.1, 0.25, 0.8])
    gates = augmentation.relaxed_gates(probability, uniform)
    np.testing.assert_allclose(jnp.mean(gates > 0.5, axis=0), probability, atol=1e-12)


def test_gradients_of_augmented_images_equal_central_differences(key):
    """A random linear function of the images depends on all fourteen numbers."""
    augment_key, weight_key = jax.random.split(key)
    weights = jax.random.normal(weight_key, IMAGES.shape)
    alpha = {"magnitude": MAX_MAGNITUDES / 3, "probability": np.linspace(0.2, 0.9, 7)}

    @jax.jit
    def value(alpha):
        return jnp.sum(weights * augmentation.augment(alpha, IMAGES, augment_key))

    expected = central_differences(value, alpha, 1e-6)
    assert all(np.abs(leaf).min() > 1e-4 for leaf in expected.values())
    gradient = jax.jit(jax.grad(value))(alpha)
    for name, leaf in expected.items():
        np.testing.assert_allclose(gradient[name], leaf, rtol=1e-6)


def test_the_inner_loss_samples_new_noise_for_every_key():
    loss = jax.jit(lambda batch: augmentation.train_loss(TASK.w, TASK.alpha, batch))
    first, same, other = (
        loss(TASK.problem.inner_data.sample(jax.random.key(i))) for i in (1, 1, 2)
    )
    assert first == same != other


# Splits.


def test_training_images_are_upright_and_all_others_are_posed():
    splits = augmentation.split(DIGITS, jax.random.key(3), (100, 200), True)
    originals = np.asarray(DIGITS["x"]).reshape(-1, 8, 8)
    is_original = lambda x: np.any(np.all(np.asarray(x) == originals, axis=(1, 2)))
    assert all(is_original(x) for x in splits["train"]["x"][:5])
    assert all(is_original(x) for x in splits["upright"]["x"][:5])
    assert not any(is_original(x) for x in splits["val"]["x"][:5])
    assert not any(is_original(x) for x in splits["test"]["x"][:5])
    np.testing.assert_array_equal(splits["test"]["y"], splits["upright"]["y"])


def test_the_paper_scale_has_4000_training_images():
    """The task is built on shapes only."""
    data = {"x": jnp.zeros((5100, 1024)), "y": jnp.zeros(5100, int)}
    make = lambda: augmentation.make(key=jax.random.key(0), scale="paper", data=data)
    w, problem = jax.eval_shape(lambda: (make().w, make().problem))
    assert w["W1"].shape == (1024, 512)
    assert problem.inner_data.data["x"].shape == (4000, 32, 32)


# Hypergradients.


def test_the_unrolled_hypergradient_equals_central_differences():
    """Every step has new noise, but the same key gives the same noise."""
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.2, momentum=0.9), num_steps=3))
    state = estimator.init(TASK.problem, TASK.w, TASK.alpha)

    @jax.jit
    def estimate(alpha):
        return estimator.estimate(TASK.problem, state, alpha, jax.random.key(4))[0]

    value_fn = lambda alpha: estimate(alpha).value
    expected = central_differences(value_fn, TASK.alpha, 1e-6)
    assert_close(estimate(TASK.alpha).hypergradient, expected, 1e-6)
