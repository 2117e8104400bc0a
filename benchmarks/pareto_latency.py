"""Latencies of small networks, from which the table pareto interpolates.

Question. How many seconds does the forward pass of a network take that has some of its
64 pixels and 32 hidden units left? The table pareto uses the answer as one of its three
costs; it reads the committed rows, because times differ between runs.

Measured. The class scores of 4,000 examples by a network of n pixels, m hidden units
(tanh), ten classes and no biases, compiled, for n in {1, 8, 16, 32, 64} and m in
{1, 4, 8, 16, 32}. A row is one pass over all 25 pairs. Each pass measures the pairs 40
times in turn, each time as the median of 10 calls, and keeps the minimum of the 40 at
each pair, so that other load on the machine adds little. The method is Cai et al.'s
lookup table of latencies. A seed is the number of the pass and has no other meaning.

Nothing is claimed. Two lines report how far passes are from their median, and whether
more pixels or hidden units ever take less time.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import hypergrad as hg
from hypergrad.bench import Finding, MeasurementTable, Row
from hypergrad.bench.report import markdown_table

from .shared import plots
from .shared.pareto_network import CLASSES, KNOTS
from .shared.tuning import cells_of

NUM_EXAMPLES, NUM_TURNS, NUM_CALLS = 4000, 40, 10


@functools.cache
def forward(n: int, m: int) -> Callable[[], Array]:
    """Returns a function that computes the scores of a network of n pixels, m units."""
    w = {"first": jnp.ones((n, m)), "second": jnp.ones((m, CLASSES))}
    x = jnp.ones((NUM_EXAMPLES, n))
    run = jax.jit(lambda w, x: jnp.tanh(x @ w["first"]) @ w["second"])
    return lambda: run(w, x)


def measure_pass(cell: Row, rows: list[Row]) -> Row:
    """Returns the minimum over the turns of the median seconds at each pair."""
    del cell, rows
    measure = hg.objectives.LatencyTable.measure
    turns = [measure(forward, *KNOTS, num_repeats=NUM_CALLS) for _ in range(NUM_TURNS)]
    return {"seconds": np.min([turn.seconds for turn in turns], axis=0).tolist()}


def seconds_of(rows: list[Row]) -> np.ndarray:
    """Returns the seconds of all passes, [passes, n, m]."""
    return np.array([row["seconds"] for row in rows], float)


def findings(rows: list[Row]) -> list[Finding]:
    """Returns how far passes are from their median, and where more units take less."""
    median = np.median(seconds_of(rows), axis=0)
    deviation = np.abs(seconds_of(rows) / median - 1)
    steps = np.concatenate([np.diff(median, axis=axis).ravel() for axis in (0, 1)])
    num_falls = np.sum(steps < 0)
    monotone = "the table is monotone"
    if num_falls:
        monotone = (
            f"more pixels or units take less time at {num_falls} of {steps.size} steps "
            "from a pair to the next: the table is not monotone"
        )
    return [
        Finding(
            f"the deviation of a pass from the median pass at a pair is "
            f"{np.median(deviation):.0%} in the median, {deviation.max():.0%} at most"
        ),
        Finding(monotone),
    ]


def body(rows: list[Row]) -> list[str]:
    """Returns the table of microseconds by pixels and hidden units."""
    text = (
        f"Microseconds for {NUM_EXAMPLES:,} examples: the median of {len(rows)} passes,"
        " in brackets the minimum and the maximum."
    )
    lines = []
    low, median, high = np.quantile(seconds_of(rows), (0, 0.5, 1), axis=0) * 1e6
    for n, *values in zip(KNOTS[0], low, median, high, strict=True):
        cells = [f"{y:.0f} ({x:.0f}-{z:.0f})" for x, y, z in zip(*values, strict=True)]
        lines.append([str(n), *cells])
    headings = ["pixels", *(f"{m} hidden" for m in KNOTS[1])]
    return [text, "", *markdown_table(headings, lines)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots one dot per pass at each pair."""
    seconds = seconds_of(rows) * 1e6
    panels = {
        f"{n} pixels": {
            f"{m} hidden": seconds[:, i, j].tolist() for j, m in enumerate(KNOTS[1])
        }
        for i, n in enumerate(KNOTS[0])
    }
    plots.strips(panels, path, "microseconds", lines=())


table = MeasurementTable(
    cells=cells_of(["forward"]),
    measure_cell=measure_pass,
    findings=findings,
    body=body,
    plot=plot,
    seeds=9,
    minutes=1,
    paradigm="supervised",
    source="Cai et al. 2019 (arXiv 1812.00332)",
)
