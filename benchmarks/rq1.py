"""The cost of the inner loop in every paradigm, and what remedies it.

Question: The first finding of the source paper is that the inner loop is the bottleneck
of bilevel optimisation. In every paradigm: what does each way of setting two
hyperparameters cost until it is as good as a grid, and what part of that is inner
training? Do the remedies, hypergradients, warm starts and shared weights, make it less?

Tasks (`rq1_tasks.py`): The data of `hypergrad.tasks`, by the seed, and two continuous
hyperparameters that one would tune there; a training is T steps of the task's own inner
solver, always from the same start.

- *supervised*: log-penalties of both layers of a network 64-16-10; 200 digits, two
  fifths of the labels wrong; box, start [-8, 0], -2; T 50
- *semi_supervised*: the weight of all of 400 pseudo-labels, and the penalty; 50 labels;
  box, start [0.01, 10] and [1e-4, 1], 1 and 0.01; T 50
- *self_supervised*: temperature of the contrastive loss, noise of its views; 64 images;
  box, start [0.05, 20] and [0.01, 1], 0.1; T 20
- *unsupervised*: soft k-means: a precision for the first seven measurements of wine,
  one for the other six; box, start [0.1, 5], 0.5; T 10
- *few_shot*: maml: rates of adaptation of body and head, on 16 tasks, from a random
  start; box, start [0.02, 20] and [0.01, 2], 0.05; T 5
- *federated*: powers of a class's frequency that make its weight and its shift of the
  scores; box, start [-0.5, 3] and [-1.5, 1], 0; T 20 rounds
- *reinforcement*: random walk, 5 episodes to learn from: how far below 1 the discount
  is in even states, whose rewards are noisy, and in odd ones; box, start [0.001, 0.5],
  0.1; T 100
- *physics*: Poisson's equation: weights of the boundary and of the sensors, that of the
  residual being 1; box, start [0.01, 1000], 1; T 200

Boxes of weights, rates, penalties, precisions, temperatures and discounts are
logarithmic, those of log-penalties and powers are not. The outer loss is the task's, on
*physics* its logarithm, as it spans four orders of magnitude. Views and episodes are
drawn once and are the same in every training, so that `h(alpha)`, the outer loss after
a training, is a function of alpha: noise would let whoever looks most often be lucky.
(SOBA and the adjoint of *implicit* draw views of their own.) Two hyperparameters are
few on purpose: where a grid is possible at all, it is the fairest rival. What 20 and
500 do is in the table `search`.

Target: The least of `h` over a grid of 9 by 9 points of the box, ends included; `alpha`
moves an eighth of its axis from one to the next. A run is *there* at the first
evaluation at which the `alpha` that it would return has `h` at most that plus 10% of
the way from there to the start. What a run would return: a descent its current `alpha`,
a search the one with the lowest value it has seen.

Rows: Without hypergradients: *grid* (the 81 points in an order drawn from the seed),
*random* (uniform, logarithmic where the box is), *TPE*. With, by Adam in the
unconstrained coordinates of the box: *implicit* (T steps from the start, CG to 1e-2 or
10 steps), *unrolled* (all T, with checkpoints), both anew in every estimate; *single
loop* (SOBA on all data); *implicit, warm start* and *unrolled, warm start* (T / 5 steps
from the last `w`, and from the last adjoint). *Sharing*: random search whose candidates
share one `w` and train T / 5 steps from it. Warm starts, single loop and sharing begin
with the `w` of one training at the start, which is charged. A row that cannot be on a
task is there with the reason: rates of adaptation stand in the optimizer, which
`Implicit` and SOBA do not see, and a few-shot task is by definition adapted to from the
shared start, so that no `w` is carried or shared.

Cost: All are on one ledger, in gradient-equivalents, in three parts: *inner*, the
gradients that train `w`; *hypergradient*, what differentiates (adjoint products, cross
terms, the reverse pass and the steps it makes again, gradients that judge an estimate);
*outer*, values and gradients of the outer loss. A product of SOBA counts 2, of which 1,
the gradient by which `w` moves, is inner. A round of FedAvg counts 6, its five local
steps and the correction, also where `Unrolled` goes back through it. Evaluations of `h`
are outside the ledger, at some 50 steps of a descent. The inner share is that of the
total until there. FLOPs are those that `hypergrad.cost.flops` counts in the traced
program of one step, or one trial, times the steps made; of CG those of its body times
the steps that the ledger counted; Adam on two numbers is left out. Proposals count
nothing. CO2 is by assumption, not measured: 5e9 operations a second, 20 W, 400 g a
kilowatt-hour, so that it is proportional to FLOPs.

Budget: What 100 trainings and their values cost, which pays for the grid. A run that is
never there has a lower bound, what it spent.

Tuning, the same for every row: Seeds 100 and 101: of five rates of Adam, {0.1, 0.3, 1,
3, 10}, of the single loop {0.01, 0.03, 0.1, 0.3, 1}, that with the least mean of log
cost, where a run that is not there counts as the budget times what is left of the way
over 10%. (The first full run had the first three of each, and 25 of 36 chosen rates
were the third; the rows with hypergradients were then made anew with five. Nothing else
was changed. No claim was supported in the first run.) Grid, random, TPE and sharing
have nothing to tune. *Best* is the row with hypergradients that tuned best on the task.
The inner solvers' rates are the tasks' own, not tuned. Boxes, starts, sizes, T and the
10% were set on seeds 100 and 101, by grids of `h` alone: so that the best is within the
box, the start is not near it, and 1 to 25% of the points of the grid are there.

Tuning is counted. Each of its ten runs costs what it needs to reach the target, or its
whole budget if it never does. Every row is printed without and with this cost, counted
once, as if the rate were chosen for a single run. The row *best* pays for the tuning of
all rows among which it was chosen.

Criteria (o), seeds 0..4.

- Inner training is at least half of what *implicit* spends until there, mean over
  seeds, on each task on which it can be. T gradients stand against what CG makes, at
  most 10 steps of 2, and up to 2 outer gradients: with T of 10 and 20 the steps that
  are made decide.
- Warm starts: *implicit, warm start* needs at least 1.5 times fewer
  gradient-equivalents than *implicit*, and *unrolled, warm start* than *unrolled*: the
  geometric mean over the tasks on which the cold row is there on every seed, paired by
  seed, the 95% interval over seeds above one. Not supported where the warm row is not
  there on one of them, or where there is no such task.
- *Best* needs at least 2 times fewer gradient-equivalents than random, its tuning not
  counted: the geometric mean over all tasks, likewise; random counts with its bound
  where it is never there; not supported where best is never there.

Withdrawn before the first run: that inner training is at least 80% of what grid, random
and TPE spend. For these rows the share is T gradients to one value, known from the
sizes; what cannot fail is no claim. It is shown without a verdict. So are: the inner
share of every row with hypergradients on every task; what *best* costs against random
with its tuning; what is first on each task, without tuning and with; what sharing makes
of random search; and which rates are at an end of those that were tried.

What falls short: A run is judged by T steps from the start. Warm starts, the single
loop and sharing never train so: their `w` is that of all steps so far, and where T ends
a training early, as on *federated* and *semi_supervised*, the best `alpha` after more
steps is another one. `Implicit` takes `w` for stationary, which after T steps it is
not. Its error is not estimated: until commit 3eb8dd4 it was, no estimate from a new
start was trusted on any task but *unsupervised*, and its products counted. `Unrolled`
has another target, the run that it differentiates, which for a warm row is the short
one from the last `w`. Who is first is told by means of five seeds without an interval,
and what a search needs is luck in part.

Intervals: The targets and costs are those of the outer loss. No test split is read, so
that the correction for re-splits of one data set (Nadeau and Bengio 2003) does not
apply: the intervals are about further splits of these data.
"""

