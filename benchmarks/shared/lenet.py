"""LeNet for images of 28 x 28 pixels, of which a step is quick on one CPU core.

The layers are those of SsnL/dataset-distillation: two convolutions of 5 x 5 with 6 and
16 channels, the first one with a margin of two zeros, each with a maximum over 2 x 2
pixels and a ReLU; then 120, 84 and 10 units.

A convolution with its maximum is one product of matrices. Images are cut into square
blocks, and the pixels of a few neighbouring blocks determine one tile of the result by
a matrix in which the kernel is repeated. The images are the last axis, so that patches
are made of contiguous rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

SIDE, KERNEL = 28, 5
SHAPES = {
    "conv1": (KERNEL, KERNEL, 1, 6),
    "conv2": (KERNEL, KERNEL, 6, 16),
    "fc1": (16 * 5 * 5, 120),
    "fc2": (120, 84),
    "fc3": (84, 10),
}
BLOCKS = {"conv1": 4, "conv2": 2}  # sides of the blocks, in pixels
CHUNK = 32  # images of a chunk, of which the intermediate values fit in the cache


def sample_lenet(key: Array) -> dict[str, dict[str, Array]]:
    """Returns weights of normal Xavier initialization, and biases of 0."""
    w = {}
    for name, shape in SHAPES.items():
        key, layer_key = jax.random.split(key)
        field = int(np.prod(shape[:-2]))
        deviation = np.sqrt(2 / (field * (shape[-2] + shape[-1])))
        kernel = deviation * jax.random.normal(layer_key, shape, jnp.float32)
        w[name] = {"kernel": kernel, "bias": jnp.zeros(shape[-1], jnp.float32)}
    return w


def to_blocks(x: Array) -> Array:
    """Returns images ``[n, 784]`` with a margin, cut into blocks ``[16, 8, 8, n]``."""
    n, block = len(x), BLOCKS["conv1"]
    x = jnp.pad(x.reshape(n, SIDE, SIDE), ((0, 0), (2, 2), (2, 2)))
    num_blocks = (SIDE + 4) // block
    x = x.reshape(n, num_blocks, block, num_blocks, block)
    return x.transpose(2, 4, 1, 3, 0).reshape(-1, num_blocks, num_blocks, n)


def tile_matrix(kernel: Array, block: int) -> tuple[Array, int]:
    """Returns the matrix of one tile of a convolution, and the blocks per side of it.

    Its rows are the results of a tile of ``block x block`` pixels: the four members of
    each maximum, then the rows, columns and channels of the maxima. Its columns are
    the pixels on which the tile depends, block by block.
    """
    num_blocks = -(-(block + KERNEL - 1) // block)
    size = num_blocks * block
    offsets = [
        (2 * row + i, 2 * column + j)
        for i in range(2)
        for j in range(2)
        for row in range(block // 2)
        for column in range(block // 2)
    ]
    place = lambda i, j: jnp.pad(
        kernel,
        ((i, size - KERNEL - i), (j, size - KERNEL - j), (0, 0), (0, 0)),
    )
    matrix = jnp.stack([place(i, j) for i, j in offsets])
    matrix = matrix.reshape(
        len(offsets), num_blocks, block, num_blocks, block, *kernel.shape[2:]
    )
    matrix = matrix.transpose(0, 6, 1, 3, 2, 4, 5)
    return matrix.reshape(len(offsets) * kernel.shape[-1], -1), num_blocks


def convolve(layer: PyTree, x: Array, block: int) -> Array:
    """Returns a layer's ReLU of maxima over 2 x 2 results of its convolution.

    Args:
      layer: Kernel ``[5, 5, in, out]`` and bias ``[out]``.
      x: Blocks of pixels and channels, ``[block * block * in, rows, columns, n]``.
      block: Side of a block.

    Returns:
      ``[(block / 2)^2 * out, rows, columns, n]``, blocks of the maxima.
    """
    matrix, num_blocks = tile_matrix(layer["kernel"], block)
    n, num_tiles = x.shape[-1], x.shape[1] - num_blocks + 1
    patches = jnp.stack(
        [
            x[:, i : i + num_tiles, j : j + num_tiles]
            for i in range(num_blocks)
            for j in range(num_blocks)
        ]
    )
    z = matrix @ patches.reshape(matrix.shape[1], -1)
    z = z.reshape(4, -1, z.shape[-1])
    z = jnp.maximum(jnp.maximum(z[0], z[1]), jnp.maximum(z[2], z[3]))
    bias = jnp.tile(layer["bias"], (block // 2) ** 2)
    return jax.nn.relu(z + bias[:, None]).reshape(-1, num_tiles, num_tiles, n)


def scores(w: PyTree, x: Array) -> Array:
    """Returns the scores of the ten classes, ``[n, 10]``, for images ``[n, 784]``."""
    x = to_blocks(x)
    for name, block in BLOCKS.items():
        x = convolve(w[name], x, block)
    x = x.reshape(-1, x.shape[-1])
    for name in ("fc1", "fc2"):
        x = jax.nn.relu(w[name]["kernel"].T @ x + w[name]["bias"][:, None])
    return (w["fc3"]["kernel"].T @ x + w["fc3"]["bias"][:, None]).T


def cross_entropy(w: PyTree, x: Array, labels: Array) -> Array:
    """Returns the mean cross-entropy with labels ``[n, 10]``, which may be any."""
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(scores(w, x)), axis=1))


@jax.custom_vjp
def chunked_cross_entropy(w: PyTree, x: Array, y: Array) -> Array:
    """Returns the mean cross-entropy with classes ``y``; the gradient is that of ``w``.

    The gradient is computed with the value, chunk by chunk. A batch must have a number
    of images that the size of a chunk divides.
    """
    return _value_and_grad(w, x, y)[0]


def _value_and_grad(w: PyTree, x: Array, y: Array) -> tuple[Array, PyTree]:
    labels = jax.nn.one_hot(y, SHAPES["fc3"][-1], dtype=x.dtype)
    to_chunks = lambda a: a.reshape(-1, CHUNK, a.shape[-1])
    chunks = to_chunks(x), to_chunks(labels)
    num_chunks = len(chunks[0])

    def add(total: PyTree, chunk: tuple[Array, Array]) -> tuple[PyTree, None]:
        terms = jax.value_and_grad(cross_entropy)(w, *chunk)
        return jax.tree.map(jnp.add, total, terms), None

    zeros = jnp.zeros((), x.dtype), jax.tree.map(jnp.zeros_like, w)
    total, _ = jax.lax.scan(add, zeros, chunks)
    return jax.tree.map(lambda t: t / num_chunks, total)


def _backward(grad: PyTree, cotangent: Array) -> tuple[PyTree, None, None]:
    return jax.tree.map(lambda g: cotangent * g, grad), None, None


chunked_cross_entropy.defvjp(_value_and_grad, _backward)
