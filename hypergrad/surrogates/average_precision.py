"""Average precision: exact, and four forms that can be differentiated.

AP is the mean, over positives, of the precision at the positive's score. A form with
ranks that are sums of sigmoids at a temperature is no fifth one: it is `SmoothAP`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from .base import as_temperature, divide
from .pairs import PAIRS, kept_small, rankings_at_once, sum_of_precisions
from .ranking import at_thresholds, mean_over_rows
from .soft_rank import ranks


def average_precision(
    scores: Float[Array, " n"], targets: Float[Array, " n"], weights: Float[Array, " n"]
) -> Float[Array, ""]:
    """Exact, of one row; 0 without positives."""
    hits = weights * targets
    order, (found, seen) = at_thresholds(scores, hits, weights)
    return divide(jnp.sum(hits[order] * divide(found, seen)), jnp.sum(hits))


class SmoothAP(eqx.Module):
    """Average precision with a sigmoid for each pair of a positive and another item.

    ``mean_i (1 + sum_j y_j g_ij) / (1 + sum_j g_ij)`` over positives i, with sums over
    the other items j and ``g_ij = sigmoid((s_j - s_i) / temperature)``: a smooth rank
    among the positives over a smooth rank among all.

    Args:
      axis: items are ranked along it; the mean is taken over the others. Static.

    Call with scores and targets in {0, 1} of one shape: [n], or [queries, gallery] for
    mean AP, or [n, labels] with ``axis=0``. ``where`` and ``weights`` are of that shape
    too, or [n] along the axis.

    Ties: count half; in `exact` they share one threshold, as in scikit-learn. Weights:
    as scikit-learn's ``sample_weight``. Rows: one without positives has AP 0 and
    counts; one whose items are all masked out does not, so that
    ``where=targets.any(-1, keepdims=True) & mask`` leaves rows without positives out.
    Cost: positives times n sigmoids a row (n times n under `vmap`), twice that with the
    gradient. Memory: linear in the number of scores whatever their shape, the pairs
    being taken in blocks of 2^20 at most, as many rows at once as fill one. `exact`:
    O(n log n). Bias: a pair is off by ``sigmoid(-|s_i - s_j| / temperature)``.

    Source: Brown et al. 2020 (arXiv 2007.12163). Exact: scikit-learn's
    ``average_precision_score``.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> ap = hg.surrogates.SmoothAP()
    >>> round(float(ap(scores, targets, temperature=0.01)), 4)
    0.8333
    >>> round(float(ap.exact(scores, targets)), 4)
    0.8333
    """

    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("brown2020",)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth average precision, a scalar."""

        def precision(scores, targets, weights):
            hits = weights * targets
            t = as_temperature(temperature, scores.dtype)
            total = sum_of_precisions(scores, hits, weights, t)
            return divide(total, jnp.sum(hits, axis=1))

        return mean_over_rows(
            precision, scores, targets, where, weights, self.axis,
            at_once=rankings_at_once,
        )  # fmt: skip

    def exact(self, scores, targets, *, where=None, weights=None):
        """The average precision, a scalar."""
        return _exact(self, scores, targets, where, weights)


