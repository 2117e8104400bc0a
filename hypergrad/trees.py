"""Vector arithmetic on pytrees that keeps the dtype of each leaf.

Scalars are accumulated in float32 at least. The functions of `optax.tree` with these
names promote the leaves of a bfloat16 or mixed-precision tree instead.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from .runtime.devices import replicate

Tree = TypeVar("Tree")


def scalar_dtype(*trees: PyTree) -> jnp.dtype:
    """Returns the dtype of inner products: the widest leaf's, float32 at least."""
    return jnp.promote_types(jnp.result_type(*jax.tree.leaves(trees)), jnp.float32)


def machine_eps(*trees: PyTree) -> float:
    """Returns the machine epsilon of the coarsest leaf, which a product rounds to."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(trees))


def underflows(x: PyTree) -> Array:
    """Returns whether a float16 pytree is entirely below the normal range.

    Rounding may then have made it exactly 0, as it does to a mean of many outputs.
    """
    leaves = jax.tree.leaves(x)
    if all(leaf.dtype != jnp.float16 for leaf in leaves):
        return jnp.asarray(False)
    sizes = [jnp.max(jnp.abs(leaf), initial=0) for leaf in widen(leaves)]
    return jnp.max(jnp.stack(sizes)) < float(jnp.finfo(jnp.float16).tiny)


def vdot(x: PyTree, y: PyTree) -> Array:
    """Returns the inner product ``<x, y>``."""
    dtype = scalar_dtype(x, y)
    product = lambda a, b: jnp.vdot(a.astype(dtype), b.astype(dtype))
    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(product, x, y))))


def norm(x: PyTree) -> Array:
    """Returns the Euclidean norm ``||x||``."""
    return jnp.sqrt(vdot(x, x))


def add_scale(x: PyTree, a: Array | float, y: PyTree) -> PyTree:
    """Returns ``x + a y`` in the dtypes of ``x``."""
    return jax.tree.map(lambda u, v: u + jnp.asarray(a * v, u.dtype), x, y)


def scale(a: Array | float, x: PyTree) -> PyTree:
    """Returns ``a x`` in the dtypes of ``x``."""
    return jax.tree.map(lambda u: jnp.asarray(a * u, u.dtype), x)


def divide(x: PyTree, a: Array) -> PyTree:
    """Returns ``x / a`` in the dtypes of ``x``."""
    return jax.tree.map(lambda u: jnp.asarray(u / a, u.dtype), x)


def as_row(x: PyTree) -> PyTree:
    """Returns ``x`` with a leading axis of size 1."""
    return jax.tree.map(lambda leaf: leaf[None], x)


def concatenate(x: PyTree, y: PyTree) -> PyTree:
    """Returns the vectors of both along the leading axis."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x, y)


def all_finite(*trees: PyTree) -> Array:
    """Returns True if no leaf holds a NaN or an infinity."""
    leaves = jax.tree.leaves(trees)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def is_zero(x: PyTree) -> Array:
    """Returns True if every entry is zero; the norm may underflow to zero before."""
    return ~jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(x)]))


def widen(x: PyTree) -> PyTree:
    """Returns ``x`` with its leaves shorter than float32 as float32.

    Derivatives by it are then summed in float32. In bfloat16 a sum of equal terms
    stalls at 256 times the term.
    """
    short_dtypes = (jnp.bfloat16, jnp.float16)
    is_short = lambda u: getattr(u, "dtype", None) in short_dtypes
    return jax.tree.map(lambda u: u.astype(jnp.float32) if is_short(u) else u, x)


def cast_like(x: PyTree, like: PyTree) -> PyTree:
    """Returns ``x`` in the dtypes of ``like``, without weak types."""
    cast = lambda u, v: u if u is v else jnp.asarray(u, dtype=jnp.asarray(v).dtype)
    return jax.tree.map(cast, x, like)


def power_of_two_scale(x: PyTree) -> Array:
    """Returns the power of two below ``max |x|``, or 1 if that is 0 or not finite.

    Divided by it, the squares of ``x`` neither underflow nor overflow: in float32 the
    square of 1e-23 is 0 and that of 1e20 is infinite. A division by a power of two
    rounds nothing.
    """
    dtype = scalar_dtype(x)
    leaf_max = lambda leaf: jnp.max(jnp.abs(leaf.astype(dtype)), initial=0)
    return power_of_two_below(
        jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(leaf_max, x))))
    )


def power_of_two_below(x: Array) -> Array:
    """Returns the power of two below each ``|x|``, or 1 if that is 0 or not finite."""
    magnitude = jnp.abs(x)
    is_normal = (magnitude >= jnp.finfo(x.dtype).tiny) & (magnitude < jnp.inf)
    # The bits of the exponent alone: frexp and ldexp are forty operations each.
    integer_dtype = jnp.dtype(f"uint{x.dtype.itemsize * 8}")
    to_bits = lambda x: jax.lax.bitcast_convert_type(x, integer_dtype)
    exponent_bits = to_bits(magnitude) & to_bits(jnp.asarray(jnp.inf, x.dtype))
    power = jax.lax.bitcast_convert_type(exponent_bits, x.dtype)
    return jnp.where(is_normal, power, 1)


def relative_error(actual: PyTree, expected: PyTree) -> Array:
    """Returns ``||actual - expected|| / ||expected||``; 0 if they are equal."""
    unit = power_of_two_scale(expected)
    actual, expected = divide(actual, unit), divide(expected, unit)
    error = norm(add_scale(actual, -1, expected))
    return jnp.where(error == 0, 0.0, error / norm(expected))


def safe_norm(x: PyTree) -> Array:
    """Returns ``||x||``, where the squares of single entries may underflow."""
    unit = power_of_two_scale(x)
    return norm(divide(x, unit)) * unit


