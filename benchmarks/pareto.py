"""Fronts of accuracy against what a network costs, with and without hypergradients.

The gates of `gates.py` are the hyperparameters; the second objective is one of three
costs. Whatever a method did, its networks are those of its gates rounded, trained anew,
and their front is measured by its hypervolume. See README.md.
"""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.searchers import optuna_study
from hypergrad.searchers.base import Trials, seed_from_key
from hypergrad.studies import record
from hypergrad.studies.program import program
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.study import DIGITS, digits
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, paired_ratio

from .shared import plots
from .__main__ import RESULTS
from .gates import (
    ALL,
    COSTS,
    HIDDEN,
    NUM_TRAIN,
    NUM_VAL,
    PIXELS,
    Gates,
    committed,
    cross_entropy,
    error,
    inner_loss,
    passes,
    rounded,
    shares,
    shares_of,
    split,
    start,
    widths,
)
from .gates import NAME as LATENCY

BUDGET = 16_000  # gradient-equivalents of a front
STEPS = 60  # of a training that counts
STEP = optax.sgd(0.5, momentum=0.9, nesterov=True)
TRAINING = hg.Descent(STEP, STEPS)
TRIAL = STEPS + 2 * hg.cost.VALUE_COST  # gradient-equivalents: two values at its end
REFERENCE = 0.5, 0.5  # of the hypervolume: error, share of the cost
OTHERS = (1.0, 1.0), (0.5, 1.0)  # of which lines without a claim tell
SMALL = 0.1  # a share at which the table tells an error


def outer_data(part: PyTree, cost: str, latency: Any) -> PyTree:
    """With what the second loss reads. Its size is that of the training data."""
    which = np.array([cost == each for each in COSTS], np.float32)
    return part | {"which": which, "latency": latency}


def share(w: PyTree, gates: Gates, batch: PyTree) -> Array:
    """Of the cost that ``which`` names; does not read the weights."""
    del w
    return batch["which"] @ shares(gates, batch["latency"])


class Found(NamedTuple):
    """Networks ``[P]`` that a method trained, their errors, and what it spent."""

    gates: Gates
    val: Array
    test: Array
    spent: float


@jax.jit
def train(w: PyTree, gates: Gates, parts: PyTree) -> tuple[Array, Array]:
    """Errors ``[P]`` on validation and test of networks trained from ``w``."""

    def one(gates: Gates) -> tuple[Array, Array]:
        end, _ = TRAINING.solve(inner_loss, w, gates, parts["train"], jax.random.key(0))
        return error(end, gates, parts["val"]), error(end, gates, parts["test"])

    return jax.vmap(one)(gates)


# With hypergradients.

PREFERENCES = 24
OPEN = 0.9  # every gate at first
ESTIMATOR = hg.Implicit(hg.Descent(STEP, 10), hg.CG(max_steps=5), damping=0.01)
RATES = (0.2, 0.4, 0.8)


class Tracing(NamedTuple):
    """What combines the losses at a preference; the second counts r times the first."""

    combine: Callable[[Array], Any]
    least: float
    most: float

    @property
    def preferences(self) -> np.ndarray:
        """``[P, 2]``: one, and r from the least to the most."""
        r = np.geomspace(self.least, self.most, PREFERENCES)
        return np.stack([np.ones_like(r), r], axis=1).astype(np.float32)


TRACING = {
    "weighted sums": Tracing(hg.objectives.WeightedSum, 0.1, 10.0),
    "EPO": Tracing(hg.objectives.EPO, 0.4, 100.0),
}


def trace(method: str, w: PyTree, data: PyTree, outer: PyTree, rate: Array) -> Any:
    """A run a preference: the gates where it ends, and what it spent."""
    own = TRACING[method]
    found = hg.objectives.pareto_front(
        hg.Bilevel(inner_loss, (cross_entropy, share), data, outer),
        ESTIMATOR, optax.adam(rate), w, jax.tree.map(lambda x: OPEN * x, ALL),
        jnp.asarray(own.preferences),
        aggregator_fn=own.combine,
        num_steps=20,
        space=hg.spaces.Unit(),
    )  # fmt: skip
    return jax.vmap(rounded)(found.alpha), found.cost[:, -1]


