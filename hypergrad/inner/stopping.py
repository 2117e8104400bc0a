"""Stopping rules that `Newton` and `LBFGS` share."""

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..trees import norm


def absolute_grad_tol(tolerance: float | Array | None, init_grad: PyTree) -> Array:
    """Returns the gradient norm at which a solver stops.

    Args:
      tolerance: Factor relative to ``max(1, ||init_grad||)``. None stands for
        ``eps^(3/4)`` of the dtype.
      init_grad: Gradient at the starting point.
    """
    init_norm = norm(init_grad)
    if tolerance is None:
        tolerance = float(jnp.finfo(init_norm.dtype).eps) ** 0.75
    return jnp.asarray(tolerance, init_norm.dtype) * jnp.maximum(init_norm, 1.0)


def value_rounding_error(value: Array) -> Array:
    """Returns the amount by which rounding may change the value of a loss."""
    return 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)


def has_progressed(
    value: Array, grad: PyTree, new_value: Array, new_grad: PyTree
) -> Array:
    """Returns True if a step decreased the loss, or its gradient, beyond rounding.

    A solver stops after a step without progress, because nothing is left to gain in
    the precision of the loss.
    """
    rounding_error = value_rounding_error(value)
    is_lower = new_value < value - rounding_error
    is_flatter = norm(new_grad) < norm(grad)
    return is_lower | (is_flatter & (new_value <= value + rounding_error))
