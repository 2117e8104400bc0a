"""The table `rq1`: what the inner loop costs in every paradigm, and what remedies it.

Each method on each system of rq1_tasks, run by rq1_running, until it is as good as a
grid. See README.md.
"""

import math
from pathlib import Path

import numpy as np

from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import (
    Verdict,
    conclude,
    geometric_mean,
    number_of_seeds,
    paired,
    paired_ratio,
)

from .shared import plots
from .shared.rq1_running import (
    GRAMS,
    GRID,
    METHODS,
    NEAR,
    OPERATIONS,
    PARTS,
    TRAININGS,
    WATTS,
    WAYS,
    flops_of,
    run,
    tuned,
)
from .shared.rq1_tasks import (
    IMPLICIT,
    SHARING,
    SYSTEMS,
    UNROLLED,
    WARM_IMPLICIT,
    WARM_UNROLLED,
    fingerprinted,
    problem_of,
)

SOURCE = "Bergstra & Bengio 2012; Pedregosa 2016; Franceschi et al. 2017; Dagréou 2022"
BLACK_BOXES = ("grid", "random", "TPE")
SHARE, WARMER, FEWER = 0.5, 1.5, 2.0  # claimed


def measure(cell: Row) -> Row:
    """One run at its chosen setting; of what cannot be, the reason."""
    task, method, seed = cell["task"], cell["method"], cell["seed"]
    system = SYSTEMS[task]
    data = {
        "data": system.data,
        "data_sha256": fingerprint(fingerprinted(problem_of(task, seed))),
    }
    if method in system.absent:
        return {"reason": system.absent[method]} | data
    chosen = tuned(task, method)
    row = run(task, method, seed, chosen["setting"])
    return row | chosen | flops_of(task, method, row) | data


# Judging.


def lane(rows: list[Row], task: str, method: str, name: str) -> np.ndarray:
    """A column by seed, NaN where a row has no number; empty where it cannot be."""
    mine = [
        r for r in rows
        if (r["task"], r["method"]) == (task, method) and not r.get("reason")
    ]  # fmt: skip
    mine.sort(key=lambda row: row["seed"])
    return np.array([row.get(name) for row in mine], float)


def needed(rows: list[Row], task: str, method: str) -> tuple[np.ndarray, int]:
    """Costs by seed, a bound where a run was never there, and how many were not."""
    cost, spent = (lane(rows, task, method, name) for name in ("cost", "spent"))
    return np.where(np.isnan(cost), spent, cost), int(np.sum(np.isnan(cost)))


def shares(rows: list[Row], task: str, method: str, part: str = "inner") -> np.ndarray:
    """Of a part in the total until there, or of all that was spent, by seed."""
    of = {name: lane(rows, task, method, name) for name in PARTS}
    return of[part] / sum(of.values())


def share(rows: list[Row], task: str, method: str, part: str = "inner") -> float:
    """Mean over seeds."""
    return float(np.mean(shares(rows, task, method, part)))


def tuning(rows: list[Row], task: str, method: str) -> float:
    """What choosing its rate cost, once; nothing where the row cannot be."""
    return float(lane(rows, task, method, "tuning_cost")[:1].sum())


def best_of(rows: list[Row], task: str) -> str:
    """The row with hypergradients that tuned best."""
    scores = {method: lane(rows, task, method, "score") for method in WAYS}
    return min((m for m in scores if scores[m].size), key=lambda m: scores[m][0])


def bottleneck(rows: list[Row]) -> Verdict:
    """Whether inner training is at least half of what *implicit* spends."""
    of = {task: shares(rows, task, IMPLICIT) for task in SYSTEMS}
    of = {task: by_seed for task, by_seed in of.items() if by_seed.size}
    task = min(of, key=lambda task: of[task].mean())
    mean, low, high = paired(of[task], 0.0)
    text = (
        f"(o) inner training is {mean:.0%} [{low:.0%}, {high:.0%}] of what {IMPLICIT} "
        f"spends where it is least, on {task}, at least {SHARE:.0%} claimed"
    )
    return conclude(text, mean >= SHARE, of[task].size, (high - low) / 2, SHARE)


def by_task(rows: list[Row]) -> list[Verdict]:
    """Inner training in each total: measured, of black boxes known from sizes."""
    lines = []
    for method in WAYS:
        of = [task for task in SYSTEMS if lane(rows, task, method, "spent").size]
        told = ", ".join(f"{task} {share(rows, task, method):.0%}" for task in of)
        lines.append(Verdict(f"inner training in what {method} spends: {told}"))
    told = ", ".join(
        f"{task} {np.mean([share(rows, task, box) for box in BLACK_BOXES]):.0%}"
        for task in SYSTEMS
    )
    known = "inner training in what grid, random and TPE spend, known from the sizes"
    return [*lines, Verdict(f"{known}: {told}")]


