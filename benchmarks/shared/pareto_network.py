"""A network with a gate for each pixel and each hidden unit, and its costs.

The digits are classified by a network without biases whose gates ``g`` and ``h`` decide
which pixels and hidden units exist::

    f(x) = W2' (h * tanh(W1' (g * x))),    L(w, a) = mean CE(f) + PENALTY/2 ||w||²

A network with n pixels and m hidden units has a number of operations, a number of
bytes, and seconds by a measured table. At gates of 0 and 1 all three are those of the
smaller network.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Row
from hypergrad.bench.rows import read_rows

from .tuning import digits

PIXELS, HIDDEN, CLASSES = 64, 32, 10
NUM_TRAIN = NUM_VAL = 400
PENALTY = 1e-3
COSTS = ("flops", "latency", "memory")
BATCH = 32  # examples whose activations a reverse pass keeps
BYTES = 4  # per number
#: Rows of the table of latencies, and the pixels and hidden units of its entries.
LATENCY_ROWS = Path(__file__).parents[1] / "results" / "pareto_latency.jsonl"
KNOTS = (1, 8, 16, 32, 64), (1, 4, 8, 16, 32)


class Gates(NamedTuple):
    """Gates between 0 and 1 of the pixels and of the hidden units."""

    pixels: Array | np.ndarray
    hidden: Array | np.ndarray


ALL = Gates(np.ones(PIXELS, np.float32), np.ones(HIDDEN, np.float32))


def scores(w: PyTree, gates: Gates, x: Array) -> Array:
    """Returns the class scores, [batch, classes]."""
    # Gating the weights equals gating x and needs fewer operations.
    first = gates.pixels[:, None] * w["first"]
    return jnp.tanh(x @ first) @ (gates.hidden[:, None] * w["second"])


def cross_entropy(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    """Returns the mean cross-entropy of a batch."""
    logits = scores(w, gates, batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def error(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    """Returns the fraction of examples that are classified wrongly."""
    return jnp.mean(jnp.argmax(scores(w, gates, batch["x"]), axis=1) != batch["y"])


def inner_loss(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    """Returns the training loss; its penalty keeps weights from undoing a gate."""
    squares = sum(jnp.sum(layer**2) for layer in w.values())
    return cross_entropy(w, gates, batch) + PENALTY / 2 * squares


def round_gates(gates: Gates) -> Gates:
    """Returns gates of 0 and 1: per layer the largest, as many as the gates sum to."""

    def per_layer(x: Array) -> Array:
        position = jnp.argsort(jnp.argsort(-x))  # 0 is the largest
        return (position < jnp.maximum(jnp.round(jnp.sum(x)), 1)).astype(x.dtype)

    return jax.tree.map(per_layer, gates)


def init_w(seed: int) -> PyTree:
    """Returns the weights at which every training of a seed starts."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "first": jax.random.normal(first, (PIXELS, HIDDEN)) / PIXELS**0.5,
        "second": jax.random.normal(second, (HIDDEN, CLASSES)) / HIDDEN**0.5,
    }


@functools.cache
def split(seed: int) -> dict[str, PyTree]:
    """Returns training, validation and test digits by a permutation of the seed."""
    data = digits()
    order = np.random.default_rng(seed).permutation(len(data["y"]))
    indices = np.split(order, [NUM_TRAIN, NUM_TRAIN + NUM_VAL])
    x, y = np.asarray(data["x"], np.float32), np.asarray(data["y"], np.int32)
    subset = lambda rows: {"x": jnp.asarray(x[rows]), "y": jnp.asarray(y[rows])}
    names = "train", "val", "test"
    return {name: subset(rows) for name, rows in zip(names, indices, strict=True)}


# Costs of the open gates.


def widths(gates: Gates) -> tuple[Array, Array]:
    """Returns the pixels and hidden units that are left, at least one of each."""
    n, m = (jnp.sum(x) for x in gates)
    return jnp.maximum(n, 1), jnp.maximum(m, 1)


def costs(
    n: float | Array, m: float | Array, latency: hg.objectives.LatencyTable
) -> Array:
    """Returns operations on one example, seconds, and bytes of weights and activations.

    The result has shape [3], in the order of `COSTS`.
    """
    sizes = [n, m, CLASSES]
    flops = hg.objectives.num_flops(sizes)
    activations = hg.objectives.activation_bytes(sizes, BATCH, BYTES)
    weights = flops / 2  # each is multiplied and added once
    return jnp.stack([flops, latency(n, m), activations + BYTES * weights])


def cost_fractions(gates: Gates, latency: hg.objectives.LatencyTable) -> Array:
    """Returns the costs of gates, [3]: 0 for one pixel and unit, 1 for the network."""
    return cost_fractions_of(*widths(gates), latency)


def cost_fractions_of(
    n: float | Array, m: float | Array, latency: hg.objectives.LatencyTable
) -> Array:
    """Returns the costs of a network of n pixels and m units; see `cost_fractions`."""
    one, full = (costs(*x, latency) for x in ((1.0, 1.0), (1.0 * PIXELS, HIDDEN)))
    return (costs(n, m, latency) - one) / (full - one)


# Latencies.


def latency_table(rows: list[Row]) -> hg.objectives.LatencyTable:
    """Returns the table of the median pass at each knot; a row is a pass."""
    knots = tuple(jnp.array(axis, float) for axis in KNOTS)
    seconds = np.array([row["seconds"] for row in rows], float)
    return hg.objectives.LatencyTable(knots, jnp.array(np.median(seconds, 0)))


@functools.cache
def committed_latency() -> hg.objectives.LatencyTable:
    """Returns the table of the committed rows, which are not measured again."""
    return latency_table(read_rows(LATENCY_ROWS))


@functools.cache
def committed_passes() -> tuple[hg.objectives.LatencyTable, ...]:
    """Returns a table of each committed pass."""
    return tuple(latency_table([row]) for row in read_rows(LATENCY_ROWS))
