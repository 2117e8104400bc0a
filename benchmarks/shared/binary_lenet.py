"""The network of Ren et al. 2018 for two classes of images of 28 x 28 pixels.

Three convolutions of 5 x 5 with 16, 32 and 64 channels and a margin of two zeros, each
with a maximum over 3 x 3 at every second place and a ReLU; then 100 units and one. The
images are the last axis, so that each row of a kernel is one product of matrices, and
gradients are made by chunks of images whose values stay in the cache: in a loop XLA has
no fast convolution on CPUs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

SIDE, KERNEL, MARGIN = 28, 5, 2
SHAPES = {
    "conv1": (KERNEL, KERNEL, 1, 16),
    "conv2": (KERNEL, KERNEL, 16, 32),
    "conv3": (KERNEL, KERNEL, 32, 64),
    "fc1": (4 * 4 * 64, 100),
    "fc2": (100, 1),
}
CHUNK = 25  # images of a chunk


def sample_w(key: Array) -> PyTree:
    """Returns truncated normal kernels of scale 0.1, and biases of 0."""
    keys = jax.random.split(key, len(SHAPES))
    sample = lambda key, shape: 0.1 * jax.random.truncated_normal(key, -2, 2, shape)
    return {
        name: {"kernel": sample(key, shape), "bias": jnp.zeros(shape[-1])}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def convolve(layer: PyTree, x: Float[Array, "c h w n"]) -> Float[Array, "out h w n"]:
    """Returns the convolution with a margin of zeros, plus the bias."""
    kernel, (_, height, width, num_images) = layer["kernel"], x.shape
    x = jnp.pad(x, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    # The columns of a row of the kernel, as further channels.
    x = jnp.concatenate([x[:, :, j : j + width] for j in range(KERNEL)])
    rows = kernel.reshape(KERNEL, len(x), kernel.shape[-1])
    product = lambda i: rows[i].T @ x[:, i : i + height].reshape(len(x), -1)
    z = functools.reduce(jnp.add, map(product, range(KERNEL)))
    z = z.reshape(-1, height, width, num_images)
    return z + layer["bias"][:, None, None, None]


def max_pool(z: Float[Array, "c h w n"]) -> Float[Array, "c h2 w2 n"]:
    """Returns maxima over 3 x 3 at every second place, padded as TensorFlow does."""
    for axis in (1, 2):
        size = z.shape[axis]
        new_size = -(-size // 2)
        margin = 2 * new_size + 1 - size
        pads = [(0, 0)] * z.ndim
        pads[axis] = (margin // 2, margin - margin // 2)
        z = jnp.pad(z, pads, constant_values=-jnp.inf)
        places = [
            jax.lax.slice_in_dim(z, i, i + 2 * new_size - 1, 2, axis) for i in range(3)
        ]
        z = jnp.maximum(jnp.maximum(places[0], places[1]), places[2])
    return z


def scores(w: PyTree, x: Float[Array, "n 784"]) -> Float[Array, " n"]:
    """Returns the log-odds of class 1."""
    x = x.reshape(-1, SIDE, SIDE).transpose(1, 2, 0)[None]
    for name in ("conv1", "conv2", "conv3"):
        x = jax.nn.relu(max_pool(convolve(w[name], x)))
    x = x.transpose(1, 2, 0, 3).reshape(-1, x.shape[-1])
    x = jax.nn.relu(w["fc1"]["kernel"].T @ x + w["fc1"]["bias"][:, None])
    return (w["fc2"]["kernel"].T @ x + w["fc2"]["bias"][:, None])[0]


def losses(w: PyTree, batch: PyTree) -> Float[Array, " n"]:
    """Returns the cross-entropy of each example of ``{"x": [n, 784], "y": [n]}``."""
    return optax.sigmoid_binary_cross_entropy(scores(w, batch["x"]), batch["y"])


def weighted_loss(w: PyTree, alpha: Float[Array, " n"], batch: PyTree) -> Array:
    """Returns the sum over the examples of weight times cross-entropy."""
    return jnp.sum(alpha * losses(w, batch))


def to_chunks(batch: PyTree) -> PyTree:
    """Returns the batch with a leading axis of chunks, whose size must divide it."""
    return jax.tree.map(
        lambda x: x.reshape(-1, min(CHUNK, len(x)), *x.shape[1:]), batch
    )


def weighted_grad(w: PyTree, alpha: Float[Array, " n"], batch: PyTree) -> PyTree:
    """Returns the gradient of `weighted_loss`, chunk by chunk."""

    def add(total: PyTree, chunk: tuple[Array, PyTree]) -> tuple[PyTree, None]:
        grad = jax.grad(weighted_loss)(w, *chunk)
        return jax.tree.map(jnp.add, total, grad), None

    zeros = jax.tree.map(jnp.zeros_like, w)
    return jax.lax.scan(add, zeros, to_chunks((alpha, batch)))[0]


def test_error(w: PyTree, data: dict[str, np.ndarray]) -> float:
    """Returns the share of wrong answers, in percent."""
    is_wrong = (_scores(w, data["x"]) > 0) != (data["y"] > 0)
    return 100 * float(jnp.mean(is_wrong))


_scores = jax.jit(scores)
