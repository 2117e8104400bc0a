"""Architecture search: a cell small enough to train every one there is.

Liu, Simonyan & Yang 2019, DARTS (arXiv 1806.09055), section 2.2, on a space in the form
of NAS-Bench-201 (Dong & Yang 2020). A cell has three nodes and an edge from each node
to each later one; an edge carries one of five operations, so there are 125 cells. The
search trains one network in which edge e mixes all of them, equation 2,

    node_j = sum over edges e = (i, j) of  sum_o alpha_eo operation_o(node_i; w),

each row of alpha on the simplex, as softmax of what the optimizer moves. The inner loss
is the training cross-entropy, the outer loss that on validation images and, at a price,
the expected number of floating-point operations of a cell drawn by alpha. A one-hot
alpha is a cell, and the same network trains it alone.
"""

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

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
from .classifier import (
    check_data,
    check_scale,
    check_square,
    losses,
    mask_held_out,
    weighted_mean,
)
from .networks import extract_patches
from .task import Task

NUM_CLASSES = 10
EDGES = ((0, 1), (0, 2), (1, 2))
OPERATIONS = ("none", "skip", "average", "conv1", "conv3")
CELLS = tuple(itertools.product(range(len(OPERATIONS)), repeat=len(EDGES)))
# Training and validation images, channels; the other images are for testing.
SIZES = {"small": (600, 400, 4), "paper": (25000, 25000, 16)}
BATCH_SIZE = 50
RANKING = "architecture_cells.jsonl"
SOLVER = Descent(optax.sgd(0.2), num_steps=5)


def neighborhoods(x: Array) -> Array:
    """The 3 x 3 pixels about each, ``[9, channels, side, side, n]``; zeros outside.

    Images come last, so that a convolution is one product with long rows.
    """
    return extract_patches(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 0)


def convolve(seen: Array, kernel: Array) -> Array:
    """A kernel ``[channels, k, c]`` on extract_patches ``[k, c, ...]``, then tanh."""
    return jnp.tanh(jnp.tensordot(kernel, seen, 2))


def none(x: Array, w: PyTree) -> Array:
    """No edge."""
    del w
    return jnp.zeros_like(x)


def skip(x: Array, w: PyTree) -> Array:
    """As it is."""
    del w
    return x


def average(x: Array, w: PyTree) -> Array:
    """Of the 3 x 3 pixels about each."""
    del w
    return jnp.mean(neighborhoods(x), axis=0)


def conv1(x: Array, w: PyTree) -> Array:
    """Pixel by pixel."""
    return convolve(x[None], w["conv1"])


def conv3(x: Array, w: PyTree) -> Array:
    """Of the 3 x 3 pixels about each."""
    return convolve(neighborhoods(x), w["conv3"])


FUNCTIONS = (none, skip, average, conv1, conv3)


def mixed_operation(x: Array, w: PyTree, alpha: Array) -> Array:
    """The mixture of the five operations on one edge, or one of them.

    Args:
      x: ``[channels, side, side, n]``.
      w: the edge's kernels.
      alpha: a row of mixing weights, or an operation's number.
    """
    if alpha.ndim == 0:
        return jax.lax.switch(alpha, FUNCTIONS, x, w)
    return sum(
        (alpha[o] * function(x, w) for o, function in enumerate(FUNCTIONS)),
        jnp.zeros_like(x),
    )


