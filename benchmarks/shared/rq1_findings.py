"""Findings of the table `rq1`: the share of inner training, and what methods save."""

import numpy as np

from hypergrad.bench import (
    Finding,
    Row,
    mean_interval,
    ratio_interval,
)

from . import row_columns
from .cost_ratios import (
    costs_or_bounds,
    mean_over_tasks,
    miss_texts,
    rank_by_cost,
    saving_claim,
)
from .outcomes import conclude
from .rq1_running import DESCENTS, METHODS, PARTS
from .rq1_tasks import (
    IMPLICIT,
    SHARING,
    SYSTEMS,
    UNROLLED,
    WARM_IMPLICIT,
    WARM_UNROLLED,
)

BLACK_BOXES = ("grid", "random", "TPE")
MIN_SHARE, MIN_WARM_SAVING, MIN_SAVING = 0.5, 1.5, 2.0  # claimed


def column(rows: list[Row], task: str, method: str, name: str) -> np.ndarray:
    """Returns a column by seed; empty if the method does not apply to the task."""
    applicable = [row for row in rows if not row.get("reason")]
    return row_columns.column(applicable, name, task=task, method=method)


def costs_to_target(rows: list[Row], task: str, method: str) -> tuple[np.ndarray, int]:
    """Returns costs by seed, and how many are bounds of runs that miss the target."""
    values = lambda name: column(rows, task, method, name)
    return costs_or_bounds(values("cost"), values("gradient_equivalents"))


def shares(rows: list[Row], task: str, method: str, part: str = "inner") -> np.ndarray:
    """Returns the share of a part in the cost until the target, by seed."""
    costs = {name: column(rows, task, method, name) for name in PARTS}
    return costs[part] / sum(costs.values())


def share(rows: list[Row], task: str, method: str, part: str = "inner") -> float:
    """Returns the mean of `shares` over seeds."""
    return float(np.mean(shares(rows, task, method, part)))


def tuning_cost(rows: list[Row], task: str, method: str) -> float:
    """Returns the cost of choosing the rate; zero if the method does not apply."""
    return float(column(rows, task, method, "tuning_cost")[:1].sum())


def best_of(rows: list[Row], task: str) -> str:
    """Returns the row with hypergradients that tuned best."""
    scores = {method: column(rows, task, method, "score") for method in DESCENTS}
    return min((m for m in scores if scores[m].size), key=lambda m: scores[m][0])


def bottleneck(rows: list[Row]) -> Finding:
    """Returns whether inner training is at least half of the cost of *implicit*."""
    by_task = {task: shares(rows, task, IMPLICIT) for task in SYSTEMS}
    by_task = {task: by_seed for task, by_seed in by_task.items() if by_seed.size}
    task = min(by_task, key=lambda task: by_task[task].mean())
    mean, low, high = mean_interval(by_task[task])
    text = (
        f"inner training is {mean:.0%} [{low:.0%}, {high:.0%}] of the cost of "
        f"{IMPLICIT} where it is least, on {task}, at least {MIN_SHARE:.0%} claimed"
    )
    num_seeds, half_width = by_task[task].size, (high - low) / 2
    return conclude(text, mean >= MIN_SHARE, num_seeds, half_width, MIN_SHARE)


def shares_by_task(rows: list[Row]) -> list[Finding]:
    """Returns the share of inner training; that of black boxes follows from sizes."""
    lines = []
    for method in DESCENTS:
        tasks = [task for task in SYSTEMS if column(rows, task, method, "left").size]
        text = ", ".join(f"{task} {share(rows, task, method):.0%}" for task in tasks)
        lines.append(Finding(f"inner training in the cost of {method}: {text}"))
    text = ", ".join(
        f"{task} {np.mean([share(rows, task, box) for box in BLACK_BOXES]):.0%}"
        for task in SYSTEMS
    )
    label = (
        "inner training in the cost of grid, random and TPE, which follows from sizes"
    )
    return [*lines, Finding(f"{label}: {text}")]


def warm_start_claim(rows: list[Row], warm: str, cold: str) -> Finding:
    """Returns what a warm start saves where the cold one always reaches the target."""
    tasks = [
        task
        for task in SYSTEMS
        if column(rows, task, warm, "left").size
        and not costs_to_target(rows, task, cold)[1]
    ]
    label = f"{warm} against {cold}, on {', '.join(tasks) or 'no task'}"
    if not tasks:
        misses = [f"{cold} on every seed of any task"]
        return saving_claim(label, np.ones(0), MIN_WARM_SAVING, misses)
    misses = miss_texts({task: costs_to_target(rows, task, warm)[1] for task in tasks})
    by_seed = mean_over_tasks(
        [
            (costs_to_target(rows, task, cold)[0], costs_to_target(rows, task, warm)[0])
            for task in tasks
        ]
    )
    return saving_claim(label, by_seed, MIN_WARM_SAVING, misses)


