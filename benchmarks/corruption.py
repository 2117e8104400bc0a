"""The single-loop family on hyper-cleaning, at three shares of wrong labels.

Rates are chosen once a method, by the loss of held-out validation examples at two seeds
that are not reported, half of the labels wrong. The L2 penalty of every row, baseline
and oracle too, is then chosen anew at each seed and share. See README.md.
"""

import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies.program import Program
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.study import DIGITS, digits, tune_and_run
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, paired
from hypergrad.tasks import cleaning
from hypergrad.tasks.cleaning import NUM_TRAIN, f1_of_wrong_labels, make, split
from hypergrad.tasks.task import Task

from .shared import plots
from .shared.single_loop import DOUBLE_LOOP, SEARCH, TOTAL, falling, family, paid_for
from .shared.single_loop import METHODS as FAMILY
from .shared.single_loop_grid import (
    TUNING_SEEDS,
    at_edge,
    chosen,
    judge_grid,
    rates_chosen,
    read_grid,
    steps_for,
)
from .shared.single_loop_table import QUARTILES

BATCH, BUDGET = 100, 1000
SHARES = (0.5, 0.7, 0.9)
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
RATES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
OUTER_RATES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
FIRST_RATES, FIRST_OUTER_RATES = RATES[2:], OUTER_RATES[:5]
FIRST = list(itertools.product(FIRST_RATES, FIRST_OUTER_RATES))
WIDE = list(itertools.product(RATES, OUTER_RATES))  # where the first ends at an edge
RIGHT = "right labels only"  # weights of 0 and 1, by who is right: a learner's ideal
BOTH = "baseline, validation too"  # trains on all labels there are
FIXED = ("baseline", BOTH, "validation-only", RIGHT, "oracle")
METHODS = (*FIXED, SEARCH, TOTAL, *FAMILY)
# Of random search: a run's, or that with a part of the first grid's, which serves all
# runs of a row: one a penalty, and the last.
BUDGETS = {
    SEARCH: BUDGET,
    TOTAL: BUDGET + BUDGET * len(TUNING_SEEDS) * len(FIRST) // (len(PENALTIES) + 1),
}
GAP, ENOUGH = 0.6, 4  # of the way from baseline to oracle, by so many methods

Lane = tuple[Array, Array, Array, Array]  # key, share, penalty, hold_out


def task_of(data: PyTree, lane: Lane, batch_size: int | None = None) -> Task:
    """The task of one lane, on all data or in batches."""
    key, share, penalty, hold_out = lane
    return make(
        key=key, penalty=penalty, hold_out=hold_out, corruption=share,
        batch_size=batch_size, data=data,
    )  # fmt: skip


