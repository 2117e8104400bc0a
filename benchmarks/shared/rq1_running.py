"""One run of any method on any system of `rq1`, and what it spent on what.

A run is judged by what its ``alpha`` is worth after a training of its own, which costs
it nothing. Its costs are kept in three parts: what trains `w`, what differentiates, and
what the outer loss takes. See README.md.
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
from hypergrad.cost import HVP_COST, VALUE_COST
from hypergrad.problem import full_batch
from hypergrad.studies.program import program
from hypergrad.studies.record import Row

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

GRID, NEAR = 9, 0.1  # points an axis; of the way from the grid's best to the start
TRAININGS = 100  # that the budget pays for
FIFTH = 5  # of the steps of a training, in a warm start
POINTS = 50  # at which a descent is evaluated, about
TUNING_SEEDS = (100, 101)
ADAM, SLOW = (0.1, 0.3, 1.0, 3.0, 10.0), (0.01, 0.03, 0.1, 0.3, 1.0)
OPERATIONS, WATTS, GRAMS = 5e9, 20.0, 400.0  # a second; drawn; a kilowatt-hour
PARTS = ("inner", "hypergradient", "outer")
COUNTED = (*PARTS, "products", "trusted")  # of a run, until there

SEARCHERS = {
    "grid": hg.searchers.Grid(GRID),
    "random": hg.searchers.Random(),
    "TPE": hg.searchers.TPE(),
    SHARING: hg.searchers.Random(),
}
SOLVE = hg.CG(rtol=1e-2, max_steps=10)
KEY = 0  # of every training


class Way(NamedTuple):
    """A method with hypergradients.

    make: (inner solver, how a single loop moves `w`) -> estimator.
    most: (gradients of its inner steps, weight of an outer gradient) -> what an
      estimate costs at most.
    rates: of Adam, to be tuned.
    beyond: products that an estimate makes beside the steps of CG.
    """

    make: Callable[[Any, optax.GradientTransformation], Any]
    most: Callable[[float, float], float]
    rates: tuple[float, ...] = ADAM
    beyond: int = 0


# An implicit estimate: at most 10 steps of CG, a product where it begins and one for
# the cross term, and two outer gradients. An unrolled one: its steps twice, a product
# each, the gradient whose norm it reports.
OF_IMPLICIT = lambda inner, outer: inner + HVP_COST * 12 + 2 * outer
OF_UNROLLED = lambda inner, outer: (2 + HVP_COST) * inner + 1 + outer
WAYS = {
    IMPLICIT: Way(
        lambda solver, _: hg.Implicit(solver, SOLVE, warm_start=False),
        OF_IMPLICIT, beyond=1,
    ),
    UNROLLED: Way(
        lambda solver, _: hg.Unrolled(solver, warm_start=False), OF_UNROLLED
    ),
    JOINT: Way(
        lambda _, joint: hg.SOBA(joint), lambda _, outer: HVP_COST + outer, SLOW
    ),
    WARM_IMPLICIT: Way(
        lambda solver, _: hg.Implicit(solver, SOLVE), OF_IMPLICIT, beyond=2
    ),
    WARM_UNROLLED: Way(
        lambda solver, _: hg.Unrolled(solver, warm_start=True), OF_UNROLLED
    ),
}  # fmt: skip
GOES_ON = (JOINT, WARM_IMPLICIT, WARM_UNROLLED, SHARING)  # from a `w` that was trained
METHODS = ("grid", "random", "TPE", IMPLICIT, UNROLLED, JOINT, WARM_IMPLICIT,
           WARM_UNROLLED, SHARING)  # fmt: skip


# Trainings.


def steps_of(task: str, method: str | None = None) -> int:
    """Inner steps of an estimate or a trial; of a training where no method is named."""
    num_steps = SYSTEMS[task].num_steps
    if method == JOINT:
        return 1
    return max(1, num_steps // FIFTH) if method in GOES_ON else num_steps


def train(task: str, method: str | None, problem: Any, w: Any, alpha: Any) -> PyTree:
    """``w`` after the steps of a training, or of a method's trial."""
    solver = SYSTEMS[task].solver(steps_of(task, method))
    return solver.solve(
        problem.inner_loss, w, alpha, problem.inner_data, jax.random.key(KEY)
    )[0]


def trial(task: str, method: str | None, problem: Any, w: Any, alpha: Any) -> Any:
    """The outer loss there, and ``w``; of a training it is ``h(alpha)``."""
    w = train(task, method, problem, w, alpha)
    batch = full_batch(problem.outer_data, jax.random.key(KEY))
    return problem.outer_value(w, alpha, batch), w


def value(
    task: str, problem: Any, first: PyTree, w: PyTree, alpha: PyTree, key: Array
) -> Array:
    """``h(alpha)`` as a metric, trained from ``first``."""
    del w, key
    return trial(task, None, problem, first, alpha)[0]


def start_of(task: str) -> PyTree:
    """The ``alpha`` at which descents begin."""
    return jax.tree.map(lambda x: jnp.asarray(x, float), SYSTEMS[task].alpha)


