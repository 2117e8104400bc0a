"""The table of the single-loop methods on one system: equal budgets, medians.

In the first stage the rates of each method are chosen from a grid, on two seeds that
are not reported; then every method runs with them on the reported seeds.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import (
    Cell,
    Finding,
    MeasurementTable,
    Row,
    Stage,
    geometric_mean,
    ratio_interval,
    select,
)
from hypergrad.bench.report import markdown_table

from . import plots
from .outcomes import conclude
from .program import Program
from .row_columns import QUARTILES, column, mean_text
from .single_loop import (
    DOUBLE_LOOP,
    METHODS,
    RANDOM_LENGTH,
    SEARCH,
    TOTAL,
    System,
    curve,
    paid_for,
    run,
    seed_key,
    without_batches,
)
from .single_loop_rates import (
    choose_pair,
    count_affordable_steps,
    rate_table,
)
from .tuning import TUNING_SEEDS, cells_of

TAIL = 0.1  # fraction of the cost over whose geometric mean a run ends
MIN_FALL = (
    10.0  # times below the first evaluation; a run that falls less has no plateau
)
MAX_OVERRUN = 1.05  # cost of a run over its budget
REPEATS = 5  # calls of which the seconds are the median

# Tuning.


def tune(system: System, cell: Cell, rows: list[Row]) -> Row:
    """Returns the rates of a method, chosen from every pair on the tuning seeds."""
    del rows
    method, pairs = cell["method"], system.pairs
    arrays = [system.prepare(seed) for seed in TUNING_SEEDS]
    probe = lambda steps: functools.partial(
        run, system, method, steps, 0, key=jax.random.key(0)
    )
    slow_rates = min(system.rates), min(system.ratios)
    steps = count_affordable_steps(
        system.budget, method, probe, (arrays[0],), slow_rates
    )
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
    return choose_pair(pairs, values, method) | {
        "num_steps": steps,
        "tuning_cost": float(sum(costs)),
        "data_name": system.data_name(),
        "run_seconds": program.run_seconds,
    }


def tuning_body(system: System, rows: list[Row]) -> list[str]:
    """Returns the table of the chosen rates."""
    return [
        f"{rows[0]['data_name']}; seeds {' and '.join(map(str, TUNING_SEEDS))}. Of "
        f"every pair of a rate of w in {list(system.rates)} and a ratio, of the rate "
        f"of alpha to it, in {list(system.ratios)}, the one whose worse run ends "
        f"lowest, at its last step, after {system.budget:,.0f} gradient-equivalents "
        "(grad-eq) per run.",
        "",
        *rate_table(rows, ("rate", "ratio", "end"), ".1e"),
    ]


def tuning_stage(system: System) -> Stage:
    """Returns the stage that chooses the rates; its seeds are not those reported."""
    return Stage(
        "tuning",
        lambda scale, seeds: [{"method": method, "seed": 0} for method in METHODS],
        functools.partial(tune, system),
        functools.partial(tuning_body, system),
    )


# Measuring.


def final_value(values: Any, cost: Any) -> float:
    """Returns the geometric mean of the evaluations in the last tenth of the cost.

    It is infinite if a run broke off, or the budget paid for no evaluation.
    """
    values, cost = np.asarray(values, float), np.asarray(cost, float)
    if not values.size or not np.isfinite(values[-1]):
        return np.inf
    tail = values[cost >= (1 - TAIL) * cost[-1]]
    return geometric_mean(np.maximum(tail, 1e-30))


def check_budget(method: str, cost: float, budget: float) -> None:
    """Raises ValueError if a run cost more than its budget."""
    if cost > MAX_OVERRUN * budget:
        raise ValueError(
            f"a run of {method} cost {cost:.0f}, its budget is {budget:.0f}"
        )


@functools.cache
def curve_program(system: System, method: str, steps: int) -> Program:
    """Returns `curve`, compiled once per method."""
    return Program(functools.partial(curve, system, method, steps, system.points))


@functools.cache
def bare_program(system: System, method: str, steps: int) -> Program:
    """Returns the same run without evaluations, for timing."""
    return Program(lambda *args: run(system, method, steps, 0, *args).alpha)


def measure(system: System, cell: Cell, rows: list[Row]) -> Row:
    """Returns the row of one seed, at the rates that the rows of tuning contain."""
    method, seed = cell["method"], cell["seed"]
    arrays, data_name = system.prepare(seed), {"data_name": system.data_name()}
    if method in (SEARCH, TOTAL):
        budget = system.budget
        if method == TOTAL:
            budget *= 1 + len(TUNING_SEEDS) * len(system.pairs)
        return random_search(system, budget, arrays, seed_key(seed)) | data_name
    (tuning,) = select(rows, stage="tuning", method=method)
    steps = tuning["num_steps"]
    rates = (jnp.float32(tuning[name]) for name in ("rate", "ratio"))
    args = arrays, *rates, seed_key(seed)
    result = curve_program(system, method, steps)(*args)
    result = {name: np.asarray(x, float) for name, x in result.items()}
    if method not in RANDOM_LENGTH:
        check_budget(method, float(result["gradient_equivalents"]), system.budget)
    # A series of random length may cost more than its mean; steps that the budget does
    # not pay for are left out.
    last_paid = np.cumsum(paid_for(result["curve_cost"], system.budget)) - 1
    result |= {name: result[name][last_paid] for name in ("curve", "curve_cost")}
    program = bare_program(system, method, steps)
    if program.compiled is None:
        program(*args)  # so that seconds are those of a warm program
    seconds = [program.timed(*args)[1] for _ in range(REPEATS)]
    return {
        "end": final_value(result["curve"], result["curve_cost"]),
        "run_seconds": float(np.median(seconds)),
        "compile_seconds": program.compile_seconds,
        **{name: tuning[name] for name in ("rate", "ratio", "num_steps")},
        "tuning_cost": tuning["tuning_cost"],
        **{name: x.tolist() for name, x in result.items()},
        "gradient_equivalents": float(result["curve_cost"][-1]),
        **data_name,
    }


def random_search(system: System, budget: float, arrays: PyTree, key: Array) -> Row:
    """Returns the row of random search, which tries the initial alpha first.

    Each alpha is trained by Newton's method. The curve is that of the best alpha so far
    by the outer value, at the same costs for every seed; NaN until the budget pays for
    the first alpha. The costs are those of the trials that the budget pays for.
    """
    problem, w, alpha, suboptimality = system.make_problem(arrays)
    trace = hg.search(
        without_batches(problem),
        hg.Newton(tolerance=1e-2),
        InitialThenRandom(alpha),
        w,
        space=hg.spaces.Interval(system.low, system.high, shape=alpha.shape),
        budget=budget,
        key=key,
        metrics={"suboptimality": suboptimality},
    )
    cost = np.asarray(trace.cost, float)
    values = np.nan_to_num(np.asarray(trace.value, float), nan=np.inf)  # if it failed
    lowest = [int(np.argmin(values[: i + 1])) for i in range(len(values))]
    best = np.asarray(trace.metrics["suboptimality"], float)[lowest]
    ticks = budget * np.arange(1, system.points + 1) / system.points
    paid = np.searchsorted(cost, ticks, side="right")
    is_paid = paid_for(cost, budget)
    total = lambda name: float(np.sum(trace.stats[name][is_paid]))
    curve = np.where(paid > 0, best[np.maximum(paid, 1) - 1], np.nan)
    return {
        "end": float(curve[-1]) if paid[-1] else np.inf,
        "curve": curve.tolist(),
        "curve_cost": ticks.tolist(),
        "gradient_equivalents": float(np.max(cost[is_paid], initial=0.0)),
        "num_grads": total("num_grads"),
        "num_hvps": total("num_hvps"),
        "num_steps": int(np.sum(is_paid)),
    }


class InitialThenRandom(eqx.Module):
    """Random search that tries the initial alpha first."""

    alpha: PyTree

    def init(self, space: PyTree, key: Array) -> PyTree:
        """Returns the space, and that no alpha was tried yet."""
        del key
        return space, True

    def ask(self, state: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        """Returns the initial alpha, then samples."""
        space, is_initial = state
        alpha = self.alpha if is_initial else hg.spaces.sample(space, key)
        return alpha, (space, False)

    def tell(self, state: PyTree, alpha: PyTree, value: Array) -> PyTree:
        """Returns the state unchanged."""
        del alpha, value
        return state


# Findings.


def final_values(rows: list[Row], method: str) -> np.ndarray:
    """Returns where each seed ended; infinite for a run that broke off."""
    values = column(rows, "end", method=method)
    return np.where(np.isnan(values), np.inf, values)


def compare_final_values(
    rows: list[Row], method: str, baseline: str, min_ratio: float | None = None
) -> Finding:
    """Returns how many times lower a method ends: geometric mean over seeds.

    Args:
      rows: Rows of the table.
      method, baseline: Methods to compare.
      min_ratio: The claim: its paired 95% interval lies above this ratio. With None
        nothing is claimed.
    """
    values, baseline_values = final_values(rows, method), final_values(rows, baseline)
    if not (np.isfinite(values).all() and np.isfinite(baseline_values).all()):
        text = f"{method} against {baseline}: not every run came to its end"
        return Finding(text, None if min_ratio is None else "not supported")
    mean, low, high = ratio_interval(baseline_values, values)
    text = (
        f"{method} ends {mean:.3g} [{low:.3g}, {high:.3g}] times lower than "
        f"{baseline}, at equal cost"
    )
    if min_ratio is None:
        return Finding(text)
    return conclude(
        f"{text}, at least {min_ratio:g} claimed",
        bool(low >= min_ratio),
        values.size,
        math.log(high / mean),
        math.log(min_ratio) if min_ratio > 1 else math.inf,
    )


def cost_to_plateau(row: Row) -> float:
    """Returns the cost at which a run first was within twice of where it ended.

    It is infinite for a run that broke off or hardly fell, which has no plateau.
    """
    values = np.array([np.inf if x is None else x for x in row["curve"]])
    initial = values[0]
    if row["end"] is None or not row["end"] * MIN_FALL <= initial < np.inf:
        return np.inf
    return row["curve_cost"][int(np.argmax(values <= 2 * row["end"]))]


def median_cost_to_plateau(rows: list[Row], method: str) -> float:
    """Returns the median over seeds."""
    return float(np.median([cost_to_plateau(x) for x in select(rows, method=method)]))


def first_at_plateau(rows: list[Row], method: str) -> Finding:
    """Returns whether a method's median cost to its own plateau is the smallest."""
    stochastic = {row["method"] for row in rows} - {DOUBLE_LOOP, SEARCH, TOTAL}
    cost = {name: median_cost_to_plateau(rows, name) for name in sorted(stochastic)}
    cheapest = min(cost, key=lambda name: cost[name])
    is_met = cost[method] <= cost[cheapest] < np.inf
    text = (
        f"{method} is first at its plateau (within twice of its end, "
        f"{MIN_FALL:g} times below its start): after {cost[method]:.0f} "
        f"gradient-equivalents; the first, {cheapest}, after {cost[cheapest]:.0f}"
    )
    return conclude(text, is_met, len(final_values(rows, method)), 0.0, np.inf)