def against_random(rows: list[Row]) -> list[Finding]:
    """Returns what the best row with hypergradients saves, over all tasks.

    The second line includes the tuning of every row among which it was chosen.
    """
    best = {task: best_of(rows, task) for task in SYSTEMS}
    misses = {f"{best[t]} ({t})": costs_to_target(rows, t, best[t])[1] for t in SYSTEMS}
    random = {task: costs_to_target(rows, task, "random")[0] for task in SYSTEMS}
    cost = {task: costs_to_target(rows, task, best[task])[0] for task in SYSTEMS}
    by_seed = mean_over_tasks([(random[task], cost[task]) for task in SYSTEMS])
    bounds = [task for task in SYSTEMS if costs_to_target(rows, task, "random")[1]]
    label = "best with hypergradients against random, over all tasks"
    if bounds:
        label += f" (random misses some targets: {', '.join(bounds)})"
    claim = saving_claim(label, by_seed, MIN_SAVING, miss_texts(misses))
    tuning = {
        task: sum(tuning_cost(rows, task, x) for x in DESCENTS) for task in SYSTEMS
    }
    ratios = mean_over_tasks([(cost[t] + tuning[t], random[t]) for t in SYSTEMS])
    ratio = ratio_interval(ratios, np.ones(ratios.size))
    bound = "> " if any(misses.values()) else ""
    text = (
        f"best with all the tuning that chose it needs {bound}{ratio:.3g} times the "
        "cost of random, which has nothing to tune"
    )
    return [claim, Finding(text)]


def winner(rows: list[Row], task: str) -> Finding:
    """Returns the cheapest of the methods that reach the target on every seed."""
    costs = {method: costs_to_target(rows, task, method) for method in METHODS}
    costs = {method: x for method, x in costs.items() if x[0].size}
    means, text = rank_by_cost(costs, ",.0f")
    if means:
        totals = {x: means[x] + tuning_cost(rows, task, x) for x in means}
        cheapest = min(totals, key=lambda method: totals[method])
        text += f"; with its tuning counted, {cheapest}, {totals[cheapest]:,.0f}"
    best = f"{best_of(rows, task)} tuned best with hypergradients"
    return Finding(f"{task}: {text}; {best}")


def sharing_finding(rows: list[Row]) -> Finding:
    """Returns what random search saves with one ``w`` for all candidates."""
    tasks = [task for task in SYSTEMS if column(rows, task, SHARING, "left").size]
    missed = [task for task in tasks if costs_to_target(rows, task, SHARING)[1]]
    reached = [task for task in tasks if task not in missed]
    text = f"{SHARING} against random"
    if reached:
        pairs = [
            (
                costs_to_target(rows, t, "random")[0],
                costs_to_target(rows, t, SHARING)[0],
            )
            for t in reached
        ]
        by_seed = mean_over_tasks(pairs)
        ratio = ratio_interval(by_seed, np.ones(by_seed.size))
        text += (
            f": {ratio:.3g} times fewer gradient-equivalents on {', '.join(reached)}"
        )
    if missed:
        text += f"; target missed on some seed of {', '.join(missed)}"
    return Finding(text)


def edge_finding(rows: list[Row]) -> Finding:
    """Returns where the best rate may lie beyond those that were tried."""
    chosen = {
        f"{method} ({task})": (column(rows, task, method, "setting")[0], x.rates)
        for task, system in SYSTEMS.items()
        for method, x in DESCENTS.items()
        if method not in system.absent
    }
    top = [name for name, (rate, rates) in chosen.items() if rate == max(rates)]
    low = [name for name, (rate, rates) in chosen.items() if rate == min(rates)]
    count = lambda names: f"{len(names)}: {', '.join(names) or 'none'}"
    return Finding(
        f"of {len(chosen)} rates, at the upper end of those tried {count(top)}; at the "
        f"lower end {count(low)}"
    )


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the claims, then the winner per task and other comparisons."""
    if not set(METHODS) <= {row["method"] for row in rows}:
        return []
    return [
        bottleneck(rows),
        *shares_by_task(rows),
        warm_start_claim(rows, WARM_IMPLICIT, IMPLICIT),
        warm_start_claim(rows, WARM_UNROLLED, UNROLLED),
        *against_random(rows),
        *(winner(rows, task) for task in SYSTEMS),
        sharing_finding(rows),
        edge_finding(rows),
    ]
