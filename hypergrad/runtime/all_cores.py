"""Loops over large arrays that use all cores of a CPU.

XLA compiles a loop that calls no library into a single kernel, which runs on one core.
Where a step takes microseconds, this saves most of its time. Where a step reads
megabytes, the other cores are idle. XLA takes no account of the sizes, but a sort
cannot be a part of such a kernel. The loops of plain reverse mode are left as they
are. XLA of JAX 0.8 to 0.12.0 compiles products with matrices so. XLA of JAX 0.12.1
calls a library for them; this module can go when that is the lowest version.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

#: Size of the data from which on two cores save more than a single kernel does.
MIN_NUM_BYTES = 2**22


def loss_on_all_cores(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the loss ``(w, alpha, batch) -> value``, for a loop over ``w``.

    Value and derivatives are equal up to rounding. See `on_all_cores`.
    """
    return lambda w, alpha, batch: loss(on_all_cores(w, batch), alpha, batch)


def on_all_cores(x: PyTree, data: PyTree) -> PyTree:
    """Returns ``x``; a loop whose steps use the result then runs on all cores.

    Without an effect on other devices than CPUs, and for small data.

    Args:
      x: Pytree that differs from step to step, such as ``w``.
      data: Pytree that a step reads, such as a batch.
    """
    if jax.default_backend() != "cpu" or _num_bytes(data) < MIN_NUM_BYTES:
        return x
    leaves, treedef = jax.tree.flatten(x)
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    sizes = [jnp.size(leaf) if is_float(leaf) else 0 for leaf in leaves]
    candidates = [i for i, size in enumerate(sizes) if size > 0]
    if candidates:
        smallest = min(candidates, key=lambda i: sizes[i])
        leaves[smallest] = _with_sort(jnp.asarray(leaves[smallest]))
    return jax.tree.unflatten(treedef, leaves)


@jax.custom_jvp
def _with_sort(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns ``x``; its first entry has passed through a sort of equal numbers."""
    entry = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)
    # XLA removes a sort of equal entries only if they are one broadcast entry.
    pair = jnp.concatenate([entry.ravel(), entry.ravel()])
    entry = jnp.reshape(jax.lax.sort(pair)[0], entry.shape)
    return jax.lax.dynamic_update_slice(x, entry, (0,) * x.ndim)


@_with_sort.defjvp
def _with_sort_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    return _with_sort(x), tangent


def _num_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays; PRNG keys and numbers count as nothing."""
    # A number in a jaxpr has a dtype, but no size.
    is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
    leaves = filter(is_array, jax.tree.leaves(tree))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return sum(x.size * x.dtype.itemsize for x in leaves if not is_key(x))
