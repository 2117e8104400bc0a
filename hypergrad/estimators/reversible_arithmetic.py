"""Fixed-point arithmetic in which a multiplication by a momentum can be undone.

Momentum descent can be run backwards: from ``v_{t+1} = m v_t + g_t`` follows
``v_t = (v_{t+1} - g_t) / m``. In floating point this fails, because a multiplication by
``m < 1`` discards low-order bits, and the division amplifies what was lost by ``1 / m``
in every step. Maclaurin et al. (2015) therefore compute with integers, for which
additions are undone exactly, and keep the discarded bits. The momentum is a fraction
``n / d``. The velocity is divided by d, and the remainder, a digit in base d, is pushed
into an *information buffer*; after the multiplication by n, a digit in base n is popped
from the buffer and added to the velocity. To go back, the last digit in base n of the
velocity is pushed and the remainder is popped. Nothing is lost, and the buffer grows by
``log2(d / n)`` bits per number and step.

A single fraction would change ``1 / (1 - m)``, the number of steps that the velocity
remembers: 253/256 for 0.99 remembers 85 steps instead of 100. So n alternates between
the neighbors of ``m d``, and its mean over the steps is ``m d``.

The buffer of a number is an integer, ``remainders``. When it could become too large,
its lowest byte moves to a stack, at the same step for all numbers.

Source: Maclaurin, Duvenaud & Adams 2015 (arXiv 1502.03492), algorithm 3.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

BYTE = 256  # number of values of a byte, the unit of the stack
MAX_BOUND = 2**19  # remainders below it, times a denominator, fit into 32 bits
MAX_DIVISOR = 16  # 1 / momentum at most: then one byte per step keeps remainders small


# Fixed-point numbers.


def integer_dtype(like: Array) -> jnp.dtype:
    """Returns the dtype of the integers: 64 bits for float64, else 32 bits."""
    return jnp.dtype(jnp.int64 if like.dtype == jnp.float64 else jnp.int32)


def num_fraction_bits(dtype: jnp.dtype) -> int:
    """Returns the number of bits after the binary point."""
    return 46 if dtype == jnp.int64 else 23


def to_fixed_point(x: Array) -> Array:
    """Returns the nearest fixed-point number; the scaling itself rounds nothing."""
    dtype = integer_dtype(x)
    wide = x.astype(_float_dtype(dtype))  # float16 would overflow
    return jnp.round(wide * 2.0 ** num_fraction_bits(dtype)).astype(dtype)


def from_fixed_point(x: Array, like: Array) -> Array:
    """Returns a fixed-point number in the dtype of ``like``."""
    wide = x.astype(_float_dtype(x.dtype))
    return (wide * 2.0 ** -num_fraction_bits(x.dtype)).astype(like.dtype)


def _float_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which fixed-point numbers are scaled."""
    return jnp.dtype(jnp.float64 if dtype == jnp.int64 else jnp.float32)


def floats_are_in_range(x: PyTree) -> Array:
    """Returns True if all floats are at most half of the largest fixed-point number."""

    def per_leaf(leaf):
        dtype = integer_dtype(leaf)
        limit = 2.0 ** (8 * dtype.itemsize - 2 - num_fraction_bits(dtype))
        return jnp.all(jnp.abs(leaf.astype(_float_dtype(dtype))) < limit)

    return jnp.all(jnp.stack([per_leaf(leaf) for leaf in jax.tree.leaves(x)]))


def integers_are_in_range(x: PyTree) -> Array:
    """Returns True if integers are at most half of the largest one.

    The sum of two such integers does not wrap around.
    """
    limit = lambda leaf: 2 ** (8 * leaf.dtype.itemsize - 2)
    per_leaf = lambda leaf: jnp.all((leaf < limit(leaf)) & (leaf > -limit(leaf)))
    return jnp.all(jnp.stack([per_leaf(leaf) for leaf in jax.tree.leaves(x)]))


# The momentum as a fraction n / d.


def denominator(dtype: jnp.dtype) -> int:
    """Returns d, the denominator of every momentum."""
    return 4096 if dtype == jnp.int64 else 256