def descend(method: str, seed: int, cost: str, rate: float) -> Found:
    """The networks of all preferences."""
    parts, w = split(seed), start(seed)
    outer = outer_data(parts["val"], cost, committed())
    traced = program(trace, method)
    gates, spent = traced(w, parts["train"], outer, jnp.float32(rate))
    val, test = train(w, gates, parts)
    return Found(gates, val, test, float(spent.sum()) + PREFERENCES * TRIAL)


# Without.


def kept(alpha: PyTree) -> Gates:
    """Gates are open whose order is below what their layer keeps."""
    pixels, hidden = alpha["keep"]
    opened = lambda order, keep: (order < keep).astype(order.dtype)
    return Gates(opened(alpha["pixels"], pixels), opened(alpha["hidden"], hidden))


def space_of(least: float) -> PyTree:
    """What layers keep is log-uniform from the least to all, orders are uniform."""
    return {
        "keep": hg.spaces.Interval(least, 1.0, log=True, shape=(2,)),
        "pixels": hg.spaces.Unit((PIXELS,)),
        "hidden": hg.spaces.Unit((HIDDEN,)),
    }


class Genetic:
    """`hypergrad.searchers.NSGA2` that keeps optuna's study.

    The searcher makes it anew of all trials at each ask, which takes too long for
    hundreds of trials of a hundred axes.
    """

    is_multi_objective = True

    def __init__(self, population_size: int):
        self.population_size = population_size

    def init(self, space: PyTree, key: Array) -> Trials:
        del key
        self.optuna = optuna_study.import_optuna("NSGA2")
        self.axes = hg.spaces.axes(space)
        self.study: Any = None
        return Trials.empty(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        with optuna_study.quiet(self.optuna):
            sampler = self.optuna.samplers.NSGAIISampler(
                population_size=self.population_size, seed=seed_from_key(key)
            )
            if self.study is None:
                self.study = self.optuna.create_study(directions=["minimize"] * 2)
            self.study.sampler = sampler
            kinds = optuna_study.distributions(self.optuna, self.axes)
            self.trial = self.study.ask(kinds)
        t = optuna_study.from_params(self.axes, self.trial.params)
        return hg.spaces.from_unit(state.space, t), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        with optuna_study.quiet(self.optuna):
            self.study.tell(self.trial, np.asarray(value, float).tolist())
        return state.add(alpha, value)


class Searching(NamedTuple):
    """A searcher, and the least that a layer keeps in its space, for a setting."""

    make: Callable[[Any], Any]
    least: Callable[[Any], float]
    settings: tuple[Any, ...]


LEAST = (0.05, 0.1, 0.2)
SEARCHING = {
    "NSGA-II": Searching(
        lambda setting: Genetic(setting[0]),
        lambda setting: setting[1],
        tuple(itertools.product((10, 20, 40), LEAST)),
    ),
    "random": Searching(lambda _: hg.searchers.Random(), lambda least: least, LEAST),
}


def of_kept(loss: Callable) -> Callable:
    """The loss of a proposal's network."""
    return lambda w, alpha, batch: loss(w, kept(alpha), batch)


LOSSES = of_kept(inner_loss), (of_kept(error), of_kept(share))


def error_on(part: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """A metric: outside the ledger, and seen by no searcher."""
    del key
    return error(w, kept(alpha), part)


def seek(method: str, seed: int, cost: str, setting: Any) -> Found:
    """The networks of all trials, each trained as those that count."""
    own, parts, trials = SEARCHING[method], split(seed), []
    outer = outer_data(parts["val"], cost, committed())
    found = hg.search(
        hg.Bilevel(*LOSSES, parts["train"], outer),
        TRAINING, own.make(setting), start(seed),
        space=space_of(own.least(setting)),
        budget=BUDGET,
        key=jax.random.key(seed),
        metrics={"test": jax.tree_util.Partial(error_on, parts["test"])},
        trial_callback=trials.append,
    )  # fmt: skip
    columns = zip(*(trial["alpha"] for trial in trials), strict=True)
    leaves = (jnp.array(column, jnp.float32) for column in columns)
    alpha = dict(zip(("hidden", "keep", "pixels"), leaves, strict=True))
    errors = found.value[:, 0], found.metrics["test"]
    return Found(jax.vmap(kept)(alpha), *errors, float(found.cost[-1]))


@jax.jit
def passing(w: PyTree, data: PyTree) -> Gates:
    """Of the whole network, trained: what passes through each pixel and unit."""
    w, _ = TRAINING.solve(inner_loss, w, ALL, data, jax.random.key(0))
    rms = lambda x, axis: jnp.sqrt(jnp.mean(x**2, axis=axis))
    x = data["x"]
    hidden = jnp.tanh(x @ w["first"])
    return Gates(rms(x, 0) * rms(w["first"], 1), rms(hidden, 0) * rms(w["second"], 1))


def prune(seed: int, least: float, side: int) -> Found:
    """A grid of how many of each are kept, those through which most passes."""
    parts, w = split(seed), start(seed)
    counts = [np.round(np.geomspace(least * n, n, side)) for n in (PIXELS, HIDDEN)]
    pairs = np.stack([x.ravel() for x in np.meshgrid(*counts)])
    gates = Gates(*map(largest, passing(w, parts["train"]), pairs))
    val, test = train(w, gates, parts)
    first = STEPS + hg.cost.VALUE_COST  # `passing`: a training, and one pass forward
    return Found(gates, val, test, first + side**2 * TRIAL)


def largest(size: Array, counts: np.ndarray) -> Array:
    """``[P, n]``: 1 for so many of the largest."""
    place = np.argsort(np.argsort(-np.asarray(size)))
    return jnp.asarray(place < counts[:, None], jnp.float32)


# A front, and how good it is.

PRUNING, FEW = "pruning", "pruning, 64 networks"
SIDES = {PRUNING: 16, FEW: 8}  # of the grid
TUNED = (*TRACING, *SEARCHING, PRUNING)
METHODS = (*TUNED, FEW)  # the last takes the setting of pruning


def settings_of(method: str) -> tuple[Any, ...]:
    """What is tuned."""
    if method in TRACING:
        return RATES
    return SEARCHING[method].settings if method in SEARCHING else LEAST


@functools.lru_cache(maxsize=16)
def once(method: str, seed: int, setting: float) -> Found:
    """The networks of a method that asks for no cost: they serve all three."""
    if method in SIDES:
        return prune(seed, setting, SIDES[method])
    return seek(method, seed, COSTS[0], setting)


def networks(method: str, seed: int, cost: str, setting: Any) -> Found:
    """What a method trains within the budget."""
    if method in (*SIDES, "random"):
        return once(method, seed, setting)
    run = descend if method in TRACING else seek
    return run(method, seed, cost, setting)


FEW_SHAPES = 64  # fronts are filled up to a multiple of it, to be few programs
hypervolume = jax.jit(hg.objectives.hypervolume)


def volume(error: Any, share: Any, reference: tuple = REFERENCE) -> float:
    """What the points dominate below the reference; more points there add nothing."""
    points = np.column_stack([error, share])
    rest = np.tile(reference, (-len(points) % FEW_SHAPES, 1))
    return float(hypervolume(np.concatenate([points, rest]), np.array(reference)))


def front_of(found: Found, cost: str, latency: Any) -> Row:
    """The networks that no other dominates on validation, by rising cost."""
    cut = jax.vmap(lambda gates: shares(gates, latency))(found.gates)
    widths_ = np.stack(jax.vmap(widths)(found.gates), axis=1)
    rows = np.column_stack([found.val, cut[:, COSTS.index(cost)], found.test, widths_])
    rows = rows[np.asarray(hg.objectives.non_dominated(jnp.asarray(rows[:, :2])))]
    rows = np.unique(rows.astype(float), axis=0)
    val, share, test, pixels, hidden = rows[np.argsort(rows[:, 1])].T
    small = np.flatnonzero(share <= SMALL)
    return {
        "val_volume": volume(val, share), "test_volume": volume(test, share),
        "small_error": float(test[small[-1]]) if small.size else None,
        "val": val.tolist(), "test": test.tolist(), "share": share.tolist(),
        "pixels": pixels.tolist(), "hidden": hidden.tolist(),
        "networks": len(found.val), "spent": found.spent, "budget": BUDGET,
    }  # fmt: skip


# The grid.

GRID_NAME = "pareto-grid"
TUNING_SEEDS = (100, 101)


def try_all(cell: Row) -> Row:
    """A method at each of its settings, on both seeds; operations are the cost."""
    method, cost, settings = cell["method"], COSTS[0], settings_of(cell["method"])
    rows = [
        [
            front_of(networks(method, seed, cost, setting), cost, committed())
            for seed in TUNING_SEEDS
        ]
        for setting in settings
    ]
    volumes = [float(np.mean([row["val_volume"] for row in of])) for of in rows]
    return {
        "settings": list(settings),
        "volumes": volumes,
        "setting": settings[int(np.argmax(volumes))],
        "tuning_cost": sum(row["spent"] for of in rows for row in of),
        "budget": BUDGET,
        "data": DIGITS,
    }


def read_grid(method: str) -> Row:
    """What the committed grid says of a method, if it was made with these settings."""
    path = RESULTS / f"{GRID_NAME}.jsonl"
    again = f"run python -m benchmarks {GRID_NAME}"
    rows = record.read(path) if path.exists() else []
    tuned = PRUNING if method == FEW else method
    mine = [row for row in rows if row["method"] == tuned]
    if not mine:
        raise ValueError(f"{path} has no row of {tuned}: {again}")
    same = np.array_equal(mine[0]["settings"], settings_of(tuned))
    if not same or mine[0]["budget"] != BUDGET:
        raise ValueError(f"{path} was made with other settings or budget: {again}")
    return mine[0]


def judge_grid(rows: list[Row]) -> list[Verdict]:
    """What a reader of the other table should know."""
    edge = [row["method"] for row in rows if at_edge(row["setting"], row["settings"])]
    text = f"{len(edge)} of {len(rows)} chose a setting at an edge of those tried"
    return [Verdict(text + (f": {', '.join(edge)}" if edge else ""))]


def at_edge(setting: Any, settings: list) -> bool:
    """A number of it is the least or the largest that was tried."""
    tried = np.asarray(settings)
    return bool(np.any((setting == tried.min(0)) | (setting == tried.max(0))))


def shown(setting: Any) -> str:
    """Its numbers."""
    return " and ".join(f"{x:g}" for x in np.atleast_1d(setting))


def markdown_of_grid(table: Table, rows: list[Row], command: str) -> str:
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}; seeds {' and '.join(map(str, TUNING_SEEDS))}, {BUDGET:,} "
        "gradient-equivalents (grad-eq) a front of error against operations. In "
        "brackets the mean hypervolume on validation; the largest is chosen. Command: "
        f"`{command}`",
        "",
        "| method | settings | chosen | tuning grad-eq |",
        "|---|---|---|---|",
    ]
    for row in rows:
        pairs = zip(row["settings"], row["volumes"], strict=True)
        tried = ", ".join(f"{shown(x)} ({y:.4f})" for x, y in pairs)
        lines.append(
            f"| {row['method']} | {tried} | {shown(row['setting'])} | "
            f"{row['tuning_cost']:,.0f} |"
        )
    return "\n".join([*lines, "", *(v.line for v in judge_grid(rows))])


