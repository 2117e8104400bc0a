"""The three problems of benchmark_bilevel, on which `step_cost` times single steps.

Each problem is given twice, as the two programs expect it: as losses of a batch, and as
functions of the first row and the size of a batch, which benchmark_bilevel slices.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad import datasets

NUM_TRAIN, NUM_VAL = 20_000, 5_000
PENALTY = 0.2  # of the hyper-cleaning problem
NUM_MATRICES, DIM = 1024, 100


class StepProblem(NamedTuple):
    """A problem with the data of both losses and the starting point."""

    inner_loss: Callable
    outer_loss: Callable
    inner_data: dict[str, Array]
    outer_data: dict[str, Array]
    w: Array
    alpha: Array

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of examples of the inner and of the outer loss."""
        count = lambda data: len(next(iter(data.values())))
        return count(self.inner_data), count(self.outer_data)

    def sampled(self, batch_size: int, order: str = "blocks") -> hg.Bilevel:
        """Returns the problem with contiguous batches of both losses."""
        batches = lambda data: hg.Batches(data, batch_size, order=order)
        return hg.Bilevel(
            self.inner_loss,
            self.outer_loss,
            batches(self.inner_data),
            batches(self.outer_data),
        )

    def sliced(self) -> tuple[Callable, Callable]:
        """Returns the losses as ``(w, alpha, start=0, batch_size=1) -> value``."""
        return (
            sliced_loss(self.inner_loss, self.inner_data),
            sliced_loss(self.outer_loss, self.outer_data),
        )


def sliced_loss(loss: Callable, data: PyTree) -> Callable:
    """Returns a loss of the batch that begins at a row of the data."""

    @partial(jax.jit, static_argnames="batch_size")
    def loss_of_slice(w, alpha, start=0, batch_size=1):
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, batch_size)
        return loss(w, alpha, jax.tree.map(rows, data))

    return loss_of_slice


def logistic() -> StepProblem:
    """Returns ijcnn1 with a log-penalty for each of 22 weights."""
    arrays = datasets.load("ijcnn1")
    x = jnp.asarray(arrays["x"], jnp.float32)
    y = jnp.where(jnp.asarray(arrays["y"]) > 0, 1.0, -1.0).astype(jnp.float32)
    num_train = 49_990

    def outer_loss(w, alpha, batch):
        margin = batch["y"] * (batch["x"] @ w)
        return -jnp.mean(jax.nn.log_sigmoid(margin))

    def inner_loss(w, alpha, batch):
        return outer_loss(w, alpha, batch) + jnp.exp(alpha) @ w**2 / 2

    w_key, alpha_key = jax.random.split(jax.random.key(0))
    return StepProblem(
        inner_loss,
        outer_loss,
        {"x": x[:num_train], "y": y[:num_train]},
        {"x": x[num_train:], "y": y[num_train:]},
        jax.random.normal(w_key, x.shape[1:], jnp.float32),
        jnp.log(jax.random.uniform(alpha_key, x.shape[1:], jnp.float32)),
    )


def quadratic_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the mean of the quadratics of a batch."""
    value = jnp.einsum("i,nij,j->n", w, batch["hess_w"], w) / 2
    value += jnp.einsum("i,nij,j->n", alpha, batch["hess_alpha"], alpha) / 2
    value += jnp.einsum("i,nij,j->n", alpha, batch["cross"], w)
    return jnp.mean(value + batch["linear_w"] @ w + batch["linear_alpha"] @ alpha)


def quadratics() -> StepProblem:
    """Returns means of 1,024 quadratics of 100 + 100 variables, of rank one each."""

    def data(seed):
        rng = np.random.default_rng(seed)
        scale = np.logspace(-0.5, 0, DIM)
        x, z = rng.normal(size=(2, NUM_MATRICES, DIM)) * scale
        arrays = {
            "hess_w": x[:, :, None] * x[:, None],
            "hess_alpha": z[:, :, None] * z[:, None],
            "cross": 0.01 * z[:, :, None] * x[:, None],
            "linear_w": rng.normal(size=(NUM_MATRICES, DIM)),
            "linear_alpha": rng.normal(size=(NUM_MATRICES, DIM)),
        }
        return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}

    zeros = jnp.zeros(DIM, jnp.float32)
    return StepProblem(quadratic_loss, quadratic_loss, data(0), data(1), zeros, zeros)


def example_losses(w: Array, batch: PyTree) -> Array:
    """Returns the cross-entropy of each example under softmax regression."""
    scores = batch["x"] @ w.reshape(784, 10)
    return -jnp.sum(batch["y"] * jax.nn.log_softmax(scores), -1)


def mean_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the outer loss of the hyper-cleaning problem."""
    return jnp.mean(example_losses(w, batch))


def weighted_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the inner loss of the hyper-cleaning problem on contiguous examples."""
    size = len(batch["index"])
    logits = jax.lax.dynamic_slice_in_dim(alpha, batch["index"][0], size)
    mean = jnp.mean(jax.nn.sigmoid(logits) * example_losses(w, batch))
    return mean + PENALTY * jnp.sum(w**2)


def cleaning() -> StepProblem:
    """Returns softmax regression on MNIST with a weight for each of 20,000 examples."""
    arrays = datasets.load("mnist")
    x = np.asarray(arrays["x"], np.float32).reshape(-1, 784)[: NUM_TRAIN + NUM_VAL]
    x = jnp.asarray((x - x.mean(0)) / np.maximum(x.std(0), 1e-3))
    y = jax.nn.one_hot(jnp.asarray(arrays["y"])[: NUM_TRAIN + NUM_VAL], 10)
    y = y.astype(jnp.float32)
    index = jnp.arange(NUM_TRAIN)
    return StepProblem(
        weighted_loss,
        mean_loss,
        {"x": x[:NUM_TRAIN], "y": y[:NUM_TRAIN], "index": index},
        {"x": x[NUM_TRAIN:], "y": y[NUM_TRAIN:]},
        jnp.zeros(7840, jnp.float32),
        jnp.zeros(NUM_TRAIN, jnp.float32),
    )


PROBLEMS = {"ijcnn1": logistic, "quadratics": quadratics, "hyper-cleaning": cleaning}