def compare_with_soba(
    rows: list[Row], *, min_ratio: float, other: str
) -> list[Finding]:
    """Returns whether SABA ends below SOBA, and SOBA is first at its plateau.

    Args:
      rows: Rows of the table.
      min_ratio: Claimed ratio of the ends of SOBA and SABA.
      other: A method that is compared with SOBA without a claim, as SRBA is.
    """
    return [
        compare_final_values(rows, "SABA", "SOBA", min_ratio),
        compare_final_values(rows, "SRBA", "SOBA"),
        compare_final_values(rows, other, "SOBA"),
        first_at_plateau(rows, "SOBA"),
    ]


# The printed table.


def body(system: System, rows: list[Row]) -> list[str]:
    """Returns a line per method: medians and quartiles over seeds."""
    text = (
        f"{rows[0]['data_name']}; {len({row['seed'] for row in rows})} seeds. End: "
        "median [quartiles] of h(alpha) - h* at the end of at most "
        f"{system.budget:,.0f} gradient-equivalents (grad-eq); plateau: median cost to "
        f"come within twice of it, where it is {MIN_FALL:g} times below the start. A "
        "product (HVP) yields the inner gradient too, which is not counted again. A "
        "run that broke off is infinite. Milliseconds are those of a warm program "
        "without evaluations. Rates of w, and of alpha over that of w, are those "
        "chosen by tuning."
    )
    headings = (
        "method", "end", "plateau", "grad-eq", "gradients", "HVPs", "steps", "rate",
        "ratio", "tuning grad-eq", "compile s", "run ms",
    )  # fmt: skip
    cells = [
        line_of(method, method_rows)
        for method in (*METHODS, SEARCH, TOTAL)
        if (method_rows := select(rows, method=method))
    ]
    return [text, "", *markdown_table(headings, cells)]