from pathlib import Path

import numpy as np

from hypergrad.bench import Cell, Check, MeasurementTable, Row, geometric_mean
from hypergrad.bench.report import markdown_table

from .shared.plots import make_panels
from .shared.rq1_findings import column, costs_to_target, findings, share, tuning_cost
from .shared.rq1_running import (
    DESCENTS,
    GRID_SIDE,
    METHODS,
    NEAR,
    NUM_TRAININGS,
    PARTS,
    flops_of,
    run,
    tune,
)
from .shared.rq1_tasks import SYSTEMS, named_arrays, problem_of
from .shared.stages import fingerprint
from .shared.tuning import grid_cells


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns one run at its chosen setting, or the reason why there is none."""
    del rows
    task, method, seed = cell["task"], cell["method"], cell["seed"]
    system = SYSTEMS[task]
    data = {
        "data_name": system.data,
        "data_sha256": fingerprint(named_arrays(problem_of(task, seed))),
    }
    if method in system.absent:
        return {"reason": system.absent[method]} | data
    tuning = tune(task, method)
    row = run(task, method, seed, tuning["setting"])
    return row | tuning | flops_of(task, method, row) | data


def has_all_prices(rows) -> tuple[bool, str]:
    """Returns whether the cost of every operation is defined."""
    unknown = sorted({name for row in rows for name in row.get("unknown") or ()})
    return not unknown, ", ".join(unknown)


def body(rows: list[Row]) -> list[str]:
    """Returns a table per task."""
    lines = [
        f"Two hyperparameters per task, at most {NUM_TRAININGS} trainings per run. "
        f"Gradient-equivalents (grad-eq) until within {NEAR:.0%} of the way from the "
        f"start to the best of a grid of {GRID_SIDE} by {GRID_SIDE}, geometric mean "
        "and range; > where a run misses that and counts with its whole cost. With "
        "tuning: "
        "and the cost of choosing the rate, once. Inner, hypergradient and outer: "
        "parts of the cost. Left: of the way to the grid's best at the best "
        "evaluation, "
        "median, below zero where that is better than the grid's. MFLOPs by the "
        "traced programs; CO2 by assumption.",
        "",
    ]
    headings = (
        "method", "reached", "grad-eq", "range", "with tuning", "inner",
        "hypergradient", "outer", "MFLOPs", "CO2 mg", "left", "evaluations", "rate",
    )  # fmt: skip
    labels = {row["method"] for row in rows}
    for task, system in SYSTEMS.items():
        cells = [
            [f"{method} (1)", *["-"] * (len(headings) - 1)]
            if method in system.absent
            else table_cells(rows, task, method)
            for method in METHODS
            if method in labels
        ]
        lines += [f"**{task}** ({system.paradigm}; {system.data})", ""]
        lines += [*markdown_table(headings, cells), ""]
        if system.absent:
            reasons = "; ".join(f"{name}: {x}" for name, x in system.absent.items())
            lines += [f"(1) does not apply: {reasons}.", ""]
    return lines[:-1]


def table_cells(rows: list[Row], task: str, method: str) -> list[str]:
    """Returns a row of the printed table."""
    values = lambda name: column(rows, task, method, name)
    cost, num_misses = costs_to_target(rows, task, method)
    bound, mean = "> " if num_misses else "", geometric_mean(cost)
    rate = f"{values('setting')[0]:g}"
    return [
        method,
        f"{cost.size - num_misses} of {cost.size}",
        f"{bound}{mean:,.0f}",
        f"{cost.min():,.0f} to {cost.max():,.0f}",
        f"{bound}{mean + tuning_cost(rows, task, method):,.0f}",
        *(f"{share(rows, task, method, part):.0%}" for part in PARTS),
        bound + figures(values("flops").mean() / 1e6),
        bound + figures(values("grams").mean() * 1e3),
        f"{np.median(values('left')):.1%}",
        f"{values('evaluations').mean():.0f}",
        rate if method in DESCENTS else "-",
    ]


def figures(x: float) -> str:
    """Returns a number with at least two figures."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def plot(rows: list[Row], path: Path) -> None:
    """Plots the parts of the cost until the target, a panel per task."""
    figure, axes = make_panels(2, -(-len(SYSTEMS) // 2), (16, 6.5))
    for axis, task in zip(axes.flat, SYSTEMS, strict=False):
        costs = {}
        for method in METHODS:
            cost, num_misses = costs_to_target(rows, task, method)
            if cost.size:
                parts = [share(rows, task, method, part) for part in PARTS]
                costs[method + " >" * (num_misses > 0)] = geometric_mean(
                    cost
                ) * np.array(parts)
        left = np.zeros(len(costs))
        for index, name in enumerate(PARTS):
            width = np.array([parts[index] for parts in costs.values()])
            axis.barh(range(len(costs)), width, left=left, label=name)
            left = left + width
        axis.set_yticks(range(len(costs)), list(costs), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(task)
        axis.set_xlabel("gradient-equivalents")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        "Until as good as the grid, by parts; >: not on every seed, a bound"
    )
    figure.savefig(path, dpi=110)


table = MeasurementTable(
    cells=grid_cells(task=SYSTEMS, method=METHODS),
    measure_cell=measure,
    checks=(Check("the cost of every operation is defined", has_all_prices),),
    findings=findings,
    body=body,
    plot=plot,
    seeds=5,
    minutes=12,
    paradigm="all paradigms",
    source="Bergstra & Bengio 2012; Pedregosa 2016; Franceschi et al. 2017; Dagréou "
    "2022",
    data="scikit-learn digits and wine, and two simulated systems",
)
