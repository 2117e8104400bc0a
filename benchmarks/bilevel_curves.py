"""Six single-loop methods beside benchmark_bilevel's own code, curve by curve.

*Question.* From the same start, with the same rates and after the same number of oracle
calls, are our methods where benchmark_bilevel's solvers are?

*Problem.* Quadratics as in its data set `simulated` with the settings of its file
`quadratics_021424.yml`: ``w`` of 100 numbers, ``alpha`` of 10, smallest eigenvalue 0.1,
cross terms of 0.1, rank one per sample, starts at 0 and at -2. They are sampled anew by
the same recipe; the first sample with a convex value function is taken. There are 4,096
inner and 1,024 outer samples; the file has 32,768 inner ones. The peer's programs hold
the data as constants, and at that number its SRBA needed more than 20 GB. All runs are
in float32.

*Programs.* *hypergrad* visits contiguous blocks of 64 samples in shuffled passes, with
passes of their own for the steps of ``w``, those of the adjoint, and the direction.
*peer* is a solver of the checkout that BENCHMARK_BILEVEL names (3ad65dc): all its draws
follow each other in passes, the first in the order of the data, the others shuffled,
the last block of each pass twice. *hypergrad, independent blocks* and *peer,
independent blocks* are the same methods with blocks drawn independently.
With a single block five of the six methods are equal in both programs up to rounding,
which a test holds. MRBO begins otherwise: the peer averages its first gradient with
that at zero and a previous direction of zero, ours takes it as it is. Without a
checkout only our curves are measured.

*Settings.* Step size, and its ratio to that of ``alpha``, are those of
`quadratics_021424_best_params.yml`: SABA, SRBA and StocBiO 0.1 and 1, AmIGO 0.01 and
0.1, MRBO 0.1 and 0.1. SOBA, which the file lacks, has those of SABA. Ten inner steps,
ten of the adjoint, eleven terms of a series, as in the peer's code; SRBA uses all data
every 40 steps. Rates of SOBA fall as ``(t + 1)^-1/2``, those of MRBO as
``(t + 1)^-1/3``. F2SA and VRBO are left out: their solvers have schedules or recursions
that ours lack.

*Runs.* 16,384 steps of SOBA, 4,096 of SABA and SRBA, 2,048 of the others, with 32
evaluations of ``h(alpha) - min h`` in closed form. SABA and SRBA end before they reach
the rounding of float32, as a trial with 1,024 inner samples and two seeds showed, in
which they had four times as many steps. `end` is the geometric mean of the last eight
evaluations. Ten seeds choose the blocks; the data is the same. The interval is that of
Student's t on the differences of the logarithms.

*Claims.* For each of the six methods the geometric mean over the seeds of our `end`
over the peer's is between 1/1.5 and 1.5: in passes; with independent blocks; and, as
claimed before there were passes here, with our independent blocks and the peer's
passes. The last two were measured before, at 4 and at 2 of 6 methods. The first had no
trial.
"""

from pathlib import Path

import numpy as np

from hypergrad.bench import (
    Cell,
    Finding,
    MeasurementTable,
    Row,
    geometric_mean,
    ratio_interval,
    select,
)
from hypergrad.bench.report import markdown_table

from .shared.benchmark_bilevel import checkout
from .shared.bilevel_quadratics import (
    NUM_EVALUATIONS,
    SETTINGS,
    make_problem,
    our_alphas,
    peer_alphas,
)
from .shared.plots import add_grid, make_panels
from .shared.row_columns import column
from .shared.tuning import grid_cells

