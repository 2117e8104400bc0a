"""The table `search-grid`: what is tuned of each method of searching, by one rule."""

from pathlib import Path

import numpy as np

from hypergrad.studies import record
from hypergrad.studies.record import Row
from hypergrad.studies.study import DIGITS
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict

from .shared import plots
from .__main__ import RESULTS
from .shared.searching import (
    BUDGET,
    DESCENDING,
    METHODS,
    SIZES,
    SOURCE,
    cells,
    run,
    score,
    settings_of,
)

GRID_NAME = "search-grid"
TUNING_SEEDS = (100, 101)


def try_all(cell: Row) -> Row:
    """A method at each of its settings, on both seeds."""
    method, size = cell["method"], cell["size"]
    settings = settings_of(method)
    runs = [
        [run(method, seed, size, setting, BUDGET) for seed in TUNING_SEEDS]
        for setting in settings
    ]
    scores = [float(np.mean([score(row) for row in of])) for of in runs]
    return {
        "settings": list(settings),
        "scores": scores,
        "setting": settings[int(np.argmin(scores))],
        "tuning_cost": sum(row["spent"] for of in runs for row in of),
        "budget": BUDGET,
        "data": DIGITS,
    }


def read_grid(method: str, size: int) -> Row:
    """What the committed grid says of a method, if it was made with these settings."""
    path = RESULTS / f"{GRID_NAME}.jsonl"
    again = f"run python -m benchmarks {GRID_NAME}"
    rows = record.read(path) if path.exists() else []
    mine = [r for r in rows if (r["method"], r["size"]) == (method, size)]
    if not mine:
        raise ValueError(f"{path} has no row of {method} at {size}: {again}")
    asked = list(settings_of(method)), BUDGET
    if (mine[0]["settings"], mine[0]["budget"]) != asked:
        raise ValueError(f"{path} was made with other settings or budget: {again}")
    return mine[0]


def best_descending(size: int) -> str:
    """Of the methods with hypergradients the one that tuned best."""
    return min(DESCENDING, key=lambda method: min(read_grid(method, size)["scores"]))


def judge_grid(rows: list[Row]) -> list[Verdict]:
    """What a reader of the other table should know."""
    edge = [
        f"{row['method']} ({row['size']})"
        for row in rows
        if row["setting"] in (row["settings"][0], row["settings"][-1])
    ]
    text = f"{len(edge)} of {len(rows)} chose a setting at an edge of their three"
    return [Verdict(text + (f": {', '.join(edge)}" if edge else ""))]


def markdown_of_grid(table: Table, rows: list[Row], command: str) -> str:
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}; seeds {' and '.join(map(str, TUNING_SEEDS))}, at most {BUDGET:,} "
        "gradient-equivalents (grad-eq) a run. In brackets the mean of log cost until "
        "within 1%, beyond the budget by what is left; the least is chosen. Command: "
        f"`{command}`",
        "",
        "| hyperparameters | method | settings | chosen | tuning grad-eq |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        pairs = zip(row["settings"], row["scores"], strict=True)
        tried = ", ".join(f"{x:g} ({y:.2f})" for x, y in pairs)
        lines.append(
            f"| {row['size']} | {row['method']} | {tried} | {row['setting']:g} | "
            f"{row['tuning_cost']:,.0f} |"
        )
    return "\n".join([*lines, "", *(v.line for v in judge_grid(rows))])


def draw_grid(rows: list[Row], path: Path) -> None:
    """A panel a size: how well each setting does."""
    scores = {(row["size"], row["method"]): row["scores"] for row in rows}
    panels = {
        f"{size} hyperparameters": {
            method: scores.get((size, method), [np.nan]) for method in METHODS
        }
        for size in SIZES
    }
    plots.strips(panels, path, "score, a dot a setting: less is better", ())


GRID = Table(
    name=GRID_NAME,
    source=SOURCE,
    minutes=5,
    seeds=1,
    plan=lambda scale, seeds: cells([0]),
    run=cell_by_cell(try_all, markdown_of_grid, draw_grid),
    judge=judge_grid,
)
