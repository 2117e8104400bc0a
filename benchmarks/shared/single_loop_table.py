"""The table of the single-loop family on one system: one budget, medians.

Every method at the rates that `single_loop_grid` chose, on the reported seeds, and what
is claimed of them. See README.md.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies.program import Program
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, geometric_mean, paired_ratio

from . import plots
from .single_loop import (
    DOUBLE_LOOP,
    DRAWN,
    METHODS,
    SEARCH,
    TOTAL,
    System,
    curve,
    paid_for,
    run,
    seed_key,
    whole,
)
from .single_loop_grid import TUNING_SEEDS, grid_name, grid_of

TAIL = 0.1  # of its cost: the geometric mean over it is where a run ends
FALL = 10.0  # times below its first evaluation: less is no plateau to arrive at
SLACK = 1.05  # of the budget: a run that costs more is refused
REPEATS = 5  # calls of which the seconds are the median
QUARTILES = (0.25, 0.5, 0.75)

# Measuring.


def end(values: Any, cost: Any) -> float:
    """Geometric mean of the evaluations in the last tenth of what was spent.

    Infinite where a run broke off, or nothing was paid for.
    """
    values, cost = np.asarray(values, float), np.asarray(cost, float)
    if not values.size or not np.isfinite(values[-1]):
        return np.inf
    last = values[cost >= (1 - TAIL) * cost[-1]]
    return geometric_mean(np.maximum(last, 1e-30))


def within_budget(name: str, cost: float, budget: float) -> None:
    """Refuses a run that spent more."""
    if cost > SLACK * budget:
        raise ValueError(f"a run of {name} cost {cost:.0f}, its budget is {budget:.0f}")


@functools.cache
def program(system: System, method: str, steps: int) -> Program:
    """`curve`, compiled once a method."""
    return Program(functools.partial(curve, system, method, steps, system.points))


@functools.cache
def bare(system: System, method: str, steps: int) -> Program:
    """The same run with no evaluation: what it takes."""
    return Program(lambda *given: run(system, method, steps, 0, *given).alpha)


def measure(system: System, cell: Row) -> Row:
    """One seed at the chosen rates."""
    method, seed = cell["method"], cell["seed"]
    arrays = system.prepare(seed)
    about = {"data": system.about(), "data_sha256": fingerprint(named(arrays))}
    if method in (SEARCH, TOTAL):
        budget = system.budget
        if method == TOTAL:
            budget *= 1 + len(TUNING_SEEDS) * len(system.pairs)
        return by_random_search(system, budget, arrays, seed_key(seed)) | about
    settings = grid_of(system, method)
    steps = settings["num_steps"]
    rates = (jnp.float32(settings[name]) for name in ("rate", "ratio"))
    given = arrays, *rates, seed_key(seed)
    found = program(system, method, steps)(*given)
    found = {name: np.asarray(x, float) for name, x in found.items()}
    if method not in DRAWN:
        within_budget(method, float(found["gradient_equivalents"]), system.budget)
    # A series of random length may cost more than its mean: what is beyond is left out.
    paid = np.cumsum(paid_for(found["curve_cost"], system.budget)) - 1
    found |= {name: found[name][paid] for name in ("curve", "curve_cost")}
    timed = bare(system, method, steps)
    if timed.compiled is None:
        timed(*given)  # so that seconds are those of a warm program
    seconds = []
    for _ in range(REPEATS):
        before = timed.run_seconds
        timed(*given)
        seconds.append(timed.run_seconds - before)
    return {
        "end": end(found["curve"], found["curve_cost"]),
        "run_seconds": float(np.median(seconds)),
        "compile_seconds": timed.compile_seconds,
        **{name: settings[name] for name in ("rate", "ratio", "num_steps")},
        "tuning_cost": settings["tuning_cost"],
        **{name: x.tolist() for name, x in found.items()},
        "gradient_equivalents": float(found["curve_cost"][-1]),
        **about,
    }


def by_random_search(system: System, budget: float, arrays: PyTree, key: Array) -> Row:
    """The start, then uniform in the box; each is trained by Newton's method.

    Its curve is that of the best so far, by the outer value, at the same costs for
    every seed; NaN before the start is paid for.
    """
    problem, w, alpha, suboptimality = system.draw(arrays)
    trace = hg.search(
        whole(problem),
        hg.Newton(tolerance=1e-2),
        FromStart(alpha),
        w,
        space=hg.spaces.Interval(system.low, system.high, shape=alpha.shape),
        budget=budget,
        key=key,
        metrics={"suboptimality": suboptimality},
    )
    values, cost = np.asarray(trace.value, float), np.asarray(trace.cost, float)
    lowest = [int(np.argmin(values[: i + 1])) for i in range(len(values))]
    best = np.asarray(trace.metrics["suboptimality"], float)[lowest]
    ticks = budget * np.arange(1, system.points + 1) / system.points
    paid = np.searchsorted(cost, ticks, side="right")
    total = lambda name: float(np.sum(trace.stats[name]))
    curve = np.where(paid > 0, best[np.maximum(paid, 1) - 1], np.nan)
    return {
        "end": float(curve[-1]) if paid[-1] else np.inf,
        "curve": curve.tolist(),
        "curve_cost": ticks.tolist(),
        "gradient_equivalents": float(cost[-1]),
        "num_grads": total("num_grads"),
        "num_hvps": total("num_hvps"),
        "num_steps": len(values),
    }


class FromStart(eqx.Module):
    """Random search that tries the start first."""

    alpha: PyTree

    def init(self, space: PyTree, key: Array) -> PyTree:
        """The space, and that nothing was tried."""
        del key
        return space, True

    def ask(self, state: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        """The start, then a draw."""
        space, first = state
        alpha = self.alpha if first else hg.spaces.sample(space, key)
        return alpha, (space, False)

    def tell(self, state: PyTree, alpha: PyTree, value: Array) -> PyTree:
        """Learns nothing."""
        del alpha, value
        return state


def named(arrays: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


# Judging.


def lane(rows: list[Row], method: str) -> np.ndarray:
    """Where each seed ended; infinite where a run broke off."""
    mine = [row for row in rows if row["method"] == method]
    mine.sort(key=lambda row: row["seed"])
    return np.array([np.inf if row["end"] is None else row["end"] for row in mine])


def lower_end(
    rows: list[Row], first: str, second: str, least: float | None = None, mark: str = ""
) -> Verdict:
    """How many times lower the one ends than the other: geometric mean over seeds.

    A claim without a mark is no hypothesis: it must be reproduced.
    """
    ours, theirs = lane(rows, first), lane(rows, second)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        text = f"{mark}{first} against {second}: not every run came to its end"
        if least is None:
            return Verdict(text)
        return Verdict(f"{text}: not reproduced", failed=not mark)
    mean, low, high = paired_ratio(theirs, ours)
    text = (
        f"{mark}{first} ends {mean:.3g} [{low:.3g}, {high:.3g}] times lower than "
        f"{second}, at equal cost"
    )
    if least is None:
        return Verdict(text)
    met = bool(low >= least)
    told = math.log(least) if least > 1 else math.inf
    verdict = conclude(
        *(f"{text}, at least {least:g} claimed", met, ours.size),
        *(math.log(high / mean), told),
    )
    return verdict._replace(failed=verdict.failed or not (met or mark))


def to_plateau(row: Row) -> float:
    """Cost at which a run first was within twice of where it ended.

    Infinite for a run that broke off, or did not fall: it is at no plateau.
    """
    values = np.array([np.inf if x is None else x for x in row["curve"]])
    first = values[0]
    if row["end"] is None or not row["end"] * FALL <= first < np.inf:
        return np.inf
    return row["curve_cost"][int(np.argmax(values <= 2 * row["end"]))]


def median_to_plateau(rows: list[Row], method: str) -> float:
    return float(np.median([to_plateau(r) for r in rows if r["method"] == method]))


def first_there(rows: list[Row], method: str) -> Verdict:
    """(o) whether a method's cost to its own plateau is the least, by medians."""
    stochastic = {r["method"] for r in rows} - {DOUBLE_LOOP, SEARCH, TOTAL}
    cost = {name: median_to_plateau(rows, name) for name in sorted(stochastic)}
    first = min(cost, key=lambda name: cost[name])
    met = cost[method] <= cost[first] < np.inf
    text = (
        f"(o) {method} is first at its plateau (within twice of its end, "
        f"{FALL:g} times below its start): after {cost[method]:.0f} "
        f"gradient-equivalents; the first, {first}, after {cost[first]:.0f}"
    )
    return conclude(text, met, len(lane(rows, method)), 0.0, np.inf)


