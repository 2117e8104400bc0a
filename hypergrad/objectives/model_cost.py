"""What a model costs, as differentiable functions of relaxed sizes.

A width may be any positive number: the sum of a layer's gates, the exponential of a
hyperparameter. At whole numbers the counts are exact.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def num_parameters(widths: Sequence[float | Array] | Array) -> Array:
    """Weights and biases of dense layers: ``sum_i (n_i + 1) n_(i+1)``.

    Args:
      widths: n_0, ..., n_L, of the input and of each layer's output.

    >>> from hypergrad.objectives import num_parameters
    >>> float(num_parameters([64.0, 32.0, 10.0]))
    2410.0
    """
    n = _widths(widths)
    return jnp.sum((n[:-1] + 1) * n[1:])


def num_flops(widths: Sequence[float | Array] | Array) -> Array:
    """Operations of dense layers on one example: ``sum_i 2 n_i n_(i+1)``.

    A multiplication and an addition for each weight, the bias's in place of the one
    that a sum of n terms saves. Activation functions are not counted.

    Args:
      widths: as of `num_parameters`.

    >>> from hypergrad.objectives import num_flops
    >>> float(num_flops([64.0, 32.0, 10.0]))
    4736.0
    """
    n = _widths(widths)
    return 2 * jnp.sum(n[:-1] * n[1:])


def activation_bytes(
    widths: Sequence[float | Array] | Array,
    batch_size: int = 1,
    bytes_per_number: int = 4,
) -> Array:
    """What the reverse pass through dense layers keeps: the input of each.

    ``batch_size * bytes_per_number * sum_(i<L) n_i``.

    Args:
      widths: as of `num_parameters`.
      batch_size: examples in a batch.
      bytes_per_number: 4 for float32.

    >>> from hypergrad.objectives import activation_bytes
    >>> float(activation_bytes([64.0, 32.0, 10.0], batch_size=8))
    3072.0
    """
    return batch_size * bytes_per_number * jnp.sum(_widths(widths)[:-1])


def expected_cost(logits: Array, costs: Array) -> Array:
    """Cost of operations drawn from a softmax: ``sum_ek softmax(logits_e)_k costs_k``.

    Args:
      logits: ``[..., operations]``, over one edge of a network or several.
      costs: ``[operations]``, or one an edge, like ``logits``.

    >>> import jax.numpy as jnp
    >>> from hypergrad.objectives import expected_cost
    >>> float(expected_cost(jnp.zeros((3, 2)), jnp.array([1.0, 5.0])))
    9.0
    """
    return jnp.sum(jax.nn.softmax(logits) * jnp.broadcast_to(costs, logits.shape))


def num_labelled(weights: Array) -> Array:
    """Examples to label: the sum of their weights in [0, 1].

    Args:
      weights: ``[n]``, the probability that an example is labelled, or how far it is.

    >>> import jax.numpy as jnp
    >>> from hypergrad.objectives import num_labelled
    >>> float(num_labelled(jnp.array([1.0, 0.5, 0.0])))
    1.5
    """
    return jnp.sum(weights)


def _widths(widths: Sequence[float | Array] | Array) -> Array:
    n = 1.0 * jnp.asarray(widths)
    if n.ndim != 1 or n.size < 2:
        raise ValueError(
            "widths must be at least two numbers, the input's and each layer's; got "
            f"shape {n.shape}"
        )
    return n
