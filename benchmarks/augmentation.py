"""Augmentation: policies that are learned, searched, or one magnitude for all.

Question. Do hypergradients find how far and how often to transform training images
better than one tuned magnitude for all operations, and better than random policies?

Data. scikit-learn's digits, in a setting where augmentation matters: a permutation that
depends on the seed gives 100 training images, which stay upright, 200 validation and
1,497 test images, which are turned by up to 45 degrees and moved by up to a pixel in
each direction (uniform, sampled once from the seed). The test split is read once, by
the final model of a row. The column "upright" is the accuracy on the same test images
before they were turned and moved.

Model. 32 hidden units of tanh; cross-entropy on images that are transformed anew at
every step, and an L2 penalty. The policy is a magnitude and a probability for each of
seven operations (translation down and right up to 2 pixels, rotation up to 90 degrees,
scale up to a factor e^0.5, shear up to 0.7, contrast up to 0.9, noise up to 0.5). The
strength is uniform between minus and plus the magnitude, gated by relaxed Bernoulli
variables of temperature 1/2. Probabilities lie in [0.05, 0.95]. A policy starts at a
quarter of the largest magnitudes and probability 1/2.

Budget. At most 3,000 gradient-equivalents (grad-eq) per run (100 images count 1; the
200 of validation 2): as many outer steps as the budget surely pays for. implicit: 10
warm-started steps of gradient descent (rate 0.1, momentum 0.9), Neumann's series of 10
terms with step size 0.1 on one sample of the noise, Adam with rate 0.15. unrolled:
through the same 10 steps, with the same Adam. DADA: one step (rate 0.3) and a
difference of two gradients, Adam with rate 0.03. random search: policies sampled
uniformly, 200 steps each, the lowest validation loss is kept. The cost of a row that
learns nothing is that of one training. Seconds are those of learning, without the final
training.

Rows. baseline (no augmentation), one magnitude (the same fraction of each largest one,
every operation with probability 0.95), random search, implicit, unrolled, DADA, and
true pose (the transformation of the test images). Every row ends in the same final
training: from scratch, 600 steps of gradient descent, rate 0.3 falling as a cosine,
momentum 0.9.

Tuning, the same for every row. The penalty is 1e-4 or 1e-3; for one magnitude the
fraction is one of 1/8, 1/4, 3/8, 1/2, 3/4 and 1. Of the 200 validation images 50 are
held out. The row learns with the other 150 at each setting. The setting with the best
accuracy on the 50 is chosen (ties: the lower loss there), and the row learns once more
with all 200.

Claims, on seeds 0 to 4, about the test accuracy on turned images, paired by seed.
implicit, unrolled and DADA each beat the baseline by at least 10 points, and one
magnitude and random search by any difference. Whether true pose beats implicit is
reported without a claim. Rates, steps and budget were set on seeds 100 and 101.
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
from hypergrad.bench import Claim, Column, Comparison, MeasurementTable, Row
from hypergrad.estimators import Estimator
from hypergrad.tasks.augmentation import (
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
from hypergrad.tasks.task import Task

from .shared import task_plots
from .shared.program import Program, program
from .shared.tuning import DIGITS, cells_of, digits, trace_columns, tune_and_run

NUM_TRAIN, NUM_VAL, _ = SIZES["small"]
PENALTIES = (1e-4, 1e-3)
FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
BUDGET = 3000
FINAL = hg.Descent(optax.sgd(optax.cosine_decay_schedule(0.3, 600), momentum=0.9), 600)
TRIAL = hg.Descent(optax.sgd(0.1, momentum=0.9), num_steps=200)
ONE_STEP = hg.Descent(optax.sgd(0.3), num_steps=1)

RunConfig = tuple[Array, Array, Array, Array]  # key, penalty, fraction, hold_out
MAX_PROBABILITY = 0.95


def policy(magnitude: Any) -> PyTree:
    """Returns a policy that applies all operations with the largest probability."""
    m = jnp.asarray(magnitude, float)
    return {"magnitude": m, "probability": jnp.full_like(m, MAX_PROBABILITY)}


def gradient_method(estimator: Estimator, rate: float, cost_of_step: float) -> Callable:
    """Returns a method that makes as many steps of Adam as fit the budget."""
    num_steps = int(BUDGET / cost_of_step)

    def learn(task: Task, run_config: RunConfig) -> tuple[PyTree, Any]:
        trace = hg.minimize(
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
    trace = hg.search(
        task.problem,
        TRIAL,
        hg.searchers.Random(),
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


# Maximum costs of a step in gradient-equivalents: T inner gradients, outer gradients of
# 200 images against 100 (two if trust is evaluated), 2 per product of Neumann's 10 and
# the cross term; T more gradients and T products for the reverse pass; or the three
# gradients of a finite difference.
OUTER = NUM_VAL / NUM_TRAIN
METHODS: dict[str, Callable] = {
    "baseline": one_magnitude,
    "one magnitude": one_magnitude,
    "random search": random_search,
    "implicit": gradient_method(
        hg.Implicit(SOLVER, hg.Neumann(num_terms=10, step_size=0.1)),
        *(0.15, SOLVER.num_steps + 2 * 11 + 2 * OUTER),
    ),
    "unrolled": gradient_method(
        hg.Unrolled(SOLVER, warm_start=True), 0.15, 4 * SOLVER.num_steps + 1 + OUTER
    ),
    "DADA": gradient_method(
        hg.FiniteDifference(ONE_STEP, step_size=0.3), 0.03, 1 + 3 + OUTER
    ),
    "true pose": true_pose,
}
ON_HOST = "random search"
HYPERGRADIENTS = ("implicit", "unrolled", "DADA")


def settings(method: str) -> list[tuple[float, float]]:
    """Returns the pairs of penalty and magnitude that a method tries."""
    fractions = FRACTIONS if method == "one magnitude" else (0.0,)
    return [(penalty, fraction) for penalty in PENALTIES for fraction in fractions]


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
    held_out = split(data, jax.random.split(key)[0], SIZES["small"][:2], run_config[3])[
        "held_out"
    ]
    w, _ = FINAL.solve(
        train_loss, task.w, alpha, task.problem.inner_data, jax.random.fold_in(key, 2)
    )
    return task.metric_values(w, alpha, key) | {
        "selection": jnp.stack(
            [accuracy(held_out, w, alpha, key), -val_loss(w, alpha, held_out)]
        ),
        "val_loss": val_loss(w, alpha, task.problem.outer_data),
    }


def run_method(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned by `tune_and_run`."""
    data, measure = digits(), program(evaluate)
    on_host = functools.partial(learn, method)
    run = on_host if method == ON_HOST else program(learn, method)

    def run_once(setting: tuple[float, float], hold_out: bool) -> Row:
        penalty, fraction = map(jnp.float32, setting)
        run_config = jax.random.key(seed), penalty, fraction, jnp.asarray(hold_out)
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
        }
        if trace is not None:
            row |= trace_columns(trace)
        return row

    result = tune_and_run(run_once, settings(method))
    if isinstance(run, Program):
        result |= {"compile_seconds": run.compile_seconds}
    return result


table = MeasurementTable(
    cells=cells_of(METHODS),
    measure_cell=lambda cell, rows: run_method(cell["method"], cell["seed"]),
    columns=(
        Column("test_accuracy", "accuracy %", ".1f", scale=100),
        Column("upright_accuracy", "upright %", ".1f", scale=100),
    ),
    claims=(
        *(
            Claim(method, "baseline", "test_accuracy", min_effect=0.1)
            for method in HYPERGRADIENTS
        ),
        *(
            Claim(method, other, "test_accuracy")
            for other in ("one magnitude", "random search")
            for method in HYPERGRADIENTS
        ),
    ),
    comparisons=(Comparison("true pose", ("implicit",), "test_accuracy"),),
    plot=functools.partial(
        task_plots.augmentation,
        OPERATIONS,
        (POSE_MAGNITUDES / MAX_MAGNITUDES).tolist(),
    ),
    seeds=5,
    minutes=2,
    paradigm="supervised",
    source="Li et al. 2020 (arXiv 2003.03780)",
    data=DIGITS,
    arrays=digits,
)
