"""MNIST with classes of different size, wrong training labels, and a weight per image.

The inner problem is softmax regression on 10,000 weighted training images. The outer
loss is the cross-entropy on clean validation images, the surrogate of a metric there,
or minus its exact value.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad import datasets
from hypergrad.tasks import classifier, cleaning
from hypergrad.tasks.networks import softmax_regression
from hypergrad.tasks.task import Task

NUM_CLASSES, NUM_FEATURES = 10, 784
NUM_TRAIN, NUM_VAL, NUM_HELD_OUT = 10_000, 3000, 1000
NUM_SOURCE = 60_000  # images of MNIST from which training and validation are drawn
RAREST, NOISE = 0.1, 0.4
L2_FACTOR = 1e-3
GAP = 0.05  # the default of `temperature_from_scores`
SOLVER = hg.LBFGS(tolerance=1e-2)
FINAL_SOLVER = hg.LBFGS(tolerance=1e-4)

METRICS = ("accuracy", "F1", "mAP")
SURROGATES = {
    "accuracy": hg.surrogates.Accuracy(),
    "F1": hg.surrogates.FBeta(),
    "mAP": hg.surrogates.SmoothAP(axis=0),
}


# Data.


def split(seed: int) -> dict[str, PyTree]:
    """Returns training, validation and test images of a seed, as NumPy arrays.

    Of the class of rank k, by a random order of the classes, 0.1^(k/9) of the images
    are kept in all three parts. The test images that are left out have ``use`` 0.
    """
    data = datasets.load("mnist")
    rng = np.random.default_rng(seed)
    fractions = RAREST ** (rng.permutation(NUM_CLASSES) / (NUM_CLASSES - 1))
    is_kept = rng.uniform(size=len(data["y"])) < fractions[data["y"]]
    kept = rng.permutation(np.flatnonzero(is_kept[:NUM_SOURCE]))
    parts = {
        "train": kept[:NUM_TRAIN],
        "val": kept[NUM_TRAIN : NUM_TRAIN + NUM_VAL],
        "test": np.arange(NUM_SOURCE, len(data["y"])),
    }
    splits = {
        name: {
            "x": data["x"][rows],
            "y": data["y"][rows],
            "use": is_kept[rows].astype(np.float32),
        }
        for name, rows in parts.items()
    }
    clean = splits["train"].pop("y")
    wrong = rng.uniform(size=NUM_TRAIN) < NOISE
    other = (clean + rng.integers(1, NUM_CLASSES, NUM_TRAIN)) % NUM_CLASSES
    y = np.where(wrong, other, clean).astype(clean.dtype)
    splits["train"] |= {"y": y, "clean": clean, "wrong": wrong}
    return splits


# Metrics and outer losses.


def view(metric: str, w: PyTree, batch: PyTree) -> tuple[Array, Array, Array]:
    """Returns scores, targets and mask; for mAP each class ranks the images."""
    scores, y, use = softmax_regression(w, batch["x"]), batch["y"], batch["use"] > 0
    if metric != "mAP":
        return scores, y, use
    mask = jnp.broadcast_to(use[:, None], scores.shape)
    return scores, jax.nn.one_hot(y, NUM_CLASSES, dtype=int), mask


def exact(metric: str, batch: PyTree, w: PyTree, alpha: Array, key: Array) -> Array:
    """Returns the exact metric on a batch."""
    del alpha, key
    scores, targets, where = view(metric, w, batch)
    return SURROGATES[metric].exact(scores, targets, where=where)


def exact_mean(batch: PyTree, w: PyTree, alpha: Array, key: Array) -> Array:
    """Returns the mean of the three exact metrics on a batch."""
    return jnp.mean(jnp.stack([exact(m, batch, w, alpha, key) for m in METRICS]))


# Programs compare losses by identity.
@functools.cache
def exact_loss(metric: str) -> Callable:
    """Returns ``(w, alpha, batch) -> minus the exact metric``."""
    return lambda w, alpha, batch: -exact(metric, batch, w, alpha, None)


@functools.cache
def surrogate_loss(metric: str) -> Callable:
    """Returns ``(w, alpha, batch) -> minus the surrogate`` at the batch's temperature.

    On random batches of validation images it is the surrogate of the batch, whose mean
    is that of all images for accuracy only.
    """

    def loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
        del alpha
        scores, targets, where = view(metric, w, batch)
        temperature = batch["temperature"][0]
        return -SURROGATES[metric](
            scores, targets, temperature=temperature, where=where
        )

    return loss


def temperature(metric: str, w: PyTree, batch: PyTree) -> Array:
    """Returns a temperature from the scores of a model; for mAP that of pairs.

    The gap of pairs is twice the fraction of positives times that of the others, as in
    the tables `surrogates` and `rq2`.
    """
    scores, targets, where = view(metric, w, batch)
    gap = GAP
    if metric == "mAP":
        scores, targets, where = (x.ravel() for x in (scores, targets, where))
        gap = 2 * GAP * jnp.sum(targets * where) / jnp.sum(where)
    return hg.surrogates.temperature_from_scores(scores, targets, gap=gap, where=where)


# Training and the task.


def train_model(alpha: Array, examples: PyTree) -> PyTree:
    """Returns the final model of weighted examples."""
    data = {"x": examples["x"], "y": examples["y"], "penalty": jnp.asarray(L2_FACTOR)}
    return _final_model(alpha, data)


@jax.jit
def _final_model(alpha: Array, train: PyTree) -> PyTree:
    key = jax.random.key(0)  # the solver draws nothing
    return FINAL_SOLVER.solve(cleaning.train_loss, zeros(), alpha, train, key)[0]


def zeros() -> PyTree:
    """Returns the model with which training starts."""
    return {"W": jnp.zeros((NUM_FEATURES, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)}


def make_task(
    key: Array,
    scale: str = "paper",
    *,
    hold_out: bool = False,
    metric: str = "",
    is_exact: bool = False,
) -> Task:
    """Returns the task of a seed.

    Args:
      key: Key of the seed.
      scale: The only scale is "paper".
      hold_out: Whether a third of the validation images are held out.
      metric: Metric of the outer loss; "" for cross-entropy.
      is_exact: Whether the outer loss is minus the exact metric.
    """
    del scale
    seed = int(jax.random.key_data(key)[-1])
    splits = jax.tree.map(jnp.asarray, split(seed))
    val = classifier.mask_held_out(splits["val"], hold_out, slice(NUM_HELD_OUT))
    splits |= {"val": val, "held_out": classifier.held_out_examples(val)}
    train = {name: splits["train"][name] for name in ("x", "y")}
    train |= {"penalty": jnp.asarray(L2_FACTOR)}
    alpha = jnp.full(NUM_TRAIN, 0.5)
    outer_loss, outer_data = cleaning.val_loss, val
    if is_exact:
        outer_loss = exact_loss(metric)
    elif metric:
        outer_loss = surrogate_loss(metric)
        t = temperature(metric, train_model(alpha, train), val)
        outer_data = val | {"temperature": jnp.full(NUM_VAL, t)}
    bind = lambda fn, part: jax.tree_util.Partial(fn, splits[part])
    metrics = {f"test_{m}": bind(_exact_fn(m), "test") for m in METRICS}
    metrics |= {f"val_{m}": bind(_exact_fn(m), "val") for m in METRICS}
    metrics["held_out"] = bind(_exact_fn(metric) if metric else exact_mean, "held_out")
    metrics["f1_of_wrong"] = jax.tree_util.Partial(
        cleaning.f1_of_wrong_labels, splits["train"]["wrong"]
    )
    return Task(
        paradigm="supervised",
        problem=hg.Bilevel(cleaning.train_loss, outer_loss, train, outer_data),
        solver=SOLVER,
        w=zeros(),
        alpha=alpha,
        space=hg.spaces.Unit(shape=(NUM_TRAIN,)),
        metrics=metrics,
        splits=splits,
    )


@functools.cache
def _exact_fn(metric: str) -> Callable:
    return functools.partial(exact, metric)


def retrain(task: Task, alpha: Array, key: Array) -> PyTree:
    """Returns the final model of the training images with their weights."""
    del key
    return train_model(alpha, task.splits["train"])


def minibatch_problem(problem: hg.Bilevel, batch_size: int) -> hg.Bilevel:
    """Returns the problem with random batches of training and validation images."""
    train = problem.inner_data | {"index": jnp.arange(NUM_TRAIN)}
    val = problem.outer_data
    outer_loss = problem.outer_loss
    if outer_loss is cleaning.val_loss:
        val = val | {"use": val["use"] / jnp.mean(val["use"])}
        outer_loss = cleaning.minibatch_val_loss
    return hg.Bilevel(
        cleaning.minibatch_train_loss,
        outer_loss,
        *(hg.Batches(examples, batch_size) for examples in (train, val)),
    )