def weights(
    method: str, steps: int, data: PyTree, lane: Lane,
    rate: Array, outer_rate: Array, paid: Array | int,
) -> hg.Trace:  # fmt: skip
    """Weights by one method of the family: gradient descent on w, Adam on alpha.

    ``alpha`` rests where ``paid`` of the steps have led.
    """
    task = task_of(data, lane, None if method == DOUBLE_LOOP else BATCH)
    if method.endswith("falling"):
        outer_rate = falling(outer_rate)
    return hg.minimize(
        task.problem,
        family(rate, NUM_TRAIN // BATCH)[method](),
        optax.chain(
            optax.adam(outer_rate), optax.scale_by_schedule(lambda step: step < paid)
        ),
        task.w,
        task.alpha,
        num_steps=steps,
        key=jax.random.fold_in(lane[0], 1),
        space=task.space,
    )


def retrained(
    method: str, data: PyTree, lane: Lane, alpha: Array
) -> dict[str, Array]:  # fmt: skip
    """What a model trained to convergence with the weights is worth."""
    key, share, _, hold_out = lane
    task, parts = task_of(data, lane), split(data, key, hold_out, share)
    batch, alpha = dict(task.problem.inner_data), jnp.asarray(alpha)
    if method == RIGHT:
        alpha = 1.0 - parts["train"]["wrong"]
    if method == "oracle":
        batch["y"] = parts["train"]["clean"]
    if method == BOTH:
        val = parts["val"]
        batch |= {name: jnp.concatenate([batch[name], val[name]]) for name in "xy"}
        alpha = jnp.concatenate([alpha, val["use"]])
    if method == "validation-only":
        val = parts["val"]
        batch |= {"x": val["x"], "y": val["y"]}
        alpha = val["use"] / jnp.mean(val["use"])
    w, _ = hg.Newton().solve(cleaning.train_loss, task.w, alpha, batch, key)
    held, wrong = parts["held_out"], parts["train"]["wrong"]
    return {
        "accuracy": task.metrics["test_accuracy"](w, alpha, key),
        "held_accuracy": cleaning.accuracy(held, w, alpha, key),
        "held_loss": cleaning.val_loss(w, alpha, held),
        "f1": f1_of_wrong_labels(wrong, w, alpha, key)
        if alpha.shape == wrong.shape
        else jnp.asarray(jnp.nan),
    }


@functools.cache
def judging(method: str) -> Program:
    """`retrained`, compiled once for those that train on as many examples."""
    return Program(functools.partial(retrained, method))


def worth(method: str, data: PyTree, lane: Lane, alpha: Array) -> dict[str, float]:
    same = method if method in FIXED else "baseline"
    return {k: float(x) for k, x in judging(same)(data, lane, alpha).items()}


@functools.cache
def learning(method: str, steps: int) -> Program:
    """`weights`, compiled once a method."""
    return Program(functools.partial(weights, method, steps))


def learn(
    method: str, steps: int, pair: tuple[float, float], data: PyTree, lane: Lane
) -> tuple[Array, Row, float]:
    """Weights, what they cost, and seconds: of the steps that the budget pays for.

    A series of random length may cost more than its mean. Its draws are those of the
    key, whatever alpha does, so that a second run may rest where the first should have.
    """
    program = learning(method, steps)
    before = program.run_seconds
    run = functools.partial(program, data, lane, *map(jnp.float32, pair))
    trace = run(jnp.int32(steps))
    paid = int(np.sum(paid_for(trace.cost, BUDGET)))
    if paid < steps:
        trace = run(jnp.int32(paid))
    return trace.alpha, spent(trace, BUDGET), program.run_seconds - before


def spent(trace: hg.Trace, budget: float) -> Row:
    """What the steps or trials cost that the budget pays for."""
    paid = paid_for(trace.cost, budget)
    total = lambda name: float(np.nansum(np.asarray(trace.stats[name])[paid]))
    return {
        "gradient_equivalents": float(np.max(np.asarray(trace.cost)[paid])),
        "num_grads": total("num_grads"),
        "num_hvps": total("num_hvps"),
        "status": trace.status,
    }


def lane_of(seed: int, share: float, penalty: float, hold_out: bool) -> Lane:
    key = jax.random.key(seed)
    return key, jnp.float32(share), jnp.float32(penalty), jnp.asarray(hold_out)


# The grid.


def try_all(cell: Row) -> Row:
    """A method at every pair of rates and both seeds, half of the labels wrong.

    The pairs of the first grid; where the best of them is at its edge, all.
    """
    method, data = cell["method"], digits()
    lanes = [lane_of(seed, SHARES[0], PENALTIES[1], True) for seed in TUNING_SEEDS]
    probe = lambda steps: functools.partial(weights, method, steps, paid=steps)
    slow = min(RATES), min(OUTER_RATES)
    steps = steps_for(BUDGET, method, probe, (data, lanes[0]), slow)
    cost, seconds = 0.0, 0.0

    @functools.cache
    def losses(pair: tuple[float, float]) -> list[float]:
        nonlocal cost, seconds
        found = []
        for lane in lanes:
            alpha, paid, took = learn(method, steps, pair, data, lane)
            found.append(worth(method, data, lane, alpha)["held_loss"])
            cost, seconds = cost + paid["gradient_equivalents"], seconds + took
        return found

    row = chosen(FIRST, list(map(losses, FIRST)), method)
    if at_edge(row):
        row = chosen(WIDE, list(map(losses, WIDE)), method)
    return row | {
        "num_steps": steps,
        "budget": BUDGET,
        "tuning_cost": cost,
        "data": DIGITS,
        "run_seconds": seconds,
    }


def markdown_of_grid(table: Table, rows: list[Row], command: str) -> str:
    """The chosen rates."""
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}; seeds {' and '.join(map(str, TUNING_SEEDS))}, half of the labels "
        f"wrong, penalty {PENALTIES[1]:g}. Of every pair of a rate of w in "
        f"{list(FIRST_RATES)} and a rate of Adam on the weights in "
        f"{list(FIRST_OUTER_RATES)} the one whose worse seed has the least loss of "
        "held-out validation examples, after at most "
        f"{BUDGET:,} gradient-equivalents (grad-eq) a run; where that is at an edge, "
        f"of every pair in {list(RATES)} and {list(OUTER_RATES)}. "
        f"Command: `{command}`",
        "",
        *rates_chosen(rows, ("rate", "rate of weights", "loss"), "{:.3f}"),
    ]
    return "\n".join(lines)


