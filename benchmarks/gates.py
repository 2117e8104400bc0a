"""A gate for each pixel and each hidden unit of a network, and what the open ones cost.

Digits by a network without biases, of which gates g and h decide what is there,

    f(x) = W2' (h * tanh(W1' (g * x))),    L(w, a) = mean CE(f) + PENALTY/2 ||w||²

With n pixels and m units left: operations, bytes, and seconds by a table that was
measured. At gates of 0 and 1 all three are those of the smaller network. See README.md.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies import record
from hypergrad.studies.record import Row
from hypergrad.studies.study import digits
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict

from .shared import plots
from .__main__ import RESULTS

PIXELS, HIDDEN, CLASSES = 64, 32, 10
NUM_TRAIN = NUM_VAL = 400
PENALTY = 1e-3
COSTS = ("flops", "latency", "memory")
BATCH = 32  # examples whose activations a reverse pass keeps
BYTES = 4  # of a number


class Gates(NamedTuple):
    """Between 0 and 1: of the pixels, and of the hidden units."""

    pixels: Array | np.ndarray
    hidden: Array | np.ndarray


ALL = Gates(np.ones(PIXELS, np.float32), np.ones(HIDDEN, np.float32))


def scores(w: PyTree, gates: Gates, x: Array) -> Array:
    """[batch, classes]."""
    first = gates.pixels[:, None] * w["first"]  # the same as of x, and less to do
    return jnp.tanh(x @ first) @ (gates.hidden[:, None] * w["second"])


def cross_entropy(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    found = scores(w, gates, batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, batch["y"]))


def error(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    """Share of the examples that are taken for another class."""
    return jnp.mean(jnp.argmax(scores(w, gates, batch["x"]), axis=1) != batch["y"])


def inner_loss(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    """The penalty keeps weights from making up for a gate."""
    squares = sum(jnp.sum(layer**2) for layer in w.values())
    return cross_entropy(w, gates, batch) + PENALTY / 2 * squares


def rounded(gates: Gates) -> Gates:
    """The largest gates are 1, as many as the gates' sum says, the others 0."""

    def of_layer(x: Array) -> Array:
        place = jnp.argsort(jnp.argsort(-x))  # 0 is the largest
        return (place < jnp.maximum(jnp.round(jnp.sum(x)), 1)).astype(x.dtype)

    return jax.tree.map(of_layer, gates)


