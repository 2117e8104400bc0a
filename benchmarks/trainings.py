"""The number of trainings until the best hyperparameters are near.

Question: how many trainings does it take until the best hyperparameters are near, with
a hypergradient and without?

Data: made from the seed. There are 500 standard normal features in ten groups; true
weights are normal, of scales from 1 to 0.01 by group; labels are sampled by the
logistic function; 600 examples are for training and 2,000 for validation. The
validation loss itself is the aim, so that the table compares searches, not
generalization: nothing is tested.

Model: logistic regression,

    L(w, a) = mean softplus(-y x.w) + 1/2 sum_j exp(a_g(j)) w_j^2,  M(w) = mean softplus

with one log-penalty per group (10) or per feature (500), in [-8, 1.5]. A *training* is
300 full-batch steps of gradient descent with rate 0.5 and momentum 0.9 from 0, and is
the unit of cost, by counted gradient-equivalents. `h(alpha)` is the validation loss
after one training.

Target: the *way* is from the best of 25 equal penalties to the minimum of `h` that
L-BFGS reaches in the box from there, on the derivative of all 300 steps in float64, in
at most 200 iterations.

Rows with hypergradients start at penalties of -3, in the unconstrained coordinates of
the interval: *Adam* and *L-BFGS* (optax's, without a line search) on the implicit
hypergradient after a training from 0, by at most 30 products; and both with a *warm
start*, with 30 steps and at most 10 products (CG to 1e-2) from the last `w`. A row with
a warm start is charged one training more, that of the `alpha` which it returns. The
evaluations are not counted. Rows without hypergradients make one training per trial:
Random, TPE and GaussianProcess (10 hyperparameters only) in a box around -3, CMAES in
the whole box from its middle, -3.25.

Budget: 60 trainings with hypergradients; without 1,000, TPE 500 (100 with 500
hyperparameters), GaussianProcess 60, because their proposals are slow. None of the
latter continues once 95% of the way is covered. A run that never gets there has a lower
bound, its whole cost.

Tuning, the same for every row: on seeds 100 and 101 three settings are tried; the one
with the least mean of log trainings to 95% is chosen, where a run that never gets there
counts as 1,000 times the remaining fraction of the way over 5%. Settings are Adam's
rate in {0.1, 0.3, 1}, the rate of L-BFGS in {0.3, 0.6, 1}, the half-width of the box in
{1.5, 3, 4.5}, and for CMAES a first step of {0.05, 0.1, 0.2} of the box.

Claims, seeds 0 to 4: the row with hypergradients that tuned best covers 95% of the way
in at most 26 trainings with 10 hyperparameters and in at most 36 with 500, by the upper
end of the 95% interval of the geometric mean. The goals beyond the claims are 10 and
15. The further lines state what black boxes need, and which settings are at an end of
those that were tried. The table `peer_speed` (*w6*) compares the seconds of a
hypergradient with those of its training.
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
from hypergrad.bench import (
    Cell,
    Finding,
    MeasurementTable,
    Row,
    geometric_mean,
    ratio_interval,
)
from hypergrad.bench.report import markdown_table
from hypergrad.bench.statistics import MIN_SEEDS

from .shared import plots
from .shared.grouped_penalties import (
    DESCENT,
    FRACTIONS,
    HIGH,
    LOW,
    NUM_FEATURES,
    NUM_STEPS,
    SIZES,
    TRAINING,
    Reference,
    make_problem,
    reference,
    split,
    trained_value,
)
from .shared.outcomes import count_seeds
from .shared.program import program
from .shared.row_columns import rows_by_seed
from .shared.searching import Gaussian, Searching, Until, course
from .shared.task_runs import implicit_by_cg
from .shared.tuning import choose_on_seeds

START = -3.0  # of a log-penalty
BUDGET, SEARCH_BUDGET = 60.0, 1_000.0  # trainings: with hypergradients, and without
CLAIMED = {10: (26, 10), 500: (36, 15)}  # trainings at most: the claim, and the goal

COLD = implicit_by_cg(TRAINING, max_steps=30, warm_start=False)
WARM = implicit_by_cg(hg.Descent(DESCENT, NUM_STEPS // 10), rtol=1e-2, max_steps=10)


class GradientMethod(NamedTuple):
    """A method with hypergradients: its estimator, optimizer by rate, and steps."""

    estimator: Any
    optimizer: Callable[[float], optax.GradientTransformation]
    settings: tuple[float, ...]
    num_steps: int


LBFGS = functools.partial(optax.lbfgs, linesearch=None)
ADAM_RATES, LBFGS_RATES = (0.1, 0.3, 1.0), (0.3, 0.6, 1.0)
GRADIENT_METHODS = {
    "Adam": GradientMethod(COLD, optax.adam, ADAM_RATES, 50),
    "L-BFGS": GradientMethod(COLD, LBFGS, LBFGS_RATES, 50),
    "Adam, warm start": GradientMethod(WARM, optax.adam, ADAM_RATES, 300),
    "L-BFGS, warm start": GradientMethod(WARM, LBFGS, LBFGS_RATES, 300),
}
ALL_SIZES = dict.fromkeys(SIZES, math.inf)
WIDTHS = (1.5, 3.0, 4.5)
SEARCHERS = {
    "Random": Searching(lambda _: hg.searchers.Random(), WIDTHS, ALL_SIZES),
    "TPE": Searching(lambda _: hg.searchers.TPE(), WIDTHS, {10: 500, 500: 100}),
    "GaussianProcess": Searching(
        lambda _: hg.searchers.GaussianProcess(), WIDTHS, {10: 60}
    ),
    "CMAES": Searching(Gaussian, (0.05, 0.1, 0.2), ALL_SIZES, False),
}
METHODS = (*GRADIENT_METHODS, *SEARCHERS)


# Runs.


def descend(
    method: str, setting: float, size: int, train: PyTree, val: PyTree
) -> dict[str, Array]:
    """Returns values and costs of steps along the hypergradient from equal penalties.

    With a warm start one training more is charged, because that of the last alpha was
    not made.
    """
    config = GRADIENT_METHODS[method]
    trace = hg.minimize(
        make_problem(train, val), config.estimator, config.optimizer(setting),
        jnp.zeros(NUM_FEATURES), jnp.full(size, START),
        num_steps=config.num_steps,
        space=hg.spaces.Interval(LOW, HIGH),
        metrics={"h": jax.tree_util.Partial(trained_value, train, val)},
    )  # fmt: skip
    final_cost = NUM_STEPS if config.estimator is WARM else 0
    return {"h": trace.metrics["h"], "cost": trace.cost + final_cost}


def search_until_near(
    method: str, setting: float, seed: int, size: int
) -> dict[str, Any]:
    """Returns values and costs of trials until 95% of the way or the budget's end."""
    config, splits = SEARCHERS[method], split(seed)
    half_width = setting if config.widths else (HIGH - LOW) / 2
    middle = START if config.widths else (HIGH + LOW) / 2
    low, high = max(LOW, middle - half_width), min(HIGH, middle + half_width)
    bound = reference(seed, size).bounds[-1]
    trace = hg.search(
        make_problem(splits["train"], splits["val"]),
        TRAINING,
        Until(config.make(setting), bound, config.most[size]),
        jnp.zeros(NUM_FEATURES),
        space=hg.spaces.Interval(low, high, shape=(size,)),
        budget=SEARCH_BUDGET * NUM_STEPS,
        key=jax.random.key(seed),
    )
    return {"h": trace.value, "cost": trace.cost}