def trained(task: str, seed: int, alpha: PyTree) -> tuple[float, PyTree]:
    """``h(alpha)`` and its ``w``."""
    found, w = program(trial, task, None)(*problem_of(task, seed), alpha)
    return float(found), w


def outer_weight(problem: hg.Bilevel) -> float:
    """Of an outer gradient."""
    return hg.cost.outer_grad_cost(problem.inner_data, problem.outer_data)


def budget_of(task: str, problem: hg.Bilevel) -> float:
    """Gradient-equivalents of so many trainings and their values."""
    training = SYSTEMS[task].gradients * steps_of(task)
    return TRAININGS * (training + VALUE_COST * outer_weight(problem))


class Known(NamedTuple):
    """``h`` at the start, and the least on the grid."""

    start: float
    target: float

    @property
    def bound(self) -> float:
        """Where the target counts as reached."""
        return self.target + NEAR * max(self.start - self.target, 0.0)


@functools.cache
def known(task: str, seed: int) -> Known:
    """By the trials of the grid."""
    start, _ = trained(task, seed, start_of(task))
    return Known(start, float(whole_grid(task, seed)["h"].min()))


@functools.cache
def whole_grid(task: str, seed: int) -> dict:
    """Its columns; all of its trials are made, since they are the target."""
    return seek(task, "grid", seed)


# Runs, as columns: ``h`` of what would be returned, the parts of a step's cost, its
# products, and whether its estimate is trusted.


def first_cost(task: str, method: str) -> float:
    """Of the training from whose ``w`` a method goes on."""
    return SYSTEMS[task].gradients * steps_of(task) * (method in GOES_ON)


def descend(task: str, method: str, problem: Any, w: Any, rate: Array) -> dict:
    """Adam along the hypergradient of a method."""
    system, way, alpha = SYSTEMS[task], WAYS[method], start_of(task)
    first = train(task, None, problem, w, alpha) if method in GOES_ON else w
    inner, outer = inner_cost(task, method), outer_weight(problem)
    h = jax.tree_util.Partial(functools.partial(value, task), problem, w)
    paid = budget_of(task, problem) - first_cost(task, method)
    num_steps = max(1, int(paid / way.most(inner, outer)))
    loop = hg.OuterLoop(
        problem,
        estimator_of(task, method),
        optax.adam(rate),
        space=system.space,
        metrics={"h": h},
        eval_every=max(1, num_steps // POINTS),
    )
    trace = loop.run(loop.init(first, alpha), num_steps=num_steps)
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
        "trusted": jnp.asarray(stats["trusted"], float),
    }


def inner_cost(task: str, method: str) -> float:
    """Gradients by which ``w`` moves in an estimate or a trial."""
    return 1.0 if method == JOINT else SYSTEMS[task].gradients * steps_of(task, method)


def estimator_of(task: str, method: str) -> Any:
    """With the inner solver of the task."""
    system = SYSTEMS[task]
    return WAYS[method].make(system.solver(steps_of(task, method)), system.joint)


COORDINATES = {
    "0": lambda w, alpha, key: jax.tree.leaves(alpha)[0],
    "1": lambda w, alpha, key: jax.tree.leaves(alpha)[1],
}


def seek(task: str, method: str, seed: int, bound: float = -math.inf) -> dict:
    """Trials until one is at the bound, or the budget is spent."""
    system, (problem, w) = SYSTEMS[task], problem_of(task, seed)
    if method in GOES_ON:
        _, w = trained(task, seed, start_of(task))
    trace = hg.search(
        problem, system.solver(steps_of(task, method)),
        Until(SEARCHERS[method], bound, math.inf), w,
        space=system.space,
        budget=budget_of(task, problem) - first_cost(task, method),
        key=jax.random.key(seed),
        metrics=COORDINATES,
    )  # fmt: skip
    stats = {name: np.asarray(x, float) for name, x in trace.stats.items()}
    outer = VALUE_COST * outer_weight(problem) * stats["num_outer_values"]
    inner = stats["gradient_equivalents"] - outer
    none = 0 * inner
    columns = {"inner": inner, "hypergradient": none, "outer": outer}
    h = np.nan_to_num(np.asarray(trace.value, float), nan=np.inf)
    if method == "grid":  # all its trials cost the same
        h = np.random.default_rng(seed).permutation(h)
    alpha = np.stack([np.asarray(trace.metrics[name]) for name in COORDINATES], axis=1)
    if method == SHARING:
        h = of_incumbents(h, lambda index: at(task, seed, alpha[index]))
    columns |= {"products": none, "trusted": none}
    return {"h": np.minimum.accumulate(h)} | columns


def at(task: str, seed: int, alpha: np.ndarray) -> float:
    """``h`` at the two numbers."""
    leaves = [jnp.asarray(x, float) for x in alpha]
    structure = jax.tree.structure(SYSTEMS[task].alpha)
    return trained(task, seed, structure.unflatten(leaves))[0]


