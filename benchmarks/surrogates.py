"""The metric itself as the outer objective: does each do best on its own surrogate?

See README.md for the protocol; `metric_tasks` has the systems, `metric_learning` the
rows, and `joint` the comparison of a double loop with a single one.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.studies import record
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import MIN_SEEDS, Verdict, number_of_seeds, paired

from . import joint, plots
from .shared.metric_learning import (
    METRICS,
    OBJECTIVES,
    by_penalty_alone,
    by_random_search,
    hypergradient,
    judge,
    parts_of,
)

PENALTY_ALONE = {
    "baseline": "train",
    "validation-only": "val",
    "train + validation": "both",
}
OWN = {"accuracy": "smooth accuracy", "F1": "sigmoid F1", "mAP": "Smooth-AP"}
JUDGED = ("cross-entropy", *OWN.values())
SEARCHES = {f"random search, {metric}": metric for metric in METRICS}
METHODS = {
    "digits": (*PENALTY_ALONE, *OBJECTIVES, *SEARCHES),
    "reuters": (*PENALTY_ALONE, *OBJECTIVES, *SEARCHES),
    "attributes": (*PENALTY_ALONE, *JUDGED, *SEARCHES),
    "retrieval": ("baseline", *JUDGED, *SEARCHES),  # other classes in each part
    "joint": tuple(joint.LOOPS),
}
TASKS = tuple(task for task in METHODS if task != "joint")
SINGLE = ("SOBA", "SOBA, full batch", "truncated")
ORDER = ("digits", "reuters", "joint", "attributes", "retrieval")


def plan(scale: str, seeds: int) -> list[Row]:
    """Seeds innermost, so that a program is compiled once and forgotten."""
    del scale
    return [
        {"task": task, "method": method, "seed": seed}
        for task in ORDER
        for method in METHODS[task]
        for seed in range(seeds)
    ]


# Measuring.

COLUMNS = (
    *("gap", "temperature", "rate", "penalty", "trials", "last_cost"),
    *("gradient_equivalents", "num_hvps", "compile_seconds", "run_seconds"),
    *("trusted", "adjoint_residual", "target", "end", "cost_to_reach"),
)


def measure(cell: Row) -> Row:
    """Learns, retrains, and reads the test split once."""
    task = joint.TASK if cell["task"] == "joint" else cell["task"]
    row: Row = dict.fromkeys((*COLUMNS, *METRICS, *(f"val_{m}" for m in METRICS)))
    row |= {"reason": None, "data_sha256": None}
    try:
        parts = parts_of(task, cell["seed"])
    except FileNotFoundError as missing:
        return row | {"reason": str(missing)}
    found = learn(cell, task)
    row |= {name: as_number(found[name]) for name in COLUMNS if name in found}
    test = judge(task, found["w"], parts["test"])
    row |= {metric: test[metric] for metric in METRICS}
    val = judge(task, found["w"], parts["val"])
    row |= {f"val_{metric}": val[metric] for metric in METRICS}
    if "curve" in found:
        row |= {"curve": found["curve"], "curve_cost": found["curve_cost"]}
    flat = {f"{part} {name}": x for part in parts for name, x in parts[part].items()}
    return row | {"data_sha256": record.fingerprint(flat)}


def as_number(value: Any) -> float | None:
    return None if value is None else float(value)


def learn(cell: Row, task: str) -> dict[str, Any]:
    method, seed = cell["method"], cell["seed"]
    if cell["task"] == "joint":
        return joint.measured(method, seed)
    if method in PENALTY_ALONE:
        return by_penalty_alone(task, PENALTY_ALONE[method], seed)
    if method in SEARCHES:
        return by_random_search(task, SEARCHES[method], seed)
    return hypergradient(task, OBJECTIVES[method], seed)


# Judging.


def judge_rows(rows: list[Row]) -> list[Verdict]:
    """Missing numbers; then (o1) task by task and metric by metric, then (o2)."""
    skipped = {row["task"]: row["reason"] for row in rows if row["reason"]}
    rows = [row for row in rows if not row["reason"]]
    lost = [row for row in rows if any(row[metric] is None for metric in METRICS)]
    if lost:
        name = lambda row: [row[field] for field in ("task", "method", "seed")]
        return [Verdict(f"no number: {name(row)}", failed=True) for row in lost]
    verdicts = [Verdict(f"{task} skipped: {why}") for task, why in skipped.items()]
    for task in TASKS:
        if task not in skipped:
            verdicts += [own_is_best(rows, task, metric) for metric in METRICS]
    there = [task for task in TASKS if task not in skipped]
    verdicts.append(won(rows, there))
    verdicts += [reaches(rows, method) for method in SINGLE]
    verdicts += [at_equal_cost(rows, method) for method in SINGLE]
    for look in (on_validation, beside):
        verdicts += [look(rows, task, metric) for task in there for metric in METRICS]
    return verdicts


def column(rows: list[Row], task: str, method: str, name: str) -> np.ndarray:
    """One number a seed, in the order of seeds."""
    mine = [row for row in rows if row["task"] == task and row["method"] == method]
    mine = sorted(mine, key=lambda row: row["seed"])
    return np.array([row[name] for row in mine], dtype=float)


def over_rivals(
    rows: list[Row], task: str, metric: str, name: str
) -> tuple[str, dict[str, np.ndarray]]:
    """The best rival of a metric's own surrogate, and its lead over each."""
    own = column(rows, task, OWN[metric], name)
    rivals = [method for method in JUDGED if method != OWN[metric]]
    leads = {method: own - column(rows, task, method, name) for method in rivals}
    return min(rivals, key=lambda method: leads[method].mean()), leads