class FastAP(eqx.Module):
    """Average precision of scores in a histogram of ``num_bins`` soft bins.

    A score between two centres is split between them, so that the running totals H of
    all items and H+ of the positives are smooth. The result is the mean of
    ``H+(s_i) / H(s_i)`` over positives i, with totals interpolated between centres and
    the item itself counted whole.

    The resolution is the width of a bin: ``temperature`` is checked and not used.

    Args:
      num_bins: centres, at least 2, evenly from highest to lowest score. Static.
      low, high: the range of the centres in place of the scores' own; scores outside
        count as at its ends, where they have no gradient. Data.
      axis: as `SmoothAP`.

    Shapes, ties in `exact`, weights and rows as `SmoothAP`. Ties: one threshold, as in
    `exact`. Cost: O(n + num_bins) a row, twice that with the gradient. Memory: linear
    in the number of scores, as many rows at once as fill 2^20 numbers. Bias: falls as
    1 / num_bins, and is 0 where no two scores are within two bins. A gradient exists
    where no score is at a centre.

    Source: Cakir et al. 2019 (Deep Metric Learning to Rank, CVPR). Their sum,
    ``sum_b h+_b H+_b / H_b``, counts but the higher part of an item in its own rank
    there: an error of the order of 1 / rank that no number of bins removes. With all
    scores at centres the two are one.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> ap = hg.surrogates.FastAP(num_bins=100)
    >>> round(float(ap(scores, targets, temperature=1.0)), 4)
    0.8333
    """

    num_bins: int = eqx.field(static=True, default=100)
    low: ArrayLike | None = eqx.field(default=None, kw_only=True)
    high: ArrayLike | None = eqx.field(default=None, kw_only=True)
    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("cakir2019",)

    def __check_init__(self):
        if not isinstance(self.num_bins, int) or self.num_bins < 2:
            raise ValueError(
                f"num_bins must be an integer of at least 2, got {self.num_bins!r}"
            )

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The average precision of soft bins, a scalar."""
        as_temperature(temperature, jnp.float32)
        at_once = lambda n: max(1, PAIRS // (n + self.num_bins))
        return mean_over_rows(
            kept_small(jax.vmap(self._one_row)), scores, targets, where, weights,
            self.axis, at_once=at_once,
        )  # fmt: skip

    def exact(self, scores, targets, *, where=None, weights=None):
        """The average precision, a scalar."""
        return _exact(self, scores, targets, where, weights)

    def _one_row(self, scores, targets, weights):
        hits, counted = weights * targets, weights > 0
        given = lambda end: jnp.asarray(end, scores.dtype)
        low = jnp.min(jnp.where(counted, scores, jnp.inf))
        low = low if self.low is None else given(self.low)
        high = jnp.max(jnp.where(counted, scores, -jnp.inf))
        high = high if self.high is None else given(self.high)
        last = self.num_bins - 1
        place = last * divide(high - scores, high - low)
        place = jnp.where(counted, jnp.clip(place, 0, last), 0)
        left = jnp.clip(jnp.floor(lax.stop_gradient(place)).astype(int), 0, last - 1)
        part = place - left  # of an item that goes to the centre on its right

        def total_at(share):
            bins = jnp.zeros(self.num_bins, scores.dtype)
            bins = bins.at[left].add(share * (1 - part)).at[left + 1].add(share * part)
            total = jnp.cumsum(bins)
            # An item by itself would interpolate to 1 - part (1 - part).
            own = share * part * (1 - part)
            return own + (1 - part) * total[left] + part * total[left + 1]

        return divide(
            jnp.sum(hits * divide(total_at(hits), total_at(weights))), jnp.sum(hits)
        )


class BlackboxAP(eqx.Module):
    """Average precision as it is, with the gradient of an interpolation of it.

    With hard ranks r(s), the minimiser of ``s . r`` over all rankings, and the loss
    ``L = 1 - AP`` linearised in the ranks of the positives, ``f(r) = L + dL/dr . (r -
    r(s))``, the gradient is that of ``-f_t``,

        f_t(s) = f(r_t(s)) - s . (r(s) - r_t(s)) / t,   r_t(s) = r(s + t dL/dr),

    a continuous and piecewise affine function of s: ``dAP/ds = (r(s) - r_t(s)) / t``.
    It is at most f, and equal to it where the perturbation changes no rank.

    The temperature is the paper's lambda: how far the interpolation reaches. Since
    dL/dr is at most ``1 / (positives rank)``, a temperature of the order of the number
    of positives times the spread of the scores moves ranks; a small one leaves them, so
    that the gradient is 0.

    Args:
      axis: as `SmoothAP`.

    Shapes, ties, weights and rows as `SmoothAP`'s `exact`, which is the value; in the
    gradient ties are ranked in their order. Cost: three sorts; memory O(n). Bias: none
    of the value; the gradient is that of the interpolation, and has no derivative.

    Source: Rolinek et al. 2020 (arXiv 1912.03500); the interpolation: Vlastelica et al.
    2020 (arXiv 1912.02175).

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> ap = hg.surrogates.BlackboxAP()
    >>> round(float(ap(scores, targets, temperature=10.0)), 4)
    0.8333
    >>> jax.grad(lambda s: ap(s, targets, temperature=10.0))(scores).round(2).tolist()
    [0.0, -0.1, 0.1, 0.0]
    """

    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("rolinek2020", "vlastelica2020")

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The average precision, a scalar, with a gradient."""

        @jax.vmap
        def of_rows(scores, targets, weights):
            t = as_temperature(temperature, scores.dtype)
            value = average_precision(scores, targets, weights)
            gradient = _interpolated(scores, weights * targets, weights, t)
            # Adds nothing but the gradient.
            return value + jnp.vdot(gradient, scores - lax.stop_gradient(scores))

        return mean_over_rows(of_rows, scores, targets, where, weights, self.axis)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The average precision, a scalar."""
        return _exact(self, scores, targets, where, weights)


class SoftRankAP(eqx.Module):
    """Average precision of soft ranks.

    ``mean_i r+_i / r_i`` over positives i, with `soft_rank` among the positives over
    that among all.

    Args:
      axis: as `SmoothAP`.

    Shapes, ties in `exact`, weights and rows as `SmoothAP`. Ties: have their mean rank.
    Cost: two soft ranks; memory O(n). Bias: none where the temperature is at most the
    smallest gap between scores, and no gradient either.

    Source: ranks by Blondel et al. 2020 (arXiv 2002.08871).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> ap = hg.surrogates.SoftRankAP()
    >>> round(float(ap(scores, targets, temperature=1.0)), 4)
    0.8333
    """

    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("blondel2020",)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The average precision of soft ranks, a scalar."""

        @jax.vmap
        def of_rows(scores, targets, weights):
            t = as_temperature(temperature, scores.dtype)
            hits = weights * targets
            precision = soft_precision(scores, hits, weights, t)
            return divide(jnp.sum(hits * precision), jnp.sum(hits))

        return mean_over_rows(of_rows, scores, targets, where, weights, self.axis)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The average precision, a scalar."""
        return _exact(self, scores, targets, where, weights)


def soft_precision(
    scores: Array, hits: Array, weights: Array, temperature: Array
) -> Float[Array, " n"]:
    """At each positive: its soft rank among the positives over that among all."""
    # The precision at an item counts all of its weight, its mean rank half of it.
    rest = (weights - 1) / 2
    found = ranks(scores, hits, temperature) + rest
    seen = ranks(scores, weights, temperature) + rest
    return jnp.where(hits > 0, divide(found, seen), 0)


def _exact(self, scores, targets, where, weights) -> Array:
    of_rows = jax.vmap(average_precision)
    return mean_over_rows(of_rows, scores, targets, where, weights, self.axis)


def _interpolated(
    scores: Array, hits: Array, weights: Array, temperature: Array
) -> Float[Array, " n"]:
    """The gradient ``(r(s) - r_t(s)) / t``; of items with weights, w times that.

    A rank counts the weight at or above the item. That is again the minimiser of a
    linear function, ``sum_i w_i s_i r_i`` (Smith's rule), so a perturbation of the
    score is one of the cost over w.
    """

    def hard_ranks(parts, *shares):
        order = jnp.lexsort([-part for part in reversed(parts)])
        back = jnp.zeros_like(weights)
        return [back.at[order].set(jnp.cumsum(share[order])) for share in shares]

    scores, hits, weights = map(lax.stop_gradient, (scores, hits, weights))
    found, seen = hard_ranks((scores,), hits, weights)
    slope = jnp.where(hits > 0, divide(divide(found, seen), seen * jnp.sum(hits)), 0)
    # The sum and what it rounds off (Knuth's two-sum): a perturbation far below the
    # resolution of the scores still moves an item past one that is as good.
    moves = temperature * slope
    high = scores + moves
    added = high - scores
    low = (scores - (high - added)) + (moves - added)
    (moved,) = hard_ranks((high, low), weights)
    return lax.stop_gradient(weights * (seen - moved) / temperature)
