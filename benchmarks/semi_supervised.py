"""Semi-supervised learning: every way to weigh pseudo-labelled examples, at one budget.

Question. A model trained on 50 labels names 1,000 more images, some of them wrongly.
Does learning one weight per pseudo-labelled example (Ren, Yeh & Schwing 2020) beat
using none of them, or all of them alike?

Data. scikit-learn's digits. A permutation that depends on the seed gives 50 labelled,
100 validation, 1,000 unlabelled and 647 test images. The test split is read once, by
the final model of a row.

Model. Softmax regression. The training loss is the mean cross-entropy on the labelled
images, plus the weighted mean cross-entropy on the pseudo-labelled ones, plus an L2
penalty; the outer loss is the mean cross-entropy on validation. The pseudo-labels are
the predictions of the model trained to convergence on the 50 labels with the same
penalty, computed once (the paper recomputes them at every step). The weights lie in
[0, 1] by a sigmoid and start at 1/2; Adam has rate 0.3. The inner solver is gradient
descent with 50 steps, rate 0.5 and momentum 0.9, warm-started.

Budget. At most 3,000 gradient-equivalents per run (grad-eq): as many outer steps as
the budget surely pays for. CG stops at a relative residual of 1e-2 or after 20
products, Neumann has 20 terms, Unrolled differentiates all 50 steps. Random search
samples weights uniformly and keeps the sample with the lowest validation loss. An outer
gradient counts as an inner one. Seconds are those of learning, without the final
training.

Rows. baseline (the 50 labels only), one weight (the same for all pseudo-labels), labels
of validation (trained on the 50 and the validation labels, no pseudo-labels), random
search, implicit (CG), neumann, unrolled, and oracle (the true labels of all 1,000).
Every row ends in the same final training, which is not counted: Newton's method from
zero to convergence. AUROC is that of a low weight as a detector of a wrong
pseudo-label; "wrong %" is the share of wrong pseudo-labels.

Tuning, the same for every row. The penalty is one of 1e-3, 1e-2 and 1e-1, and for one
weight the weight is one of 0.1, 0.3 and 1. Of the 100 validation examples 33 are held
out. The row learns with the other 67 at each setting. The setting with the best
accuracy on the 33 is chosen (ties: the lower loss there), and the row learns once more
with all 100.

Claims, on seeds 0 to 9 (the first run had five, too few for an interval narrower than
the effect), with intervals paired by seed. implicit, neumann and unrolled beat the
baseline by at least 2 points of test accuracy, and one weight by any difference. One
weight beats the baseline by any difference. The AUROC is above 0.8 with its whole 95%
interval for each of the three. Whether labels of validation beats them is reported
without a claim. Rates, steps and budget were set on seeds 100 to 103.
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

import hypergrad as hg
from hypergrad.bench import (
    Claim,
    Column,
    Comparison,
    Finding,
    MeasurementTable,
    Row,
    mean_interval,
)
from hypergrad.estimators import Estimator
from hypergrad.tasks.semi_supervised import (
    SIZES,
    SOLVER,
    accuracy,
    auroc_of_wrong_labels,
    make,
    split,
    train_loss,
    val_loss,
)
from hypergrad.tasks.task import Task

from .shared import task_plots
from .shared.outcomes import conclude
from .shared.program import Program, program
from .shared.tuning import DIGITS, cells_of, digits, trace_columns, tune_and_run

NUM_LABELLED, NUM_VAL, NUM_UNLABELLED = SIZES["small"]
PENALTIES = (1e-3, 1e-2, 1e-1)
WEIGHTS = (0.1, 0.3, 1.0)
BUDGET = 3000
OPTIMIZER = optax.adam(0.3)
MIN_AUROC = 0.8

RunConfig = tuple[Array, Array, Array, Array]  # key, penalty, weight, hold_out


def gradient_method(estimator: Estimator, cost_of_step: float) -> Callable:
    """Returns a method that makes as many outer steps as fit the budget."""
    num_steps = int(BUDGET / cost_of_step)

    def learn(
        task: Task, splits: PyTree, run_config: RunConfig
    ) -> tuple[Any, PyTree, Any]:
        del splits
        trace = hg.minimize(
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
    trace = hg.search(
        task.problem,
        task.solver,
        hg.searchers.Random(),
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


# Maximum costs of a step in gradient-equivalents: T inner gradients, one outer gradient
# (two if trust is evaluated), and 2 per product (CG at most 20 and one; Neumann 19, 10
# for its step size and one), or T more gradients and T products for the reverse pass.
# An outer gradient counts as an inner one although the splits differ in size.
METHODS: dict[str, Callable] = {
    "baseline": one_weight,
    "one weight": one_weight,
    "labels of validation": more_labels,
    "random search": random_search,
    "implicit": gradient_method(
        hg.Implicit(SOLVER, hg.CG(rtol=1e-2, max_steps=20)),
        SOLVER.num_steps + 2 * 21 + 2,
    ),
    "neumann": gradient_method(
        hg.Implicit(SOLVER, hg.Neumann(num_terms=20)), SOLVER.num_steps + 2 * 30 + 2
    ),
    "unrolled": gradient_method(
        hg.Unrolled(SOLVER, warm_start=True), 4 * SOLVER.num_steps + 2
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
    del method  # one program per method, because the sizes of the batches differ
    task, splits = make_task_and_splits(data, run_config)
    key, held_out = run_config[0], splits["held_out"]
    w, _ = hg.Newton().solve(train_loss, task.w, alpha, batch, key)
    pseudo = task.problem.inner_data["unlabeled"]["y"]
    return {
        "test_accuracy": task.metrics["test_accuracy"](w, alpha, key),
        "selection": jnp.stack(
            [accuracy(held_out, w, alpha, key), -val_loss(w, alpha, held_out)]
        ),
        "val_loss": val_loss(w, alpha, splits["val"]),
        "wrong": pseudo != splits["unlabeled"]["y"],
    }


def describe_weights(trace: hg.Trace, alpha: Array, wrong: np.ndarray) -> Row:
    """Returns costs, the curve, the largest residual and histograms of the weights."""
    count = lambda mask: np.histogram(alpha[mask], 40, (0, 1))[0].tolist()
    return trace_columns(trace) | {
        "adjoint_residual": float(jnp.max(trace.stats["adjoint_residual"])),
        "wrong_weights": count(wrong),
        "clean_weights": count(~wrong),
    }


def run_method(method: str, seed: int) -> Row:
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
        }
        if learned["trace"] is not None:
            alpha, key = learned["alpha"], run_config[0]
            auroc = auroc_of_wrong_labels(result["wrong"], None, alpha, key)
            row |= {"auroc": float(auroc)}
            row |= describe_weights(learned["trace"], alpha, wrong)
        return row

    result = tune_and_run(run_once, settings(method))
    if isinstance(run, Program):
        result |= {"compile_seconds": run.compile_seconds}
    return result


def detection_findings(rows: list[Row]) -> list[Finding]:
    """Returns how the claims on the AUROC of low weights as detectors end."""
    findings = []
    for method in HYPERGRADIENTS:
        auroc = [row["auroc"] for row in rows if row["method"] == method]
        if not auroc:
            continue
        interval = mean_interval(auroc)
        text = (
            f"{method} detects wrong pseudo-labels with an AUROC of {interval:.3f}, "
            f"at least {MIN_AUROC} claimed"
        )
        is_met = interval.low >= MIN_AUROC
        half_width = (interval.high - interval.low) / 2
        chance = MIN_AUROC - 0.5
        findings.append(conclude(text, is_met, len(auroc), half_width, chance))
    return findings


table = MeasurementTable(
    cells=cells_of(METHODS),
    measure_cell=lambda cell, rows: run_method(cell["method"], cell["seed"]),
    columns=(
        Column("test_accuracy", "accuracy %", ".1f", scale=100),
        Column("auroc", "AUROC", ".3f"),
        Column("wrong_share", "wrong %", ".1f", scale=100),
    ),
    claims=(
        *(
            Claim(method, "baseline", "test_accuracy", min_effect=0.02)
            for method in HYPERGRADIENTS
        ),
        *(Claim(method, "one weight", "test_accuracy") for method in HYPERGRADIENTS),
        Claim("one weight", "baseline", "test_accuracy"),
    ),
    comparisons=(Comparison("labels of validation", HYPERGRADIENTS, "test_accuracy"),),
    findings=detection_findings,
    plot=task_plots.cleaning,
    seeds=10,
    minutes=2,
    paradigm="semi-supervised",
    source="Ren, Yeh & Schwing 2020 (arXiv 2007.01293)",
    data=DIGITS,
    arrays=digits,
)
