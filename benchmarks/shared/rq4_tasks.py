"""Encoders, what they learn from, and the augmentation of it, for the table `rq4`.

The inner loss is a mean over images that are transformed by fixed random numbers.
``alpha`` holds the largest magnitude of each operation, so that the loss is a function
of ``(w, alpha)`` with a minimum, and its hypergradient can be certified.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.tasks.augmentation import MAX_MAGNITUDES, OPERATIONS, split, transform
from hypergrad.tasks.networks import extract_patches, mean_pool
from hypergrad.tasks.self_supervised import append_one, info_nce, probe

NUM_TRAIN, NUM_VAL, NUM_DRAWS = 200, 200, 2
WIDTH, HIDDEN, NUM_CLASSES, SIDE = 16, 32, 10, 8
FILTERS, HEADS, PATCH = 4, 2, 4
RIDGE = 1.0  # of the probe
TEMPERATURE = 0.2  # of the contrastive loss
SPACE = hg.spaces.Interval(0.0, MAX_MAGNITUDES, shape=(len(OPERATIONS),))
#: Set by hand before the first run: a pixel, 15 degrees, a tenth of the rest.
FIXED = np.array([1.0, 1.0, np.pi / 12, 0.1, 0.1, 0.1, 0.1])


# Encoders: images [n, 8, 8] -> features [n, 16].


def flat(x: Array) -> Array:
    """Returns a row per image."""
    return x.reshape(len(x), -1)


def affine(w: PyTree, layer: str, x: Array) -> Array:
    """Returns ``x W + b``."""
    return x @ w[layer]["W"] + w[layer]["b"][(None,) * (x.ndim - 1)]


def linear(w: PyTree, x: Array) -> Array:
    """Returns ``x W + b``, or the pixels if there is no layer."""
    return affine(w, "last", flat(x)) if w else flat(x)


def mlp(w: PyTree, x: Array) -> Array:
    """Returns the features of a network with one hidden layer of tanh."""
    return jnp.tanh(affine(w, "last", jnp.tanh(affine(w, "first", flat(x)))))


def cnn(w: PyTree, x: Array) -> Array:
    """Returns features by filters of 3x3, tanh, means over 2x2, and a layer of tanh."""
    maps = jnp.tanh(affine(w, "filters", extract_patches(x, -1)))
    return jnp.tanh(affine(w, "last", flat(mean_pool(maps))))


def attention(w: PyTree, h: Array) -> Array:
    """Returns attention with several heads, for tokens ``[n, t, width]``.

    It is ``softmax(Q K' / sqrt(d)) V`` of each head, side by side, times a matrix.
    """
    heads = lambda name: (h @ w[name]).reshape(*h.shape[:2], HEADS, -1)
    q, k, v = heads("query"), heads("key"), heads("value")
    scores = jnp.einsum("nihd,njhd->nhij", q, k) / q.shape[-1] ** 0.5
    mixed = jnp.einsum("nhij,njhd->nihd", jax.nn.softmax(scores), v)
    return mixed.reshape(h.shape) @ w["out"]


def normalised(h: Array) -> Array:
    """Returns tokens with mean 0 and variance 1."""
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)


def vit(w: PyTree, x: Array) -> Array:
    """Returns features by four patches, attention, a hidden layer, and their mean."""
    per = SIDE // PATCH
    cells = x.reshape(-1, per, PATCH, per, PATCH).transpose(0, 1, 3, 2, 4)
    h = affine(w, "first", cells.reshape(-1, per**2, PATCH**2)) + w["place"][None]
    h = h + attention(w["attention"], normalised(h))
    h = h + affine(w, "last", jnp.tanh(affine(w, "hidden", normalised(h))))
    return jnp.tanh(jnp.mean(normalised(h), axis=1))


class Architecture(NamedTuple):
    """``features(w, images)``, and the shapes of ``w``; matrices [inputs, outputs]."""

    features: Callable[[PyTree, Array], Array]
    shapes: PyTree


def layer(num_inputs: int, num_outputs: int) -> PyTree:
    """Returns the shapes of an affine layer."""
    return {"W": (num_inputs, num_outputs), "b": (num_outputs,)}


ARCHITECTURES = {
    "linear": Architecture(linear, {"last": layer(SIDE**2, WIDTH)}),
    "MLP": Architecture(
        mlp, {"first": layer(SIDE**2, HIDDEN), "last": layer(HIDDEN, WIDTH)}
    ),
    "CNN": Architecture(
        cnn, {"filters": layer(9, FILTERS), "last": layer(9 * FILTERS, WIDTH)}
    ),
    "ViT": Architecture(
        vit,
        {
            "first": layer(PATCH**2, WIDTH),
            "place": ((SIDE // PATCH) ** 2, WIDTH),
            "attention": dict.fromkeys(
                ("query", "key", "value", "out"), (WIDTH, WIDTH)
            ),
            "hidden": layer(WIDTH, HIDDEN),
            "last": layer(HIDDEN, WIDTH),
        },
    ),
}
#: Number of outputs of the affine layer on the features.
HEAD = {"supervised": NUM_CLASSES, "self-supervised": 0, "autoencoder": SIDE**2}
OBJECTIVES = tuple(HEAD)


def init_w(architecture: str, objective: str, seed: int) -> PyTree:
    """Returns normal matrices of variance 1 / inputs, and vectors of zeros."""
    shapes = {"encoder": ARCHITECTURES[architecture].shapes}
    if (architecture, objective) == ("linear", "supervised"):  # softmax regression
        shapes = {"encoder": {}, "head": layer(SIDE**2, HEAD[objective])}
    elif HEAD[objective]:
        shapes["head"] = layer(WIDTH, HEAD[objective])
    shapes, structure = jax.tree.flatten(
        shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    leaves = [
        jax.random.normal(key, shape) / shape[0] ** 0.5
        if len(shape) == 2
        else jnp.zeros(shape)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    return structure.unflatten(leaves)


# Losses.


def transformed(alpha: Array, batch: PyTree) -> Array:
    """Returns the images, transformed by their random numbers times ``alpha``."""
    return transform(batch["x"], alpha[None, :] * batch["draws"], batch["noise"])


def unit(f: Array) -> Array:
    """Returns features of length 1."""
    return f / jnp.sqrt(jnp.sum(f**2, axis=1, keepdims=True) + 1e-6)


def cross_entropy(scores: Array, y: Array) -> Array:
    """Returns the cross-entropy of each image."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, y)


def inner_loss(
    architecture: str, objective: str, w: PyTree, alpha: Array, batch: PyTree
) -> Array:
    """Returns the objective on transformed images, with an L2 penalty.

    Supervised: cross-entropy of the head. Self-supervised: InfoNCE; the halves of the
    rows are two views of the same images. Autoencoder: half the squared error of the
    head against the original image.
    """
    f = ARCHITECTURES[architecture].features(w["encoder"], transformed(alpha, batch))
    if objective == "supervised":
        loss = jnp.mean(cross_entropy(affine(w, "head", f), batch["y"]))
    elif objective == "self-supervised":
        a, b = jnp.split(unit(f), 2)
        loss = TEMPERATURE * info_nce(a, b, jnp.asarray(TEMPERATURE, f.dtype))
    else:
        error = affine(w, "head", f) - flat(batch["x"])
        loss = jnp.mean(jnp.sum(error**2, axis=1)) / 2
    return loss + batch["penalty"] * optax.tree.norm(w, squared=True)


def scores_of(architecture: str, objective: str, w: PyTree, batch: PyTree) -> Array:
    """Returns class scores ``[n, 10]`` of the head, or of a ridge probe on features."""
    f = ARCHITECTURES[architecture].features(w["encoder"], batch["x"])
    if objective == "supervised":
        return affine(w, "head", f)
    return append_one(f) @ probe(f, batch)


def outer_loss(
    architecture: str, objective: str, w: PyTree, alpha: Array, batch: PyTree
) -> Array:
    """Returns cross-entropy of a head, or half the squared error of a probe."""
    del alpha
    scores = scores_of(architecture, objective, w, batch)
    if objective == "supervised":
        losses = cross_entropy(scores, batch["y"])
    else:
        y = jax.nn.one_hot(batch["y"], NUM_CLASSES, dtype=scores.dtype)
        losses = jnp.sum((scores - y) ** 2, axis=1) / 2
    return jnp.sum(batch["is_evaluated"] * losses) / jnp.sum(batch["is_evaluated"])


def accuracy(architecture: str, objective: str, w: PyTree, batch: PyTree) -> Array:
    """Returns the fraction of evaluated images whose class has the highest score."""
    scores = scores_of(architecture, objective, w, batch)
    is_right = jnp.argmax(scores, axis=1) == batch["y"]
    return jnp.sum(batch["is_evaluated"] * is_right) / jnp.sum(batch["is_evaluated"])


# Data.


def training_batch(part: PyTree, penalty: float, seed: int) -> PyTree:
    """Returns every image once per draw, with the random numbers."""
    rng = np.random.default_rng(seed)
    x = jnp.tile(jnp.asarray(part["x"], float), (NUM_DRAWS, 1, 1))
    return {
        "x": x,
        "y": jnp.tile(part["y"], NUM_DRAWS),
        "draws": jnp.asarray(rng.uniform(-1, 1, (len(x), len(OPERATIONS)))),
        "noise": jnp.asarray(rng.normal(size=x.shape)),
        "penalty": jnp.asarray(penalty),
    }


def evaluation_batch(fit: PyTree, part: PyTree) -> PyTree:
    """Returns the examples of the probe, then those that are evaluated."""
    num_fit, num = len(fit["y"]), len(fit["y"]) + len(part["y"])
    joined = {
        name: jnp.concatenate([fit[name], part[name]]).astype(kind)
        for name, kind in (("x", float), ("y", int))
    }
    is_fit = (jnp.arange(num) < num_fit).astype(float)
    return joined | {
        "fit": is_fit,
        "is_evaluated": 1 - is_fit,
        "penalty": jnp.asarray(RIDGE),
    }


@functools.cache
def splits_of(seed: int) -> dict[str, PyTree]:
    """Returns upright images for training; posed ones for validation and test."""
    data = hg.datasets.load("digits")
    return split(data, jax.random.key(seed), (NUM_TRAIN, NUM_VAL), False)


@functools.cache
def losses_of(architecture: str, objective: str) -> tuple[Callable, Callable]:
    """Returns the losses, the same objects each time."""
    bound = lambda loss: functools.partial(loss, architecture, objective)
    return bound(inner_loss), bound(outer_loss)


def problem_of(
    architecture: str, objective: str, train: PyTree, val: PyTree
) -> hg.Bilevel:
    """Returns the problem of the data."""
    return hg.Bilevel(*losses_of(architecture, objective), train, val)


@functools.cache
def data_of(penalty: float, seed: int, on: str = "train") -> tuple[PyTree, ...]:
    """Returns training, validation and test data; ``on`` is the split that trains."""
    splits = splits_of(seed)
    train = training_batch(splits[on], penalty, seed)
    evaluated = (evaluation_batch(splits[on], splits[x]) for x in ("val", "test"))
    return train, *evaluated
