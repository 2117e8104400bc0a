"""The change of the outer value by the rounding of inner steps.

Let ``u_t`` be the rounding error of the iterate ``w_t`` and ``p_t = dM/dw_t`` its
adjoint. To first order the outer value changes by ``sum_t p_t' u_t``. Relative to
``||(|w_0| + |w_T|) dM/dw||`` this number is small, whatever the units of ``w`` and of
the losses, unless the steps amplify rounding errors. In a chaotic run it grows
exponentially with the number of steps, and so does the relative error of the
hypergradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..trees import vdot, widen


def roundings(w: PyTree) -> PyTree:
    """Returns the standard deviation of the rounding errors of ``w``, with its signs.

    An error is uniform in half a unit in the last place, at most ``eps |w| / 2``.
    """
    relative = lambda x: float(jnp.finfo(x.dtype).eps) / 12**0.5
    return jax.tree.map(lambda x, wide: relative(x) * wide, w, widen(w))


def reference_change(outer_grad: PyTree, init_w: PyTree, final_w: PyTree) -> Array:
    """Returns ``||(|w_0| + |w_T|) dM/dw||``, a change of the outer value."""
    product = lambda b, x, y: b * (jnp.abs(x) + jnp.abs(y))
    change = jax.tree.map(product, *map(widen, (outer_grad, init_w, final_w)))
    return jnp.sqrt(vdot(change, change))
