"""One run of any method of `rq2`, and what it returns by the exact metrics.

Every run begins at the model of the baseline and has the same budget. It is judged by
the model that it has in hand. See README.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.studies.program import program
from hypergrad.studies.record import Row

from .metric_learning import (
    METRICS,
    OBJECTIVES,
    at_temperature,
    by_penalty_alone,
    exact_value,
    first_model,
    judge,
    minus_exact,
    parts_of,
    temperature,
    thirds,
    train,
)
from .metric_tasks import SYSTEMS
from .surrogates import OWN, PENALTY_ALONE

BUDGETS = {"noisy digits": 6000.0, "few words": 1000.0}  # gradient-equivalents a run
TASKS = tuple(BUDGETS)
POINTS = 50  # at which a descent is evaluated, about
TUNING_SEEDS = (100, 101)
TRAINING = hg.Newton(tolerance=1e-3)  # of a trial, and of a converged estimate
KEY = 0  # of every training, none of which draws
SAME = 1e-6  # metrics that differ by less differ by rounding

LOSSES = {"cross-entropy": "cross-entropy"} | OWN  # by the metric that they stand for


class Way(NamedTuple):
    """How hypergradients of an outer loss are come by.

    rates: of Adam, to be tuned.
    least: gradient-equivalents of a step, about; runs are that long, and then cut.
    """

    estimator: Any
    rates: tuple[float, ...]
    least: dict[str, float]


FEW = hg.Descent(optax.sgd(0.3, momentum=0.9), num_steps=10)
WAYS = {
    "converged": Way(
        hg.Implicit(TRAINING, hg.CG(rtol=1e-2, max_steps=100)),
        (0.01, 0.03, 0.1, 0.3),
        {"noisy digits": 30.0, "few words": 10.0},
    ),
    "truncated": Way(
        hg.Unrolled(FEW, warm_start=True),
        (0.003, 0.01, 0.03, 0.1),
        dict.fromkeys(TASKS, 41.0),
    ),
    "joint": Way(
        hg.SOBA(optax.sgd(0.1)), (0.001, 0.003, 0.01, 0.03), dict.fromkeys(TASKS, 2.7)
    ),
}
SEARCHERS = {"random": hg.searchers.Random(), "TPE": hg.searchers.TPE()}
WIDTHS = {  # half of a box about the start
    "noisy digits": (0.25, 0.5, 1.0, 2.0),
    "few words": (0.5, 1.0, 2.0, 4.0),
}
UNTUNED = "untuned"


class Method(NamedTuple):
    """A row: an outer loss and a way, or an exact metric and a searcher."""

    of: str
    by: str

    @property
    def name(self) -> str:
        parts = (LOSSES[self.of], self.by) if self.by in WAYS else (self.by, self.of)
        return ", ".join(parts)

    def settings(self, task: str) -> tuple[float, ...]:
        """What is tuned."""
        return WAYS[self.by].rates if self.by in WAYS else WIDTHS[task]


DESCENTS = [Method(of, by) for of in LOSSES for by in WAYS]
SEARCHES = [Method(of, by) for of in METRICS for by in SEARCHERS]
LEARNED = {method.name: method for method in (*DESCENTS, *SEARCHES)}
METHODS = (UNTUNED, *PENALTY_ALONE, *LEARNED)


# What all runs share.


def held_out(parts: dict[str, PyTree]) -> dict[str, PyTree]:
    """With a third of validation in the place of test, at the length of test."""
    some, held = thirds(parts["val"])
    missing = len(parts["test"]["use"]) - len(held["use"])
    pad = lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return parts | {"val": some, "test": jax.tree.map(pad, held)}


def parts_for(task: str, seed: int) -> dict[str, PyTree]:
    """Those of the seed; a seed for tuning does not see its test part."""
    parts = parts_of(task, seed)
    return held_out(parts) if seed in TUNING_SEEDS else parts


def training(task: str, w: PyTree, alpha: PyTree, train: PyTree) -> Any:
    """``w`` as a trial trains it, and the gradient-equivalents that this costs."""
    loss, key = SYSTEMS[task].train_loss, jax.random.key(KEY)
    w, spent = TRAINING.solve(loss, w, alpha, train, key)
    counts = {name: spent[name] for name in ("num_grads", "num_hvps", "num_values")}
    return w, hg.cost.cost_stats(train, train, **counts)["gradient_equivalents"]


@functools.lru_cache(maxsize=16)
def beginning(task: str, seed: int) -> tuple[PyTree, PyTree, float]:
    """``(alpha, w, cost)`` with which every run begins: those of the baseline."""
    alpha, _ = first_model(task, seed)
    train = parts_of(task, seed)["train"]
    w, cost = program(training, task)(SYSTEMS[task].start(seed), alpha, train)
    return alpha, w, float(cost)


# One function each, since programs compare what they measure by identity.
@functools.cache
def exact_at(task: str, metric: str) -> Callable:
    """``(batch, w, alpha, key) -> the metric`` of the model in hand."""

    def value(batch, w, alpha, key):
        del alpha, key
        system = SYSTEMS[task]
        return exact_value(system, metric, system.views(w, batch)[metric])

    return value


@functools.cache
def coordinate(i: int) -> Callable:
    """A number of ``alpha``."""
    return lambda w, alpha, key: ravel_pytree(alpha)[0][i]


EXACT = tuple(f"{part} {metric}" for part in ("val", "test") for metric in METRICS)


def measured(task: str, alpha: PyTree, parts: dict[str, PyTree]) -> dict[str, Callable]:
    """What is recorded along a run: exact metrics on two parts, and ``alpha``."""
    exact = {
        f"{part} {metric}": jax.tree_util.Partial(exact_at(task, metric), parts[part])
        for part in ("val", "test")
        for metric in METRICS
    }
    size = ravel_pytree(alpha)[0].size
    return exact | {str(i): coordinate(i) for i in range(size)}


# With hypergradients.


def steps_of(task: str, way: str) -> int:
    """As many as the budget may pay for."""
    return math.ceil(BUDGETS[task] / WAYS[way].least[task])


def descend(
    task: str, of: str, by: str, w: PyTree, alpha: PyTree, parts: PyTree, rate: Array
) -> dict[str, Array]:
    """Adam along the hypergradient of an outer loss; columns by step."""
    system, num_steps = SYSTEMS[task], steps_of(task, by)
    losses = system.train_loss, OBJECTIVES[LOSSES[of]].loss(system)
    loop = hg.OuterLoop(
        hg.Bilevel(*losses, parts["train"], parts["val"]),
        WAYS[by].estimator,
        optax.adam(rate),
        space=system.space,
        metrics=measured(task, alpha, parts),
        eval_every=max(1, num_steps // POINTS),
    )
    trace = loop.run(loop.init(w, alpha), num_steps=num_steps)
    return trace.metrics | {"cost": trace.cost}


def by_hypergradient(task: str, method: Method, seed: int, rate: float) -> dict:
    alpha, w, _ = beginning(task, seed)
    parts = dict(parts_for(task, seed))
    t = temperature(task, OBJECTIVES[LOSSES[method.of]])(w, parts["val"])
    parts["val"] = at_temperature(parts["val"], t)
    run = program(descend, task, *method)
    columns = run(w, alpha, parts, jnp.asarray(rate, float))
    return {name: np.asarray(x, float) for name, x in columns.items()}


# Without.


def about(task: str, alpha: PyTree, half: float) -> PyTree:
    """A box of a half-width about the start, within that of the task."""
    return jax.tree.map(
        lambda space, x: hg.spaces.Interval(
            np.maximum(x - half, space.low), np.minimum(x + half, space.high),
            shape=x.shape,
        ),
        SYSTEMS[task].space,
        jax.tree.map(np.asarray, alpha),
        is_leaf=lambda x: isinstance(x, hg.spaces.Interval),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def trials(task: str, of: str, by: str, seed: int, half: float) -> dict:
    """On the exact metric of validation, from the ``w`` at the start."""
    alpha, w, first = beginning(task, seed)
    parts = parts_for(task, seed)
    losses = SYSTEMS[task].train_loss, minus_exact(task, of)
    trace = hg.search(
        hg.Bilevel(*losses, parts["train"], parts["val"]), TRAINING, SEARCHERS[by], w,
        space=about(task, alpha, half),
        budget=BUDGETS[task] - first,
        key=jax.random.key(seed),
        metrics=measured(task, alpha, parts),
    )  # fmt: skip
    columns = trace.metrics | {"cost": trace.cost}
    return {name: np.asarray(x, float) for name, x in columns.items()}


def by_search(task: str, method: Method, seed: int, half: float) -> dict:
    of = METRICS[0] if method.by == "random" else method.of  # its draws are the same
    return trials(task, of, method.by, seed, half)


# One run.


def improving(values: np.ndarray) -> np.ndarray:
    """Where a search found what is better than all before."""
    best = np.maximum.accumulate(values)
    return np.flatnonzero(np.diff(best, prepend=-np.inf) > SAME)


def judged(columns: dict, start: dict, most: float, of: str | None) -> Row:
    """What of a run is within the budget, and what it returns.

    A descent returns its last model within the budget; a search, whose exact metric
    is ``of``, the best on validation, which is the start's where no trial is better.

    columns: by step, NaN where nothing was evaluated; ``cost`` is of all steps so far.
    start: the same of the model that a run begins with, a number each.
    """
    cost = start["cost"] + columns["cost"]
    seen = np.all([np.isfinite(columns[name]) for name in EXACT], axis=0)
    paid = np.flatnonzero(seen & (cost <= most))
    course = {name: np.append(start[name], columns[name][paid]) for name in columns}
    course["cost"] = np.append(start["cost"], cost[paid])
    spent = float(course["cost"][-1])
    if of is not None:
        kept = improving(course[f"val {of}"])
        course = {name: column[kept] for name, column in course.items()}
    axes = sorted(filter(str.isdigit, columns), key=int)
    return {name: float(course[name][-1]) for name in EXACT} | {
        "spent": spent,
        "evaluations": int(paid.size),
        "curve_cost": course["cost"].tolist(),
        "curve": {m: course[f"val {m}"].tolist() for m in METRICS},
        "alpha": [float(course[axis][-1]) for axis in axes],
    }


def values_of(task: str, w: PyTree, parts: dict[str, PyTree]) -> dict[str, float]:
    """A model's exact metrics on both parts."""
    values = {part: judge(task, w, parts[part]) for part in ("val", "test")}
    return {f"{part} {m}": x[m] for part, x in values.items() for m in METRICS}


