"""Soft ranks: projection onto the permutahedron by isotonic regression."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from ..trees import without_derivative
from ..validation import is_traced
from .base import divide_by_temperature, propagate_nan
from .inputs import (
    Vector,
    as_array,
    as_temperature,
    check_values,
    elementwise_examples,
    is_non_negative,
)


def soft_rank(
    values: Float[ArrayLike, "..."],
    *,
    temperature: ArrayLike,
    weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Returns ranks along the last axis, 1 for the largest, that move with the values.

    The ranks are the point of the permutahedron, the convex hull of all rankings
    ``(1..n)``, that is nearest to ``-values / temperature``.

    Args:
      values: Values ``[..., n]``. Rows are ranked one after the other, by
        `jax.lax.map`.
      temperature: Above 0, in the units of the values. If it is at most the smallest
        gap, divided by the largest weight, the ranks are hard and their derivative is
        0; as it rises, they tend to the mean rank.
      weights: Weights of the shape of ``values``, at least 0. An item of weight 2 is
        two equal items, and its rank is their mean rank. An item of weight 0 is left
        out and has rank 0. Defaults to 1.

    Returns:
      Ranks of the shape and dtype of ``values``, float32 at least. Tied values share
      their mean rank.

    Derivatives in both modes are exact, cost O(n), and exist unless a block of pooled
    items is about to split or merge.

    Cost: a sort, and fewer than 2 n steps of a sequential loop, also on a GPU.
    Memory: O(n).
    Source: Blondel et al. 2020 (arXiv 2002.08871), with quadratic regularization.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> values = jnp.array([0.5, 3.0, 1.0])
    >>> hg.surrogates.soft_rank(values, temperature=0.1).round(2).tolist()
    [3.0, 1.0, 2.0]
    >>> hg.surrogates.soft_rank(values, temperature=1.0).round(2).tolist()
    [2.75, 1.0, 2.25]
    """
    _check_ranked(values, weights)
    examples = elementwise_examples(values, jnp.zeros(np.shape(values)), None, weights)
    values, weights = examples.scores, examples.weights
    temperature = as_temperature(temperature, values.dtype)

    def rank_row(row):
        values, weights = row
        return propagate_nan(weighted_soft_ranks(values, weights, temperature), values)

    rows = [x.reshape(-1, x.shape[-1]) for x in (values, weights)]
    return lax.map(rank_row, rows).reshape(values.shape)


def _check_ranked(values: ArrayLike, weights: ArrayLike | None) -> None:
    """Raises an error for values or weights that have no soft ranks."""
    values = as_array("values", values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(
            f"values must be floating-point; got {values.dtype}, which has no "
            "derivative."
        )
    counted = None
    if weights is not None and np.shape(weights) == values.shape:
        weights = as_array("weights", weights)
        check_values(
            "weights",
            weights,
            None,
            is_non_negative,
            "at least 0 and finite",
            "",
        )
        counted = weights if is_traced(weights) else np.asarray(weights) != 0
    remedy = " Leave items out by a weight of 0."
    check_values("values", values, counted, lambda x: ~np.isinf(x), "finite", remedy)


def weighted_soft_ranks(values: Vector, weights: Vector, temperature: Array) -> Vector:
    """Returns the `soft_rank` of one row, whose values are finite."""
    has_weight = without_derivative(weights) > 0
    order = jnp.argsort(jnp.where(has_weight, -without_derivative(values), jnp.inf))
    values, w = values[order], weights[order]
    hard_ranks = jnp.cumsum(w) + (1 - w) / 2
    # A gap above the total weight always separates two blocks. Larger gaps are clipped,
    # so that one distant value costs no digits of the others.
    gaps = without_derivative(values[:-1] - values[1:])
    gaps = jnp.clip(divide_by_temperature(gaps, temperature), 0, 2 * jnp.sum(w))
    u = -jnp.cumsum(jnp.pad(gaps, (1, 0)))
    # Items of weight 0 come last, in blocks of their own.
    lowest = jnp.finfo(u.dtype).min
    targets = without_derivative(jnp.where(w > 0, u + hard_ranks, lowest))
    block, _ = pool_adjacent_violators(targets, without_derivative(w))

    init_index = jax.ops.segment_min(jnp.arange(u.size), block, u.size)[block]

    def block_mean(x):
        block_sum = lambda x: jax.ops.segment_sum(
            x, block, num_segments=x.size, indices_are_sorted=True
        )
        mass = block_sum(w)
        return (block_sum(w * x) / jnp.where(mass > 0, mass, 1))[block]

    # The projection is -u + isotonic(u + hard_ranks), and isotonic regression is the
    # mean of each block. The blocks are locally constant, so the derivatives of these
    # lines are exact. Within a block u is relative to its first item, so that large
    # values lose no digits.
    differences = values - without_derivative(values)[init_index]
    u = divide_by_temperature(jnp.where(w > 0, differences, 0), temperature)
    ranks = jnp.where(w > 0, block_mean(hard_ranks) - (u - block_mean(u)), 0)
    return jnp.zeros_like(ranks).at[order].set(ranks, unique_indices=True)


@jax.custom_batching.sequential_vmap
def pool_adjacent_violators(
    values: Vector, weights: Vector
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Returns the blocks of the nearest non-increasing sequence, and the steps taken.

    The isotonic regression is the mean over each block; ``block`` counts up from 0.
    Each step pushes one item onto a stack of blocks, or merges the two blocks on top if
    they are out of order, so that fewer than 2 n steps are necessary. Under `vmap`,
    rows are pooled one after the other, because a batched step would copy all stacks.
    """
    n = values.size
    items = values, weights, jnp.arange(n)
    # Reads and writes of slices, which XLA does in place.
    read = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
    write = functools.partial(lax.dynamic_update_index_in_dim, axis=0)

    def step(state):
        item, top, block, block_below, stack, num_steps = state
        (mean, weight, _), (below_mean, below_weight, below_start) = block, block_below
        # Equal means are merged as well, because distant ties are equal by rounding.
        should_merge = (top > 0) & (below_mean <= mean)
        total = weight + below_weight
        fraction = weight / jnp.where(total > 0, total, 1)
        merged_mean = below_mean + fraction * (mean - below_mean)
        merged = merged_mean, total, below_start
        # Writing before reading lets XLA keep the stack in place. The top is written
        # even if it is merged next; the entry is then overwritten before it is read.
        stack = [write(array, x, top) for array, x in zip(stack, block, strict=True)]
        pushed = [read(array, item) for array in items]
        pairs = zip(merged, pushed, strict=True)
        block = tuple(jnp.where(should_merge, x, y) for x, y in pairs)
        top = jnp.where(should_merge, top - 1, top + 1)
        block_below = tuple(read(array, top - 1) for array in stack)
        item = jnp.where(should_merge, item, item + 1)
        return item, top, block, block_below, stack, num_steps + 1

    # The last block is written to the stack when item n, which does not exist, is
    # pushed.
    first_block = tuple(array[0] for array in items)
    zero = jnp.asarray(0)
    stack = [jnp.zeros_like(array) for array in items]
    state = jnp.asarray(1), zero, first_block, first_block, stack, zero
    state = lax.while_loop(lambda state: state[0] <= n, step, state)
    _, num_blocks, _, _, (_, _, starts), num_steps = state
    starts = jnp.where(jnp.arange(n) < num_blocks, starts, n)
    is_start = jnp.zeros(n, int).at[starts].set(1, mode="drop")
    return jnp.cumsum(is_start) - 1, num_steps
