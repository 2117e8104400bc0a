"""What tasks with a network that classifies share: losses, accuracy, the split."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PyTree

Score = Callable[[PyTree, Array], Array]


@functools.cache
def scorer(graph: Any) -> Callable[[PyTree, Array], Array]:
    """``(w, x) -> scores``; the same function for an equal graph, so traced once."""
    return lambda w, x: nnx.merge(graph, w)(x)


@functools.cache
def bound(function: Callable, score: Score) -> Callable:
    """The function of one network; the same object each time, so traced once."""
    return functools.partial(function, score)


def losses(score: Score, w: PyTree, batch: PyTree) -> Array:
    """Cross-entropy of each example; one score alone is class 1's, and class 0's 0."""
    return optax.softmax_cross_entropy_with_integer_labels(
        all_scores(score(w, batch["x"])), batch["y"]
    )


def cross_entropy(score: Score, w: PyTree, batch: PyTree) -> Array:
    """Mean over the examples in use."""
    return mean(losses(score, w, batch), batch["use"])


def mean(values: Array, use: Array) -> Array:
    """Over the examples in use."""
    return jnp.sum(use * values) / jnp.sum(use)


def all_scores(scores: Array) -> Array:
    """``[n, classes]``: two from the one of a binary classifier."""
    return jnp.pad(scores, ((0, 0), (1, 0))) if scores.shape[1] == 1 else scores


def val_loss(score: Score, w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Cross-entropy alone."""
    del alpha
    return cross_entropy(score, w, batch)


def accuracy(
    score: Score, batch: PyTree, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    """Share of the examples in use whose highest score is their class."""
    del alpha, key
    found = jnp.argmax(all_scores(score(w, batch["x"])), axis=1)
    return mean(found == batch["y"], batch["use"])


def loss_on(score: Score, batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """`val_loss` on other data."""
    del key
    return val_loss(score, w, alpha, batch)


def split(
    data: PyTree, key: Array, sizes: tuple[int, int, int]
) -> dict[str, dict[str, Array]]:
    """Train, validation and test examples by a seeded permutation.

    Examples that the data set marks as ``test`` come last.
    """
    order = jax.random.permutation(key, len(data["y"]))
    if "test" in data:
        order = order[jnp.argsort(data["test"][order], stable=True)]
    num_train, num_val, num_test = sizes
    places = {
        "train": order[:num_train],
        "val": order[num_train : num_train + num_val],
        "test": order[-num_test:],
    }
    return {
        name: {
            "x": data["x"][where],
            "y": data["y"][where],
            "use": jnp.ones(where.shape),
        }
        for name, where in places.items()
    }


def held_out(val: PyTree, hold_out: Array | bool, which: slice | None = None) -> PyTree:
    """The validation part, the last third or ``which`` out of use if ``hold_out``."""
    num_val = len(val["y"])
    which = slice(num_val - num_val // 3, None) if which is None else which
    out = jnp.zeros(num_val, bool).at[which].set(True)
    return val | {"use": jnp.where(out & jnp.asarray(hold_out), 0, val["use"])}


def others(val: PyTree) -> PyTree:
    """The examples that are out of use, to choose by."""
    return val | {"use": 1 - val["use"]}
