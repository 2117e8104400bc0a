"""A temperature for every surrogate, from the scores alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from .accuracy import best_others, own
from .base import (
    binary,
    check_setting,
    elementwise,
    flagged,
    mean,
    multiclass,
    multilabel,
)

QUANTILES = 128  # of either class, for pairs
STEPS = 40  # bisections: the bracket shrinks below any dtype's rounding


def temperature_from_scores(
    scores: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    threshold: ArrayLike | None = None,
    gap: ArrayLike = 0.05,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Array:
    """The temperature at which sigmoids of score differences are off by ``gap``.

    The T with ``mean sigmoid(-|d| / T) = gap``, over those differences d on which the
    metric turns and that are not 0:

    - ``threshold`` given: ``s - threshold``, for `Accuracy` of scores [n], `FBeta`,
      `Dice`...;
    - scores [n] without one: ``s_i - s_j`` of pairs, for `AUC`; of opposite classes
      where targets are given;
    - scores [n, C] without one: the best score less the second, or with targets the
      score of the class less the best other.

    Why this mean: it is what separates `Accuracy` and `AUC` from their exact values, so
    that their gap is at most ``gap``. And since
    ``sigmoid(-x) / 2 <= sigmoid'(x) <= sigmoid(-x)``, the mean slope is between
    ``gap / 2`` and ``gap``, where 1/4 is the steepest: it does not vanish, however far
    apart the classes are. The temperature scales with the scores, an outlier adds at
    most its share, and nothing is left to tune. For pairs all this is up to the 128
    quantiles of either class that stand for it.

    With both a threshold and targets, ``gap`` is relative to the rarer class where that
    is less than half: precision, recall, F-beta and Dice compare the tails of many
    negatives with few positives.

    For labels [n, labels] or a ranking [queries, gallery] pass ``scores.ravel()`` and
    ``targets.ravel()``: pairs of all rows stand for those of each.

    Args:
      scores: [n], [n, C], or any shape with a threshold.
      targets: as the surrogate's; optional.
      threshold: the surrogate's, or None.
      gap: in (0, 0.1]. Smaller is nearer to the metric and flatter.
      where, weights: as the surrogate's.

    Returns:
      A scalar above 0 in the dtype of the scores, of which no derivative is taken:
      it is a constant. It is 1 where all differences are 0, and never below ``gap / 5``
      times the median of ``|d|``: where so many differences are tiny that this is met,
      they all count, and the gap is larger by theirs.

    Within an outer loss such a constant moves with the scores, and the slope of the
    value is not its derivative: no estimator's trust sees that. Take it once, outside
    the loss, keep it in the outer data, and lower it by `minimize`'s ``anneal``. For
    average precision, which turns on few positives, take a smaller gap.

    Cost: 40 means over the differences, and a sort. To anneal, use optax's schedules: a
    temperature is data, so other values trace nothing.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> scores = jax.random.normal(jax.random.key(0), (1000,))
    >>> targets = scores + jax.random.normal(jax.random.key(1), (1000,)) > 0
    >>> start = hg.surrogates.temperature_of(scores, targets)
    >>> scaled = hg.surrogates.temperature_of(100 * scores, targets)
    >>> bool(jnp.isclose(scaled, 100 * start))
    True
    >>> auc, schedule = hg.surrogates.AUC(), optax.exponential_decay(start, 10, 0.1)
    >>> for step in (0, 10):
    ...     gap = auc(scores, targets, temperature=schedule(step))
    ...     gap = gap - auc.exact(scores, targets)
    ...     print(bool(abs(gap) < 0.05), bool(abs(gap) < 0.005))
    True False
    True True
    """
    check_setting("gap", gap, 0, 0.1)
    differences, weights, gap = _differences(
        scores, targets, threshold, gap, where, weights
    )
    sizes, weights, gap = jax.lax.stop_gradient((jnp.abs(differences), weights, gap))
    unsound = flagged(jnp.zeros_like(gap), weights)
    weights = jnp.where(sizes > 0, weights, 0)
    total = jnp.sum(weights)
    weights = weights / jnp.where(total > 0, total, 1)
    median = _quantiles(sizes, weights, jnp.full(1, 0.5, sizes.dtype))[0]
    median = jnp.where(total > 0, median, 1)

    def halve(_, bracket):
        low, high = bracket
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        off = jnp.sum(weights * jax.nn.sigmoid(-sizes / middle))
        above = off > gap
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    # Were the density of |d| flat, T would be 2.9 gap medians; at the median it is
    # too high, since half of the differences are off by sigmoid(-1) at least.
    bracket = gap * median / 5, median
    low, high = jax.lax.fori_loop(0, STEPS, halve, bracket)
    return jnp.where(total > 0, jnp.sqrt(low) * jnp.sqrt(high), 1) + unsound


def _differences(
    scores, targets, threshold, gap, where, weights
) -> tuple[Array, Array, Array]:
    """``(differences, weights, gap)``, flat."""
    shape = jnp.shape(scores)
    if threshold is not None:
        known = jnp.zeros(shape, bool) if targets is None else targets
        labels = len(shape) == 2 and shape[:1] in map(np.shape, (where, weights))
        check = multilabel if labels else elementwise
        scores, known, weights, _ = check(scores, known, where, weights)
        if labels:
            weights = jnp.broadcast_to(weights[:, None], scores.shape)
        gap = jnp.asarray(gap, scores.dtype)
        if targets is not None:
            share = mean(known, weights)
            rarer = jnp.minimum(share, 1 - share)
            gap = gap * jnp.where(rarer > 0, 2 * rarer, 1)
        differences = scores - jnp.asarray(threshold, scores.dtype)
        return differences.ravel(), weights.ravel(), gap
    if len(shape) == 2:
        known = jnp.zeros(shape[0], int) if targets is None else targets
        scores, known, weights, _ = multiclass(scores, known, where, weights)
        classes = jnp.argmax(scores, axis=1) if targets is None else known
        differences = own(scores, classes) - best_others(scores, classes, 1)
        return differences, weights, jnp.asarray(gap, scores.dtype)
    known = jnp.zeros(shape, bool) if targets is None else targets
    scores, known, weights, _ = binary(scores, known, where, weights)
    of_one, of_other = weights * known, weights * (1 - known)
    if targets is None:
        of_one = of_other
    levels = (jnp.arange(QUANTILES, dtype=scores.dtype) + 0.5) / QUANTILES
    ones, others = (_quantiles(scores, w, levels) for w in (of_one, of_other))
    pairs = (ones[:, None] - others[None, :]).ravel()
    exist = (jnp.sum(of_one) > 0) & (jnp.sum(of_other) > 0)
    either = flagged(jnp.where(exist, jnp.ones_like(pairs), 0), weights)
    return pairs, either, jnp.asarray(gap, scores.dtype)


def _quantiles(values: Array, weights: Array, levels: Array) -> Array:
    """Values below or at which these shares of the weight lie; always one of them."""
    order = jnp.argsort(values)
    shares = jnp.cumsum(weights[order])
    index = jnp.searchsorted(shares, levels * shares[-1])
    return values[order][jnp.clip(index, 0, len(values) - 1)]