def draw_grid(rows: list[Row], path: Path) -> None:
    """How well each setting does."""
    panels = {"error against operations": {r["method"]: r["volumes"] for r in rows}}
    plots.strips(panels, path, "hypervolume, a dot a setting: more is better", ())


# The table.


def measure(cell: Row) -> Row:
    """One front at the chosen setting."""
    method, seed, cost = cell["method"], cell["seed"], cell["cost"]
    own = read_grid(method)
    found = networks(method, seed, cost, own["setting"])
    return front_of(found, cost, committed()) | {
        "setting": own["setting"], "tuning_cost": own["tuning_cost"],
        "best": max(TRACING, key=lambda each: max(read_grid(each)["volumes"])),
        "data": DIGITS, "data_sha256": fingerprint(digits()),
    }  # fmt: skip


# Judging.


def seeds_of(rows: list[Row], method: str, cost: str) -> list[Row]:
    """A row a seed."""
    mine = [r for r in rows if (r["method"], r["cost"]) == (method, cost)]
    return sorted(mine, key=lambda row: row["seed"])


def lane(rows: list[Row], method: str, cost: str, name: str) -> np.ndarray:
    """A column by seed; NaN where a row has no number."""
    return np.array([row[name] for row in seeds_of(rows, method, cost)], float)


