"""Accuracy, and the error rate among the examples that are answered."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ..number_checks import boolean, check_positive_int, finite, non_negative
from .base import (
    Surrogate,
    negligible_weight,
    propagate_nan,
    safe_divide,
    sigmoid_at,
    softmax_at,
    subtract_threshold,
    weighted_mean,
)
from .inputs import Examples, Vector, class_examples, multiclass_examples


def class_scores(scores: Float[Array, "n C"], classes: Array) -> Vector:
    """Returns the score of one class for each example."""
    return jnp.take_along_axis(scores, classes[:, None], axis=1)[:, 0]


def best_other_scores(
    scores: Float[Array, "n C"], classes: Array, k: int = 1
) -> Vector:
    """Returns the k-th best score among the other classes for each example."""
    is_class = jnp.arange(scores.shape[1])[None, :] == classes[:, None]
    # There are more than k classes, so -inf is never returned.
    return jax.lax.top_k(jnp.where(is_class, -jnp.inf, scores), k)[0][:, -1]


def true_class_margins(examples: Examples, threshold: ArrayLike = 0.0) -> Vector:
    """Returns the margin of each prediction, negative if it is wrong.

    It is the signed distance to the threshold for two classes, else the score of the
    true class less the best other score.
    """
    scores, targets = examples.scores, examples.targets
    if scores.ndim == 1:
        return (2 * targets - 1) * subtract_threshold(scores, threshold)
    return class_scores(scores, targets) - best_other_scores(scores, targets)


def is_correct(examples: Examples, threshold: ArrayLike = 0.0) -> Array:
    """Returns True if the prediction is right; a tie is class 0 or the first class."""
    scores, targets = examples.scores, examples.targets
    if scores.ndim == 1:
        return (subtract_threshold(scores, threshold) > 0) == (targets > 0)
    return jnp.argmax(scores, axis=1) == targets


def confidence(examples: Examples, threshold: ArrayLike) -> Vector:
    """Returns the distance to the threshold, or the best score less the second."""
    if examples.scores.ndim == 1:
        return jnp.abs(subtract_threshold(examples.scores, threshold))
    best = jax.lax.top_k(examples.scores, 2)[0]
    return best[:, 0] - best[:, 1]


class Accuracy(Surrogate):
    """Accuracy with a sigmoid of the margin of each example.

        mean_i sigmoid(m_i / T)

    The margin ``m`` is the score less the threshold with the sign of the class, or the
    score of the true class less the best other score.

    Call with scores [n] and targets [n] of 0 and 1, or with scores [n, C] and integer
    targets [n]; ``where`` and ``weights`` have shape [n].

    Args:
      threshold: Scores [n] above it mean class 1. The default, 0, is meant for logits
        and margins; probabilities need 0.5. Not used for scores [n, C]. Data.
      balanced: Average over the classes that occur, not over the examples. Static.

    Ties: half right. In `exact`, a score at the threshold is class 0, and the first of
    equally good classes is predicted.
    Cost: O(n C).
    Bias: ``sigmoid(-|m| / T)`` per example. The surrogate falls (rises) with the
    temperature if all predictions are right (wrong).
    Source: Nguyen & Sanner 2013. The exact metrics are ``accuracy_score`` and
    ``balanced_accuracy_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0]), jnp.array([1, 1, 1])
    >>> accuracy = hg.surrogates.Accuracy()
    >>> float(accuracy(scores, targets, temperature=0.1))
    0.667
    >>> float(accuracy.exact(scores, targets))
    0.667
    """

    threshold: ArrayLike = eqx.field(
        default=0.0, converter=finite("threshold", allow_array=True)
    )
    balanced: bool = eqx.field(
        static=True, default=False, kw_only=True, converter=boolean("balanced")
    )

    check_inputs = staticmethod(class_examples)
    citations = ("nguyen2013",)

    def smooth_value(self, examples, temperature):
        """Returns ``mean_i sigmoid(m_i / T)``."""
        margins = true_class_margins(examples, self.threshold)
        return self._mean(sigmoid_at(margins, temperature), examples)

    def exact_value(self, examples):
        """Returns the fraction of correct predictions."""
        correct = is_correct(examples, self.threshold)
        return self._mean(correct.astype(examples.scores.dtype), examples)

    def _mean(self, correct, examples):
        weights = _balance_classes(examples) if self.balanced else examples.weights
        return weighted_mean(correct, weights)


def _balance_classes(examples: Examples) -> Vector:
    """Returns weights that sum to 1 in each class that occurs."""
    classes = examples.targets.astype(int)
    num_classes = 2 if examples.scores.ndim == 1 else examples.scores.shape[1]
    totals = jnp.zeros(num_classes, examples.weights.dtype)
    totals = totals.at[classes].add(examples.weights)
    # A class whose total is 0 does not occur, and its examples keep the weight 0.
    return safe_divide(examples.weights, totals[classes])


class ExpectedAccuracy(Surrogate):
    """Expected accuracy of a class that is sampled from the softmax of the scores.

        mean_i softmax(s_i / T)[y_i]

    The gradient moves all classes, not only the best other one. The surrogate is at
    most `Accuracy`, and equal to it for two classes.

    Call with scores [n, C] and integer targets [n]; ``where`` and ``weights`` [n].

    Ties: shared equally. In `exact`, the first of equally good classes is predicted.
    Cost: O(n C).
    Bias: at most ``(C - 1) exp(-c / T)`` per example with the best score c above the
    second.
    Source: Ghosh et al. 2017 (arXiv 1712.09482), whose mean absolute error is
    ``2 (1 - softmax(s)[y])``. The exact metric is ``accuracy_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> targets = jnp.array([0, 1])
    >>> float(hg.surrogates.ExpectedAccuracy()(scores, targets, temperature=0.1))
    0.500
    """

    check_inputs = staticmethod(multiclass_examples)
    citations = ("ghosh2017",)

    def smooth_value(self, examples, temperature):
        """Returns ``mean_i softmax(s_i / T)[y_i]``."""
        probabilities = softmax_at(examples.scores, temperature)
        true_class_probabilities = class_scores(probabilities, examples.targets)
        return weighted_mean(true_class_probabilities, examples.weights)

    def exact_value(self, examples):
        """Returns the fraction of correct predictions."""
        correct = is_correct(examples).astype(examples.scores.dtype)
        return weighted_mean(correct, examples.weights)


class TopKAccuracy(Surrogate):
    """Fraction of the examples whose class is among the ``k`` best scores.

        mean_i sigmoid((s_i[y_i] - k-th best score among the other classes) / T)

    Call with scores [n, C] and integer targets [n]; ``where`` and ``weights`` [n].

    Args:
      k: Number of classes that are predicted, below C. Static.

    Ties: half right. `exact` orders equal scores by class, the last first, as
    scikit-learn does; `Accuracy` predicts the first.
    Cost: O(n C).
    Bias: as for `Accuracy`, with this margin.
    Source: Lapin et al. 2016 (arXiv 1512.00486) for the margin. The exact metric is
    ``top_k_accuracy_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> targets = jnp.array([2, 0])
    >>> float(hg.surrogates.TopKAccuracy(2)(scores, targets, temperature=0.1))
    0.500
    """

    k: int = eqx.field(static=True)

    citations = ("lapin2016",)

    def __check_init__(self):
        check_positive_int("k", self.k)

    def check_inputs(self, scores, targets, where, weights):
        """Returns scores [n, C] with targets [n]; C must be above k."""
        examples = multiclass_examples(scores, targets, where, weights)
        num_classes = examples.scores.shape[1]
        if self.k >= num_classes:
            raise ValueError(
                f"k must be below the number of classes, {num_classes}, or every "
                f"prediction is right; got {self.k}."
            )
        return examples

    def smooth_value(self, examples, temperature):
        """Returns the mean sigmoid of the margin to the k-th best other class."""
        scores, targets = examples.scores, examples.targets
        best_others = best_other_scores(scores, targets, self.k)
        margins = class_scores(scores, targets) - best_others
        return weighted_mean(sigmoid_at(margins, temperature), examples.weights)

    def exact_value(self, examples):
        """Returns the fraction of examples with fewer than k classes ranked higher."""
        scores, targets = examples.scores, examples.targets
        target_scores = class_scores(scores, targets)[:, None]
        # As in scikit-learn, the last of equal scores ranks first.
        is_later = jnp.arange(scores.shape[1])[None, :] > targets[:, None]
        wins_tie = (scores == target_scores) & is_later
        num_higher = jnp.sum((scores > target_scores) | wins_tie, axis=1)
        correct = (num_higher < self.k).astype(scores.dtype)
        return weighted_mean(correct, examples.weights)


class _Selective(Surrogate):
    """A metric of the examples that are answered."""

    min_confidence: ArrayLike = eqx.field(
        converter=non_negative("min_confidence", allow_array=True, allow_inf=True)
    )
    threshold: ArrayLike = eqx.field(
        default=0.0, converter=finite("threshold", allow_array=True)
    )

    check_inputs = staticmethod(class_examples)
    citations = ("elyaniv2010", "geifman2017")

    def _spare_confidence(self, examples):
        """Returns the confidence less the confidence that an answer needs."""
        confidences = confidence(examples, self.threshold)
        return subtract_threshold(confidences, self.min_confidence, "min_confidence")


class SelectiveRisk(_Selective):
    """Error rate among the examples that are answered; lower is better.

        sum_i g_i e_i / sum_i g_i,   e_i = sigmoid(-m_i / T),
        g_i = sigmoid((c_i - min_confidence) / T)

    The error e uses the margin m of `Accuracy`, which states the shapes. The confidence
    c, in the units of the scores, is the distance to the threshold for two classes,
    else the best score less the second. If nothing is answered, the risk is 0.
    `Coverage` is the fraction that is answered.

    Args:
      min_confidence: Examples with less confidence are not answered; at least 0. Data.
      threshold: As for `Accuracy`.

    Ties: as for `Accuracy`. A confidence of ``min_confidence`` counts half, and whole
    in `exact`.
    Cost: O(n C).
    Bias: the tails of the sigmoids e and g.
    Source: El-Yaniv & Wiener 2010; Geifman & El-Yaniv 2017 (arXiv 1705.08500) for deep
    networks.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -0.5, 3.0, -4.0]), jnp.array([1, 1, 1, 1])
    >>> risk = hg.surrogates.SelectiveRisk(1.0)
    >>> float(risk(scores, targets, temperature=0.05))
    0.333
    >>> float(risk.exact(scores, targets))
    0.333
    """

    def smooth_value(self, examples, temperature):
        """Returns ``sum_i g_i e_i / sum_i g_i``."""
        margins = true_class_margins(examples, self.threshold)
        errors = sigmoid_at(-margins, temperature)
        is_answered = sigmoid_at(self._spare_confidence(examples), temperature)
        return self._risk(errors, is_answered, examples.weights)

    def exact_value(self, examples):
        """Returns the fraction of wrong predictions among those that are answered."""
        errors = ~is_correct(examples, self.threshold)
        is_answered = self._spare_confidence(examples) >= 0
        dtype = examples.scores.dtype
        return self._risk(
            errors.astype(dtype), is_answered.astype(dtype), examples.weights
        )

    def _risk(self, errors, is_answered, weights):
        answered_weights = weights * is_answered
        risk = safe_divide(
            jnp.sum(answered_weights * errors),
            jnp.sum(answered_weights),
            negligible_weight(weights),
        )
        return propagate_nan(risk, weights)


class Coverage(_Selective):
    """Fraction of the examples that are answered; higher is better.

        mean_i sigmoid((c_i - min_confidence) / T)

    The confidence c, its ties and its source are those of `SelectiveRisk`, the shapes
    those of `Accuracy`. Targets are checked and not used.

    Args:
      min_confidence, threshold: As for `SelectiveRisk`.

    Cost: O(n C).
    Bias: the tail of the sigmoid.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -0.5, 3.0, -4.0]), jnp.array([1, 1, 1, 1])
    >>> float(hg.surrogates.Coverage(1.0).exact(scores, targets))
    0.75
    """

    def smooth_value(self, examples, temperature):
        """Returns ``mean_i sigmoid((c_i - min_confidence) / T)``."""
        is_answered = sigmoid_at(self._spare_confidence(examples), temperature)
        return weighted_mean(is_answered, examples.weights)

    def exact_value(self, examples):
        """Returns the fraction of examples with enough confidence."""
        is_answered = self._spare_confidence(examples) >= 0
        dtype = examples.scores.dtype
        return weighted_mean(is_answered.astype(dtype), examples.weights)