def line_of(method: str, rows: list[Row]) -> list[str]:
    """Returns the texts of a line of the table."""
    values = final_values(rows, method)
    quartiles = np.quantile(np.where(np.isfinite(values), values, 1e300), QUARTILES)
    low, middle, high = ("-" if x > 1e200 else f"{x:.1e}" for x in quartiles)
    num_broken = int(np.sum(~np.isfinite(values)))
    mark = f", {num_broken} broke off" if num_broken else ""
    plateau = median_cost_to_plateau(rows, method)
    mean = functools.partial(mean_text, rows)
    return [
        method,
        f"{middle} [{low}, {high}]{mark}",
        f"{plateau:.0f}" if np.isfinite(plateau) else "-",
        mean("gradient_equivalents", ".0f"),
        mean("num_grads", ".0f"),
        mean("num_hvps", ".0f"),
        mean("num_steps", ".0f"),
        mean("rate", "g"),
        mean("ratio", "g"),
        mean("tuning_cost", ",.0f"),
        mean("compile_seconds", ".1f"),
        mean("run_seconds", ".1f", 1e3),
    ]


def plot(system: System, rows: list[Row], path: Path) -> None:
    """Plots suboptimality against cost and against seconds: medians and quartiles."""
    curves = {method: select(rows, method=method) for method in (*METHODS, SEARCH)}
    curves = {
        method: method_rows for method, method_rows in curves.items() if method_rows
    }
    plots.medians(curves, path, f"{system.name}: {rows[0]['data_name']}")


def make_table(
    system: System,
    findings: Callable[[list[Row]], list[Finding]],
    *,
    source: str,
    data: str,
    minutes: float,
    arrays: Callable[[], Mapping[str, Any]] = dict,
) -> MeasurementTable:
    """Returns the table of a system, whose tuning is its first stage."""
    return MeasurementTable(
        cells=cells_of((*METHODS, SEARCH, TOTAL)),
        measure_cell=functools.partial(measure, system),
        earlier_stages=(tuning_stage(system),),
        findings=findings,
        body=functools.partial(body, system),
        plot=functools.partial(plot, system),
        source=source,
        data=data,
        arrays=arrays,
        minutes=minutes,
        seeds=10,
    )