def of_incumbents(values: np.ndarray, truth: Callable[[int], float]) -> np.ndarray:
    """``truth`` of the index of the lowest value so far, at every trial."""
    best = np.minimum.accumulate(values)
    first = np.searchsorted(-best, -best)  # where the best so far was found
    told = {index: truth(int(index)) for index in np.unique(first)}
    return np.array([told[index] for index in first])


def run(task: str, method: str, seed: int, setting: float) -> Row:
    """Whether it was there, and what it had spent by then."""
    problem, w = problem_of(task, seed)
    of = known(task, seed)
    if method in WAYS:
        columns = program(descend, task, method)(
            problem, w, jnp.asarray(setting, float)
        )
        columns = {name: np.asarray(x, float) for name, x in columns.items()}
    elif method == "grid":
        columns = whole_grid(task, seed)
    else:  # shared weights do not tell when a candidate is there
        columns = seek(task, method, seed, -math.inf if method == SHARING else of.bound)
    row = judged(columns, first_cost(task, method), of, budget_of(task, problem))
    return row | {"setting": setting, "start": of.start, "target": of.target}


def judged(columns: dict[str, np.ndarray], first: float, of: Known, most: float) -> Row:
    """What of a run is within the budget.

    cost: until there; None for a run that never was, whose ``spent`` is a lower bound.
    The parts, steps, products and trusted estimates are those until there, or of all
    that was spent; left of the way from the target to the start is what the best
    evaluation leaves.
    """
    spent = {name: np.cumsum(columns[name]) for name in COUNTED}
    spent["inner"] = spent["inner"] + first
    total, h = np.sum([spent[name] for name in PARTS], axis=0), columns["h"]
    paid = np.flatnonzero(np.isfinite(h) & (total <= most))
    if not paid.size:
        nothing = dict.fromkeys((*COUNTED, "steps"), 0.0)
        nothing |= {"inner": first}
        return {"cost": None, "spent": first, "left": None, "evaluations": 0} | nothing
    there = paid[h[paid] <= of.bound]
    last = there[0] if there.size else paid[-1]
    left = (h[paid].min() - of.target) / max(of.start - of.target, 1e-12)
    return {
        "cost": float(total[last]) if there.size else None,
        "spent": float(total[paid[-1]]),
        "left": float(left),
        "evaluations": int(paid.size),
        "steps": int(last) + 1,
    } | {name: float(spent[name][last]) for name in COUNTED}


def score(row: Row, most: float) -> float:
    """What tuning makes small: log cost, beyond the budget by what is left."""
    if row["cost"] is not None:
        return math.log(row["cost"])
    left = math.inf if row["left"] is None else row["left"]
    return math.log(most) + min(math.log(max(left, NEAR) / NEAR), 10.0)


def paid_for(row: Row) -> float:
    """Its cost, of a run that was never there all it spent."""
    return row["spent"] if row["cost"] is None else row["cost"]


@functools.cache
def tuned(task: str, method: str) -> Row:
    """The setting with the least mean score on the seeds for tuning.

    tuning_cost: of all these runs until there, of one that never was all it spent.
    """
    if method not in WAYS:
        return {"setting": 0.0, "score": None, "tuning_cost": 0.0}
    settings = WAYS[method].rates
    runs = [[run(task, method, seed, x) for seed in TUNING_SEEDS] for x in settings]
    most = budget_of(task, problem_of(task, TUNING_SEEDS[0])[0])
    scores = [float(np.mean([score(row, most) for row in of])) for of in runs]
    best = int(np.argmin(scores))
    return {
        "setting": settings[best],
        "score": scores[best],
        "tuning_cost": sum(paid_for(row) for of in runs for row in of),
    }


# Operations.


class Operations(NamedTuple):
    """Of the training that a run goes on from, of a step, and of a step of CG."""

    first: float
    step: float
    solve: float
    unknown: tuple[str, ...]


def estimate(task: str, method: str, problem: Any, w: Any, alpha: Any) -> Any:
    """All of one, from a fresh state."""
    estimator, key = estimator_of(task, method), jax.random.key(KEY)
    state = estimator.init(problem, w, alpha, key)
    return estimator.estimate(problem, state, alpha, key)


@functools.cache
def operations(task: str, method: str) -> Operations:
    """By the traced programs, which are the same on every seed."""
    given = *problem_of(task, 0), start_of(task)
    count = lambda function, *names: hg.cost.flops(
        functools.partial(function, task, *names), *given
    )
    first = count(train, None).total() if method in GOES_ON else 0.0
    step = count(estimate if method in WAYS else trial, method)
    solve = sum(loop.flops for loop in step.loops)
    return Operations(first, step.fixed, solve, step.unknown)


def flops_of(task: str, method: str, row: Row) -> Row:
    """Operations of the steps in a row, and grams of CO2 by the stated power."""
    of = operations(task, method)
    beyond = WAYS[method].beyond if method in WAYS else 0
    solves = max(row["products"] - beyond * row["steps"], 0.0) if of.solve else 0.0
    total = of.first + of.step * row["steps"] + of.solve * solves
    spent = hg.cost.energy(total / OPERATIONS, watts=WATTS, grams_per_kwh=GRAMS)
    return {"flops": total, "grams": spent.grams, "unknown": list(of.unknown)}