# Showing.


def markdown(
    system: System, judge: Callable[[list[Row]], list[Verdict]],
    table: Table, rows: list[Row], command: str,
) -> str:  # fmt: skip
    """Medians and quartiles over seeds."""
    lines = [
        f"# {table.name}",
        "",
        f"{rows[0]['data']}; {len({row['seed'] for row in rows})} seeds. End: median "
        f"[quartiles] of h(alpha) - h* at the end of at most {system.budget:,.0f} "
        "gradient-equivalents (grad-eq); plateau: median cost to come within twice of "
        f"it, where it is {FALL:g} times below the start. A product (HVP) yields the "
        "inner gradient too, which is not counted again. A run that broke off is "
        "infinite. Milliseconds are of a warm program that evaluates nothing. Rates of "
        "w, and of alpha over that of w, are from "
        f"[{grid_name(system)}]({grid_name(system)}.md). Source: {table.source}. "
        f"Command: `{command}`",
        "",
        "| method | end | plateau | grad-eq | gradients | HVPs | steps | rate | ratio "
        "| tuning grad-eq | compile s | run ms |",
        "|" + "---|" * 12,
    ]
    for method in (*METHODS, SEARCH, TOTAL):
        mine = [row for row in rows if row["method"] == method]
        if mine:
            lines.append("| " + " | ".join(cells_of(method, mine)) + " |")
    lines += ["", *(v.line for v in judge(rows))]
    return "\n".join(lines)


