"""The table `rq4-grid`: the rate and penalty that the inner training of `rq4` has.

For an objective the pair with the least validation loss, on average over networks and
over two seeds that are not reported, where magnitudes are set by hand. See README.md.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies.program import program
from hypergrad.studies.record import Row
from hypergrad.studies.study import DIGITS
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict

from .shared import plots
from .rq4 import INNER_RATE, TRAINING
from .shared.rq4_tasks import (
    ARCHITECTURES,
    FIXED,
    OBJECTIVES,
    PENALTY,
    data_of,
    problem_of,
    start,
)

TUNING_SEEDS = (100, 101)
RATES, PENALTIES = (0.01, 0.03, 0.1, 0.3), (1e-3, 3e-3, 1e-2, 3e-2)
PAIRS = list(itertools.product(RATES, PENALTIES))


def end(
    architecture: str, objective: str, data: PyTree, w: PyTree, pair: Array
) -> Array:
    """The validation loss after the training that every row ends in."""
    rate, penalty = pair
    train, val = data
    problem = problem_of(architecture, objective, train | {"penalty": penalty}, val)
    solver = hg.Descent(optax.sgd(rate, momentum=0.9), TRAINING)
    alpha = jnp.asarray(FIXED)
    w, _ = solver.solve(
        problem.inner_loss, w, alpha, problem.inner_data, jax.random.key(0)
    )
    return problem.outer_value(w, alpha, problem.outer_data)


def try_all(cell: Row) -> Row:
    """An objective at every pair; what diverges is as bad as can be."""
    objective = cell["method"]
    with jax.enable_x64(True):
        ends = [
            [
                float(
                    program(end, architecture, objective)(
                        data_of(objective, seed)[:2],
                        start(architecture, objective, seed),
                        jnp.asarray(pair),
                    )
                )
                for architecture in ARCHITECTURES
                for seed in TUNING_SEEDS
            ]
            for pair in PAIRS
        ]
    means = np.nan_to_num(np.mean(ends, axis=1), nan=np.inf)
    rate, penalty = PAIRS[int(np.argmin(means))]
    told = [float(mean) if np.isfinite(mean) else None for mean in means]
    return {"rate": rate, "penalty": penalty, "ends": told, "data": DIGITS}


def judge(rows: list[Row]) -> list[Verdict]:
    """Whether `rq4` has what was chosen, and what is at an edge of what was tried."""
    verdicts = []
    for row in rows:
        objective, pair = row["method"], (row["rate"], row["penalty"])
        used = INNER_RATE[objective], PENALTY[objective]
        text = f"{objective}: rq4 trains by rate {used[0]:g} with penalty {used[1]:g}"
        other = used != pair
        verdicts.append(Verdict(text + ", not as chosen" * other, other))
        for what, x, tried in zip(
            ("rate", "penalty"), pair, (RATES, PENALTIES), strict=True
        ):
            if x in (min(tried), max(tried)):
                verdicts.append(Verdict(f"{objective}: the {what} is at an edge"))
    return verdicts


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """Every pair, and the chosen one."""
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}; seeds {' and '.join(map(str, TUNING_SEEDS))}. Validation loss "
        f"after {TRAINING:,} steps with magnitudes set by hand, mean over "
        f"{len(ARCHITECTURES)} networks and both seeds, by rate and penalty; the "
        f"least is chosen; - diverges. Command: `{command}`",
        "",
        "| objective | penalty | " + " | ".join(f"rate {x:g}" for x in RATES) + " |",
        "|---" * (2 + len(RATES)) + "|",
    ]
    for row in rows:
        ends = dict(zip(PAIRS, row["ends"], strict=True))
        for penalty in PENALTIES:
            cells = []
            for rate in RATES:
                x = ends[rate, penalty]
                best = (rate, penalty) == (row["rate"], row["penalty"])
                cell = "-" if x is None else f"{x:.4f}"
                cells.append(f"**{cell}**" if best else cell)
            names = row["method"], f"{penalty:g}"
            lines.append("| " + " | ".join([*names, *cells]) + " |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def draw(rows: list[Row], path: Path) -> None:
    """How well each pair does."""
    panels = {
        row["method"]: {
            f"penalty {penalty:g}": [
                x
                for (_, its), x in zip(PAIRS, row["ends"], strict=True)
                if its == penalty and x is not None
            ]
            for penalty in PENALTIES
        }
        for row in rows
    }
    plots.strips(panels, path, "validation loss, a dot a rate: less is better", ())


TABLE = Table(
    name="rq4-grid",
    source="this project",
    minutes=10,
    seeds=1,
    plan=lambda scale, seeds: [{"method": name, "seed": 0} for name in OBJECTIVES],
    run=cell_by_cell(try_all, markdown, draw),
    judge=judge,
)
