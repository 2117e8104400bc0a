"""The base class of metrics of rankings, and what these metrics share."""

import functools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from ..trees import without_derivative
from .base import Surrogate, propagate_nan, weighted_mean
from .inputs import Examples, Scalar, Vector, elementwise_examples


class RankingSurrogate(Surrogate):
    """A surrogate that is the mean over rankings of a metric of one ranking.

    Call a subclass with scores and targets of 0 and 1 of one shape: [n] for one ranking
    of n items, [queries, gallery], or [n, labels] with ``axis=0``. ``where`` and
    ``weights`` have the same shape, or [n] along the axis. A ranking without positives
    has the value 0 and counts; one whose items are all masked out does not count. To
    leave out rankings without positives, pass
    ``where=targets.any(-1, keepdims=True) & mask``.

    A subclass writes `smooth_rows` and `exact_rows`; `rowwise` maps a formula of one
    ranking.

    Args:
      axis: Axis along which items are ranked; the mean is over the others. Static.
    """

    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    @abstractmethod
    def smooth_rows(self, rows: Any, temperature: Array, /) -> Float[Array, " r"]:
        """Returns the smooth metric of each of r rankings.

        Args:
          rows: `Examples` whose arrays have shape ``[r, n]``.
          temperature: Scalar above 0 in the dtype of the scores.
        """
        ...

    @abstractmethod
    def exact_rows(self, rows: Any, /) -> Float[Array, " r"]:
        """Returns the exact metric of each of r rankings."""
        ...

    def check_inputs(self, scores, targets, where, weights):
        """Returns rankings with targets of 0 and 1."""
        return ranking_rows(scores, targets, where, weights, self.axis)

    def smooth_value(self, rows, temperature):
        """Returns the mean of the smooth metric over the rankings."""
        return self.mean_over_rows(self.smooth_rows(rows, temperature), rows)

    def exact_value(self, rows):
        """Returns the mean of the exact metric over the rankings."""
        return self.mean_over_rows(self.exact_rows(rows), rows)

    def mean_over_rows(self, values: Float[Array, " r"], rows: Any) -> Scalar:
        """Returns the mean over the rankings in which any item counts.

        An item of weight 0 counts as little as one that is masked out.
        """
        # Not > 0, so that a ranking with an invalid item, of weight NaN, counts.
        weights = without_derivative(rows.weights)
        has_item = jnp.any(rows.mask & (weights != 0), axis=1)
        values = propagate_nan(values, rows.scores)
        return weighted_mean(values, has_item.astype(values.dtype))


def rowwise(method: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a method for rankings [r, n] from a method for one ranking [n]."""

    @functools.wraps(method)
    def method_of_rows(self, rows, *args):
        return jax.vmap(lambda row: method(self, row, *args))(rows)

    return method_of_rows


def ranking_rows(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    axis: int,
    check: Callable[..., Examples] = elementwise_examples,
) -> Examples:
    """Returns checked examples [r, n]: items along an axis, the other axes flattened.

    ``where`` and ``weights`` have the shape of the scores, or [n] for all rankings.
    """
    shape = np.shape(scores)
    if not -len(shape) <= axis < max(len(shape), 1):
        raise ValueError(
            f"axis must be an axis of scores, of shape {shape}; got {axis}."
        )

    def broadcast_items(x):
        """Returns a mask or weights [n] for every ranking."""
        if x is None or np.shape(x) != (shape[axis],):
            return x
        per_item = [1] * len(shape)
        per_item[axis] = shape[axis]
        return jnp.broadcast_to(jnp.asarray(x).reshape(per_item), shape)

    examples = check(scores, targets, broadcast_items(where), broadcast_items(weights))
    as_rows = lambda x: jnp.moveaxis(x, axis, -1).reshape(-1, shape[axis])
    return jax.tree.map(as_rows, examples)


def map_row_batches(
    metric: Callable[[Examples], Array], rows: Examples, batch_size: int
) -> Float[Array, " r"]:
    """Returns ``metric(rows)``, computed for ``batch_size`` rankings at a time."""
    num_rows = len(rows.scores)
    batch_size = min(batch_size, num_rows)

    def split(x):
        # The last batch is filled up with rankings of zeros.
        x = jnp.pad(x, ((0, -num_rows % batch_size), (0, 0)))
        return x.reshape(-1, batch_size, x.shape[1])

    values = lax.map(metric, jax.tree.map(split, rows))
    return values.ravel()[:num_rows]


def is_last_of_tie(sorted_scores: Vector) -> Bool[Array, " n"]:
    """Returns True for the last item of each group of equal scores."""
    return jnp.append(sorted_scores[1:] != sorted_scores[:-1], True)


def sum_and_rounding_error(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns ``a + b`` and its rounding error (Knuth's two-sum)."""
    total = a + b
    rounded = total - a
    return total, (a - (total - rounded)) + (b - rounded)


def totals_at_thresholds(scores: Vector, *weights: Vector) -> tuple[Array, list[Array]]:
    """Returns the order of the items from the best, and running totals in that order.

    A total is over all items that score as much or more, so tied items share it.
    """
    order = jnp.argsort(-scores)
    is_last = is_last_of_tie(scores[order])

    def running_total(weight):
        # The minimum from the end gives every item the total at the end of its tie.
        total = jnp.where(is_last, jnp.cumsum(weight[order]), jnp.inf)
        return lax.cummin(total, reverse=True)

    return order, [running_total(weight) for weight in weights]
