"""The table `trainings`: how many trainings until the best hyperparameters are near.

Logistic regression with 500 features,

    L(w, a) = mean softplus(-y x.w) + 1/2 sum_j exp(a_g(j)) w_j²,  M(w) = mean softplus

with one log-penalty a group of features, 10 groups or 500. A training is 300 steps of
descent from 0, and the unit of cost. See README.md.
"""

import functools
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
from hypergrad.studies.program import program
from hypergrad.studies.record import Row, fingerprint
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import (
    MIN_SEEDS,
    Verdict,
    geometric_mean,
    number_of_seeds,
    paired_ratio,
)

from .shared import plots
from .shared.searching import Gaussian, Searching, Until, course, in_double, lowest

SIZES = (10, 500)
FEATURES, TRAIN, VALIDATION, STEPS = 500, 600, 2_000, 300
LOW, HIGH, START = -8.0, 1.5, -3.0  # of a log-penalty
RIDGES = 25  # equal penalties that the way begins at the best of
WAYS = (0.5, 0.8, 0.95)  # of the way from there to the target
BUDGET, MOST = 60.0, 1_000.0  # trainings: with hypergradients, and without
TUNING_SEEDS = (100, 101)
CLAIMED = {10: (26, 10), 500: (36, 15)}  # trainings at most, and reached for
SOURCE = "Bergstra & Bengio 2012; Liu & Nocedal 1989"

