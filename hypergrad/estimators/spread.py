"""How far draws of a hypergradient scatter about their mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..trees import norm


def standard_error(draws: PyTree, mean: PyTree, several: bool) -> Array:
    """``sqrt(sum_i ||h_i - h||² / (n (n - 1))) / ||h||`` of draws ``[n, ...]``.

    NaN for one draw. With ``several`` losses draws are ``[n, K, ...]``, and the largest
    of K counts.
    """
    if several:
        one = lambda draws, mean: standard_error(draws, mean, False)
        return jnp.max(jax.vmap(one, in_axes=(1, 0))(draws, mean))
    away = jax.tree.map(lambda each, m: each - m[None], draws, mean)
    count = jax.tree.leaves(draws)[0].shape[0]
    if count == 1:
        return jnp.asarray(jnp.nan)
    return norm(away) / (count * (count - 1)) ** 0.5 / norm(mean)
