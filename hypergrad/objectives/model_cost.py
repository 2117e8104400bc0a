"""Costs of a model as differentiable functions of its relaxed sizes.

A width may be any positive number, such as the sum of the gates of a layer or the
exponential of a hyperparameter. The counts are exact at whole numbers that the
precision represents, in float32 up to 2^24.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Widths = Sequence[float | Array] | Float[Array, " L+1"]


def num_parameters(widths: Widths) -> Float[Array, ""]:
    """Returns the number of weights and biases of dense layers.

    It is ``sum_i (n_i + 1) n_(i+1)``.

    Args:
      widths: Sizes n_0, ..., n_L of the input and of the output of each layer.

    Raises:
      ValueError: ``widths`` has fewer than two numbers.

    >>> from hypergrad.objectives import num_parameters
    >>> float(num_parameters([64.0, 32.0, 10.0]))
    2410.0
    """
    n = _as_widths(widths)
    return jnp.sum((n[:-1] + 1) * n[1:])


def num_flops(widths: Widths) -> Float[Array, ""]:
    """Returns the number of operations of dense layers on one example.

    It is ``sum_i 2 n_i n_(i+1)``: a multiplication and an addition for each weight. The
    addition of a bias takes the place of the one that a sum of n terms saves.
    Activation functions are not counted.

    Args:
      widths: As for `num_parameters`.

    Raises:
      ValueError: ``widths`` has fewer than two numbers.

    >>> from hypergrad.objectives import num_flops
    >>> float(num_flops([64.0, 32.0, 10.0]))
    4736.0
    """
    n = _as_widths(widths)
    return 2 * jnp.sum(n[:-1] * n[1:])


def activation_bytes(
    widths: Widths, batch_size: int = 1, bytes_per_number: int = 4
) -> Float[Array, ""]:
    """Returns the memory that the reverse pass of dense layers needs, in bytes.

    The reverse pass stores the input of each layer:
    ``batch_size * bytes_per_number * sum_(i<L) n_i``.

    Args:
      widths: As for `num_parameters`.
      batch_size: Number of examples per batch. Defaults to 1.
      bytes_per_number: Size of a number. Defaults to 4, the size of float32.

    Raises:
      ValueError: ``widths`` has fewer than two numbers.

    >>> from hypergrad.objectives import activation_bytes
    >>> float(activation_bytes([64.0, 32.0, 10.0], batch_size=8))
    3072.0
    """
    return batch_size * bytes_per_number * jnp.sum(_as_widths(widths)[:-1])


def expected_cost(
    logits: Float[Array, "... num_operations"], costs: Array
) -> Float[Array, ""]:
    """Returns the expected cost of operations that are sampled from a softmax.

    It is ``sum_ek softmax(logits_e)_k costs_k`` over the edges e of a network.

    Args:
      logits: Logits of the operations, ``[..., operations]``, for one or more edges.
      costs: Cost of each operation, ``[operations]``, or one per edge, like ``logits``.

    >>> import jax.numpy as jnp
    >>> from hypergrad.objectives import expected_cost
    >>> float(expected_cost(jnp.zeros((3, 2)), jnp.array([1.0, 5.0])))
    9.0
    """
    return jnp.sum(jax.nn.softmax(logits) * jnp.broadcast_to(costs, logits.shape))


def _as_widths(widths: Widths) -> Array:
    n = 1.0 * jnp.asarray(widths)
    if n.ndim != 1 or n.size < 2:
        raise ValueError(
            "widths must be at least two numbers, the sizes of the input and of each "
            f"layer; got shape {n.shape}."
        )
    return n
