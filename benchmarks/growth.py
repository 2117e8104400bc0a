"""Growth of the operations and bytes of a hypergradient, compared with theory.

*Question.* How do operations and bytes of one hypergradient grow with inner steps,
parameters, hyperparameters, examples, a population and devices, and is that the growth
that theory predicts?

*System.* Logistic regression with log-penalties, each shared by equally many
consecutive weights, float32, descent with rate 0.1 and momentum 0.9 on all examples,
as many examples for validation. Where an axis does not say otherwise: 10 steps, 10
hyperparameters, 8 examples, 10,000 parameters.

*Axes.* Steps 10 to 10^6, with 10^5 parameters (the buffer of `Reversible`, a sixth of a
bit per number and step, outgrows its vectors only then); parameters 10^3 to 10^7;
hyperparameters 1 to 10^7 of 10^7 parameters (`Forward` and `CentralDifference`, whose
cost grows with them, to 10^3); examples 10^2 to 10^6, with 100 parameters; a population
of 1 to 10^3 runs, each with its own ``w``, ``alpha`` and key, by `jax.vmap`; 2 to 16
devices with 1,000 examples and 100 parameters on each, data parallel.

*Estimators.* `Implicit` by CG and by Neumann with 4 products, `Unrolled` with
checkpoints, with all steps stored, and of the last 10 steps, `Forward`, `Reversible`,
`FixedPoint` with 4 terms, `FiniteDifference`, `Penalty`, `CentralDifference`,
`Evolution` with 2 pairs, and as many joint steps of `SOBA` as the others make inner
steps.

*Measured.* Each cell is one program, compiled and not run: operations (each loop of
unknown length makes 4 iterations, as many as `CG` may) and scratch, the bytes that XLA
plans between arguments and results. Devices are forced on the host, and the counts are
those of one device, by XLA's analysis of the program that it partitioned. That analysis
counts the body of a loop once and both sides of a branch, which is enough to detect
growth. One device is left out, because XLA drops there a branch on a constant that it
keeps in a partitioned program; communication between devices is not counted. All counts
are the same on every run, so that there is one seed. These are exponents by count, not
by time; `growth_seconds` measures seconds. Where loops state their lengths in the
program, the count of operations follows from them. An operation that
`hypergrad.cost.flops` cannot count fails the check.

*Exponents.* They are slopes of least squares in logarithms over the last two decades of
an axis, where constant terms matter least; for devices over all sizes. Theory:
operations grow in proportion to steps, parameters, examples and population, not with
devices, and not with hyperparameters except for `Forward` and `CentralDifference`.
Scratch grows in proportion to parameters and population, and to examples where these
are more; not with devices; with hyperparameters for `Forward` alone; with steps not at
all, except as the square root for `Unrolled` with checkpoints and in proportion where
all steps are stored and for the buffer of `Reversible`.

*Claims.* Each exponent is within 0.1 of theory. Scratch of `Implicit` is the same at
all numbers of steps within a factor of 1.1. Operations of every estimator but `Forward`
and `CentralDifference` are the same from 1 to 10^7 hyperparameters within a factor of
1.5.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hypergrad as hg
from hypergrad.bench import Cell, Finding, MeasurementTable, Row, select
from hypergrad.bench.report import markdown_table

from .shared import plots
from .shared.growth_devices import DEVICES, SIZES_PER_DEVICE, count_on_devices
from .shared.growth_programs import (
    BLIND,
    COLUMNS,
    IMPLICIT,
    METHODS,
    PRODUCTS,
    Sizes,
    compare_exponents,
    compare_spread,
    fit_power,
    init_arrays,
    run,
    theory,
)

MAX_SIZE_RATIO = 100  # between the sizes of a fit
MAX_SCRATCH_RATIO, MAX_OPERATIONS_RATIO = 1.1, 1.5


def decades(low: int, high: int) -> list[int]:
    """Returns powers of ten."""
    return [10**i for i in range(low, high + 1)]


#: Axis -> its sizes, and the other sizes where they differ from those of `Sizes`.
AXES: dict[str, tuple[list[int], dict[str, int]]] = {
    "steps": (decades(1, 6), {"parameters": 10**5}),
    "parameters": (decades(3, 7), {}),
    "hyperparameters": (decades(0, 7), {"parameters": 10**7}),
    "examples": (decades(2, 6), {"parameters": 100}),
    "population": (decades(0, 3), {}),
    "devices": (DEVICES, SIZES_PER_DEVICE),
}


def sizes_of(cell: Cell) -> Sizes:
    """Returns all sizes of a cell."""
    axis = cell["axis"]
    return Sizes(**AXES[axis][1] | {axis: cell["size"]})


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns operations and scratch of the compiled program."""
    del rows
    sizes = sizes_of(cell)
    if cell["axis"] == "devices":
        return sizes._asdict() | count_on_devices(cell["method"])[sizes.devices]
    data, *args = jax.eval_shape(functools.partial(init_arrays, sizes))
    function = functools.partial(run, cell["method"], sizes)
    program = hg.cost.compile_program(function, data, data, *args)
    loops = [PRODUCTS] * len(program.flops.loops)
    return {
        **sizes._asdict(),
        "operations": program.flops.total(*loops),
        "scratch": program.memory.temporaries,
        "unknown": list(program.flops.unknown),
    }


