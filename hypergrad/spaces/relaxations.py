"""Gradients for choices: losses that see a sample, or a mixture, of logits ``alpha``.

With ``p = softmax(alpha)`` over the last axis, each makes something of a discrete ``x``
(one-hot) that `minimize` can follow. The plainest needs none of them: declare the
weights of a mixture as `Simplex`. The others draw, by a key that comes with the batch:
``hg.Batches(data, with_key=True)``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ..citation import cites


@cites("jang2017", "maddison2017")
def gumbel_softmax(logits: Array, key: Array, temperature: ArrayLike) -> Array:
    """Weights near a vertex: ``softmax((logits + g) / temperature)``, g Gumbel noise.

    Args:
      logits: [..., n].
      key: PRNG key.
      temperature: above 0; one-hot samples of p as it falls to 0.

    Returns:
      [..., n], rows that sum to 1; the largest weight is a sample of p.

    Bias: of the value and its gradient, falling with the temperature, while the
    gradient's variance grows. Source: Jang, Gu & Poole 2017, arXiv:1611.01144;
    Maddison, Mnih & Teh 2017, arXiv:1611.00712.

    >>> weights = gumbel_softmax(jnp.zeros(3), jax.random.key(0), 0.5)
    >>> round(float(weights.sum()), 5)
    1.0
    """
    noise = jax.random.gumbel(key, jnp.shape(logits), jnp.result_type(logits))
    return jax.nn.softmax((logits + noise) / temperature, axis=-1)


@cites("bengio2013")
def straight_through(logits: Array, key: Array) -> Array:
    """A one-hot sample of p that is differentiated as if it were p.

    Args:
      logits: [..., n].
      key: PRNG key.

    Returns:
      [..., n], one-hot rows.

    Bias: none in the value; in the gradient none for a loss that is linear in the
    sample, and unknown otherwise. Source: Bengio, Leonard & Courville 2013,
    arXiv:1308.3432.

    >>> sample = straight_through(jnp.zeros(3), jax.random.key(0))
    >>> sorted(sample.tolist())
    [0.0, 0.0, 1.0]
    """
    p = jax.nn.softmax(logits, axis=-1)
    return _sample(logits, key) + (p - jax.lax.stop_gradient(p))


@cites("williams1992", "foerster2018")
def score_function(
    loss: Callable[[Array], Array],
    logits: Array,
    key: Array,
    baseline: ArrayLike = 0.0,
) -> Array:
    """The loss of a one-hot sample, with the derivatives of its expectation.

    ``(loss(x) - b) exp(log p(x) - stop_gradient(log p(x))) + b``: its value is
    ``loss(x)``, its gradient ``(loss(x) - b) grad log p(x)`` beside the loss's own, and
    cross derivatives of higher order are as right, so that it may stand in either loss.

    Args:
      loss: one-hot [..., n] -> scalar; need not be differentiable in it.
      logits: [..., n]; rows are drawn independently.
      key: PRNG key.
      baseline: b, a number near the mean loss that does not depend on the sample.

    Returns:
      A scalar.

    Bias: none, of the value or of any derivative in ``logits`` or in what ``loss``
    reads; the variance falls with a good baseline. Source: Williams 1992; Foerster et
    al. 2018, arXiv:1802.05098.

    >>> values = jnp.array([1.0, 3.0])
    >>> loss = lambda logits, key: score_function(lambda x: x @ values, logits, key)
    >>> keys = jax.random.split(jax.random.key(0), 10000)
    >>> slopes = jax.vmap(jax.grad(loss), (None, 0))(jnp.zeros(2), keys)
    >>> bool(jnp.allclose(slopes.mean(0), jnp.array([-0.5, 0.5]), atol=0.05))
    True
    """
    x = _sample(logits, key)
    log_p = jnp.sum(x * jax.nn.log_softmax(logits, axis=-1))
    one = jnp.exp(log_p - jax.lax.stop_gradient(log_p))
    return (loss(x) - baseline) * one + baseline


def _sample(logits: Array, key: Array) -> Array:
    """One-hot rows."""
    cell = jax.random.categorical(key, jax.lax.stop_gradient(logits), axis=-1)
    n = jnp.shape(logits)[-1]
    return jax.nn.one_hot(cell, n, dtype=jnp.result_type(logits))