@functools.lru_cache(maxsize=256)
def run(method: str, setting: float, seed: int, size: int) -> Row:
    """Returns the trainings until each of `FRACTIONS` was covered; None for never.

    ``left`` is the remaining fraction of the way at the best evaluation, ``spent`` the
    number of trainings until 95% or in all.
    """
    if method in GRADIENT_METHODS:
        splits = split(seed)
        descent = program(descend, method, setting, size)
        result = descent(splits["train"], splits["val"])
    else:
        result = search_until_near(method, setting, seed, size)
    budget = BUDGET if method in GRADIENT_METHODS else SEARCH_BUDGET
    return progress_columns(result["h"], result["cost"], reference(seed, size), budget)


def progress_columns(values: Any, cost: Any, ends: Reference, budget: float) -> Row:
    """Returns the columns of the part of a run within its budget, in trainings."""
    values, cost = np.asarray(values, float), np.asarray(cost, float) / NUM_STEPS
    is_paid = np.isfinite(values) & (cost <= budget)
    values, cost = values[is_paid], cost[is_paid]
    hits = [np.flatnonzero(values <= bound) for bound in ends.bounds]
    trainings = [float(cost[indices[0]]) if indices.size else None for indices in hits]
    left = (values - ends.target) / (ends.ridge - ends.target)
    return {"trainings": trainings} | course(left, cost)


