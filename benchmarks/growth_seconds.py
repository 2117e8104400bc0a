"""How the seconds of a hypergradient grow, beside what theory says.

The sizes of a line are timed in turns; rounds during which other processes were busy
are thrown away. See README.md for the protocol.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict

from .shared import plots
from .growth import BLIND, METHODS, Sizes, as_expected, flat, run, shapes, slope, theory
from .peers.harness import CLEAN, OTHERS, ROUNDS, hardware
from .peers.worker import timed

FIXED = 0.1  # of the seconds at a size that is fitted, at most
FITTED = 3  # sizes of a line, at least
SECONDS = 0.15  # of a size in a round, or one call
SAME_SECONDS = 1.5
USUAL = Sizes(steps=4, hyperparameters=2)
LEAST = USUAL._replace(parameters=2, examples=1)  # hardly more than a dispatch

#: What varies -> its sizes, and what else is not as in `USUAL`.
AXES: dict[str, tuple[list[int], dict[str, int]]] = {
    "steps": ([1000, 3000, 10_000], {"parameters": 1000}),
    "parameters": ([10**6, 2 * 10**6, 5 * 10**6], {}),
    "hyperparameters": (
        [1, 10**3, 10**5, 10**7],
        {"parameters": 10**7, "examples": 1},
    ),
    "examples": ([10**5, 2 * 10**5, 5 * 10**5], {"parameters": 100}),
    "population": ([200, 500, 1000], {}),
}
#: Hyperparameters of an estimator whose cost is theirs.
FEW = [20, 50, 100], {"parameters": 10**5}


def sizes_of(method: str, axis: str) -> dict[int, Sizes]:
    """By the size of the axis."""
    few = axis == "hyperparameters" and method not in BLIND
    varied, rest = FEW if few else AXES[axis]
    return {size: USUAL._replace(**rest | {axis: size}) for size in varied}


def arrays(sizes: Sizes) -> tuple[PyTree, Array, Array, Array]:
    """``(data, w, alpha, key)``, of which the examples are drawn."""
    data, w, alpha, key = shapes(sizes)
    x = jax.random.normal(jax.random.key(1), data["x"].shape)
    return data | {"x": x / sizes.parameters**0.5}, w, alpha, key


def ready(method: str, sizes: Sizes) -> Callable[[], Any]:
    """A call of the compiled program, and its end."""
    data, *each = arrays(sizes)
    jitted = jax.jit(functools.partial(run, method, sizes))
    program = jitted.lower(data, data, *each).compile()
    return lambda: jax.block_until_ready(program(data, data, *each))


@functools.cache
def least(method: str) -> Callable[[], Any]:
    """Compiled once for all lines of an estimator."""
    return ready(method, LEAST)


def measure(cell: Row) -> Row:
    """Of the least program and of those of the line; ValueError on a busy machine."""
    method, axis = cell["method"], cell["axis"]
    line = sizes_of(method, axis)
    calls = [least(method), *(ready(method, sizes) for sizes in line.values())]
    rounds, discarded = in_rounds(calls)
    if len(rounds) < CLEAN:
        raise ValueError(
            f"other processes were busy in {discarded} of {ROUNDS} rounds of {method} "
            f"against {axis}; run again with nothing else running: it goes on from here"
        )
    fixed, *seconds = (list(column) for column in zip(*rounds, strict=True))
    took = {"sizes": list(line), "seconds": seconds, "fixed": fixed}
    return took | {"discarded": discarded} | hardware()


def in_rounds(calls: Sequence[Callable[[], Any]]) -> tuple[list[list[float]], int]:
    """Seconds of all calls, a list a clean round, and how many rounds were not."""
    numbers = []
    for call in calls:
        call()  # warm from here on
        numbers.append(math.ceil(SECONDS / timed(call, 1)["seconds"]))
    clean: list[list[float]] = []
    discarded = 0
    while len(clean) < CLEAN and len(clean) + discarded < ROUNDS:
        seconds, others = one_round(calls, numbers)
        if others > OTHERS:
            discarded += 1
        else:
            clean.append(seconds)
    return clean, discarded


def one_round(
    calls: Sequence[Callable[[], Any]], numbers: Sequence[int]
) -> tuple[list[float], float]:
    """Seconds of each call, and how much of a core others used over all of it."""
    seconds: list[float] = []

    def turns() -> None:
        for call, number in zip(calls, numbers, strict=True):
            seconds.append(timed(call, number)["seconds"])

    others = timed(turns, 1)["others"]
    return seconds, others


# What came of it.


def of_line(rows: list[Row], method: str, axis: str) -> Row:
    """Its row."""
    (row,) = (row for row in rows if (row["method"], row["axis"]) == (method, axis))
    return row


def medians(row: Row) -> tuple[list[int], list[float]]:
    """Sizes, and the seconds of a call at each."""
    return row["sizes"], [statistics.median(seconds) for seconds in row["seconds"]]


def exponent(row: Row) -> float:
    """Over sizes at which little is fixed; NaN where these are too few."""
    most = FIXED * np.array(medians(row)[1])
    fitted = statistics.median(row["fixed"]) <= most
    if fitted.sum() < FITTED:
        return math.nan
    sizes, seconds = (np.array(values)[fitted] for values in medians(row))
    return slope(sizes, seconds)


def judge(rows: list[Row]) -> list[Verdict]:
    """Fails where a line tells nothing; else exponents, and what is to be flat."""
    return [lacking(row) for row in rows if lacks(row)] or judged(rows)


def lacks(row: Row) -> bool:
    """Clean rounds, or sizes to be fitted."""
    return len(row["fixed"]) < CLEAN or math.isnan(exponent(row))


def lacking(row: Row) -> Verdict:
    """Fails."""
    text = (
        f"{row['method']} against {row['axis']}: fewer than {CLEAN} clean rounds, or "
    )
    text += f"than {FITTED} sizes of which a tenth at the most is fixed"
    return Verdict(text, failed=True)


def judged(rows: list[Row]) -> list[Verdict]:
    """Exponents within 0.1, and what is to be flat."""
    verdicts = []
    for axis in AXES:
        found = {method: exponent(of_line(rows, method, axis)) for method in METHODS}
        expected = {method: theory(method, "operations", axis) for method in METHODS}
        verdicts.append(as_expected(f"seconds against {axis}", found, expected))
    blind = {m: medians(of_line(rows, m, "hyperparameters")) for m in BLIND}
    return [*verdicts, flat("seconds over all hyperparameters", blind, SAME_SECONDS)]


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """Fitted exponents, theory's in brackets."""
    machine, discarded = rows[0], sum(row["discarded"] for row in rows)
    lines = [
        f"# {table.name}",
        "",
        "Fitted exponents of the seconds of one hypergradient, warm; theory's in "
        "brackets. *Least*: a call with next to nothing to do. "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB, float32; sizes in turns, medians of "
        f"{CLEAN} rounds, {discarded} discarded while others took over {OTHERS:.0%} of "
        f"a core. Command: `{command}`",
        "",
        f"| estimator | {' | '.join(AXES)} | least, µs |",
        "|---" * (2 + len(AXES)) + "|",
    ]
    for method in METHODS:
        mine = [of_line(rows, method, axis) for axis in AXES]
        cells = [
            f"{exponent(row):.2f} [{theory(method, 'operations', row['axis']):g}]"
            for row in mine
        ]
        fixed = statistics.median(seconds for row in mine for seconds in row["fixed"])
        lines.append(f"| {method} | {' | '.join(cells)} | {1e6 * fixed:.0f} |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """A panel an axis, a line a method."""
    panels = {
        ("seconds", axis): {
            method: medians(of_line(rows, method, axis)) for method in METHODS
        }
        for axis in AXES
    }
    plots.growth(panels, path)


def plan(scale: str, seeds: int) -> list[Row]:
    """A cell a line, whose sizes are timed in turns."""
    del scale, seeds
    return [
        {"method": method, "axis": axis, "seed": 0}
        for method in METHODS
        for axis in AXES
    ]


TABLE = Table(
    name="growth-seconds",
    source="measured; costs as each estimator's docstring states them",
    minutes=12,
    seeds=1,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
