"""Area under the ROC curve, over all false-positive rates or over the lowest."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ..number_checks import check_positive_int, positive_up_to
from ..trees import without_derivative
from .base import Surrogate, divide_by_temperature, propagate_nan, safe_divide
from .inputs import Examples
from .pairs import MASKED_OUT, sum_of_wins
from .ranking import is_last_of_tie, sum_and_rounding_error


class AUC(Surrogate):
    """Area under the ROC curve with a sigmoid for each pair of opposite classes.

        sum_ij p_i q_j sigmoid((s_i - s_j) / T)    for positives i and negatives j

    The positive weights ``p`` sum to 1. Each negative weight ``q_j`` is the share of
    that negative in the false-positive rates from 0 to ``max_fpr``: 1 / negatives for
    the highest negatives, 0 for the others. No derivative goes through the sorting, and
    none is missing, because the terms of two negatives that change places are equal.

    Call with scores [n] and targets [n] of 0 and 1; ``where`` and ``weights`` have
    shape [n]. Without a pair the area is 0.

    Args:
      max_fpr: Largest false-positive rate, in (0, 1]. The partial area is at most
        ``max_fpr``: it is not standardized. Data.
      block_size: Side of the square blocks in which pairs are taken. Static.

    Ties: a tied pair counts half of the share of its negative, also in `exact`, unless
    ``max_fpr`` cuts its group of ties. Of such a group `exact` counts the area below
    the straight line through it, as in scikit-learn, which is less than the surrogate
    counts at any temperature.
    Cost: one sigmoid per pair, two with the gradient. `exact` sorts: O(n log n).
    Memory: O(n + block_size^2).
    Bias: ``sigmoid(-|s_i - s_j| / T)`` per pair. The surrogate falls with the
    temperature if the classes are separated.
    Source: Herschtal & Raskutti 2004; Narasimhan & Agarwal 2013 for the partial area.
    The exact metric is ``roc_auc_score`` of scikit-learn before McClish's
    standardization.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> auc = hg.surrogates.AUC()
    >>> float(auc(scores, targets, temperature=0.1)), float(auc.exact(scores, targets))
    (0.667, 0.667)
    """

    max_fpr: ArrayLike = eqx.field(default=1.0, converter=positive_up_to("max_fpr", 1))
    block_size: int = eqx.field(static=True, default=512, kw_only=True)

    citations = ("herschtal2004", "narasimhan2013")

    def __check_init__(self):
        check_positive_int("block_size", self.block_size)

    def smooth_value(self, examples, temperature):
        """Returns ``sum_ij p_i q_j sigmoid((s_i - s_j) / T)``."""
        # Positives, then negatives from the highest, then what is masked out.
        is_negative = 1 - examples.targets
        group = jnp.where(examples.mask, is_negative, MASKED_OUT)
        order = jnp.lexsort((-without_derivative(examples.scores), group))
        examples, group = jax.tree.map(lambda leaf: leaf[order], (examples, group))
        positive_weights, negative_weights = _normalized_weights(examples)
        # A negative covers the false-positive rates [fpr_before, fpr_before + weight].
        fpr_before = jnp.cumsum(negative_weights) - negative_weights
        max_fpr = jnp.asarray(self.max_fpr, fpr_before.dtype)
        negative_weights = jnp.clip(max_fpr - fpr_before, 0, negative_weights)
        area = sum_of_wins(
            examples.scores, temperature, positive_weights, negative_weights, group,
            min(self.block_size, len(order)),
        )  # fmt: skip
        return propagate_nan(area, examples.scores)

    def exact_value(self, examples):
        """Returns the area by the trapezoidal rule between thresholds."""
        scores = jnp.where(examples.mask, examples.scores, -jnp.inf)
        order = jnp.argsort(-scores)
        is_last = is_last_of_tie(scores[order])
        # True- and false-positive rates at each threshold. Within a group of ties, they
        # are the rates of the group before.
        rates = jnp.stack([weight[order] for weight in _normalized_weights(examples)])
        rates = jnp.where(is_last, jnp.cumsum(rates, axis=1), 0)
        rates = jax.lax.cummax(rates, axis=1)
        tpr, fpr = rates
        tpr_before, fpr_before = jnp.pad(rates, ((0, 0), (1, 0)))[:, :-1]
        step = fpr - fpr_before
        max_fpr = jnp.asarray(self.max_fpr, fpr.dtype)
        width = jnp.clip(max_fpr - fpr_before, 0, step)
        slope = (tpr - tpr_before) / jnp.where(step > 0, step, 1)
        area = jnp.sum(width * (tpr_before + 0.5 * slope * width))
        return propagate_nan(area, examples.weights)


class SquaredHingeAUC(Surrogate):
    """A lower bound on the area under the ROC curve by squared hinges of pairs.

        1 - mean_ij max(0, 1 - (s_i - s_j) / T)^2    for positives i and negatives j

    Higher is better, and the AUC is at least this at any temperature. The bound is
    concave in the scores. The temperature is the margin that a pair should keep. As it
    falls the bound does not tend to the metric, because a wrong pair counts by its
    distance.

    Call with scores [n] and targets [n] of 0 and 1; ``where`` and ``weights`` have
    shape [n]. Without a pair the bound is 0.

    Neighboring scores that differ by more than ``sqrt(max) / (4 n)`` temperatures, max
    being the largest number of the dtype, count as that distant, without a gradient.

    Ties: a tied pair counts 1 in the mean, half in `exact`.
    Cost: O(n log n), the gradient included. Memory: O(n).
    Source: Rust & Hocking 2023 (arXiv 2302.11062). Their sums over the sorted scores
    are taken about a moving center here, so that all terms are positive and none
    cancel.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> float(hg.surrogates.SquaredHingeAUC()(scores, targets, temperature=1.0))
    -2.000
    """

    citations = ("rust2023",)

    def smooth_value(self, examples, temperature):
        """Returns ``1 - mean_ij max(0, u_j - u_i)^2`` with ``u = s / T - y``."""
        positive_weights, negative_weights = _normalized_weights(examples)
        has_weight = without_derivative(examples.weights) > 0
        targets = examples.targets
        # The order of u, in which items of weight 0 come last.
        u, rounding_error = sum_and_rounding_error(
            *without_derivative((examples.scores, -temperature * targets))
        )
        order = jnp.lexsort((-rounding_error, -u, ~has_weight))
        scores, targets = examples.scores[order], targets[order]
        sorted_weights = negative_weights[order]
        # m_k(i) = sum_j q_j (u_j - u_i)^k over the negatives j above i, for k = 0, 1,
        # 2. From one u to the next lower one, a step d below: m_1 grows by d m_0, and
        # m_2 by d (2 m_1 + d m_0).
        # Only differences of scores that are neighbors: an outlier costs no digits.
        step = divide_by_temperature(scores[:-1] - scores[1:], temperature)
        step = jnp.where(has_weight[order][1:], step - (targets[:-1] - targets[1:]), 0)
        # The square of the sum of all steps stays finite.
        max_step = jnp.finfo(step.dtype).max ** 0.5 / (4 * scores.size)
        step = jnp.minimum(step, max_step)
        accumulate = lambda growth: jnp.cumsum(jnp.pad(growth, (1, 0)))
        moment_0 = jnp.cumsum(sorted_weights)[:-1]
        moment_1 = accumulate(step * moment_0)[:-1]
        moment_2 = accumulate(step * (2 * moment_1 + step * moment_0))
        # 1, or 0 if a class is missing.
        has_pair = jnp.sum(positive_weights) * jnp.sum(negative_weights)
        bound = has_pair - jnp.sum(positive_weights[order] * moment_2)
        return propagate_nan(bound, examples.scores)

    def exact_value(self, examples):
        """Returns the area under the ROC curve."""
        return AUC().exact_value(examples)


def _normalized_weights(examples: Examples) -> tuple[Array, Array]:
    """Returns weights of the positives and of the negatives that sum to 1, or to 0."""
    normalize = lambda weights: safe_divide(weights, jnp.sum(weights))
    return normalize(examples.positive_weights), normalize(examples.negative_weights)
