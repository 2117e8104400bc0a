"""How a step comes by the two losses' parts: from batches, with or without memory.

`plain` takes those of the batches. `saga` and `spider` keep what they saw, so that
their noise vanishes where the run settles.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ...problem import (
    Bilevel,
    Data,
    EstimateData,
    batch_fraction,
    full_batch,
    is_sampled,
    sample_batch,
)
from ...trees import add_scale
from .directions import Inner, Outer, Point, inner, outer


def plain(problem: Bilevel, at: Point, data: EstimateData) -> tuple[Inner, Outer]:
    """Both parts on a batch each."""
    batch, outer_batch = plain_batches(data)
    return inner(problem.inner_loss, at, batch), outer(problem, at, outer_batch)


def plain_batches(data: EstimateData) -> tuple[PyTree, PyTree]:
    """One inner and one outer batch."""
    batch = sample_batch(data.inner_data, data.inner_key)
    return batch, sample_batch(data.outer_data, data.outer_key)


# SAGA (Defazio, Bach & Lacoste-Julien 2014), for each loss.


class Table(eqx.Module):
    """The parts last seen of every example, ``[n, ...]``, and their mean.

    What the last step saw, ``new`` of the examples ``index``, is not in ``rows`` yet:
    `written` puts it there before the next step reads. To write after reading, in one
    step, would copy the table.
    """

    rows: PyTree
    mean: PyTree
    index: Array
    new: PyTree

    def written(self) -> PyTree:
        """The rows with what the last step saw."""
        return jax.tree.map(
            lambda rows, x: rows.at[self.index].set(x), self.rows, self.new
        )


def empty(parts: PyTree, data: Data) -> Table:
    """All zeros: no pass over the data is needed to begin with."""
    size, drawn = (data.num_examples, data.batch_size) if is_sampled(data) else (1, 1)
    zeros = lambda n: jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), parts)
    index = jnp.zeros(drawn, int)
    return Table(zeros(size), optax.tree.zeros_like(parts), index, zeros(drawn))


def saga(part: Callable, table: Table, data: Data, key: Array) -> tuple[PyTree, Table]:
    """``mean_k (new_k - old_k) + mean``, unbiased whatever the table holds.

    ``part(batch) -> parts``; a batch's loss must be the mean of its examples' losses.
    An example that is drawn twice counts twice in the estimate and once in the table.
    Data that are not `Batches` are one example.
    """
    if not is_sampled(data):
        new = part(full_batch(data, key))
        row = jax.tree.map(lambda x: x[None], new)
        return new, Table(row, new, table.index, row)
    rows = table.written()
    index = jax.random.randint(key, (data.batch_size,), 0, data.num_examples)
    new = jax.vmap(lambda i: part(data.take(i[None])))(index)
    change = jax.tree.map(lambda x, rows: x - rows[index], new, rows)
    estimate = jax.tree.map(lambda c, mean: jnp.mean(c, 0) + mean, change, table.mean)
    share = 1 / (data.num_examples * jnp.sum(index[:, None] == index[None, :], axis=1))
    mean = jax.tree.map(
        lambda mean, c: mean + jnp.tensordot(share.astype(c.dtype), c, 1),
        table.mean,
        change,
    )
    return estimate, Table(rows, mean, index, new)


# SPIDER (Fang et al. 2018; SARAH, Nguyen et al. 2017).


class Recursion(eqx.Module):
    """The last estimate, where it was taken, and how many steps ago the full one."""

    parts: PyTree
    at: Point
    age: Array


def spider(
    problem: Bilevel, at: Point, memory: Recursion, data: EstimateData, period: int
) -> tuple[tuple[Inner, Outer], Recursion, Array]:
    """``parts_t = parts_{t-1} + p(at_t) - p(at_{t-1})``, every ``period`` steps anew.

    Also whether this step took the full parts.
    """

    def full():
        batches = full_batch(data.inner_data, data.inner_key), data.outer_batch()
        return inner(problem.inner_loss, at, batches[0]), outer(problem, at, batches[1])

    def recursive():
        new, old = (plain(problem, where, data) for where in (at, memory.at))
        return jax.tree.map(lambda p, x, y: p + x - y, memory.parts, new, old)

    due = memory.age % period == 0
    parts = jax.lax.cond(due, full, recursive)
    return parts, Recursion(parts, at, memory.age + 1), due


def fractions(data: EstimateData) -> tuple[float, float]:
    """What a batch of either loss is of its data."""
    return batch_fraction(data.inner_data), batch_fraction(data.outer_data)


# STORM (Cutkosky & Orabona 2019).


def storm(new: PyTree, old: PyTree, memory: PyTree, momentum: Array | float) -> PyTree:
    """``new + momentum (memory - old)``: the last estimate, moved to here.

    ``new`` and ``old`` are the direction here and where the last estimate was taken, on
    one batch. With momentum 0 it is plain, with 1 it is SARAH's.
    """
    return add_scale(new, momentum, optax.tree.sub(memory, old))


def at_step(setting: Any, step: Array) -> Array:
    """A number, or what a schedule says."""
    return jnp.asarray(setting(step) if callable(setting) else setting, dtype=float)
