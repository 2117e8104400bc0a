"""The table `rq2`: the metric itself as the outer objective, three ways or by search.

Each outer loss, by a converged, a truncated and a single-loop hypergradient, against
black-box search on the exact metric at the same cost; `rq2_running` has the runs. See
README.md.
"""

from pathlib import Path

import numpy as np

from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Claim, Verdict, paired_ratio

from . import rq2_plot
from .shared.metric_learning import METRICS, parts_of
from .rq1 import over_tasks, ratio, seeds_of
from .shared.rq2_running import (
    BUDGETS,
    DESCENTS,
    LEARNED,
    METHODS,
    SAME,
    SEARCHES,
    TASKS,
    TUNING_SEEDS,
    Method,
    alone,
    retrained,
    run,
    tuned,
)
from .surrogates import PENALTY_ALONE

SOURCE = (
    "Brown et al. 2020 (arXiv 2007.12163), Benedict et al. 2022 (arXiv 2108.10566), "
    "Dagréou et al. 2022 (arXiv 2201.13409); Bergstra & Bengio 2012"
)
FEWER = 3.0  # times, claimed


def measure(cell: Row) -> Row:
    """One run at its chosen setting; the reason where data is missing."""
    task, method, seed = cell["task"], cell["method"], cell["seed"]
    try:
        parts = parts_of(task, seed)
    except FileNotFoundError as missing:
        return {"reason": str(missing)}
    flat = {f"{part} {name}": x for part in parts for name, x in parts[part].items()}
    row: Row = {"reason": None, "data_sha256": fingerprint(flat)}
    if method not in LEARNED:
        return row | alone(task, method, seed)
    chosen = tuned(task, method)
    row |= run(task, method, seed, chosen["setting"]) | chosen
    return row | retrained(task, seed, row["alpha"])


# Judging.


def lane(rows: list[Row], task: str, method: str) -> list[Row]:
    """The rows of a method, by seed."""
    mine = [r for r in rows if (r["task"], r["method"]) == (task, method)]
    return sorted(mine, key=lambda row: row["seed"])


def column(rows: list[Row], task: str, method: str, name: str) -> np.ndarray:
    """One number a seed, NaN where a row has none."""
    return np.array([row.get(name) for row in lane(rows, task, method)], float)


def best(rows: list[Row], task: str, methods: list[Method], of: str) -> str:
    """Which of the rows of a loss or metric tuned best."""
    names = [method.name for method in methods if method.of == of]
    return max(names, key=lambda name: column(rows, task, name, "score")[0])


def cost_to_reach(row: Row, metric: str, target: float) -> float:
    """Of the first evaluation that is as good on validation; NaN where none is."""
    curve = zip(row["curve"][metric], row["curve_cost"], strict=True)
    return next((cost for value, cost in curve if value >= target - SAME), np.nan)


def needed(
    rows: list[Row], task: str, method: str, metric: str
) -> tuple[np.ndarray, int]:
    """Costs until as good as the best search of the metric ends, and how many never.

    By seed, what was spent where a run never was: a lower bound.
    """
    box = best(rows, task, SEARCHES, metric)
    pairs = zip(lane(rows, task, method), lane(rows, task, box), strict=True)
    cost = np.array(
        [cost_to_reach(row, metric, its[f"val {metric}"]) for row, its in pairs]
    )
    spent = column(rows, task, method, "spent")
    return np.where(np.isnan(cost), spent, cost), int(np.isnan(cost).sum())


def against(
    rows: list[Row],
    task: str,
    metric: str,
    first: str,
    second: str,
    least: float | None,
) -> Verdict:
    """One row against another by the exact metric on test."""
    claim = Claim(first, second, f"test {metric}", least, scale=100, unit="points")
    verdict = claim.judge([row for row in rows if row["task"] == task])
    mark = "" if least is None else "(o) "
    return verdict._replace(text=f"{mark}{task}, test {metric}: {verdict.text}")


def at_equal_cost(rows: list[Row], task: str, metric: str) -> Verdict:
    """Whether the metric's own surrogate is above the best search on the metric."""
    own = best(rows, task, DESCENTS, metric)
    return against(rows, task, metric, own, best(rows, task, SEARCHES, metric), 0.0)


def sooner(rows: list[Row], task: str) -> Verdict:
    """Whether the own surrogates are as good as a search ends, for less."""
    pairs, lost = [], {}
    for metric in METRICS:
        own = best(rows, task, DESCENTS, metric)
        box = best(rows, task, SEARCHES, metric)
        cost, never = needed(rows, task, own, metric)
        pairs.append((needed(rows, task, box, metric)[0], cost))
        lost[own] = never
    what = f"{task}, own surrogates until as good on validation as search ends"
    return ratio(what, over_tasks(pairs), FEWER, seeds_of(lost))


def cell_cost(rows: list[Row], task: str, metric: str) -> Verdict:
    """The same of one task and metric; no claim."""
    own = best(rows, task, DESCENTS, metric)
    box = best(rows, task, SEARCHES, metric)
    cost, never = needed(rows, task, own, metric)
    mean, low, high = paired_ratio(needed(rows, task, box, metric)[0], cost)
    text = f"{task}, {metric}: {own} needs {mean:.3g} [{low:.3g}, {high:.3g}] times"
    most = f", at most, never there on {never} of {cost.size} seeds" if never else ""
    return Verdict(f"{text} fewer than {box}{most}")


