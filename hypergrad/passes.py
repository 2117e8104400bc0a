"""Shuffled passes over a data set, any batch of which is found without the others."""

import math
import zlib

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from .trees import hash_bits

NUM_ROUNDS = 8  # with fewer, short permutations are not equally likely


class PassPosition(eqx.Module):
    """A position in an endless sequence of shuffled passes over a data set.

    Attributes:
      seed: Two words that determine all passes.
      number: Number of the batch, counted from the first pass on, or of a part of a run
        that draws batches, such as an estimate.
      is_batch: Whether it is the position of a batch.
    """

    seed: UInt32[Array, "2"]
    number: Int[Array, ""]
    is_batch: bool = eqx.field(static=True, default=False)

    @classmethod
    def from_key(cls, key: Array, is_batch: bool = False) -> "PassPosition":
        """Returns the first position of passes that this key determines."""
        return cls(jax.random.bits(key, (2,), jnp.uint32), jnp.asarray(0), is_batch)

    def of_draw(
        self, number: Array | int, num_draws: int, stream: str
    ) -> "PassPosition":
        """Returns the position of a draw of this part of a run.

        Args:
          number: Number of the draw within the part, below ``num_draws``.
          num_draws: Number of draws that each part makes from the stream.
          stream: Name of a sequence of passes, which has an order of its own.
        """
        word = hash_bits(self.seed[0] + jnp.uint32(zlib.crc32(stream.encode())))
        seed = jnp.stack([word, self.seed[1]])
        return PassPosition(seed, self.number * num_draws + number, is_batch=True)

    def in_own_order(self, number: Array | int) -> "PassPosition":
        """Returns the position in passes whose order depends on the number too."""
        number = hash_bits(jnp.asarray(number).astype(jnp.uint32))
        seed = jnp.stack([self.seed[0], hash_bits(self.seed[1] + number)])
        return PassPosition(seed, self.number, self.is_batch)

    def items(self, num_items: int, batch_size: int) -> Int[Array, " batch_size"]:
        """Returns the items of the batch; a pass leaves out an incomplete last batch.

        Args:
          num_items: Number of items in a pass.
          batch_size: Number of items in a batch.
        """
        num_batches = num_items // batch_size
        pass_number = (self.number // num_batches).astype(jnp.uint32)
        index = self.number % num_batches * batch_size + jnp.arange(batch_size)
        seed = jnp.stack([self.seed[0], hash_bits(self.seed[1] + pass_number)])
        return index_shuffle(index, num_items, seed)


def index_shuffle(
    index: Int[Array, "..."], size: int, seed: UInt32[Array, "2"]
) -> Int[Array, "..."]:
    """Returns the entries at ``index`` of a random permutation of ``0 .. size - 1``.

    `jax.random.permutation` makes the whole permutation, which a loop would have to
    carry, or to sort anew in each step. Here an entry costs a few hundred integer
    operations.

    The index is a cell of a grid of at least ``size`` cells. A round moves each cell
    within its row by a hash of the number of the row, and within its column by a hash
    of that of the column. A cell that lands beyond ``size`` is moved again.

    Args:
      index: Integers in ``0 .. size - 1``, of any shape.
      size: Length of the permutation, below 2^31.
      seed: Two words that determine the permutation.

    Source: Black & Rogaway 2002 (Ciphers with arbitrary finite domains), the
    generalized Feistel cipher and cycle walking.

    >>> import jax
    >>> seed = jax.random.bits(jax.random.key(0), (2,), "uint32")
    >>> sorted(index_shuffle(jnp.arange(5), 5, seed).tolist())
    [0, 1, 2, 3, 4]
    """
    num_rows = math.isqrt(size - 1) + 1  # the root of the size, rounded up
    num_rows += num_rows % 2  # with two odd sides all permutations would be even
    num_columns = -(-size // num_rows)
    rounds = jnp.arange(2 * NUM_ROUNDS, dtype=jnp.uint32)
    round_keys = hash_bits(hash_bits(rounds ^ seed[0]) ^ seed[1])

    def permute(cell):
        row, column = cell // num_columns, cell % num_columns
        for i in range(NUM_ROUNDS):
            row = _add(row, _hash_below(num_rows, column ^ round_keys[2 * i]), num_rows)
            shift = _hash_below(num_columns, row ^ round_keys[2 * i + 1])
            column = _add(column, shift, num_columns)
        return row * num_columns + column

    # Without a barrier XLA may evaluate all rounds anew for each of their uses.
    cell = permute(jnp.asarray(index).astype(jnp.uint32))
    cell = jax.lax.optimization_barrier(cell)
    if num_rows * num_columns > size:
        is_outside = lambda cell: cell >= size
        cell = jax.lax.while_loop(
            lambda cell: jnp.any(is_outside(cell)),
            lambda cell: jnp.where(is_outside(cell), permute(cell), cell),
            cell,
        )
    return cell.astype(int)


def _hash_below(n: int, x: Array) -> Array:
    """Returns a hash of ``x`` in ``0 .. n - 1``, for ``n`` up to 2^16."""
    return ((hash_bits(x) >> 16) * jnp.uint32(n)) >> 16


def _add(x: Array, shift: Array, n: int) -> Array:
    """Returns ``(x + shift) mod n`` of two numbers below ``n``."""
    total = x + shift
    return jnp.where(total >= n, total - n, total)
