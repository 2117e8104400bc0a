"""A plain network of tanh layers, whose ``w`` is a list."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


def init(key: Array, sizes: Sequence[int]) -> PyTree:
    """One ``{"W": [m, n], "b": [n]}`` a layer; ``W`` by Glorot's rule, ``b`` zero."""
    glorot = jax.nn.initializers.glorot_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"W": glorot(k, (m, n)), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(layers: PyTree, x: Array) -> Array:
    """``[..., m] -> [..., n]``; the last layer is linear."""
    *hidden, last = layers
    affine = lambda layer, x: (
        jnp.dot(x, layer["W"])
        + jnp.broadcast_to(layer["b"], (*x.shape[:-1], layer["b"].size))
    )
    for layer in hidden:
        x = jnp.tanh(affine(layer, x))
    return affine(last, x)
