"""One run of any method on any system of the table `rq1`, with the parts of its cost.

A run is evaluated by the outer loss after a training with its ``alpha``, which is not
counted. Its cost has three parts: training of ``w``, differentiation, and the outer
loss.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.batches import full_batch
from hypergrad.bench import Row
from hypergrad.cost import HVP_COST, VALUE_COST

from .program import program
from .rq1_tasks import (
    IMPLICIT,
    JOINT,
    SHARING,
    SYSTEMS,
    UNROLLED,
    WARM_IMPLICIT,
    WARM_UNROLLED,
    problem_of,
)
from .searching import Until
from .tuning import TUNING_SEEDS, choose_on_seeds

GRID_SIDE = 9  # points per axis of the grid
NEAR = 0.1  # of the way from the best point of the grid to the start
NUM_TRAININGS = 100  # within the budget
WARM_START_FACTOR = 5  # steps of a training over those of a warm-started estimate
NUM_EVALUATIONS = 50  # of a descent, about
RATES, SLOW_RATES = (0.1, 0.3, 1.0, 3.0, 10.0), (0.01, 0.03, 0.1, 0.3, 1.0)
#: Assumed operations per second, watts, and grams of CO2 per kilowatt-hour.
OPERATIONS, WATTS, GRAMS = 5e9, 20.0, 400.0
PARTS = ("inner", "hypergradient", "outer")
COUNTED = (*PARTS, "products")  # of a run, until the target

SEARCHERS = {
    "grid": hg.searchers.Grid(GRID_SIDE),
    "random": hg.searchers.Random(),
    "TPE": hg.searchers.TPE(),
    SHARING: hg.searchers.Random(),
}
SOLVE = hg.CG(rtol=1e-2, max_steps=10, preconditioner=None)


class Descent(NamedTuple):
    """A method with hypergradients.

    Attributes:
      make: ``(inner solver, optimizer of w in a single loop) -> estimator``.
      max_cost: ``(inner gradients, weight of an outer gradient) -> cost``, the largest
        cost of an estimate.
      rates: Rates of Adam to try.
      extra_products: Products of an estimate in addition to the steps of CG.
    """

    make: Callable[[Any, optax.GradientTransformation], Any]
    max_cost: Callable[[float, float], float]
    rates: tuple[float, ...] = RATES
    extra_products: int = 0


# An implicit estimate makes at most 10 steps of CG, one product at the start, one for
# the cross term, and two outer gradients. An unrolled estimate makes its steps twice, a
# product per step, and the gradient whose norm it reports.
IMPLICIT_COST = lambda inner, outer: inner + HVP_COST * 12 + 2 * outer
UNROLLED_COST = lambda inner, outer: (2 + HVP_COST) * inner + 1 + outer
DESCENTS = {
    IMPLICIT: Descent(
        lambda solver, _: hg.Implicit(
            solver, SOLVE, warm_start=False, estimate_error=False
        ),
        IMPLICIT_COST, extra_products=1,
    ),
    UNROLLED: Descent(
        lambda solver, _: hg.Unrolled(solver, checkpoint=True, warm_start=False),
        UNROLLED_COST,
    ),
    JOINT: Descent(
        lambda _, joint: hg.SOBA(joint), lambda _, outer: HVP_COST + outer, SLOW_RATES
    ),
    WARM_IMPLICIT: Descent(
        lambda solver, _: hg.Implicit(solver, SOLVE, estimate_error=False),
        IMPLICIT_COST, extra_products=2,
    ),
    WARM_UNROLLED: Descent(
        lambda solver, _: hg.Unrolled(solver, checkpoint=True, warm_start=True),
        UNROLLED_COST,
    ),
}  # fmt: skip
#: Methods that start from a trained ``w``.
WARM_STARTED = (JOINT, WARM_IMPLICIT, WARM_UNROLLED, SHARING)
METHODS = ("grid", "random", "TPE", IMPLICIT, UNROLLED, JOINT, WARM_IMPLICIT,
           WARM_UNROLLED, SHARING)  # fmt: skip


# Trainings.


def num_steps_of(task: str, method: str | None = None) -> int:
    """Returns the inner steps of an estimate or a trial; of a training without one."""
    num_steps = SYSTEMS[task].num_steps
    if method == JOINT:
        return 1
    return (
        max(1, num_steps // WARM_START_FACTOR) if method in WARM_STARTED else num_steps
    )


def train(task: str, method: str | None, problem: Any, w: Any, alpha: Any) -> PyTree:
    """Returns ``w`` after the steps of a training, or of a method's trial."""
    solver = SYSTEMS[task].solver(num_steps_of(task, method))
    return solver.solve(
        problem.inner_loss, w, alpha, problem.inner_data, jax.random.key(0)
    )[0]


