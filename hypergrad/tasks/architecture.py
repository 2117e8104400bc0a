"""Architecture search over cells small enough to train every one of them.

The method is DARTS (Liu, Simonyan & Yang 2019, arXiv 1806.09055), section 2.2, on a
search space in the form of NAS-Bench-201 (Dong & Yang 2020). A cell has three nodes and
an edge from each node to each later one. An edge carries one of five operations, so
that 5^3 = 125 cells exist. The search trains one network in which each edge e = (i, j)
mixes all operations (equation 2),

    node_j = sum over edges e = (i, j) of  sum_o alpha_eo operation_o(node_i; w),

where each row of ``alpha`` lies on the simplex. The inner loss is the training
cross-entropy. The outer loss is the cross-entropy on validation images plus a price for
the expected number of floating-point operations of a cell sampled from ``alpha``. A
one-hot ``alpha`` is a single cell, which the same network can train.
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
from jaxtyping import Array, Float, PyTree

from .. import spaces
from ..batches import Batches
from ..inner import Descent
from ..metrics import Metric
from ..problem import Bilevel
from ..validation import as_key
from .classifier import (
    check_scale,
    check_square,
    load_data,
    losses,
    mask_held_out,
    random_order,
)
from .networks import extract_patches
from .task import (
    Task,
    as_coefficient,
    as_sizes,
    check_booleans,
    check_choice,
    check_finite,
    frozen_array,
    has_held_out,
    loss_metric,
)

NUM_CLASSES = 10
EDGES = ((0, 1), (0, 2), (1, 2))
OPERATIONS = ("none", "skip", "average", "conv1", "conv3")
CELLS = tuple(itertools.product(range(len(OPERATIONS)), repeat=len(EDGES)))
# Numbers of training images, validation images and channels; the rest is for testing.
SIZES = {"small": (600, 400, 4), "paper": (25000, 25000, 16)}
BATCH_SIZE = 50
RANKING = "architecture_cells.jsonl"
SOLVER = Descent(optax.sgd(0.2), num_steps=5)

# Operations map images ``[channels, side, side, n]`` to images of the same shape. The
# images come last, so that a convolution is one matrix product with long rows.


def extract_neighborhoods(x: Float[Array, "c s s n"]) -> Float[Array, "9 c s s n"]:
    """Returns the 3 x 3 neighborhood of each pixel, with zeros outside the image."""
    return extract_patches(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 0)


def convolve(
    patches: Float[Array, "k c s s n"], kernel: Float[Array, "channels k c"]
) -> Float[Array, "channels s s n"]:
    """Returns tanh of the product of a kernel with patches of k pixels."""
    return jnp.tanh(jnp.tensordot(kernel, patches, 2))


def none(x: Array, w: PyTree) -> Array:
    """Returns zeros, as if the edge did not exist."""
    del w
    return jnp.zeros_like(x)


def skip(x: Array, w: PyTree) -> Array:
    """Returns the images unchanged."""
    del w
    return x


def average(x: Array, w: PyTree) -> Array:
    """Returns the mean of the 3 x 3 neighborhood of each pixel."""
    del w
    return jnp.mean(extract_neighborhoods(x), axis=0)


def conv1(x: Array, w: PyTree) -> Array:
    """Returns a 1 x 1 convolution."""
    return convolve(x[None], w["conv1"])


def conv3(x: Array, w: PyTree) -> Array:
    """Returns a 3 x 3 convolution."""
    return convolve(extract_neighborhoods(x), w["conv3"])


OPERATION_FNS = (none, skip, average, conv1, conv3)  # in the order of OPERATIONS


def mixed_operation(x: Float[Array, "c s s n"], w: PyTree, alpha: Array) -> Array:
    """Returns the mixture of the operations on one edge (equation 2).

    Args:
      x: Images.
      w: Kernels of the edge.
      alpha: Mixing weights ``[5]``, or the index of a single operation.
    """
    if alpha.ndim == 0:
        return jax.lax.switch(alpha, OPERATION_FNS, x, w)
    # Equation 2: sum_o alpha_o operation_o(x; w).
    return sum(
        (alpha[o] * operation(x, w) for o, operation in enumerate(OPERATION_FNS)),
        jnp.zeros_like(x),
    )


def scores(
    w: PyTree, alpha: Array, x: Float[Array, "n side side"]
) -> Float[Array, "n classes"]:
    """Returns the scores of a stem, the cell, a pooling layer and a linear head.

    The features are the means of the four quarters of each map.

    Args:
      w: Parameters, as in `init_network`.
      alpha: Mixing weights ``[3, 5]``, or a cell ``[3]`` of indices of operations, of
        which only these are computed.
      x: Images.
    """
    edges = [jax.tree.map(lambda leaf, e=e: leaf[e], w["edges"]) for e in range(3)]
    stem_patches = extract_neighborhoods(jnp.moveaxis(x, 0, -1)[None])
    node0 = convolve(stem_patches, w["stem"])
    node1 = mixed_operation(node0, edges[0], alpha[0])
    node2 = mixed_operation(node0, edges[1], alpha[1]) + mixed_operation(
        node1, edges[2], alpha[2]
    )
    channels, side, _, n = node2.shape
    quarters = node2.reshape(channels, 2, side // 2, 2, side // 2, n)
    features = jnp.mean(quarters, axis=(2, 4)).reshape(-1, n)
    return features.T @ w["W"] + w["b"][None]


def cross_entropy(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the mean cross-entropy, weighted by ``use``, by default 1.

    The mean of all ``use`` must be 1, that of a batch need not: the loss of a random
    batch is an unbiased estimate of that of all examples.
    """
    values = losses(lambda w, x: scores(w, alpha, x), w, batch)
    return jnp.mean(values * batch.get("use", 1))


