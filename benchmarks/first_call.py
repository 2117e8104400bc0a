"""The CPU-seconds of a first call, compared with the same program in plain JAX.

*Question.* How many CPU-seconds does the first call of `minimize` take, most of which
are compilation, compared with the same steps written by hand in plain JAX?

*System and programs.* The example of the README: logistic regression on 100 random
examples with 20 log-penalties, 50 steps of Adam. `Implicit` and `Unrolled` make 500
inner steps of gradient descent with momentum per outer step, `SOBA` one step. The
programs in plain JAX are in `benchmarks/shared/first_call_programs.py`; each records
the outer value and the norms of both gradients. A repetition fails if the last outer
values of a program and of its counterpart differ by more than 1%.

*Timing.* Each variant is one call in a fresh process, without a persistent compilation
cache and without options for XLA: user and system time of all threads of the process
from the call to its result, imports and data not included. Within a repetition all
variants of a program run in turns. There are five repetitions, which take the place of
seeds. CPU-seconds grow when other programs share the cores: nothing else may run.

*Variants.* Trust off is ``hg.Implicit(solver, estimate_error=False)``. `Unrolled` has
no such switch, and `SOBA` makes no check of trust. The options are `progress`,
`checkpoints` every ten steps, and limits of time and memory, each with the defaults.

*Claims.* Over that of plain JAX, the geometric mean of the seconds is at most 1.3 with
trust off and for SOBA, and at most 1.7 by default. Each option adds at most 5% to the
default. The interval over the repetitions must lie below the bound. It is corrected for
the thirteen claims by Holm's method, so that its level is 95% or more. The first form
of this protocol had single intervals of 95%, by which all six claims on progress and
limits were supported; a review after the run made it stricter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from hypergrad.bench import Cell, Finding, MeasurementTable, Row, ratio_interval, select
from hypergrad.bench.report import markdown_table
from hypergrad.bench.statistics import holm_levels, p_value

from .shared import plots
from .shared.first_call_programs import ESTIMATORS, OPTIONS, PLAIN, variants_of
from .shared.outcomes import conclude
from .shared.tuning import cells_of

MAX_RATIO, MAX_TRUSTED_RATIO, MAX_OPTION_RATIO = 1.3, 1.7, 1.05
MAX_DIFFERENCE = 0.01  # of the last outer values
ROOT = Path(__file__).parents[1]
TUNING = ("JAX_", "XLA_")  # variables by which no process is to be tuned


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the CPU-seconds of the first call of each variant of a program.

    Raises:
      ValueError: The programs do not compute the same.
    """
    del rows
    program = cell["method"]
    results = {name: run(program, name) for name in variants_of(program)}
    expected = results[PLAIN]["value"]
    for name, result in results.items():
        if not abs(result["value"] - expected) <= MAX_DIFFERENCE * abs(expected):
            raise ValueError(
                f"{program}, {name} ends at the outer value {result['value']}, but "
                f"plain JAX at {expected}."
            )
    return {name: result["seconds"] for name, result in results.items()}


def run(program: str, variant: str) -> dict[str, float]:
    """Returns what `first_call_programs.measure` returns in a fresh process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(TUNING)}
    module = "benchmarks.shared.first_call_programs"
    process = subprocess.run(
        [sys.executable, "-m", module, program, variant],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    if process.returncode:
        raise ValueError(f"{program}, {variant} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def bounds(program: str) -> list[tuple[str, str, float]]:
    """Returns ``(variant, its base, the claimed ratio)`` for a program."""
    has_trust = program != "SOBA"
    default = MAX_TRUSTED_RATIO if has_trust else MAX_RATIO
    limits = [(name, PLAIN, MAX_RATIO) for name in ESTIMATORS[program]]
    limits[-1] = "default", PLAIN, default
    return limits + [(name, "default", MAX_OPTION_RATIO) for name in OPTIONS]


def findings(rows: list[Row]) -> list[Finding]:
    """Returns whether each ratio is at most what is claimed."""
    claims = [
        (
            f"{program}, {variant} over {base}",
            bound,
            ratios(rows, program, variant, base),
        )
        for program in ESTIMATORS
        for variant, base, bound in bounds(program)
    ]
    p_values = [p_value(np.log(values), np.log(bound)) for _, bound, values in claims]
    return [
        ratio_claim(*claim, level)
        for claim, level in zip(claims, holm_levels(p_values), strict=True)
    ]


def ratios(rows: list[Row], program: str, variant: str, base: str) -> np.ndarray:
    """Returns the seconds of a variant over those of its base, per repetition."""
    values = [row[variant] / row[base] for row in select(rows, method=program)]
    return np.array(values, float)


def ratio_claim(label: str, bound: float, values: np.ndarray, level: float) -> Finding:
    """Returns whether the interval of a ratio lies below its bound."""
    interval = ratio_interval(values, np.ones(values.size), level=level)
    text = (
        f"{label}: {interval:.3f} ({100 * level:.4g}% interval), at most {bound:g} "
        "claimed"
    )
    half_width = (interval.high - interval.low) / 2
    return conclude(text, interval.high <= bound, values.size, half_width, bound)


def body(rows: list[Row]) -> list[str]:
    """Returns a line per program with the median CPU-seconds of each variant."""
    names = [PLAIN, "trust off", "default", *OPTIONS]
    lines = [
        f"CPU-seconds of the first call, medians over {len(rows) // len(ESTIMATORS)} "
        "repetitions, each in a fresh process.",
        "",
    ]
    cells = []
    for program in ESTIMATORS:
        program_rows = select(rows, method=program)
        medians = [
            f"{np.median([row[name] for row in program_rows]):.2f}"
            if name in variants_of(program)
            else "-"
            for name in names
        ]
        cells.append([program, *medians])
    return lines + markdown_table(["program", *names], cells)


def plot(rows: list[Row], path: Path) -> None:
    """Plots a dot per repetition and variant, with a panel per program."""
    panels = {
        program: {
            name: [row[name] for row in select(rows, method=program)]
            for name in variants_of(program)
        }
        for program in ESTIMATORS
    }
    plots.strips(panels, path, "CPU-seconds of the first call", lines=())


table = MeasurementTable(
    cells=cells_of(ESTIMATORS),
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="programs in plain JAX, written for this table",
    data="random examples",
    minutes=10,
    seeds=5,
)
