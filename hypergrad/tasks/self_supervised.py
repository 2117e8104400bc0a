"""Self-supervised learning in three levels: augmentation, encoder and linear probe.

Chen et al. 2020 (SimCLR, arXiv 2002.05709). The temperature and the strengths of the
augmentation are usually tuned by the accuracy of a linear probe; here they are
hyperparameters. The encoder ``w`` maps two views of the same images to unit vectors a_i
and b_i and learns which belong together (van den Oord et al. 2018, arXiv 1807.03748,
equation 4):

    L(w, alpha) = -tau mean_i log [exp(a_i'b_i / tau) / sum_j exp(a_i'b_j / tau)],

averaged with the same term for exchanged a and b. The factor tau (Chen et al. 2021,
arXiv 2104.02057, algorithm 1) prevents steps that grow as 1 / tau for low temperatures.
A view is a random crop with a random shift and noise: pixel i of the output shows the
position ``c + (i - c)(1 - crop u) + shift v``, where c is the center, u is uniform in
[0, 1] and v in [-1, 1]; then ``noise e`` is added, with normal e. A batch is drawn with
replacement, so that views of one image may be negatives of each other.

The probe is ridge regression in closed form on the features f of a few labeled
examples. The outer loss is its squared error on validation examples:

    M(w) = mean_val |f'V - y|² / 2,   V = argmin sum_fit |f'V - y|² + penalty |V|².
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..batches import Batches
from ..inner import Descent
from ..number_checks import positive
from ..problem import Bilevel
from ..validation import as_key
from .classifier import load_data, random_order
from .task import (
    Task,
    check_booleans,
    check_choice,
    check_counts,
    check_finite,
    has_held_out,
    loss_metric,
)

NUM_TRAIN, NUM_FIT, NUM_VAL = 800, 100, 300
NUM_HELD_OUT = 100
SIZE, NUM_CLASSES = 8, 10
BATCH = 128
SOLVER = Descent(optax.sgd(0.5, momentum=0.9), num_steps=100)
DEFAULT = {"temperature": 0.1, "noise": 0.1, "crop": 0.2, "shift": 0.5}
SPACE = {
    "temperature": spaces.Interval(0.02, 2.0, log=True),
    "noise": spaces.Interval(0.01, 1.0, log=True),
    "crop": spaces.Interval(0.01, 0.8, log=True),
    "shift": spaces.Interval(0.05, 3.0, log=True),
}


def features(w: PyTree, x: Float[Array, "n 8 8"]) -> Float[Array, "n width"]:
    """Returns the features of images, which are the input of the probe."""
    return jnp.tanh(x.reshape(len(x), -1) @ w["W"] + w["b"][None, :])


def embedding(w: PyTree, x: Float[Array, "n 8 8"]) -> Float[Array, "n dimension"]:
    """Returns the unit vectors that the contrastive loss compares."""
    z = features(w, x) @ w["projection"]
    return z / jnp.sqrt(jnp.sum(z**2, axis=1, keepdims=True) + 1e-6)


def resample(positions: Float[Array, " m"], x: Float[Array, "n k"]) -> Array:
    """Interpolates the rows of ``x`` linearly at ``positions``; zero outside."""
    distances = jnp.abs(positions[:, None] - jnp.arange(len(x))[None, :])
    return jnp.maximum(1 - distances, 0) @ x


def augment(alpha: PyTree, x: Float[Array, "8 8"], key: Array) -> Float[Array, "8 8"]:
    """Returns a random view of one image."""
    crop_key, shift_key, noise_key = jax.random.split(key, 3)
    center = (SIZE - 1) / 2
    zoom = 1 - alpha["crop"] * jax.random.uniform(crop_key)
    shift = alpha["shift"] * jax.random.uniform(shift_key, (2,), minval=-1)
    positions = center + (jnp.arange(SIZE) - center) * zoom
    view = resample(positions + shift[0], resample(positions + shift[1], x.T).T)
    return view + alpha["noise"] * jax.random.normal(noise_key, x.shape)


def info_nce(
    a: Float[Array, "n d"], b: Float[Array, "n d"], temperature: Array
) -> Array:
    """Returns the InfoNCE loss, the mean of both directions."""
    similarity = a @ b.T / temperature
    positives = jnp.diagonal(similarity)
    loss_along = lambda axis: jnp.mean(
        jax.nn.logsumexp(similarity, axis=axis) - positives
    )
    return (loss_along(0) + loss_along(1)) / 2


def contrastive_loss(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns ``tau`` times InfoNCE of two views of each image.

    Args:
      w: Parameters of the encoder.
      alpha: Temperature and strengths of the augmentation.
      batch: ``({"x": images}, key)``.
    """
    batch, key = batch
    views = [
        jax.vmap(augment, in_axes=(None, 0, 0))(
            alpha, batch["x"], jax.random.split(key, len(batch["x"]))
        )
        for key in jax.random.split(key)
    ]
    a, b = (embedding(w, view) for view in views)
    temperature = alpha["temperature"]
    return temperature * info_nce(a, b, temperature)


