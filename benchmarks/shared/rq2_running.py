"""One run of any method of the table `rq2`, with its exact metrics.

Every run starts at the model of the baseline and has the same budget. It is evaluated
by the model that it holds when the budget ends.
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
from hypergrad.bench import Row

from .metric_learning import (
    METRICS,
    OBJECTIVES,
    OWN_SURROGATE,
    PENALTY_ROWS,
    at_temperature,
    evaluate_w,
    exact_value,
    first_model,
    hold_out_third,
    minus_exact,
    splits_of,
    temperature,
    train,
    tune_penalty,
)
from .metric_tasks import SYSTEMS
from .program import program
from .task_runs import implicit_by_cg
from .tuning import TUNING_SEEDS, choose_on_seeds

#: Gradient-equivalents per run.
BUDGETS = {"noisy digits": 6000.0, "few words": 1000.0}
TASKS = tuple(BUDGETS)
NUM_EVALUATIONS = 50  # of a descent, about
#: Inner solver of a trial, and of a converged estimate.
TRAINING = hg.Newton(tolerance=1e-3)
METRIC_TOL = 1e-6  # smaller differences of metrics are rounding errors

#: Outer losses by the metric that they replace.
LOSSES = {"cross-entropy": "cross-entropy"} | OWN_SURROGATE


class DescentConfig(NamedTuple):
    """How hypergradients of an outer loss are computed.

    Attributes:
      estimator: The estimator.
      rates: Rates of Adam to try.
      min_step_cost: Smallest cost of a step per task, which sets the number of steps.
    """

    estimator: Any
    rates: tuple[float, ...]
    min_step_cost: dict[str, float]


TEN_STEPS = hg.Descent(optax.sgd(0.3, momentum=0.9), num_steps=10)
DESCENT_CONFIGS = {
    "converged": DescentConfig(
        implicit_by_cg(TRAINING, rtol=1e-2, max_steps=100),
        (0.01, 0.03, 0.1, 0.3),
        {"noisy digits": 30.0, "few words": 10.0},
    ),
    "truncated": DescentConfig(
        hg.Unrolled(TEN_STEPS, warm_start=True),
        (0.003, 0.01, 0.03, 0.1),
        dict.fromkeys(TASKS, 41.0),
    ),
    "joint": DescentConfig(
        hg.SOBA(optax.sgd(0.1)), (0.001, 0.003, 0.01, 0.03), dict.fromkeys(TASKS, 2.7)
    ),
}
SEARCHERS = {"random": hg.searchers.Random(), "TPE": hg.searchers.TPE()}
HALF_WIDTHS = {  # of a box around the start
    "noisy digits": (0.25, 0.5, 1.0, 2.0),
    "few words": (0.5, 1.0, 2.0, 4.0),
}
UNTUNED = "untuned"


class Method(NamedTuple):
    """A row: an outer loss and an estimator, or an exact metric and a searcher.

    Attributes:
      metric: The metric whose loss or exact value is optimized, or "cross-entropy".
      kind: Key of `DESCENT_CONFIGS` or `SEARCHERS`.
    """

    metric: str
    kind: str

    @property
    def is_descent(self) -> bool:
        """Whether the method uses hypergradients."""
        return self.kind in DESCENT_CONFIGS

    @property
    def name(self) -> str:
        """The label of the row."""
        if self.is_descent:
            return f"{LOSSES[self.metric]}, {self.kind}"
        return f"{self.kind}, {self.metric}"

    def settings(self, task: str) -> tuple[float, ...]:
        """Returns the settings that are tried."""
        if self.is_descent:
            return DESCENT_CONFIGS[self.kind].rates
        return HALF_WIDTHS[task]


DESCENTS = [Method(metric, kind) for metric in LOSSES for kind in DESCENT_CONFIGS]
SEARCHES = [Method(metric, kind) for metric in METRICS for kind in SEARCHERS]
LEARNED = {method.name: method for method in (*DESCENTS, *SEARCHES)}
METHODS = (UNTUNED, *PENALTY_ROWS, *LEARNED)


# The parts of all runs.


def with_held_out(splits: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns splits with a third of validation, padded, in place of the test data."""
    some, held_out = hold_out_third(splits["val"])
    missing = len(splits["test"]["use"]) - len(held_out["use"])
    pad = lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    return splits | {"val": some, "test": jax.tree.map(pad, held_out)}


def run_splits(task: str, seed: int) -> dict[str, PyTree]:
    """Returns the splits of a seed; those of tuning are without the test data."""
    splits = splits_of(task, seed)
    return with_held_out(splits) if seed in TUNING_SEEDS else splits


def training(task: str, w: PyTree, alpha: PyTree, train: PyTree) -> Any:
    """Returns ``w`` as a trial trains it, and its gradient-equivalents."""
    loss, key = SYSTEMS[task].train_loss, jax.random.key(0)
    w, stats = TRAINING.solve(loss, w, alpha, train, key)
    counts = {name: stats[name] for name in ("num_grads", "num_hvps", "num_values")}
    return w, hg.cost.cost_stats(train, train, **counts)["gradient_equivalents"]


