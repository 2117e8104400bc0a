"""When what an estimator saw speaks for its estimate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..certificate import TRUST
from ..checks import reads_w
from ..linear.operator import relative_residual
from ..problem import Bilevel
from ..trees import add_scaled, norm


def steady(
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
    """Whether ``w`` is near enough to ``w*``, as far as ``move / curvature`` can tell.

    Args:
      problem, w, alpha, outer_batch: of the estimate.
      b, cross, hypergradient: ``dM/dw`` and what was made of it; K leads for K losses.
      move: the step that the inner problem asks for at ``w``, such as ``-dL/dw``.
      curvature: the least that was seen, for each of K.
    """
    curvature = jnp.min(curvature)
    w_error = norm(move) / (curvature * norm(w))
    # dM/dw as far away as w* may be: where M is nearly flat, w alone tells nothing.
    away = add_scaled(w, 1 / curvature, move)
    _, b_away, _ = problem.outer_gradients(away, alpha, outer_batch)
    little = lambda b, b_away, cross, h: (
        relative_residual(b, b_away) * norm(cross) <= TRUST * norm(h)
    )
    if problem.num_objectives is not None:
        little = jax.vmap(little)
    same = jnp.all(little(b, b_away, cross, hypergradient))
    outer = lambda w, alpha, batch: problem.outer(w, alpha, batch)
    w_matters = reads_w(outer, w, alpha, outer_batch)
    return (norm(move) == 0) | ((w_error <= TRUST) & same) | (not w_matters)