def scores(w: PyTree, alpha: Array, x: Array) -> Array:
    """A stem, the cell, the means of the image's quarters, a linear head: [n, 10].

    ``alpha`` is ``[3, 5]`` or a cell, ``[3]`` numbers of operations: only these are
    computed then.
    """
    kernels = [jax.tree.map(lambda leaf, e=e: leaf[e], w["edges"]) for e in range(3)]
    first = convolve(neighborhoods(jnp.moveaxis(x, 0, -1)[None]), w["stem"])
    second = mixed_operation(first, kernels[0], alpha[0])
    third = mixed_operation(first, kernels[1], alpha[1]) + mixed_operation(
        second, kernels[2], alpha[2]
    )
    channels, side, _, n = third.shape
    quarters = third.reshape(channels, 2, side // 2, 2, side // 2, n)
    features = jnp.mean(quarters, axis=(2, 4)).reshape(-1, n)
    return features.T @ w["W"] + w["b"][None]


def cross_entropy(w: PyTree, alpha: Array, part: PyTree) -> Array:
    """Mean over the examples, of which only those in use count."""
    found = losses(lambda w, x: scores(w, alpha, x), w, part)
    return weighted_mean(found, part.get("use", jnp.ones_like(found)))


def train_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Cross-entropy of the mixed network, and a small L2 penalty."""
    return cross_entropy(w, alpha, batch) + 1e-4 * optax.tree.norm(w, squared=True)


def val_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Cross-entropy, and the price of the expected cost."""
    # A price an example, all the same: batches are made of examples.
    price = jnp.mean(batch["price"])
    return cross_entropy(w, alpha, batch) + price * expected_flops(alpha, batch["x"])


def flops(channels: int, side: int) -> np.ndarray:
    """Floating-point operations of the five operations on an image."""
    pixels = side * side
    convolution = 2 * pixels * channels * channels
    return np.array([0, 0, 9 * pixels * channels, convolution, 9 * convolution])


def expected_flops(alpha: Array, x: Array) -> Array:
    """Of the edges, as a share of the largest cell's; linear in ``alpha``.

    The share is that of four channels, whatever the network has.
    """
    each = flops(SIZES["small"][2], x.shape[1])
    alpha = one_hot(alpha) if alpha.ndim == 1 else alpha
    share = jnp.asarray(each / (len(EDGES) * each.max()), alpha.dtype)
    return jnp.sum(alpha @ share)


def accuracy(part: PyTree, w: PyTree, alpha: Array, key: Array) -> Array:
    """Share of the examples whose highest score is their class."""
    del key
    return jnp.mean(jnp.argmax(scores(w, alpha, part["x"]), axis=-1) == part["y"])


def one_hot(cell: Sequence[int] | Array) -> Array:
    """The ``alpha`` of a cell, an operation's number an edge."""
    return jax.nn.one_hot(jnp.asarray(cell), len(OPERATIONS))


def most_likely_cell(alpha: Array) -> Array:
    """The cell that ``alpha`` stands for: the heaviest operation of each edge."""
    return jnp.argmax(alpha, axis=-1)


def split(data: PyTree, key: Array, sizes: tuple[int, int]) -> dict[str, PyTree]:
    """Train, validation and test examples, by a permutation; images made square."""
    order = jax.random.permutation(key, len(data["y"]))
    side = int(np.sqrt(data["x"].shape[1]))
    x, y = data["x"][order].reshape(-1, side, side), data["y"][order]
    part = lambda where: {"x": x[where], "y": y[where]}
    train, val = sizes
    return {
        "train": part(slice(None, train)),
        "val": part(slice(train, train + val)),
        "test": part(slice(train + val, None)),
    }


def network(key: Array, channels: int) -> PyTree:
    """Where training begins: normal weights of variance 1 / inputs, no bias."""
    keys = jax.random.split(key, 4)
    normal = lambda key, *shape, inputs: jax.random.normal(key, shape) / inputs**0.5
    c, edges = channels, len(EDGES)
    return {
        "stem": normal(keys[0], c, 9, 1, inputs=9),
        "edges": {
            "conv1": normal(keys[1], edges, c, 1, c, inputs=c),
            "conv3": normal(keys[2], edges, c, 9, c, inputs=9 * c),
        },
        "W": normal(keys[3], 4 * c, NUM_CLASSES, inputs=4 * c),
        "b": jnp.zeros(NUM_CLASSES),
    }


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    price: float | Array = 0.0,
    hold_out: bool | Array = False,
    split_key: Array | None = None,
    data: PyTree = None,
    sizes: tuple[int, int, int] | None = None,
) -> Task:
    """Digits: 600 to train on, 400 for validation, 797 for testing; 125 cells.

    ``alpha`` is ``[3, 5]``, a row of mixing weights for each of `EDGES` in the order of
    `OPERATIONS`; it starts uniform.

    Args:
      key: of where the network begins.
      scale: 'small', or 'paper': 25,000 images each for training and validation and 16
        channels, of the grey ``data`` that is passed (DARTS has CIFAR-10, cells of 14
        edges, and eight operations).
      data_dir: not read: the digits come with scikit-learn.
      price: of the largest cell's floating-point operations, in nats.
      hold_out: keep the last third of validation out of the outer loss, to choose by.
      split_key: of the split; None means ``jax.random.key(0)``, for which the ranking
        of all cells is known (`ranking`).
      data: ``{"x": [n, side²], "y": [n]}`` in place of the digits, classes 0 to 9,
        sides even.
      sizes: training and validation images, channels, in place of the scale's.

    Raises:
      TypeError: data of another kind.
      ValueError: another scale, 'paper' without data, fewer examples than sizes, images
        that are not square, other labels.

    >>> import jax, hypergrad as hg
    >>> task = hg.tasks.architecture.make(key=jax.random.key(0))
    >>> task.alpha.shape
    (3, 5)
    """
    key = as_key(key)
    del data_dir
    check_scale(scale, data, sum(SIZES["paper"][:2]) + 1)
    num_train, num_val, channels = SIZES[scale] if sizes is None else sizes
    data = datasets.load("digits") if data is None else data
    check_data(data, num_train + num_val + 1, NUM_CLASSES)
    check_square(data["x"], even=True)
    data = jax.tree.map(jnp.asarray, data)
    split_key = jax.random.key(0) if split_key is None else split_key
    parts = split(data, split_key, (num_train, num_val))
    prices = jnp.full(num_val, jnp.asarray(price, data["x"].dtype))
    val = parts["val"] | {"price": prices, "use": jnp.ones(num_val)}
    shape = (len(EDGES), len(OPERATIONS))
    return Task(
        name="architecture",
        paradigm="supervised",
        source="Liu, Simonyan & Yang 2019 (arXiv 1806.09055), section 2",
        problem=Bilevel(
            train_loss,
            val_loss,
            Batches(parts["train"], min(BATCH_SIZE, num_train)),
            Batches(mask_held_out(val, hold_out)),
        ),
        solver=SOLVER,
        w=network(key, channels),
        alpha=jnp.full(shape, 1 / len(OPERATIONS)),
        space=spaces.Simplex(shape=shape),
        metrics={
            "test_accuracy": jax.tree_util.Partial(accuracy, parts["test"]),
            "val_accuracy": jax.tree_util.Partial(accuracy, parts["val"]),
        },
    )


@functools.cache
def ranking() -> dict[str, np.ndarray]:
    """Of all `CELLS`, each trained alone several times on the split of ``make``.

    Arrays ``[125, retrainings]``: test_accuracy, test_loss, val_accuracy, val_loss.
    ``python -m benchmarks.architecture_cells`` made them.

    >>> import hypergrad as hg
    >>> hg.tasks.architecture.ranking()["test_accuracy"].shape
    (125, 8)
    """
    lines = Path(__file__).with_name(RANKING).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    names = ("test_accuracy", "test_loss", "val_accuracy", "val_loss")
    return {name: np.array([row[name] for row in rows]) for name in names}