def settings_of(method: str) -> tuple[float, ...]:
    """Returns the settings that are tried."""
    return (GRADIENT_METHODS | SEARCHERS)[method].settings


def score(row: Row) -> float:
    """Returns log trainings to the last of `FRACTIONS`; lower is better.

    A run that never gets there counts by the remaining fraction of its way.
    """
    max_left = 1 - FRACTIONS[-1]
    last = row["trainings"][-1]
    return math.log(last or SEARCH_BUDGET * max(row["left"], max_left) / max_left)


@functools.cache
def choose_setting(method: str, size: int) -> Row:
    """Returns the setting with the least mean score on the tuning seeds."""
    run_on = lambda setting, seed: run(method, setting, seed, size)
    choice = choose_on_seeds(
        run_on, settings_of(method), score, cost=lambda row: row["spent"]
    )
    return {
        "setting": choice.setting,
        "scores": choice.scores,
        "tuning": choice.tuning_cost,
    }


def cells(scale: str, seeds: int) -> list[Cell]:
    """Returns every method at the sizes for which it is fast enough."""
    del scale
    return [
        {"method": method, "size": size, "seed": seed}
        for size in SIZES
        for method in METHODS
        for seed in range(seeds)
        if method in GRADIENT_METHODS or size in SEARCHERS[method].most
    ]


def measure_cell(cell: Cell, rows: list[Row]) -> Row:
    """Returns the columns of one run at its chosen setting."""
    del rows
    method, size, seed = cell["method"], cell["size"], cell["seed"]
    choice, ends = choose_setting(method, size), reference(seed, size)
    row = run(method, choice["setting"], seed, size)
    return row | choice | {"ridge": ends.ridge, "target": ends.target}


# Findings.


def trainings_of(
    rows: list[Row], method: str, size: int, index: int = -1
) -> tuple[np.ndarray, int]:
    """Returns the trainings by seed, and the number of seeds that never got there.

    Of a seed that never got there the number is a lower bound.
    """
    method_rows = rows_by_seed(rows, method=method, size=size)
    num_never = sum(row["trainings"][index] is None for row in method_rows)
    values = [row["trainings"][index] or row["spent"] for row in method_rows]
    return np.array(values), num_never


def best_gradient_method(rows: list[Row], size: int) -> str | None:
    """Returns the method with hypergradients that has the best score of tuning."""
    scores = {
        method: min(method_rows[0]["scores"])
        for method in GRADIENT_METHODS
        if (method_rows := rows_by_seed(rows, method=method, size=size))
    }
    return min(scores, key=lambda method: scores[method], default=None)


def claim_of(rows: list[Row], best: str, size: int) -> Finding:
    """Returns whether the best method with hypergradients is near soon enough."""
    limit, goal = CLAIMED[size]
    text = f"{size} hyperparameters, {best}: {FRACTIONS[-1]:.0%} of the way"
    trainings, num_never = trainings_of(rows, best, size)
    if trainings.size < MIN_SEEDS:
        seeds = f"{count_seeds(trainings.size)} of {MIN_SEEDS}"
        return Finding(f"{text}: {seeds}", "undecided")
    if num_never:
        text = f"{text}: never on {count_seeds(num_never)}, at most {limit} claimed"
        return Finding(text, "not supported")
    interval = ratio_interval(trainings, 1.0)
    reached = "reached" if interval.high <= goal else "not reached"
    text = (
        f"{text} in {interval:.3g} trainings, at most {limit} claimed; "
        f"the goal of {goal} is {reached}"
    )
    return Finding(text, "supported" if interval.high <= limit else "not supported")


