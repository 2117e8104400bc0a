"""The augmentation table: policies learned, searched, or one magnitude for all.

Each method ends with a policy; the network is trained with it from scratch, every step
on fresh noise, and measured on untouched test images, posed and upright. Penalty and,
where all operations share one magnitude, that share are those whose accuracy on 50
held-out validation images is best (ties: the lower loss there), after learning with the
other 150; the row then learns with all 200.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import plots
from ..estimators import Estimator, FiniteDifference, Implicit, Unrolled
from ..inner import Descent
from ..linear import Neumann
from ..minimize import minimize
from ..searchers import Random
from ..tasks.augmentation import (
    MAX_MAGNITUDES,
    OPERATIONS,
    POSE_MAGNITUDES,
    SIZES,
    SOLVER,
    accuracy,
    make,
    split,
    train_loss,
    val_loss,
)
from ..tasks.task import Task
from .program import Program, program, search
from .record import Row
from .study import (
    DIGITS,
    MODEL,
    Column,
    Study,
    digits,
    task_data,
    trace_columns,
    tune_and_run,
)
from .verdict import Claim

NUM_TRAIN, NUM_VAL, _ = SIZES["small"]
PENALTIES = (1e-4, 1e-3)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
BUDGET = 3000
FINAL = Descent(optax.sgd(optax.cosine_decay_schedule(0.3, 600), momentum=0.9), 600)
TRIAL = Descent(optax.sgd(0.1, momentum=0.9), num_steps=200)
ONE_STEP = Descent(optax.sgd(0.3), num_steps=1)

RunConfig = tuple[Array, Array, Array, Array]  # key, penalty, share, hold_out
OFTEN = 0.95  # the largest probability


def policy(magnitude: Any) -> PyTree:
    """Returns a policy that applies all operations with the largest probability."""
    m = jnp.asarray(magnitude, float)
    return {"magnitude": m, "probability": jnp.full_like(m, OFTEN)}


def gradient_method(estimator: Estimator, rate: float, cost_of_step: float) -> Callable:
    """Returns a method that makes as many steps of Adam as fit the budget."""
    num_steps = int(BUDGET / cost_of_step)

    def learn(task: Task, run_config: RunConfig) -> tuple[PyTree, Any]:
        trace = minimize(
            task.problem,
            estimator,
            optax.adam(rate),
            task.w,
            task.alpha,
            num_steps=num_steps,
            key=jax.random.fold_in(run_config[0], 1),
            space=task.space,
        )
        return trace.alpha, trace

    return learn


def random_search(task: Task, run_config: RunConfig) -> tuple[PyTree, Any]:
    """Returns the best of random policies on the validation data."""
    trace = search(
        task.problem,
        TRIAL,
        Random(),
        task.w,
        space=task.space,
        budget=BUDGET,
        key=jax.random.fold_in(run_config[0], 1),
    )
    return trace.best_alpha, trace


def one_magnitude(task: Task, run_config: RunConfig) -> tuple[PyTree, None]:
    """Returns a policy with the same fraction of each largest magnitude."""
    del task
    return policy(run_config[2] * MAX_MAGNITUDES), None


def true_pose(task: Task, run_config: RunConfig) -> tuple[PyTree, None]:
    """Returns the policy of the validation and test images."""
    del task, run_config
    return policy(POSE_MAGNITUDES), None


# Costs of a step in gradient-equivalents, at most: T inner gradients, outer gradients
# of 200 images against 100 (two where trust is judged), 2 a product of Neumann's 10 and
# the cross term; T more gradients and T products for the reverse pass; or the three
# gradients of a finite difference.
OUTER = NUM_VAL / NUM_TRAIN
METHODS: dict[str, Callable] = {
    "baseline": one_magnitude,
    "one magnitude": one_magnitude,
    "random search": random_search,
    "implicit": gradient_method(
        Implicit(SOLVER, Neumann(num_terms=10, step_size=0.1)),
        *(0.15, SOLVER.num_steps + 2 * 11 + 2 * OUTER),
    ),
    "unrolled": gradient_method(
        Unrolled(SOLVER, warm_start=True), 0.15, 4 * SOLVER.num_steps + 1 + OUTER
    ),
    "DADA": gradient_method(
        FiniteDifference(ONE_STEP, step_size=0.3), 0.03, 1 + 3 + OUTER
    ),
    "true pose": true_pose,
}
ON_HOST = "random search"
HYPERGRADIENTS = ("implicit", "unrolled", "DADA")


def settings(method: str) -> list[tuple[float, float]]:
    """Returns the pairs of penalty and magnitude that a method tries."""
    shares = SHARES if method == "one magnitude" else (0.0,)
    return [(penalty, share) for penalty in PENALTIES for share in shares]


def make_task(data: PyTree, run_config: RunConfig) -> Task:
    """Returns the task of a run."""
    key, penalty, _, hold_out = run_config
    return make(key=key, penalty=penalty, hold_out=hold_out, data=data)


def learn(method: str, data: PyTree, run_config: RunConfig) -> dict[str, Any]:
    """Returns the policy and the trace of a method."""
    alpha, trace = METHODS[method](make_task(data, run_config), run_config)
    return {"alpha": alpha, "trace": trace}


def evaluate(data: PyTree, run_config: RunConfig, alpha: PyTree) -> dict[str, Any]:
    """Returns measurements after training from scratch with the policy.

    ``selection`` contains the accuracy and minus the loss on held-out images.
    """
    task, key = make_task(data, run_config), run_config[0]
    held = split(data, jax.random.split(key)[0], SIZES["small"][:2], run_config[3])[
        "held_out"
    ]
    w, _ = FINAL.solve(
        train_loss, task.w, alpha, task.problem.inner_data, jax.random.fold_in(key, 2)
    )
    return task.metric_values(w, alpha, key) | {
        "w": w,
        "selection": jnp.stack(
            [accuracy(held, w, alpha, key), -val_loss(w, alpha, held)]
        ),
        "val_loss": val_loss(w, alpha, task.problem.outer_data),
    }


def row(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned by `tune_and_run`."""
    data, measure = digits(), program(evaluate)
    on_host = functools.partial(learn, method)
    run = on_host if method == ON_HOST else program(learn, method)

    def run_once(setting: tuple[float, float], hold_out: bool) -> Row:
        penalty, share = map(jnp.float32, setting)
        run_config = jax.random.key(seed), penalty, share, jnp.asarray(hold_out)
        start_time = time.perf_counter()
        learned = run(data, run_config)
        seconds = time.perf_counter() - start_time
        alpha, trace = learned["alpha"], learned["trace"]
        result = measure(data, run_config, alpha)
        row = {
            "selection": np.asarray(result["selection"]),
            "test_accuracy": float(result["test_accuracy"]),
            "upright_accuracy": float(result["upright_accuracy"]),
            "val_loss": float(result["val_loss"]),
            "penalty": setting[0],
            "magnitude": np.asarray(
                alpha["magnitude"] / MAX_MAGNITUDES, float
            ).tolist(),
            "probability": np.asarray(alpha["probability"], float).tolist(),
            "gradient_equivalents": float(FINAL.num_steps),
            "run_seconds": seconds,
            MODEL: (result["w"], alpha),
        }
        if trace is not None:
            row |= trace_columns(trace)
        return row

    result = tune_and_run(run_once, settings(method))
    if isinstance(run, Program):
        result |= {"compile_seconds": run.compile_seconds}
    return result