def pair(of_method: Callable[[str], Any], best: str) -> tuple[np.ndarray, np.ndarray]:
    """What a method has by seed: the best row's, the better search's on each seed."""
    better = np.max([of_method(method) for method in SEARCHING], axis=0)
    return np.asarray(of_method(best)), better


def below(rows: list[Row], cost: str, reference: tuple) -> Callable[[str], list[float]]:
    """Hypervolumes of a method on test at another reference."""
    return lambda method: [
        volume(row["test"], row["share"], reference)
        for row in seeds_of(rows, method, cost)
    ]


shares_at = jax.jit(jax.vmap(shares_of, in_axes=(0, 0, None)))


def timed_by(rows: list[Row], latency: Any) -> Callable[[str], list[float]]:
    """Those of the same networks where another table says how long they take."""

    def at(row: Row) -> np.ndarray:
        size = len(row["pixels"])
        fill = lambda name: np.pad(row[name], (0, -size % FEW_SHAPES), mode="edge")
        cut = shares_at(fill("pixels"), fill("hidden"), latency)
        return np.asarray(cut)[:size, COSTS.index("latency")]

    return lambda method: [
        volume(row["test"], at(row)) for row in seeds_of(rows, method, "latency")
    ]


def over_passes(rows: list[Row], best: str) -> Verdict:
    """The claimed ratio where one pass stands in place of the median one."""
    ratios = [paired_ratio(*pair(timed_by(rows, each), best)) for each in passes()]
    mean, low, _ = np.transpose(ratios)
    return Verdict(
        f"the same, latencies of one of {len(ratios)} passes: {mean.min():.3f} to "
        f"{mean.max():.3f} times, intervals from {low.min():.3f} on"
    )


