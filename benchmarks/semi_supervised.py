"""The semi-supervised table: every way to weigh pseudo-labelled examples, one budget.

Each method learns weights, the model is retrained from zero with them to convergence,
and the result is measured on the untouched test split. Penalty and, where all weights
are one number, that number are those whose accuracy on 33 held-out validation examples
is best (ties: the lower loss there), after learning with the other 67; the row then
learns with all 100.
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
from ..estimators import Estimator, Implicit, Unrolled
from ..inner import Newton
from ..linear import CG, Neumann
from ..minimize import minimize
from ..searchers import Random
from ..tasks.semi_supervised import (
    SIZES,
    SOLVER,
    accuracy,
    auroc_of_wrong_labels,
    make,
    split,
    train_loss,
    val_loss,
)
from ..tasks.task import Task
from .cleaning import of_weights
from .program import Program, program, search
from .record import Row
from .study import DIGITS, MODEL, Column, Study, digits, task_data, tune_and_run
from .verdict import Claim, Verdict, conclude, paired

NUM_LABELLED, NUM_VAL, NUM_UNLABELLED = SIZES["small"]
PENALTIES = (1e-3, 1e-2, 1e-1)
WEIGHTS = (0.1, 0.3, 1.0)
BUDGET = 3000
OPTIMIZER = optax.adam(0.3)
LEAST_AUROC = 0.8

RunConfig = tuple[Array, Array, Array, Array]  # key, penalty, weight, hold_out


def gradient_method(estimator: Estimator, cost_of_step: float) -> Callable:
    """Returns a method that makes as many outer steps as fit the budget."""
    num_steps = int(BUDGET / cost_of_step)

    def learn(
        task: Task, splits: PyTree, run_config: RunConfig
    ) -> tuple[Any, PyTree, Any]:
        del splits
        trace = minimize(
            task.problem,
            estimator,
            OPTIMIZER,
            task.w,
            task.alpha,
            num_steps=num_steps,
            key=jax.random.fold_in(run_config[0], 1),
            space=task.space,
        )
        return task.problem.inner_data, trace.alpha, trace

    return learn


def random_search(
    task: Task, splits: PyTree, run_config: RunConfig
) -> tuple[Any, PyTree, Any]:
    """Returns the best of random weights on the validation data, at the same budget."""
    del splits
    trace = search(
        task.problem,
        task.solver,
        Random(),
        task.w,
        space=task.space,
        budget=BUDGET,
        key=jax.random.fold_in(run_config[0], 1),
    )
    return task.problem.inner_data, trace.best_alpha, trace


def one_weight(
    task: Task, splits: PyTree, run_config: RunConfig
) -> tuple[Any, PyTree, Any]:
    """Returns the same weight for all pseudo-labels."""
    del splits
    return task.problem.inner_data, jnp.full(NUM_UNLABELLED, run_config[2]), None


def more_labels(
    task: Task, splits: PyTree, run_config: RunConfig
) -> tuple[Any, PyTree, Any]:
    """Returns the validation examples in place of the pseudo-labels."""
    del run_config
    val = splits["val"]
    batch = task.problem.inner_data | {"unlabeled": {"x": val["x"], "y": val["y"]}}
    return batch, val["use"] * NUM_VAL / NUM_LABELLED, None


def true_labels(
    task: Task, splits: PyTree, run_config: RunConfig
) -> tuple[Any, PyTree, Any]:
    """Returns the true labels in place of the pseudo-labels."""
    del run_config
    batch = task.problem.inner_data | {"unlabeled": splits["unlabeled"]}
    return batch, jnp.ones(NUM_UNLABELLED), None


# Costs of a step in gradient-equivalents, at most: T inner gradients, an outer gradient
# (two where trust is judged), and 2 a product (CG at most 20 and one; Neumann 19, 10
# for its step size and one), or T more gradients and T products for the reverse pass.
# Where two parts of the data differ in size an outer gradient counts as an inner one.
METHODS: dict[str, Callable] = {
    "baseline": one_weight,
    "one weight": one_weight,
    "labels of validation": more_labels,
    "random search": random_search,
    "implicit": gradient_method(
        Implicit(SOLVER, CG(rtol=1e-2, max_steps=20)), SOLVER.num_steps + 2 * 21 + 2
    ),
    "neumann": gradient_method(
        Implicit(SOLVER, Neumann(num_terms=20)), SOLVER.num_steps + 2 * 30 + 2
    ),
    "unrolled": gradient_method(
        Unrolled(SOLVER, warm_start=True), 4 * SOLVER.num_steps + 2
    ),
    "oracle": true_labels,
}
ON_HOST = "random search"
HYPERGRADIENTS = ("implicit", "neumann", "unrolled")


def settings(method: str) -> list[tuple[float, float]]:
    """Returns the pairs of penalty and weight that a method tries."""
    weights = {"baseline": (0.0,), "one weight": WEIGHTS}.get(method, (1.0,))
    return [(penalty, weight) for penalty in PENALTIES for weight in weights]


def make_task_and_splits(data: PyTree, run_config: RunConfig) -> tuple[Task, PyTree]:
    """Returns the task of a run and its splits."""
    key, penalty, _, hold_out = run_config
    task = make(key=key, penalty=penalty, hold_out=hold_out, data=data)
    return task, split(data, key, SIZES["small"], hold_out)


def learn(method: str, data: PyTree, run_config: RunConfig) -> dict[str, Any]:
    """Returns the data to retrain on, their weights and the trace of a method."""
    task, splits = make_task_and_splits(data, run_config)
    batch, alpha, trace = METHODS[method](task, splits, run_config)
    return {"batch": batch, "alpha": alpha, "trace": trace}


def evaluate(
    method: str, data: PyTree, run_config: RunConfig, batch: PyTree, alpha: Array
) -> dict[str, Any]:
    """Returns measurements after training to convergence with the learned weights.

    ``selection`` contains the accuracy and minus the loss on held-out examples.
    """
    del method  # what it retrains on has a size of its own
    task, splits = make_task_and_splits(data, run_config)
    key, held = run_config[0], splits["held_out"]
    w, _ = Newton().solve(train_loss, task.w, alpha, batch, key)
    pseudo = task.problem.inner_data["unlabeled"]["y"]
    return {
        "w": w,
        "test_accuracy": task.metrics["test_accuracy"](w, alpha, key),
        "selection": jnp.stack(
            [accuracy(held, w, alpha, key), -val_loss(w, alpha, held)]
        ),
        "val_loss": val_loss(w, alpha, splits["val"]),
        "wrong": pseudo != splits["unlabeled"]["y"],
    }


def row(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned by `tune_and_run`."""
    data, measure = digits(), program(evaluate, method)
    on_host = functools.partial(learn, method)
    run = on_host if method == ON_HOST else program(learn, method)

    def run_once(setting: tuple[float, float], hold_out: bool) -> Row:
        penalty, weight = map(jnp.float32, setting)
        run_config = jax.random.key(seed), penalty, weight, jnp.asarray(hold_out)
        start_time = time.perf_counter()
        learned = run(data, run_config)
        seconds = time.perf_counter() - start_time
        result = measure(data, run_config, learned["batch"], learned["alpha"])
        wrong = np.asarray(result["wrong"])
        row = {
            "selection": np.asarray(result["selection"]),
            "test_accuracy": float(result["test_accuracy"]),
            "val_loss": float(result["val_loss"]),
            "wrong_share": float(np.mean(wrong)),
            "penalty": setting[0],
            "run_seconds": seconds,
            MODEL: (result["w"], learned["alpha"]),
        }
        if learned["trace"] is not None:
            alpha, key = learned["alpha"], run_config[0]
            auroc = auroc_of_wrong_labels(result["wrong"], None, alpha, key)
            row |= {"auroc": float(auroc)}
            row |= of_weights(learned["trace"], alpha, result["wrong"])
        return row

    result = tune_and_run(run_once, settings(method))
    if isinstance(run, Program):
        result |= {"compile_seconds": run.compile_seconds}
    return result


