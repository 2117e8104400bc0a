"""Stopping rules that `Newton` and `LBFGS` share.

Every tolerance is relative to a quantity with the same units, so that the factor of a
loss changes neither the result nor the number of steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..trees import add_scale, apply_unless, is_zero, safe_norm, scale


class GradTolerance(NamedTuple):
    """The gradient at which a solver stops.

    With the tolerance t, the gradient ``g_0`` at the start and ``c = |H w|`` there, the
    entries of the gradient with ``|g_i| > t c_i`` must have a norm of at most
    ``t ||g_0||``.

    ``c`` is the change of the gradient if ``w`` changes by its own size. It keeps a
    start near the minimum, where ``g_0`` is small or only rounding, from asking for
    more precision than a start far away. It counts entry by entry, so that a large
    parameter does not hide the gradient of another one.

    Attributes:
      tolerance: t, ``eps^(3/4)`` of the coarsest dtype of ``w`` by default.
      init_norm: ``||g_0||``.
      change: ``c``, structured like ``w``.
      num_grads: Number of gradients that ``c`` took: 0 if the start is zero, else 1.
    """

    tolerance: Array
    init_norm: Array
    change: PyTree
    num_grads: Array

    @property
    def unit(self) -> Array:
        """A gradient norm that is typical of the problem: ``max(||g_0||, ||c||)``."""
        return jnp.maximum(self.init_norm, safe_norm(self.change))

    def is_met(self, grad: PyTree, unit: Array | float = 1.0) -> Array:
        """Returns whether ``unit * grad`` is small enough; a NaN is not."""
        select = lambda g, c: jnp.where(jnp.abs(g) * unit <= self.tolerance * c, 0, g)
        excess = jax.tree.map(select, grad, self.change)
        return safe_norm(excess) <= self.tolerance * self.init_norm / unit


def make_grad_tolerance(
    tolerance: float | Array | None,
    grad_fn: Callable[[PyTree], PyTree],
    w: PyTree,
    grad: PyTree,
) -> GradTolerance:
    """Returns the tolerance of a run that starts at ``w``.

    Args:
      tolerance: Relative tolerance. None stands for ``eps^(3/4)`` of the coarsest dtype
        of ``w``.
      grad_fn: ``w -> dL/dw``.
      w: Starting point.
      grad: Gradient at the starting point.
    """
    init_norm = safe_norm(grad)
    epsilons = [float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(w)]
    coarsest_eps = max(epsilons, default=1.0)
    if tolerance is None:
        tolerance = coarsest_eps**0.75
    h = coarsest_eps**0.5
    starts_at_zero = is_zero(w)
    # |H w| = |g(w + h w) - g(w)| / h
    new_grad = apply_unless(starts_at_zero, lambda _: grad_fn(add_scale(w, h, w)), grad)
    difference = scale(1 / h, add_scale(new_grad, -1, grad))
    # The loss may be undefined at the second point.
    change = jax.tree.map(lambda x: jnp.nan_to_num(jnp.abs(x), posinf=0.0), difference)
    return GradTolerance(
        tolerance=jnp.asarray(tolerance, init_norm.dtype),
        init_norm=init_norm,
        change=change,
        num_grads=jnp.where(starts_at_zero, 0, 1),
    )


def value_rounding_error(value: Array) -> Array:
    """Returns the amount by which rounding may change the value of a loss."""
    return 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)


def has_progressed(
    value: Array, grad: PyTree, new_value: Array, new_grad: PyTree
) -> Array:
    """Returns True if a step decreased the loss, or its gradient, beyond rounding.

    A solver stops after a step without progress, because nothing is left to gain in
    the precision of the loss. A step to a gradient that is not finite is none.
    """
    rounding_error = value_rounding_error(value)
    new_norm = safe_norm(new_grad)
    is_lower = (new_value < value - rounding_error) & jnp.isfinite(new_norm)
    is_flatter = new_norm < safe_norm(grad)
    return is_lower | (is_flatter & (new_value <= value + rounding_error))
