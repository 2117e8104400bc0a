"""MNIST for distillation: class-balanced samples, and targets of regressions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, ArrayLike

import hypergrad as hg

NUM_CLASSES, NUM_TRAIN, SIDE = 10, 60_000, 28


@functools.cache
def load() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[int]]:
    """Returns training images sorted by class, test images, and counts of classes."""
    data = hg.datasets.load("mnist")
    order = np.argsort(data["y"][:NUM_TRAIN], kind="stable")
    train = {name: data[name][:NUM_TRAIN][order] for name in ("x", "y")}
    test = {name: data[name][NUM_TRAIN:] for name in ("x", "y")}
    return train, test, np.bincount(train["y"]).tolist()


@functools.cache
def scaling() -> tuple[float, float]:
    """Returns mean and standard deviation of the pixels of the training images."""
    pixels = load()[0]["x"].astype(float)
    return float(pixels.mean()), float(pixels.std())


def standardize(x: ArrayLike) -> Array:
    """Returns images in float64, with mean 0 and variance 1 over all pixels."""
    mean, deviation = scaling()
    return (jnp.asarray(x, float) - mean) / deviation


def targets_of(y: ArrayLike) -> Array:
    """Returns one-hot labels minus their mean."""
    return jax.nn.one_hot(y, NUM_CLASSES, dtype=float) - 1 / NUM_CLASSES


def balanced_indices(key: Array, num_per_class: int) -> Array:
    """Returns indices of as many training images of each class, without repetition."""
    counts = load()[2]
    firsts = np.concatenate([[0], np.cumsum(counts)])
    keys = jax.random.split(key, NUM_CLASSES)
    return jnp.concatenate(
        [
            first + jax.random.permutation(k, count)[:num_per_class]
            for k, first, count in zip(keys, firsts, counts, strict=False)
        ]
    )


def augment(x: Array, key: Array, max_angle: float, max_shift: float) -> Array:
    """Returns images that are rotated and shifted at random, around their centre."""

    def move(image: Array, numbers: Array) -> Array:
        angle, shift = max_angle * numbers[0], max_shift * numbers[1:]
        c, s = jnp.cos(angle), jnp.sin(angle)
        center = jnp.asarray((SIDE - 1) / 2, x.dtype)
        i, j = jnp.mgrid[:SIDE, :SIDE] - center
        rows, columns = c * i - s * j + shift[0], s * i + c * j + shift[1]
        image = image.reshape(SIDE, SIDE)
        points = (rows + center, columns + center)
        return map_coordinates(image, points, order=1, mode="nearest").ravel()

    numbers = jax.random.uniform(key, (len(x), 3), x.dtype, -1.0, 1.0)
    return jax.vmap(move)(x, numbers)
