"""The table `search`: each method at its setting, and how its rows are judged."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.study import DIGITS, digits
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, geometric_mean, paired_ratio

from .shared import plots
from .shared.searching import (
    BUDGET,
    CLASSES,
    DESCENDING,
    ENDS,
    METHODS,
    NEAR,
    NUM_TRAIN,
    NUM_VAL,
    PIXELS,
    SCORED,
    SEARCHING,
    SIZES,
    SOURCE,
    START,
    WRONG,
    arrays,
    cells,
    known,
    run,
)
from .searching_grid import GRID_NAME, best_descending, read_grid

TIMES = {2: 20, 20: 20, 500: 60}  # of the best row with hypergradients: a black box's
ENOUGH, LARGE = 50.0, 500


def budget_of(method: str, seed: int, size: int) -> tuple[float, float | None]:
    """A run's budget, and what the best with hypergradients needed; None if never."""
    best = best_descending(size)
    setting = read_grid(best, size)["setting"]
    need = run(best, seed, size, setting, BUDGET)["cost"]
    if method in DESCENDING:
        return BUDGET, need
    return TIMES[size] * (BUDGET if need is None else need), need


def measure(cell: Row) -> Row:
    """One run at its chosen setting, and the test digits by its last ``alpha``."""
    method, seed, size = cell["method"], cell["seed"], cell["size"]
    of = known(seed, size)
    if method in ENDS:
        alpha = of.alpha if method == ENDS[1] else np.full(size, START)
        row: Row = {"cost": None, "left": 0.0 if method == ENDS[1] else 1.0}
    else:
        setting = read_grid(method, size)["setting"]
        budget, need = budget_of(method, seed, size)
        row = run(method, seed, size, setting, budget) | {
            "setting": setting, "budget": budget, "best_cost": need,
            "best": best_descending(size),
            "tuning_cost": read_grid(method, size)["tuning_cost"],
        }  # fmt: skip
        alpha = np.array(row.pop("alpha"))
    parts = arrays(seed)
    zero, key = jnp.zeros((PIXELS, CLASSES)), jax.random.key(0)
    given = zero, jnp.asarray(alpha, jnp.float32), key
    test_loss, test_error = SCORED(parts["train"], parts["test"], *given)
    exact, _ = SCORED(parts["train"], parts["val"], *given)
    return row | {
        "start": of.start, "target": of.target, "end": float(exact),
        "test_loss": float(test_loss), "test_error": float(test_error),
        "data": DIGITS, "data_sha256": fingerprint(digits()),
    }  # fmt: skip


# Judging.


def lane(rows: list[Row], method: str, size: int, name: str) -> np.ndarray:
    """A column by seed; NaN where a row has no number."""
    mine = [r for r in rows if (r["method"], r["size"]) == (method, size)]
    mine.sort(key=lambda row: row["seed"])
    return np.array([row.get(name) for row in mine], float)


def needed(rows: list[Row], method: str, size: int) -> tuple[np.ndarray, int]:
    """Costs by seed, a bound where a run was never there, and how many were not."""
    cost, spent = (lane(rows, method, size, name) for name in ("cost", "spent"))
    return np.where(np.isnan(cost), spent, cost), int(np.sum(np.isnan(cost)))


def never(count: int, seeds: int) -> str:
    """What is to be said of runs that count with their bounds."""
    return f" at least, never there on {count} of {seeds} seeds" if count else ""


def against(rows: list[Row], method: str, best: str, size: int) -> Verdict:
    """How many times the cost of the best with hypergradients a black box needs."""
    (theirs, censored), (ours, lost) = (needed(rows, m, size) for m in (method, best))
    claimed = size == LARGE and SEARCHING[method].most[size] == math.inf
    mark = "(o) " if claimed else ""
    what = f"{mark}{size} hyperparameters, {method} against {best}"
    if lost:
        text = f"{what}: {best} is never there on {lost} of {ours.size} seeds"
        return Verdict(f"{text}: not reproduced" if claimed else text)
    mean, low, high = paired_ratio(theirs, ours)
    text = (
        f"{what}: {mean:.3g} [{low:.3g}, {high:.3g}] times as many "
        f"gradient-equivalents{never(censored, ours.size)}"
    )
    if not claimed:
        return Verdict(text)
    text += f", at least {ENOUGH:g} claimed"
    half = math.log(high / mean)
    return conclude(text, bool(low >= ENOUGH), ours.size, half, math.log(ENOUGH))


