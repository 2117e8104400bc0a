"""Soft ranks: projection onto the permutahedron by isotonic regression."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from .base import as_temperature, elementwise, flagged


def soft_rank(
    values: Float[ArrayLike, "..."],
    *,
    temperature: ArrayLike,
    weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Ranks along the last axis, 1 for the largest, that move with the values.

    The point of the permutahedron, the convex hull of all rankings ``(1..n)``, that is
    nearest to ``-values / temperature``.

    Args:
      values: ``[..., n]``; rows are ranked one after the other, by `jax.lax.map`.
      temperature: above 0, in the units of the values. Where it is at most the smallest
        gap, ranks are the hard ones and their derivative is 0; as it rises they tend to
        the mean rank.
      weights: of the shape of ``values``, at least 0: an item of weight 2 is two equal
        items, and its rank their mean rank; one of weight 0 is left out and has rank 0.

    Returns:
      Ranks of the shape and dtype of ``values``. Ties share their mean rank.

    Cost: a sort, and fewer than 2 n steps of a loop, one after the other on a GPU too.
    Memory: O(n). Derivatives of either mode are exact and cost O(n); they exist
    wherever no block of pooled items is about to split or merge.

    Source: Blondel et al. 2020 (arXiv 2002.08871), with quadratic regularisation.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> values = jnp.array([0.5, 3.0, 1.0])
    >>> hg.surrogates.soft_rank(values, temperature=0.1).round(2).tolist()
    [3.0, 1.0, 2.0]
    >>> hg.surrogates.soft_rank(values, temperature=1.0).round(2).tolist()
    [2.75, 1.0, 2.25]
    """
    values, _, weights, _ = elementwise(
        values, jnp.zeros(np.shape(values)), None, weights
    )
    temperature = as_temperature(temperature, values.dtype)
    rows = [x.reshape(-1, x.shape[-1]) for x in (values, weights)]
    one_row = lambda row: flagged(ranks(row[0], row[1], temperature), row[0])
    return lax.map(one_row, rows).reshape(values.shape)


def ranks(
    values: Float[Array, " n"], weights: Float[Array, " n"], temperature: Array
) -> Float[Array, " n"]:
    """`soft_rank` of one row."""
    counted = weights > 0
    top = jnp.max(jnp.where(counted, values, -jnp.inf))
    top = jnp.where(jnp.any(counted), top, 0)
    # Ranks do not change with a shift: differences are exact where quotients are not.
    u = (values - lax.stop_gradient(top)) / temperature
    order = jnp.argsort(jnp.where(counted, -lax.stop_gradient(u), jnp.inf))
    u, w = u[order], weights[order]
    hard = jnp.cumsum(w) + (1 - w) / 2
    lowest = jnp.finfo(u.dtype).min
    block, _ = pool(*lax.stop_gradient((jnp.where(w > 0, u + hard, lowest), w)))

    def block_mean(x):
        total = lambda x: jax.ops.segment_sum(
            x, block, num_segments=x.size, indices_are_sorted=True
        )
        mass = total(w)
        return (total(w * x) / jnp.where(mass > 0, mass, 1))[block]

    # The projection -u + isotonic(u + hard), block by block. As the blocks are locally
    # constant, this line also has the exact derivatives.
    soft = jnp.where(w > 0, block_mean(hard) - (u - block_mean(u)), 0)
    return jnp.zeros_like(soft).at[order].set(soft, unique_indices=True)


@jax.custom_batching.sequential_vmap
def pool(
    values: Float[Array, " n"], weights: Float[Array, " n"]
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """The blocks of the nearest non-increasing sequence, and the steps it took.

    Block means are the isotonic regression; ``block`` counts up from 0. Pool adjacent
    violators: each step pushes one item on a stack of blocks, or merges the two on top
    if they are out of order, so that there are fewer than 2 n steps. Under `vmap` rows
    are pooled one after the other, or each step would touch all of every stack.
    """
    n = values.size
    items = values, weights, jnp.arange(n)

    def step(state):
        item, top, block, below, stack, steps = state
        (mean, weight, _), (mean_, weight_, start_) = block, below
        merge = (top > 0) & (mean_ < mean)
        total = weight + weight_
        merged = (mean * weight + mean_ * weight_) / jnp.where(total > 0, total, 1)
        # Writing before reading lets XLA keep the stack in place; the top is written
        # even where it is about to be merged and its place counts for nothing.
        stack = [put(array, x, top) for array, x in zip(stack, block, strict=True)]
        pushed = [get(array, item) for array in items]
        pairs = zip((merged, total, start_), pushed, strict=True)
        block = tuple(jnp.where(merge, x, y) for x, y in pairs)
        top = jnp.where(merge, top - 1, top + 1)
        below = tuple(get(array, top - 1) for array in stack)
        return jnp.where(merge, item, item + 1), top, block, below, stack, steps + 1

    # Until the top has been pushed n times, and once more from under what is no item.
    first = tuple(array[0] for array in items)
    one, zero = jnp.asarray(1), jnp.asarray(0)
    stack = [jnp.zeros_like(array) for array in items]
    state = one, zero, first, first, stack, zero
    state = lax.while_loop(lambda state: state[0] <= n, step, state)
    _, top, _, _, (_, _, start), steps = state
    begins = jnp.where(jnp.arange(n) < top, start, n)
    return jnp.cumsum(jnp.zeros(n, int).at[begins].set(1, mode="drop")) - 1, steps


def get(array: Array, index: Array) -> Array:
    """One entry, as a slice: what XLA does in place."""
    return lax.dynamic_index_in_dim(array, index, keepdims=False)


def put(array: Array, value: Array, index: Array) -> Array:
    """The array with one entry replaced."""
    return lax.dynamic_update_index_in_dim(array, value, index, 0)
