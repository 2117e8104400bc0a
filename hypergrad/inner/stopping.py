"""Stopping rules that `Newton` and `LBFGS` share.

Every tolerance is relative to a quantity with the same units, so that the factor of a
loss changes neither the result nor the number of steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..trees import add_scale, apply_unless, divide, norm, power_of_two_scale


def reference_grad_norm(
    grad_fn: Callable[[PyTree], PyTree], w: PyTree, grad: PyTree
) -> tuple[Array, Array]:
    """Returns ``max(||g||, ||H w||)`` at a starting point, and a number of gradients.

    ``||H w||`` is the change of the gradient if ``w`` changes by its own size. It keeps
    a start near the minimum, where ``||g||`` is small or only rounding, from asking for
    more precision than a start far away. A gradient at ``w + h w`` yields it, with
    ``h`` the root of the machine epsilon. It is 0 without a gradient if ``w`` is zero.

    Args:
      grad_fn: ``w -> dL/dw``.
      w: Starting point.
      grad: ``g = dL/dw`` at the starting point.
    """
    epsilons = [float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(w)]
    h = max(epsilons, default=1.0) ** 0.5
    is_zero = norm(divide(w, power_of_two_scale(w))) == 0
    # ||H w|| = ||g(w + h w) - g(w)|| / h
    new_grad = apply_unless(is_zero, lambda _: grad_fn(add_scale(w, h, w)), grad)
    unit = power_of_two_scale(grad)
    new_grad, grad = divide(new_grad, unit), divide(grad, unit)
    change = norm(add_scale(new_grad, -1, grad)) / h
    # fmax, because the loss may be undefined at the second point.
    return unit * jnp.fmax(norm(grad), change), jnp.where(is_zero, 0, 1)


def absolute_grad_tol(tolerance: float | Array | None, reference: Array) -> Array:
    """Returns the gradient norm at which a solver stops.

    Args:
      tolerance: Factor of the reference. None stands for ``eps^(3/4)`` of the dtype.
      reference: Gradient norm that `reference_grad_norm` returns.
    """
    if tolerance is None:
        tolerance = float(jnp.finfo(reference.dtype).eps) ** 0.75
    return jnp.asarray(tolerance, reference.dtype) * reference


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
