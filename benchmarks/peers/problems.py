"""The works of `work.py` as two JAX losses and their data, for every JAX contender.

Layouts are those that JAX does best with on CPU: examples of linear models come
second, so that ``w @ x`` and ``x @ r`` both run along them, and convolutions are
patches and one matrix product.
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
    """Losses of ``(w, alpha, batch)``, their data, a starting or given w, and alpha.

    ``given`` holds the numbers of the work: steps, rate, momentum, products.
    """

    inner: Loss
    outer: Loss
    train: PyTree
    val: PyTree
    w: PyTree
    alpha: PyTree
    given: dict[str, Any]

    @property
    def arrays(self) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """``(train, val, w, alpha)``: what a compiled function is given."""
        return self.train, self.val, self.w, self.alpha


def made(
    inner: Loss,
    outer: Loss,
    x: np.ndarray,
    x_val: np.ndarray,
    w: PyTree,
    alpha: PyTree,
    data: Data,
) -> Problem:
    """With the labels and the numbers of ``data``, whose arrays are let go."""
    arrays = {"x": x, "y": data["y"]}, {"x": x_val, "y": data["y_val"]}, w, alpha
    numbers = {name: value for name, value in data.items() if np.isscalar(value)}
    return Problem(inner, outer, *jax.tree.map(jnp.asarray, arrays), numbers)


def misfit(w: Array, alpha: Array, batch: PyTree) -> Array:
    """Mean of ``softplus(-y x.w)``, of x ``(features, examples)``."""
    del alpha
    return jnp.mean(jax.nn.softplus(-batch["y"] * (w @ batch["x"])))


def penalised(w: Array, alpha: Array, batch: PyTree) -> Array:
    """With a log-penalty a feature, or one for all."""
    return misfit(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


def columns(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.T)


def logistic(data: Data, *, solved: bool = False) -> Problem:
    """Begins at 0; where ``solved`` w is the given one."""
    w = data["w"] if solved else np.zeros_like(data["w"])
    x, x_val = columns(data["x"]), columns(data["x_val"])
    return made(penalised, misfit, x, x_val, w, data["alpha"], data)


def cross_entropy(scores: Array, y: Array) -> Array:
    """Of each example."""
    return optax.softmax_cross_entropy_with_integer_labels(scores, y)


def layered(act: Callable[[Array], Array], w: list[Array], x: Array) -> Array:
    """Scores of one hidden layer."""
    first, bias, second, last = w
    along = lambda b: b.reshape((1,) * (x.ndim - 1) + b.shape)
    return act(x @ first + along(bias)) @ second + along(last)


def cleaning(data: Data, *, solved: bool = False) -> Problem:
    """From the initialisation; where ``solved`` w is the given one."""
    penalty = data["penalty"]

    def outer(w, alpha, batch):
        del alpha
        scores = layered(jax.nn.relu, w, batch["x"])
        return jnp.mean(cross_entropy(scores, batch["y"]))

    def inner(w, alpha, batch):
        each = cross_entropy(layered(jax.nn.relu, w, batch["x"]), batch["y"])
        squares = optax.tree.norm(w, squared=True)
        return jnp.mean(jax.nn.sigmoid(alpha) * each) + 0.5 * penalty * squares

    w = data["w"] if solved else data["init"]
    return made(inner, outer, data["x"], data["x_val"], w, data["alpha"], data)


def schedule(data: Data) -> Problem:
    """Training data has its batches in front, of which the inner loss takes one."""

    def outer(w, alpha, batch):
        del alpha
        scores = layered(jnp.tanh, w, batch["x"])
        return jnp.mean(cross_entropy(scores, batch["y"]))

    def inner(w, alpha, batch):
        squares = jnp.stack([jnp.sum(w[0] ** 2), jnp.sum(w[2] ** 2)])
        return outer(w, alpha, batch) + 0.5 * jnp.vdot(jnp.exp(alpha[1:]), squares)

    x, x_val = data["x"], data["x_val"]
    return made(inner, outer, x, x_val, data["init"], data["alpha"], data)


def batch_of(train: PyTree, step: Array) -> PyTree:
    """The batch of a step of `schedule`: each in turn."""
    return jax.tree.map(lambda x: x[step % len(x)], train)


def convolved(kernel: Array, x: Array) -> Array:
    """``(n, s, s, in)`` by a kernel ``(3, 3, in, out)``, one matrix product."""
    side = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [x[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, kernel.shape[-1])


def normalised(x: Array) -> Array:
    """Each channel by its mean and variance over examples and places."""
    mean, variance = (f(x, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


def pooled(x: Array) -> Array:
    """The largest of 2 by 2; odd edges are dropped."""
    number, side, _, channels = x.shape
    half = side // 2
    x = x[:, : 2 * half, : 2 * half].reshape(number, half, 2, half, 2, channels)
    parts = [x[:, :, i, :, j] for i in range(2) for j in range(2)]
    return functools.reduce(jnp.maximum, parts)  # that of jnp.max may be 0 / 0


def convolutional(w: list[Array], x: Array) -> Array:
    """Scores of the network of `few_shot`."""
    *layers, weights, biases = w
    for kernel, *affine in zip(*(iter(layers),) * 3, strict=True):
        scale, shift = (a[None, None, None] for a in affine)
        x = pooled(jax.nn.relu(normalised(convolved(kernel, x)) * scale + shift))
    return x.reshape(len(x), -1) @ weights + biases[None]


def few_shot(data: Data) -> Problem:
    """One task's losses; tasks come in front in all data."""

    def loss(w, alpha, batch):
        del alpha
        return jnp.mean(cross_entropy(convolutional(w, batch["x"]), batch["y"]))

    x, x_val = data["x"], data["x_val"]
    return made(loss, loss, x, x_val, data["init"], data["init"], data)


class Program:
    """A function of arrays as a contender's call, compiled when first called."""

    def __init__(self, f: Callable, *arrays: PyTree):
        self.f, self.arrays = f, arrays
        self.compiled: Any = None

    def compile(self) -> None:
        """Once."""
        if self.compiled is None:
            self.compiled = jax.jit(self.f).lower(*self.arrays).compile()

    def __call__(self) -> np.ndarray:
        """The answer, flat."""
        self.compile()
        return flat(self.compiled(*self.arrays))

    def notes(self) -> dict[str, float]:
        """Bytes of scratch of the compiled program."""
        return {"scratch": self.compiled.memory_analysis().temp_size_in_bytes}


def flat(answer: PyTree) -> np.ndarray:
    """Leaves in their order, as one array."""
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(answer)]
    return leaves[0] if len(leaves) == 1 else np.concatenate(leaves)
