"""The grid by which the single-loop methods are tuned.

Each method runs at every pair of a grid on two seeds that are not reported. The pair
whose worse run ends lowest is chosen.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from hypergrad.bench import Cell, Finding, Row, Stage

from .program import Program
from .single_loop import (
    DOUBLE_LOOP,
    METHODS,
    RANDOM_LENGTH,
    System,
    curve,
    paid_for,
    run,
    seed_key,
)

TUNING_SEEDS = (100, 101)
PROBE_STEPS = 128  # by which a step's cost is estimated: whole periods of SRBA, VRBO
LONG_PROBE_STEPS = 4096  # of methods with series of random length


def steps_for(
    budget: float,
    method: str,
    run: Callable[[int], Callable[..., hg.Trace]],
    args: tuple,
    slow_rates: tuple[float, float],
) -> int:
    """Returns the number of steps that the budget pays for, at the slowest rates.

    The double loop, which solves until it is close enough, has as many steps as the
    budget pays for at the cost of its dearest step. The others have as many as it pays
    for at their mean cost, but no more than their actual costs allow: a period has dear
    steps and cheap ones.
    """

    def costs(length: int) -> np.ndarray:
        probe = jax.jit(lambda *args: run(length)(*args).cost)
        return np.asarray(probe(*args, *map(jnp.float32, slow_rates)), float)

    is_random = method in RANDOM_LENGTH
    steps = np.diff(costs(LONG_PROBE_STEPS if is_random else PROBE_STEPS), prepend=0)
    if method == DOUBLE_LOOP:
        return max(1, int(budget / steps.max()))
    max_steps = max(1, int(budget / steps.mean()))
    if is_random:
        return max_steps
    return max(1, int(np.sum(paid_for(costs(max_steps), budget))))


def choose_rates(
    pairs: list[tuple[float, float]], values: list[list[float]], method: str
) -> Row:
    """Returns the pair whose worst run ends lowest, and the worst run of each pair.

    Args:
      pairs: Pairs of a rate and a ratio.
      values: Final values of the runs at each pair; NaN counts as infinite.
      method: Label of the method, for the error message.

    Raises:
      ValueError: At every pair a run has no final value.
    """
    worst = [float(np.max(np.nan_to_num(runs, nan=np.inf))) for runs in values]
    best = int(np.argmin(worst))
    if not np.isfinite(worst[best]):
        raise ValueError(
            f"at every pair of rates a run of {method} broke off; try slower ones"
        )
    rates, ratios = (list(column) for column in zip(*pairs, strict=True))
    row = {"rate": rates[best], "ratio": ratios[best]}
    return row | {"rates": rates, "ratios": ratios, "ends": worst}


def tune(system: System, cell: Cell, rows: list[Row]) -> Row:
    """Returns the rates of a method, chosen from every pair on the tuning seeds."""
    del rows
    method, pairs = cell["method"], system.pairs
    arrays = [system.prepare(seed) for seed in TUNING_SEEDS]
    probe = lambda steps: functools.partial(
        run, system, method, steps, 0, key=jax.random.key(0)
    )
    slow_rates = min(system.rates), min(system.ratios)
    steps = steps_for(system.budget, method, probe, (arrays[0],), slow_rates)
    run_pair = functools.partial(curve, system, method, steps, 1)
    program = Program(
        lambda arrays, key, rates, ratios: jax.lax.map(
            lambda pair: run_pair(arrays, pair[0], pair[1], key), (rates, ratios)
        )
    )
    columns = [jnp.asarray(x, jnp.float32) for x in zip(*pairs, strict=True)]
    results = [
        program(seed_arrays, seed_key(seed), *columns)
        for seed_arrays, seed in zip(arrays, TUNING_SEEDS, strict=True)
    ]
    values = [[float(x["curve"][i, -1]) for x in results] for i in range(len(pairs))]
    costs = (np.sum(x["gradient_equivalents"]) for x in results)
    return choose_rates(pairs, values, method) | {
        "num_steps": steps,
        "tuning_cost": float(sum(costs)),
        "data_name": system.data_name(),
        "run_seconds": program.run_seconds,
    }


def at_edge(row: Row) -> bool:
    """Returns True if an outermost rate or ratio is better than all within."""
    is_within = lambda x, tried: min(tried) < x < max(tried)
    pairs = zip(row["rates"], row["ratios"], row["ends"], strict=True)
    inner_values = [
        value
        for rate, ratio, value in pairs
        if value is not None
        and is_within(rate, row["rates"])
        and is_within(ratio, row["ratios"])
    ]
    return min(inner_values, default=math.inf) > lowest_value(row)


def lowest_value(row: Row) -> float:
    """Returns the final value at the chosen pair."""
    return min(x for x in row["ends"] if x is not None)


def edge_finding(rows: list[Row]) -> Finding:
    """Returns how many methods chose a rate at an edge of the grid."""
    labels = [row["method"] for row in rows if at_edge(row)]
    text = f"{len(labels)} of {len(rows)} methods chose a rate at an edge of the grid"
    return Finding(text + (f": {', '.join(labels)}" if labels else ""))


def tuning_body(system: System, rows: list[Row]) -> list[str]:
    """Returns the table of the chosen rates."""
    return [
        f"{rows[0]['data_name']}; seeds {' and '.join(map(str, TUNING_SEEDS))}. Of "
        f"every pair of a rate of w in {list(system.rates)} and a ratio, of the rate "
        f"of alpha to it, in {list(system.ratios)}, the one whose worse run ends "
        f"lowest, at its last step, after {system.budget:,.0f} gradient-equivalents "
        "(grad-eq) per run.",
        "",
        *rate_lines(rows, ("rate", "ratio", "end"), "{:.1e}"),
    ]


def rate_lines(rows: list[Row], titles: tuple[str, str, str], form: str) -> list[str]:
    """Returns the chosen rates of each method, their final value and their cost."""
    header = "method", *titles, "steps", "tuning grad-eq"
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        best = form.format(lowest_value(row))
        lines.append(
            f"| {row['method']} | {row['rate']:g} | {row['ratio']:g} | {best} | "
            f"{row['num_steps']} | {row['tuning_cost']:,.0f} |"
        )
    return [*lines, "", edge_finding(rows).markdown]


def tuning_stage(system: System) -> Stage:
    """Returns the stage that chooses the rates; its seeds are not those reported."""
    return Stage(
        "tuning",
        lambda scale, seeds: [{"method": method, "seed": 0} for method in METHODS],
        functools.partial(tune, system),
        functools.partial(tuning_body, system),
    )