def compare(what: str, ours: np.ndarray, theirs: np.ndarray, claimed: bool) -> Verdict:
    """The ratio of hypervolumes on test, paired by seed."""
    mean, low, high = paired_ratio(ours, theirs)
    text = f"{what}: {mean:.3f} [{low:.3f}, {high:.3f}] times the hypervolume"
    if not claimed:
        return Verdict(text)
    met = bool(low > 1)
    half = math.log(high / mean)
    return conclude(f"{text}, any gain claimed", met, ours.size, half, math.inf)


def judge(rows: list[Row]) -> list[Verdict]:
    """The budget; by cost the claim, lines about it, the best against each other."""
    best, most = rows[0]["best"], max(row["spent"] for row in rows)
    text = f"the dearest front took {most:,.0f} of {BUDGET:,} gradient-equivalents"
    verdicts = [Verdict(text, failed=most > BUDGET)]
    for cost in COSTS:
        volumes = {m: lane(rows, m, cost, "test_volume") for m in METHODS}
        what = f"{cost}, {best} against"
        claim = f"(o) {what} the better of {' and '.join(SEARCHING)} on each seed"
        verdicts.append(compare(claim, *pair(volumes.__getitem__, best), True))
        for other in OTHERS:
            text = f"the same below error {other[0]:g} and share {other[1]:g}"
            verdicts.append(compare(text, *pair(below(rows, cost, other), best), False))
        if cost == "latency":
            verdicts.append(over_passes(rows, best))
        verdicts += [
            compare(f"{what} {method}", volumes[best], volumes[method], False)
            for method in METHODS
            if method != best
        ]
    return verdicts


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"# {table.name}",
        "",
        f"{DIGITS}: {NUM_TRAIN} to train, {NUM_VAL} to validate; {seeds} seeds; at "
        f"most {BUDGET:,} gradient-equivalents (grad-eq) a front. Networks are picked "
        "on validation. Hypervolume below error "
        f"{REFERENCE[0]:g} and share {REFERENCE[1]:g} of the cost, on test and on "
        f"validation, and the test error at a share of {SMALL:g}: means and standard "
        f"deviations. Settings are from [{GRID_NAME}]({GRID_NAME}.md), latencies from "
        f"[{LATENCY}]({LATENCY}.md). Command: `{command}`",
    ]
    titles = (
        "method", "hypervolume, test", "on validation", f"test error at {SMALL:g}",
        "on the front", "networks", "grad-eq", "setting", "tuning grad-eq",
    )  # fmt: skip
    for cost in COSTS:
        lines += ["", f"**Error against {cost}**", ""]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += [
            "| " + " | ".join(cells_of(rows, method, cost)) + " |" for method in METHODS
        ]
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def spread(values: np.ndarray, form: str) -> str:
    """Mean and deviation over the seeds that have a number, and of how many."""
    x = values[~np.isnan(values)]
    if not x.size:
        return "-"
    text = f"{x.mean():{form}} ± {x.std(ddof=min(1, x.size - 1)):{form}}"
    return text + f" ({x.size} of {values.size})" * (x.size < values.size)


