"""When what an estimator saw speaks for its estimate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..jaxpr import uses_w
from ..linear.base import relative_residual
from ..problem import Bilevel
from ..trees import add_scale, norm


def stationarity_error(
    problem: Bilevel,
    w: PyTree,
    alpha: PyTree,
    outer_batch: PyTree,
    b: PyTree,
    cross: PyTree,
    hypergradient: PyTree,
    move: PyTree,
    curvature: Array,
) -> Array:
    """How far ``w`` and ``dM/dw`` are off, relative, as ``move / curvature`` tells.

    Args:
      problem, w, alpha, outer_batch: of the estimate.
      b, cross, hypergradient: ``dM/dw`` and what was made of it; K leads for K losses.
      move: the step that the inner problem asks for at ``w``, such as ``-dL/dw``.
      curvature: the least that was seen, for each of K.

    Returns:
      The larger of the distance to ``w*`` over ``||w||``, and the change of ``dM/dw``
      that far away, as part of the hypergradient: where M is nearly flat, ``w`` alone
      tells nothing. One more outer gradient. 0 where the outer loss reads no ``w``.
    """
    outer = lambda w, alpha, batch: problem.outer_value(w, alpha, batch)
    if not uses_w(outer, w, alpha, outer_batch):
        return jnp.zeros(())
    curvature = jnp.nanmin(curvature)  # NaN for a loss of K that reads no w
    w_error = norm(move) / (curvature * norm(w))
    away = add_scale(w, 1 / curvature, move)
    _, b_away, _ = problem.outer_value_and_grads(away, alpha, outer_batch)

    def worth(b, b_away, cross, h):
        change = relative_residual(b, b_away) * norm(cross)
        return jnp.where(change == 0, 0.0, change / norm(h))

    if problem.num_objectives is not None:
        worth = jax.vmap(worth)
    change = jnp.max(worth(b, b_away, cross, hypergradient))
    return jnp.where(norm(move) == 0, 0.0, jnp.maximum(w_error, change))


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