def trial(task: str, method: str | None, problem: Any, w: Any, alpha: Any) -> Any:
    """Returns outer loss and ``w`` after a trial; ``h(alpha)`` for a training."""
    w = train(task, method, problem, w, alpha)
    batch = full_batch(problem.outer_data, jax.random.key(0))
    return problem.outer_value(w, alpha, batch), w


def value(
    task: str, problem: Any, init_w: PyTree, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    """Returns ``h(alpha)`` as a metric, trained from ``init_w``."""
    del w, key
    return trial(task, None, problem, init_w, alpha)[0]


def init_alpha(task: str) -> PyTree:
    """Returns the ``alpha`` at which descents start."""
    return jax.tree.map(lambda x: jnp.asarray(x, float), SYSTEMS[task].alpha)


def run_training(task: str, seed: int, alpha: PyTree) -> tuple[float, PyTree]:
    """Returns ``h(alpha)`` and its ``w``."""
    loss, w = program(trial, task, None)(*problem_of(task, seed), alpha)
    return float(loss), w


def outer_weight(problem: hg.Bilevel) -> float:
    """Returns the weight of an outer gradient."""
    return hg.cost.outer_grad_cost(problem.inner_data, problem.outer_data)


def budget_of(task: str, problem: hg.Bilevel) -> float:
    """Returns the gradient-equivalents of the trainings and values of the budget."""
    training = SYSTEMS[task].gradients * num_steps_of(task)
    return NUM_TRAININGS * (training + VALUE_COST * outer_weight(problem))


class Target(NamedTuple):
    """``h`` at the start, and its minimum on the grid."""

    start: float
    target: float

    @property
    def bound(self) -> float:
        """The value at which the target counts as reached."""
        return self.target + NEAR * max(self.start - self.target, 0.0)


@functools.cache
def target_of(task: str, seed: int) -> Target:
    """Returns the target by the trials of the grid."""
    start, _ = run_training(task, seed, init_alpha(task))
    return Target(start, float(whole_grid(task, seed)["h"].min()))


@functools.cache
def whole_grid(task: str, seed: int) -> dict:
    """Returns the columns of all trials of the grid, which define the target."""
    return search(task, "grid", seed)


# Runs as columns: ``h`` of the alpha that would be returned, the parts of the cost of a
# step, and its products.


def init_cost(task: str, method: str) -> float:
    """Returns the cost of the training from whose ``w`` a method starts."""
    return SYSTEMS[task].gradients * num_steps_of(task) * (method in WARM_STARTED)


def descend(task: str, method: str, problem: Any, w: Any, rate: Array) -> dict:
    """Returns the columns of Adam along the hypergradients of a method."""
    system, config, alpha = SYSTEMS[task], DESCENTS[method], init_alpha(task)
    init_w = train(task, None, problem, w, alpha) if method in WARM_STARTED else w
    inner, outer = inner_cost(task, method), outer_weight(problem)
    h = jax.tree_util.Partial(functools.partial(value, task), problem, w)
    budget = budget_of(task, problem) - init_cost(task, method)
    num_steps = max(1, int(budget / config.max_cost(inner, outer)))
    loop = hg.OuterLoop(
        problem,
        estimator_of(task, method),
        optax.adam(rate),
        space=system.space,
        metrics={"h": h},
        eval_every=max(1, num_steps // NUM_EVALUATIONS),
    )
    trace = loop.run(loop.init(init_w, alpha), num_steps=num_steps)
    stats = trace.stats
    total = stats["gradient_equivalents"]
    calls = stats["num_outer_grads"] + VALUE_COST * jnp.nan_to_num(
        stats["num_outer_values"]
    )
    return {
        "h": trace.metrics["h"],
        "inner": jnp.full(num_steps, inner),
        "hypergradient": total - inner - outer * calls,
        "outer": outer * calls,
        "products": stats["num_hvps"],
    }


def inner_cost(task: str, method: str) -> float:
    """Returns the gradients by which ``w`` moves in an estimate or a trial."""
    return (
        1.0 if method == JOINT else SYSTEMS[task].gradients * num_steps_of(task, method)
    )


def estimator_of(task: str, method: str) -> Any:
    """Returns the estimator with the inner solver of the task."""
    system = SYSTEMS[task]
    return DESCENTS[method].make(
        system.solver(num_steps_of(task, method)), system.joint
    )


COORDINATES = {
    "0": lambda w, alpha, key: jax.tree.leaves(alpha)[0],
    "1": lambda w, alpha, key: jax.tree.leaves(alpha)[1],
}


def search(task: str, method: str, seed: int, bound: float = -math.inf) -> dict:
    """Returns the columns of trials until the bound or the budget is reached."""
    system, (problem, w) = SYSTEMS[task], problem_of(task, seed)
    if method in WARM_STARTED:
        _, w = run_training(task, seed, init_alpha(task))
    trace = hg.search(
        problem, system.solver(num_steps_of(task, method)),
        Until(SEARCHERS[method], bound, math.inf), w,
        space=system.space,
        budget=budget_of(task, problem) - init_cost(task, method),
        key=jax.random.key(seed),
        metrics=COORDINATES,
    )  # fmt: skip
    stats = {name: np.asarray(x, float) for name, x in trace.stats.items()}
    outer = VALUE_COST * outer_weight(problem) * stats["num_outer_values"]
    inner = stats["gradient_equivalents"] - outer
    zeros = 0 * inner
    columns = {"inner": inner, "hypergradient": zeros, "outer": outer}
    h = np.nan_to_num(np.asarray(trace.value, float), nan=np.inf)
    if method == "grid":  # all its trials cost the same
        h = np.random.default_rng(seed).permutation(h)
    alpha = np.stack([np.asarray(trace.metrics[name]) for name in COORDINATES], axis=1)
    if method == SHARING:
        h = evaluate_incumbents(h, lambda index: h_at(task, seed, alpha[index]))
    columns |= {"products": zeros}
    return {"h": np.minimum.accumulate(h)} | columns


def h_at(task: str, seed: int, alpha: np.ndarray) -> float:
    """Returns ``h`` at two numbers."""
    leaves = [jnp.asarray(x, float) for x in alpha]
    structure = jax.tree.structure(SYSTEMS[task].alpha)
    return run_training(task, seed, structure.unflatten(leaves))[0]


def evaluate_incumbents(
    values: np.ndarray, evaluate: Callable[[int], float]
) -> np.ndarray:
    """Returns ``evaluate`` of the index of the lowest value so far, at every trial."""
    best = np.minimum.accumulate(values)
    indices = np.searchsorted(-best, -best)  # of the trials that were best so far
    results = {index: evaluate(int(index)) for index in np.unique(indices)}
    return np.array([results[index] for index in indices])


def run(task: str, method: str, seed: int, setting: float) -> Row:
    """Returns whether a run reaches the target, and its cost."""
    problem, w = problem_of(task, seed)
    target = target_of(task, seed)
    if method in DESCENTS:
        columns = program(descend, task, method)(
            problem, w, jnp.asarray(setting, float)
        )
        columns = {name: np.asarray(x, float) for name, x in columns.items()}
    elif method == "grid":
        columns = whole_grid(task, seed)
    else:  # the value by shared weights does not state whether the target is reached
        bound = -math.inf if method == SHARING else target.bound
        columns = search(task, method, seed, bound)
    budget = budget_of(task, problem)
    row = evaluate_run(columns, init_cost(task, method), target, budget)
    return row | {"setting": setting, "start": target.start, "target": target.target}


def evaluate_run(
    columns: dict[str, np.ndarray], init_cost: float, target: Target, budget: float
) -> Row:
    """Returns the part of a run that is within the budget.

    ``cost`` is that of reaching the target, or None if it is not reached; then the
    whole cost, ``gradient_equivalents``, is a lower bound. The parts of the cost,
    steps and products are those until the target, or of all.
    ``left`` is the remaining fraction of the way from the start to the target.
    """
    counts = {name: np.cumsum(columns[name]) for name in COUNTED}
    counts["inner"] = counts["inner"] + init_cost
    total, h = np.sum([counts[name] for name in PARTS], axis=0), columns["h"]
    indices = np.flatnonzero(np.isfinite(h) & (total <= budget))
    if not indices.size:
        row = {"cost": None, "gradient_equivalents": init_cost, "left": None}
        row |= {"evaluations": 0} | dict.fromkeys((*COUNTED, "steps"), 0.0)
        return row | {"inner": init_cost}
    reached = indices[h[indices] <= target.bound]
    last = reached[0] if reached.size else indices[-1]
    left = (h[indices].min() - target.target) / max(target.start - target.target, 1e-12)
    return {
        "cost": float(total[last]) if reached.size else None,
        "gradient_equivalents": float(total[indices[-1]]),
        "left": float(left),
        "evaluations": int(indices.size),
        "steps": int(last) + 1,
    } | {name: float(counts[name][last]) for name in COUNTED}


def score(row: Row, budget: float) -> float:
    """Returns the log cost, beyond the budget by what is left; lower is better."""
    if row["cost"] is not None:
        return math.log(row["cost"])
    left = math.inf if row["left"] is None else row["left"]
    return math.log(budget) + min(math.log(max(left, NEAR) / NEAR), 10.0)


def cost_or_bound(row: Row) -> float:
    """Returns the cost to reach the target, or the whole cost if it is missed."""
    return row["gradient_equivalents"] if row["cost"] is None else row["cost"]


@functools.cache
def tune(task: str, method: str) -> Row:
    """Returns the setting with the lowest mean score on the seeds of tuning.

    ``tuning_cost`` is the cost of all these runs until the target, or of a whole run if
    it misses the target.
    """
    if method not in DESCENTS:
        return {"setting": 0.0, "score": None, "tuning_cost": 0.0}
    budget = budget_of(task, problem_of(task, TUNING_SEEDS[0])[0])
    choice = choose_on_seeds(
        lambda setting, seed: run(task, method, seed, setting),
        DESCENTS[method].rates,
        lambda row: score(row, budget),
        cost=cost_or_bound,
    )
    return choice.row


# Operations.


class Operations(NamedTuple):
    """Operations of the initial training, of a step, and of a step of CG."""

    init: float
    step: float
    solve: float
    unknown: tuple[str, ...]


def estimate(task: str, method: str, problem: Any, w: Any, alpha: Any) -> Any:
    """Returns one estimate from a fresh state."""
    estimator, key = estimator_of(task, method), jax.random.key(0)
    state = estimator.init(problem, w, alpha, key)
    return estimator.estimate(problem, state, alpha, key)


@functools.cache
def operations(task: str, method: str) -> Operations:
    """Returns the operations of the traced programs, equal for all seeds."""
    args = *problem_of(task, 0), init_alpha(task)
    count = lambda function, *names: hg.cost.flops(
        functools.partial(function, task, *names), *args
    )
    init = count(train, None).total() if method in WARM_STARTED else 0.0
    step = count(estimate if method in DESCENTS else trial, method)
    solve = sum(loop.flops for loop in step.loops)
    return Operations(init, step.fixed, solve, step.unknown)


def flops_of(task: str, method: str, row: Row) -> Row:
    """Returns the operations of the steps of a row, and grams of CO2 by assumption."""
    per = operations(task, method)
    extra = DESCENTS[method].extra_products if method in DESCENTS else 0
    solves = max(row["products"] - extra * row["steps"], 0.0) if per.solve else 0.0
    total = per.init + per.step * row["steps"] + per.solve * solves
    energy = hg.cost.energy(total / OPERATIONS, watts=WATTS, grams_per_kwh=GRAMS)
    return {"flops": total, "grams": energy.grams, "unknown": list(per.unknown)}