@functools.lru_cache(maxsize=16)
def init_point(task: str, seed: int) -> tuple[PyTree, PyTree, float]:
    """Returns the baseline's ``(alpha, w, cost)``, at which every run starts."""
    alpha, _ = first_model(task, seed)
    train = splits_of(task, seed)["train"]
    w, cost = program(training, task)(SYSTEMS[task].start(seed), alpha, train)
    return alpha, w, float(cost)


# One function per argument, because programs compare metrics by identity.
@functools.cache
def exact_at(task: str, metric: str) -> Callable:
    """Returns ``(batch, w, alpha, key) -> exact metric``."""

    def value(batch, w, alpha, key):
        del alpha, key
        system = SYSTEMS[task]
        return exact_value(system, metric, system.views(w, batch)[metric])

    return value


@functools.cache
def coordinate(i: int) -> Callable:
    """Returns ``(w, alpha, key) -> the i-th number of alpha``."""
    return lambda w, alpha, key: ravel_pytree(alpha)[0][i]


EXACT = tuple(f"{part} {metric}" for part in ("val", "test") for metric in METRICS)


def recorded_metrics(
    task: str, alpha: PyTree, splits: dict[str, PyTree]
) -> dict[str, Callable]:
    """Returns the metrics of a run: exact metrics on two splits, and ``alpha``."""
    exact = {
        f"{part} {metric}": jax.tree_util.Partial(exact_at(task, metric), splits[part])
        for part in ("val", "test")
        for metric in METRICS
    }
    size = ravel_pytree(alpha)[0].size
    return exact | {str(i): coordinate(i) for i in range(size)}


# With hypergradients.


def num_steps_of(task: str, kind: str) -> int:
    """Returns the largest number of steps within the budget."""
    return math.ceil(BUDGETS[task] / DESCENT_CONFIGS[kind].min_step_cost[task])