OURS, OURS_INDEPENDENT = "hypergrad", "hypergrad, independent blocks"
PEER, PEER_INDEPENDENT = "peer", "peer, independent blocks"
PROGRAMS = (OURS, PEER, OURS_INDEPENDENT, PEER_INDEPENDENT)
PAIRS = (
    (OURS, PEER),
    (OURS_INDEPENDENT, PEER_INDEPENDENT),
    (OURS_INDEPENDENT, PEER),
)
NUM_LAST, MAX_RATIO = 8, 1.5


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns ``h(alpha) - min h`` along a run, and its end; nothing without a peer."""
    del rows
    method, seed, program = cell["method"], cell["seed"], cell["program"]
    is_ours = program in (OURS, OURS_INDEPENDENT)
    if not is_ours and checkout() is None:
        return {}
    if is_ours:
        order = "epoch_blocks" if program == OURS else "blocks"
        alphas = our_alphas(method, seed, order)
    else:
        alphas = peer_alphas(method, seed, program == PEER_INDEPENDENT)
    _, h = make_problem()
    curve = [h.excess(alpha) for alpha in alphas]
    return {"curve": curve, "end": geometric_mean(curve[-NUM_LAST:])}


def ends(rows: list[Row], method: str, program: str) -> np.ndarray:
    """Returns the ends of a method's runs, in the order of the seeds."""
    group = select(rows, method=method, program=program)
    group = [row for row in group if "end" in row]
    return column(group, "end")


def findings(rows: list[Row]) -> list[Finding]:
    """Returns whether all methods end where the peer's do, for each pair of orders."""
    results = []
    for ours, peer in PAIRS:
        if not all(ends(rows, method, peer).size for method in SETTINGS):
            continue
        ratios = {
            method: ratio_interval(ends(rows, method, ours), ends(rows, method, peer))
            for method in SETTINGS
        }
        is_near = [1 / MAX_RATIO <= x.mean <= MAX_RATIO for x in ratios.values()]
        listing = "; ".join(f"{name} {x:.2f}" for name, x in ratios.items())
        text = (
            f"{sum(is_near)} of {len(SETTINGS)} methods of {ours} end within "
            f"{MAX_RATIO} of {peer}, all claimed: {listing}"
        )
        results.append(Finding(text, "supported" if all(is_near) else "not supported"))
    return results


def body(rows: list[Row]) -> list[str]:
    """Returns a line per method: the end of each program, and the ratios of pairs."""
    is_measured = lambda program: any(ends(rows, m, program).size for m in SETTINGS)
    programs = [program for program in PROGRAMS if is_measured(program)]
    pairs = [pair for pair in PAIRS if set(pair) <= set(programs)]
    names = [*programs, *(f"{ours} over {peer}" for ours, peer in pairs)]
    text = (
        "Geometric means over the seeds of h(alpha) - min h at the end, and of the "
        "ratio of ours to the peer's, with 95% intervals."
    )
    cells = []
    for method, settings in SETTINGS.items():
        by_program = {p: ends(rows, method, p) for p in programs}
        if not all(x.size for x in by_program.values()):
            continue
        entries = [f"{geometric_mean(x):.2e}" for x in by_program.values()]
        entries += [
            f"{ratio_interval(by_program[ours], by_program[peer]):.2f}"
            for ours, peer in pairs
        ]
        cells.append([method, f"{settings.num_steps}", *entries])
    return [text, "", *markdown_table(["method", "steps", *names], cells)]


def plot(rows: list[Row], path: Path) -> None:
    """Plots the curves of all programs, a panel per method: medians and ranges."""
    figure, axes = make_panels(2, 3, (12, 7))
    for axis, (method, settings) in zip(axes.flat, SETTINGS.items(), strict=True):
        steps = np.linspace(0, settings.num_steps, NUM_EVALUATIONS + 1)
        for i, program in enumerate(PROGRAMS):
            group = select(rows, method=method, program=program)
            group = [row for row in group if "curve" in row]
            if not group:
                continue
            curves = np.array([row["curve"] for row in group])
            axis.plot(steps, np.median(curves, 0), color=f"C{i}", label=program)
            axis.fill_between(
                steps, curves.min(0), curves.max(0), color=f"C{i}", alpha=0.15
            )
        axis.set(yscale="log", title=method)
        add_grid(axis)
    for axis in axes[-1]:
        axis.set_xlabel("steps")
    for axis in axes[:, 0]:
        axis.set_ylabel("h(alpha) - min h")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle("Median and range over the seeds; equal steps, equal oracle calls")
    figure.savefig(path, dpi=130)


table = MeasurementTable(
    cells=grid_cells(method=SETTINGS, program=PROGRAMS),
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    source="benchmark_bilevel of Dagréou et al. 2022 (arXiv 2201.13409), 3ad65dc",
    data="random quadratics, 4,096 + 1,024 samples",
    minutes=30,
    seeds=10,
)
