"""Metrics of the top of a ranking: recall, precision and NDCG at k, reciprocal rank.

All but the last rest on one function, ``T(r)``: how much gain is among the top r.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .base import as_temperature, check_count, divide
from .ranking import at_thresholds, mean_over_rows

STEPS = 100  # of the search for a threshold; it ends by itself before


class RecallAtK(eqx.Module):
    """Share of the positives that are among the top k: higher is better.

    ``sum_i y_i p_i / sum_i y_i``; ``p_i = sigmoid((s_i - c) / temperature)`` is item
    i's membership in the top k, with the threshold c at which memberships sum to k.

    Args:
      k: how many items are retrieved. Static.
      axis: items are ranked along it; the mean is taken over the others. Static.

    Call with scores and targets in {0, 1} of one shape: [n], [queries, gallery], or
    [n, labels] with ``axis=0``. ``where`` and ``weights`` are of that shape too, or [n]
    along the axis.

    Ties: share the places that they compete for, as the mean over their orders would;
    so in the surrogate. Weights: one of 2 is two equal items. Rows: one without
    positives counts as 0, one whose items are all masked out does not count. Cost: a
    sort, and a sigmoid an item for each step of the search for c, which ends by itself
    (Newton's and bisections, 100 at most); memory O(n). The gradient goes through c, by
    the implicit function theorem. Bias: an item is off by
    ``sigmoid(-|s_i - c| / temperature)``.

    Source: memberships by Amos, Koltun & Kolter 2019 (arXiv 1906.08707).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> recall = hg.surrogates.RecallAtK(2)
    >>> round(float(recall(scores, targets, temperature=0.1)), 3)
    0.503
    >>> float(recall.exact(scores, targets))
    0.5
    """

    k: int = eqx.field(static=True)
    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("amos2019",)

    def __check_init__(self):
        check_count("k", self.k)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth recall, a scalar."""
        top = functools.partial(_smooth_top, temperature=temperature)
        return self._recall(top, scores, targets, where, weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The recall, a scalar."""
        return self._recall(_top, scores, targets, where, weights)

    def _recall(self, top, scores, targets, where, weights):
        @jax.vmap
        def of_rows(scores, targets, weights):
            (found,) = top(scores, targets, weights, jnp.array([self.k]))
            return divide(found, jnp.sum(weights * targets))

        return mean_over_rows(of_rows, scores, targets, where, weights, self.axis)


class PrecisionAtK(eqx.Module):
    """Share of positives among the top k: higher is better.

    ``sum_i y_i p_i / k``, with the memberships ``p`` of `RecallAtK`. With fewer than k
    items, places that are left empty count as misses.

    Args:
      k: how many items are retrieved. Static.
      axis: as `RecallAtK`.

    Shapes, ties, weights, rows, cost, bias and source as `RecallAtK`.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1, 0, 1, 0])
    >>> precision = hg.surrogates.PrecisionAtK(3)
    >>> round(float(precision(scores, targets, temperature=0.1)), 3)
    0.664
    >>> round(float(precision.exact(scores, targets)), 3)
    0.667
    """

    k: int = eqx.field(static=True)
    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("amos2019",)

    def __check_init__(self):
        check_count("k", self.k)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth precision, a scalar."""
        top = functools.partial(_smooth_top, temperature=temperature)
        return self._precision(top, scores, targets, where, weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The precision, a scalar."""
        return self._precision(_top, scores, targets, where, weights)

    def _precision(self, top, scores, targets, where, weights):
        @jax.vmap
        def of_rows(scores, targets, weights):
            (found,) = top(scores, targets, weights, jnp.array([self.k]))
            return found / self.k

        return mean_over_rows(of_rows, scores, targets, where, weights, self.axis)


class NDCG(eqx.Module):
    """Normalised discounted cumulative gain at k: higher is better.

    ``sum_r (T(r) - T(r - 1)) / log2(1 + r)`` over ranks r to k, over the largest value
    that any ranking has. ``T(r) = sum_i y_i p_i`` is the gain among the top r, with the
    memberships ``p`` of `RecallAtK`.

    Args:
      k: ranks that count; n for all. Static.
      axis: as `RecallAtK`.

    Targets are gains, at least 0, taken as they are: for ``2^y - 1`` pass that. Shapes,
    ties, weights and rows as `RecallAtK`; a row without gain counts as 0. Cost: k times
    that of `RecallAtK`; memory O(n). Bias: as there, for each r.

    Source: Jarvelin & Kekalainen 2002; ties: McSherry & Najork 2008; memberships: Amos,
    Koltun & Kolter 2019 (arXiv 1906.08707). Exact: scikit-learn's ``ndcg_score``.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, gains = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 2.0, 3.0])
    >>> ndcg = hg.surrogates.NDCG(3)
    >>> round(float(ndcg(scores, gains, temperature=0.1)), 3)
    0.42
    >>> round(float(ndcg.exact(scores, gains)), 3)
    0.42
    """

    k: int = eqx.field(static=True)
    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("jarvelin2002", "mcsherry2008", "amos2019")

    def __check_init__(self):
        check_count("k", self.k)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth NDCG, a scalar."""
        top = functools.partial(_smooth_top, temperature=temperature)
        return self._ndcg(top, scores, targets, where, weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The NDCG, a scalar."""
        return self._ndcg(_top, scores, targets, where, weights)

    def _ndcg(self, top, scores, targets, where, weights):
        ranks = jnp.arange(1, self.k + 1)

        @jax.vmap
        def of_rows(scores, targets, weights):
            discounts = 1 / jnp.log2(1 + ranks.astype(scores.dtype))
            dcg = lambda totals: jnp.sum(discounts * jnp.diff(totals, prepend=0))
            best = dcg(_top(targets, targets, weights, ranks))
            return divide(dcg(top(scores, targets, weights, ranks)), best)

        return mean_over_rows(
            of_rows, scores, targets, where, weights, self.axis, graded=True
        )


class MRR(eqx.Module):
    """Mean reciprocal rank of the first positive: higher is better.

    ``1 / (1 + sum_j sigmoid((s_j - m) / t))`` over negatives j, where m is the smooth
    maximum of the positives, ``t log sum_i exp(s_i / t)``, and t the temperature.

    Args:
      axis: as `RecallAtK`.

    Shapes and rows as `RecallAtK`. Ties: 1 over the mean rank of the first positive
    over their orders; so in the surrogate. Weights: one of 2 is two equal items. Cost
    and memory: O(n). Bias: a negative is off by ``sigmoid(-|s_j - m| / t)``,
    and m by at most ``t log(positives)``.

    Source: Voorhees 1999; a sigmoid a pair as in Qin, Liu & Li 2010.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([4.0, 3.0, 2.0, 1.0]), jnp.array([0, 1, 1, 0])
    >>> mrr = hg.surrogates.MRR()
    >>> round(float(mrr(scores, targets, temperature=0.1)), 3)
    0.5
    >>> float(mrr.exact(scores, targets))
    0.5
    """

    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("voorhees1999", "qin2010")

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth mean reciprocal rank, a scalar."""

        @jax.vmap
        def of_rows(scores, targets, weights):
            t = as_temperature(temperature, scores.dtype)
            hits, misses = weights * targets, weights * (1 - targets)
            some = jnp.any(hits > 0)
            best = lax.stop_gradient(_best(scores, hits))
            u = jnp.where(weights > 0, (scores - best) / t, 0)
            smooth_best = jax.nn.logsumexp(u, b=jnp.where(some, hits, 1))
            rank = 1 + jnp.sum(misses * jax.nn.sigmoid(u - smooth_best))
            return jnp.where(some, 1 / rank, 0)

        return mean_over_rows(of_rows, scores, targets, where, weights, self.axis)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The mean reciprocal rank, a scalar."""

        @jax.vmap
        def of_rows(scores, targets, weights):
            hits, misses = weights * targets, weights * (1 - targets)
            best = _best(scores, hits)
            tied = scores == best
            # Of a positive and a negative tied, either may be first; of p and one, the
            # negative is so once in 1 + p times.
            first = 1 / (1 + jnp.sum(hits * tied))
            before = jnp.where(tied, first, scores > best)
            rank = 1 + jnp.sum(misses * before)
            return jnp.where(jnp.any(hits > 0), 1 / rank, 0)

        return mean_over_rows(of_rows, scores, targets, where, weights, self.axis)


def _best(scores: Array, hits: Array) -> Float[Array, ""]:
    """The highest score of a positive; 0 where there is none."""
    best = jnp.max(jnp.where(hits > 0, scores, -jnp.inf))
    return jnp.where(jnp.any(hits > 0), best, 0)


def _top(
    scores: Array, gains: Array, weights: Array, ranks: Array
) -> Float[Array, " r"]:
    """``T(r)``, exactly: linear within ties, where it is the mean over orders."""
    _, (gained, seen) = at_thresholds(scores, weights * gains, weights)
    pad = lambda totals: jnp.pad(totals, (1, 0))
    return jnp.interp(ranks.astype(scores.dtype), pad(seen), pad(gained))


def _smooth_top(
    scores: Array, gains: Array, weights: Array, ranks: Array, *, temperature: Array
) -> Float[Array, " r"]:
    """``T(r)`` of memberships, one r after the other so that memory is O(n)."""
    temperature = as_temperature(temperature, scores.dtype)
    order = jnp.argsort(jnp.where(weights > 0, -lax.stop_gradient(scores), jnp.inf))
    seen = lax.stop_gradient(jnp.cumsum(weights[order]))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def total(rank):
        rank = rank.astype(scores.dtype)
        # Differences from a score at the threshold: exact where quotients are not.
        last = order[jnp.minimum(jnp.searchsorted(seen, rank), scores.size - 1)]
        u = (scores - lax.stop_gradient(scores[last])) / temperature
        u = jnp.where(weights > 0, u, 0)
        return jnp.vdot(weights * gains, memberships(u, weights, rank))

    return lax.map(total, ranks)


@jax.custom_jvp
def memberships(
    u: Float[Array, " n"], weights: Float[Array, " n"], mass: Float[Array, ""]
) -> Float[Array, " n"]:
    """``p_i = sigmoid(u_i - c)`` with c such that ``sum_i w_i p_i = mass``.

    All 1 where there is no more weight than that.
    """

    def excess(c):
        p = jax.nn.sigmoid(u - c)
        return jnp.vdot(weights, p) - mass, -jnp.vdot(weights, p * (1 - p))

    total = jnp.sum(weights)
    enough = total > mass
    # Beyond the extremes by c, all items together have less (more) than the mass.
    eps = jnp.finfo(u.dtype).eps
    share = jnp.clip(mass / jnp.where(enough, total, 1), eps, 1 - eps)
    reach = jnp.abs(jnp.log(share) - jnp.log1p(-share)) + 1
    low, high = jnp.min(u) - reach, jnp.max(u) + reach
    tolerance = 2 * eps * mass

    def unfinished(state):
        step, low, high, c, (value, _) = state
        width = high - low > eps * (1 + jnp.abs(c))
        return enough & (step < STEPS) & (jnp.abs(value) > tolerance) & width

    def search(state):
        """Newton's step where it stays in the bracket, else a bisection."""
        step, low, high, c, (value, slope) = state
        low, high = jnp.where(value > 0, c, low), jnp.where(value > 0, high, c)
        middle = (low + high) / 2
        newton = c - value / jnp.where(slope < 0, slope, -1)
        inside = (slope < 0) & (low < newton) & (newton < high)
        c = jnp.where(inside, newton, middle)
        return step + 1, low, high, c, excess(c)

    start = jnp.zeros_like(mass)
    state = jnp.asarray(0), low, high, start, excess(start)
    c = lax.while_loop(unfinished, search, state)[3]
    return jnp.where(enough, jax.nn.sigmoid(u - c), 1)


@memberships.defjvp
def _(primals, tangents):
    u, weights, mass = primals
    du, dw, dm = tangents
    p = memberships(u, weights, mass)
    # 0 = d sum_i w_i p_i - dm, where dp_i = p_i (1 - p_i) (du_i - dc).
    slope = p * (1 - p)
    dc = divide(jnp.vdot(weights * slope, du) + jnp.vdot(p, dw) - dm, weights @ slope)
    return p, slope * (du - dc)