def own_is_best(rows: list[Row], task: str, metric: str) -> Verdict:
    """(o1): no rival is better by more than one standard error of the difference."""
    best, differences = over_rivals(rows, task, metric, metric)
    own = differences[best]
    error = lambda x: x.std(ddof=1) / x.size**0.5 if x.size > 1 else np.inf
    met = all(x.mean() >= -error(x) for x in differences.values())
    mean, low, high = (100 * x for x in paired(differences[best], 0.0))
    text = (
        f"o1, {task}, {metric}: {OWN[metric]} less {best}, its best rival: {mean:+.1f} "
        f"points [{low:+.1f}, {high:+.1f}], at least minus one standard error claimed"
    )
    return concluded(text, met, own.size)


def won(rows: list[Row], there: list[str]) -> Verdict:
    """In how many cells a metric's own surrogate is surely better than each rival."""
    cells = [(task, metric) for task in there for metric in METRICS]
    leads = [over_rivals(rows, *cell, cell[1])[1].values() for cell in cells]
    surely = sum(all(paired(x, 0.0)[1] > 0 for x in lead) for lead in leads)
    return Verdict(
        f"a metric's own surrogate is better than each rival, by a 95% interval above "
        f"zero, in {surely} of {len(cells)} cells"
    )


def on_validation(rows: list[Row], task: str, metric: str) -> Verdict:
    """Whether the own surrogate wins where it was followed; no claim."""
    best, leads = over_rivals(rows, task, metric, f"val_{metric}")
    mean, low, high = (100 * x for x in paired(leads[best], 0.0))
    return Verdict(
        f"{task}, {metric} on validation itself: {OWN[metric]} less {best}, its best "
        f"rival: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
    )


def at_equal_cost(rows: list[Row], method: str) -> Verdict:
    """Exact validation mAP at the end, less the double loop's at that cost."""
    value, cost, limit = (
        {row["seed"]: row[name] for row in rows if row["method"] == of}
        for of, name in (
            ("double loop", "curve"),
            ("double loop", "curve_cost"),
            (method, "last_cost"),
        )
    )
    theirs = [
        value[seed][max(0, np.searchsorted(cost[seed], limit[seed], "right") - 1)]
        for seed in sorted(limit)
    ]
    ours = column(rows, "joint", method, "end")
    mean, low, high = (100 * x for x in paired(ours, theirs))
    return Verdict(
        f"{method}, its mAP on validation at the end less the double loop's at that "
        f"cost: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
    )


def reaches(rows: list[Row], method: str) -> Verdict:
    """(o2): cost to reach over that of the double loop itself, at most a half."""
    ours, total, theirs = (
        column(rows, "joint", *names)
        for names in (
            (method, "cost_to_reach"),
            (method, "last_cost"),
            ("double loop", "cost_to_reach"),
        )
    )
    reached = np.isfinite(ours)
    ratio = np.log2(np.where(reached, ours, total) / theirs)
    mean, low, high = (2**x for x in paired(ratio, 0.0))
    bound = "" if reached.all() else "; its whole cost where it does not, a lower bound"
    text = (
        f"{'o2, ' if method == 'SOBA' else ''}{method} reaches the double loop's mAP "
        f"on {reached.sum()} of {reached.size} seeds, for {mean:.2f} [{low:.2f}, "
        f"{high:.2f}] of its gradient-equivalents{bound}"
    )
    if method != "SOBA":
        return Verdict(text)
    text += ", all seeds and at most 0.5 claimed"
    return concluded(text, bool(reached.all()) and mean <= 0.5, ours.size)


def concluded(text: str, met: bool, num_seeds: int) -> Verdict:
    if num_seeds < MIN_SEEDS:
        return Verdict(f"{text}: too few seeds, {MIN_SEEDS} are needed", failed=True)
    return Verdict(f"{text}: {'reproduced' if met else 'not reproduced'}")