def exponent(sizes: Any, values: Any) -> float:
    """Returns the exponent over the sizes within two decades of the largest."""
    sizes, values = np.asarray(sizes, float), np.asarray(values, float)
    is_fitted = sizes * MAX_SIZE_RATIO >= sizes.max()
    return fit_power(sizes[is_fitted], values[is_fitted])


def line(rows: list[Row], method: str, axis: str, column: str) -> tuple[list, list]:
    """Returns sizes, ascending, and values."""
    line_rows = select(rows, method=method, axis=axis)
    line_rows.sort(key=lambda row: row["size"])
    return [row["size"] for row in line_rows], [row[column] for row in line_rows]


def findings(rows: list[Row]) -> list[Finding]:
    """Returns outcomes for exponents and spreads, and the check of uncounted work."""
    lines_of = lambda column, axis, methods: {
        method: line(rows, method, axis, column) for method in methods
    }
    outcomes = []
    for column, axis in itertools.product(COLUMNS, AXES):
        lines = lines_of(column, axis, METHODS)
        actual = {method: exponent(*pair) for method, pair in lines.items()}
        expected = {method: theory(method, column, axis) for method in METHODS}
        label = f"{column} against {axis}"
        outcomes.append(compare_exponents(label, actual, expected))
    scratch = lines_of("scratch", "steps", IMPLICIT)
    operations = lines_of("operations", "hyperparameters", BLIND)
    label = "operations over all hyperparameters"
    return [
        *outcomes,
        compare_spread("scratch over all steps", scratch, MAX_SCRATCH_RATIO),
        compare_spread(label, operations, MAX_OPERATIONS_RATIO),
        check_uncounted(rows),
    ]


def check_uncounted(rows: list[Row]) -> Finding:
    """Returns a failure if a program has operations without a count.

    Programs of several devices are counted by XLA, which does not report this.
    """
    counted_rows = [row for row in rows if row["axis"] != "devices"]
    names = sorted({name for row in counted_rows for name in row["unknown"]})
    number = sum(bool(row["unknown"]) for row in counted_rows)
    text = f"{number} of {len(counted_rows)} programs have uncounted operations"
    if names:
        return Finding(f"{text}: {', '.join(names)}", "FAILED")
    return Finding(text, "holds")


def body(rows: list[Row]) -> list[str]:
    """Returns a line per estimator: fitted exponents, those of theory in brackets."""
    text = (
        "Fitted exponents of operations and of scratch bytes of one hypergradient, "
        "compiled and not run; those of theory in brackets."
    )
    pairs = list(itertools.product(COLUMNS, AXES))
    cells = [
        [
            method,
            *(
                f"{exponent(*line(rows, method, axis, column)):z.2f} "
                f"[{theory(method, column, axis):g}]"
                for column, axis in pairs
            ),
        ]
        for method in METHODS
    ]
    headings = ["estimator", *map(", ".join, pairs)]
    return [text, "", *markdown_table(headings, cells)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots a panel per column and axis, with a line per method."""
    panels = {
        (column, axis): {method: line(rows, method, axis, column) for method in METHODS}
        for column in COLUMNS
        for axis in AXES
    }
    plots.growth(panels, path)


def cells(scale: str, seeds: int) -> list[Cell]:
    """Returns the cells by axis; counts do not depend on the seed."""
    del scale, seeds
    return [
        {"method": name, "axis": axis, "size": size, "seed": 0}
        for axis, (sizes, _) in AXES.items()
        for name, method in METHODS.items()
        for size in sizes
        if axis != "hyperparameters" or size <= method.max_hyperparameters
    ]


table = MeasurementTable(
    cells=cells,
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="theory: the costs in the docstrings of the estimators",
    data="programs are counted, not run",
    minutes=20,
    seeds=1,
)
