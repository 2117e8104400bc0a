"""The tasks' networks: flax modules and functions of ``w``, which is a plain pytree.

Smooth throughout (tanh, means instead of maxima), so that second derivatives exist.
Convolution is patches and one matrix product: XLA's own is slow on a CPU where it is
differentiated twice.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree


class MLP(nnx.Module):
    """Affine layers of the given sizes with tanh between; two sizes make it linear."""

    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs):
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in pairs])

    def __call__(self, x: Array) -> Array:
        """Scores ``[n, sizes[-1]]``."""
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


class CNN(nnx.Module):
    """A convolution of 3 by 3, tanh, means over 2 by 2, and an affine layer."""

    def __init__(self, side: int, channels: int, num_outputs: int, rngs: nnx.Rngs):
        self.convolution = nnx.Linear(9, channels, rngs=rngs)
        pooled = (side - 2) // 2
        self.head = nnx.Linear(pooled**2 * channels, num_outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Scores ``[n, num_outputs]`` of square images ``[n, side²]``."""
        side = math.isqrt(x.shape[1])
        hidden = jnp.tanh(self.convolution(patches(x.reshape(-1, side, side), -1)))
        return self.head(means(hidden).reshape(len(x), -1))


def softmax_regression(w: PyTree, x: Array) -> Array:
    """Scores ``[n, k]`` by ``W [m, k]`` and ``b [k]``."""
    return x @ w["W"] + w["b"][None, :]


def patches(x: Array, axis: int) -> Array:
    """The 3 by 3 neighbours of each inner pixel, along a new axis of nine.

    ``[n, s, s, ...] -> [n, s-2, s-2, ...]`` and the new one at ``axis``.
    """
    inner = x.shape[1] - 2
    shifts = itertools.product(range(3), repeat=2)
    return jnp.stack([x[:, i : i + inner, j : j + inner] for i, j in shifts], axis)


def means(maps: Array) -> Array:
    """Means over 2 by 2 cells, ``[n, s, s, c] -> [n, s//2, s//2, c]``; odd ends go."""
    num, side, _, channels = maps.shape
    half = side // 2
    cells = maps[:, : 2 * half, : 2 * half].reshape(num, half, 2, half, 2, channels)
    return jnp.mean(cells, axis=(2, 4))


def parameters(module: nnx.Module) -> tuple[Any, PyTree]:
    """``(graph, w)``: what is static, hashed by value, and the arrays."""
    graph, state = nnx.split(module)
    w = nnx.to_pure_dict(state)
    return graph, jax.tree.map(lambda leaf: leaf.astype(float), w)
