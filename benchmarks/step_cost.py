"""The time of one step of a single-loop method, beside benchmark_bilevel's own code.

*Question.* Does a step of `hypergrad.minimize` cost more than one of the code that the
field compares with?

*System.* Three problems of benchmark_bilevel: ijcnn1 with 22 log-penalties, quadratics
of 100 + 100 variables, and hyper-cleaning of MNIST with 20,000 example weights. Batches
of 64 contiguous examples, rates of 0.1, or 1e-3 for quadratics; ten inner steps, ten
terms or steps of the adjoint; float32. The problems are those of its data sets, with
quadratics sampled anew at the same shapes.

*Peer.* The solvers of a checkout of benchmark_bilevel that BENCHMARK_BILEVEL names,
imported from its files with a substitute for the package benchopt, which only measures.
Its compiled loops have at most 2,048 steps; ours records every 256th step,
or the last one. The peer's program has the data as constants, so that XLA evaluates
what depends on nothing else when it compiles: on quadratics all of SRBA's passes over
all data. The peer visits its blocks in shuffled passes, ours draws them independently.
Without a checkout only our times are measured.

*Timing.* Both run 8,192 steps (128 of quadratics, 256 of hyper-cleaning) in turns, nine
times after one to warm up; compilation is apart. The ratio is the median over the
turns. There are five repeats in one process, which take the place of seeds. Nothing
else may run on the machine.

*Claims.* On each problem at least six of the seven methods take at most 1.0 of the
peer's time, by the geometric mean over the repeats, and none takes more than 1.2.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import hypergrad as hg
from hypergrad.bench import Cell, Finding, MeasurementTable, Row, select
from hypergrad.bench.report import markdown_table

from .shared import plots
from .shared.benchmark_bilevel import (
    checkout,
    make_solver,
    make_steps,
    variables_of,
)
from .shared.step_problems import PROBLEMS, StepProblem
from .shared.tuning import grid_cells

BATCH, NUM_INNER = 64, 10
BLOCK, RECORD_EVERY = 2048, 256
NUM_STEPS = {"ijcnn1": 8192, "quadratics": 128, "hyper-cleaning": 256}
RATES = {"ijcnn1": 0.1, "quadratics": 1e-3, "hyper-cleaning": 0.1}
REPEATS = 9
MIN_NUM_FAST, MAX_RATIO, MAX_WORST = 6, 1.0, 1.2

#: Our methods by name, given the rate and the number of steps between full passes.
METHODS: dict[str, Callable[[float, int], Any]] = {
    "SOBA": lambda rate, period: hg.SOBA(optax.sgd(rate)),
    "SABA": lambda rate, period: hg.SABA(optax.sgd(rate)),
    "StocBiO": lambda rate, period: hg.StocBiO(
        optax.sgd(rate), NUM_INNER, NUM_INNER, step_size=rate
    ),
    "AmIGO": lambda rate, period: hg.AmIGO(optax.sgd(rate), NUM_INNER, NUM_INNER),
    "SRBA": lambda rate, period: hg.SRBA(optax.sgd(rate), period=period),
    "MRBO": lambda rate, period: hg.MRBO(
        optax.sgd(rate), NUM_INNER, step_size=rate, momentum=0.5
    ),
    "F2SA": lambda rate, period: hg.F2SA(optax.sgd(rate), NUM_INNER, penalty=1.0),
}


def our_run(problem: StepProblem, method: str, rate: float, num_steps: int) -> Callable:
    """Returns a function that makes the steps and returns ``alpha``."""
    # The peer's period: half of all examples, in batches.
    estimator = METHODS[method](rate, sum(problem.sizes) // (2 * BATCH))
    loop = hg.OuterLoop(problem.sampled(BATCH), estimator, optax.sgd(rate))
    state = loop.init(problem.w, problem.alpha)
    record_every = min(RECORD_EVERY, num_steps)
    return lambda: loop.run(state, num_steps=num_steps, record_every=record_every).alpha


def peer_run(
    problem: StepProblem, method: str, rate: float, num_steps: int
) -> Callable:
    """Returns the same function with the solver of the checkout."""
    solver = make_solver(method, step_size=rate)
    solver.set_objective(*problem.sliced(), *problem.sizes, problem.w, problem.alpha)
    initial_carry = solver.init()

    def run():
        carry = initial_carry
        size = min(BLOCK, num_steps)
        for block in range(num_steps // size):
            carry = make_steps(solver, method, carry, size, block * size)
        return variables_of(carry)["outer_var"]

    return run


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the microseconds of a step of both programs and their ratio."""
    del rows
    runs = make_runs(cell["problem"], cell["method"])
    num_steps = NUM_STEPS[cell["problem"]]
    turns = [
        {label: microseconds(run, num_steps) for label, run in runs.items()}
        for _ in range(1 + REPEATS)
    ][1:]
    row = {label: statistics.median(turn[label] for turn in turns) for label in runs}
    if "peer" in row:
        row["ratio"] = statistics.median(t["hypergrad"] / t["peer"] for t in turns)
    return row