def winner(rows: list[Row], size: int) -> Verdict:
    """Who is first by the geometric mean, of those who are there on every seed."""
    there, unknown = {}, []
    for method in (m for m in METHODS if lane(rows, m, size, "left").size):
        cost, censored = needed(rows, method, size)
        mean = geometric_mean(cost)
        if censored:
            unknown.append((method, mean))
        else:
            there[method] = mean
    if not there:
        return Verdict(f"{size} hyperparameters: no method is there on every seed")
    order = sorted(there, key=lambda method: there[method])
    text = f"{size} hyperparameters: first is {order[0]}, {there[order[0]]:.0f}"
    if order[1:]:
        text += f", then {order[1]}, {there[order[1]]:.0f}"
    open_ = [method for method, bound in unknown if bound < there[order[0]]]
    if open_:
        text += f"; not told, as they ended below that: {', '.join(open_)}"
    return Verdict(f"{text} gradient-equivalents")


def judge(rows: list[Row]) -> list[Verdict]:
    """Who wins at each size, and what black boxes need against the best."""
    verdicts = []
    for size in SIZES:
        best = next(r["best"] for r in rows if r["size"] == size and r.get("best"))
        verdicts.append(winner(rows, size))
        verdicts += [
            against(rows, method, best, size)
            for method in SEARCHING
            if lane(rows, method, size, "left").size
        ]
    return verdicts


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}: {NUM_TRAIN} to train, {WRONG:.0%} of the labels wrong, {NUM_VAL} "
        f"to validate; {seeds} seeds. Gradient-equivalents (grad-eq) until within "
        f"{NEAR:.0%} of L-BFGS, geometric mean and range; > where a run was never "
        "there and counts with what it spent. Left: of the way to L-BFGS at the best "
        "evaluation, median. Test loss and error of a run's last alpha, means. "
        f"Settings are from [{GRID_NAME}]({GRID_NAME}.md). Command: `{command}`",
    ]
    titles = (
        "method", "there", "grad-eq", "range", "left", "test loss", "test error",
        "evaluations", "setting", "tuning grad-eq",
    )  # fmt: skip
    for size in SIZES:
        lines += ["", f"**{size} hyperparameters**", ""]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        for method in (*ENDS, *METHODS):
            if lane(rows, method, size, "left").size:
                lines.append("| " + " | ".join(cells_of(rows, method, size)) + " |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def cells_of(rows: list[Row], method: str, size: int) -> list[str]:
    """A line of the table."""
    column = lambda name: lane(rows, method, size, name)
    cost, censored = needed(rows, method, size)
    more = "> " if censored else ""
    tests = [f"{column('test_loss').mean():.3f}", f"{column('test_error').mean():.1%}"]
    left = f"{np.median(column('left')):.1%}"
    if method in ENDS:
        return [method, "-", "-", "-", left, *tests, "-", "-", "-"]
    return [
        method,
        f"{cost.size - censored} of {cost.size}",
        f"{more}{geometric_mean(cost):,.0f}",
        f"{cost.min():,.0f} to {cost.max():,.0f}",
        left,
        *tests,
        f"{column('evaluations').mean():.0f}",
        f"{column('setting')[0]:g}",
        f"{column('tuning_cost')[0]:,.0f}",
    ]


def draw(rows: list[Row], path: Path) -> None:
    """What is left of the way against what was spent: a panel a size."""
    panels = {
        f"{size} hyperparameters": {
            method: [
                (row["curve_cost"], row["curve"])
                for row in rows
                if (row["method"], row["size"]) == (method, size)
            ]
            for method in METHODS
            if lane(rows, method, size, "left").size
        }
        for size in SIZES
    }
    plots.remaining(panels, tuple(SEARCHING), NEAR, path)


TABLE = Table(
    name="search",
    source=SOURCE,
    minutes=15,
    seeds=5,
    plan=lambda scale, seeds: cells(range(seeds), ends=True),
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
