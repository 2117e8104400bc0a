"""Average precision, exact and in four differentiable forms.

Average precision is the mean, over the positives, of the precision at the score of the
positive: its rank among the positives divided by its rank among all items.
"""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from ..number_checks import check_positive_int, finite
from ..trees import power_of_two_below, without_derivative
from ..validation import is_traced
from .base import safe_divide, weighted_mean
from .inputs import Examples, Scalar, Vector
from .pairs import PAIRS, rankings_per_block, remat, sum_of_precisions
from .ranking import (
    RankingSurrogate,
    map_row_batches,
    rowwise,
    sum_and_rounding_error,
    totals_at_thresholds,
)
from .soft_rank import weighted_soft_ranks


def average_precision(row: Examples) -> Scalar:
    """Returns the exact average precision of one ranking; 0 without positives."""
    positive_weights = row.positive_weights
    order, (rank_among_positives, rank_among_all) = totals_at_thresholds(
        row.scores, positive_weights, row.weights
    )
    precisions = safe_divide(rank_among_positives, rank_among_all)
    total = jnp.sum(positive_weights[order] * precisions)
    return safe_divide(total, jnp.sum(positive_weights))


#: The method `exact_rows` of the four forms.
exact_average_precisions = rowwise(lambda self, row: average_precision(row))


class SmoothAP(RankingSurrogate):
    """Average precision with a sigmoid for each pair of a positive and another item.

        mean_i (1 + sum_j y_j g_ij) / (1 + sum_j g_ij),
        g_ij = sigmoid((s_j - s_i) / T)

    The mean is over the positives i, the sums over the other items j: a smooth rank
    among the positives divided by a smooth rank among all. Shapes and ``axis`` are
    those of `RankingSurrogate`.

    Ties: count half; in `exact` they share one threshold, as in scikit-learn.
    Weights: as ``sample_weight`` of scikit-learn.
    Cost: positives times n sigmoids per ranking (n times n under `vmap`), twice that
    with the gradient. `exact` sorts: O(n log n).
    Memory: linear in the number of scores, for any shape. Pairs are taken in blocks of
    at most 2^20, and as many rankings at a time as fill a block.
    Bias: ``sigmoid(-|s_i - s_j| / T)`` per pair.
    Source: Brown et al. 2020 (arXiv 2007.12163). The exact metric is
    ``average_precision_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> ap = hg.surrogates.SmoothAP()
    >>> float(ap(scores, targets, temperature=0.01)), float(ap.exact(scores, targets))
    (0.8333, 0.8333)
    """

    citations = ("brown2020",)

    def smooth_rows(self, rows, temperature):
        """Returns ``sum_i p_i P_i / sum_i p_i`` with the precisions of `pairs`."""

        def average_precisions(rows):
            # A common factor changes nothing; products of weights stay in the range.
            max_weight = jnp.max(rows.weights, axis=1, keepdims=True)
            unit = power_of_two_below(without_derivative(max_weight))
            rows = replace(rows, weights=rows.weights / unit)
            positive_weights = rows.positive_weights
            total = sum_of_precisions(
                rows.scores, positive_weights, rows.weights, temperature
            )
            return safe_divide(total, jnp.sum(positive_weights, axis=1))

        batch_size = rankings_per_block(rows.scores.shape[1])
        return map_row_batches(average_precisions, rows, batch_size)

    exact_rows = exact_average_precisions


