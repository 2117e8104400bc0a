"""Integer arithmetic that can be undone: fixed-point numbers and what scaling loses.

A velocity is multiplied by ``n / d < 1`` by dividing by d and multiplying by n. The
remainder of the division goes into a buffer, from which the last digit in base n comes
back into the velocity: nothing is lost, and the buffer grows by ``log2(d / n)`` bits.

Source: Maclaurin, Duvenaud & Adams 2015 (arXiv 1502.03492), algorithm 3.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

WORD = 256  # what is moved from a buffer to its stack at a time
FULL = 2**19  # when: a buffer times a denominator must fit 32 bits
LEAST = 16  # no momentum below 1/LEAST: a step may push one word


def integer_dtype(like: Array) -> jnp.dtype:
    """64 bits for float64, else 32."""
    return jnp.dtype(jnp.int64 if like.dtype == jnp.float64 else jnp.int32)


def _bits(dtype: jnp.dtype) -> int:
    """After the point."""
    return 46 if dtype == jnp.int64 else 23


def denominator(dtype: jnp.dtype) -> int:
    """Of the momentum as a fraction."""
    return 4096 if dtype == jnp.int64 else 256


def encode(x: Array) -> Array:
    """The nearest fixed-point number; scaling by a power of two is exact."""
    dtype = integer_dtype(x)
    return jnp.round(x * 2.0 ** _bits(dtype)).astype(dtype)


def decode(x: Array, like: Array) -> Array:
    """The number, in the dtype of ``like``."""
    wide = jnp.float64 if x.dtype == jnp.int64 else jnp.float32
    return (x.astype(wide) * 2.0 ** -_bits(x.dtype)).astype(like.dtype)


def fits(x: PyTree) -> Array:
    """Whether all numbers lie well within what the integers hold."""

    def one(x):
        dtype = integer_dtype(x)
        limit = 2.0 ** (8 * dtype.itemsize - 2 - _bits(dtype))
        return jnp.all(jnp.abs(x) < limit)

    return jnp.all(jnp.stack([one(leaf) for leaf in jax.tree.leaves(x)]))


def numerator(momentum: Array, dtype: jnp.dtype) -> Array:
    """The nearest n of ``n / d`` that the buffer can take."""
    d = denominator(dtype)
    return jnp.clip(_nearest(momentum, d), d // LEAST, d - 1)


def is_taken(momentum: Array, dtype: jnp.dtype) -> Array:
    """Whether the nearest ``n / d`` is one that the buffer can take."""
    return _nearest(momentum, denominator(dtype)) == numerator(momentum, dtype)


def _nearest(momentum: Array, d: int) -> Array:
    return jnp.round(momentum * d).astype(jnp.int32)


def num_words(num_steps: int, least: float) -> int:
    """Bytes that a number needs for its steps, at a momentum of ``least`` or more."""
    rounded = min(round(least * d) / d for d in (256, 4096))
    bits = num_steps * math.log2(1 / min(rounded, least))
    return math.ceil(1.01 * bits / math.log2(WORD)) + 2


class Buffer(eqx.Module):
    """What the multiplications have lost, for each number of ``v``.

    Attributes:
      digits: like ``v``, uint32; all are below ``bound``.
      words: stacks ``[num_words, ...]`` of bytes, filled up to ``top``.
      pushed: ``[num_steps]``, at which steps.
    """

    digits: PyTree
    words: PyTree
    top: Array
    bound: Array
    pushed: Array


def empty(like: PyTree, num_words: int, num_steps: int) -> Buffer:
    """A buffer for velocities like ``like``."""
    zeros = lambda dtype, *lead: jax.tree.map(
        lambda x: jnp.zeros((*lead, *x.shape), dtype), like
    )
    return Buffer(
        digits=zeros(jnp.uint32),
        words=zeros(jnp.uint8, num_words),
        top=jnp.asarray(0),
        bound=jnp.ones((), jnp.uint32),
        pushed=jnp.zeros(num_steps, bool),
    )


def is_empty(buffer: Buffer) -> Array:
    """Whether everything has come back."""
    zero = [jnp.all(leaf == 0) for leaf in jax.tree.leaves(buffer.digits)]
    return jnp.all(jnp.stack(zero)) & (buffer.top == 0)


def multiply(
    buffer: Buffer, v: PyTree, momentum: Array, step: Array
) -> tuple[Buffer, PyTree]:
    """``v <- v n / d``: the remainder by d goes in, the digit in base n comes out."""
    dtype = jax.tree.leaves(v)[0].dtype
    n, d = numerator(momentum, dtype).astype(jnp.uint32), denominator(dtype)

    def one(v, digits):
        digits = digits * d + (v % d).astype(jnp.uint32)
        v = (v // d) * n.astype(dtype) + (digits % n).astype(dtype)
        return v, digits // n

    v, digits = _pairs(one, v, buffer.digits)
    bound = (buffer.bound * d + n - 1) // n
    full = bound > FULL

    def push(words, digits):
        word = (digits % WORD).astype(jnp.uint8)
        where = jnp.where(full, buffer.top, words.shape[0])  # the end: not written
        words = words.at[where].set(word, mode="drop")
        return words, jnp.where(full, digits // WORD, digits)

    words, digits = _pairs(push, buffer.words, digits)
    bound = jnp.where(full, (bound + WORD - 1) // WORD, bound)
    pushed = buffer.pushed.at[step].set(full)
    return Buffer(digits, words, buffer.top + full, bound, pushed), v


def divide(
    buffer: Buffer, v: PyTree, momentum: Array, step: Array
) -> tuple[Buffer, PyTree]:
    """Undoes `multiply`, if its steps are undone last first."""
    dtype = jax.tree.leaves(v)[0].dtype
    n, d = numerator(momentum, dtype).astype(jnp.uint32), denominator(dtype)
    full = buffer.pushed[step]
    top = buffer.top - full
    pop = lambda words, digits: jnp.where(
        full, digits * WORD + words[top].astype(jnp.uint32), digits
    )
    digits = jax.tree.map(pop, buffer.words, buffer.digits)

    def one(v, digits):
        digits = digits * n + (v % n.astype(dtype)).astype(jnp.uint32)
        v = (v // n.astype(dtype)) * d + (digits % d).astype(dtype)
        return v, digits // d

    v, digits = _pairs(one, v, digits)
    return Buffer(digits, buffer.words, top, buffer.bound, buffer.pushed), v


def _pairs(f: Callable, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
    """``f`` on leaves, its two results as two trees."""
    leaves, structure = jax.tree.flatten(x)
    results = [f(a, b) for a, b in zip(leaves, jax.tree.leaves(y), strict=True)]
    first, second = zip(*results, strict=True)
    return jax.tree.unflatten(structure, first), jax.tree.unflatten(structure, second)