def judge(rows: list[Row]) -> list[Verdict]:
    """Returns verdicts on the AUROC of low weights as detectors of wrong labels."""
    lines = []
    for method in HYPERGRADIENTS:
        auroc = [row["auroc"] for row in rows if row["method"] == method]
        mean, low, high = paired(auroc, 0.0)
        text = (
            f"{method} finds wrong pseudo-labels with an AUROC of {mean:.3f} "
            f"[{low:.3f}, {high:.3f}], at least {LEAST_AUROC} claimed"
        )
        half, chance = (high - low) / 2, LEAST_AUROC - 0.5
        lines.append(conclude(text, low >= LEAST_AUROC, len(auroc), half, chance))
    return lines


def beats(first: str, second: str, least: float | None) -> Claim:
    """Returns a claim about test accuracy in percentage points."""
    return Claim(first, second, "test_accuracy", least, scale=100, unit="points")


STUDY = Study(
    name="semi_supervised",
    paradigm="semi-supervised",
    source="Ren, Yeh & Schwing 2020 (arXiv 2007.01293)",
    about=(
        f"{NUM_LABELLED} labels, {NUM_VAL} for validation, {NUM_UNLABELLED:,} "
        f"unlabelled; at most {BUDGET:,} gradient-equivalents (grad-eq) a run. "
        "Accuracy on the untouched test split; AUROC of low weights as a detector of "
        "wrong pseudo-labels, whose share is beside it; seconds are those of learning, "
        "without the final training, which is the same for every row."
    ),
    data=lambda: (DIGITS, digits()),
    split=lambda key: task_data(make(key=key, data=digits())),
    methods={method: functools.partial(row, method) for method in METHODS},
    columns=(
        Column("accuracy %", "test_accuracy", scale=100),
        Column("AUROC", "auroc", "{:.3f} ± {:.3f}"),
        Column("wrong %", "wrong_share", scale=100),
    ),
    claims=(
        *(beats(method, "baseline", 2.0) for method in HYPERGRADIENTS),
        *(beats(method, "one weight", 0.0) for method in HYPERGRADIENTS),
        beats("one weight", "baseline", 0.0),
        *(beats("labels of validation", method, None) for method in HYPERGRADIENTS),
    ),
    draw=plots.cleaning,
    judge=judge,
    minutes=2,
    seeds=10,
)
