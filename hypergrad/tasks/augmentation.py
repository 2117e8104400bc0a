"""Augmentation: learns how strongly and how often to transform training images.

Li et al. 2020, DADA (arXiv 2003.03780), sections 3.2 to 3.4. A policy has a magnitude
m_k and a probability p_k for each operation k. For each image and operation it samples
a relaxed Bernoulli gate (equation 6),

    b = sigmoid((logit(p_k) + logit(u)) / temperature),  u uniform in (0, 1),

and applies the operation with strength ``b m_k v``, v uniform in (-1, 1). DADA uses the
gate to blend the image with its transform. Here the gate shrinks the strength, so that
one resampling of the grid serves all operations, and a half-open gate is half a
rotation instead of two superimposed images.

The inner loss is the cross-entropy of a small network on training images that are
transformed anew at every step, plus an L2 penalty. The outer loss is the cross-entropy
on untransformed validation images. The training images are few and upright, while
validation and test images are rotated by up to 45 degrees and shifted by up to a pixel;
the policy has to learn these transforms.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..batches import Batches
from ..inner import Descent
from ..metrics import Metric
from ..problem import Bilevel
from ..trees import without_derivative
from ..validation import as_key
from . import classifier
from .classifier import (
    check_scale,
    check_square,
    held_out_examples,
    load_data,
    losses,
    mask_held_out,
    random_order,
)
from .task import (
    Task,
    as_coefficient,
    as_sizes,
    check_at_least_zero,
    check_booleans,
    check_choice,
    has_held_out,
    loss_metric,
)

NUM_CLASSES = 10
OPERATIONS = (
    "translate_y", "translate_x", "rotate", "scale", "shear", "contrast", "noise",
)  # fmt: skip
# Units: pixels, pixels, radians, log of the factor, slope, fraction of the contrast,
# gray levels.
MAX_MAGNITUDES = np.array([2.0, 2.0, np.pi / 2, 0.5, 0.7, 0.9, 0.5])
POSE_MAGNITUDES = np.array([1.0, 1.0, np.pi / 4, 0.0, 0.0, 0.0, 0.0])
TEMPERATURE = 0.5  # of the gates, as in the paper
# Numbers of training images, validation images and hidden units; the rest is for
# testing.
SIZES = {"small": (100, 200, 32), "paper": (4000, 1000, 512)}
SOLVER = Descent(optax.sgd(0.1, momentum=0.9), num_steps=10)


def warp(
    x: Float[Array, "n side side"],
    matrix: Float[Array, "n 2 2"],
    shift: Float[Array, "n 2"],
) -> Float[Array, "n side side"]:
    """Returns images under an affine map of their pixels, by bilinear interpolation.

    The value of the result at a pixel g = (row, column) is the value of the image at
    ``c + A (g - c) - t``, where c is the center. Images are zero outside their border.

    Args:
      x: Images.
      matrix: A, per image.
      shift: t in pixels, per image.
    """
    num, side = x.shape[0], x.shape[-1]
    center = (side - 1) / 2
    axis = jnp.arange(side) - center
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    # Positions c + A (g - c) - t for all g, [n, 2, pixels].
    positions = matrix @ grid[None] + (center - shift)[..., None]
    # Positions outside the image are clipped to a frame of zeros, one pixel wide.
    framed = jnp.pad(x, ((0, 0), (1, 1), (1, 1))).reshape(num, -1)
    positions = jnp.clip(positions + 1, 0, side + 1)
    corner = jnp.minimum(without_derivative(jnp.floor(positions)), side)
    row, column = jnp.moveaxis(corner.astype(int), 1, 0)
    row_weight, column_weight = jnp.moveaxis(positions - corner, 1, 0)
    pixel_values = lambda i, j: jnp.take_along_axis(
        framed, (row + i) * (side + 2) + column + j, 1
    )
    upper, lower = (
        (1 - column_weight) * pixel_values(i, 0) + column_weight * pixel_values(i, 1)
        for i in (0, 1)
    )
    return ((1 - row_weight) * upper + row_weight * lower).reshape(x.shape)


def transform(
    x: Float[Array, "n side side"],
    strength: Float[Array, "n 7"],
    noise: Float[Array, "n side side"],
) -> Float[Array, "n side side"]:
    """Returns images transformed by every operation at its strength.

    The images are rotated, sheared, scaled and shifted. Then their contrast changes
    about the mean of each image, and the noise is added.

    Args:
      x: Images.
      strength: Strengths in the order of `OPERATIONS`.
      noise: Noise, which is multiplied by its strength.
    """
    rows, columns, angle, log_scale, slope, contrast, level = strength.T
    cos, sin, zeros, ones = jnp.cos(angle), jnp.sin(angle), 0 * angle, 1 + 0 * angle
    stack_rows = lambda *rows: jnp.moveaxis(jnp.array(rows), -1, 0)
    rotation = stack_rows((cos, sin), (-sin, cos))
    shear = stack_rows((ones, slope), (zeros, ones))
    factor = jnp.exp(log_scale)[:, None, None]
    shift = jnp.stack([rows, columns], axis=-1)
    x = warp(x, factor * rotation @ shear, shift)
    mean = jnp.mean(x, axis=(1, 2), keepdims=True)
    x = mean + (1 + contrast[:, None, None]) * (x - mean)
    return x + level[:, None, None] * noise


def relaxed_gates(
    probability: Float[Array, " k"], uniform: Float[Array, "n k"]
) -> Float[Array, "n k"]:
    """Returns relaxed Bernoulli variables, which exceed 1/2 with the probability."""
    logit = jax.scipy.special.logit
    # Equation 6: b = sigmoid((logit(p) + logit(u)) / temperature).
    return jax.nn.sigmoid((logit(probability)[None] + logit(uniform)) / TEMPERATURE)


def augment(
    alpha: PyTree, x: Float[Array, "n side side"], key: Array
) -> Float[Array, "n side side"]:
    """Returns images that the policy transforms, each by its own random strengths."""
    gate_key, noise_key = jax.random.split(key)
    shape = (2, len(x), len(OPERATIONS))
    eps = jnp.finfo(x.dtype).eps  # keeps the logit of u finite
    u, v = jax.random.uniform(gate_key, shape, x.dtype, eps, 1 - eps)
    # The strength is b m v; 2 v - 1 is uniform in (-1, 1).
    gates = relaxed_gates(alpha["probability"], u)
    strength = gates * alpha["magnitude"][None] * (2 * v - 1)
    return transform(x, strength, jax.random.normal(noise_key, x.shape, x.dtype))


def scores(w: PyTree, x: Float[Array, "n side side"]) -> Float[Array, "n classes"]:
    """Returns the scores of a network with one hidden tanh layer."""
    hidden = jnp.tanh(x.reshape(len(x), -1) @ w["W1"] + w["b1"][None])
    return hidden @ w["W2"] + w["b2"][None]


val_loss = classifier.bind_score_fn(classifier.val_loss, scores)
accuracy = classifier.bind_score_fn(classifier.accuracy, scores)


def train_loss(w: PyTree, alpha: PyTree, batch: tuple[PyTree, Array]) -> Array:
    """Returns the cross-entropy of transformed images plus an L2 penalty."""
    examples, key = batch
    transformed = examples | {"x": augment(alpha, examples["x"], key)}
    # A batch consists of examples, so the penalty is stored once per example.
    penalty = jnp.mean(examples["penalty"]) * optax.tree.norm(w, squared=True)
    return jnp.mean(losses(scores, w, transformed)) + penalty


def pose(x: Float[Array, "n side side"], key: Array) -> Float[Array, "n side side"]:
    """Returns images rotated by up to 45 degrees and shifted by up to a pixel."""
    fraction = jax.random.uniform(key, (len(x), len(OPERATIONS)), x.dtype, -1, 1)
    strength = jnp.asarray(POSE_MAGNITUDES, x.dtype)[None] * fraction
    return transform(x, strength, jnp.zeros_like(x))


def split(
    data: PyTree, key: Array, sizes: tuple[int, int], hold_out: Array | bool
) -> dict[str, PyTree]:
    """Returns square training, validation, held-out and test images.

    All images except the training images are posed. The split ``upright`` contains the
    test images before that.

    Args:
      data: ``{"x": [n, side * side], "y": [n]}``.
      key: PRNG key of the permutation and of the poses.
      sizes: Numbers of training and validation images.
      hold_out: Whether a quarter of the validation images has ``use`` 0; these images
        are the held-out split.
    """
    order_key, pose_key = jax.random.split(key)
    order = random_order(data, order_key)
    side = int(np.sqrt(data["x"].shape[1]))
    x, y = data["x"][order].reshape(-1, side, side), data["y"][order]
    posed = pose(x, pose_key)
    num_train, num_val = sizes
    val_index = slice(num_train, num_train + num_val)
    test_index = slice(num_train + num_val, None)
    ones = jnp.ones(len(y), x.dtype)
    select = lambda x, index: {"x": x[index], "y": y[index], "use": ones[index]}
    val = mask_held_out(select(posed, val_index), hold_out, slice(num_val // 4))
    return {
        "train": {"x": x[:num_train], "y": y[:num_train]},
        "val": val,
        "held_out": held_out_examples(val),
        "test": select(posed, test_index),
        "upright": select(x, test_index),
    }


def init_network(key: Array, num_features: int, num_hidden: int) -> PyTree:
    """Returns normal weights of variance 1 / inputs, and zero biases."""
    keys = jax.random.split(key)
    init_matrix = lambda key, n, m: jax.random.normal(key, (n, m)) / n**0.5
    return {
        "W1": init_matrix(keys[0], num_features, num_hidden),
        "b1": jnp.zeros(num_hidden),
        "W2": init_matrix(keys[1], num_hidden, NUM_CLASSES),
        "b2": jnp.zeros(NUM_CLASSES),
    }


def make_metrics(splits: PyTree, hold_out: Array | bool) -> dict[str, Metric]:
    """Returns the accuracies, and those of held-out images if there are any."""
    num_val = len(splits["val"]["y"])
    metrics = {
        "test_accuracy": jax.tree_util.Partial(accuracy, splits["test"]),
        "upright_accuracy": jax.tree_util.Partial(accuracy, splits["upright"]),
    }
    if has_held_out(hold_out, num_val // 4, num_val):
        metrics |= {
            "held_out_accuracy": jax.tree_util.Partial(accuracy, splits["held_out"]),
            "held_out_loss": loss_metric(val_loss, splits["held_out"]),
        }
    return metrics


def make(
    *,
    key: Array,
    scale: str = "small",
    penalty: float | Array = 1e-3,
    hold_out: Array | bool = False,
    data: PyTree = None,
    sizes: Sequence[int] | None = None,
) -> Task:
    """Returns a classifier of images whose augmentation policy is learned.

    On the digits 100 upright images are for training, 200 posed images for validation
    and 1,497 for testing. ``alpha`` is ``{"magnitude": [7], "probability": [7]}`` in
    the order of `OPERATIONS`. It starts at a quarter of the largest magnitudes with
    probability 1/2.

    Args:
      key: PRNG key of the split, the poses and the initial network.
      scale: 'small', or 'paper' for 4,000 training images (as in the reduced CIFAR-10
        of DADA) and 1,000 validation images, which needs gray images as ``data``.
      penalty: Factor of the inner L2 penalty.
      hold_out: Whether a quarter of the validation images is excluded from the outer
        loss, for choosing settings by the metrics ``held_out_accuracy`` and
        ``held_out_loss``. If it is traced and False, these metrics are NaN.
      data: ``{"x": [n, side * side], "y": [n]}`` with classes 0 to 9. Defaults to the
        digits.
      sizes: Numbers of training images, validation images and hidden units. Defaults to
        the sizes of the scale.

    Raises:
      TypeError: ``penalty``, ``sizes``, ``hold_out`` or an array of ``data`` has
        another type.
      ValueError: ``scale`` is unknown or needs data, ``penalty`` is negative or not
        finite, ``sizes`` are not three positive integers or too small for ``hold_out``,
        or ``data`` has too few examples, images that are not square, or other labels.

    >>> import jax, hypergrad as hg
    >>> task = hg.tasks.augmentation.make(key=jax.random.key(0))
    >>> task.alpha["magnitude"].shape
    (7,)
    """
    key = as_key(key)
    check_choice("scale", scale, tuple(SIZES))
    check_booleans(hold_out=hold_out)
    check_at_least_zero(penalty=penalty)
    num_train, num_val, num_hidden = as_sizes(sizes, SIZES[scale])
    num_needed = num_train + num_val + 1
    check_scale(scale, data, num_needed)
    data = load_data(data, "digits", num_needed, NUM_CLASSES)
    check_square(data["x"])
    split_key, network_key = jax.random.split(key)
    splits = split(data, split_key, (num_train, num_val), hold_out)
    dtype = data["x"].dtype
    penalties = jnp.full(num_train, as_coefficient(penalty, dtype))
    train = Batches(splits["train"] | {"penalty": penalties}, with_key=True)
    shape = (len(OPERATIONS),)
    return Task(
        paradigm="supervised",
        problem=Bilevel(train_loss, val_loss, train, splits["val"]),
        solver=SOLVER,
        w=init_network(network_key, data["x"].shape[1], num_hidden),
        alpha={
            "magnitude": jnp.asarray(MAX_MAGNITUDES / 4, dtype),
            "probability": jnp.full(shape, 0.5, dtype),
        },
        space={
            "magnitude": spaces.Interval(0.0, MAX_MAGNITUDES, shape=shape),
            "probability": spaces.Interval(0.05, 0.95, shape=shape),
        },
        metrics=make_metrics(splits, hold_out),
        splits=splits,
    )