def descend(
    task: str,
    metric: str,
    kind: str,
    w: PyTree,
    alpha: PyTree,
    splits: PyTree,
    rate: Array,
) -> dict[str, Array]:
    """Returns columns by step of Adam along the hypergradient of an outer loss."""
    system, num_steps = SYSTEMS[task], num_steps_of(task, kind)
    losses = system.train_loss, OBJECTIVES[LOSSES[metric]].loss(system)
    loop = hg.OuterLoop(
        hg.Bilevel(*losses, splits["train"], splits["val"]),
        DESCENT_CONFIGS[kind].estimator,
        optax.adam(rate),
        space=system.space,
        metrics=recorded_metrics(task, alpha, splits),
        eval_every=max(1, num_steps // NUM_EVALUATIONS),
    )
    trace = loop.run(loop.init(w, alpha), num_steps=num_steps)
    return trace.metrics | {"cost": trace.cost}


def run_descent(task: str, method: Method, seed: int, rate: float) -> dict:
    """Returns the columns of a run with hypergradients."""
    alpha, w, _ = init_point(task, seed)
    splits = dict(run_splits(task, seed))
    t = temperature(task, OBJECTIVES[LOSSES[method.metric]])(w, splits["val"])
    splits["val"] = at_temperature(splits["val"], t)
    run = program(descend, task, *method)
    columns = run(w, alpha, splits, jnp.asarray(rate, float))
    return {name: np.asarray(x, float) for name, x in columns.items()}


# Without.


def box_around(task: str, alpha: PyTree, half_width: float) -> PyTree:
    """Returns a box around ``alpha``, within that of the task."""
    return jax.tree.map(
        lambda space, x: hg.spaces.Interval(
            np.maximum(x - half_width, space.low),
            np.minimum(x + half_width, space.high),
            shape=x.shape,
        ),
        SYSTEMS[task].space,
        jax.tree.map(np.asarray, alpha),
        is_leaf=lambda x: isinstance(x, hg.spaces.Interval),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def run_trials(task: str, metric: str, kind: str, seed: int, half_width: float) -> dict:
    """Returns the trials of a search for the exact metric of validation."""
    alpha, w, init_cost = init_point(task, seed)
    splits = run_splits(task, seed)
    losses = SYSTEMS[task].train_loss, minus_exact(task, metric)
    trace = hg.search(
        hg.Bilevel(*losses, splits["train"], splits["val"]),
        TRAINING, SEARCHERS[kind], w,
        space=box_around(task, alpha, half_width),
        budget=BUDGETS[task] - init_cost,
        key=jax.random.key(seed),
        metrics=recorded_metrics(task, alpha, splits),
    )  # fmt: skip
    columns = trace.metrics | {"cost": trace.cost}
    return {name: np.asarray(x, float) for name, x in columns.items()}


def run_search(task: str, method: Method, seed: int, half_width: float) -> dict:
    """Returns the columns of a search."""
    # Random search proposes the same trials for each metric.
    metric = METRICS[0] if method.kind == "random" else method.metric
    return run_trials(task, metric, method.kind, seed, half_width)


# One run.


def improving(values: np.ndarray) -> np.ndarray:
    """Returns the indices of the trials that are better than all before."""
    best = np.maximum.accumulate(values)
    return np.flatnonzero(np.diff(best, prepend=-np.inf) > METRIC_TOL)


def evaluate_run(
    columns: dict, init: dict, budget: float, search_metric: str | None
) -> Row:
    """Returns the part of a run within the budget, and the model that it returns.

    A descent returns its last model within the budget. A search returns the model that
    is best on validation, or the initial one if no trial is better.

    Args:
      columns: Values by step, NaN where nothing was evaluated; ``cost`` is cumulative.
      init: The same numbers of the initial model.
      budget: Largest cost.
      search_metric: Exact metric of a search; None for a descent.
    """
    cost = init["cost"] + columns["cost"]
    is_evaluated = np.all([np.isfinite(columns[name]) for name in EXACT], axis=0)
    indices = np.flatnonzero(is_evaluated & (cost <= budget))
    course = {name: np.append(init[name], columns[name][indices]) for name in columns}
    course["cost"] = np.append(init["cost"], cost[indices])
    total_cost = float(course["cost"][-1])
    if search_metric is not None:
        best = improving(course[f"val {search_metric}"])
        course = {name: column[best] for name, column in course.items()}
    axes = sorted(filter(str.isdigit, columns), key=int)
    return {name: float(course[name][-1]) for name in EXACT} | {
        "gradient_equivalents": total_cost,
        "evaluations": int(indices.size),
        "curve_cost": course["cost"].tolist(),
        "curve": {m: course[f"val {m}"].tolist() for m in METRICS},
        "alpha": [float(course[axis][-1]) for axis in axes],
    }


def exact_metrics(task: str, w: PyTree, splits: dict[str, PyTree]) -> dict[str, float]:
    """Returns a model's exact metrics on validation and test data."""
    values = {part: evaluate_w(task, w, splits[part]) for part in ("val", "test")}
    return {f"{part} {m}": x[m] for part, x in values.items() for m in METRICS}


def init_columns(task: str, seed: int) -> dict[str, float]:
    """Returns the columns of the initial model of all runs."""
    alpha, w, cost = init_point(task, seed)
    flat = np.asarray(ravel_pytree(alpha)[0], float)
    axes = {str(i): float(x) for i, x in enumerate(flat)}
    return exact_metrics(task, w, run_splits(task, seed)) | axes | {"cost": cost}


@functools.lru_cache(maxsize=64)
def run(task: str, name: str, seed: int, setting: float) -> Row:
    """Returns a learned row at a setting."""
    method = LEARNED[name]
    run_method = run_descent if method.is_descent else run_search
    columns = run_method(task, method, seed, setting)
    init = init_columns(task, seed)
    search_metric = None if method.is_descent else method.metric
    row = evaluate_run(columns, init, BUDGETS[task], search_metric)
    return row | {"setting": setting}


def retrained(task: str, seed: int, flat: list[float]) -> dict[str, float]:
    """Returns the exact test metrics of a model trained to convergence."""
    alpha, _, _ = init_point(task, seed)
    flat_alpha, unravel = ravel_pytree(alpha)
    splits = run_splits(task, seed)
    alpha = unravel(jnp.asarray(flat, flat_alpha.dtype))
    values = evaluate_w(task, train(task, seed, alpha, splits["train"]), splits["test"])
    return {f"retrained {metric}": values[metric] for metric in METRICS}


def run_baseline(task: str, name: str, seed: int) -> Row:
    """Returns a row that learns at most one penalty."""
    splits = run_splits(task, seed)
    if name == UNTUNED:
        w = train(task, seed, SYSTEMS[task].alpha, splits["train"])
    else:
        w = tune_penalty(task, PENALTY_ROWS[name], seed)["w"]
    return exact_metrics(task, w, splits)


# Tuning.


def score(row: Row, metric: str) -> float:
    """Returns the row's own metric, for cross-entropy the mean; higher is better.

    In tuning runs the held-out data are in place of the test data.
    """
    metrics = METRICS if metric == "cross-entropy" else (metric,)
    return float(np.mean([row[f"test {metric}"] for metric in metrics]))


@functools.cache
def tune(task: str, name: str) -> Row:
    """Returns the setting with the best mean score on the seeds of tuning."""
    metric, settings = LEARNED[name].metric, LEARNED[name].settings(task)
    choice = choose_on_seeds(
        lambda setting, seed: run(task, name, seed, setting),
        settings,
        lambda row: score(row, metric),
        higher_is_better=True,
    )
    return choice.row
