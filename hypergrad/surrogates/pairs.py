"""Sums over pairs of a positive and an item, in blocks: never an array [n, n]."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .base import divide

#: A block is of so many positives at most, few since the last one costs as much as a
#: full one, by so many items: 2^20 pairs, 8 MB in float64.
ROWS, COLUMNS = 128, 8192
PAIRS = ROWS * COLUMNS

#: A derivative of what is wrapped computes it again instead of keeping its pairs.
kept_small = functools.partial(jax.checkpoint, prevent_cse=False)


def rankings_at_once(n: int) -> int:
    """How many rankings of n items fill a block."""
    rows, columns = _sides(n)
    return max(1, PAIRS // (rows * columns))


def sum_of_precisions(
    scores: Float[Array, "r n"],
    hits: Float[Array, "r n"],
    weights: Float[Array, "r n"],
    temperature: Array,
) -> Float[Array, " r"]:
    """``sum_i h_i P_i`` with smooth precisions at the positives, those of weight h.

    ``P_i = (h_i + sum_j h_j g_ij) / (w_i + sum_j w_j g_ij)`` over other items j, with
    ``g_ij = sigmoid((s_j - s_i) / temperature)``; for r rankings, each by itself.
    """
    order = jnp.argsort(hits <= 0, axis=1)  # positives first: the rest need no rows
    items = jnp.stack([scores, hits, weights], axis=2)
    items = jnp.take_along_axis(items, order[:, :, None], axis=1)
    _, columns = _sides(scores.shape[1])
    items = jnp.pad(items, ((0, 0), (0, -scores.shape[1] % columns), (0, 0)))
    return _sum(items, jnp.full((len(scores), 1, 1), temperature))


@jax.custom_jvp
def _sum(
    items: Float[Array, "r n 3"], temperature: Float[Array, "r 1 1"]
) -> Float[Array, " r"]:
    rows, columns = _blocks(items)
    zero = jnp.zeros(len(items), items.dtype)

    def add(total, rows):
        some = lambda: _precisions(_counts(rows, columns, temperature), rows)
        return total + lax.cond(_any_hit(rows), some, lambda: zero), None

    return lax.scan(add, zero, rows)[0]


@_sum.defjvp
def _(primals, tangents):
    """The gradient, block by block: it is what is kept, not the pairs."""
    items, temperature = primals
    rows, columns = _blocks(items)
    zero = jnp.zeros(len(items), items.dtype)
    start = zero, jnp.zeros_like(columns), jnp.zeros_like(temperature)

    def add(sums, rows):
        some = lambda: _slopes(rows, columns, temperature)
        none = lambda: (start, jnp.zeros_like(rows))
        more, of_rows = lax.cond(_any_hit(rows), some, none)
        return jax.tree.map(jnp.add, sums, more), of_rows

    (total, of_columns, slope), of_rows = lax.scan(add, start, rows)
    whole = lambda blocks: jnp.moveaxis(blocks, 0, 1).reshape(items.shape)
    gradient = whole(of_columns) + whole(of_rows)
    of_items, of_temperature = tangents
    moved = jnp.sum(gradient * of_items, axis=(1, 2))
    return total, moved + jnp.sum(slope * of_temperature, axis=(1, 2))


@kept_small
def _slopes(rows: Array, columns: Array, temperature: Array) -> tuple:
    """``((value, of columns, of temperature), of rows)`` for one block of rows."""
    counts = _counts(rows, columns, temperature)
    value, pull = jax.vjp(_precisions, counts, rows)
    of_counts, of_rows = pull(jnp.ones_like(value))

    @kept_small
    def of_block(columns):
        _, pull = jax.vjp(_above, rows, columns, temperature)
        return pull(of_counts)

    def add(sums, columns):
        more_of_rows, of_columns, more_slope = of_block(columns)
        of_rows, slope = sums
        return (of_rows + more_of_rows, slope + more_slope), of_columns

    start = of_rows, jnp.zeros_like(temperature)
    (of_rows, slope), of_columns = lax.scan(add, start, columns)
    return (value, of_columns, slope), of_rows


def _precisions(counts: Float[Array, "r rows 2"], rows: Float[Array, "r rows 3"]):
    """``sum_i h_i P_i``; an item has counted half of itself, which is sigmoid(0)."""
    totals = counts + rows[:, :, 1:] / 2
    found, seen = totals[:, :, 0], totals[:, :, 1]
    return jnp.sum(rows[:, :, 1] * divide(found, seen), axis=1)


def _counts(
    rows: Array, columns: Array, temperature: Array
) -> Float[Array, "r rows 2"]:
    """For each row, the weight of the positives and of all items above it."""
    above = kept_small(lambda columns: _above(rows, columns, temperature))
    add = lambda counts, columns: (counts + above(columns), None)
    return lax.scan(add, jnp.zeros_like(rows[:, :, 1:]), columns)[0]


def _above(
    rows: Float[Array, "r rows 3"], columns: Float[Array, "r columns 3"], temperature
) -> Float[Array, "r rows 2"]:
    """The part of `_counts` that is in one block."""
    differences = columns[:, None, :, 0] - rows[:, :, None, 0]
    return jax.nn.sigmoid(differences / temperature) @ columns[:, :, 1:]


def _any_hit(rows: Array) -> Array:
    """Blocks of rows without are skipped; under `vmap` no block is."""
    return jnp.any(rows[:, :, 1] > 0)


def _sides(n: int) -> tuple[int, int]:
    """Rows and columns of a block; the one divides the other."""
    rows = min(ROWS, n)
    return rows, min(COLUMNS, -(-n // rows) * rows)


def _blocks(items: Float[Array, "r n 3"]) -> tuple[Array, Array]:
    """``[blocks, r, rows, 3]`` and ``[blocks, r, columns, 3]`` of the same items."""
    cut = lambda size: items.reshape(len(items), -1, size, items.shape[2])
    rows, columns = (jnp.moveaxis(cut(size), 1, 0) for size in _sides(items.shape[1]))
    return rows, columns
