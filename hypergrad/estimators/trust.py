"""When what an estimator saw speaks for its estimate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..checks import reads_w
from ..linear.operator import relative_residual
from ..problem import Bilevel
from ..trees import add_scaled, norm


def drift(
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
    outer = lambda w, alpha, batch: problem.outer(w, alpha, batch)
    if not reads_w(outer, w, alpha, outer_batch):
        return jnp.zeros(())
    curvature = jnp.nanmin(curvature)  # NaN for a loss of K that reads no w
    w_error = norm(move) / (curvature * norm(w))
    away = add_scaled(w, 1 / curvature, move)
    _, b_away, _ = problem.outer_gradients(away, alpha, outer_batch)

    def worth(b, b_away, cross, h):
        change = relative_residual(b, b_away) * norm(cross)
        return jnp.where(change == 0, 0.0, change / norm(h))

    if problem.num_objectives is not None:
        worth = jax.vmap(worth)
    change = jnp.max(worth(b, b_away, cross, hypergradient))
    return jnp.where(norm(move) == 0, 0.0, jnp.maximum(w_error, change))