def over_tasks(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """By seed the geometric mean over tasks of the first over the second."""
    return np.exp(np.mean([np.log(first / second) for first, second in pairs], axis=0))


def ratio(what: str, by_seed: np.ndarray, least: float, lost: list[str]) -> Verdict:
    """Whether so many times fewer, on the mean over seeds; lost are never there."""
    text, claim = f"(o) {what}", f"at least {least:g} claimed"
    if lost:
        return Verdict(f"{text}: never there: {', '.join(lost)}: not reproduced")
    mean, low, high = paired_ratio(by_seed, 1.0)
    text += f": {mean:.3g} [{low:.3g}, {high:.3g}] times fewer, {claim}"
    met = bool(mean >= least and low > 1)
    return conclude(text, met, by_seed.size, math.log(high / mean), math.log(least))


def seeds_of(lost: dict[str, int]) -> list[str]:
    """Where runs were never there."""
    return [f"{name} on {number_of_seeds(n)}" for name, n in lost.items() if n]


def warmer(rows: list[Row], warm: str, cold: str) -> Verdict:
    """What a warm start saves where the cold one is there on every seed."""
    tasks = [
        task
        for task in SYSTEMS
        if lane(rows, task, warm, "spent").size and not needed(rows, task, cold)[1]
    ]
    what = f"{warm} against {cold}, on {', '.join(tasks) or 'no task'}"
    if not tasks:
        lost = [f"{cold} on every seed of any task"]
        return ratio(what, np.ones(0), WARMER, lost)
    lost = seeds_of({task: needed(rows, task, warm)[1] for task in tasks})
    by_seed = over_tasks(
        [(needed(rows, task, cold)[0], needed(rows, task, warm)[0]) for task in tasks]
    )
    return ratio(what, by_seed, WARMER, lost)


def against_random(rows: list[Row]) -> list[Verdict]:
    """What the best row with hypergradients saves, over all tasks.

    Once more with the tuning of every row among which it was chosen.
    """
    best = {task: best_of(rows, task) for task in SYSTEMS}
    lost = {f"{best[t]} ({t})": needed(rows, t, best[t])[1] for t in SYSTEMS}
    random = {task: needed(rows, task, "random")[0] for task in SYSTEMS}
    cost = {task: needed(rows, task, best[task])[0] for task in SYSTEMS}
    by_seed = over_tasks([(random[task], cost[task]) for task in SYSTEMS])
    bounds = [task for task in SYSTEMS if needed(rows, task, "random")[1]]
    what = "best with hypergradients against random, over all tasks"
    if bounds:
        what += f" (random is not always there: {', '.join(bounds)})"
    claim = ratio(what, by_seed, FEWER, seeds_of(lost))
    paid = {task: sum(tuning(rows, task, way) for way in WAYS) for task in SYSTEMS}
    more = over_tasks([(cost[task] + paid[task], random[task]) for task in SYSTEMS])
    mean, low, high = paired_ratio(more, 1.0)
    over = "> " if any(lost.values()) else ""
    text = (
        f"best with all the tuning that chose it needs {over}{mean:.3g} [{low:.3g}, "
        f"{high:.3g}] times what random needs, which has nothing to tune"
    )
    return [claim, Verdict(text)]


def winner(rows: list[Row], task: str) -> Verdict:
    """Who is first by the geometric mean, of those who are there on every seed."""
    there, unknown = {}, {}
    for method in METHODS:
        cost, censored = needed(rows, task, method)
        if cost.size:
            (unknown if censored else there)[method] = geometric_mean(cost)
    told = f"{best_of(rows, task)} tuned best with hypergradients"
    if not there:
        return Verdict(f"{task}: no method is there on every seed; {told}")
    order = sorted(there, key=lambda method: there[method])
    text = f"{task}: first is {order[0]}, {there[order[0]]:,.0f}"
    if order[1:]:
        text += f", then {order[1]}, {there[order[1]]:,.0f}"
    below = [method for method in unknown if unknown[method] < there[order[0]]]
    if below:
        text += f"; not told, as they ended below that: {', '.join(below)}"
    tuned = {method: there[method] + tuning(rows, task, method) for method in there}
    first = min(tuned, key=lambda method: tuned[method])
    return Verdict(
        f"{text}; with its tuning counted, {first}, {tuned[first]:,.0f}; {told}"
    )


def shared(rows: list[Row]) -> Verdict:
    """What one `w` for all candidates makes of random search."""
    tasks = [task for task in SYSTEMS if lane(rows, task, SHARING, "spent").size]
    never = [task for task in tasks if needed(rows, task, SHARING)[1]]
    both = [task for task in tasks if task not in never]
    text = f"{SHARING} against random"
    if both:
        pairs = [
            (needed(rows, t, "random")[0], needed(rows, t, SHARING)[0]) for t in both
        ]
        by_seed = over_tasks(pairs)
        mean, low, high = paired_ratio(by_seed, 1.0)
        text += (
            f": {mean:.3g} [{low:.3g}, {high:.3g}] times fewer gradient-equivalents on "
            f"{', '.join(both)}"
        )
    if never:
        text += f"; not there on every seed: {', '.join(never)}"
    return Verdict(text)


def edges(rows: list[Row]) -> Verdict:
    """Where the best rate may lie beyond those that were tried."""
    chosen = {
        f"{method} ({task})": (lane(rows, task, method, "setting")[0], way.rates)
        for task, system in SYSTEMS.items()
        for method, way in WAYS.items()
        if method not in system.absent
    }
    top = [name for name, (rate, rates) in chosen.items() if rate == max(rates)]
    low = [name for name, (rate, rates) in chosen.items() if rate == min(rates)]
    told = lambda names: f"{len(names)}: {', '.join(names) or 'none'}"
    return Verdict(
        f"of {len(chosen)} rates, at the upper end of those tried {told(top)}; at the "
        f"lower end {told(low)}"
    )


def judge(rows: list[Row]) -> list[Verdict]:
    """The claims, who is first where, and whether all operations have a price."""
    unknown = sorted({name for row in rows for name in row.get("unknown") or ()})
    flaws = [Verdict(f"no price for {', '.join(unknown)}", True)] if unknown else []
    return [
        *flaws,
        bottleneck(rows),
        *by_task(rows),
        warmer(rows, WARM_IMPLICIT, IMPLICIT),
        warmer(rows, WARM_UNROLLED, UNROLLED),
        *against_random(rows),
        *(winner(rows, task) for task in SYSTEMS),
        shared(rows),
        edges(rows),
    ]


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    lines = [
        f"# {table.name}",
        "",
        "scikit-learn digits (1,797 real 8x8 images) and wine (178 wines), and two "
        f"simulated systems; {len({row['seed'] for row in rows})} seeds, two "
        f"hyperparameters each, at most {TRAININGS} trainings a run. "
        f"Gradient-equivalents (grad-eq) until within {NEAR:.0%} of the way from the "
        f"start to the best of a grid of {GRID} by {GRID}, geometric mean and range; > "
        "where a run was never there and counts with what it spent. With tuning: and "
        "what choosing the rate cost, once. Inner, "
        "hypergradient and outer: parts of that. Left: of the way to the grid's best "
        "at the best evaluation, median, below zero where that is better than the "
        "grid's. Trusted: estimates that say so themselves. MFLOPs by the traced "
        "programs. CO2 is by assumption, not measured: "
        f"{OPERATIONS:.0e} operations a second, {WATTS:g} W, {GRAMS:g} g a "
        f"kilowatt-hour. Command: `{command}`",
    ]  # fmt: skip
    titles = (
        "method", "there", "grad-eq", "range", "with tuning", "inner", "hypergradient",
        "outer", "MFLOPs", "CO2 mg", "left", "evaluations", "rate", "trusted",
    )  # fmt: skip
    for task, system in SYSTEMS.items():
        lines += ["", f"**{task}** ({system.paradigm}; {system.data})", ""]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        for method in METHODS:
            if method in system.absent:
                blank = ["-"] * (len(titles) - 1)
                lines.append("| " + " | ".join([f"{method} (1)", *blank]) + " |")
            else:
                lines.append("| " + " | ".join(cells_of(rows, task, method)) + " |")
        if system.absent:
            told = "; ".join(f"{name}: {why}" for name, why in system.absent.items())
            lines += ["", f"(1) cannot be: {told}."]
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def cells_of(rows: list[Row], task: str, method: str) -> list[str]:
    """A line of the table."""
    column = lambda name: lane(rows, task, method, name)
    cost, censored = needed(rows, task, method)
    more, mean = "> " if censored else "", geometric_mean(cost)
    trusted = column("trusted").sum() / column("steps").sum()
    own = [f"{column('setting')[0]:g}", f"{trusted:.0%}"]
    return [
        method,
        f"{cost.size - censored} of {cost.size}",
        f"{more}{mean:,.0f}",
        f"{cost.min():,.0f} to {cost.max():,.0f}",
        f"{more}{mean + tuning(rows, task, method):,.0f}",
        *(f"{share(rows, task, method, part):.0%}" for part in PARTS),
        more + figures(column("flops").mean() / 1e6),
        more + figures(column("grams").mean() * 1e3),
        f"{np.median(column('left')):.1%}",
        f"{column('evaluations').mean():.0f}",
        *(own if method in WAYS else ["-", "-"]),
    ]


def figures(x: float) -> str:
    """Two at least."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def draw(rows: list[Row], path: Path) -> None:
    """Until there, by parts: a panel a task."""
    panels = {}
    for task in SYSTEMS:
        panels[task] = {}
        for method in METHODS:
            cost, censored = needed(rows, task, method)
            if cost.size:
                mean = geometric_mean(cost)
                parts = [mean * share(rows, task, method, part) for part in PARTS]
                panels[task][method + " >" * (censored > 0)] = parts
    plots.parts(panels, PARTS, path)


TABLE = Table(
    name="rq1",
    source=SOURCE,
    minutes=12,
    seeds=5,
    plan=lambda scale, seeds: [
        {"task": task, "method": method, "seed": seed}
        for task in SYSTEMS
        for method in METHODS
        for seed in range(seeds)
    ],
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
