"""Growth of the seconds of a hypergradient, compared with theory.

*Question.* Do the seconds of one hypergradient grow as its operations do?

*System and estimators.* Those of the table `growth`; the examples are sampled from a
normal distribution and scaled so that descent converges. Where an axis does not say
otherwise: 4 steps, 2 hyperparameters, 8 examples, 10,000 parameters.

*Axes.* Steps 1, 3 and 10 thousand, with 1,000 parameters; parameters 1, 2 and 5
million; hyperparameters 1, 10^3, 10^5 and 10^7 of 10^7 parameters, with one example
(`Forward` and `CentralDifference` 20, 50 and 100 of 10^5 parameters); examples 1, 2 and
5 times 10^5, with 100 parameters; a population of 200, 500 and 1,000. Parameters and
examples begin at data of 32 and 40 MB, populations at 8 MB per vector: within a cache,
and across its edge, seconds grow unlike operations. Devices have no seconds here,
because forced ones share the cores of one machine.

*Timing.* A line is an estimator along an axis. The programs of its sizes, and the
estimator's *minimal* program (2 parameters, 2 hyperparameters, one example, 4 steps),
are compiled and called twice. Then, in each round, every size makes one repetition, one
after the other, of as many calls as took 0.15 s when it was called for the second time,
at least one. A round during which other processes took over 8% of a core is discarded
and counted; a line ends with five clean rounds. After 20 rounds without them the cell
fails, and a new run continues with it. Seconds are medians over the clean rounds. The
table must be run with no other program running and no persistent compilation cache.

*Exponents.* They are slopes of least squares in logarithms over the sizes of a line at
which a call takes at least ten times the minimal one, so that the fixed cost, the
dispatch, is at most a tenth. A line with fewer than three such sizes, or with fewer
than five clean rounds, fails the check. Theory is that of operations.

*Claims.* Each exponent is within 0.1 of theory. Seconds of every estimator but
`Forward` and `CentralDifference` are the same from 1 to 10^7 hyperparameters within a
factor of 1.5. Both may fail where operations agree with theory: memory is read at other
speeds at other sizes, and two threads may share the work of one size and not of
another.
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

from hypergrad.bench import Cell, Finding, MeasurementTable, Row, select
from hypergrad.bench.report import markdown_table

from .peers.harness import MAX_OTHER_LOAD, MAX_ROUNDS, NUM_CLEAN, hardware
from .peers.worker import time_calls
from .shared import plots
from .shared.growth_programs import (
    BLIND,
    METHODS,
    Sizes,
    compare_exponents,
    compare_spread,
    fit_power,
    init_arrays,
    run,
    theory,
)

MAX_FIXED_FRACTION = 0.1  # of the seconds at a size that is fitted
MIN_FITTED_SIZES = 3
ROUND_SECONDS = 0.15  # of a size in a round, or one call
MAX_SECONDS_RATIO = 1.5
DEFAULT_SIZES = Sizes(steps=4, hyperparameters=2)
MINIMAL_SIZES = DEFAULT_SIZES._replace(parameters=2, examples=1)  # mostly dispatch

#: Axis -> its sizes, and the other sizes where they differ from `DEFAULT_SIZES`.
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
#: Sizes of an estimator whose cost grows with the hyperparameters.
FEW_HYPERPARAMETERS = [20, 50, 100], {"parameters": 10**5}


def sizes_of(method: str, axis: str) -> dict[int, Sizes]:
    """Returns all sizes of a line, by the size along the axis."""
    has_few = axis == "hyperparameters" and method not in BLIND
    values, fixed = FEW_HYPERPARAMETERS if has_few else AXES[axis]
    return {value: DEFAULT_SIZES._replace(**fixed | {axis: value}) for value in values}


def sample_arrays(sizes: Sizes) -> tuple[PyTree, Array, Array, Array]:
    """Returns ``(data, w, alpha, key)`` with random examples."""
    data, w, alpha, key = init_arrays(sizes)
    x = jax.random.normal(jax.random.key(1), data["x"].shape)
    return data | {"x": x / sizes.parameters**0.5}, w, alpha, key


def make_call(method: str, sizes: Sizes) -> Callable[[], Any]:
    """Returns a function that runs the compiled program and waits for its result."""
    data, *args = sample_arrays(sizes)
    jitted = jax.jit(functools.partial(run, method, sizes))
    program = jitted.lower(data, data, *args).compile()
    return lambda: jax.block_until_ready(program(data, data, *args))


@functools.cache
def minimal_call(method: str) -> Callable[[], Any]:
    """Returns the call of the minimal program, compiled once per estimator."""
    return make_call(method, MINIMAL_SIZES)


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the seconds of the minimal program and of those of the line.

    Raises:
      ValueError: Other processes were busy in too many rounds.
    """
    del rows
    method, axis = cell["method"], cell["axis"]
    line = sizes_of(method, axis)
    sized_calls = [make_call(method, sizes) for sizes in line.values()]
    rounds, num_discarded = time_in_rounds([minimal_call(method), *sized_calls])
    if len(rounds) < NUM_CLEAN:
        raise ValueError(
            f"other processes were busy in {num_discarded} of {MAX_ROUNDS} rounds of "
            f"{method} against {axis}; run again with no other program running"
        )
    fixed, *seconds = (list(column) for column in zip(*rounds, strict=True))
    row = {"sizes": list(line), "seconds": seconds, "fixed": fixed}
    return row | {"discarded": num_discarded} | hardware()