def start(seed: int) -> PyTree:
    """``w`` at which every training begins."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "first": jax.random.normal(first, (PIXELS, HIDDEN)) / PIXELS**0.5,
        "second": jax.random.normal(second, (HIDDEN, CLASSES)) / HIDDEN**0.5,
    }


@functools.cache
def split(seed: int) -> dict[str, PyTree]:
    """Training, validation and test digits by a permutation drawn from the seed."""
    data = digits()
    order = np.random.default_rng(seed).permutation(len(data["y"]))
    ends = np.split(order, [NUM_TRAIN, NUM_TRAIN + NUM_VAL])
    x, y = np.asarray(data["x"], np.float32), np.asarray(data["y"], np.int32)
    part = lambda rows: {"x": jnp.asarray(x[rows]), "y": jnp.asarray(y[rows])}
    names = "train", "val", "test"
    return {name: part(of) for name, of in zip(names, ends, strict=True)}


# What the open gates cost.


def widths(gates: Gates) -> tuple[Array, Array]:
    """Pixels and hidden units that are left, whole numbers or not; at least one."""
    n, m = (jnp.sum(x) for x in gates)
    return jnp.maximum(n, 1), jnp.maximum(m, 1)


def costs(
    n: float | Array, m: float | Array, latency: hg.objectives.LatencyTable
) -> Array:
    """[3]: operations on one example, seconds, bytes of weights and activations."""
    sizes = [n, m, CLASSES]
    flops = hg.objectives.num_flops(sizes)
    held = hg.objectives.activation_bytes(sizes, BATCH, BYTES)
    weights = flops / 2  # each is multiplied and added once
    return jnp.stack([flops, latency(n, m), held + BYTES * weights])


def shares(gates: Gates, latency: hg.objectives.LatencyTable) -> Array:
    """[3]: 0 for one pixel and one unit, 1 for all of them."""
    return shares_of(*widths(gates), latency)


def shares_of(
    n: float | Array, m: float | Array, latency: hg.objectives.LatencyTable
) -> Array:
    """[3]: those of a network of n pixels and m units."""
    one, whole = (costs(*of, latency) for of in ((1.0, 1.0), (1.0 * PIXELS, HIDDEN)))
    return (costs(n, m, latency) - one) / (whole - one)


# The table of latencies.

NAME = "pareto-latency"
KNOTS = (1, 8, 16, 32, 64), (1, 4, 8, 16, 32)  # pixels, units
EXAMPLES, TURNS, CALLS = 4000, 40, 10


@functools.cache
def forward(n: int, m: int) -> Callable[[], Array]:
    """Scores of many examples by a network of n pixels and m units."""
    w = {"first": jnp.ones((n, m)), "second": jnp.ones((m, CLASSES))}
    x = jnp.ones((EXAMPLES, n))
    run = jax.jit(lambda w, x: jnp.tanh(x @ w["first"]) @ w["second"])
    return lambda: run(w, x)


def time_all(cell: Row) -> Row:
    """All knots in turns: the least median at each."""
    del cell
    measure = hg.objectives.LatencyTable.measure
    turns = [measure(forward, *KNOTS, num_repeats=CALLS) for _ in range(TURNS)]
    return {"seconds": np.min([t.seconds for t in turns], axis=0).tolist()}


def passes_of(rows: list[Row]) -> np.ndarray:
    """[passes, n, m], seconds."""
    return np.array([row["seconds"] for row in rows], float)


@functools.cache
def committed() -> hg.objectives.LatencyTable:
    """Of the rows in ``results``."""
    path = RESULTS / f"{NAME}.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is missing: run python -m benchmarks {NAME}")
    return table_of(record.read(path))


@functools.cache
def passes() -> tuple[hg.objectives.LatencyTable, ...]:
    """Each of the committed ones by itself."""
    return tuple(table_of([row]) for row in record.read(RESULTS / f"{NAME}.jsonl"))


def table_of(rows: list[Row]) -> hg.objectives.LatencyTable:
    """The median pass at each knot."""
    knots = tuple(jnp.array(axis, float) for axis in KNOTS)
    return hg.objectives.LatencyTable(knots, jnp.array(np.median(passes_of(rows), 0)))


def judge(rows: list[Row]) -> list[Verdict]:
    """How far passes are from the median one, and where that falls; no claim."""
    middle = np.median(passes_of(rows), axis=0)
    off = np.abs(passes_of(rows) / middle - 1)
    text = f"a pass is {np.median(off):.0%} off the median one at a knot in the median"
    steps = np.concatenate([np.diff(middle, axis=axis).ravel() for axis in (0, 1)])
    falls = f"more pixels or units take less at {np.sum(steps < 0)} of {steps.size}"
    return [
        Verdict(f"{text}, {off.max():.0%} at most"),
        Verdict(f"{falls} steps from a knot to the next: the table is not monotone")
        if np.any(steps < 0)
        else Verdict("the table is monotone"),
    ]


def markdown(table: Table, rows: list[Row], command: str) -> str:
    lines = [
        f"# {table.name}",
        "",
        f"Microseconds of {EXAMPLES:,} examples, by pixels (rows) and hidden units: "
        f"the median of {len(rows)} passes, in brackets the least and the largest; a "
        f"pass is the least of {TURNS} medians of {CALLS} calls. Command: `{command}`",
        "",
        "| pixels | " + " | ".join(f"{m} hidden" for m in KNOTS[1]) + " |",
        "|" + "---|" * (1 + len(KNOTS[1])),
    ]
    low, middle, high = np.quantile(passes_of(rows), (0, 0.5, 1), axis=0) * 1e6
    for n, *of_row in zip(KNOTS[0], low, middle, high, strict=True):
        cells = [f"{y:.0f} ({x:.0f}-{z:.0f})" for x, y, z in zip(*of_row, strict=True)]
        lines.append("| " + " | ".join([str(n), *cells]) + " |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """A dot a pass at each knot."""
    seconds = passes_of(rows) * 1e6
    panels = {
        f"{n} pixels": {
            f"{m} hidden": seconds[:, i, j].tolist() for j, m in enumerate(KNOTS[1])
        }
        for i, n in enumerate(KNOTS[0])
    }
    plots.strips(panels, path, "microseconds", lines=())


TABLE = Table(
    name=NAME,
    source="Cai et al. 2019 (arXiv 1812.00332)",
    minutes=1,
    seeds=9,
    plan=lambda scale, seeds: [{"method": "forward", "seed": i} for i in range(seeds)],
    run=cell_by_cell(time_all, markdown, draw),
    judge=judge,
)
