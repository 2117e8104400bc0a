"""Error estimates of inner solutions, adjoints and random samples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

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
    direction: PyTree,
    curvature: Float[Array, "*K"],
) -> Scalar:
    """Estimates the relative error caused by ``w`` not being a stationary point.

    The estimate of ``w*`` is ``w + direction / curvature``. Both its distance from
    ``w`` and the change of ``dM/dw`` over this distance count: where the outer loss is
    nearly flat, a small error of ``w`` may change the sign of the hypergradient.

    Args:
      problem: The bilevel problem.
      w, alpha, outer_batch: Arguments of the outer loss.
      b, cross, hypergradient: ``dM/dw``, ``J' v`` and the hypergradient at ``w``; with
        K outer losses each leaf has a leading axis of size K.
      direction: Descent direction of the inner loss at ``w``, such as ``-dL/dw``.
      curvature: Smallest curvature found by the linear solver, per outer loss.

    Returns:
      The larger of ``||w* - w|| / ||w||`` and the change of the hypergradient as a
      fraction of it, the maximum over K losses; 0 if no outer loss depends on ``w``.

    Cost: one outer gradient.
    """
    outer_value = lambda w, alpha, batch: problem.outer_value(w, alpha, batch)
    if not uses_w(outer_value, w, alpha, outer_batch):
        return jnp.zeros(())
    curvature = jnp.nanmin(curvature)  # NaN for a loss that does not depend on w
    # ||w* - w|| / ||w||, where w* - w ~ direction / curvature
    w_error = norm(direction) / (curvature * norm(w))
    shifted_w = add_scale(w, 1 / curvature, direction)
    _, shifted_b, _ = problem.outer_value_and_grads(shifted_w, alpha, outer_batch)

    def relative_change(b, shifted_b, cross, hypergradient):
        # J' v is linear in b: a relative change of b is one of J' v.
        change = relative_residual(b, shifted_b) * norm(cross)
        return jnp.where(change == 0, 0.0, change / norm(hypergradient))

    if problem.num_objectives is not None:
        relative_change = jax.vmap(relative_change)
    change = jnp.max(relative_change(b, shifted_b, cross, hypergradient))
    return jnp.where(norm(direction) == 0, 0.0, jnp.maximum(w_error, change))


def standard_error(samples: PyTree, mean: PyTree, is_multi_objective: bool) -> Scalar:
    """Returns ``sqrt(sum_i ||h_i - h||^2 / (n (n - 1))) / ||h||``.

    Args:
      samples: Hypergradients ``h_i``; each leaf has a leading axis of size n.
      mean: Their mean ``h``.
      is_multi_objective: Whether leaves have the axes ``[n, K, ...]``; the maximum over
        the K losses is returned.

    Returns:
      The relative standard error of the mean; NaN for one sample.
    """
    if is_multi_objective:
        per_objective = lambda samples, mean: standard_error(samples, mean, False)
        return jnp.max(jax.vmap(per_objective, in_axes=(1, 0))(samples, mean))
    deviations = jax.tree.map(lambda sample, m: sample - m[None], samples, mean)
    num_samples = jax.tree.leaves(samples)[0].shape[0]
    if num_samples == 1:
        return jnp.asarray(jnp.nan)
    return norm(deviations) / (num_samples * (num_samples - 1)) ** 0.5 / norm(mean)
