"""The table of physics: weights of a loss's terms, learned on held-out sensors.

What a row spends on its weights it lacks in training: all have one budget, which equal
weights spend on nothing but training steps.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import plots
from ..estimators import Estimator, FiniteDifference, Implicit, Unrolled
from ..inner import Descent
from ..linear import CG
from ..minimize import minimize
from ..searchers import Random
from ..tasks.physics import SOLVER, TERMS, burgers_reference, data_name, make
from ..trace import Trace
from .program import program, search
from .record import Row
from .study import MODEL, Column, Study, task_data, trace_columns, tune_and_run
from .verdict import Claim

SYSTEMS = ("poisson", "burgers")
BUDGET = 6000
LEARNING = BUDGET // 2  # for the weights; the rest for the training that follows
RATES = (0.05, 0.15)  # of Adam, on the weights
GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)  # one weight, of boundary and data
TRIAL = 500  # steps of a draw of random search
LEAST = 1.3  # times smaller than with equal weights, on burgers


def trainer(num_steps: int) -> Descent:
    """Returns Adam with a cosine schedule from 0.01 to 0."""
    return Descent(optax.adam(optax.cosine_decay_schedule(1e-2, num_steps)), num_steps)


TRIAL_SOLVER = trainer(TRIAL)
# A step costs T inner gradients, and two outer ones that count 1 each; T products of 2;
# 2 a product of CG, at most 10 and two; or one outer and three inner gradients.
STEPS = SOLVER.num_steps
ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "unrolled": (
        Unrolled(SOLVER, checkpoint=False, warm_start=True), 3 * STEPS + 2
    ),
    "implicit": (
        Implicit(SOLVER, CG(rtol=1e-2, max_steps=10), damping=1.0), STEPS + 2 + 2 * 12
    ),
    "finite difference": (FiniteDifference(SOLVER), STEPS + 3 + 1),
}  # fmt: skip


def learn(system: str, method: str, key: Array, hold_out: Array, rate: Array) -> Trace:
    """Returns the trace of a method with as many outer steps as fit the budget."""
    task = make(key=key, variant=system, hold_out=hold_out)
    estimator, cost = ESTIMATORS[method]
    return minimize(
        task.problem,
        estimator,
        optax.adam(rate),
        task.w,
        task.alpha,
        num_steps=int(LEARNING / cost),
        key=key,
        space=task.space,
    )


def finish(
    system: str, num_steps: int, key: Array, hold_out: Array, w: PyTree, alpha: PyTree
) -> dict[str, Any]:
    """Returns measurements after training from ``w`` with the weights.

    ``selection`` is minus the error at held-out sensors.
    """
    task = make(key=key, variant=system, hold_out=hold_out)
    problem, val = task.problem, task.problem.outer_data
    solver = trainer(num_steps)
    w, _ = solver.solve(problem.inner_loss, w, alpha, problem.inner_data, key)
    held = val | {"use": 1 - val["use"]}
    return {
        "w": w,
        "selection": -problem.outer_value(w, alpha, held),
        "val_loss": problem.outer_value(w, alpha, val),
        **task.metric_values(w, alpha, key),
    }


def row(system: str, method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned by `tune_and_run`."""
    key = jax.random.key(seed)
    learned = method in ESTIMATORS
    num_steps = LEARNING if learned or method == "random search" else BUDGET

    def run_once(setting: float, hold_out: bool) -> Row:
        task = make(key=key, variant=system, hold_out=hold_out)
        w, alpha = task.w, task.alpha
        result: Row = {"gradient_equivalents": 0.0}
        start_time = time.perf_counter()
        if learned:
            run = program(learn, system, method)
            result = trace_columns(trace := run(key, hold_out, jnp.float32(setting)))
            w, alpha = trace.w, trace.alpha
        elif method == "random search":
            trace = search(
                task.problem, TRIAL_SOLVER, Random(), w, space=task.space,
                budget=LEARNING, key=key,
            )  # fmt: skip
            result = trace_columns(trace)
            w, alpha = trace.w, trace.alpha
        elif method == "one weight":
            alpha = alpha | {"boundary": setting, "data": setting}
        done = program(finish, system, num_steps)(key, hold_out, w, alpha)
        result |= {name: float(x) for name, x in done.items() if name != "w"}
        result[MODEL] = done["w"], alpha
        result |= {f"alpha_{name}": float(alpha[name]) for name in TERMS}
        result["gradient_equivalents"] += num_steps
        return result | {"run_seconds": time.perf_counter() - start_time}

    settings = {"one weight": GRID} | dict.fromkeys(ESTIMATORS, RATES)
    result = tune_and_run(run_once, settings.get(method, (1.0,)))
    if learned:
        seconds = program(learn, system, method).compile_seconds
        result |= {"compile_seconds": seconds}
    return result


def plot(rows: list[Row], path: Path) -> None:
    """Draws errors per seed and the learned weights of each system."""
    plots.physics(rows, SYSTEMS, path)


METHODS = ("equal weights", "one weight", "random search", *ESTIMATORS)

STUDY = Study(
    name="physics",
    paradigm="physics-informed",
    source="McClenny & Braga-Neto 2023 (arXiv 2009.04544)",
    about=(
        f"At most {BUDGET:,} gradient-equivalents (grad-eq) a run, for the weights and "
        "the training together. Error: relative L2, over points that no row has seen."
    ),
    data=lambda: (
        f"Poisson's equation, and {data_name('burgers')}; noisy sensors",
        burgers_reference(None)[1],
    ),
    split=lambda key: task_data(*(make(key=key, variant=s) for s in SYSTEMS)),
    methods={
        f"{system}, {method}": functools.partial(row, system, method)
        for system in SYSTEMS
        for method in METHODS
    },
    columns=(
        Column("error %", "relative_error", "{:.2f} ± {:.2f}", scale=100),
        Column("validation loss", "val_loss", "{:.5f}"),
    ),
    claims=tuple(
        Claim(
            f"{system}, {method}", f"{system}, {against}", "relative_error",
            LEAST if (system, against) == ("burgers", "equal weights") else None,
            lower=True, ratio=True,
        )
        for against in ("equal weights", "one weight", "random search")
        for system in SYSTEMS
        for method in ESTIMATORS
    ),
    draw=plot,
    minutes=12,
    seeds=10,
)  # fmt: skip