def beside(rows: list[Row], task: str, metric: str) -> list[Verdict]:
    """The own surrogate by its best way and all that it may be held against."""
    own = best(rows, task, DESCENTS, metric)
    others = [m.name for m in DESCENTS if m.of == metric and m.name != own]
    others += [best(rows, task, DESCENTS, "cross-entropy"), *PENALTY_ALONE]
    return [against(rows, task, metric, own, other, None) for other in others]


def trained_anew(rows: list[Row], task: str, metric: str) -> Verdict:
    """What is lost where ``alpha`` is trained anew to convergence; no claim."""
    changes = []
    for method in (m for m in DESCENTS if m.of == metric):
        anew, hand = (
            column(rows, task, method.name, f"{name} {metric}")
            for name in ("retrained", "test")
        )
        changes.append(f"{method.by} {100 * np.mean(anew - hand):+.1f}")
    return Verdict(f"{task}, test {metric}, trained anew: {', '.join(changes)} points")


def judge(rows: list[Row]) -> list[Verdict]:
    """The claims, then what is only said."""
    skipped = {row["task"]: row["reason"] for row in rows if row["reason"]}
    there = [task for task in TASKS if task not in skipped]
    cells = [(task, metric) for task in there for metric in METRICS]
    verdicts = [Verdict(f"{task} skipped: {why}") for task, why in skipped.items()]
    verdicts += [at_equal_cost(rows, *cell) for cell in cells]
    verdicts += [sooner(rows, task) for task in there]
    verdicts += [cell_cost(rows, *cell) for cell in cells]
    for cell in cells:
        verdicts += beside(rows, *cell)
    return verdicts + [trained_anew(rows, *cell) for cell in cells]


# Showing.


def percent(values: np.ndarray) -> str:
    """Mean and standard deviation; a dash where a number is missing."""
    if not np.all(np.isfinite(values)):
        return "-"
    mean = f"{100 * values.mean():.1f}"
    return mean if values.size < 2 else f"{mean} ± {100 * values.std(ddof=1):.1f}"


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """A table a task."""
    skipped = {row["task"]: row["reason"] for row in rows if row["reason"]}
    lines = [
        f"# {table.name}",
        "",
        f"{len({row['seed'] for row in rows})} seeds; means ± standard deviations of "
        "exact metrics on the untouched test split, in percent, of the model that a "
        "run has in hand within its budget; bold is a metric's own surrogate or "
        "search. Retrained: the row's own metric there of a model trained to "
        "convergence with its hyperparameters. To M: gradient-equivalents (grad-eq) "
        "until the exact M on validation at which the search on M that tuned best "
        "ends, geometric mean; > where a run never was, on as many seeds as stand in "
        "brackets, and counts with what it spent. Settings are Adam's rate or half "
        f"the width of a box, tuned on seeds {TUNING_SEEDS[0]} and {TUNING_SEEDS[1]}. "
        f"Source: {table.source}. Command: `{command}`",
    ]
    to = [f"to {metric}" for metric in METRICS]
    titles = ["row", *METRICS, "retrained", *to, "evaluations", "grad-eq", "setting"]
    titles.append("tuning grad-eq")
    for task, budget in BUDGETS.items():
        lines += ["", f"## {task}", ""]
        if task in skipped:
            lines.append(f"Skipped: {skipped[task]}")
            continue
        lines += [f"At most {budget:,.0f} gradient-equivalents a run.", ""]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        for method in METHODS:
            lines.append("| " + " | ".join(cells_of(rows, task, method)) + " |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def cells_of(rows: list[Row], task: str, method: str) -> list[str]:
    """A line of the table."""
    of = lambda name: column(rows, task, method, name)
    exact = {metric: percent(of(f"test {metric}")) for metric in METRICS}
    if method not in LEARNED:
        return [method, *exact.values(), *["-"] * 8]
    own = LEARNED[method].of
    if own in exact:
        exact[own] = f"**{exact[own]}**"
    again = percent(of(f"retrained {own}")) if own in exact else "-"
    costs = []
    for metric in METRICS:
        cost, never = needed(rows, task, method, metric)
        mean = f"{np.exp(np.mean(np.log(cost))):,.0f}"
        costs.append(f"> {mean} ({never})" if never else mean)
    return [
        method,
        *exact.values(),
        again,
        *costs,
        f"{of('evaluations').mean():.0f}",
        f"{of('spent').mean():,.0f}",
        f"{of('setting')[0]:g}",
        f"{of('tuning_cost')[0]:,.0f}",
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Validation against cost, and test at the end: a row of panels each, by task."""
    panels = {}
    for task in TASKS:
        if any(row["reason"] for row in rows if row["task"] == task):
            continue
        for metric in METRICS:
            names = [m.name for m in (*DESCENTS, *SEARCHES) if m.of == metric]
            names.append(best(rows, task, DESCENTS, "cross-entropy"))
            panels[task, metric] = {
                name: [
                    (row["curve_cost"], row["curve"][metric], row[f"test {metric}"])
                    for row in lane(rows, task, name)
                ]
                for name in names
            }
    rq2_plot.curves(panels, BUDGETS, METRICS, path)


TABLE = Table(
    name="rq2",
    source=SOURCE,
    minutes=15,
    seeds=5,
    plan=lambda scale, seeds: [
        {"task": task, "method": method, "seed": seed}
        for task in TASKS
        for method in METHODS
        for seed in range(seeds)
    ],
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
