"""The change of the outer value by the rounding of inner steps.

Let ``u_t`` be the rounding error of the iterate ``w_t`` and ``p_t = dM/dw_t`` its
adjoint. To first order the outer value changes by ``sum_t p_t' u_t``. Relative to
``||(|w_0| + |w_T|) dM/dw||`` this number is small, whatever the units of ``w`` and of
the losses, unless the steps amplify rounding errors. In a chaotic run it grows
exponentially with the number of steps, and so does the relative error of the
hypergradient. Errors have random signs, except in numbers of 16 bits, where steps
shorter than half a unit in the last place are lost again and again in one direction.

In forward mode the tangent ``z_T`` of random errors ``u_t`` is the change of ``w_T``,
and ``||z_T dM/dw||`` takes the place of the sum.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..certificate import TRUST_RTOL
from ..trees import (
    divide,
    power_of_two_scale,
    ratio,
    safe_norm,
    scale,
    underflows,
    widen,
)


def zero_perturbation(w: PyTree) -> PyTree:
    """Returns the relative change of ``w`` that is zero.

    A run is differentiated by it at this point.
    """
    return optax.tree.zeros_like(widen(w))


def random_perturbation(w: PyTree, size: Array) -> PyTree:
    """Returns a relative change of each entry of ``w``, with random signs.

    The entries are ``size`` times the rounding errors of a leaf relative to those of
    the coarsest leaf.
    """
    leaves, structure = jax.tree.flatten(_relative_roundings(w))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    signs = lambda key, x: jax.random.rademacher(key, x.shape, x.dtype)
    signs = jax.tree.map(signs, jax.tree.unflatten(structure, keys), widen(w))
    weights = jax.tree.unflatten(structure, [x / max(leaves) for x in leaves])
    return jax.tree.map(lambda x, s: (size * x * s).astype(s.dtype), weights, signs)


@jax.custom_jvp
def perturb(w: PyTree, relative_change: PyTree) -> PyTree:
    """Returns ``w``, with the derivative of ``w (1 + relative_change)`` at zero.

    No operation is added to the program but in its derivative.
    """
    del relative_change
    return w


@perturb.defjvp
def _perturb_jvp(primals, tangents):
    (w, _), (w_dot, change_dot) = primals, tangents
    add = lambda x_dot, x, r_dot: x_dot + (x * r_dot).astype(x.dtype)
    return w, jax.tree.map(add, w_dot, w, change_dot)


def perturb_iterate(w: PyTree, key: Array, relative_change: PyTree) -> PyTree:
    """Returns the iterate before a step with this key, perturbed with a random sign.

    In numbers of 16 bits all signs are equal.
    """
    if is_coarse(w):
        return perturb(w, relative_change)
    last_bit = jax.random.key_data(key).ravel()[-1] & 1
    sign = 1 - 2 * last_bit.astype(jnp.int8)
    return perturb(w, scale(sign, relative_change))


def roundings(w: PyTree) -> PyTree:
    """Returns the standard deviation of the rounding errors of ``w``, with its signs.

    An error is uniform in half a unit in the last place, at most ``eps |w| / 2``.
    """
    return jax.tree.map(jnp.multiply, _relative_roundings(w), widen(w))


def _relative_roundings(w: PyTree) -> PyTree:
    return jax.tree.map(lambda x: float(jnp.finfo(x.dtype).eps) / 12**0.5, w)


def reference_change(outer_grad: PyTree, init_w: PyTree, final_w: PyTree) -> Array:
    """Returns ``||(|w_0| + |w_T|) dM/dw||``, a change of the outer value."""
    product = lambda b, x, y: b * (jnp.abs(x) + jnp.abs(y))
    return safe_norm(jax.tree.map(product, *map(widen, (outer_grad, init_w, final_w))))


def amplifies_rounding_in_reverse_mode(
    derivative: PyTree, outer_grad: PyTree, init_w: PyTree, final_w: PyTree
) -> Array:
    """Returns True if the steps amplify rounding errors, or ``dM/dw`` underflows.

    Args:
      derivative: Derivative of the outer value by the relative change of the iterates.
      outer_grad: ``dM/dw``.
      init_w, final_w: The first and the last iterate of the run.
    """
    is_lost = underflows(outer_grad)
    unit = power_of_two_scale(outer_grad)
    errors = jax.tree.map(jnp.multiply, _relative_roundings(init_w), derivative)
    deviation = safe_norm(divide(errors, unit))
    outer_grad = divide(outer_grad, unit)
    error = ratio(deviation, reference_change(outer_grad, init_w, final_w))
    return loses_half_of_digits(error, max_rounding(init_w)) | is_lost


def amplifies_rounding_in_forward_mode(
    tangent: PyTree, outer_grad: PyTree, init_w: PyTree, final_w: PyTree
) -> Array:
    """Returns True if the steps amplify rounding errors, or ``dM/dw`` underflows.

    Args:
      tangent: Derivative of ``w_T`` by the size of a `random_perturbation`.
      outer_grad: ``dM/dw``.
      init_w, final_w: The first and the last iterate of the run.
    """
    is_lost = underflows(outer_grad)
    outer_grad = divide(widen(outer_grad), power_of_two_scale(outer_grad))
    unit = power_of_two_scale(tangent)
    change = jax.tree.map(jnp.multiply, outer_grad, divide(widen(tangent), unit))
    deviation = max_rounding(init_w) * unit * safe_norm(change)
    error = ratio(deviation, reference_change(outer_grad, init_w, final_w))
    return loses_half_of_digits(error, max_rounding(init_w)) | is_lost


def loses_half_of_digits(error: Array, resolution: Array | float) -> Array:
    """Returns True if rounding changes an outer value by 1%, or in half of its digits.

    The run is chaotic then: errors of the hypergradient, a second derivative of the
    steps, grow as the square of the amplification.

    Args:
      error: Relative error of the outer value by the rounding of all steps.
      resolution: Relative rounding error of the numbers in a step.
    """
    return ~(error <= jnp.minimum(TRUST_RTOL, jnp.sqrt(resolution)))


def is_coarse(w: PyTree) -> bool:
    """Returns True if half of the digits of a number are less than `TRUST_RTOL` needs.

    It is so in bfloat16 and float16.
    """
    return max_rounding(w) ** 0.5 > TRUST_RTOL


def max_rounding(w: PyTree) -> float:
    """Returns the relative rounding error of the coarsest leaf, as in `roundings`."""
    return max(jax.tree.leaves(_relative_roundings(w)))
