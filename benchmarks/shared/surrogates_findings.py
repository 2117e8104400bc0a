"""Claims and comparisons of the table `surrogates`."""

import numpy as np

from hypergrad.bench import (
    Finding,
    Interval,
    Resplits,
    Row,
    difference_interval,
    mean_interval,
    select,
)
from hypergrad.bench.statistics import MIN_SEEDS, holm_levels, p_value

from .metric_learning import OWN_SURROGATE
from .row_columns import column

#: Test examples, or classes, over those to learn from, of the systems whose seeds
#: re-split one data set with fewer of them to test.
RESPLITS = {
    "digits": Resplits(test_to_train=697 / 1100),
    "retrieval": Resplits(test_to_train=3 / 7),
}
COMPARED = ("cross-entropy", *OWN_SURROGATE.values())


def in_points(interval: Interval) -> str:
    """Returns an interval as points of a percentage."""
    mean, low, high = (100 * x for x in interval)
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def leads_over_rivals(
    rows: list[Row], task: str, metric: str, name: str
) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the best rival of a metric's own surrogate, and the lead over each."""
    values = lambda method: column(rows, name, task=task, method=method)
    own = values(OWN_SURROGATE[metric])
    rivals = [method for method in COMPARED if method != OWN_SURROGATE[metric]]
    leads = {method: own - values(method) for method in rivals}
    return min(rivals, key=lambda method: leads[method].mean()), leads


def own_surrogate_claim(rows: list[Row], task: str, metric: str) -> Finding:
    """Claim o1: no rival is better by more than one standard error."""
    best, leads = leads_over_rivals(rows, task, metric, metric)
    error = lambda x: x.std(ddof=1) / x.size**0.5 if x.size > 1 else np.inf
    is_met = all(x.mean() >= -error(x) for x in leads.values())
    text = (
        f"o1, {task}, {metric}: {OWN_SURROGATE[metric]} minus {best}, its best rival: "
        f"{in_points(mean_interval(leads[best], resplits=RESPLITS.get(task)))}, at "
        "least minus one standard error claimed"
    )
    return conclude(text, is_met, leads[best].size)


def count_wins(rows: list[Row], task_metrics: list[tuple[str, str]]) -> Finding:
    """Returns in how many cells the own surrogate is better than each rival."""

    def is_won(task: str, metric: str) -> bool:
        _, leads = leads_over_rivals(rows, task, metric, metric)
        resplits = RESPLITS.get(task)
        intervals = (mean_interval(x, resplits=resplits) for x in leads.values())
        return all(interval.low > 0 for interval in intervals)

    num_wins = sum(is_won(*x) for x in task_metrics)
    return Finding(
        f"a metric's own surrogate is better than each rival, by a 95% interval above "
        f"zero, in {num_wins} of {len(task_metrics)} cells"
    )


def compare_on_validation(rows: list[Row], task: str, metric: str) -> Finding:
    """Returns the lead of the own surrogate on the data of the outer loss."""
    best, leads = leads_over_rivals(rows, task, metric, f"val_{metric}")
    return Finding(
        f"{task}, {metric} on validation itself: {OWN_SURROGATE[metric]} minus {best}, "
        f"its best rival: {in_points(mean_interval(leads[best]))}"
    )


def compare_at_equal_cost(rows: list[Row], method: str) -> Finding:
    """Returns the final validation mAP minus that of the double loop at that cost."""
    value, cost, limit = (
        {row["seed"]: row[name] for row in rows if row["method"] == label}
        for label, name in (
            ("double loop", "curve"),
            ("double loop", "curve_cost"),
            (method, "last_cost"),
        )
    )
    double_loop = [
        value[seed][max(0, np.searchsorted(cost[seed], limit[seed], "right") - 1)]
        for seed in sorted(limit)
    ]
    single_loop = column(rows, "end", task="joint", method=method)
    return Finding(
        f"{method}, its mAP on validation at the end minus that of the double loop at "
        f"that cost: {in_points(difference_interval(single_loop, double_loop))}"
    )


def reaching_claim(rows: list[Row], method: str) -> Finding:
    """Claim o2: the cost to reach the double loop's mAP is at most half of its cost."""
    cost, total, double_loop = (
        column(rows, name, task="joint", method=label)
        for label, name in (
            (method, "cost_to_reach"),
            (method, "last_cost"),
            ("double loop", "cost_to_reach"),
        )
    )
    reached = np.isfinite(cost)
    ratio = np.log2(np.where(reached, cost, total) / double_loop)
    mean, low, high = (2**x for x in mean_interval(ratio))
    bound = "" if reached.all() else "; its whole cost where it does not, a lower bound"
    text = (
        f"{'o2, ' if method == 'SOBA' else ''}{method} reaches the double loop's mAP "
        f"on {reached.sum()} of {reached.size} seeds, for {mean:.2f} [{low:.2f}, "
        f"{high:.2f}] of its gradient-equivalents{bound}"
    )
    if method != "SOBA":
        return Finding(text)
    text += ", all seeds and at most 0.5 claimed"
    if np.any(~reached & (total < 0.5 * double_loop)):
        text += "; runs that do not reach it ended before half of the cost"
        return Finding(text, "undecided")
    return conclude(text, bool(reached.all()) and mean <= 0.5, cost.size)


def conclude(text: str, is_met: bool, num_seeds: int) -> Finding:
    """Returns how a claim ends; fewer than five seeds decide nothing."""
    if num_seeds < MIN_SEEDS:
        return Finding(f"{text}: {num_seeds} seeds of {MIN_SEEDS}", "undecided")
    return Finding(text, "supported" if is_met else "not supported")


def compare_with_others(
    rows: list[Row], task_metrics: list[tuple[str, str]]
) -> list[Finding]:
    """Returns how own surrogates differ from other rows, a line per task and metric.

    The intervals are corrected for the number of all comparisons by Holm's method.
    """
    differences = {
        (task, metric, other): column(
            rows, metric, task=task, method=OWN_SURROGATE[metric]
        )
        - column(rows, metric, task=task, method=other)
        for task, metric in task_metrics
        for other in others_of(rows, task, metric)
    }
    p_values = [
        p_value(values, resplits=RESPLITS.get(task))
        for (task, *_), values in differences.items()
    ]
    levels = dict(zip(differences, holm_levels(p_values), strict=True))
    lines = []
    for task, metric in task_metrics:
        keys = [(task, metric, other) for other in others_of(rows, task, metric)]
        texts = [
            difference_text(key[2], differences[key], levels[key], RESPLITS.get(task))
            for key in keys
        ]
        text = f"{task}, {metric}: {OWN_SURROGATE[metric]} is {', '.join(texts)}"
        lines.append(Finding(text))
    return lines


def others_of(rows: list[Row], task: str, metric: str) -> list[str]:
    """Returns the rows of a task with which a metric's own surrogate is compared."""
    labels = {row["method"] for row in select(rows, task=task)}
    others = ("baseline", "train + validation", "cross-entropy")
    return [x for x in (*others, f"random search, {metric}") if x in labels]


def difference_text(
    other: str, values: np.ndarray, level: float, resplits: Resplits | None
) -> str:
    """Returns whether differences from another row are positive, and their interval."""
    interval = mean_interval(values, level=level, resplits=resplits)
    relation = "not shown to differ from"
    if interval.low > 0:
        relation = "above"
    elif interval.high < 0:
        relation = "below"
    label = other.split(",")[0]
    return f"{relation} {label} ({in_points(interval)}, {100 * level:.4g}% interval)"