def beats(first: str, second: str, least: float | None) -> Claim:
    """Returns a claim about accuracy on posed test images in percentage points."""
    return Claim(first, second, "test_accuracy", least, scale=100, unit="points")


STUDY = Study(
    name="augmentation",
    paradigm="supervised",
    source="Li et al. 2020 (arXiv 2003.03780)",
    about=(
        f"{NUM_TRAIN} upright images to train on; validation ({NUM_VAL}) and test "
        f"images are turned by up to 45 degrees and moved by up to a pixel. At most "
        f"{BUDGET:,} gradient-equivalents (grad-eq) a run; of rows that learn nothing, "
        "those of one training. Accuracy on the untouched test images, posed and "
        "before that (upright); seconds are those of learning, without the final "
        "training, which is the same for every row."
    ),
    data=lambda: (DIGITS, digits()),
    split=lambda key: task_data(make(key=key, data=digits())),
    methods={method: functools.partial(row, method) for method in METHODS},
    columns=(
        Column("accuracy %", "test_accuracy", scale=100),
        Column("upright %", "upright_accuracy", scale=100),
    ),
    claims=(
        *(beats(method, "baseline", 10.0) for method in HYPERGRADIENTS),
        *(beats(method, "one magnitude", 0.0) for method in HYPERGRADIENTS),
        *(beats(method, "random search", 0.0) for method in HYPERGRADIENTS),
        beats("true pose", "implicit", None),
    ),
    draw=functools.partial(
        plots.augmentation, OPERATIONS, (POSE_MAGNITUDES / MAX_MAGNITUDES).tolist()
    ),
    minutes=2,
)
