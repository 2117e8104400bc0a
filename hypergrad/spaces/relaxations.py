"""Relaxations of discrete choices, which give `minimize` a gradient to follow.

A choice is a one-hot vector x with probabilities ``p = softmax(alpha)`` over the last
axis of the logits ``alpha``. The losses use a relaxed sample of x. The samples need a
PRNG key, which comes with the batch: ``hg.Batches(data, with_key=True)``. A mixture of
all choices needs no sampling: declare its weights as `Simplex`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ..citation import cites
from ..number_checks import positive


@cites("jang2017", "maddison2017")
def gumbel_softmax(
    logits: Float[Array, "... n"], key: Array, temperature: ArrayLike
) -> Float[Array, "... n"]:
    """Returns ``softmax((logits + g) / temperature)`` with Gumbel noise g.

    Args:
      logits: Unnormalized log-probabilities, ``[..., n]``.
      key: PRNG key.
      temperature: Positive number. As it falls to 0, the rows become one-hot samples.

    Raises:
      TypeError, ValueError: ``temperature`` is not a positive number.

    Returns:
      Rows that sum to 1, ``[..., n]``; the largest weight of a row is a sample of p.

    Bias: of value and gradient; it falls with the temperature, while the variance of
    the gradient grows.

    Source: Jang, Gu & Poole 2017, arXiv:1611.01144; Maddison, Mnih & Teh 2017,
    arXiv:1611.00712.

    >>> weights = gumbel_softmax(jnp.zeros(3), jax.random.key(0), 0.5)
    >>> round(float(weights.sum()), 5)
    1.0
    """
    temperature = positive("temperature")(temperature)
    dtype = jnp.result_type(logits)
    logits = _as_float32_at_least(logits)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else logits.dtype
    noise = jax.random.gumbel(key, jnp.shape(logits), logits.dtype)
    return jax.nn.softmax((logits + noise) / temperature, axis=-1).astype(dtype)


@cites("bengio2013")
def straight_through(
    logits: Float[Array, "... n"], key: Array
) -> Float[Array, "... n"]:
    """Returns a one-hot sample whose derivative is the derivative of p.

    Args:
      logits: Unnormalized log-probabilities, ``[..., n]``.
      key: PRNG key.

    Returns:
      One-hot rows, ``[..., n]``.

    Bias: none of the value; none of the gradient of a loss that is linear in the
    sample, and unknown for other losses.

    Source: Bengio, Leonard & Courville 2013, arXiv:1308.3432.

    >>> sample = straight_through(jnp.zeros(3), jax.random.key(0))
    >>> sorted(sample.tolist())
    [0.0, 0.0, 1.0]
    """
    p = jax.nn.softmax(logits, axis=-1)
    return _one_hot_sample(logits, key) + (p - jax.lax.stop_gradient(p))


@cites("williams1992", "foerster2018")
def score_function(
    loss: Callable[[Float[Array, "... n"]], Array],
    logits: Float[Array, "... n"],
    key: Array,
    baseline: ArrayLike = 0.0,
) -> Array:
    """Returns the loss of a one-hot sample, with the derivatives of its expectation.

    The result is

        (loss(x) - b) exp(log p(x) - stop_gradient(log p(x))) + b

    for a sample x and a baseline b. Its value is ``loss(x)``, and its gradient adds
    ``(loss(x) - b) grad log p(x)`` to the gradient of the loss. Derivatives of any
    order are unbiased, so that it may stand in either loss.

    Args:
      loss: Function of one-hot rows ``[..., n]`` that returns a scalar. It need not be
        differentiable in them.
      logits: Unnormalized log-probabilities, ``[..., n]``; rows are independent.
      key: PRNG key.
      baseline: A number near the mean loss that does not depend on the sample. Defaults
        to 0.

    Returns:
      A scalar.

    Raises:
      ValueError: ``loss`` does not return a scalar.

    Bias: none of the value, nor of any derivative by ``logits`` or by what ``loss``
    closes over. The variance falls with a good baseline.

    Source: Williams 1992; Foerster et al. 2018, arXiv:1802.05098.

    >>> values = jnp.array([1.0, 3.0])
    >>> loss = lambda logits, key: score_function(lambda x: x @ values, logits, key)
    >>> keys = jax.random.split(jax.random.key(0), 10000)
    >>> gradients = jax.vmap(jax.grad(loss), (None, 0))(jnp.zeros(2), keys)
    >>> bool(jnp.allclose(gradients.mean(0), jnp.array([-0.5, 0.5]), atol=0.05))
    True
    """
    x = _one_hot_sample(logits, key)
    value = loss(x)
    if shape := jnp.shape(value):
        raise ValueError(
            f"loss must return a scalar, such as a mean over rows; got shape {shape}."
        )
    log_p = jnp.sum(jnp.where(x > 0, jax.nn.log_softmax(logits, axis=-1), 0))
    # The "magic box" of Foerster et al.: 1, with the derivatives of a likelihood ratio.
    magic_box = jnp.exp(log_p - jax.lax.stop_gradient(log_p))
    return (value - baseline) * magic_box + baseline


def _as_float32_at_least(logits: Array) -> Array:
    """Returns logits in a precision whose noise has no ties, unlike bfloat16."""
    dtype = jnp.promote_types(jnp.result_type(logits), jnp.float32)
    return jnp.asarray(logits, dtype)


def _one_hot_sample(logits: Array, key: Array) -> Array:
    fixed = _as_float32_at_least(jax.lax.stop_gradient(logits))
    index = jax.random.categorical(key, fixed, axis=-1)
    n = jnp.shape(logits)[-1]
    return jax.nn.one_hot(index, n, dtype=jnp.result_type(logits))
