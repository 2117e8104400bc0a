"""The hyper-cleaning table: every way to weigh the examples, one budget.

Each method learns weights, the model is retrained from zero with them to convergence,
and the result is measured on the untouched test split. The L2 penalty of every row is
the one whose accuracy on 50 held-out validation examples is best (ties: the lower
loss there), after learning with the other 100; the row then learns with all 150.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import data as datasets
from .. import plots
from ..estimators import Estimator, Implicit, Unrolled
from ..inner import Newton
from ..linear import CG, Neumann
from ..minimize import minimize
from ..search import search
from ..searchers import Random
from ..tasks.cleaning import (
    NUM_TRAIN,
    NUM_VAL,
    SOLVER,
    accuracy,
    make,
    split,
    train_loss,
    val_loss,
)
from ..tasks.task import Task
from .study import Study

PENALTIES = (1e-4, 1e-3, 1e-2)
BUDGET = 3000
OPTIMIZER = optax.adam(0.3)

Lane = tuple[Array, Array, Array]  # key, penalty, hold_out


def by_gradient(estimator: Estimator, cost_of_step: float) -> Callable:
    """As many outer steps as the budget surely pays for."""
    num_steps = int(BUDGET / cost_of_step)

    def learn(task: Task, parts: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
        del parts
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


def by_random_search(task: Task, parts: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """Weights drawn uniformly, the best on validation kept, at the same budget."""
    del parts
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


def uniform(task: Task, parts: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """Every example counts in full."""
    del parts, key
    return task.problem.inner_data, jnp.ones(NUM_TRAIN), None


def validation_only(task: Task, parts: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """The clean validation examples in use are the training set."""
    del key
    val = parts["val"]
    batch = {"x": val["x"], "y": val["y"]}
    batch["penalty"] = task.problem.inner_data["penalty"]
    return batch, val["use"] / jnp.mean(val["use"]), None


def clean_labels(task: Task, parts: PyTree, key: Array) -> tuple[Any, PyTree, Any]:
    """The training labels before they were corrupted."""
    del key
    batch = task.problem.inner_data | {"y": parts["train"]["clean"]}
    return batch, jnp.ones(NUM_TRAIN), None


# Costs of a step in gradient-equivalents: T inner gradients, an outer gradient (two
# where trust is judged), and 2 a product (CG at most 20 and one; Neumann 19, 10 for its
# step size and one), or T more gradients and T products for the reverse pass.
OUTER = NUM_VAL / NUM_TRAIN
METHODS: dict[str, Callable] = {
    "baseline": uniform,
    "validation-only": validation_only,
    "random search": by_random_search,
    "implicit": by_gradient(
        Implicit(SOLVER, CG(rtol=1e-2, max_steps=20)),
        SOLVER.num_steps + 2 * 21 + 2 * OUTER,
    ),
    "neumann": by_gradient(
        Implicit(SOLVER, Neumann(num_terms=20)), SOLVER.num_steps + 2 * 30 + 2 * OUTER
    ),
    "unrolled": by_gradient(
        Unrolled(SOLVER, warm_start=True), 4 * SOLVER.num_steps + 1 + OUTER
    ),
    "oracle": clean_labels,
}
HYPERGRADIENTS = ("implicit", "neumann", "unrolled")


def lane_task(data: PyTree, lane: Lane) -> tuple[Task, PyTree]:
    """The task of one lane and its split."""
    key, penalty, hold_out = lane
    task = make(key=key, penalty=penalty, hold_out=hold_out, data=data)
    return task, split(data, key, hold_out)


def learn(method: str, data: PyTree, lane: Lane) -> dict[str, PyTree]:
    """Weights by one method: what to retrain on, and what learning cost."""
    task, parts = lane_task(data, lane)
    batch, alpha, trace = METHODS[method](task, parts, jax.random.fold_in(lane[0], 1))
    learned = {"batch": batch, "alpha": alpha}
    if trace is not None:
        learned |= {
            "curve_value": trace.value,
            "curve_cost": trace.cost,
            "num_hvps": jnp.sum(trace.stats["num_hvps"]),
            "adjoint_residual": jnp.max(trace.stats["adjoint_residual"]),
        }
    return learned


def evaluate(data: PyTree, lane: Lane, learned: dict[str, PyTree]) -> dict[str, Array]:
    """Retrains from zero with the learned weights, to convergence, and measures.

    ``selection`` holds the accuracy and minus the loss on the held-out examples.
    """
    task, parts = lane_task(data, lane)
    key, alpha = lane[0], learned["alpha"]
    w, _ = Newton().solve(train_loss, task.w, alpha, learned["batch"], key)
    held = parts["held"]
    measured = {
        "selection": jnp.stack(
            [accuracy(held, w, alpha, key), -val_loss(w, alpha, held)]
        ),
        "test_accuracy": task.metrics["test_accuracy"](w, alpha, key),
        "val_loss": val_loss(w, alpha, parts["val"]),
        "wrong": parts["train"]["wrong"],
    }
    if "curve_value" in learned:
        measured["f1"] = task.metrics["f1"](w, alpha, key)
    return measured


STUDY = Study(
    name="cleaning",
    source="Franceschi et al. 2017 (arXiv 1703.01785), section 5.1",
    data_name="scikit-learn digits (1,797 real 8x8 images)",
    methods=tuple(METHODS),
    on_host=("random search",),
    learned=HYPERGRADIENTS,
    grid=PENALTIES,
    budget=BUDGET,
    load=lambda: datasets.load("digits"),
    learn=learn,
    evaluate=evaluate,
    draw=plots.cleaning,
)
