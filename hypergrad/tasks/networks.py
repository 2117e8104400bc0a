"""Networks of the tasks: flax modules, and functions of a plain pytree ``w``.

All modules are smooth (tanh, average pooling), so that second derivatives exist.
A convolution is a matrix product with patches, because XLA's own convolution is slow on
a CPU when it is differentiated twice.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree


class MLP(nnx.Module):
    """A multilayer perceptron with tanh activations; two sizes make it linear.

    Attributes:
      layers: Affine layers between consecutive ``sizes``.
    """

    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs):
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in pairs])

    def __call__(self, x: Float[Array, "n features"]) -> Float[Array, "n outputs"]:
        """Returns the scores of flat examples."""
        *hidden_layers, output_layer = self.layers
        for layer in hidden_layers:
            x = jnp.tanh(layer(x))
        return output_layer(x)


class CNN(nnx.Module):
    """A 3 x 3 convolution, tanh, 2 x 2 average pooling and an affine layer.

    Attributes:
      convolution: Affine map from a 3 x 3 patch to the channels.
      head: Affine map from the pooled channels to the scores.
    """

    def __init__(self, side: int, channels: int, num_outputs: int, rngs: nnx.Rngs):
        self.convolution = nnx.Linear(9, channels, rngs=rngs)
        pooled_side = (side - 2) // 2
        self.head = nnx.Linear(pooled_side**2 * channels, num_outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "n pixels"]) -> Float[Array, "n outputs"]:
        """Returns the scores of flat square images."""
        side = math.isqrt(x.shape[1])
        patches = extract_patches(x.reshape(-1, side, side), -1)
        hidden = jnp.tanh(self.convolution(patches))
        return self.head(mean_pool(hidden).reshape(len(x), -1))


def softmax_regression(
    w: PyTree, x: Float[Array, "n features"]
) -> Float[Array, "n classes"]:
    """Returns the linear scores of ``w``, a matrix ``W`` and a bias ``b``."""
    return x @ w["W"] + w["b"][None, :]


def extract_patches(x: Float[Array, "n s s ..."], axis: int) -> Array:
    """Returns the 3 x 3 neighborhood of each inner pixel along a new axis of size 9.

    Args:
      x: Images.
      axis: Position of the new axis in the result, whose other axes have the shape
        ``[n, s - 2, s - 2, ...]``.
    """
    num_inner = x.shape[1] - 2
    shifts = itertools.product(range(3), repeat=2)
    return jnp.stack(
        [x[:, i : i + num_inner, j : j + num_inner] for i, j in shifts], axis
    )


def mean_pool(maps: Float[Array, "n s s c"]) -> Float[Array, "n s//2 s//2 c"]:
    """Returns the means of 2 x 2 cells; an odd last row or column is dropped."""
    num, side, _, channels = maps.shape
    half = side // 2
    cells = maps[:, : 2 * half, : 2 * half].reshape(num, half, 2, half, 2, channels)
    return jnp.mean(cells, axis=(2, 4))


def strided_convolution(layer: PyTree, x: Float[Array, "n h w c"]) -> Array:
    """Applies 3 by 3 filters with stride 2, as one matrix product."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [
        x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)
    ]
    return jnp.concatenate(patches, axis=-1) @ layer["W"]


def batch_norm(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Standardizes each feature over the batch and the pixels."""
    axes = tuple(range(x.ndim - 1))
    mean, variance = (f(x, axes, keepdims=True) for f in (jnp.mean, jnp.var))
    return (x - mean) / jnp.sqrt(variance + 1e-5)


def split_module(module: nnx.Module) -> tuple[nnx.GraphDef, PyTree]:
    """Returns the static graph of a module, hashed by value, and its arrays ``w``."""
    graph, state = nnx.split(module)
    w = nnx.to_pure_dict(state)
    return graph, jax.tree.map(lambda leaf: leaf.astype(float), w)