def time_in_rounds(
    calls: Sequence[Callable[[], Any]],
) -> tuple[list[list[float]], int]:
    """Returns the seconds of all calls per clean round, and the number of others."""
    numbers = []
    for call in calls:
        call()  # warm from here on
        numbers.append(math.ceil(ROUND_SECONDS / time_calls(call, 1)["seconds"]))
    clean: list[list[float]] = []
    num_discarded = 0
    while len(clean) < NUM_CLEAN and len(clean) + num_discarded < MAX_ROUNDS:
        seconds, busy = time_round(calls, numbers)
        if busy > MAX_OTHER_LOAD:
            num_discarded += 1
        else:
            clean.append(seconds)
    return clean, num_discarded


def time_round(
    calls: Sequence[Callable[[], Any]], numbers: Sequence[int]
) -> tuple[list[float], float]:
    """Returns the seconds of each call, and the fraction of a core others used."""
    seconds: list[float] = []

    def run_calls() -> None:
        for call, number in zip(calls, numbers, strict=True):
            seconds.append(time_calls(call, number)["seconds"])

    busy = time_calls(run_calls, 1)["others"]
    return seconds, busy


# Findings.


def line_row(rows: list[Row], method: str, axis: str) -> Row:
    """Returns the row of a line."""
    (row,) = select(rows, method=method, axis=axis)
    return row


def medians(row: Row) -> tuple[list[int], list[float]]:
    """Returns the sizes, and the median seconds of a call at each."""
    return row["sizes"], [statistics.median(seconds) for seconds in row["seconds"]]


def exponent(row: Row) -> float:
    """Returns the exponent over sizes with little fixed cost; NaN if they are few."""
    sizes, seconds = (np.array(values) for values in medians(row))
    is_fitted = statistics.median(row["fixed"]) <= MAX_FIXED_FRACTION * seconds
    if is_fitted.sum() < MIN_FITTED_SIZES:
        return math.nan
    return fit_power(sizes[is_fitted], seconds[is_fitted])


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the lines that cannot be fitted, or else outcomes for all exponents."""
    incomplete = [row for row in rows if is_incomplete(row)]
    if incomplete:
        return [
            Finding(
                f"{row['method']} against {row['axis']}: fewer than {NUM_CLEAN} clean "
                f"rounds, or than {MIN_FITTED_SIZES} sizes with at most a tenth of "
                "fixed cost",
                "FAILED",
            )
            for row in incomplete
        ]
    outcomes = []
    for axis in AXES:
        actual = {method: exponent(line_row(rows, method, axis)) for method in METHODS}
        expected = {method: theory(method, "operations", axis) for method in METHODS}
        outcomes.append(compare_exponents(f"seconds against {axis}", actual, expected))
    lines = {m: medians(line_row(rows, m, "hyperparameters")) for m in BLIND}
    label = "seconds over all hyperparameters"
    return [*outcomes, compare_spread(label, lines, MAX_SECONDS_RATIO)]


def is_incomplete(row: Row) -> bool:
    """Returns True if clean rounds, or sizes to be fitted, are too few."""
    return len(row["fixed"]) < NUM_CLEAN or math.isnan(exponent(row))


def body(rows: list[Row]) -> list[str]:
    """Returns a line per estimator: fitted exponents, those of theory in brackets."""
    machine, num_discarded = rows[0], sum(row["discarded"] for row in rows)
    text = (
        "Fitted exponents of the seconds of one hypergradient, warm; theory's in "
        "brackets. *Minimal*: a call with next to no work. "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory'] / 2**30:.0f} GiB, float32; sizes in turns, medians of "
        f"{NUM_CLEAN} rounds, {num_discarded} discarded while other processes "
        f"took over {MAX_OTHER_LOAD:.0%} of a core."
    )
    cells = []
    for method in METHODS:
        method_rows = [line_row(rows, method, axis) for axis in AXES]
        texts = [
            f"{exponent(row):.2f} [{theory(method, 'operations', row['axis']):g}]"
            for row in method_rows
        ]
        fixed = statistics.median(x for row in method_rows for x in row["fixed"])
        cells.append([method, *texts, f"{1e6 * fixed:.0f}"])
    headings = ["estimator", *AXES, "minimal, µs"]
    return [text, "", *markdown_table(headings, cells)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots a panel per axis with a line per method."""
    panels = {
        ("seconds", axis): {
            method: medians(line_row(rows, method, axis)) for method in METHODS
        }
        for axis in AXES
    }
    plots.growth(panels, path)


def cells(scale: str, seeds: int) -> list[Cell]:
    """Returns a cell per line, whose sizes are timed in turns."""
    del scale, seeds
    return [
        {"method": method, "axis": axis, "seed": 0}
        for method in METHODS
        for axis in AXES
    ]


table = MeasurementTable(
    cells=cells,
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="theory: the costs in the docstrings of the estimators",
    data="random examples",
    minutes=12,
    seeds=1,
)