def cells_of(method: str, mine: list[Row]) -> list[str]:
    """A line of the table."""
    ends = lane(mine, method)
    finite = np.where(np.isfinite(ends), ends, 1e300)
    quartiles = np.quantile(finite, QUARTILES)
    low, middle, high = ("-" if x > 1e200 else f"{x:.1e}" for x in quartiles)
    broken = int(np.sum(~np.isfinite(ends)))
    mark = f", {broken} broke off" if broken else ""
    plateau = median_to_plateau(mine, method)

    def mean(name: str, form: str, scale: float = 1.0) -> str:
        values = [row[name] for row in mine if row.get(name) is not None]
        return form.format(scale * np.mean(values)) if values else "-"

    return [
        method,
        f"{middle} [{low}, {high}]{mark}",
        f"{plateau:.0f}" if np.isfinite(plateau) else "-",
        mean("gradient_equivalents", "{:.0f}"),
        mean("num_grads", "{:.0f}"),
        mean("num_hvps", "{:.0f}"),
        mean("num_steps", "{:.0f}"),
        mean("rate", "{:g}"),
        mean("ratio", "{:g}"),
        mean("tuning_cost", "{:,.0f}"),
        mean("compile_seconds", "{:.1f}"),
        mean("run_seconds", "{:.1f}", 1e3),
    ]


def draw(system: System, rows: list[Row], path: Path) -> None:
    """Suboptimality against cost and against seconds: medians and quartiles."""
    lanes = {
        method: [row for row in rows if row["method"] == method]
        for method in (*METHODS, SEARCH)
    }
    there = {method: mine for method, mine in lanes.items() if mine}
    plots.medians(there, path, f"{system.name}: {rows[0]['data']}")


def table(system: System, judge: Callable[[list[Row]], list[Verdict]]) -> Table:
    """The table of a system's reported seeds."""
    return Table(
        name=system.name,
        source=system.source,
        minutes=system.minutes,
        seeds=10,
        plan=lambda scale, seeds: [
            {"method": method, "seed": seed}
            for method in (*METHODS, SEARCH, TOTAL)
            for seed in range(seeds)
        ],
        run=cell_by_cell(
            functools.partial(measure, system),
            functools.partial(markdown, system, judge),
            functools.partial(draw, system),
        ),
        judge=judge,
    )