def beside(rows: list[Row], task: str, metric: str) -> Verdict:
    """A metric's own surrogate beside the baseline and random search; no claim."""
    own = column(rows, task, OWN[metric], metric)

    def against(method):
        other = column(rows, task, method, metric)
        mean, low, high = (100 * x for x in paired(own, other))
        how = "above" if low > 0 else "below" if high < 0 else "level with"
        name = method.split(",")[0]
        return f"{how} {name} ({mean:+.1f} points [{low:+.1f}, {high:+.1f}])"

    others = ("baseline", "train + validation", "cross-entropy")
    others = [x for x in (*others, f"random search, {metric}") if x in METHODS[task]]
    return Verdict(
        f"{task}, {metric}: {OWN[metric]} is {', '.join(map(against, others))}"
    )


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """A table a system, and one of the joint part."""
    skipped = {row["task"]: row["reason"] for row in rows if row["reason"]}
    count = len({row["seed"] for row in rows})
    seeds = number_of_seeds(count) + ", mean ± standard deviation" * (count > 1)
    lines = [
        f"# {table.name}",
        "",
        f"{seeds}, in percent, on the untouched test "
        "split; bold is the row of a metric's own surrogate. Gap: surrogate less exact "
        "metric on validation, of the model at the end. Costs are of tuning and "
        "learning together: gradient-equivalents (grad-eq), Hessian-vector products, "
        "seconds a seed; compile is once for all seeds. Trusted: steps of the last run "
        "whose hypergradient says so of itself; residual: the largest of its adjoint "
        "solves. Random search starts from nothing, and pays for as many trials as it "
        f"says. Source: "
        f"{table.source}. Command: `{command}`",
    ]
    for task in TASKS:
        lines += ["", f"## {task}", ""]
        if task in skipped:
            lines.append(f"Skipped: {skipped[task]}")
            continue
        names = [*METRICS, "gap", "trials", "grad-eq", "HVPs", "compile s", "run s"]
        lines += header(["outer objective", *names, "trusted", "residual"])
        for method in METHODS[task]:
            cells = [
                metric_cell(rows, task, method, metric, OWN[metric] == method)
                for metric in METRICS
            ]
            cells += costs(rows, task, method)
            lines.append("| " + " | ".join([method, *cells]) + " |")
    lines += ["", f"## joint: Smooth-AP on {joint.TASK}", ""]
    names = ["test mAP", "val mAP at the end", "reached", "grad-eq to reach"]
    lines += header(["loop", *names, "grad-eq in all", "compile s", "run s"])
    lines += [joint_line(rows, method) for method in joint.LOOPS]
    lines += ["", *(v.line for v in judge_rows(rows))]
    return "\n".join(lines)


def header(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def spread(values: np.ndarray, scale: float = 100, digits: int = 1) -> str:
    values = scale * values[np.isfinite(values)]
    if not values.size:
        return "-"
    mean = f"{values.mean():.{digits}f}"
    if values.size == 1:
        return mean
    return f"{mean} ± {values.std(ddof=1):.{digits}f}"


def metric_cell(rows: list[Row], task: str, method: str, metric: str, own: bool) -> str:
    text = spread(column(rows, task, method, metric))
    return f"**{text}**" if own else text


def average(values: np.ndarray, form: str) -> str:
    values = values[np.isfinite(values)]
    return form.format(values.mean()) if values.size else "-"


def costs(rows: list[Row], task: str, method: str) -> list[str]:
    forms = {
        "gap": "{:+.3f}",
        "trials": "{:.0f}",
        "gradient_equivalents": "{:.0f}",
        "num_hvps": "{:.0f}",
        "compile_seconds": "{:.1f}",
        "run_seconds": "{:.1f}",
        "trusted": "{:.0%}",
    }
    of = lambda name: column(rows, task, method, name)
    residuals = of("adjoint_residual")
    largest = f"{np.nanmax(residuals):.0e}" if np.isfinite(residuals).any() else "-"
    return [*(average(of(name), form) for name, form in forms.items()), largest]


def joint_line(rows: list[Row], method: str) -> str:
    of = lambda name: column(rows, "joint", method, name)
    reached = np.isfinite(of("cost_to_reach"))
    cells = [
        spread(of("mAP")),
        spread(of("end")),
        f"{reached.sum()} of {reached.size}",
        spread(of("cost_to_reach"), 1, 0),
        average(of("gradient_equivalents"), "{:.0f}"),
        average(of("compile_seconds"), "{:.1f}"),
        average(of("run_seconds"), "{:.1f}"),
    ]
    return "| " + " | ".join([method, *cells]) + " |"


def draw(rows: list[Row], path: Path) -> None:
    """Differences to the baseline in points, and costs to reach."""
    skipped = {row["task"] for row in rows if row["reason"]}
    panels = {
        task: {
            method: {
                metric: [
                    100 * x
                    for x in paired(
                        column(rows, task, method, metric),
                        column(rows, task, "baseline", metric),
                    )
                ]
                for metric in METRICS
            }
            for method in METHODS[task]
            if method != "baseline"
        }
        for task in TASKS
        if task not in skipped
    }
    curves = {
        method: [
            (row["curve_cost"], row["curve"], row["target"], row["cost_to_reach"])
            for row in rows
            if row["task"] == "joint" and row["method"] == method
        ]
        for method in joint.LOOPS
    }
    plots.surrogates(panels, OWN, curves, path)


TABLE = Table(
    name="surrogates",
    source="Brown et al. 2020 (arXiv 2007.12163), Benedict et al. 2022 (arXiv "
    "2108.10566), Dagréou et al. 2022 (arXiv 2201.13409), scaled down",
    minutes=15,
    seeds=10,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge_rows,
)
