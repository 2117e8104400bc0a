"""Expected calibration error, by soft bins."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .accuracy import judged, own
from .base import as_temperature, check_count, divide


class CalibrationError(eqx.Module):
    """Expected calibration error: how far confidence is from accuracy, bin by bin.

    ``sum_b |sum_i r_ib (correct_i - confidence_i)| / n``, where r says to which of the
    ``num_bins`` equal parts of (0, 1] the confidence belongs. Scores are logits. For
    two classes the confidence is ``sigmoid(s)``, the probability of class 1, and
    correct is the target; for more, the largest of ``softmax(s)`` and whether its class
    is the target. Lower is better.

    The bins' edges e are taken in units of the scores, against the logit z of the
    confidence: ``r_b = sigmoid((z - e_b) / T) - sigmoid((z - e_(b+1)) / T)`` at
    temperature T, which sum to 1. ``correct`` is ``sigmoid(m / T)``, m the margin of
    `Accuracy`.

    Args:
      num_bins: static.

    Shapes as `Accuracy`.

    Ties: a confidence on an edge is in the lower bin, half in each in the surrogate;
    equally good classes as `Accuracy`. Masked out: as good as dropped; nothing left: 0.
    Cost: O(n (C + num_bins)). Bias: where the sign of accuracy less confidence changes
    within a bin, or between two that share examples, both parts cancel. So, with a
    temperature at a fixed share of ``4 / num_bins`` (the narrowest bin, in logits),
    both this and `exact` approach the calibration error without bins, and each other,
    as 1 / num_bins at least, where noise is small: bins of few examples are biased
    upwards. Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), equation 3;
    soft bins after Karandikar et al. 2021 (arXiv 2108.00106), there between
    probabilities.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> error = hg.surrogates.CalibrationError(num_bins=5)
    >>> round(float(error(scores, targets, temperature=0.01)), 3)
    0.407
    >>> round(float(error.exact(scores, targets)), 3)
    0.407
    """

    num_bins: int = eqx.field(static=True, default=15)

    citations = ("naeini2015", "guo2017", "karandikar2021")

    def __check_init__(self):
        check_count("num_bins", self.num_bins)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth calibration error, a scalar."""
        examples, margins, _, _ = judged(scores, targets, where, weights, 0.0)
        scores, targets, weights, _ = examples
        temperature = as_temperature(temperature, scores.dtype)
        if scores.ndim == 1:
            correct, logits = targets, scores
        else:
            correct = jax.nn.sigmoid(margins / temperature)
            top = jnp.argmax(scores, axis=1)
            is_top = jnp.arange(scores.shape[1])[None, :] == top[:, None]
            others = jnp.where(is_top, -jnp.inf, scores)
            logits = own(scores, top) - jax.nn.logsumexp(others, axis=1)
        excess = weights * (correct - jax.nn.sigmoid(logits))
        edges = np.arange(1, self.num_bins) / self.num_bins
        edges = jnp.asarray(np.log(edges / (1 - edges)), scores.dtype)
        above = jax.nn.sigmoid((logits[:, None] - edges[None, :]) / temperature)
        sums = jnp.sum(excess[:, None] * above, axis=0)
        sums = jnp.concatenate([jnp.sum(excess)[None], sums, jnp.zeros(1, sums.dtype)])
        return _total(jnp.diff(sums), weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The calibration error, a scalar."""
        examples, _, correct, _ = judged(scores, targets, where, weights, 0.0)
        scores, targets, weights, _ = examples
        if scores.ndim == 1:
            correct, confidences = targets, jax.nn.sigmoid(scores)
        else:
            confidences = jnp.max(jax.nn.softmax(scores, axis=1), axis=1)
        edges = np.arange(1, self.num_bins) / self.num_bins
        bins = jnp.searchsorted(jnp.asarray(edges, scores.dtype), confidences)
        sums = jnp.zeros(self.num_bins, scores.dtype)
        sums = sums.at[bins].add(weights * (correct - confidences))
        return _total(sums, weights)


def _total(sums, weights):
    return divide(jnp.sum(jnp.abs(sums)), jnp.sum(weights))
