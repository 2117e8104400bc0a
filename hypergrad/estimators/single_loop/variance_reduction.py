"""Estimates of the derivatives of both losses: on mini-batches, or with less variance.

`value_and_parts` uses only the batches of a step. `saga_estimate` and `storm_estimate`
combine them with derivatives of earlier steps.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ...batches import Batches, Data, at_draw, full_batch, is_sampled
from ...problem import Bilevel
from ...products import Loss, hvp_and_cross_vjp
from ...trees import add_scale, cast_like, widen
from .base import value_at_step


class Point(eqx.Module):
    """A point at which derivatives are evaluated; ``v`` is the adjoint."""

    w: PyTree
    v: PyTree
    alpha: PyTree


class InnerParts(eqx.Module):
    """Derivatives of the inner loss at a `Point`.

    Attributes:
      grad: ``dL/dw``, structured like ``w``.
      Hv: Hessian-vector product ``H v``, structured like ``w``.
      cross: Cross product ``J' v``, structured like ``alpha``.
    """

    grad: PyTree
    Hv: PyTree
    cross: PyTree


class OuterParts(eqx.Module):
    """Derivatives of the outer loss at a `Point`.

    Attributes:
      b: ``dM/dw``, structured like ``w``.
      direct: ``dM/dalpha``, structured like ``alpha``.
    """

    b: PyTree
    direct: PyTree


Parts = tuple[InnerParts, OuterParts]


def inner_parts(loss: Loss, point: Point, batch: PyTree) -> InnerParts:
    """Returns the derivatives of the inner loss on a batch.

    Cost: one Hessian-vector product.
    """
    return InnerParts(*hvp_and_cross_vjp(loss, point.w, point.alpha, batch, point.v))


def outer_value_and_parts(
    problem: Bilevel, point: Point, batch: PyTree
) -> tuple[Array, OuterParts]:
    """Returns value and derivatives of the outer loss on a batch.

    Cost: one outer gradient.
    """
    value, *grads = problem.outer_value_and_grads(point.w, point.alpha, batch)
    return value, OuterParts(*grads)


def value_and_parts(
    problem: Bilevel, point: Point, batches: tuple[PyTree, PyTree]
) -> tuple[Array, Parts]:
    """Returns the outer value and the derivatives of both losses on given batches."""
    batch, outer_batch = batches
    inner = inner_parts(problem.inner_loss, point, batch)
    value, outer = outer_value_and_parts(problem, point, outer_batch)
    return value, (inner, outer)


def zero_parts(w: PyTree, alpha: PyTree) -> Parts:
    """Returns zeros in place of the derivatives, each of which is like its variable."""
    return optax.tree.zeros_like((InnerParts(w, w, alpha), OuterParts(w, alpha)))


# SAGA (Defazio, Bach & Lacoste-Julien 2014), for either loss.


class SagaTable(eqx.Module):
    """The latest derivatives of each example, or of each block of examples, for SAGA.

    The rows of the last step are in ``new_rows`` until the next step writes them with
    `updated_rows`. If a step wrote to ``rows`` after reading it, XLA would copy the
    whole table at each step.

    Attributes:
      rows: Derivatives of each example or block, without those of the last step; a
        leading axis of that length.
      mean: Mean of the rows, with those of the last step; in float32 at least, because
        an update is small beside it.
      index: Examples of the last step, ``[batch_size]``, or the number of its block.
      new_rows: Their derivatives, with the same leading axis as ``index``.
    """

    rows: PyTree
    mean: PyTree
    index: Int[Array, "..."]
    new_rows: PyTree

    def updated_rows(self) -> PyTree:
        """Returns the rows with those of the last step."""
        write = _write_row if self.index.ndim == 0 else _write_rows
        return jax.tree.map(
            lambda rows, new: write(rows, self.index, new), self.rows, self.new_rows
        )


def _write_row(rows: Array, index: Array, new_row: Array) -> Array:
    """Writes one row as a slice, which costs less than a scatter."""
    return jax.lax.dynamic_update_index_in_dim(rows, new_row, index, 0)


def _write_rows(rows: Array, index: Array, new_rows: Array) -> Array:
    return rows.at[index].set(new_rows)


def empty_table(parts: PyTree, data: Data) -> SagaTable:
    """Returns a table of zeros, which needs no pass over the data.

    Args:
      parts: Arrays like the derivatives of one example.
      data: Data of the loss. Data that is used whole counts as one example.
    """
    zero_rows = lambda *leading: jax.tree.map(
        lambda x: jnp.zeros((*leading, *x.shape), x.dtype), parts
    )
    if not is_sampled(data):
        num_rows, index_shape = 1, (1,)
    elif data.has_blocks:
        num_rows, index_shape = data.num_blocks, ()
    else:
        num_rows, index_shape = data.num_examples, (data.batch_size,)
    return SagaTable(
        rows=zero_rows(num_rows),
        mean=optax.tree.zeros_like(jax.eval_shape(widen, parts)),
        index=jnp.zeros(index_shape, int),
        new_rows=zero_rows(*index_shape),
    )


def saga_estimate(
    value_and_parts_fn: Callable[[PyTree], tuple[PyTree, PyTree]],
    table: SagaTable,
    data: Data,
    key: Array,
) -> tuple[PyTree, PyTree, SagaTable]:
    """Returns ``mean_k (new_k - old_k) + mean of all old`` and the next table.

    The estimate is unbiased whatever the table holds. An example that occurs twice in
    the batch counts twice in the estimate and once in the table. A batch that is a
    block of examples is one row.

    Args:
      value_and_parts_fn: ``batch -> (value, derivatives)``. The loss of a batch must be
        the mean of the losses of its examples.
      table: The latest derivatives of each example or block.
      data: Data of the loss.
      key: PRNG key of the batch.

    Returns:
      The value on the batch, the estimate of the derivatives, and the table. The table
      holds no values, so that no step evaluates one which nobody records.
    """
    if not is_sampled(data):
        # One example, whose new derivatives are the mean of all rows.
        value, new_parts = value_and_parts_fn(full_batch(data, key))
        row = jax.tree.map(lambda x: x[None], new_parts)
        return value, new_parts, SagaTable(row, widen(new_parts), table.index, row)
    data = at_draw(data, key, 0, 1)
    if data.has_blocks:
        return _saga_estimate_of_block(value_and_parts_fn, table, data, key)
    rows = table.updated_rows()
    # The batch that `sample_in_pass` returns for this key.
    index = data.draw_indices(key)
    per_example = jax.vmap(lambda i: value_and_parts_fn(data.take(i[None])))
    values, new_rows = per_example(index)
    change = jax.tree.map(lambda new, rows: new - rows[index], new_rows, rows)
    # mean_k (new_k - old_k) + mean of all old
    estimate = jax.tree.map(lambda c, mean: jnp.mean(c, 0) + mean, change, table.mean)
    estimate = cast_like(estimate, table.rows)
    # Each of r occurrences of an example contributes 1/r of its change to the mean.
    num_occurrences = jnp.sum(index[:, None] == index[None, :], axis=1)
    weights = 1 / (data.num_examples * num_occurrences)
    mean = jax.tree.map(
        lambda mean, c: mean + jnp.tensordot(weights.astype(mean.dtype), c, 1),
        table.mean,
        change,
    )
    value = jax.tree.map(lambda x: jnp.mean(x, 0), values)
    return value, estimate, SagaTable(rows, mean, index, new_rows)


def _saga_estimate_of_block(
    value_and_parts_fn: Callable[[PyTree], tuple[PyTree, PyTree]],
    table: SagaTable,
    data: Batches,
    key: Array,
) -> tuple[PyTree, PyTree, SagaTable]:
    """Returns the estimate and the next table for a batch that is one row of it."""
    rows = table.updated_rows()
    number = data.draw_block(key)
    value, new_row = value_and_parts_fn(data.take_block(number))
    read = lambda rows: jax.lax.dynamic_index_in_dim(rows, number, 0, keepdims=False)
    change = jax.tree.map(lambda new, rows: new - read(rows), new_row, rows)
    # new_i - old_i + mean of all old
    estimate = cast_like(jax.tree.map(jnp.add, change, table.mean), new_row)
    mean = jax.tree.map(
        lambda m, c: m + c.astype(m.dtype) / data.num_blocks, table.mean, change
    )
    return value, estimate, SagaTable(rows, mean, number, new_row)


# STORM (Cutkosky & Orabona 2019).


def storm_estimate(
    new: PyTree, old: PyTree, previous: PyTree, momentum: Array | float
) -> PyTree:
    """Returns ``d_t = D(t) + momentum (d_{t-1} - D(t-1))``.

    Args:
      new, old: ``D(t)`` and ``D(t-1)``: the direction at the current and at the
        previous point, both on the batch of this step.
      previous: ``d_{t-1}``, the previous estimate.
      momentum: 0 for plain mini-batches, 1 for SARAH.
    """
    # D(t) + momentum (d_{t-1} - D(t-1))
    return add_scale(new, momentum, optax.tree.sub(previous, old))


def storm_momentum(
    momentum: Array | float | Callable, num_steps: Int[Array, ""]
) -> Float[Array, ""]:
    """Returns the momentum of a step; 0 for the first, without a previous estimate."""
    return jnp.where(num_steps == 0, 0.0, value_at_step(momentum, num_steps))