def start_of(task: str, seed: int) -> dict[str, float]:
    """Columns of the model that all runs begin with."""
    alpha, w, cost = beginning(task, seed)
    flat = np.asarray(ravel_pytree(alpha)[0], float)
    axes = {str(i): float(x) for i, x in enumerate(flat)}
    return values_of(task, w, parts_for(task, seed)) | axes | {"cost": cost}


@functools.lru_cache(maxsize=64)
def run(task: str, name: str, seed: int, setting: float) -> Row:
    """A learned row at a setting."""
    method = LEARNED[name]
    way = method.by in WAYS
    columns = (by_hypergradient if way else by_search)(task, method, seed, setting)
    start, of = start_of(task, seed), None if way else method.of
    return judged(columns, start, BUDGETS[task], of) | {"setting": setting}


def retrained(task: str, seed: int, flat: list[float]) -> dict[str, float]:
    """Exact metrics on test of the model that ``alpha`` alone makes, converged."""
    alpha, _, _ = beginning(task, seed)
    as_leaves, as_alpha = ravel_pytree(alpha)
    parts = parts_for(task, seed)
    alpha = as_alpha(jnp.asarray(flat, as_leaves.dtype))
    found = judge(task, train(task, seed, alpha, parts["train"]), parts["test"])
    return {f"retrained {metric}": found[metric] for metric in METRICS}