@functools.cache
def make_problem(name: str) -> StepProblem:
    """Returns a problem, whose data is loaded once."""
    return PROBLEMS[name]()


@functools.lru_cache(maxsize=1)
def make_runs(name: str, method: str) -> dict[str, Callable]:
    """Returns the runs of both programs, which all repeats share."""
    arguments = make_problem(name), method, RATES[name], NUM_STEPS[name]
    runs = {"hypergrad": our_run(*arguments)}
    if checkout() is not None:
        runs["peer"] = peer_run(*arguments)
    return runs


def microseconds(run: Callable, num_steps: int) -> float:
    """Returns the microseconds per step of a run."""
    start_time = time.perf_counter()
    jax.block_until_ready(run())
    return (time.perf_counter() - start_time) / num_steps * 1e6


def ratios_by_problem(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Returns the geometric mean of the ratio over the repeats."""
    result = {}
    for problem in PROBLEMS:
        ratios = {
            method: [r["ratio"] for r in select(rows, problem=problem, method=method)]
            for method in METHODS
        }
        result[problem] = {
            method: float(np.exp(np.mean(np.log(values))))
            for method, values in ratios.items()
            if values
        }
    return result


def findings(rows: list[Row]) -> list[Finding]:
    """Returns whether enough methods are as fast as the peer's, on each problem."""
    rows = [row for row in rows if "ratio" in row]
    if not rows:
        return []
    results = []
    for problem, ratios in ratios_by_problem(rows).items():
        num_fast = sum(ratio <= MAX_RATIO for ratio in ratios.values())
        worst = max(ratios, key=lambda method: ratios[method])
        holds = num_fast >= MIN_NUM_FAST and ratios[worst] <= MAX_WORST
        text = (
            f"{problem}: {num_fast} of {len(ratios)} methods take at most "
            f"{MAX_RATIO:.1f} of the peer's time, {MIN_NUM_FAST} claimed; the slowest, "
            f"{worst}, takes {ratios[worst]:.2f}, at most {MAX_WORST} claimed"
        )
        results.append(Finding(text, "supported" if holds else "not supported"))
    return results


def body(rows: list[Row]) -> list[str]:
    """Returns a line per method: microseconds on each problem, and the ratio."""
    mean = lambda name, rows: np.mean([row[name] for row in rows])
    lines = [
        "Microseconds per step, medians of nine turns, means over the repeats; in "
        "brackets those of benchmark_bilevel in the same turns, and the ratio.",
        "",
    ]
    cells = []
    for method in METHODS:
        entries = []
        for problem in PROBLEMS:
            group = select(rows, problem=problem, method=method)
            if not group:
                entries.append("")
                continue
            entry = f"{mean('hypergrad', group):.1f}"
            if "ratio" in group[0]:
                entry += f" ({mean('peer', group):.1f}) {mean('ratio', group):.2f}"
            entries.append(entry)
        cells.append([method, *entries])
    return lines + markdown_table(["method", *PROBLEMS], cells)


def plot(rows: list[Row], path: Path) -> None:
    """Plots the ratios, a panel per problem and a dot per repeat."""
    panels = {
        problem: {
            method: [
                row["ratio"]
                for row in select(rows, problem=problem, method=method)
                if "ratio" in row
            ]
            for method in METHODS
        }
        for problem in PROBLEMS
    }
    plots.strips(panels, path, "time of a step over the peer's", lines=(), most=1.0)


table = MeasurementTable(
    cells=grid_cells(problem=PROBLEMS, method=METHODS),
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="benchmark_bilevel of Dagréou et al. 2022 (arXiv 2201.13409), 3ad65dc",
    data="ijcnn1, MNIST, random quadratics",
    minutes=15,
    seeds=5,
)
