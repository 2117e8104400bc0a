"""The single-loop family on one system: one grid of rates, one budget, medians.

A system says what is drawn for a seed and how far an alpha is from the best. `grid`
makes the table that chooses rates: each method runs at every pair on two seeds that are
not reported, and goes on with the pair whose worse run ends lowest. `table` makes the
one of the reported seeds. See README.md.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.problem import Bilevel
from hypergrad.studies import record
from hypergrad.studies.program import Program
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, paired

from . import plots
from .__main__ import RESULTS

TUNING_SEEDS = (100, 101)
TAIL = 0.1  # of its cost: the geometric mean over it is where a run ends
FALL = 10.0  # times below its first evaluation: less is no plateau to arrive at
PROBE = 128  # steps that tell what one costs: whole periods of SRBA and VRBO
DRAWN, LONG_PROBE = ("TTSA", "SUSTAIN"), 4096  # of those that draw how long a series is
SLACK = 1.05  # of the budget: a run that costs more is refused
REPEATS = 5  # calls of which the seconds are the median
DOUBLE_LOOP, SEARCH, TOTAL = "implicit", "random search", "random search, total"


class Drawn(NamedTuple):
    """What a seed's run begins with.

    suboptimality: ``(w, alpha, key) -> h(alpha) - h*``.
    """

    problem: Bilevel
    w: PyTree
    alpha: PyTree
    suboptimality: Callable[[PyTree, PyTree, Array], Array]


class System(NamedTuple):
    """What a table of the family runs on.

    Attributes:
      name, source, minutes: of the table.
      about: ``() -> what the data are``.
      prepare: ``seed -> arrays``, on the host.
      draw: ``arrays -> Drawn``, under `jax.jit`.
      budget: gradient-equivalents of a run.
      points: at which a run is evaluated, about.
      batches: of one pass over the inner data: the period of SRBA and VRBO.
      rates: of ``w``, the largest near ``1 / lambda_max``.
      ratios: of the rate of ``alpha`` to that of ``w``.
      low, high: the box in which ``alpha`` is kept, and random search draws.
    """

    name: str
    source: str
    minutes: float
    about: Callable[[], str]
    prepare: Callable[[int], PyTree]
    draw: Callable[[PyTree], Drawn]
    budget: float
    points: int
    batches: int
    rates: tuple[float, ...]
    ratios: tuple[float, ...]
    low: float
    high: float

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """What the grid tries."""
        return [(rate, ratio) for rate in self.rates for ratio in self.ratios]


def falling(rate: Array) -> Callable[[Array], Array]:
    """A schedule."""
    return lambda step: rate / jnp.sqrt(1 + step / 100)


def family(rate: Array, batches: int) -> dict[str, Callable[[], Any]]:
    """Every method with its inner rate; inner loops have ten steps.

    The step of a Neumann series is the rate of ``w``; F2SA's penalty grows as in its
    paper; rates fall in SOBA's second row alone, as ``rate / sqrt(1 + t / 100)``. The
    last one solves: ten steps of all data, ten products of conjugate gradients, both
    from where the last ended.
    """
    sgd = optax.sgd(rate)
    grow = lambda step: 10 * (1 + step) ** (1 / 7)
    return {
        "SOBA": lambda: hg.SOBA(sgd),
        "SOBA, falling": lambda: hg.SOBA(optax.sgd(falling(rate))),
        "SABA": lambda: hg.SABA(sgd),
        "SRBA": lambda: hg.SRBA(sgd, period=batches),
        "FSLA": lambda: hg.FSLA(sgd),
        "StocBiO": lambda: hg.StocBiO(sgd, 10, 10, step_size=rate),
        "AmIGO": lambda: hg.AmIGO(sgd, 10, 10),
        "TTSA": lambda: hg.TTSA(sgd, 10, step_size=rate),
        "MRBO": lambda: hg.MRBO(sgd, 10, step_size=rate),
        "SUSTAIN": lambda: hg.SUSTAIN(sgd, 10, step_size=rate),
        "VRBO": lambda: hg.VRBO(sgd, 3, 10, period=batches, step_size=rate),
        "F2SA": lambda: hg.F2SA(sgd, 10, penalty=grow),
        "BOME": lambda: hg.BOME(sgd, 10, step_size=rate),
        "PZOBO": lambda: hg.PZOBO(sgd, 10, 1),
        "DARTS": lambda: hg.DARTS(sgd, rate),
        "DARTS, first order": lambda: hg.DARTS(sgd),
        DOUBLE_LOOP: lambda: hg.Implicit(
            hg.Descent(sgd, 10), hg.CG(max_steps=10), warm_start=True
        ),
    }


METHODS = tuple(family(jnp.ones(()), 1))


def whole(problem: Bilevel) -> Bilevel:
    """On all data at once."""
    of = lambda data: data.data if isinstance(data, hg.Batches) else data
    return Bilevel(
        problem.inner_loss,
        problem.outer_loss,
        of(problem.inner_data),
        of(problem.outer_data),
    )


# One run.


def run(
    system: System, method: str, steps: int, points: int,
    arrays: PyTree, rate: Array, ratio: Array, key: Array,
) -> hg.Trace:  # fmt: skip
    """One run, evaluated at ``points`` of its steps and its last; 0: at none."""
    problem, w, alpha, suboptimality = system.draw(arrays)
    if method == DOUBLE_LOOP:
        problem = whole(problem)
    outer_rate = rate * ratio
    if method.endswith("falling"):
        outer_rate = falling(rate * ratio)
    return hg.minimize(
        problem,
        family(rate, system.batches)[method](),
        optax.sgd(outer_rate),
        w,
        alpha,
        num_steps=steps,
        key=key,
        project=lambda alpha: optax.projections.projection_box(
            alpha, system.low, system.high
        ),
        metrics={"suboptimality": suboptimality} if points else {},
        eval_every=spacing(steps, points),
    )


def spacing(steps: int, points: int) -> int:
    """Of evaluations."""
    return max(1, steps // max(1, points))


def evaluated(steps: int, points: int) -> np.ndarray:
    """The steps at which `minimize` evaluates."""
    return np.unique([*range(0, steps, spacing(steps, points)), steps - 1])


def curve(
    system: System, method: str, steps: int, points: int,
    arrays: PyTree, rate: Array, ratio: Array, key: Array,
) -> Row:  # fmt: skip
    """Where a run was at each evaluation and at its end, and what that had cost.

    An evaluation is of the ``alpha`` before a step, and costs what led there.
    """
    trace = run(system, method, steps, points, arrays, rate, ratio, key)
    at, of_step = evaluated(steps, points), trace.stats["gradient_equivalents"]
    last = system.draw(arrays).suboptimality(trace.w, trace.alpha, key)
    last = jnp.where(trace.status_code == 0, last, jnp.nan)
    total = lambda name: jnp.sum(jnp.nan_to_num(trace.stats[name]))
    return {
        "curve": jnp.append(trace.metrics["suboptimality"][at], last),
        "curve_cost": jnp.append((trace.cost - of_step)[at], trace.cost[-1]),
        "gradient_equivalents": trace.cost[-1],
        "num_grads": total("num_grads"),
        "num_hvps": total("num_hvps"),
    }


def end(values: Any, cost: Any) -> float:
    """Geometric mean of the evaluations in the last tenth of what was spent.

    Infinite where a run broke off, or nothing was paid for.
    """
    values, cost = np.asarray(values, float), np.asarray(cost, float)
    if not values.size or not np.isfinite(values[-1]):
        return np.inf
    last = values[cost >= (1 - TAIL) * cost[-1]]
    return float(np.exp(np.mean(np.log(np.maximum(last, 1e-30)))))


def seed_key(seed: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), 1)


# The grid.


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


def paid_for(cost: Any, budget: float) -> np.ndarray:
    """Which steps the budget pays for; in float32 what adds up is rounded."""
    return np.asarray(cost) <= budget * (1 + 1e-5)


def within_budget(name: str, cost: float, budget: float) -> None:
    """Refuses a run that spent more."""
    if cost > SLACK * budget:
        raise ValueError(f"a run of {name} cost {cost:.0f}, its budget is {budget:.0f}")


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
    return [*lines, "", *(f"- {v.text}" for v in judge_grid(rows))]


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


# The table.


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
    logs = paired(np.log(theirs), np.log(ours))
    mean, low, high = np.exp(logs)
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
        *((logs[2] - logs[1]) / 2, told),
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
    mark = lambda verdict: "**FAILED** " if verdict.failed else ""
    lines += ["", *(f"- {mark(v)}{v.text}" for v in judge(rows))]
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


QUARTILES = (0.25, 0.5, 0.75)


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