# The table.


Learn = Callable[[PyTree, Lane], tuple[Array, Row, float]]


def learner(method: str) -> tuple[Learn, Row]:
    """``(data, lane) -> (weights, what they cost, seconds)``, and its settings."""
    if method in FIXED:
        return lambda data, lane: (jnp.ones(NUM_TRAIN), {}, 0.0), {}
    if method in (SEARCH, TOTAL):
        return functools.partial(by_random_search, BUDGETS[method]), {}
    settings = read_grid(GRID.name, method, DIGITS, BUDGET, FIRST, WIDE)
    pair = settings["rate"], settings["ratio"]
    kept = {name: settings[name] for name in ("rate", "ratio", "num_steps")}
    run = functools.partial(learn, method, settings["num_steps"], pair)
    return run, kept | {"grid_cost": settings["tuning_cost"]}


def measure(cell: Row) -> Row:
    """One method, seed and share, its penalty chosen on held-out examples."""
    method, seed, share = cell["method"], cell["seed"], cell["share"]
    data, (run, settings) = digits(), learner(method)

    def one(penalty: float, hold_out: bool) -> Row:
        lane = lane_of(seed, share, penalty, hold_out)
        alpha, cost, seconds = run(data, lane)
        found = worth(method, data, lane, alpha)
        row: Row = {"accuracy": found["accuracy"], "run_seconds": seconds}
        row["selection"] = found["held_accuracy"], -found["held_loss"]
        return row | ({"f1": found["f1"]} | cost if cost else {})

    about = {"data": DIGITS, "data_sha256": fingerprint(data)}
    return tune_and_run(one, PENALTIES) | settings | about


def by_random_search(
    budget: float, data: PyTree, lane: Lane
) -> tuple[Array, Row, float]:
    """The best of the weights drawn uniformly that the budget pays for.

    Each draw is trained by Newton's method.
    """
    task, started = task_of(data, lane), time.perf_counter()
    trials: list[Row] = []
    trace = hg.search(
        task.problem, hg.Newton(tolerance=1e-2), hg.searchers.Random(), task.w,
        space=task.space, budget=budget, key=jax.random.fold_in(lane[0], 1),
        trial_callback=trials.append,
    )  # fmt: skip
    paid = paid_for(trace.cost, budget)
    best = int(np.argmin(np.where(paid, trace.value, np.inf)))
    (alpha,) = trials[best]["alpha"]
    return jnp.asarray(alpha), spent(trace, budget), time.perf_counter() - started


# Judging and showing.


def accuracies(rows: list[Row], method: str, share: float) -> np.ndarray:
    """In per cent, by seed."""
    mine = [r for r in rows if r["method"] == method and r["share"] == share]
    return 100 * np.array(
        [r["accuracy"] for r in sorted(mine, key=lambda r: r["seed"])]
    )


def closed(rows: list[Row], method: str, share: float) -> tuple[float, float, float]:
    """The part of the gap from baseline to oracle, and its paired 95% interval.

    The gap is its mean over seeds.
    """
    low = accuracies(rows, "baseline", share)
    gap = np.mean(accuracies(rows, "oracle", share) - low)
    mean, below, above = paired(accuracies(rows, method, share), low)
    return mean / gap, below / gap, above / gap