def append_one(f: Float[Array, "n d"]) -> Float[Array, "n d+1"]:
    """Returns the features and the constant feature 1."""
    return jnp.concatenate([f, jnp.ones((len(f), 1), f.dtype)], axis=1)


def probe(f: Float[Array, "n d"], batch: PyTree) -> Float[Array, "d+1 10"]:
    """Returns the argmin of ``sum_fit |f'V - y|² + penalty |V|²``.

    ``V = (F' D F + penalty I)^-1 F' D y``, where D is the diagonal matrix of ``fit``.
    """
    f = append_one(f)
    y = jax.nn.one_hot(batch["y"], NUM_CLASSES)
    weighted_f = f * batch["fit"][:, None]
    gram = weighted_f.T @ f + batch["penalty"] * jnp.eye(f.shape[1])
    return jnp.linalg.solve(gram, weighted_f.T @ y)


def probe_scores(w: PyTree, batch: PyTree) -> Float[Array, "n 10"]:
    """Returns the class scores of all examples by the probe of those with ``fit``."""
    f = features(w, batch["x"])
    return append_one(f) @ probe(f, batch)


def probe_error(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns half of the mean squared error of the probe where ``evaluate`` is 1."""
    del alpha
    y = jax.nn.one_hot(batch["y"], NUM_CLASSES)
    errors = jnp.sum((probe_scores(w, batch) - y) ** 2, axis=1) / 2
    return jnp.sum(batch["evaluate"] * errors) / jnp.sum(batch["evaluate"])


def accuracy(batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """Returns the accuracy of the probe where ``evaluate`` is 1."""
    del alpha, key
    is_correct = jnp.argmax(probe_scores(w, batch), axis=1) == batch["y"]
    return jnp.sum(batch["evaluate"] * is_correct) / jnp.sum(batch["evaluate"])


@jax.jit
def split(
    data: PyTree, key: Array, penalty: Array, hold_out: Array | bool = False
) -> dict[str, PyTree]:
    """Splits the data by a random permutation.

    Args:
      data: ``{"x": [n, 64], "y": [n]}``.
      key: PRNG key of the permutation.
      penalty: Ridge penalty of the probe.
      hold_out: Whether ``evaluate`` of the last 100 validation examples is 0 in "val"
        and 1 in "held_out"; else it is 0 for all examples of "held_out".

    Returns:
      "train": 800 images without labels; "val", "held_out" and "test": the 100 labeled
      examples that the probe is fitted to, with ``fit`` 1, followed by 300 validation
      examples or all remaining examples, with ``evaluate`` 1.
    """
    order = random_order(data, key)
    x = jnp.asarray(data["x"], float)[order].reshape(-1, SIZE, SIZE)
    y = data["y"][order]
    val_start, test_start = NUM_TRAIN + NUM_FIT, NUM_TRAIN + NUM_FIT + NUM_VAL

    def select(indices):
        join = lambda leaf: jnp.concatenate([leaf[NUM_TRAIN:val_start], leaf[indices]])
        joined = {"x": join(x), "y": join(y), "penalty": penalty}
        is_fit = jnp.arange(len(joined["y"])) < NUM_FIT
        weights = {"fit": is_fit, "evaluate": ~is_fit}
        return joined | jax.tree.map(lambda mask: mask.astype(x.dtype), weights)

    val = select(slice(val_start, test_start))
    is_last = jnp.arange(len(val["y"])) >= len(val["y"]) - NUM_HELD_OUT
    is_held_out = is_last & jnp.asarray(hold_out)
    return {
        "train": {"x": x[:NUM_TRAIN]},
        "val": val | {"evaluate": jnp.where(is_held_out, 0, val["evaluate"])},
        "held_out": val | {"evaluate": is_held_out.astype(x.dtype)},
        "test": select(slice(test_start, None)),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    penalty: float | Array = 1.0,
    width: int = 64,
    dimension: int = 32,
    hold_out: Array | bool = False,
    data: PyTree = None,
) -> Task:
    """Returns the task of a contrastive encoder of digits and its ridge probe.

    Args:
      key: PRNG key of the split and of the initial encoder.
      scale: 'small' is the only one, because no paper defines another.
      penalty: Ridge penalty of the probe, above 0, because features that are zero for
        all images make its least-squares problem singular. Defaults to 1.
      width: Number of features.
      dimension: Dimension of the vectors that the contrastive loss compares.
      hold_out: Whether 100 validation examples are excluded from the outer loss, for
        choosing settings by the metric ``held_out_error``. If it is traced and False,
        this metric is NaN.
      data: ``{"x": [n, 64], "y": [n]}`` with classes 0 to 9 and more than 1,200
        examples. Defaults to scikit-learn's digits.

    Raises:
      TypeError: ``penalty``, ``hold_out`` or data has a wrong type.
      ValueError: The scale is unknown, ``penalty``, ``width`` or ``dimension`` is not
        positive, or data has a wrong shape, a wrong label or
        too few examples.
    """
    key = as_key(key)
    check_choice("scale", scale, ("small",))
    check_booleans(hold_out=hold_out)
    check_finite(penalty=penalty)
    positive("penalty")(penalty)
    check_counts(width=width, dimension=dimension)
    num_needed = NUM_TRAIN + NUM_FIT + NUM_VAL + 1
    data = load_data(data, "digits", num_needed, NUM_CLASSES)
    if data["x"].shape[1] != SIZE**2:
        raise ValueError(
            f"data['x'] must be flat images of {SIZE} by {SIZE} pixels, [n, {SIZE**2}]"
            f"; got {data['x'].shape[1]} features."
        )
    split_key, encoder_key, projection_key = jax.random.split(key, 3)
    penalty = jnp.asarray(penalty, float)
    splits = split(data, split_key, penalty, hold_out)
    num_pixels = SIZE * SIZE
    # Normal weights with variance 1 / fan-in.
    projection = jax.random.normal(projection_key, (width, dimension))
    w = {
        "W": jax.random.normal(encoder_key, (num_pixels, width)) / jnp.sqrt(num_pixels),
        "b": jnp.zeros(width),
        "projection": projection / jnp.sqrt(width),
    }
    test = splits["test"]
    metrics = {
        "test_accuracy": jax.tree_util.Partial(accuracy, test),
        "test_error": loss_metric(probe_error, test),
    }
    if has_held_out(hold_out, NUM_HELD_OUT, NUM_VAL):
        metrics["held_out_error"] = loss_metric(probe_error, splits["held_out"])
    return Task(
        paradigm="self-supervised",
        problem=Bilevel(
            contrastive_loss,
            probe_error,
            Batches(splits["train"], BATCH, with_key=True),
            splits["val"],
        ),
        solver=SOLVER,
        w=w,
        alpha={name: jnp.asarray(value, float) for name, value in DEFAULT.items()},
        space=SPACE,
        metrics=metrics,
        splits=splits,
    )
