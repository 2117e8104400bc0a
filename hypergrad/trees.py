"""Vector arithmetic on pytrees that keeps each leaf's dtype.

Scalars are accumulated in float32 at least; optax's functions of these names promote
the leaves of a bfloat16 or mixed-precision tree instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .devices import readable


def scalar_dtype(*trees: PyTree) -> jnp.dtype:
    """In which inner products are accumulated: the widest leaf's, float32 at least."""
    return jnp.promote_types(jnp.result_type(*jax.tree.leaves(trees)), jnp.float32)


def dot(x: PyTree, y: PyTree) -> Array:
    """Inner product ``<x, y>``."""
    dtype = scalar_dtype(x, y)
    product = lambda a, b: jnp.vdot(a.astype(dtype), b.astype(dtype))
    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(product, x, y))))


def norm(x: PyTree) -> Array:
    """Euclidean norm ``||x||``."""
    return jnp.sqrt(dot(x, x))


def add_scaled(x: PyTree, a: Array | float, y: PyTree) -> PyTree:
    """``x + a y``, in the dtypes of ``x``."""
    return jax.tree.map(lambda u, v: u + jnp.asarray(a * v, u.dtype), x, y)


def scale(a: Array | float, x: PyTree) -> PyTree:
    """``a x``, in the dtypes of ``x``."""
    return jax.tree.map(lambda u: jnp.asarray(a * u, u.dtype), x)


def all_finite(*trees: PyTree) -> Array:
    """Whether no leaf holds a NaN or an infinity."""
    leaves = jax.tree.leaves(trees)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def magnitude(x: PyTree) -> Array:
    """The power of two below ``max |x|``; 1 where that is 0 or no number.

    A unit in which squares stay in range: in float32 that of 1e-23 is zero, and that of
    1e20 infinite. By a power of two nothing is rounded.
    """
    dtype = scalar_dtype(x)
    most = lambda leaf: jnp.max(jnp.abs(leaf.astype(dtype)), initial=0)
    largest = jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(most, x))))
    _, exponent = jnp.frexp(largest)
    within = (largest >= jnp.finfo(dtype).tiny) & (largest < jnp.inf)
    return jnp.where(within, jnp.ldexp(jnp.ones((), dtype), exponent - 1), 1)


def divide(x: PyTree, a: Array) -> PyTree:
    """``x / a``, in the dtypes of ``x``."""
    return jax.tree.map(lambda u: jnp.asarray(u / a, u.dtype), x)


def distance(x: PyTree, y: PyTree) -> Array:
    """``||x - y|| / ||y||``; 0 where they are equal."""
    unit = magnitude(y)
    x, y = divide(x, unit), divide(y, unit)
    far = norm(add_scaled(x, -1, y))
    return jnp.where(far == 0, 0.0, far / norm(y))


def normal(key: Array, like: PyTree) -> PyTree:
    """A standard normal vector like ``like``."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    draw = lambda k, x: jax.random.normal(k, x.shape, x.dtype)
    return jax.tree.unflatten(structure, list(map(draw, keys, leaves)))


def plain(x: Any) -> np.ndarray:
    """A leaf as numbers, a PRNG key by its data."""
    return np.asarray(readable(jax.random.key_data(x) if is_key(x) else x))


def is_key(x: Any) -> bool:
    """Whether it is a typed PRNG key, or several."""
    return jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key)