def numerator(momentum: Array, dtype: jnp.dtype, step: Array) -> Array:
    """Returns n of a step; over the steps its mean is the momentum times d.

    The fraction of ``m d`` is compared with a sequence of low discrepancy, so that
    ``n`` is the same when the step is undone.
    """
    d = denominator(dtype)
    scaled = jnp.clip(momentum * d, d // MAX_DIVISOR, d)
    # The fractional parts of multiples of the golden ratio, in units of 2^-32.
    sequence = jnp.asarray(step, jnp.uint32) * jnp.uint32(2654435769) + jnp.uint32(
        2**31
    )
    fraction = jnp.floor((scaled - jnp.floor(scaled)) * 2.0**24).astype(jnp.uint32)
    return jnp.floor(scaled).astype(jnp.int32) + (sequence >> 8 < fraction)


def is_valid_momentum(momentum: Array) -> Array:
    """Returns True if a multiplication by the momentum can be undone."""
    return (momentum >= 1 / MAX_DIVISOR) & (momentum < 1)


# The information buffer.


class Buffer(eqx.Module):
    """The information that the multiplications of ``v`` have discarded.

    Attributes:
      remainders: Structured like ``v``, uint32: the pushed remainders of each number as
        one mixed-radix integer, below ``bound``.
      stack: Structured like ``v`` with a leading axis ``[num_bytes, ...]``: the bytes
        that were moved out of ``remainders``.
      stack_size: Number of bytes in the stack.
      bound: Exclusive upper bound of the remainders, the same for all numbers.
      has_pushed: ``[num_steps]``, True if the step moved a byte to the stack.
    """

    remainders: PyTree
    stack: PyTree
    stack_size: Int[Array, ""]
    bound: Int[Array, ""]
    has_pushed: Bool[Array, " num_steps"]


def num_stack_bytes(num_steps: int, min_momentum: float) -> int:
    """Returns the number of bytes per number for steps with at least this momentum.

    A step multiplies ``bound`` by ``d / n`` and rounds it up, to at most ``1 + 1 /
    bound`` times as much. From one byte that moves to the stack to the next, ``bound``
    grows from 2^11 at least, by ``d / n`` at least in each step that changes it. So the
    logarithms of the roundings sum to at most ``2^-11 / (1 - n / d)``, the rounding of
    the byte itself to ``2^-11``. Two bytes are for what ``bound`` gains before. A
    larger momentum never needs more bytes.
    """

    def num_bytes(d):
        fraction, n = math.modf(min_momentum * d)
        # The mean of log2(d / n) over the two values of n.
        num_bits = (1 - fraction) * math.log2(d / n) + fraction * math.log2(d / (n + 1))
        max_n = min(n + 1, d - 1)  # n = d changes nothing
        rounding_bits = math.log2(math.e) * (1 + d / (d - max_n)) * BYTE / MAX_BOUND
        return math.ceil(num_steps * num_bits / (math.log2(BYTE) - rounding_bits)) + 2

    return max(map(num_bytes, (256, 4096)))


def empty_buffer(like: PyTree, num_bytes: int, num_steps: int) -> Buffer:
    """Returns the buffer before the first step, for velocities shaped like ``like``."""
    zeros = lambda dtype, *lead: jax.tree.map(
        lambda x: jnp.zeros((*lead, *x.shape), dtype), like
    )
    return Buffer(
        remainders=zeros(jnp.uint32),
        stack=zeros(jnp.uint8, num_bytes),
        stack_size=jnp.asarray(0),
        bound=jnp.ones((), jnp.uint32),
        has_pushed=jnp.zeros(num_steps, bool),
    )


def is_empty(buffer: Buffer) -> Array:
    """Returns True if everything that was pushed has been popped."""
    is_zero = [jnp.all(leaf == 0) for leaf in jax.tree.leaves(buffer.remainders)]
    return jnp.all(jnp.stack(is_zero)) & (buffer.stack_size == 0)


def multiply(
    buffer: Buffer, v: PyTree, momentum: Array, step: Array
) -> tuple[Buffer, PyTree]:
    """Returns the buffer and ``v n / d`` after a multiplication by the momentum."""
    dtype = jax.tree.leaves(v)[0].dtype
    n, d = numerator(momentum, dtype, step).astype(jnp.uint32), denominator(dtype)

    def per_leaf(v, remainders):
        # Push the remainder of v by d, and pop a digit in base n.
        remainders = remainders * d + (v % d).astype(jnp.uint32)
        v = (v // d) * n.astype(dtype) + (remainders % n).astype(dtype)
        return v, remainders // n

    v, remainders = _map_pairs(per_leaf, v, buffer.remainders)
    bound = (buffer.bound * d + n - 1) // n
    is_full = bound > MAX_BOUND

    def push_byte(stack, remainders):
        byte = (remainders % BYTE).astype(jnp.uint8)
        # An index past the end is not written.
        index = jnp.where(is_full, buffer.stack_size, stack.shape[0])
        stack = stack.at[index].set(byte, mode="drop")
        return stack, jnp.where(is_full, remainders // BYTE, remainders)

    stack, remainders = _map_pairs(push_byte, buffer.stack, remainders)
    bound = jnp.where(is_full, (bound + BYTE - 1) // BYTE, bound)
    has_pushed = buffer.has_pushed.at[step].set(is_full)
    stack_size = buffer.stack_size + is_full
    return Buffer(remainders, stack, stack_size, bound, has_pushed), v


def divide(
    buffer: Buffer, v: PyTree, momentum: Array, step: Array
) -> tuple[Buffer, PyTree]:
    """Undoes `multiply`, if the steps are undone in reverse order."""
    dtype = jax.tree.leaves(v)[0].dtype
    n, d = numerator(momentum, dtype, step).astype(jnp.uint32), denominator(dtype)
    was_full = buffer.has_pushed[step]
    stack_size = buffer.stack_size - was_full
    pop_byte = lambda stack, remainders: jnp.where(
        was_full, remainders * BYTE + stack[stack_size].astype(jnp.uint32), remainders
    )
    remainders = jax.tree.map(pop_byte, buffer.stack, buffer.remainders)

    def per_leaf(v, remainders):
        # Push the digit of v in base n, and pop the remainder by d.
        remainders = remainders * n + (v % n.astype(dtype)).astype(jnp.uint32)
        v = (v // n.astype(dtype)) * d + (remainders % d).astype(dtype)
        return v, remainders // d

    v, remainders = _map_pairs(per_leaf, v, remainders)
    return Buffer(
        remainders, buffer.stack, stack_size, buffer.bound, buffer.has_pushed
    ), v


def _map_pairs(f, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    """Maps a function with two results over the leaves; returns two trees."""
    pairs = jax.tree.map(f, x, y)
    return jax.tree.transpose(jax.tree.structure(x), jax.tree.structure((0, 0)), pairs)