def judge(rows: list[Row]) -> list[Verdict]:
    """The family at half of the labels wrong, and what each closed."""
    share, verdicts, closers = SHARES[0], [], []
    there = {row["method"] for row in rows}
    if not {"baseline", "oracle"} <= there:
        return []
    learners = [method for method in FAMILY if method in there]
    for method in learners:
        part, below, above = closed(rows, method, share)
        if part >= GAP and below > 0:
            closers.append(method)
        verdicts.append(
            Verdict(f"{method} closes {part:.0%} [{below:.0%}, {above:.0%}] of the gap")
        )
    family_ = [method for method in closers if method != DOUBLE_LOOP]
    text = (
        f"(o) {share:.0%} of the labels wrong: {len(family_)} methods of the family "
        f"close at least {GAP:.0%} of the gap between baseline and oracle"
        + (f" ({', '.join(family_)})" if family_ else "")
        + f"; at least {ENOUGH} claimed"
    )
    num_seeds = len({row["seed"] for row in rows})
    widths = [(above - below) / 2 for _, below, above in (
        closed(rows, method, share) for method in learners
    )]  # fmt: skip
    met = len(family_) >= ENOUGH
    return [conclude(text, met, num_seeds, float(np.median(widths)), GAP), *verdicts]


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """Accuracies at each share, and costs."""
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}; {len({row['seed'] for row in rows})} seeds, median "
        "[quartiles]. Test accuracy where 50%, 70% and 90% of 1,000 training labels "
        "are wrong; gap: the part of the way from baseline to oracle at 50%; F1 of "
        f"finding wrong labels there. At most {BUDGET:,} gradient-equivalents "
        "(grad-eq) a run; tuning: of the penalty, a row; grid: of the rates, once, "
        f"from [corruption-grid](corruption-grid.md). Source: {table.source}. "
        f"Command: `{command}`",
        "",
        "| method | 50% | 70% | 90% | gap | F1 | grad-eq | gradients | HVPs | steps "
        "| tuning grad-eq | grid grad-eq |",
        "|" + "---|" * 12,
    ]
    there = {row["method"] for row in rows}
    for method in (m for m in METHODS if m in there):
        mine = [row for row in rows if row["method"] == method]
        of_share = [accuracies(rows, method, share) for share in SHARES]

        def mean(name: str, form: str, share: float | None = None, mine=mine) -> str:
            values = [
                row[name] for row in mine
                if row.get(name) is not None and share in (None, row["share"])
            ]  # fmt: skip
            return form.format(np.mean(values)) if values else "-"

        spread = lambda x: "{1:.1f} [{0:.1f}, {2:.1f}]".format(
            *np.quantile(x, QUARTILES)
        )
        part = f"{closed(rows, method, SHARES[0])[0]:.0%}".replace("-0%", "0%")
        cells = [
            *map(spread, of_share),
            part,
            mean("f1", "{:.2f}", SHARES[0]),
            mean("gradient_equivalents", "{:.0f}"),
            mean("num_grads", "{:.0f}"),
            mean("num_hvps", "{:.0f}"),
            mean("num_steps", "{:.0f}"),
            mean("tuning_cost", "{:,.0f}"),
            mean("grid_cost", "{:,.0f}"),
        ]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """A panel a share: where each seed of each method ends."""
    there = {row["method"] for row in rows}
    panels = {
        f"{share:.0%} of the labels wrong": {
            method: accuracies(rows, method, share).tolist()
            for method in METHODS
            if method in there
        }
        for share in SHARES
    }
    plots.strips(panels, path, "test accuracy, %", lines=("baseline", "oracle"))


SOURCE = "Franceschi et al. 2017 (arXiv 1703.01785); Dagréou et al. 2022 (2201.13409)"
GRID = Table(
    name="corruption-grid",
    source=SOURCE,
    minutes=11,
    seeds=1,
    plan=lambda scale, seeds: [{"method": method, "seed": 0} for method in FAMILY],
    run=cell_by_cell(
        try_all,
        markdown_of_grid,
        lambda rows, path: plots.heatmaps(
            rows, path, "corruption-grid: loss of held-out examples", "rate of weights"
        ),
    ),
    judge=judge_grid,
)
TABLE = Table(
    name="corruption",
    source=SOURCE,
    minutes=12,
    seeds=10,
    plan=lambda scale, seeds: [
        {"method": method, "share": share, "seed": seed}
        for method in METHODS
        for share in SHARES
        for seed in range(seeds)
    ],
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
