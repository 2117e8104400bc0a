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

Intervals. The seeds re-split one data set, but the test split is larger than the 300
images to learn from, where the correction of Nadeau and Bengio (2003) does not apply:
the intervals are about further splits of these images.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.bench import (
    Claim,
    Column,
    Comparison,
    Row,
    Table,
    baselines,
    with_options,
)
from hypergrad.tasks import augmentation
from hypergrad.tasks.augmentation import (
    MAX_MAGNITUDES,
    OPERATIONS,
    POSE_MAGNITUDES,
    SIZES,
    SOLVER,
)

from .shared import task_plots
from .shared.task_runs import minimize_task, search_task
from .shared.tuning import DIGITS, digits

NUM_TRAIN, NUM_VAL, _ = SIZES["small"]
PENALTIES = (1e-4, 1e-3)
FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
BUDGET = 3000
FINAL = hg.Descent(optax.sgd(optax.cosine_decay_schedule(0.3, 600), momentum=0.9), 600)
TRIAL = hg.Descent(optax.sgd(0.1, momentum=0.9), num_steps=200)
ONE_STEP = hg.Descent(optax.sgd(0.3), num_steps=1)
MAX_PROBABILITY = 0.95


def make_task(key, scale, *, penalty, hold_out):
    """Returns the task with a penalty."""
    return compiled_task(key, jnp.float32(penalty), jnp.asarray(hold_out), digits())


@eqx.filter_jit
def compiled_task(key, penalty, hold_out, data):
    """Returns the task; its images are posed by one program."""
    return augmentation.make(key=key, penalty=penalty, hold_out=hold_out, data=data)


def policy_trace(task, magnitude, key):
    """Returns the trace of a policy that is not learned, at the cost of one training.

    All operations have the largest probability.
    """
    m = jnp.asarray(magnitude, float)
    alpha = {"magnitude": m, "probability": jnp.full_like(m, MAX_PROBABILITY)}
    return baselines.trace_of_point(task, task.w, alpha, key, num_grads=FINAL.num_steps)


def one_magnitude(task, *, budget, key, fraction):
    """Uses the same fraction of each largest magnitude."""
    del budget
    return policy_trace(task, jnp.float32(fraction) * MAX_MAGNITUDES, key)


def no_augmentation(task, *, budget, key):
    """Trains on the images as they are."""
    return one_magnitude(task, budget=budget, key=key, fraction=0.0)


def true_pose(task, *, budget, key):
    """Uses the policy of the validation and test images."""
    del budget
    return policy_trace(task, POSE_MAGNITUDES, key)


def random_search(task, *, budget, key):
    """Samples policies from the space until the budget is spent."""
    return search_task(task, budget, key, solver=TRIAL)


# Per method the estimator, Adam's rate, and the maximum cost of a step in
# gradient-equivalents: T inner gradients and an outer one of 200 images against 100; 2
# per product of Neumann's nine and the cross term; one more gradient and T products for
# the reverse pass; or the three gradients of a finite difference.
OUTER = NUM_VAL / NUM_TRAIN
HYPERGRADIENTS = {
    "implicit": (
        hg.Implicit(
            SOLVER, hg.Neumann(num_terms=10, step_size=0.1), estimate_error=False
        ),
        *(0.15, SOLVER.num_steps + 2 * 10 + OUTER),
    ),
    "unrolled": (
        hg.Unrolled(SOLVER, warm_start=True),
        0.15,
        3 * SOLVER.num_steps + 1 + OUTER,
    ),
    "DADA": (hg.FiniteDifference(ONE_STEP, step_size=0.3), 0.03, 1 + 3 + OUTER),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_adam(name, num_steps, task, key):
    """Returns the trace of a method."""
    estimator, rate, _ = HYPERGRADIENTS[name]
    return minimize_task(task, estimator, optax.adam(rate), key, num_steps=num_steps)


def gradient_method(name):
    """Returns a method that makes as many steps of Adam as surely fit the budget."""

    def method(task, *, budget, key):
        num_steps = int(budget / HYPERGRADIENTS[name][2])
        return run_adam(name, num_steps, task, key)

    return method


@jax.jit
def train(task, alpha, key):
    """Returns the model that is trained from scratch with a policy."""
    data = task.problem.inner_data
    w, _ = FINAL.solve(augmentation.train_loss, task.w, alpha, data, key)
    return w


def retrain(task, alpha, key):
    """Returns the final model of a row."""
    return train(task, alpha, jax.random.fold_in(key, 2))


def describe_policy(task, trace, w, key) -> Row:
    """Returns the policy as fractions of the largest, and the validation loss."""
    del key
    value = augmentation.val_loss(w, trace.alpha, task.problem.outer_data)
    magnitude = np.asarray(trace.alpha["magnitude"] / MAX_MAGNITUDES, float)
    return {
        "val_loss": float(value),
        "magnitude": magnitude.tolist(),
        "probability": np.asarray(trace.alpha["probability"], float).tolist(),
    }


table = Table(
    task=make_task,
    task_grid={"penalty": PENALTIES},
    methods={
        "baseline": no_augmentation,
        "one magnitude": with_options(one_magnitude, grid={"fraction": FRACTIONS}),
        "random search": random_search,
        **{name: gradient_method(name) for name in HYPERGRADIENTS},
        "true pose": true_pose,
    },
    metrics=("test_accuracy", "upright_accuracy"),
    budget=BUDGET,
    selection=("held_out_accuracy", "-held_out_loss"),
    retrain=retrain,
    extra=describe_policy,
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
