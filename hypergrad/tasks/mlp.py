"""A multilayer perceptron with tanh activations, whose parameters are a plain list."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def init(key: Array, sizes: Sequence[int]) -> PyTree:
    """Returns initial parameters, a dict ``{"W": [m, n], "b": [n]}`` per layer.

    ``W`` has the Glorot normal initialization and ``b`` is zero.
    """
    glorot = jax.nn.initializers.glorot_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"W": glorot(layer_key, (m, n)), "b": jnp.zeros(n)}
        for layer_key, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(layers: PyTree, x: Float[Array, "... m"]) -> Float[Array, "... n"]:
    """Returns the outputs of the network; the last layer is linear."""
    *hidden_layers, output_layer = layers
    for layer in hidden_layers:
        x = jnp.tanh(_affine(layer, x))
    return _affine(output_layer, x)


def _affine(layer: PyTree, x: Float[Array, "... m"]) -> Float[Array, "... n"]:
    bias = jnp.broadcast_to(layer["b"], (*x.shape[:-1], layer["b"].size))
    return jnp.dot(x, layer["W"]) + bias