def cells_of(rows: list[Row], method: str, cost: str) -> list[str]:
    """A line of the table."""
    column = lambda name: lane(rows, method, cost, name)
    mine = seeds_of(rows, method, cost)
    return [
        method,
        spread(column("test_volume"), ".4f"),
        spread(column("val_volume"), ".4f"),
        spread(column("small_error"), ".1%"),
        f"{np.mean([len(row['share']) for row in mine]):.0f}",
        f"{column('networks').mean():.0f}",
        f"{column('spent').mean():,.0f}",
        shown(mine[0]["setting"]),
        f"{column('tuning_cost')[0]:,.0f}",
    ]


def draw(rows: list[Row], path: Path) -> None:
    """Fronts above, hypervolumes below; a column a cost."""
    fronts = {
        cost: {
            method: [
                (row["share"], row["test"])
                for row in rows
                if (row["method"], row["cost"]) == (method, cost)
            ]
            for method in METHODS
        }
        for cost in COSTS
    }
    volumes = {
        cost: {m: lane(rows, m, cost, "test_volume").tolist() for m in METHODS}
        for cost in COSTS
    }
    plots.fronts(fronts, volumes, tuple(SEARCHING), REFERENCE, path)


SOURCE = "Deb et al. 2002; Mahapatra & Rajan 2020"
GRID = Table(
    name=GRID_NAME,
    source=SOURCE,
    minutes=9,
    seeds=1,
    plan=lambda scale, seeds: [{"method": method, "seed": 0} for method in TUNED],
    run=cell_by_cell(try_all, markdown_of_grid, draw_grid),
    judge=judge_grid,
)
TABLE = Table(
    name="pareto",
    source=SOURCE,
    minutes=5,
    seeds=5,
    plan=lambda scale, seeds: [
        {"method": method, "cost": cost, "seed": seed}
        for seed in range(seeds)
        for method in METHODS
        for cost in COSTS
    ],
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