class FastAP(RankingSurrogate):
    """Average precision of a histogram of the scores with soft bins.

        mean_i H+(s_i) / H(s_i)

    The mean is over the positives i. A score between two bin centers is split between
    them, so that the running totals ``H`` of all items and ``H+`` of the positives are
    smooth. They are interpolated between centers and count the item itself whole.

    Args:
      num_bins: Number of bin centers, at least 2, spaced evenly from the highest score
        to the lowest. Their distance is the resolution: ``temperature`` is checked and
        not used. Static.
      low, high: Range of the centers. Defaults to the range of the scores. Scores
        outside are moved to its ends, where they have no gradient. If ``low`` is above
        ``high``, such as ``low=0.0`` for scores that are all negative, the value is
        NaN. Data.
      axis: As for `RankingSurrogate`, which states the shapes.

    Ties: share one threshold, as in `exact`.
    Cost: O(n + num_bins) per ranking, twice that with the gradient.
    Memory: linear in the number of scores, for as many rankings at a time as fill 2^20
    numbers.
    Bias: decreases as 1 / num_bins, and is 0 if no two scores are within two bins. The
    gradient exists if no score is at a center.
    Source: Cakir et al. 2019 (Deep Metric Learning to Rank, CVPR). Their sum
    ``sum_b h+_b H+_b / H_b`` counts only the higher part of an item in its own rank,
    an error of order 1 / rank that no number of bins removes. Both are equal if all
    scores are at centers.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> float(hg.surrogates.FastAP(num_bins=100)(scores, targets, temperature=1.0))
    0.8333
    """

    num_bins: int = eqx.field(static=True, default=100)
    low: ArrayLike | None = eqx.field(
        default=None, kw_only=True, converter=finite("low", optional=True)
    )
    high: ArrayLike | None = eqx.field(
        default=None, kw_only=True, converter=finite("high", optional=True)
    )

    citations = ("cakir2019",)

    def __check_init__(self):
        check_positive_int("num_bins", self.num_bins, minimum=2)
        low, high = self.low, self.high
        if low is None or high is None or is_traced(low, high):
            return
        if not np.all(np.asarray(low) < np.asarray(high)):
            raise ValueError(f"low must be below high; got {low} and {high}.")

    def smooth_rows(self, rows, temperature):
        """Returns ``mean_i H+(s_i) / H(s_i)`` of each ranking."""
        del temperature
        batch_size = max(1, PAIRS // (rows.scores.shape[1] + self.num_bins))
        binned_average_precisions = remat(jax.vmap(self._binned_average_precision))
        return map_row_batches(binned_average_precisions, rows, batch_size)

    exact_rows = exact_average_precisions

    def _binned_average_precision(self, row: Examples) -> Scalar:
        positive_weights, weights = row.positive_weights, row.weights
        has_weight = without_derivative(weights) > 0
        position = self._bin_positions(row.scores, has_weight)
        # The lowest score is at the last center, as the right end of the last bin.
        left_bin = without_derivative(jnp.floor(position)).astype(int)
        left_bin = jnp.clip(left_bin, 0, self.num_bins - 2)
        right_fraction = position - left_bin

        def cumulative_weight(weight):
            """Returns H(s_i), the weight with a score of s_i or higher."""
            left, right = weight * (1 - right_fraction), weight * right_fraction
            histogram = jnp.zeros(self.num_bins, row.scores.dtype)
            histogram = histogram.at[left_bin].add(left).at[left_bin + 1].add(right)
            total = jnp.cumsum(histogram)
            left_total, right_total = total[left_bin], total[left_bin + 1]
            # The interpolation counts only 1 - f (1 - f) of the item itself.
            self_weight = weight * right_fraction * (1 - right_fraction)
            total = self_weight + (1 - right_fraction) * left_total
            return total + right_fraction * right_total

        rank_among_positives = cumulative_weight(positive_weights)
        precisions = safe_divide(rank_among_positives, cumulative_weight(weights))
        return weighted_mean(precisions, positive_weights)

    def _bin_positions(self, scores: Array, has_weight: Array) -> Vector:
        """Returns the scores in bins, from 0 for the highest to ``num_bins - 1``."""
        low = jnp.min(jnp.where(has_weight, scores, jnp.inf))
        high = jnp.max(jnp.where(has_weight, scores, -jnp.inf))
        low = low if self.low is None else jnp.asarray(self.low, scores.dtype)
        high = high if self.high is None else jnp.asarray(self.high, scores.dtype)
        last_bin = self.num_bins - 1
        # Halves, because the difference of two large numbers may be infinite.
        distance, width = high / 2 - scores / 2, high / 2 - low / 2
        position = jnp.clip(last_bin * safe_divide(distance, width), 0, last_bin)
        # NaN, gradient included, for an empty range, unless no item has a weight.
        is_empty = jnp.less(*without_derivative((high, low))) & jnp.any(has_weight)
        position = position + jnp.where(is_empty, jnp.nan, 0) * scores
        return jnp.where(has_weight, position, 0)


class BlackboxAP(RankingSurrogate):
    """The exact average precision, with the gradient of an interpolation of it.

    Let ``r(s)`` be the hard ranks, the minimizer of ``s' r`` over all rankings, and
    ``f(r) = L + dL/dr' (r - r(s))`` the loss ``L = 1 - AP`` linearized in the ranks of
    the positives. The gradient is that of ``-f_T``,

        f_T(s) = f(r_T(s)) - s' (r(s) - r_T(s)) / T,    r_T(s) = r(s + T dL/dr),

    a continuous and piecewise affine function: ``dAP/ds = (r(s) - r_T(s)) / T``. It is
    at most f, and equal to it if the perturbation changes no rank.

    The temperature T is lambda in the papers, the range of the interpolation. ``dL/dr``
    is at most ``1 / (positives * rank)``, so ranks change if T is of the order of the
    number of positives times the spread of the scores. For a small T the gradient is 0.
    Shapes and ``axis`` are those of `RankingSurrogate`.

    Ties: as in `exact`, which is the value. The gradient ranks them in their order.
    Cost: three sorts. Memory: O(n).
    Bias: none in the value. The gradient is that of the interpolation, and has no
    derivative.
    Source: Rolinek et al. 2020 (arXiv 1912.03500); Vlastelica et al. 2020 (arXiv
    1912.02175) for the interpolation.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> ap = lambda s: hg.surrogates.BlackboxAP()(s, targets, temperature=10.0)
    >>> float(ap(scores)), jax.grad(ap)(scores).round(2).tolist()
    (0.8333, [0.0, -0.1, 0.1, 0.0])
    """

    citations = ("rolinek2020", "vlastelica2020")

    @rowwise
    def smooth_rows(self, row, temperature):
        """Returns the exact average precision, with the gradient of ``-f_T``."""
        constant = without_derivative(row.scores)
        ranked = eqx.tree_at(lambda row: row.scores, row, constant)
        gradient = _interpolation_gradient(ranked, temperature)
        # The inner product is 0 and only adds the gradient.
        zeros = row.scores - constant
        return average_precision(ranked) + jnp.vdot(gradient, zeros)

    exact_rows = exact_average_precisions


class SoftRankAP(RankingSurrogate):
    """Average precision with soft ranks.

        mean_i r+_i / r_i

    The mean is over the positives i; ``r+`` is the `soft_rank` among the positives and
    ``r`` among all items. Shapes and ``axis`` are those of `RankingSurrogate`.

    Ties: have their mean rank.
    Weights: a common factor changes nothing, as the ranks are in units of their mean.
    Cost: two soft ranks per ranking. Memory: O(n).
    Bias: none if the temperature is at most the smallest gap between scores, divided by
    the largest weight in units of the mean weight, and then no gradient either.
    Source: Blondel et al. 2020 (arXiv 2002.08871) for the ranks.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> float(hg.surrogates.SoftRankAP()(scores, targets, temperature=1.0))
    0.8333
    """

    citations = ("blondel2020",)

    @rowwise
    def smooth_rows(self, row, temperature):
        """Returns ``mean_i r+_i / r_i``."""
        precisions = soft_precisions(
            row.scores, row.positive_weights, row.weights, temperature
        )
        return weighted_mean(precisions, row.positive_weights)

    exact_rows = exact_average_precisions


def soft_precisions(
    scores: Vector, positive_weights: Vector, weights: Vector, temperature: Scalar
) -> Vector:
    """Returns the soft rank among the positives over the one among all; 0 elsewhere."""
    # Smoothing mixes ranks whose distance is below the inverse temperature. With
    # weights of mean 1 this does not depend on their unit.
    has_weight = without_derivative(weights) > 0
    num_items = jnp.sum(has_weight.astype(weights.dtype))
    mean_weight = safe_divide(jnp.sum(weights), num_items)
    weights = safe_divide(weights, mean_weight)
    positive_weights = safe_divide(positive_weights, mean_weight)
    # A precision counts the whole weight w of the item, its mean rank (1 + w) / 2.
    correction = (weights - 1) / 2
    soft_rank = lambda weights: weighted_soft_ranks(scores, weights, temperature)
    rank_among_positives = soft_rank(positive_weights) + correction
    rank_among_all = soft_rank(weights) + correction
    precisions = safe_divide(rank_among_positives, rank_among_all)
    return jnp.where(positive_weights > 0, precisions, 0)


def _interpolation_gradient(row: Examples, temperature: Array) -> Vector:
    """Returns ``w (r(s) - r_T(s)) / T`` for items of weight w.

    A rank is the weight at or above the item. These ranks minimize ``sum_i w_i s_i
    r_i`` (Smith's rule), so that adding ``T dL/dr`` to the costs ``w s`` adds ``T dL/dr
    / w`` to the scores.
    """
    row = without_derivative(row)
    scores, weights, positive_weights = row.scores, row.weights, row.positive_weights

    def hard_ranks(sort_keys, *weights):
        order = jnp.lexsort([-sort_key for sort_key in reversed(sort_keys)])
        unsort = lambda x: jnp.zeros_like(x).at[order].set(x)
        return [unsort(jnp.cumsum(weight[order])) for weight in weights]

    rank_among_positives, rank = hard_ranks((scores,), positive_weights, weights)
    # L = 1 - sum_i p_i r+_i / r_i / sum(p) with p = w at the positives, so
    # dL/dr_i / w_i = r+_i / r_i^2 / sum(p).
    precisions = safe_divide(rank_among_positives, rank)
    slope = safe_divide(precisions, rank * jnp.sum(positive_weights))
    slope = jnp.where(positive_weights > 0, slope, 0)
    # With the rounding error, a perturbation far below the resolution of the scores
    # still moves an item past an equal one.
    sort_keys = sum_and_rounding_error(scores, temperature * slope)
    (perturbed_rank,) = hard_ranks(sort_keys, weights)
    return without_derivative(weights * (rank - perturbed_rank) / temperature)