def alone(task: str, name: str, seed: int) -> Row:
    """A row that learns no hyperparameters, but for one penalty by validation."""
    parts = parts_for(task, seed)
    if name == UNTUNED:
        w = train(task, seed, SYSTEMS[task].alpha, parts["train"])
    else:
        w = by_penalty_alone(task, PENALTY_ALONE[name], seed)["w"]
    return values_of(task, w, parts)


# Tuning.


def score(row: Row, of: str) -> float:
    """What tuning makes large: the row's own metric, for cross-entropy the mean.

    On what was held out, which tuning has in the place of test.
    """
    metrics = METRICS if of == "cross-entropy" else (of,)
    return float(np.mean([row[f"test {metric}"] for metric in metrics]))


@functools.cache
def tuned(task: str, name: str) -> Row:
    """The setting with the best mean score on the seeds for tuning."""
    of, settings = LEARNED[name].of, LEARNED[name].settings(task)
    runs = [[run(task, name, seed, x) for seed in TUNING_SEEDS] for x in settings]
    scores = [float(np.mean([score(row, of) for row in each])) for each in runs]
    best = int(np.argmax(scores))
    spent = sum(row["spent"] for each in runs for row in each)
    return {"setting": settings[best], "score": scores[best], "tuning_cost": spent}