def safe_distance(x: PyTree, y: PyTree) -> Array:
    """Returns ``||x - y||``, where the squares of single entries may underflow."""
    return safe_norm(jax.tree.map(jnp.subtract, x, y))


def ratio(x: Array, y: Array) -> Array:
    """Returns ``x / y``, and 0 if ``x`` is 0."""
    return jnp.where(x == 0, 0.0, x / y)


def norm_ratio(x: PyTree, y: PyTree) -> Array:
    """Returns ``||x|| / ||y||``, and 0 if ``x`` is 0."""
    unit = power_of_two_scale(y)
    return ratio(norm(divide(x, unit)), norm(divide(y, unit)))


def random_like(key: Array, like: PyTree) -> PyTree:
    """Returns a standard normal vector with the structure of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    sample = lambda k, x: jax.random.normal(k, x.shape, x.dtype)
    return jax.tree.unflatten(structure, list(map(sample, keys, leaves)))


def hash_normal(seed: Array | int, like: PyTree) -> PyTree:
    """Returns a standard normal vector with the structure of ``like``, always the same.

    Each entry is made of an integer hash of ``seed`` and of its index. `jax.random` is
    for numbers that depend on the user's key. For the directions in which a method
    probes a matrix its generator would be a loop of twenty kernels per leaf, which
    takes longer to compile than a product with the matrix.

    Source: the hash is lowbias32 of Wellons 2018.

    >>> z = hash_normal(0, jnp.zeros(10_000))
    >>> round(float(jnp.mean(z)), 1), round(float(jnp.std(z)), 1)
    (0.0, 1.0)
    """
    leaves, structure = jax.tree.flatten(like)
    seed = hash_bits(jnp.asarray(seed).astype(jnp.uint32))
    samples, num_before = [], 0
    for leaf in leaves:
        index = jax.lax.iota(jnp.uint32, leaf.size) + jnp.uint32(num_before)
        bits = hash_bits(index ^ seed) >> 8
        # 24 bits at the middles of 2^24 intervals of (-1, 1), so that none is infinite.
        uniform = bits.astype(jnp.float32) * 2**-23 - (1 - 2**-24)
        sample = math.sqrt(2) * jax.lax.erf_inv(uniform)
        samples.append(sample.astype(leaf.dtype).reshape(leaf.shape))
        num_before += leaf.size
    return jax.tree.unflatten(structure, samples)


def hash_bits(x: Array) -> Array:
    """Returns a permutation of the 32-bit integers without visible structure."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def apply_unless(skip: Array, fn: Callable[[Tree], Tree], x: Tree) -> Tree:
    """Returns ``x`` if ``skip``, else ``fn(x)``, which has the same shapes and dtypes.

    If the condition is batched, `jax.lax.cond` copies everything that its branches
    close over, data included, once per example, and runs both. A loop of at most one
    iteration copies nothing and runs ``fn`` only if some example needs it.

    >>> apply_unless(jnp.asarray(False), lambda x: x + 1.0, jnp.asarray(1.0)).item()
    2.0
    """
    body_fun = lambda carry: (jnp.ones_like(skip), fn(carry[1]))
    return jax.lax.while_loop(lambda carry: ~carry[0], body_fun, (skip, x))[1]


def to_numpy(x: Any) -> np.ndarray:
    """Returns a leaf as a NumPy array; a PRNG key becomes its key data."""
    return np.asarray(replicate(jax.random.key_data(x) if is_key(x) else x))


def is_key(x: Any) -> bool:
    """Returns True for a typed PRNG key or an array of them."""
    return jnp.issubdtype(getattr(x, "dtype", float), jax.dtypes.prng_key)


def is_key_or_counter(x: Any) -> bool:
    """Returns True for leaves of a model that are no parameters.

    These are PRNG keys, and unsigned integers of 32 bits: raw keys, and what flax nnx
    counts with.
    """
    return is_key(x) or getattr(x, "dtype", None) == np.uint32


class PrettyModule(eqx.Module):
    """A module that prints scalars as numbers and arrays by their dtype and shape."""

    def __repr__(self) -> str:
        """Returns the fields, scalars with six digits."""
        return eqx.tree_pformat(jax.tree.map(_scalar_to_number, self))


def _scalar_to_number(leaf: Any) -> Any:
    if not (eqx.is_array(leaf) and is_readable(leaf)):
        return leaf
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if not (leaf.ndim == 0 and leaf.dtype.kind in "biuf"):
        return leaf
    return float(f"{leaf:.6g}") if leaf.dtype.kind == "f" else leaf.item()


def is_readable(leaf: Any) -> bool:
    """Returns whether this process can read the numbers of a leaf.

    A tracer and a `jax.ShapeDtypeStruct` have none, a donated array has none any more,
    and those of an array that is split over processes are in part elsewhere.
    """
    if isinstance(leaf, Tracer):
        return False
    if isinstance(leaf, jax.Array):
        is_local = leaf.is_fully_addressable or leaf.is_fully_replicated
        return is_local and not leaf.is_deleted()
    return isinstance(leaf, np.ndarray | np.generic | int | float)


@jax.jit
def without_derivative(x: Tree) -> Tree:
    """Returns ``x`` as a constant, because its derivative is not needed.

    Unlike `jax.lax.stop_gradient` it states that the result of the program has its full
    derivative nevertheless, as for the integer part in a linear interpolation. The
    search for lost derivatives recognizes the function by its name.

    >>> import jax
    >>> jax.grad(lambda x: x * without_derivative(x))(3.0).item()
    3.0
    """
    return jax.lax.stop_gradient(x)
