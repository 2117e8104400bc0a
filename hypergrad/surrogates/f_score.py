"""Precision, recall and their harmonic mean, from smooth counts."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from ..number_checks import finite, non_negative
from .base import (
    Surrogate,
    negligible_weight,
    propagate_nan,
    safe_divide,
    sigmoid_at,
    softmax_at,
    subtract_threshold,
)
from .inputs import (
    Examples,
    binary_examples,
    multiclass_examples,
    multilabel_examples,
)

AVERAGES = ("macro", "micro")


class CountRatio(Surrogate):
    """A ratio of counts, of which a subclass writes `ratio`.

    An example is predicted to the fraction ``sigmoid((s - threshold) / T)``, or
    ``softmax(s / T)`` of its classes. True positives sum this over the actual
    positives.

    Call with scores [n] and targets [n] of 0 and 1 for the ratio of class 1; with
    scores and targets [n, L] for L labels of 0 and 1; or with scores [n, C] and integer
    targets [n]. ``where`` and ``weights`` have shape [n]. 0 / 0 is 0, also in the macro
    average, which counts all C classes (scikit-learn: ``labels=range(C),
    zero_division=0``).

    Args:
      average: 'macro', the mean over classes or labels, or 'micro', of the counts of
        all of them. Both are the same for scores [n]. Static.
      threshold: Scores above it are predicted. The default, 0, is meant for logits and
        margins; probabilities need 0.5. Not used for classes. Data.

    Ties: half predicted. In `exact`, a score at the threshold is not predicted, and the
    first of equally good classes is.
    Cost: O(n L).
    Bias: the tails of the negatives add up, so a rare class needs a lower temperature
    than accuracy does; see `temperature_from_scores`. If all predictions are right, the
    surrogate falls as the temperature rises (for classes, the micro average does).
    """

    average: str = eqx.field(static=True, default="macro", kw_only=True)
    threshold: ArrayLike = eqx.field(
        default=0.0, kw_only=True, converter=finite("threshold", allow_array=True)
    )

    citations = ("benedict2022",)

    def __check_init__(self):
        if self.average not in AVERAGES:
            raise ValueError(
                f"average must be one of {AVERAGES}; got {self.average!r}."
            )

    @abstractmethod
    def ratio(
        self, true_positives: Array, predicted: Array, actual: Array
    ) -> tuple[Array, Array]:
        """Returns numerator and denominator of the metric from weighted counts.

        All have shape [L], with an entry per class or label, or [1] for two classes or
        'micro'.
        """
        ...

    def check_inputs(self, scores, targets, where, weights):
        """Returns examples of two classes, of several classes, or of labels."""
        if np.ndim(scores) != 2:
            return binary_examples(scores, targets, where, weights)
        has_labels = np.ndim(targets) == 2
        check = multilabel_examples if has_labels else multiclass_examples
        return check(scores, targets, where, weights)

    def smooth_value(self, examples, temperature):
        """Returns the mean ratio of counts of fractions."""
        if _is_multiclass(examples):
            predicted = softmax_at(examples.scores, temperature)
        else:
            shifted_scores = subtract_threshold(examples.scores, self.threshold)
            predicted = sigmoid_at(shifted_scores, temperature)
        return self._mean_ratio(examples, predicted)

    def exact_value(self, examples):
        """Returns the mean ratio of counts of the scores above the threshold."""
        if _is_multiclass(examples):
            predicted = _one_hot(jnp.argmax(examples.scores, axis=1), examples)
        else:
            predicted = subtract_threshold(examples.scores, self.threshold) > 0
        return self._mean_ratio(examples, predicted.astype(examples.scores.dtype))

    def _mean_ratio(self, examples, predicted):
        actual, weights = examples.targets, examples.weights
        if _is_multiclass(examples):
            actual = _one_hot(actual, examples)
        elif actual.ndim == 1:
            predicted, actual = predicted[:, None], actual[:, None]
        # Columns are classes or labels; 'micro' sums over them too.
        axis = 0 if self.average == "macro" else None
        count = lambda x: jnp.atleast_1d(jnp.sum(weights[:, None] * x, axis=axis))
        ratio = self.ratio(count(predicted * actual), count(predicted), count(actual))
        ratios = safe_divide(*ratio, negligible_weight(weights))
        return propagate_nan(jnp.mean(ratios), weights)


def _is_multiclass(examples: Examples) -> bool:
    return examples.targets.ndim < examples.scores.ndim


def _one_hot(classes: Array, examples: Examples) -> Float[Array, "n C"]:
    scores = examples.scores
    return jax.nn.one_hot(classes, scores.shape[1], dtype=scores.dtype)


class FBeta(CountRatio):
    """F-beta, the weighted harmonic mean of precision and recall.

        (1 + beta^2) tp / (beta^2 actual + predicted)

    Args:
      beta: Weight of recall relative to precision; infinity is `Recall`. Defaults to 1.
        Data.
      average, threshold: As for `CountRatio`, which states the shapes.

    Source: Benedict et al. 2022 (arXiv 2108.10566) with ``b = -1 / T`` and
    ``c = -threshold``. A positive b in the printed ``1 / (1 + exp(b (s + c)))`` would
    reward low scores. The exact metric is ``fbeta_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> f1 = hg.surrogates.FBeta()
    >>> float(f1(scores, targets, temperature=0.1)), float(f1.exact(scores, targets))
    (0.667, 0.667)
    """

    beta: ArrayLike = eqx.field(
        default=1.0, converter=non_negative("beta", allow_inf=True)
    )

    def ratio(self, true_positives, predicted, actual):
        """Returns ``tp`` and ``(beta^2 actual + predicted) / (1 + beta^2)``."""
        # The square of a large beta is infinite.
        fraction = 1 / (1 + jnp.asarray(self.beta, actual.dtype) ** 2)
        return true_positives, (1 - fraction) * actual + fraction * predicted


class Precision(CountRatio):
    """Fraction of the predicted positives that are actual positives.

    Arguments and shapes are those of `CountRatio`.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> float(hg.surrogates.Precision().exact(scores, targets))
    0.667
    """

    def ratio(self, true_positives, predicted, actual):
        """Returns ``tp`` and ``predicted``."""
        return true_positives, predicted


class Recall(CountRatio):
    """Fraction of the actual positives that are predicted.

    Arguments and shapes are those of `CountRatio`.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> float(hg.surrogates.Recall().exact(scores, targets))
    0.667
    """

    def ratio(self, true_positives, predicted, actual):
        """Returns ``tp`` and ``actual``."""
        return true_positives, actual
