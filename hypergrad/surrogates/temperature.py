"""A temperature for any surrogate, from the scores alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from ..number_checks import finite, positive_up_to
from .accuracy import best_other_scores, class_scores
from .base import propagate_nan, subtract_threshold, weighted_mean
from .inputs import (
    Scalar,
    Vector,
    elementwise_examples,
    graded_examples,
    multiclass_examples,
    multilabel_examples,
)

NUM_QUANTILES = 128  # of each class, which stand for all pairs
NUM_BISECTIONS = 40  # which shrink the bracket below the rounding of any dtype


def temperature_from_scores(
    scores: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    threshold: ArrayLike | None = None,
    gap: ArrayLike = 0.05,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Scalar:
    """Returns the temperature at which sigmoids of differences are off by ``gap``.

    The temperature T solves ``mean sigmoid(-|d| / T) = gap`` over the differences d
    that determine the metric and are not 0:

    - with a ``threshold``, ``s - threshold``, for `Accuracy` of scores [n], `FBeta` or
      `Dice`;
    - without one for scores [n], ``s_i - s_j`` of pairs, for `AUC`; pairs of opposite
      classes if targets are given;
    - without one for scores [n, C], the best score less the second, or with targets the
      score of the true class less the best other score.

    This mean bounds the gap of `Accuracy` and `AUC` to their exact values. The mean
    slope is between half of this mean and the mean, of at most 1/4, because
    ``sigmoid(-x) / 2 <= sigmoid'(x) <= sigmoid(-x)``: it does not vanish however far
    apart the classes are. The temperature scales with the scores, and an outlier
    changes it by at most its share. 128 quantiles of each class stand for the pairs.

    With a threshold and targets, ``gap`` is relative to the rarer class, because
    precision, recall, F-beta and Dice compare the tails of many negatives with few
    positives: the mean that is reached is ``2 r gap``, where r is the part of the rarer
    class in the weight (``gap`` if a class is missing). With 1% of positives it is
    ``gap / 50``, and so is the upper bound of the mean slope.

    Args:
      scores: Scores [n], [n, C], or of any shape with a threshold. For labels or
        several rankings pass ``scores.ravel()`` and ``targets.ravel()``: pairs of all
        rows stand for the pairs of each row.
      targets: Targets of the surrogate, where gains above 0 are positive. Optional.
      threshold: Threshold of the surrogate. Defaults to none.
      gap: Mean error of the sigmoids, in (0, 0.1]. A smaller gap is closer to the
        metric and has a flatter gradient. Average precision, which depends on few
        positives, needs a smaller one.
      where, weights: As for the surrogate.

    Returns:
      A scalar above 0 in the dtype of the scores, without a derivative. It is 1 if all
      differences are 0, and at least ``gap / 5`` times the median of ``|d|``, or with a
      threshold and targets ``2 r gap / 5`` times it. The mean is larger at this bound.

    Compute the temperature once, outside of the outer loss, keep it in the outer data,
    and lower it by ``outer_data_fn`` of `OuterLoop`. Within the loss it would move with
    the scores, but has no derivative, so that estimates are flagged `lost_derivative`.

    Cost: 40 means over the differences, and a sort; schedules compile one program.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> scores = jax.random.normal(jax.random.key(0), (1000,))
    >>> targets = scores + jax.random.normal(jax.random.key(1), (1000,)) > 0
    >>> init = hg.surrogates.temperature_from_scores(scores, targets)
    >>> scaled = hg.surrogates.temperature_from_scores(100 * scores, targets)
    >>> bool(jnp.isclose(scaled, 100 * init))
    True
    >>> auc, schedule = hg.surrogates.AUC(), optax.exponential_decay(init, 10, 0.1)
    >>> for step in (0, 10):
    ...     smooth = auc(scores, targets, temperature=schedule(step))
    ...     gap = abs(smooth - auc.exact(scores, targets))
    ...     print(bool(gap < 0.05), bool(gap < 0.005))
    True False
    True True
    """
    gap = positive_up_to("gap", 0.1)(gap)
    if threshold is None:
        subtract = _class_differences if np.ndim(scores) == 2 else _pair_differences
        differences, weights = subtract(scores, targets, where, weights)
    else:
        differences, weights, gap = _threshold_differences(
            scores, targets, threshold, gap, where, weights
        )
    system = (jnp.abs(differences), weights, jnp.asarray(gap, differences.dtype))
    return _solve_temperature(*jax.lax.stop_gradient(system))


def _solve_temperature(
    distances: Float[Array, " d"], weights: Float[Array, " d"], gap: Scalar
) -> Scalar:
    """Solves ``mean sigmoid(-distance / T) = gap`` over positive distances."""
    # The comparisons of a bisection would hide NaN.
    nan_if_invalid = propagate_nan(jnp.zeros_like(gap), weights)
    weights = jnp.where(distances > 0, weights, 0)
    total = jnp.sum(weights)
    weights = weights / jnp.where(total > 0, total, 1)
    median = _quantiles(distances, weights, jnp.full(1, 0.5, distances.dtype))[0]
    median = jnp.where(total > 0, median, 1)

    def bisect(_, bracket):
        low, high = bracket
        # The geometric mean, which does not overflow.
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        is_above = jnp.sum(weights * jax.nn.sigmoid(-distances / middle)) > gap
        return jnp.where(is_above, low, middle), jnp.where(is_above, middle, high)

    # If the density of the distances were flat, T would be 2.9 gap medians. The median
    # is too high: half of the sigmoids are at least sigmoid(-1) there.
    bracket = gap * median / 5, median
    low, high = jax.lax.fori_loop(0, NUM_BISECTIONS, bisect, bracket)
    temperature = jnp.where(total > 0, jnp.sqrt(low) * jnp.sqrt(high), 1)
    return temperature + nan_if_invalid


def _threshold_differences(
    scores, targets, threshold, gap, where, weights
) -> tuple[Array, Array, Array]:
    """Returns ``s - threshold`` of all scores, their weights, and the gap to reach."""
    threshold = finite("threshold", allow_array=True)(threshold)
    shape = np.shape(scores)
    is_multilabel = len(shape) == 2 and shape[:1] in map(np.shape, (where, weights))
    check = multilabel_examples if is_multilabel else elementwise_examples
    labels = jnp.zeros(shape, bool) if targets is None else targets
    examples = check(scores, labels, where, weights)
    scores, weights = examples.scores, examples.weights
    if is_multilabel:
        weights = jnp.broadcast_to(weights[:, None], scores.shape)
    gap = jnp.asarray(gap, scores.dtype)
    if targets is not None:
        positive_fraction = weighted_mean(examples.targets, weights)
        rarer_fraction = jnp.minimum(positive_fraction, 1 - positive_fraction)
        gap = gap * jnp.where(rarer_fraction > 0, 2 * rarer_fraction, 1)
    differences = subtract_threshold(scores, threshold)
    return differences.ravel(), weights.ravel(), gap


def _class_differences(scores, targets, where, weights) -> tuple[Array, Array]:
    """Returns the margins of the true or predicted classes, and their weights."""
    labels = jnp.zeros(np.shape(scores)[0], int) if targets is None else targets
    examples = multiclass_examples(scores, labels, where, weights)
    scores, classes = examples.scores, examples.targets
    if targets is None:
        classes = jnp.argmax(scores, axis=1)
    margins = class_scores(scores, classes) - best_other_scores(scores, classes)
    return margins, examples.weights


def _pair_differences(scores, targets, where, weights) -> tuple[Array, Array]:
    """Returns differences of quantiles of both classes or all scores, and weights."""
    labels = jnp.zeros(np.shape(scores), bool) if targets is None else targets
    examples = graded_examples(scores, labels, where, weights)
    is_positive = examples.targets > 0
    positive_weights = jnp.where(is_positive, examples.weights, 0)
    negative_weights = jnp.where(is_positive, 0, examples.weights)
    if targets is None:
        # All scores have the label 0: pairs are of all scores with all scores.
        positive_weights = negative_weights
    levels = jnp.arange(NUM_QUANTILES, dtype=examples.scores.dtype) + 0.5
    levels = levels / NUM_QUANTILES
    positive_scores, negative_scores = (
        _quantiles(examples.scores, class_weights, levels)
        for class_weights in (positive_weights, negative_weights)
    )
    differences = (positive_scores[:, None] - negative_scores[None, :]).ravel()
    has_pair = (jnp.sum(positive_weights) > 0) & (jnp.sum(negative_weights) > 0)
    pair_weights = jnp.where(has_pair, jnp.ones_like(differences), 0)
    return differences, propagate_nan(pair_weights, examples.weights)


def _quantiles(
    values: Vector, weights: Vector, levels: Float[Array, " q"]
) -> Float[Array, " q"]:
    """Returns the smallest values at which the levels of the weight are reached."""
    order = jnp.argsort(values)
    cumulative_weight = jnp.cumsum(weights[order])
    index = jnp.searchsorted(cumulative_weight, levels * cumulative_weight[-1])
    return values[order][jnp.clip(index, 0, len(values) - 1)]
