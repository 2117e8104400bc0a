"""How the single-loop family comes by its rates.

Each method runs at every pair of a grid on two seeds that are not reported, and goes on
with the pair whose worse run ends lowest. See README.md.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad.studies import record
from hypergrad.studies.program import Program
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict

from . import plots
from .__main__ import RESULTS
from .single_loop import (
    DOUBLE_LOOP,
    DRAWN,
    METHODS,
    System,
    curve,
    paid_for,
    run,
    seed_key,
)

TUNING_SEEDS = (100, 101)
PROBE = 128  # steps that tell what one costs: whole periods of SRBA and VRBO
LONG_PROBE = 4096  # of those that draw how long a series is


def steps_for(
    budget: float,
    method: str,
    run: Callable[[int], Callable[..., hg.Trace]],
    given: tuple,
    slow: tuple[float, float],
) -> int:
    """As many as the budget pays for, by what some cost at the slowest rates.

    By the dearest of the double loop, which solves until it is close enough; else by
    their mean, and no more than the budget is then found to pay for: a period has dear
    steps and cheap ones.
    """

    def costs(length: int) -> np.ndarray:
        probe = jax.jit(lambda *given: run(length)(*given).cost)
        return np.asarray(probe(*given, *map(jnp.float32, slow)), float)

    steps = np.diff(costs(LONG_PROBE if method in DRAWN else PROBE), prepend=0)
    if method == DOUBLE_LOOP:
        return max(1, int(budget / steps.max()))
    most = max(1, int(budget / steps.mean()))
    if method in DRAWN:
        return most
    return max(1, int(np.sum(paid_for(costs(most), budget))))


def chosen(pairs: list[tuple[float, float]], ends: list[list[float]], name: str) -> Row:
    """The pair whose worst run ends lowest; NaN is as bad as can be.

    Args:
      ends: a list of runs for each pair.
    """
    worst = [float(np.max(np.nan_to_num(of, nan=np.inf))) for of in ends]
    best = int(np.argmin(worst))
    if not np.isfinite(worst[best]):
        raise ValueError(f"no pair of rates brought {name} to an end; try slower ones")
    rates, ratios = (list(each) for each in zip(*pairs, strict=True))
    found = {"rate": rates[best], "ratio": ratios[best]}
    return found | {"rates": rates, "ratios": ratios, "ends": worst}


def try_all(system: System, cell: Row) -> Row:
    """A method at every pair of rates, on each seed, one after the other."""
    method, pairs = cell["method"], system.pairs
    arrays = [system.prepare(seed) for seed in TUNING_SEEDS]
    probe = lambda steps: functools.partial(
        run, system, method, steps, 0, key=jax.random.key(0)
    )
    slow = min(system.rates), min(system.ratios)
    steps = steps_for(system.budget, method, probe, (arrays[0],), slow)
    one = functools.partial(curve, system, method, steps, 1)
    tries = Program(
        lambda arrays, key, rates, ratios: jax.lax.map(
            lambda pair: one(arrays, *pair, key), (rates, ratios)
        )
    )
    lanes = [jnp.asarray(each, jnp.float32) for each in zip(*pairs, strict=True)]
    found = [
        tries(each, seed_key(seed), *lanes)
        for each, seed in zip(arrays, TUNING_SEEDS, strict=True)
    ]
    ends = [[float(of["curve"][i, -1]) for of in found] for i in range(len(pairs))]
    return chosen(pairs, ends, method) | {
        "num_steps": steps,
        "budget": system.budget,
        "tuning_cost": float(sum(np.sum(of["gradient_equivalents"]) for of in found)),
        "data": system.about(),
        "run_seconds": tries.run_seconds,
    }


def grid_name(system: System) -> str:
    return f"{system.name}-grid"


def read_grid(
    name: str, method: str, about: str, budget: float, *grids: list[tuple[float, float]]
) -> Row:
    """What the committed grid says of a method, if it is one of those asked for."""
    path = RESULTS / f"{name}.jsonl"
    again = f"run python -m benchmarks {name}"
    if not path.exists():
        raise ValueError(f"{path} is missing: {again}")
    rows = {row["method"]: row for row in record.read(path)}
    if method not in rows:
        raise ValueError(f"{path} has no row of {method}: {again}")
    row = rows[method]
    tried = list(zip(row["rates"], row["ratios"], strict=True))
    for what, there, asked in (
        ("data", row["data"], [about]),
        ("budget", row["budget"], [budget]),
        ("pairs of rates", tried, grids),
    ):
        if there not in asked:
            raise ValueError(
                f"{path} was made with the {what} {there}, not with {asked[0]}: move "
                f"it away and {again}"
            )
    return row


def grid_of(system: System, method: str) -> Row:
    """What the system's grid says of a method."""
    return read_grid(
        grid_name(system), method, system.about(), system.budget, system.pairs
    )


def at_edge(row: Row) -> bool:
    """Whether the best rate or ratio is an outermost one, and none within as good."""
    within = lambda x, tried: min(tried) < x < max(tried)
    pairs = zip(row["rates"], row["ratios"], row["ends"], strict=True)
    inner = [
        end
        for rate, ratio, end in pairs
        if end is not None
        and within(rate, row["rates"])
        and within(ratio, row["ratios"])
    ]
    return min(inner, default=math.inf) > min(x for x in row["ends"] if x is not None)


def judge_grid(rows: list[Row]) -> list[Verdict]:
    """What a reader of the other table should know."""
    edge = [row["method"] for row in rows if at_edge(row)]
    text = f"{len(edge)} of {len(rows)} methods chose a rate at an edge of the grid"
    return [Verdict(text + (f": {', '.join(edge)}" if edge else ""))]


def markdown_of_grid(system: System, table: Table, rows: list[Row], command) -> str:
    """The chosen rates."""
    lines = [
        f"# {table.name}",
        "",
        f"{rows[0]['data']}; seeds {' and '.join(map(str, TUNING_SEEDS))}. Of every "
        f"pair of a rate of w in {list(system.rates)} and a ratio, of the rate of "
        f"alpha to it, in {list(system.ratios)} the one whose worse run ends lowest, "
        f"at its last step, after {system.budget:,.0f} gradient-equivalents (grad-eq) "
        f"a run. Command: `{command}`",
        "",
        *rates_chosen(rows, ("rate", "ratio", "end"), "{:.1e}"),
    ]
    return "\n".join(lines)


def rates_chosen(rows: list[Row], titles: tuple[str, str, str], form: str) -> list[str]:
    """Lines of a grid's table: what each method goes on with, and what that cost."""
    titles = "method", *titles, "steps", "tuning grad-eq"
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in rows:
        best = form.format(min(x for x in row["ends"] if x is not None))
        lines.append(
            f"| {row['method']} | {row['rate']:g} | {row['ratio']:g} | {best} | "
            f"{row['num_steps']} | {row['tuning_cost']:,.0f} |"
        )
    return [*lines, "", *(v.line for v in judge_grid(rows))]


def grid(system: System) -> Table:
    """The table that chooses rates."""
    return Table(
        name=grid_name(system),
        source=system.source,
        minutes=system.minutes,
        seeds=1,
        plan=lambda scale, seeds: [{"method": method, "seed": 0} for method in METHODS],
        run=cell_by_cell(
            functools.partial(try_all, system),
            functools.partial(markdown_of_grid, system),
            lambda rows, path: plots.heatmaps(
                *(rows, path, grid_name(system)), "rate of alpha over that of w"
            ),
        ),
        judge=judge_grid,
    )
