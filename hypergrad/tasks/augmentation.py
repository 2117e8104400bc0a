"""Augmentation: how far and how often to transform training images.

Li et al. 2020, DADA (arXiv 2003.03780), sections 3.2 to 3.4. A policy holds a magnitude
m_k and a probability p_k for each operation k. For each image and operation it draws

    b = sigmoid((logit(p_k) + logit(u)) / temperature),  u uniform in (0, 1),

a relaxed Bernoulli gate (equation 6), and applies the operation with strength
``b m_k v``, v uniform in (-1, 1). DADA blends the image with its transform by the gate;
here the gate shrinks the strength, so that one resampling serves all operations on the
grid and a half-open gate is half a rotation, not a double exposure.

The inner loss is the cross-entropy of a small network on training images transformed
anew at every step, and an L2 penalty. The outer loss is the cross-entropy on validation
images as they are. So that a policy can matter, training has few images, all upright,
while validation and test images are turned by up to 45 degrees and moved by up to a
pixel: what a policy has to find out.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import Descent
from ..problem import Batches, Bilevel
from ..validation import as_key
from . import classifier
from .classifier import (
    check_data,
    check_scale,
    check_square,
    held_out_examples,
    losses,
    mask_held_out,
)
from .task import Task

NUM_CLASSES = 10
OPERATIONS = (
    "translate_x", "translate_y", "rotate", "scale", "shear", "contrast", "noise",
)  # fmt: skip
# Pixels, pixels, radians, log of the factor, slope, share of the contrast, grey levels.
MAX_MAGNITUDES = np.array([2.0, 2.0, np.pi / 2, 0.5, 0.7, 0.9, 0.5])
POSE_MAGNITUDES = np.array([1.0, 1.0, np.pi / 4, 0.0, 0.0, 0.0, 0.0])
TEMPERATURE = 0.5  # of the relaxed_gates, as in the paper
# Training and validation images, hidden units; the other images are for testing.
SIZES = {"small": (100, 200, 32), "paper": (4000, 1000, 512)}
SOLVER = Descent(optax.sgd(0.1, momentum=0.9), num_steps=10)


def warp(x: Array, matrix: Array, shift: Array) -> Array:
    """Images [n, side, side] that read theirs at ``c + A (g - c) - t``, bilinearly.

    g is a pixel (row, column), c the centre; beyond the border all is 0.

    Args:
      x: the images.
      matrix, shift: A ``[n, 2, 2]`` and t ``[n, 2]``, in pixels.
    """
    num, side = x.shape[0], x.shape[-1]
    centre = (side - 1) / 2
    axis = jnp.arange(side) - centre
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    places = matrix @ grid[None] + (centre - shift)[..., None]  # [n, 2, side²]
    # A border of zeros one pixel wide, to which everything outside is moved.
    framed = jnp.pad(x, ((0, 0), (1, 1), (1, 1))).reshape(num, -1)
    places = jnp.clip(places + 1, 0, side + 1)
    corner = jnp.minimum(jnp.floor(jax.lax.stop_gradient(places)), side)
    row, column = jnp.moveaxis(corner.astype(int), 1, 0)
    down, right = jnp.moveaxis(places - corner, 1, 0)
    at = lambda i, j: jnp.take_along_axis(
        framed, (row + i) * (side + 2) + column + j, 1
    )
    above = (1 - right) * at(0, 0) + right * at(0, 1)
    below = (1 - right) * at(1, 0) + right * at(1, 1)
    return ((1 - down) * above + down * below).reshape(x.shape)


def transform(x: Array, strength: Array, noise: Array) -> Array:
    """Images [n, side, side] by every operation at its strength, ``[n, 7]``.

    Turned, sheared, scaled and moved; contrast about the image's mean; noise added.
    """
    down, right, angle, log_scale, slope, contrast, level = strength.T
    cos, sin, zero, one = jnp.cos(angle), jnp.sin(angle), 0 * angle, 1 + 0 * angle
    matrix = lambda *rows: jnp.moveaxis(jnp.array(rows), -1, 0)
    turn = matrix((cos, sin), (-sin, cos))
    shear = matrix((one, slope), (zero, one))
    factor = jnp.exp(log_scale)[:, None, None]
    x = warp(x, factor * turn @ shear, jnp.stack([down, right], axis=-1))
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    x = mean + (1 + contrast[:, None, None]) * (x - mean)
    return x + level[:, None, None] * noise


def relaxed_gates(probability: Array, uniform: Array) -> Array:
    """Relaxed Bernoulli variables; above 1/2 with the probability: equation 6."""
    logit = jax.scipy.special.logit
    return jax.nn.sigmoid((logit(probability)[None] + logit(uniform)) / TEMPERATURE)


def augment(alpha: PyTree, x: Array, key: Array) -> Array:
    """Images [n, side, side], each by its own draw from the policy."""
    place_key, noise_key = jax.random.split(key)
    shape = (2, len(x), len(OPERATIONS))
    tiny = jnp.finfo(x.dtype).eps  # a gate's logit is finite
    u, v = jax.random.uniform(place_key, shape, x.dtype, tiny, 1 - tiny)
    gate = relaxed_gates(alpha["probability"], u)
    strength = gate * alpha["magnitude"][None] * (2 * v - 1)
    return transform(x, strength, jax.random.normal(noise_key, x.shape, x.dtype))


def scores(w: PyTree, x: Array) -> Array:
    """A network with one hidden layer of tanh: class scores, ``[n, 10]``."""
    hidden = jnp.tanh(x.reshape(len(x), -1) @ w["W1"] + w["b1"][None])
    return hidden @ w["W2"] + w["b2"][None]


val_loss = classifier.bind_score_fn(classifier.val_loss, scores)
accuracy = classifier.bind_score_fn(classifier.accuracy, scores)


def train_loss(w: PyTree, alpha: PyTree, batch: tuple[PyTree, Array]) -> Array:
    """Cross-entropy on images that the policy transforms, and an L2 penalty."""
    part, key = batch
    transformed = part | {"x": augment(alpha, part["x"], key)}
    # A penalty an example, all the same: batches are made of examples.
    penalty = jnp.mean(part["penalty"]) * optax.tree.norm(w, squared=True)
    return jnp.mean(losses(scores, w, transformed)) + penalty


def pose(x: Array, key: Array) -> Array:
    """Images turned by up to 45 degrees and moved by up to a pixel."""
    place = jax.random.uniform(key, (len(x), len(OPERATIONS)), x.dtype, -1, 1)
    return transform(
        x, jnp.asarray(POSE_MAGNITUDES, x.dtype)[None] * place, jnp.zeros_like(x)
    )


def split(
    data: PyTree, key: Array, sizes: tuple[int, int], hold_out: Array | bool
) -> dict[str, PyTree]:
    """Train, validation, held-out and test examples, by a permutation; images square.

    All but the training images are posed; ``upright`` are the test images before that.
    With ``hold_out`` a quarter of the validation examples are out of use for learning
    and make the held-out set.
    """
    order_key, pose_key = jax.random.split(key)
    order = jax.random.permutation(order_key, len(data["y"]))
    side = int(np.sqrt(data["x"].shape[1]))
    x, y = data["x"][order].reshape(-1, side, side), data["y"][order]
    posed = pose(x, pose_key)
    train, val = slice(None, sizes[0]), slice(sizes[0], sum(sizes))
    test, ones = slice(sum(sizes), None), jnp.ones(len(y), x.dtype)
    part = lambda x, where: {"x": x[where], "y": y[where], "use": ones[where]}
    val_part = mask_held_out(part(posed, val), hold_out, slice(sizes[1] // 4))
    return {
        "train": {"x": x[train], "y": y[train]},
        "val": val_part,
        "held_out": held_out_examples(val_part),
        "test": part(posed, test),
        "upright": part(x, test),
    }


def network(key: Array, num_features: int, num_hidden: int) -> PyTree:
    """Where training begins: normal weights of variance 1 / inputs, no biases."""
    keys = jax.random.split(key)
    layer = lambda key, n, m: jax.random.normal(key, (n, m)) / n**0.5
    return {
        "W1": layer(keys[0], num_features, num_hidden),
        "b1": jnp.zeros(num_hidden),
        "W2": layer(keys[1], num_hidden, NUM_CLASSES),
        "b2": jnp.zeros(NUM_CLASSES),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    penalty: float | Array = 1e-3,
    hold_out: Array | bool = False,
    data: PyTree = None,
    sizes: tuple[int, int, int] | None = None,
) -> Task:
    """Digits: 100 upright ones to train on, 200 posed for validation, 1,497 to test.

    ``alpha`` is ``{"magnitude": [7], "probability": [7]}``, in the order of
    `OPERATIONS`; it starts at a quarter of the largest magnitudes, probability 1/2.

    Args:
      key: of the split, the poses and the network.
      scale: 'small', or 'paper': 4,000 training images (DADA's reduced CIFAR-10), 1,000
        for validation, of the grey ``data`` that is passed.
      data_dir: not read: the digits come with scikit-learn.
      penalty: of the inner L2 term.
      hold_out: keep a quarter of validation out of the outer loss, to choose by.
      data: ``{"x": [n, side²], "y": [n]}`` in place of the digits, classes 0 to 9.
      sizes: training and validation images, hidden units, in place of the scale's.

    Raises:
      TypeError: data of another kind.
      ValueError: another scale, 'paper' without data, fewer examples than sizes, images
        that are not square, other labels.

    >>> import jax, hypergrad as hg
    >>> task = hg.tasks.augmentation.make(key=jax.random.key(0))
    >>> task.alpha["magnitude"].shape
    (7,)
    """
    key = as_key(key)
    del data_dir
    check_scale(scale, data, sum(SIZES["paper"][:2]) + 1)
    num_train, num_val, num_hidden = SIZES[scale] if sizes is None else sizes
    data = datasets.load("digits") if data is None else data
    check_data(data, num_train + num_val + 1, NUM_CLASSES)
    check_square(data["x"])
    data = jax.tree.map(jnp.asarray, data)
    split_key, network_key = jax.random.split(key)
    parts = split(data, split_key, (num_train, num_val), hold_out)
    dtype = data["x"].dtype
    penalties = jnp.full(num_train, jnp.asarray(penalty, dtype))
    train = Batches(parts["train"] | {"penalty": penalties}, with_key=True)
    num_operations = len(OPERATIONS)
    return Task(
        name="augmentation",
        paradigm="supervised",
        source="Li et al. 2020 (arXiv 2003.03780), section 3",
        problem=Bilevel(train_loss, val_loss, train, parts["val"]),
        solver=SOLVER,
        w=network(network_key, data["x"].shape[1], num_hidden),
        alpha={
            "magnitude": jnp.asarray(MAX_MAGNITUDES / 4, dtype),
            "probability": jnp.full(num_operations, 0.5, dtype),
        },
        space={
            "magnitude": spaces.Interval(0.0, MAX_MAGNITUDES, shape=(num_operations,)),
            "probability": spaces.Interval(0.05, 0.95, shape=(num_operations,)),
        },
        metrics={
            "test_accuracy": jax.tree_util.Partial(accuracy, parts["test"]),
            "upright_accuracy": jax.tree_util.Partial(accuracy, parts["upright"]),
        },
    )