def compare_searcher(rows: list[Row], method: str, best: str, size: int) -> Finding:
    """Returns the trainings of a black box, also over those of the best method."""
    trainings, num_never = trainings_of(rows, method, size)
    best_trainings, num_lost = trainings_of(rows, best, size)
    text = (
        f"{size} hyperparameters, {method}: {geometric_mean(trainings):.3g} trainings"
    )
    if num_never:
        text += f" at least, never there on {num_never} of {trainings.size} seeds"
    if num_lost:
        return Finding(f"{text}; {best} is never there on {count_seeds(num_lost)}")
    if trainings.size != best_trainings.size:
        return Finding(text)
    ratio = ratio_interval(trainings, best_trainings)
    return Finding(f"{text}, {ratio:.3g} times as many as {best}")


def extreme_settings(rows: list[Row]) -> Finding:
    """Returns the methods whose best setting may lie beyond those that were tried."""
    labels = [
        f"{method} ({size})"
        for size in SIZES
        for method in METHODS
        for row in rows_by_seed(rows, method=method, size=size)[:1]
        if row["setting"] in (min(settings_of(method)), max(settings_of(method)))
    ]
    return Finding(f"at an end of the settings tried: {', '.join(labels) or 'none'}")


def findings(rows: list[Row]) -> list[Finding]:
    """Returns claims, the needs of black boxes, and settings at an end of the grid."""
    lines = []
    for size in SIZES:
        best = best_gradient_method(rows, size)
        if best is not None:
            lines.append(claim_of(rows, best, size))
            lines += [
                compare_searcher(rows, method, best, size)
                for method in SEARCHERS
                if rows_by_seed(rows, method=method, size=size)
            ]
    return [*lines, extreme_settings(rows)]


# The printed form.


def body(rows: list[Row]) -> list[str]:
    """Returns a table per number of hyperparameters."""
    columns = [f"to {fraction:.0%}" for fraction in FRACTIONS]
    headings = ["method", *columns, "there", "left, median", "setting", "tuning"]
    lines = [
        "Trainings until a fraction of the way is covered: geometric mean over seeds, "
        "with > if some seed never got there and counts with its whole cost. Left: the "
        "remaining fraction of the way at the best evaluation, median.",
    ]
    for size in SIZES:
        cells = [
            table_cells(rows, method, size)
            for method in METHODS
            if rows_by_seed(rows, method=method, size=size)
        ]
        title = f"**{size} hyperparameters**"
        lines += ["", title, "", *markdown_table(headings, cells)]
    return lines


def table_cells(rows: list[Row], method: str, size: int) -> list[str]:
    """Returns the cells of a line of the table."""
    method_rows = rows_by_seed(rows, method=method, size=size)
    costs = [trainings_of(rows, method, size, i) for i in range(len(FRACTIONS))]
    num_there = len(method_rows) - costs[-1][1]
    return [
        method,
        *(f"{'> ' * (never > 0)}{geometric_mean(cost):.3g}" for cost, never in costs),
        f"{num_there} of {len(method_rows)}",
        f"{np.median([row['left'] for row in method_rows]):.1%}",
        f"{method_rows[0]['setting']:g}",
        f"{method_rows[0]['tuning']:,.0f}",
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Plots the remaining fraction of the way against cost, with a panel per size."""
    panels = {
        f"{size} hyperparameters": {
            method: [(row["curve_cost"], row["curve"]) for row in method_rows]
            for method in METHODS
            if (method_rows := rows_by_seed(rows, method=method, size=size))
        }
        for size in SIZES
    }
    plots.remaining(panels, tuple(SEARCHERS), 1 - FRACTIONS[-1], path, "trainings")


table = MeasurementTable(
    cells=cells,
    measure_cell=measure_cell,
    body=body,
    findings=findings,
    plot=plot,
    minutes=30,
    paradigm="search",
    source="Bergstra & Bengio 2012; Liu & Nocedal 1989",
    data="logistic regression with data made from the seed",
)
