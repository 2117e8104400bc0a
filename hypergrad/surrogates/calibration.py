"""Expected calibration error with soft bins."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..number_checks import check_positive_int
from .accuracy import class_scores, is_correct, true_class_margins
from .base import Surrogate, safe_divide, sigmoid_at
from .inputs import Scalar, Vector, class_examples


class CalibrationError(Surrogate):
    """Expected calibration error, the difference of confidence and accuracy per bin.

        sum_b |sum_i r_ib (correct_i - confidence_i)| / n

    Lower is better. Scores are logits, and shapes are those of `Accuracy`. The
    confidence is ``sigmoid(s)``, the probability of class 1, and correct is the target;
    for more classes, the confidence is the largest of ``softmax(s)``, and correct is
    whether its class is the target. The membership ``r_ib`` states to which of
    ``num_bins`` equal parts of (0, 1] the confidence belongs. The surrogate compares
    the logit z of the confidence with the logits e of the edges, in the units of the
    scores,

        r_b = sigmoid((z - e_b) / T) - sigmoid((z - e_(b+1)) / T),

    which sum to 1. Its ``correct`` is ``sigmoid(m / T)`` with the margin m of
    `Accuracy`.

    Args:
      num_bins: Number of bins. Static.

    Ties: a confidence at an edge is in the lower bin, half in each in the surrogate.
    Equally good classes are as for `Accuracy`.
    Cost: O(n (C + num_bins)).
    Bias: errors of opposite sign cancel within a bin, and in the surrogate between two
    bins that share examples. With a temperature at a fixed fraction of ``4 /
    num_bins``, the narrowest bin in logits, the surrogate and `exact` approach the
    calibration error without bins, and each other, at least as fast as 1 / num_bins if
    noise is small. Bins of few examples are biased upwards.
    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), equation 3; soft
    bins after Karandikar et al. 2021 (arXiv 2108.00106), who use them between
    probabilities.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> error = hg.surrogates.CalibrationError(num_bins=5)
    >>> float(error(scores, targets, temperature=0.01))
    0.407
    >>> float(error.exact(scores, targets))
    0.407
    """

    num_bins: int = eqx.field(static=True, default=15)

    check_inputs = staticmethod(class_examples)
    citations = ("naeini2015", "guo2017", "karandikar2021")

    def __check_init__(self):
        check_positive_int("num_bins", self.num_bins)

    def smooth_value(self, examples, temperature):
        """Returns the calibration error of soft bins."""
        scores, weights = examples.scores, examples.weights
        if scores.ndim == 1:
            correct, logits = examples.targets, scores
        else:
            correct = sigmoid_at(true_class_margins(examples), temperature)
            logits = _top_class_logits(scores)
        # r_b is a difference of sigmoids, so a bin is a difference of sums over edges.
        gaps = weights * (correct - jax.nn.sigmoid(logits))
        edges = self._inner_edges()
        edges = jnp.asarray(np.log(edges / (1 - edges)), scores.dtype)
        is_above = sigmoid_at(logits[:, None] - edges[None, :], temperature)
        sums = jnp.sum(gaps[:, None] * is_above, axis=0)
        sums = jnp.concatenate([jnp.sum(gaps)[None], sums, jnp.zeros(1, sums.dtype)])
        return _calibration_error(jnp.diff(sums), weights)

    def exact_value(self, examples):
        """Returns the calibration error of hard bins (equation 3 of Guo et al.)."""
        scores, weights = examples.scores, examples.weights
        if scores.ndim == 1:
            correct, confidences = examples.targets, jax.nn.sigmoid(scores)
        else:
            correct = is_correct(examples)
            confidences = jnp.max(jax.nn.softmax(scores, axis=1), axis=1)
        edges = jnp.asarray(self._inner_edges(), scores.dtype)
        bins = jnp.searchsorted(edges, confidences)
        sums = jnp.zeros(self.num_bins, scores.dtype)
        sums = sums.at[bins].add(weights * (correct - confidences))
        return _calibration_error(sums, weights)

    def _inner_edges(self) -> np.ndarray:
        return np.arange(1, self.num_bins) / self.num_bins


def _top_class_logits(scores: Float[Array, "n C"]) -> Vector:
    """Returns the logit of the largest probability of ``softmax(s)``."""
    top_class = jnp.argmax(scores, axis=1)
    is_top = jnp.arange(scores.shape[1])[None, :] == top_class[:, None]
    other_scores = jnp.where(is_top, -jnp.inf, scores)
    return class_scores(scores, top_class) - jax.nn.logsumexp(other_scores, axis=1)


def _calibration_error(sums: Array, weights: Array) -> Scalar:
    return safe_divide(jnp.sum(jnp.abs(sums)), jnp.sum(weights))