def train_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the cross-entropy of the mixed network plus a small L2 penalty."""
    return cross_entropy(w, alpha, batch) + 1e-4 * optax.tree.norm(w, squared=True)


def val_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """Returns the cross-entropy plus the price of the expected operations."""
    # A batch consists of examples, so the price is stored once per example.
    price = jnp.mean(batch["price"])
    return cross_entropy(w, alpha, batch) + price * expected_flops(alpha, batch["x"])


def flops(channels: int, side: int) -> np.ndarray:
    """Returns the floating-point operations of the five operations on one image."""
    pixels = side * side
    conv1_flops = 2 * pixels * channels * channels
    return np.array([0, 0, 9 * pixels * channels, conv1_flops, 9 * conv1_flops])


def expected_flops(alpha: Array, x: Float[Array, "n side side"]) -> Float[Array, ""]:
    """Returns the expected floating-point operations of a cell sampled from ``alpha``.

    The unit is the largest cell. The ratio is that of a network with four channels,
    whatever the number of channels is.

    Args:
      alpha: Mixing weights ``[3, 5]``, or a cell ``[3]``.
      x: Images, whose shape determines the number of pixels.
    """
    operation_flops = flops(SIZES["small"][2], x.shape[1])
    max_flops = len(EDGES) * operation_flops.max()
    alpha = one_hot(alpha) if alpha.ndim == 1 else alpha
    # The expectation is linear: sum_e sum_o alpha_eo flops_o.
    return jnp.sum(alpha @ jnp.asarray(operation_flops / max_flops, alpha.dtype))


def accuracy(batch: PyTree, w: PyTree, alpha: Array, key: Array) -> Array:
    """Returns the fraction of the examples that are classified correctly."""
    del key
    predicted = jnp.argmax(scores(w, alpha, batch["x"]), axis=-1)
    return jnp.mean(predicted == batch["y"])


def make_metrics(
    splits: PyTree, val: PyTree, hold_out: Array | bool
) -> dict[str, Metric]:
    """Returns the accuracies of all test and all validation images, and more metrics.

    Accuracy and loss of the last third of the validation images are among them if these
    are held out.

    Args:
      splits: Result of `split`.
      val: Validation images, each with the price.
      hold_out: Argument of `make`.
    """
    metrics = {
        "test_accuracy": jax.tree_util.Partial(accuracy, splits["test"]),
        "val_accuracy": jax.tree_util.Partial(accuracy, splits["val"]),
    }
    num_val = len(val["y"])
    if has_held_out(hold_out, num_val // 3, num_val):
        held_out = jax.tree.map(lambda leaf: leaf[num_val - num_val // 3 :], val)
        metrics |= {
            "held_out_accuracy": jax.tree_util.Partial(accuracy, held_out),
            "held_out_loss": loss_metric(val_loss, held_out),
        }
    return metrics


def one_hot(cell: Sequence[int] | Array) -> Float[Array, "3 5"]:
    """Returns the ``alpha`` that selects the operations of a cell."""
    return jax.nn.one_hot(jnp.asarray(cell), len(OPERATIONS))


def split(data: PyTree, key: Array, sizes: tuple[int, int]) -> dict[str, PyTree]:
    """Returns square training, validation and test images by a random permutation.

    Args:
      data: ``{"x": [n, side * side], "y": [n]}``.
      key: PRNG key of the permutation.
      sizes: Numbers of training and validation images.
    """
    order = random_order(data, key)
    side = int(np.sqrt(data["x"].shape[1]))
    x, y = data["x"][order].reshape(-1, side, side), data["y"][order]
    num_train, num_val = sizes
    select = lambda index: {"x": x[index], "y": y[index]}
    return {
        "train": select(slice(None, num_train)),
        "val": select(slice(num_train, num_train + num_val)),
        "test": select(slice(num_train + num_val, None)),
    }


def init_network(key: Array, channels: int) -> PyTree:
    """Returns normal weights of variance 1 / inputs, and a zero bias."""
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
    price: float | Array = 0.0,
    hold_out: bool | Array = False,
    split_key: Array | None = None,
    data: PyTree = None,
    sizes: Sequence[int] | None = None,
) -> Task:
    """Returns the search for a cell that classifies images.

    On the digits 600 images are for training, 400 for validation and 797 for testing.
    ``alpha`` has shape ``[3, 5]``, a row of mixing weights per edge of `EDGES` in the
    order of `OPERATIONS`, and starts uniform.

    Args:
      key: PRNG key of the initial network.
      scale: 'small', or 'paper' for 25,000 training and 25,000 validation images and 16
        channels, which needs gray images as ``data``. DARTS itself uses CIFAR-10, cells
        of 14 edges and eight operations.
      price: Price of the operations of the largest cell, in nats.
      hold_out: Whether the last third of the validation images is excluded from the
        outer loss, for choosing settings by the metrics ``held_out_accuracy`` and
        ``held_out_loss``, which contain images of the outer loss if ``hold_out`` is
        traced and False. The metric ``val_accuracy`` is that of all of them.
      split_key: PRNG key of the split. Defaults to ``jax.random.key(0)``, for which
        `ranking` contains the accuracy of every cell.
      data: ``{"x": [n, side * side], "y": [n]}`` with classes 0 to 9 and an even side.
        Defaults to the digits.
      sizes: Numbers of training images, validation images and channels. Defaults to the
        sizes of the scale.

    Raises:
      TypeError: ``price``, ``sizes``, ``hold_out`` or an array of ``data`` has another
        type.
      ValueError: ``scale`` is unknown or needs data, ``price`` is not finite, ``sizes``
        are not three positive integers or too small for ``hold_out``, or ``data`` has
        too few examples, images that are not square, or other labels.

    >>> import jax, hypergrad as hg
    >>> task = hg.tasks.architecture.make(key=jax.random.key(0))
    >>> task.alpha.shape
    (3, 5)
    """
    key = as_key(key)
    check_choice("scale", scale, tuple(SIZES))
    check_booleans(hold_out=hold_out)
    check_finite(price=price)
    num_train, num_val, channels = as_sizes(sizes, SIZES[scale])
    num_needed = num_train + num_val + 1
    check_scale(scale, data, num_needed)
    data = load_data(data, "digits", num_needed, NUM_CLASSES)
    check_square(data["x"], even=True)
    split_key = as_key(jax.random.key(0) if split_key is None else split_key)
    splits = split(data, split_key, (num_train, num_val))
    prices = jnp.full(num_val, as_coefficient(price, data["x"].dtype))
    val = splits["val"] | {"price": prices, "use": jnp.ones(num_val)}
    used = mask_held_out(val, hold_out)
    shape = (len(EDGES), len(OPERATIONS))
    return Task(
        paradigm="supervised",
        problem=Bilevel(
            train_loss,
            val_loss,
            Batches(splits["train"], min(BATCH_SIZE, num_train)),
            Batches(val | {"use": used["use"] / jnp.mean(used["use"])}),
        ),
        solver=SOLVER,
        w=init_network(key, channels),
        alpha=jnp.full(shape, 1 / len(OPERATIONS)),
        space=spaces.Simplex(shape=shape),
        metrics=make_metrics(splits, val, hold_out),
    )


@functools.cache
def ranking() -> dict[str, np.ndarray]:
    """Returns the accuracy and loss of all `CELLS`.

    Each cell was trained several times on the default split of `make`. The arrays
    test_accuracy, test_loss, val_accuracy and val_loss have shape ``[125, trainings]``.
    ``python -m benchmarks.shared.architecture_cells`` produced them.

    >>> import hypergrad as hg
    >>> hg.tasks.architecture.ranking()["test_accuracy"].shape
    (125, 8)
    """
    lines = Path(__file__).with_name(RANKING).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    names = ("test_accuracy", "test_loss", "val_accuracy", "val_loss")
    return {name: frozen_array([row[name] for row in rows]) for name in names}
