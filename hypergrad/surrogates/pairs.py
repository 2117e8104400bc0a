"""Sums over pairs of items in blocks, so that no array of shape [n, n] exists.

A block holds the pairs of some rows (positives) with some columns (other items). Loops
over blocks keep sums only, and a derivative computes the pairs of a block again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .base import safe_divide, sigmoid_at
from .inputs import Scalar, Vector

#: Largest block: 2^20 pairs, 8 MB in float64. It has few rows, because a last block
#: with few positives costs as much as a full one.
ROWS, COLUMNS = 128, 8192
PAIRS = ROWS * COLUMNS

#: `jax.checkpoint` for functions inside a scan, where CSE need not be prevented.
remat = functools.partial(jax.checkpoint, prevent_cse=False)

# Items of r rankings, with their score, positive weight and weight along the last axis.
Items = Float[Array, "r n 3"]
Rows = Float[Array, "r rows 3"]
Columns = Float[Array, "r columns 3"]
ColumnBlocks = Float[Array, "blocks r columns 3"]
Ranks = Float[Array, "r rows 2"]  # among the positives, and among all items
Temperatures = Float[Array, "r 1 1"]


def sum_of_precisions(
    scores: Float[Array, "r n"],
    positive_weights: Float[Array, "r n"],
    weights: Float[Array, "r n"],
    temperature: Scalar,
) -> Float[Array, " r"]:
    """Returns ``sum_i p_i P_i``, the smooth precisions at the positives, of r rankings.

    With weights ``w``, positive weights ``p`` and ``g_ij = sigmoid((s_j - s_i) / T)``,

        P_i = (p_i + sum_j p_j g_ij) / (w_i + sum_j w_j g_ij)    over items j /= i.

    Memory: the gradient, ``3 r n`` numbers, and a few blocks.
    """
    num_items = scores.shape[1]
    items = jnp.stack([scores, positive_weights, weights], axis=2)
    # Positives first: blocks of rows without one are skipped.
    order = jnp.argsort(positive_weights <= 0, axis=1)
    items = jnp.take_along_axis(items, order[:, :, None], axis=1)
    _, columns = _block_shape(num_items)
    items = jnp.pad(items, ((0, 0), (0, -num_items % columns), (0, 0)))
    return _sum_of_precisions(items, jnp.full((len(scores), 1, 1), temperature))


@jax.custom_jvp
def _sum_of_precisions(items: Items, temperature: Temperatures) -> Float[Array, " r"]:
    row_blocks, column_blocks = _split_blocks(items)
    zero = jnp.zeros(len(items), items.dtype)

    def add_rows(total, rows):
        def precisions():
            ranks = _smooth_ranks(rows, column_blocks, temperature)
            return _weighted_precisions(ranks, rows)

        return total + lax.cond(_has_positive(rows), precisions, lambda: zero), None

    return lax.scan(add_rows, zero, row_blocks)[0]


@_sum_of_precisions.defjvp
def _sum_of_precisions_jvp(primals, tangents):
    """Computes value and gradient in one pass; the tangent is an inner product.

    A derivative in either mode so keeps the gradient, and never the pairs.
    """
    items, temperature = primals
    row_blocks, column_blocks = _split_blocks(items)
    value = jnp.zeros(len(items), items.dtype)
    init_sums = value, jnp.zeros_like(column_blocks), jnp.zeros_like(temperature)

    def add_rows(sums, rows):
        row_sums, rows_grad = lax.cond(
            _has_positive(rows),
            lambda: _block_gradients(rows, column_blocks, temperature),
            lambda: (init_sums, jnp.zeros_like(rows)),
        )
        return jax.tree.map(jnp.add, sums, row_sums), rows_grad

    sums, row_grads = lax.scan(add_rows, init_sums, row_blocks)
    value, column_grads, temperature_grad = sums
    # Each item is a row of its own precision and a column of all others.
    join = lambda blocks: jnp.moveaxis(blocks, 0, 1).reshape(items.shape)
    items_grad = join(column_grads) + join(row_grads)
    items_tangent, temperature_tangent = tangents
    tangent = jnp.sum(items_grad * items_tangent, axis=(1, 2))
    return value, tangent + jnp.sum(temperature_grad * temperature_tangent, axis=(1, 2))


@remat
def _block_gradients(
    rows: Rows, column_blocks: ColumnBlocks, temperature: Temperatures
) -> tuple:
    """Returns ``((value, columns_grad, temperature_grad), rows_grad)`` of some rows."""
    ranks = _smooth_ranks(rows, column_blocks, temperature)
    value, precisions_vjp = jax.vjp(_weighted_precisions, ranks, rows)
    ranks_grad, rows_grad = precisions_vjp(jnp.ones_like(value))

    @remat
    def block_vjp(columns):
        _, vjp = jax.vjp(_weights_above, rows, columns, temperature)
        return vjp(ranks_grad)

    def add_columns(sums, columns):
        block_rows_grad, columns_grad, block_temperature_grad = block_vjp(columns)
        rows_grad, temperature_grad = sums
        sums = rows_grad + block_rows_grad, temperature_grad + block_temperature_grad
        return sums, columns_grad

    init_sums = rows_grad, jnp.zeros_like(temperature)
    sums, columns_grad = lax.scan(add_columns, init_sums, column_blocks)
    rows_grad, temperature_grad = sums
    return (value, columns_grad, temperature_grad), rows_grad


def _weighted_precisions(ranks: Ranks, rows: Rows) -> Float[Array, " r"]:
    """Returns ``sum_i p_i P_i`` over some rows i."""
    # The ranks contain half of item i, because g_ii = sigmoid(0): add the other half.
    ranks = ranks + rows[:, :, 1:] / 2
    rank_among_positives, rank_among_all = ranks[:, :, 0], ranks[:, :, 1]
    precisions = safe_divide(rank_among_positives, rank_among_all)
    return jnp.sum(rows[:, :, 1] * precisions, axis=1)


def _smooth_ranks(
    rows: Rows, column_blocks: ColumnBlocks, temperature: Temperatures
) -> Ranks:
    """Returns ``sum_j p_j g_ij`` and ``sum_j w_j g_ij`` over all items j."""
    weights_above = remat(lambda columns: _weights_above(rows, columns, temperature))
    add_columns = lambda ranks, columns: (ranks + weights_above(columns), None)
    return lax.scan(add_columns, jnp.zeros_like(rows[:, :, 1:]), column_blocks)[0]


def _weights_above(rows: Rows, columns: Columns, temperature: Temperatures) -> Ranks:
    """Returns the terms of `_smooth_ranks` whose items j are in one block."""
    differences = columns[:, None, :, 0] - rows[:, :, None, 0]
    return sigmoid_at(differences, temperature) @ columns[:, :, 1:]


def _has_positive(rows: Rows) -> Array:
    """Returns True if a row has positive weight; under `vmap` no block is skipped."""
    return jnp.any(rows[:, :, 1] > 0)


def _split_blocks(items: Items) -> tuple[Array, ColumnBlocks]:
    """Returns the items in blocks of rows and in blocks of columns, blocks first."""
    split = lambda size: items.reshape(len(items), -1, size, items.shape[2])
    rows, columns = _block_shape(items.shape[1])
    return jnp.moveaxis(split(rows), 1, 0), jnp.moveaxis(split(columns), 1, 0)


def _block_shape(num_items: int) -> tuple[int, int]:
    """Returns the numbers of rows and columns of a block; rows divide columns."""
    rows = min(ROWS, num_items)
    return rows, min(COLUMNS, -(-num_items // rows) * rows)


def rankings_per_block(num_items: int) -> int:
    """Returns how many rankings of ``num_items`` fill a block."""
    rows, columns = _block_shape(num_items)
    return max(1, PAIRS // (rows * columns))


#: Groups of items in `sum_of_wins`.
POSITIVE, NEGATIVE, MASKED_OUT = 0, 1, 2


def sum_of_wins(
    scores: Vector,
    temperature: Scalar,
    positive_weights: Vector,
    negative_weights: Vector,
    group: Vector,
    block_size: int,
) -> Scalar:
    """Returns ``sum_ij p_i q_j sigmoid((s_i - s_j) / T)`` over positives and negatives.

    Scores are subtracted before they are divided, which could overflow.
    A square block is skipped unless its rows contain positives and its columns
    negatives, by their ``group``: `POSITIVE`, `NEGATIVE` or `MASKED_OUT`.
    """
    num_blocks = -(-len(scores) // block_size)

    def split(x, fill=0):
        x = jnp.pad(x, (0, num_blocks * block_size - len(x)), constant_values=fill)
        return x.reshape(num_blocks, block_size)

    s, group = split(scores), split(group, MASKED_OUT)
    row_blocks = s, split(positive_weights), jnp.any(group == POSITIVE, axis=1)
    column_blocks = s, split(negative_weights), jnp.any(group == NEGATIVE, axis=1)

    @remat
    def block_wins(rows, columns):
        s_rows, row_weights, has_positive = rows
        s_columns, column_weights, has_negative = columns

        def weighted_wins():
            difference = s_rows[:, None] - s_columns[None, :]
            wins = sigmoid_at(difference, temperature)
            return jnp.sum(row_weights[:, None] * column_weights[None, :] * wins)

        zero = jnp.zeros((), scores.dtype)
        return lax.cond(has_positive & has_negative, weighted_wins, lambda: zero)

    @remat
    def row_wins(rows):
        add_columns = lambda total, columns: (total + block_wins(rows, columns), None)
        return lax.scan(add_columns, jnp.zeros((), scores.dtype), column_blocks)[0]

    return jnp.sum(lax.map(row_wins, row_blocks))
