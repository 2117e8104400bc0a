"""Training with example weights, and what tables record of learned ones."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Row
from hypergrad.tasks.task import Task


def trainers(loss: Callable[..., Array]) -> tuple[Callable, Callable]:
    """Returns two functions of a table with weights of a training loss.

    ``train(w, alpha, data, key)`` returns the minimum with the weights ``alpha``, and
    ``retrain`` of a `Table` does so from the start of a task.
    """

    @jax.jit
    def train(w: PyTree, alpha: PyTree, data: PyTree, key: Array) -> PyTree:
        """Returns the minimum of the weighted loss, found by Newton's method."""
        w, _ = hg.Newton().solve(loss, w, alpha, data, key)
        return w

    def retrain(task: Task, alpha: PyTree, key: Array) -> PyTree:
        """Returns the model trained from zero with the learned weights."""
        return train(task.w, alpha, task.problem.inner_data, key)

    return train, retrain


def count_weights(alpha: Array, is_wrong: Array | np.ndarray) -> Row:
    """Returns histograms of the weights of wrong and of clean examples."""
    count = lambda mask: np.histogram(alpha[mask], 40, (0, 1))[0].tolist()
    return {"wrong_weights": count(is_wrong), "clean_weights": count(~is_wrong)}
