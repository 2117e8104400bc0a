"""The hyper-cleaning table: every way to weigh the examples, one budget.

Each method learns weights, the model is retrained from zero with them to convergence,
and the result is measured on the untouched test split. The L2 penalty of every row is
the one whose accuracy on 50 held-out validation examples is best (ties: the lower
loss there), after learning with the other 100; the row then learns with all 150.
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
from ..tasks.cleaning import (
    NUM_TRAIN,
    NUM_VAL,
    SOLVER,
    accuracy,
    f1_of_wrong_labels,
    make,
    split,
    train_loss,
    val_loss,
)
from ..tasks.task import Task
from ..trace import Trace
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

PENALTIES = (1e-4, 1e-3, 1e-2)
BUDGET = 3000
OPTIMIZER = optax.adam(0.3)

RunConfig = tuple[Array, Array, Array]  # key, penalty, hold_out


def gradient_method(estimator: Estimator, cost_of_step: float) -> Callable:
    """Returns a method that makes as many outer steps as fit the budget."""
    num_steps = int(BUDGET / cost_of_step)

    def learn(task: Task, splits: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
        del splits
        trace = minimize(
            task.problem,
            estimator,
            OPTIMIZER,
            task.w,
            task.alpha,
            num_steps=num_steps,
            key=key,
            space=task.space,
        )
        return task.problem.inner_data, trace.alpha, trace

    return learn


def random_search(task: Task, splits: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """Returns the best of random weights on the validation data, at the same budget."""
    del splits
    trace = search(
        task.problem,
        task.solver,
        Random(),
        task.w,
        space=task.space,
        budget=BUDGET,
        key=key,
    )
    return task.problem.inner_data, trace.best_alpha, trace


def uniform(task: Task, splits: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """Returns weights of 1."""
    del splits, key
    return task.problem.inner_data, jnp.ones(NUM_TRAIN), None


def validation_only(task: Task, splits: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """Returns the clean validation examples as training data."""
    del key
    val = splits["val"]
    batch = {"x": val["x"], "y": val["y"]}
    batch["penalty"] = task.problem.inner_data["penalty"]
    return batch, val["use"] / jnp.mean(val["use"]), None


def clean_labels(task: Task, splits: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """Returns the training data with their original labels."""
    del key
    batch = task.problem.inner_data | {"y": splits["train"]["clean"]}
    return batch, jnp.ones(NUM_TRAIN), None


# Costs of a step in gradient-equivalents: T inner gradients, an outer gradient (two
# where trust is judged), and 2 a product (CG at most 20 and one; Neumann 19, 10 for its
# step size and one), or T more gradients and T products for the reverse pass.
OUTER = NUM_VAL / NUM_TRAIN
METHODS: dict[str, Callable] = {
    "baseline": uniform,
    "validation-only": validation_only,
    "random search": random_search,
    "implicit": gradient_method(
        Implicit(SOLVER, CG(rtol=1e-2, max_steps=20)),
        SOLVER.num_steps + 2 * 21 + 2 * OUTER,
    ),
    "neumann": gradient_method(
        Implicit(SOLVER, Neumann(num_terms=20)), SOLVER.num_steps + 2 * 30 + 2 * OUTER
    ),
    "unrolled": gradient_method(
        Unrolled(SOLVER, warm_start=True), 4 * SOLVER.num_steps + 1 + OUTER
    ),
    "oracle": clean_labels,
}
ON_HOST = "random search"
HYPERGRADIENTS = ("implicit", "neumann", "unrolled")


def make_task_and_splits(data: PyTree, run_config: RunConfig) -> tuple[Task, PyTree]:
    """Returns the task of a run and its splits."""
    key, penalty, hold_out = run_config
    task = make(key=key, penalty=penalty, hold_out=hold_out, data=data)
    return task, split(data, key, hold_out)


def learn(method: str, data: PyTree, run_config: RunConfig) -> dict[str, Any]:
    """Returns the data to retrain on, their weights and the trace of a method."""
    task, splits = make_task_and_splits(data, run_config)
    batch, alpha, trace = METHODS[method](
        task, splits, jax.random.fold_in(run_config[0], 1)
    )
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
    return {
        "w": w,
        "test_accuracy": task.metrics["test_accuracy"](w, alpha, key),
        "selection": jnp.stack(
            [accuracy(held, w, alpha, key), -val_loss(w, alpha, held)]
        ),
        "val_loss": val_loss(w, alpha, splits["val"]),
        "wrong": splits["train"]["wrong"],
    }


# Rows.


def row(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, whose penalty `tune_and_run` chooses."""
    data, measure = digits(), program(evaluate, method)
    on_host = functools.partial(learn, method)
    run = on_host if method == ON_HOST else program(learn, method)

    def run_once(penalty: float, hold_out: bool) -> Row:
        run_config = jax.random.key(seed), jnp.float32(penalty), jnp.asarray(hold_out)
        start_time = time.perf_counter()
        learned = run(data, run_config)
        seconds = time.perf_counter() - start_time
        result = measure(data, run_config, learned["batch"], learned["alpha"])
        numbers = {
            "selection": np.asarray(result["selection"]),
            "test_accuracy": float(result["test_accuracy"]),
            "val_loss": float(result["val_loss"]),
            "run_seconds": seconds,
            MODEL: (result["w"], learned["alpha"]),
        }
        if learned["trace"] is not None:
            alpha, wrong = learned["alpha"], result["wrong"]
            numbers |= {
                "f1": float(f1_of_wrong_labels(wrong, None, alpha, run_config[0]))
            }
            numbers |= of_weights(learned["trace"], alpha, wrong)
        return numbers

    result = tune_and_run(run_once, PENALTIES)
    if isinstance(run, Program):
        result |= {"compile_seconds": run.compile_seconds}
    return result


def of_weights(trace: Trace, alpha: Array, wrong: Array) -> Row:
    """Returns `trace_columns`, residuals and histograms of the weights."""
    count = lambda mask: np.histogram(alpha[mask], 40, (0, 1))[0].tolist()
    return trace_columns(trace) | {
        "adjoint_residual": float(jnp.max(trace.stats["adjoint_residual"])),
        "wrong_weights": count(wrong),
        "clean_weights": count(~wrong),
    }


STUDY = Study(
    name="cleaning",
    paradigm="supervised",
    source="Franceschi et al. 2017 (arXiv 1703.01785), section 5.1",
    about=(
        f"At most {BUDGET:,} gradient-equivalents (grad-eq) a run. Accuracy on the "
        "untouched test split; F1 of finding wrong labels; residual is the largest "
        "adjoint residual; seconds are those of learning, without the final training, "
        "which is the same for every row."
    ),
    data=lambda: (DIGITS, digits()),
    split=lambda key: task_data(make(key=key, data=digits())),
    methods={method: functools.partial(row, method) for method in METHODS},
    columns=(
        Column("accuracy %", "test_accuracy", scale=100),
        Column("F1", "f1", "{:.3f} ± {:.3f}"),
        Column("residual", "adjoint_residual", "{:.1e}", largest=True),
    ),
    claims=(
        *(
            Claim(
                *(method, "baseline", "test_accuracy"),
                least=2.0,
                scale=100,
                unit="points",
            )
            for method in HYPERGRADIENTS
        ),
        *(
            Claim(
                *("validation-only", method, "test_accuracy"),
                least=None,
                scale=100,
                unit="points",
            )
            for method in HYPERGRADIENTS
        ),
    ),
    draw=plots.cleaning,
    minutes=2,
    seeds=10,
)
