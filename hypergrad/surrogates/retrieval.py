"""Metrics of the top of a ranking: recall, precision and NDCG at k, reciprocal rank.

All but the reciprocal rank are computed from the gain among the top r items.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..number_checks import check_positive_int
from ..trees import without_derivative
from .base import divide_by_temperature, safe_divide
from .inputs import Examples, Scalar, Vector, graded_examples
from .pairs import remat
from .ranking import RankingSurrogate, ranking_rows, rowwise, totals_at_thresholds

MAX_STEPS = 100  # of the search for a threshold, which usually stops earlier


class _TopK(RankingSurrogate):
    """A metric of the first ``k`` ranks."""

    k: int = eqx.field(static=True)

    def __check_init__(self):
        check_positive_int("k", self.k)


class RecallAtK(_TopK):
    """Fraction of the positives that are among the top k; higher is better.

        sum_i y_i p_i / sum_i y_i,    p_i = sigmoid((s_i - c) / T)

    ``p_i`` is the membership of item i in the top k. The threshold c is such that the
    memberships sum to k.

    Args:
      k: Number of items that are retrieved. Static.
      axis: As for `RankingSurrogate`, which states the shapes. An item of weight 2 is
        two equal items.

    Ties: share the ranks that they compete for, as the mean over their orders would, in
    the surrogate too.
    Cost: a sort, and a sigmoid per item in each of at most 100 steps of the search for
    c (Newton steps and bisections, which usually stop early).
    Memory: O(n). The gradient goes through c by the implicit function theorem.
    Bias: ``sigmoid(-|s_i - c| / T)`` per item.
    Source: Amos, Koltun & Kolter 2019 (arXiv 1906.08707) for the memberships.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> recall = hg.surrogates.RecallAtK(2)
    >>> float(recall(scores, targets, temperature=0.1))
    0.503
    >>> float(recall.exact(scores, targets))
    0.5
    """

    citations = ("amos2019",)

    @rowwise
    def smooth_rows(self, row, temperature):
        """Returns ``sum_i y_i p_i / sum_i y_i``."""
        (gain,) = smooth_top_gains(row, jnp.array([self.k]), temperature)
        return safe_divide(gain, jnp.sum(row.positive_weights))

    @rowwise
    def exact_rows(self, row):
        """Returns the gain among the top k divided by the weight of the positives."""
        (gain,) = exact_top_gains(row, jnp.array([self.k]))
        return safe_divide(gain, jnp.sum(row.positive_weights))


class PrecisionAtK(_TopK):
    """Fraction of positives among the top k; higher is better.

        sum_i y_i p_i / k,    with the memberships p of `RecallAtK`

    With fewer than k items, the missing items count as negatives. Arguments, shapes,
    ties, cost, memory, bias and source are those of `RecallAtK`.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> precision = hg.surrogates.PrecisionAtK(3)
    >>> float(precision(scores, targets, temperature=0.1))
    0.664
    >>> float(precision.exact(scores, targets))
    0.667
    """

    citations = ("amos2019",)

    @rowwise
    def smooth_rows(self, row, temperature):
        """Returns ``sum_i y_i p_i / k``."""
        return smooth_top_gains(row, jnp.array([self.k]), temperature)[0] / self.k

    @rowwise
    def exact_rows(self, row):
        """Returns the gain among the top k divided by k."""
        return exact_top_gains(row, jnp.array([self.k]))[0] / self.k


class NDCG(_TopK):
    """Normalized discounted cumulative gain at k; higher is better.

        sum_r (T(r) - T(r - 1)) / log2(1 + r)    over the ranks r = 1..k,

    divided by its largest value for any ranking. ``T(r) = sum_i y_i p_i`` is the gain
    among the top r items, with the memberships p of `RecallAtK` for r in place of k.
    Targets are gains, at least 0, used as they are: for ``2^y - 1`` pass that. A
    ranking without gain has the value 0.

    Args:
      k: Number of ranks that count; n for all. Static.
      axis: As for `RecallAtK`, as are ties, memory and bias.

    Cost: k times the cost of `RecallAtK`.
    Source: Jarvelin & Kekalainen 2002; McSherry & Najork 2008 for ties; Amos, Koltun &
    Kolter 2019 (arXiv 1906.08707) for the memberships. The exact metric is
    ``ndcg_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, gains = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 2.0, 3.0])
    >>> ndcg = hg.surrogates.NDCG(3)
    >>> float(ndcg(scores, gains, temperature=0.1)), float(ndcg.exact(scores, gains))
    (0.420, 0.420)
    """

    citations = ("jarvelin2002", "mcsherry2008", "amos2019")

    def check_inputs(self, scores, targets, where, weights):
        """Returns rankings with gains of at least 0."""
        return ranking_rows(scores, targets, where, weights, self.axis, graded_examples)

    @rowwise
    def smooth_rows(self, row, temperature):
        """Returns the NDCG of the gains of the memberships."""
        ranks = jnp.arange(1, self.k + 1)
        return self._normalized_dcg(smooth_top_gains(row, ranks, temperature), row)

    @rowwise
    def exact_rows(self, row):
        """Returns the NDCG of the gains."""
        ranks = jnp.arange(1, self.k + 1)
        return self._normalized_dcg(exact_top_gains(row, ranks), row)

    def _normalized_dcg(self, gains: Float[Array, " k"], row: Examples) -> Array:
        ranks = jnp.arange(1, self.k + 1)
        discounts = 1 / jnp.log2(1 + ranks.astype(row.scores.dtype))
        dcg = lambda gains: jnp.sum(discounts * jnp.diff(gains, prepend=0))
        ideal_row = dataclasses.replace(row, scores=row.targets)
        return safe_divide(dcg(gains), dcg(exact_top_gains(ideal_row, ranks)))


class MRR(RankingSurrogate):
    """Mean reciprocal rank of the first positive; higher is better.

        1 / (1 + sum_j sigmoid((s_j - m) / T)),    m = T log sum_i exp(s_i / T)

    The first sum is over the negatives j, the second over the positives i: m is the
    smooth maximum of the positives. An item of weight 2 is two equal items. Shapes and
    ``axis`` are those of `RankingSurrogate`.

    Ties: 1 over the mean rank of the first positive over the orders of the ties, in the
    surrogate too.
    Cost: O(n). Memory: O(n).
    Bias: ``sigmoid(-|s_j - m| / T)`` per negative, and ``T log(positives)`` in m.
    Source: Voorhees 1999; Qin, Liu & Li 2010 for a sigmoid per pair.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([0, 1, 1, 0])
    >>> mrr = hg.surrogates.MRR()
    >>> float(mrr(scores, targets, temperature=0.1)), float(mrr.exact(scores, targets))
    (0.500, 0.500)
    """

    citations = ("voorhees1999", "qin2010")

    @rowwise
    def smooth_rows(self, row, temperature):
        """Returns ``1 / (1 + sum_j sigmoid((s_j - m) / T))``."""
        positive_weights = row.positive_weights
        has_positive = jnp.any(positive_weights > 0)
        # Scores relative to the best positive, so that exp does not overflow.
        best = without_derivative(_best_positive_score(row))
        u = divide_by_temperature(row.scores - best, temperature)
        u = jnp.where(row.weights > 0, u, 0)
        factors = jnp.where(has_positive, positive_weights, 1)
        smooth_max = jax.nn.logsumexp(u, b=factors)
        rank = 1 + jnp.sum(row.negative_weights * jax.nn.sigmoid(u - smooth_max))
        return jnp.where(has_positive, 1 / rank, 0)

    @rowwise
    def exact_rows(self, row):
        """Returns the reciprocal rank."""
        positive_weights = row.positive_weights
        best = _best_positive_score(row)
        is_tied = row.scores == best
        # In a random order of p tied positives and one tied negative, the negative is
        # before all positives with probability 1 / (1 + p).
        is_first = 1 / (1 + jnp.sum(positive_weights * is_tied))
        is_before = jnp.where(is_tied, is_first, row.scores > best)
        rank = 1 + jnp.sum(row.negative_weights * is_before)
        return jnp.where(jnp.any(positive_weights > 0), 1 / rank, 0)


def _best_positive_score(row: Examples) -> Scalar:
    """Returns the highest score of a positive, or 0 without positives."""
    is_positive = row.positive_weights > 0
    best = jnp.max(jnp.where(is_positive, row.scores, -jnp.inf))
    return jnp.where(jnp.any(is_positive), best, 0)


def exact_top_gains(row: Examples, ranks: Int[Array, " k"]) -> Float[Array, " k"]:
    """Returns the gain among the top r items, the mean over the orders of ties."""
    _, (gains, num_items) = totals_at_thresholds(
        row.scores, row.positive_weights, row.weights
    )
    # Within a group of ties, the mean over orders is linear in the rank.
    prepend_zero = lambda totals: jnp.pad(totals, (1, 0))
    ranks = ranks.astype(row.scores.dtype)
    return jnp.interp(ranks, prepend_zero(num_items), prepend_zero(gains))


def smooth_top_gains(
    row: Examples, ranks: Int[Array, " k"], temperature: Scalar
) -> Float[Array, " k"]:
    """Returns ``sum_i w_i y_i p_i`` with the memberships p in the top r items."""
    scores, weights = row.scores, row.weights
    has_weight = without_derivative(weights) > 0
    order = jnp.argsort(jnp.where(has_weight, -without_derivative(scores), jnp.inf))
    num_items = without_derivative(jnp.cumsum(weights[order]))

    @remat
    def top_gain(rank):
        rank = rank.astype(scores.dtype)
        # Scores relative to the item at this rank, which is near the threshold:
        # differences are exact where quotients are not.
        index = jnp.minimum(jnp.searchsorted(num_items, rank), scores.size - 1)
        reference = without_derivative(scores[order[index]])
        u = divide_by_temperature(scores - reference, temperature)
        u = jnp.where(has_weight, u, 0)
        return jnp.vdot(weights * row.targets, top_memberships(u, weights, rank))

    # One rank after the other, so that memory is O(n).
    return lax.map(top_gain, ranks)


@jax.custom_jvp
def top_memberships(u: Vector, weights: Vector, mass: Scalar) -> Vector:
    """Returns ``p_i = sigmoid(u_i - c)`` with c such that ``sum_i w_i p_i = mass``.

    All memberships are 1 if the weights sum to the mass or less.
    """

    def mass_error(c):
        """Returns ``sum_i w_i p_i - mass`` and its derivative by c."""
        p = jax.nn.sigmoid(u - c)
        return jnp.vdot(weights, p) - mass, -jnp.vdot(weights, p * (1 - p))

    total = jnp.sum(weights)
    has_threshold = total > mass
    # With c this far beyond the extremes, the memberships sum to less (more) than mass.
    eps = jnp.finfo(u.dtype).eps
    fraction = jnp.clip(mass / jnp.where(has_threshold, total, 1), eps, 1 - eps)
    reach = jnp.abs(jnp.log(fraction) - jnp.log1p(-fraction)) + 1
    low, high = jnp.min(u) - reach, jnp.max(u) + reach
    # The rounding error of a sum of memberships.
    tolerance = 2 * eps * mass

    def cond_fun(state):
        step, low, high, c, (error, _) = state
        is_wide = high - low > eps * (1 + jnp.abs(c))
        is_inexact = jnp.abs(error) > tolerance
        return has_threshold & (step < MAX_STEPS) & is_inexact & is_wide

    def body_fun(state):
        """Takes a Newton step if it stays in the bracket, else a bisection."""
        step, low, high, c, (error, slope) = state
        # The sum of the memberships decreases in c.
        low, high = jnp.where(error > 0, c, low), jnp.where(error > 0, high, c)
        middle = (low + high) / 2
        newton = c - error / jnp.where(slope < 0, slope, -1)
        is_inside = (slope < 0) & (low < newton) & (newton < high)
        c = jnp.where(is_inside, newton, middle)
        return step + 1, low, high, c, mass_error(c)

    init_c = jnp.zeros_like(mass)
    state = jnp.asarray(0), low, high, init_c, mass_error(init_c)
    c = lax.while_loop(cond_fun, body_fun, state)[3]
    return jnp.where(has_threshold, jax.nn.sigmoid(u - c), 1)


@top_memberships.defjvp
def _top_memberships_jvp(primals, tangents):
    """Differentiates ``sum_i w_i p_i = mass`` by the implicit function theorem."""
    u, weights, mass = primals
    du, d_weights, d_mass = tangents
    p = top_memberships(u, weights, mass)
    # 0 = d(sum_i w_i p_i) - d(mass), where dp_i = p_i (1 - p_i) (du_i - dc).
    slope = p * (1 - p)
    d_mass = jnp.vdot(weights * slope, du) + jnp.vdot(p, d_weights) - d_mass
    dc = safe_divide(d_mass, weights @ slope)
    return p, slope * (du - dc)
