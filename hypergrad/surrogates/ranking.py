"""What metrics of a ranking share: items along an axis, a value a row, their mean."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from .base import elementwise, flagged, mean

#: A metric of rows, a value each: scores, targets and weights (0 where masked out), all
#: [r, n], and a number a row, [r], if there is one.
RowMetric = Callable[..., Array]


def mean_over_rows(
    metric: RowMetric,
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    axis: int,
    *,
    graded: bool = False,
    beside: ArrayLike | None = None,
    at_once: Callable[[int], int] | None = None,
) -> Array:
    """The metric along ``axis``, averaged over the other axes.

    A row of which every item is masked out leaves the mean. Rows are taken all
    together, or to bound memory as many as ``at_once`` says for their number of items.
    ``graded`` targets may be other than 0 and 1. The number ``beside`` a row is passed
    on to the metric; it may be the same for all.
    """
    shape = np.shape(scores)
    if not -len(shape) <= axis < max(len(shape), 1):
        raise ValueError(f"axis {axis} is not among those of scores, of shape {shape}")
    along = lambda x: x if x is None else _along(x, shape, axis)
    if graded:
        scores, _, weights, mask = elementwise(
            scores, jnp.zeros(shape), along(where), along(weights)
        )
        targets = _grades(targets, mask, scores.dtype)
    else:
        scores, targets, weights, mask = elementwise(
            scores, targets, along(where), along(weights)
        )
    as_rows = lambda x: jnp.moveaxis(x, axis, -1).reshape(-1, shape[axis])
    rows = tuple(map(as_rows, (scores, targets, weights)))
    if beside is not None:
        outer = shape[:axis] + shape[axis:][1:]
        beside = jnp.broadcast_to(jnp.asarray(beside, scores.dtype), outer)
        rows = *rows, beside.reshape(-1)
    if at_once is None:
        values = metric(*rows)
    else:
        values = _in_turn(metric, rows, at_once(shape[axis]))
    counted = jnp.any(as_rows(mask), axis=1)
    return mean(flagged(values, rows[0]), counted.astype(values.dtype))


def at_thresholds(scores: Array, *shares: Array) -> tuple[Array, list[Array]]:
    """The order of items from the best down, and for each share its running totals.

    A total is over all items that score as much or more: ties have one.
    """
    order = jnp.argsort(-scores)
    scores = scores[order]
    ends = jnp.append(scores[1:] != scores[:-1], True)
    total = lambda share: jnp.where(ends, jnp.cumsum(share[order]), jnp.inf)
    return order, [lax.cummin(total(share), reverse=True) for share in shares]


def _in_turn(metric: RowMetric, rows: tuple[Array, ...], at_once: int) -> Array:
    """So many rows at once, the last filled up with rows of zeros."""
    count = len(rows[0])
    at_once = min(at_once, count)

    def blocks(x):
        x = jnp.pad(x, ((0, -count % at_once), (0, 0)))
        return x.reshape(-1, at_once, x.shape[1])

    values = lax.map(lambda block: metric(*block), tuple(map(blocks, rows)))
    return values.ravel()[:count]


def _along(x: ArrayLike, shape: tuple[int, ...], axis: int) -> Array:
    """A mask or weights ``[n]`` count for every row."""
    x = jnp.asarray(x)
    if x.shape != (shape[axis],):
        return x
    ones = [1] * len(shape)
    ones[axis] = shape[axis]
    return jnp.broadcast_to(x.reshape(ones), shape)


def _grades(targets: ArrayLike, mask: Array, dtype: Any) -> Array:
    targets = jnp.asarray(targets)
    if targets.shape != mask.shape:
        raise ValueError(
            f"targets must have the shape of scores, {mask.shape}, got {targets.shape}"
        )
    targets = jnp.where(mask, targets, 0).astype(dtype)
    if not isinstance(targets, Tracer) and not np.all(np.asarray(targets) >= 0):
        raise ValueError(f"targets must be gains of at least 0, got {targets.min()}")
    return targets
