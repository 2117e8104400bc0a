"""The works of `work.py` as two JAX losses and their data, for every JAX contender.

The layouts are those that are fastest in JAX on a CPU: data of linear models is
(features, examples), so that ``w @ x`` and ``x @ r`` both run along the examples, and
a convolution is one matrix product of patches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from hypergrad.products import Loss

from .work import Data


class Problem(NamedTuple):
    """Losses of ``(w, alpha, batch)`` with their data, and the point ``(w, alpha)``.

    ``w`` is the initial one, or the ``w`` of the data for a work that only solves the
    adjoint system. ``constants`` holds the numbers of the work: steps, rate, momentum,
    products.
    """

    inner: Loss
    outer: Loss
    train: PyTree
    val: PyTree
    w: PyTree
    alpha: PyTree
    constants: dict[str, Any]

    @property
    def arrays(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """The arguments ``(train, val, w, alpha)`` of a compiled function."""
        return self.train, self.val, self.w, self.alpha


def make_problem(
    inner: Loss,
    outer: Loss,
    x: np.ndarray,
    x_val: np.ndarray,
    w: PyTree,
    alpha: PyTree,
    data: Data,
) -> Problem:
    """Returns a problem with the labels and numbers of ``data``."""
    arrays = {"x": x, "y": data["y"]}, {"x": x_val, "y": data["y_val"]}, w, alpha
    numbers = {name: value for name, value in data.items() if np.isscalar(value)}
    return Problem(inner, outer, *jax.tree.map(jnp.asarray, arrays), numbers)


def logistic_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the mean of ``softplus(-y x.w)`` for x ``(features, examples)``."""
    del alpha
    return jnp.mean(jax.nn.softplus(-batch["y"] * (w @ batch["x"])))


def penalized_loss(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Returns the loss with a log-penalty per feature, or one for all."""
    return logistic_loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


def transpose(x: np.ndarray) -> np.ndarray:
    """Returns a contiguous ``x.T``."""
    return np.ascontiguousarray(x.T)


def logistic(data: Data, *, at_solution: bool = False) -> Problem:
    """Returns `work.logistic` at 0, or at the minimizer."""
    w = data["w"] if at_solution else np.zeros_like(data["w"])
    x, x_val = transpose(data["x"]), transpose(data["x_val"])
    return make_problem(penalized_loss, logistic_loss, x, x_val, w, data["alpha"], data)


def cross_entropy(scores: Array, y: Array) -> Array:
    """Returns the loss of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, y)


def perceptron(act: Callable[[Array], Array], w: list[Array], x: Array) -> Array:
    """Returns the scores of a network with one hidden layer."""
    hidden_weights, hidden_biases, weights, biases = w
    as_row = lambda b: b.reshape((1,) * (x.ndim - 1) + b.shape)
    return act(x @ hidden_weights + as_row(hidden_biases)) @ weights + as_row(biases)


def cleaning(data: Data, *, at_solution: bool = False) -> Problem:
    """Returns `work.cleaning` at the initial parameters, or at the final ones."""
    penalty = data["penalty"]

    def outer(w, alpha, batch):
        del alpha
        scores = perceptron(jax.nn.relu, w, batch["x"])
        return jnp.mean(cross_entropy(scores, batch["y"]))

    def inner(w, alpha, batch):
        losses = cross_entropy(perceptron(jax.nn.relu, w, batch["x"]), batch["y"])
        squares = optax.tree.norm(w, squared=True)
        return jnp.mean(jax.nn.sigmoid(alpha) * losses) + 0.5 * penalty * squares

    w = data["w"] if at_solution else data["init"]
    return make_problem(inner, outer, data["x"], data["x_val"], w, data["alpha"], data)


def schedule(data: Data) -> Problem:
    """Returns `work.schedule`; the inner loss takes one of the training batches."""

    def outer(w, alpha, batch):
        del alpha
        scores = perceptron(jnp.tanh, w, batch["x"])
        return jnp.mean(cross_entropy(scores, batch["y"]))

    def inner(w, alpha, batch):
        squares = jnp.stack([jnp.sum(w[0] ** 2), jnp.sum(w[2] ** 2)])
        return outer(w, alpha, batch) + 0.5 * jnp.vdot(jnp.exp(alpha[1:]), squares)

    x, x_val = data["x"], data["x_val"]
    return make_problem(inner, outer, x, x_val, data["init"], data["alpha"], data)


def batch_at(train: PyTree, step: Array) -> PyTree:
    """Returns the batch of a step of `schedule`, which goes through all in order."""
    return jax.tree.map(lambda x: x[step % len(x)], train)


def convolution(kernel: Array, x: Array) -> Array:
    """Convolves ``(n, s, s, in)`` with ``(3, 3, in, out)`` by one matrix product."""
    side = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [x[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def batch_norm(x: Array) -> Array:
    """Normalizes each channel by its mean and variance over examples and pixels."""
    mean, variance = (f(x, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def max_pool(x: Array) -> Array:
    """Returns the maxima of 2x2 pixels; odd edges are dropped."""
    number, side, _, channels = x.shape
    half = side // 2
    x = x[:, : 2 * half, : 2 * half].reshape(number, half, 2, half, 2, channels)
    corners = [x[:, :, i, :, j] for i in range(2) for j in range(2)]
    return functools.reduce(jnp.maximum, corners)  # the gradient of jnp.max may be NaN


def convolutional_scores(w: list[Array], x: Array) -> Array:
    """Returns the scores of the network of `few_shot`."""
    *layers, weights, biases = w
    for kernel, *affine in zip(*(iter(layers),) * 3, strict=True):
        scale, shift = (a[None, None, None] for a in affine)
        x = max_pool(jax.nn.relu(batch_norm(convolution(kernel, x)) * scale + shift))
    return x.reshape(len(x), -1) @ weights + biases[None]


def few_shot(data: Data) -> Problem:
    """Returns the losses of one task; all data has a leading axis of tasks."""

    def loss(w, alpha, batch):
        del alpha
        return jnp.mean(cross_entropy(convolutional_scores(w, batch["x"]), batch["y"]))

    x, x_val = data["x"], data["x_val"]
    return make_problem(loss, loss, x, x_val, data["init"], data["init"], data)


class Program:
    """A contender's call: a function of arrays, compiled at the first call."""

    def __init__(self, f: Callable, *arrays: PyTree):
        self.f, self.arrays = f, arrays
        self.compiled: Any = None

    def compile(self) -> None:
        """Compiles the function, unless it is compiled."""
        if self.compiled is None:
            self.compiled = jax.jit(self.f).lower(*self.arrays).compile()

    def __call__(self) -> np.ndarray:
        """Returns the result as one array."""
        self.compile()
        return flatten(self.compiled(*self.arrays))

    def notes(self) -> dict[str, float]:
        """Returns the bytes of scratch memory of the compiled program."""
        return {"scratch": self.compiled.memory_analysis().temp_size_in_bytes}


def flatten(result: PyTree) -> np.ndarray:
    """Returns the leaves in their order, as one array."""
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(result)]
    return leaves[0] if len(leaves) == 1 else np.concatenate(leaves)