DESCENT = optax.sgd(0.5, momentum=0.9)
TRAINING = hg.Descent(DESCENT, STEPS)
WHOLE = hg.Implicit(TRAINING, hg.CG(max_steps=30), warm_start=False)
WARM = hg.Implicit(hg.Descent(DESCENT, STEPS // 10), hg.CG(rtol=1e-2, max_steps=10))


class Way(NamedTuple):
    """A method with hypergradients: its estimator, optimizer by rate, and steps."""

    estimator: Any
    optimizer: Callable[[float], optax.GradientTransformation]
    settings: tuple[float, ...]
    num_steps: int


QUASI = functools.partial(optax.lbfgs, linesearch=None)
ADAM, NEWTON = (0.1, 0.3, 1.0), (0.3, 0.6, 1.0)
WITH = {
    "Adam": Way(WHOLE, optax.adam, ADAM, 50),
    "L-BFGS": Way(WHOLE, QUASI, NEWTON, 50),
    "Adam, warm start": Way(WARM, optax.adam, ADAM, 300),
    "L-BFGS, warm start": Way(WARM, QUASI, NEWTON, 300),
}
ALL = dict.fromkeys(SIZES, math.inf)
WIDTHS = (1.5, 3.0, 4.5)
WITHOUT = {
    "Random": Searching(lambda _: hg.searchers.Random(), WIDTHS, ALL),
    "TPE": Searching(lambda _: hg.searchers.TPE(), WIDTHS, {10: 500, 500: 100}),
    "GaussianProcess": Searching(
        lambda _: hg.searchers.GaussianProcess(), WIDTHS, {10: 60}
    ),
    "CMAES": Searching(Gaussian, (0.05, 0.1, 0.2), ALL, False),
}
METHODS = (*WITH, *WITHOUT)


def inner_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    penalties = jnp.repeat(jnp.exp(alpha), FEATURES // alpha.size)
    return outer_loss(w, alpha, batch) + 0.5 * jnp.sum(penalties * w**2)


def outer_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Does not read the penalties; ``x`` is (features, examples)."""
    del alpha
    return jnp.mean(jax.nn.softplus(-batch["y"] * (w @ batch["x"])))


@functools.cache
def split(seed: int) -> dict[str, PyTree]:
    """Training and validation: ten groups of 50 features, each worth less.

    True weights are normal, of scales from 1 to 0.01; labels are drawn by the logistic.
    """
    rng = np.random.default_rng(seed)
    groups = SIZES[0]
    scale = np.repeat(np.geomspace(1.0, 0.01, groups), FEATURES // groups)
    true = scale * rng.standard_normal(FEATURES)

    def part(number: int) -> dict[str, np.ndarray]:
        x = rng.standard_normal((FEATURES, number))
        y = np.where(true @ x + rng.logistic(size=number) > 0, 1.0, -1.0)
        return {"x": x.astype(np.float32), "y": y.astype(np.float32)}

    return {"train": part(TRAIN), "val": part(VALIDATION)}


def bilevel(train: PyTree, val: PyTree) -> hg.Bilevel:
    return hg.Bilevel(inner_loss, outer_loss, train, val)


def h(train: PyTree, val: PyTree, w: Array, alpha: Array, key: Array) -> Array:
    """The outer loss after a training."""
    w, _ = TRAINING.solve(inner_loss, jnp.zeros_like(w), alpha, train, key)
    return outer_loss(w, alpha, val)


class Known(NamedTuple):
    """Of a seed: h at the best of equal penalties, and the least of h there is."""

    ridge: float
    target: float

    @property
    def bounds(self) -> list[float]:
        """Where each of `WAYS` is gone."""
        return [self.ridge + way * (self.target - self.ridge) for way in WAYS]


@functools.cache
def known(seed: int, size: int) -> Known:
    """L-BFGS in the box on the derivative of all 300 steps, in float64."""
    parts = split(seed)
    with jax.enable_x64(True):
        train, val = in_double(parts["train"]), in_double(parts["val"])
        exact = hg.Unrolled(TRAINING, warm_start=False)
        look = jax.jit(hg.hypergradient(bilevel(train, val), exact))
        w = jnp.zeros(FEATURES)

        def value(alpha: np.ndarray) -> tuple[float, np.ndarray]:
            found = look(w, jnp.asarray(alpha))
            return float(found.value), np.asarray(found.hypergradient)

        ridges = [np.full(size, a) for a in np.linspace(LOW, HIGH, RIDGES)]
        values = [value(alpha)[0] for alpha in ridges]
        best = int(np.argmin(values))
        ends = LOW, HIGH
        target, _ = lowest(value, ridges[best], ends, maxiter=200, ftol=1e-9)
    return Known(values[best], target)


# Runs.


def descend(
    method: str, setting: float, size: int, train: PyTree, val: PyTree
) -> dict[str, Array]:
    """Along the hypergradient from equal penalties, evaluated as it goes.

    With a warm start one training more is charged: it never made that of its alpha.
    """
    way = WITH[method]
    trace = hg.minimize(
        bilevel(train, val), way.estimator, way.optimizer(setting),
        jnp.zeros(FEATURES), jnp.full(size, START),
        num_steps=way.num_steps,
        space=hg.spaces.Interval(LOW, HIGH),
        metrics={"h": jax.tree_util.Partial(h, train, val)},
    )  # fmt: skip
    last = STEPS if way.estimator is WARM else 0
    return {"h": trace.metrics["h"], "cost": trace.cost + last}


def seek(method: str, setting: float, seed: int, size: int) -> dict[str, Any]:
    """Trials, a training each, until 95% of the way or the budget is spent."""
    own, parts = WITHOUT[method], split(seed)
    half = setting if own.widths else (HIGH - LOW) / 2
    middle = START if own.widths else (HIGH + LOW) / 2
    low, high = max(LOW, middle - half), min(HIGH, middle + half)
    trace = hg.search(
        bilevel(parts["train"], parts["val"]),
        TRAINING,
        Until(own.make(setting), known(seed, size).bounds[-1], own.most[size]),
        jnp.zeros(FEATURES),
        space=hg.spaces.Interval(low, high, shape=(size,)),
        budget=MOST * STEPS,
        key=jax.random.key(seed),
    )
    return {"h": trace.value, "cost": trace.cost}


@functools.lru_cache(maxsize=256)
def run(method: str, setting: float, seed: int, size: int) -> Row:
    """When each of `WAYS` was gone, in trainings; None for what never was.

    left: of the way at the best evaluation. spent: trainings, until there or in all.
    """
    if method in WITH:
        parts = split(seed)
        found = program(descend, method, setting, size)(parts["train"], parts["val"])
    else:
        found = seek(method, setting, seed, size)
    most = BUDGET if method in WITH else MOST
    return judged(found["h"], found["cost"], known(seed, size), most)


def judged(values: Any, cost: Any, of: Known, most: float) -> Row:
    """What of a run is within its budget, `most` trainings."""
    values, cost = np.asarray(values, float), np.asarray(cost, float) / STEPS
    paid = np.isfinite(values) & (cost <= most)
    values, cost = values[paid], cost[paid]
    there = [np.flatnonzero(values <= bound) for bound in of.bounds]
    trainings = [float(cost[at[0]]) if at.size else None for at in there]
    left = (values - of.target) / (of.ridge - of.target)
    return {"trainings": trainings} | course(left, cost)


def settings_of(method: str) -> tuple[float, ...]:
    return (WITH | WITHOUT)[method].settings


def score(row: Row) -> float:
    """Log trainings to the last of `WAYS`; beyond the budget by what is left."""
    near = 1 - WAYS[-1]
    last = row["trainings"][-1]
    return math.log(last or MOST * max(row["left"], near) / near)


@functools.cache
def tuned(method: str, size: int) -> Row:
    """The setting with the least mean score on the tuning seeds."""
    runs = [
        [run(method, setting, seed, size) for seed in TUNING_SEEDS]
        for setting in settings_of(method)
    ]
    scores = [float(np.mean([score(row) for row in each])) for each in runs]
    return {
        "setting": settings_of(method)[int(np.argmin(scores))],
        "scores": scores,
        "tuning": sum(row["spent"] for each in runs for row in each),
    }


def cells(scale: str, seeds: int) -> list[Row]:
    """Every method at the sizes that it can do."""
    del scale
    return [
        {"method": method, "size": size, "seed": seed}
        for size in SIZES
        for method in METHODS
        for seed in range(seeds)
        if method in WITH or size in WITHOUT[method].most
    ]


def measure(cell: Row) -> Row:
    """One run at its chosen setting."""
    method, size, seed = cell["method"], cell["size"], cell["seed"]
    chosen = tuned(method, size)
    of, data = known(seed, size), split(seed)
    return run(method, chosen["setting"], seed, size) | chosen | {
        "ridge": of.ridge, "target": of.target,
        "data": "drawn from the seed", "data_sha256": fingerprint(data),
    }  # fmt: skip


# Judging.


def lane(rows: list[Row], method: str, size: int) -> list[Row]:
    """By seed."""
    mine = [r for r in rows if (r["method"], r["size"]) == (method, size)]
    return sorted(mine, key=lambda row: row["seed"])


def needed(
    rows: list[Row], method: str, size: int, way: int = -1
) -> tuple[np.ndarray, int]:
    """Trainings by seed, a bound where it never was, and on how many it never was."""
    mine = lane(rows, method, size)
    never = sum(row["trainings"][way] is None for row in mine)
    return np.array([row["trainings"][way] or row["spent"] for row in mine]), never


def best_of(rows: list[Row], methods: tuple[str, ...], size: int) -> str:
    """Which tuned best."""
    there = [method for method in methods if lane(rows, method, size)]
    return min(there, key=lambda method: min(lane(rows, method, size)[0]["scores"]))


def claimed(rows: list[Row], size: int) -> Verdict:
    """Whether the best with hypergradients is near within so many trainings."""
    most, reach = CLAIMED[size]
    best = best_of(rows, tuple(WITH), size)
    text = f"(o) {size} hyperparameters, {best}: {WAYS[-1]:.0%} of the way"
    cost, never = needed(rows, best, size)
    if cost.size < MIN_SEEDS:
        return Verdict(f"{text}: too few seeds, {MIN_SEEDS} are needed", failed=True)
    if never:
        return Verdict(f"{text}: never on {number_of_seeds(never)}: not reproduced")
    mean, low, high = paired_ratio(cost, 1.0)
    word = "reproduced" if high <= most else "not reproduced"
    far = "reached" if high <= reach else "not reached"
    return Verdict(
        f"{text} in {mean:.3g} [{low:.3g}, {high:.3g}] trainings, {reach} {far}; at "
        f"most {most} claimed: {word}"
    )


def against(rows: list[Row], method: str, size: int) -> Verdict:
    """What a black box needs, and how many times as much as the best that does not."""
    best = best_of(rows, tuple(WITH), size)
    (theirs, never), (ours, lost) = (needed(rows, m, size) for m in (method, best))
    text = f"{size} hyperparameters, {method}: {geometric_mean(theirs):.3g} trainings"
    text += f" at least, never there on {never} of {theirs.size} seeds" if never else ""
    if lost:
        return Verdict(f"{text}; {best} is never there on {number_of_seeds(lost)}")
    mean, low, high = paired_ratio(theirs, ours)
    return Verdict(f"{text}, {mean:.3g} [{low:.3g}, {high:.3g}] times as many")


def at_ends(rows: list[Row]) -> Verdict:
    """Where the best setting may lie beyond those that were tried."""
    ends = [
        f"{method} ({size})"
        for size in SIZES
        for method in METHODS
        for row in lane(rows, method, size)[:1]
        if row["setting"] in (min(settings_of(method)), max(settings_of(method)))
    ]
    return Verdict(f"at an end of the settings tried: {', '.join(ends) or 'none'}")


def judge(rows: list[Row]) -> list[Verdict]:
    """What is claimed at each size, what black boxes need, and what may be tuned."""
    verdicts = []
    for size in SIZES:
        boxes = [method for method in WITHOUT if lane(rows, method, size)]
        verdicts.append(claimed(rows, size))
        verdicts += [against(rows, method, size) for method in boxes]
    return [*verdicts, at_ends(rows)]


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    seeds = len({row["seed"] for row in rows})
    titles = [f"to {way:.0%}" for way in WAYS]
    lines = [
        f"# {table.name}",
        "",
        f"Logistic regression, {TRAIN} examples to train, {VALIDATION:,} to validate, "
        f"{FEATURES} features; {seeds} seeds. Trainings of {STEPS} steps, in "
        "gradient-equivalents, until so much of the way from the best equal penalties "
        "to the best there are is gone: geometric mean, > where on some seed it never "
        "was and counts with what was spent. Left: of the way at the best evaluation; "
        f"without hypergradients a run ends once {WAYS[-1]:.0%} is gone. Command: "
        f"`{command}`",
    ]
    for size in SIZES:
        lines += ["", f"**{size} hyperparameters**", ""]
        heads = ["method", *titles, "there", "left, median", "setting", "tuning"]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for method in METHODS:
            if lane(rows, method, size):
                lines.append(f"| {' | '.join(cells_of(rows, method, size))} |")
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def cells_of(rows: list[Row], method: str, size: int) -> list[str]:
    """A line of the table."""
    mine = lane(rows, method, size)
    costs = [needed(rows, method, size, way) for way in range(len(WAYS))]
    there = len(mine) - costs[-1][1]
    more = lambda never: "> " if never else ""
    return [
        method,
        *(f"{more(never)}{geometric_mean(cost):.3g}" for cost, never in costs),
        f"{there} of {len(mine)}",
        f"{np.median([row['left'] for row in mine]):.1%}",
        f"{mine[0]['setting']:g}",
        f"{mine[0]['tuning']:,.0f}",
    ]


def draw(rows: list[Row], path: Path) -> None:
    """What is left of the way against what was spent: a panel a size."""
    panels = {
        f"{size} hyperparameters": {
            method: [(r["curve_cost"], r["curve"]) for r in lane(rows, method, size)]
            for method in METHODS
            if lane(rows, method, size)
        }
        for size in SIZES
    }
    plots.remaining(panels, tuple(WITHOUT), 1 - WAYS[-1], path, "trainings")


TABLE = Table(
    name="trainings",
    source=SOURCE,
    minutes=30,
    seeds=5,
    plan=cells,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
