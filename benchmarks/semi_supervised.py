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

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.bench import (
    Claim,
    Column,
    Comparison,
    Finding,
    Resplits,
    Row,
    Table,
    baselines,
    mean_interval,
    with_options,
)
from hypergrad.tasks import semi_supervised
from hypergrad.tasks.task import loss_metric

from .shared import task_plots
from .shared.example_weights import count_weights, trainers
from .shared.outcomes import conclude
from .shared.task_runs import implicit_by_cg, minimize_task
from .shared.tuning import DIGITS, digits

BUDGET = 3000
OPTIMIZER = optax.adam(0.3)
SOLVER = semi_supervised.SOLVER
train, retrain = trainers(semi_supervised.train_loss)
MIN_AUROC = 0.8


def make_task(key, scale, *, penalty, hold_out):
    """Returns the task with its splits and with metrics on the held-out examples."""
    task = semi_supervised.make(
        key=key, scale=scale, penalty=penalty, hold_out=hold_out, data=digits()
    )
    sizes = semi_supervised.SIZES[scale]
    data = jax.tree.map(jnp.asarray, digits())
    splits = semi_supervised.split(data, key, sizes, hold_out)
    held_out = splits["held_out"]
    metrics = {
        "held_out_accuracy": jax.tree_util.Partial(semi_supervised.accuracy, held_out),
        "held_out_loss": loss_metric(semi_supervised.val_loss, held_out),
    }
    return dataclasses.replace(task, splits=splits, metrics=task.metrics | metrics)


def gradient_method(estimator, step_cost):
    """Returns a method that makes as many outer steps as surely fit the budget."""

    def method(task, *, budget, key):
        return minimize_task(
            task, estimator, OPTIMIZER, key, num_steps=int(budget / step_cost)
        )

    return method


def no_pseudo_labels(task, *, budget, key):
    """Trains with weights of 0."""
    del budget
    return baselines.trace_of_point(task, task.w, jnp.zeros_like(task.alpha), key)


def one_weight(task, *, budget, key, weight):
    """Trains with the same weight for all pseudo-labels."""
    del budget
    alpha = jnp.full_like(task.alpha, weight)
    return baselines.trace_of_point(task, task.w, alpha, key)


@baselines.keeps_w
def validation_labels(task, *, budget, key):
    """Trains on the labelled and the validation examples, without pseudo-labels."""
    del budget
    val, num_labelled = task.splits["val"], len(task.problem.inner_data["labeled"]["y"])
    examples = {"x": val["x"], "y": val["y"]}
    data = task.problem.inner_data | {"unlabeled": examples}
    w = train(task.w, val["use"] * len(val["y"]) / num_labelled, data, key)
    return baselines.trace_of_point(task, w, task.alpha, key)


@baselines.keeps_w
def true_labels(task, *, budget, key):
    """Trains on the true labels in place of the pseudo-labels."""
    del budget
    data = task.problem.inner_data | {"unlabeled": task.splits["unlabeled"]}
    w = train(task.w, jnp.ones_like(task.alpha), data, key)
    return baselines.trace_of_point(task, w, task.alpha, key)


def describe_run(task, trace, w, key) -> Row:
    """Returns validation loss and wrong pseudo-labels, and the learned weights."""
    pseudo_labels = task.problem.inner_data["unlabeled"]["y"]
    is_wrong = np.asarray(pseudo_labels != task.splits["unlabeled"]["y"])
    row = {
        "val_loss": float(semi_supervised.val_loss(w, trace.alpha, task.splits["val"])),
        "wrong_share": float(np.mean(is_wrong)),
    }
    if len(trace.value) < 2:  # nothing was learned
        return row
    return row | {
        "auroc": float(task.metrics["auroc"](w, trace.alpha, key)),
        "adjoint_residual": float(jnp.max(trace.stats["adjoint_residual"])),
        **count_weights(trace.alpha, is_wrong),
    }


# Maximum costs of a step in gradient-equivalents: T inner gradients, one outer gradient
# and 2 per product (CG at most 20 and one; Neumann 19, 10 for its step size, and one),
# or T more gradients and T products for a reverse pass that recomputes the steps.
# An outer gradient counts as an inner one although the splits differ in size.
HYPERGRADIENTS = {
    "implicit": gradient_method(
        implicit_by_cg(SOLVER, rtol=1e-2, max_steps=20),
        SOLVER.num_steps + 2 * 21 + 1,
    ),
    "neumann": gradient_method(
        hg.Implicit(SOLVER, hg.Neumann(num_terms=20), estimate_error=False),
        SOLVER.num_steps + 2 * 30 + 1,
    ),
    "unrolled": gradient_method(
        hg.Unrolled(SOLVER, checkpoint=True, warm_start=True), 4 * SOLVER.num_steps + 2
    ),
}


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


table = Table(
    task=make_task,
    task_grid={"penalty": (1e-3, 1e-2, 1e-1)},
    methods={
        "baseline": no_pseudo_labels,
        "one weight": with_options(one_weight, grid={"weight": (0.1, 0.3, 1.0)}),
        "labels of validation": validation_labels,
        "random search": baselines.random_search,
        **HYPERGRADIENTS,
        "oracle": with_options(true_labels, splits=("unlabeled",)),
    },
    budget=BUDGET,
    metrics=("test_accuracy",),
    selection=("held_out_accuracy", "-held_out_loss"),
    retrain=retrain,
    extra=describe_run,
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
    comparisons=(
        Comparison("labels of validation", tuple(HYPERGRADIENTS), "test_accuracy"),
    ),
    findings=detection_findings,
    resplits=Resplits(test_to_train=647 / 1150),
    plot=task_plots.cleaning,
    seeds=10,
    minutes=2,
    paradigm="semi-supervised",
    source="Ren, Yeh & Schwing 2020 (arXiv 2007.01293)",
    data=DIGITS,
    arrays=digits,
)
