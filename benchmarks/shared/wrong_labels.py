"""Hyper-cleaning with any fraction of wrong labels, and the worth of its weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.tasks import cleaning
from hypergrad.tasks.cleaning import f1_of_wrong_labels, make, split
from hypergrad.tasks.task import Task

from .program import program

RIGHT_LABELS, ALL_LABELS = "right labels only", "baseline, validation too"
#: Rows that learn no weights.
FIXED = ("baseline", ALL_LABELS, "validation-only", RIGHT_LABELS, "oracle")

RunConfig = tuple[Array, Array, Array, Array]  # key, fraction, penalty, hold_out


def make_config(
    seed: int, fraction: float, penalty: float, hold_out: bool
) -> RunConfig:
    """Returns the configuration of a run as arrays."""
    key = jax.random.key(seed)
    return key, jnp.float32(fraction), jnp.float32(penalty), jnp.asarray(hold_out)


def make_task(data: PyTree, config: RunConfig, batch_size: int | None = None) -> Task:
    """Returns the task of a configuration, on all data or in batches."""
    key, fraction, penalty, hold_out = config
    return make(
        key=key, penalty=penalty, hold_out=hold_out, corruption=fraction,
        batch_size=batch_size, data=data,
    )  # fmt: skip


def retrain(
    method: str, data: PyTree, config: RunConfig, alpha: Array
) -> dict[str, Array]:
    """Returns the scores of a model trained to convergence with the weights."""
    key, fraction, _, hold_out = config
    task, splits = make_task(data, config), split(data, key, hold_out, fraction)
    batch, alpha = dict(task.problem.inner_data), jnp.asarray(alpha)
    val, wrong = splits["val"], splits["train"]["wrong"]
    if method == RIGHT_LABELS:
        alpha = 1.0 - wrong
    if method == "oracle":
        batch["y"] = splits["train"]["clean"]
    if method == ALL_LABELS:
        batch |= {name: jnp.concatenate([batch[name], val[name]]) for name in "xy"}
        alpha = jnp.concatenate([alpha, val["use"]])
    if method == "validation-only":
        batch |= {"x": val["x"], "y": val["y"]}
        alpha = val["use"] / jnp.mean(val["use"])
    w, _ = hg.Newton().solve(cleaning.train_loss, task.w, alpha, batch, key)
    held_out = splits["held_out"]
    return {
        "accuracy": task.metrics["test_accuracy"](w, alpha, key),
        "held_accuracy": cleaning.accuracy(held_out, w, alpha, key),
        "held_loss": cleaning.val_loss(w, alpha, held_out),
        "f1": f1_of_wrong_labels(wrong, w, alpha, key)
        if alpha.shape == wrong.shape
        else jnp.asarray(jnp.nan),
    }


def scores_of(
    method: str, data: PyTree, config: RunConfig, alpha: Array
) -> dict[str, float]:
    """Returns the scores of the weights; learned weights share one program."""
    label = method if method in FIXED else "baseline"
    result = program(retrain, label)(data, config, alpha)
    return {name: float(x) for name, x in result.items()}
