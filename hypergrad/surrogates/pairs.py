"""Sums over pairs of a positive and an item, in blocks: never an array [n, n]."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .rows import divide

#: A block is of so many positives, few since the last block costs as much as a full
#: one, by so many items: 2^20 pairs, 8 MB in float64.
ROWS, COLUMNS = 128, 8192


def sum_of_precisions(
    scores: Float[Array, " n"],
    hits: Float[Array, " n"],
    weights: Float[Array, " n"],
    temperature: Array,
) -> Float[Array, ""]:
    """``sum_i h_i P_i`` with smooth precisions at the positives, those of weight h.

    ``P_i = (h_i + sum_j h_j g_ij) / (w_i + sum_j w_j g_ij)`` over other items j, with
    ``g_ij = sigmoid((s_j - s_i) / temperature)``.
    """
    order = jnp.argsort(hits <= 0)  # positives first: the rest need no rows
    items = jnp.stack([scores, hits, weights], axis=1)[order]
    block = min(COLUMNS, -(-scores.size // ROWS) * ROWS)
    return _sum(jnp.pad(items, ((0, -scores.size % block), (0, 0))), temperature)


@jax.custom_jvp
def _sum(items: Float[Array, "n 3"], temperature: Array) -> Float[Array, ""]:
    def add(k, total):
        rows = _block(items, k, ROWS)
        return total + _precisions(_counts(items, rows, temperature), rows)

    zero = jnp.zeros((), temperature.dtype)
    return lax.fori_loop(0, _row_blocks(items), add, zero)


@_sum.defjvp
def _(primals, tangents):
    """The gradient, block by block: it is what is kept, not the pairs."""
    items, temperature = primals

    def add(k, carry):
        total, gradient, slope = carry
        rows = _block(items, k, ROWS)
        counts = _counts(items, rows, temperature)
        value, pull = jax.vjp(_precisions, counts, rows)
        of_counts, of_rows = pull(jnp.ones_like(value))

        def add_columns(c, carry):
            gradient, of_rows, slope = carry
            columns = _block(items, c, COLUMNS)
            _, pull = jax.vjp(_above, rows, columns, temperature)
            more_of_rows, of_columns, more_slope = pull(of_counts)
            gradient = _add_block(gradient, of_columns, c)
            return gradient, of_rows + more_of_rows, slope + more_slope

        carry = gradient, of_rows, slope
        carry = lax.fori_loop(0, _column_blocks(items), add_columns, carry)
        gradient, of_rows, slope = carry
        return total + value, _add_block(gradient, of_rows, k), slope

    zero = jnp.zeros((), temperature.dtype)
    start = zero, jnp.zeros_like(items), zero
    total, gradient, slope = lax.fori_loop(0, _row_blocks(items), add, start)
    of_items, of_temperature = tangents
    return total, jnp.vdot(gradient, of_items) + slope * of_temperature


def _precisions(counts: Float[Array, "rows 2"], rows: Float[Array, "rows 3"]) -> Array:
    """``sum_i h_i P_i``; an item has counted half of itself, which is sigmoid(0)."""
    found, seen = (counts + rows[:, 1:] / 2).T
    return jnp.sum(rows[:, 1] * divide(found, seen))


def _counts(items: Array, rows: Array, temperature: Array) -> Float[Array, "rows 2"]:
    """For each row, the weight of the positives and of all items above it."""

    def add(c, counts):
        return counts + _above(rows, _block(items, c, COLUMNS), temperature)

    start = jnp.zeros((len(rows), 2), temperature.dtype)
    return lax.fori_loop(0, _column_blocks(items), add, start)


def _above(rows: Array, columns: Array, temperature: Array) -> Float[Array, "rows 2"]:
    """The part of `_counts` that is in one block."""
    above = jax.nn.sigmoid((columns[None, :, 0] - rows[:, None, 0]) / temperature)
    return above @ columns[:, 1:]


def _row_blocks(items: Array) -> Array:
    return -(-jnp.sum(items[:, 1] > 0) // ROWS)


def _column_blocks(items: Array) -> int:
    return -(-len(items) // COLUMNS)


def _block(items: Array, index: Array, size: int) -> Array:
    size = min(size, len(items))
    return lax.dynamic_slice_in_dim(items, index * size, size)


def _add_block(items: Array, block: Array, index: Array) -> Array:
    block = block + _block(items, index, len(block))
    return lax.dynamic_update_slice_in_dim(items, block, index * len(block), 0)
