"""Precision, recall and their mean, from smooth counts."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .base import (
    as_temperature,
    binary,
    check_not_negative,
    divide,
    flagged,
    multiclass,
    multilabel,
    rounding,
)

AVERAGES = ("macro", "micro")


class _Counts(eqx.Module):
    """Weighted counts, [L], one a class or label, or [1]: micro, or two classes."""

    hits: Array  # true positives
    predicted: Array  # true and false positives
    actual: Array  # true positives and false negatives
    weights: Array  # of the examples

    def mean(self, numerator: Array, denominator: Array) -> Array:
        ratios = divide(numerator, denominator, rounding(self.weights))
        return flagged(jnp.mean(ratios), self.weights)


def _counts(
    self: Any,
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    temperature: ArrayLike | None = None,
) -> _Counts:
    """Soft counts (Benedict et al. 2022), or exact ones."""
    several = jnp.ndim(scores) == 2
    if several and jnp.ndim(targets) != 2:
        scores, targets, weights, _ = multiclass(scores, targets, where, weights)
        classes = lambda indices: jax.nn.one_hot(
            indices, scores.shape[1], dtype=scores.dtype
        )
        actual = classes(targets)
        if temperature is None:
            predicted = classes(jnp.argmax(scores, axis=1))
        else:
            temperature = as_temperature(temperature, scores.dtype)
            predicted = jax.nn.softmax(scores / temperature, axis=1)
    else:
        check = multilabel if several else binary
        scores, actual, weights, _ = check(scores, targets, where, weights)
        above = scores - jnp.asarray(self.threshold, scores.dtype)
        if temperature is None:
            predicted = (above > 0).astype(scores.dtype)
        else:
            predicted = jax.nn.sigmoid(above / as_temperature(temperature, above.dtype))
        if not several:
            predicted, actual = predicted[:, None], actual[:, None]
    axes = 0 if self.average == "macro" else None
    count = lambda x: jnp.atleast_1d(jnp.sum(weights[:, None] * x, axis=axes))
    return _Counts(count(predicted * actual), count(predicted), count(actual), weights)


def _check_average(self: Any) -> None:
    if self.average not in AVERAGES:
        raise ValueError(f"average must be one of {AVERAGES}, got {self.average!r}")


class FBeta(eqx.Module):
    """F-beta, the weighted harmonic mean of precision and recall.

    ``(1 + beta²) hits / (beta² actual + predicted)``. An example is predicted to the
    part ``sigmoid((s - threshold) / temperature)``, or ``softmax(s / temperature)`` of
    its classes; ``hits`` sums that over the actual ones.

    Args:
      beta: how many times as much recall counts as precision; F1 by default. Data.
      average: 'macro', the mean over classes or labels, or 'micro', of the counts over
        all of them; for scores [n] there is one class, and both are the same. Static.
      threshold: scores above it are predicted. Data; not read for classes.

    Call with scores [n], targets [n] in {0, 1} (F-beta of class 1); scores and targets
    [n, L], L labels in {0, 1}; or scores [n, C], integer targets [n]. ``where`` and
    ``weights`` [n].

    Ties: half predicted; in `exact` the threshold itself is not predicted, and the
    first of equally good classes is. 0 / 0 is 0, also in the macro mean, which counts
    all C classes (scikit-learn: ``labels=range(C), zero_division=0``). Masked out: as
    good as dropped. Cost: O(nL). Bias: tails of the negatives add up, so a rare class
    needs a lower temperature than accuracy does; see `temperature_of`. Where all are
    right, it falls as the temperature rises (classes: the micro average does). Source:
    Benedict et al. 2022 (arXiv 2108.10566), with ``b = -1 / temperature`` and
    ``c = -threshold``: as printed there, ``1 / (1 + exp(b (s + c)))``, a positive b
    would reward low scores. Exact: scikit-learn's ``fbeta_score``.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> f1 = hg.surrogates.FBeta()
    >>> round(float(f1(scores, targets, temperature=0.1)), 3)
    0.667
    >>> round(float(f1.exact(scores, targets)), 3)
    0.667
    """

    beta: ArrayLike = 1.0
    average: str = eqx.field(static=True, default="macro", kw_only=True)
    threshold: ArrayLike = eqx.field(default=0.0, kw_only=True)

    citations = ("benedict2022",)

    def __check_init__(self):
        _check_average(self)
        check_not_negative("beta", self.beta)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth F-beta, a scalar."""
        return self._score(_counts(self, scores, targets, where, weights, temperature))

    def exact(self, scores, targets, *, where=None, weights=None):
        """F-beta, a scalar."""
        return self._score(_counts(self, scores, targets, where, weights))

    def _score(self, counts):
        square = jnp.asarray(self.beta, counts.hits.dtype) ** 2
        denominator = square * counts.actual + counts.predicted
        return counts.mean((1 + square) * counts.hits, denominator)


class Precision(eqx.Module):
    """Which part of the predicted are actual: ``hits / predicted``.

    Arguments, shapes, ties, masks and source as `FBeta`; nothing predicted: 0.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> round(float(hg.surrogates.Precision().exact(scores, targets)), 3)
    0.667
    """

    average: str = eqx.field(static=True, default="macro", kw_only=True)
    threshold: ArrayLike = eqx.field(default=0.0, kw_only=True)

    citations = ("benedict2022",)

    def __check_init__(self):
        _check_average(self)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth precision, a scalar."""
        counts = _counts(self, scores, targets, where, weights, temperature)
        return counts.mean(counts.hits, counts.predicted)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The precision, a scalar."""
        counts = _counts(self, scores, targets, where, weights)
        return counts.mean(counts.hits, counts.predicted)


class Recall(eqx.Module):
    """Which part of the actual are predicted: ``hits / actual``.

    Arguments, shapes, ties, masks and source as `FBeta`; nothing actual: 0.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> round(float(hg.surrogates.Recall().exact(scores, targets)), 3)
    0.667
    """

    average: str = eqx.field(static=True, default="macro", kw_only=True)
    threshold: ArrayLike = eqx.field(default=0.0, kw_only=True)

    citations = ("benedict2022",)

    def __check_init__(self):
        _check_average(self)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth recall, a scalar."""
        counts = _counts(self, scores, targets, where, weights, temperature)
        return counts.mean(counts.hits, counts.actual)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The recall, a scalar."""
        counts = _counts(self, scores, targets, where, weights)
        return counts.mean(counts.hits, counts.actual)
