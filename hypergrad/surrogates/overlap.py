"""Overlap of two masks: Dice and intersection over union."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from .base import as_temperature, divide, elementwise, flagged, mean, rounding


def _areas(
    self: Any,
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    temperature: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array]:
    """``(shared, predicted, actual, weights)``; areas [images], weights of pixels."""
    scores, actual, weights, _ = elementwise(scores, targets, where, weights)
    above = scores - jnp.asarray(self.threshold, scores.dtype)
    if temperature is None:
        predicted = (above > 0).astype(scores.dtype)
    else:
        predicted = jax.nn.sigmoid(above / as_temperature(temperature, above.dtype))
    images = 1 if scores.ndim == 1 else scores.shape[0]
    area = lambda x: jnp.sum((weights * x).reshape(images, -1), axis=1)
    pixels = weights.reshape(images, -1)
    return area(predicted * actual), area(predicted), area(actual), pixels


def _mean(overlaps: Array, weights: Array) -> Array:
    """Over the images in which any pixel counts."""
    overlaps = flagged(overlaps, weights)
    return mean(overlaps, jnp.any(weights != 0, axis=1).astype(overlaps.dtype))


class Dice(eqx.Module):
    """Dice, twice the shared area over the sum of both areas: F1 of the pixels.

    ``2 sum(p y) / (sum(p) + sum(y))``, ``p = sigmoid((s - threshold) / temperature)``.

    Args:
      threshold: scores above it are in the predicted mask. Data.

    Call with scores and targets (in {0, 1}), ``where`` and ``weights`` all of one
    shape: [n] is one mask; of [batch, ...] the mean over the batch is taken. Several
    classes are several masks: scores and one-hot targets [batch * classes, ...].

    Ties: half in the mask; in `exact` the threshold itself is not. Masked out: a pixel
    as good as dropped, an image without a pixel as well; nothing left: 0. Two empty
    masks: 0, the limit of the surrogate and scikit-learn's ``zero_division``. Cost:
    O(pixels). Bias: tails of the background add up. Source: Milletari et al. 2016
    (arXiv 1606.04797), whose denominator has squares, the same for 0 and 1. Exact:
    scikit-learn's ``f1_score`` of the pixels.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> dice = hg.surrogates.Dice()
    >>> round(float(dice(scores, targets, temperature=0.1)), 3)
    0.667
    >>> round(float(dice.exact(scores, targets)), 3)
    0.667
    """

    threshold: ArrayLike = 0.0

    citations = ("milletari2016",)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth Dice, a scalar."""
        return self._dice(*_areas(self, scores, targets, where, weights, temperature))

    def exact(self, scores, targets, *, where=None, weights=None):
        """Dice, a scalar."""
        return self._dice(*_areas(self, scores, targets, where, weights))

    def _dice(self, shared, predicted, actual, weights):
        dice = divide(2 * shared, predicted + actual, rounding(weights))
        return _mean(dice, weights)


class IoU(eqx.Module):
    """Intersection over union, the Jaccard index: shared area over joint area.

    ``sum(p y) / (sum(p) + sum(y) - sum(p y))``, p as in `Dice`.

    Arguments, shapes, ties and masks as `Dice`. Source: Rahman & Wang 2016.
    Exact: scikit-learn's ``jaccard_score`` of the pixels.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> iou = hg.surrogates.IoU()
    >>> round(float(iou(scores, targets, temperature=0.1)), 3)
    0.5
    >>> float(iou.exact(scores, targets))
    0.5
    """

    threshold: ArrayLike = 0.0

    citations = ("rahman2016",)

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth IoU, a scalar."""
        return self._iou(*_areas(self, scores, targets, where, weights, temperature))

    def exact(self, scores, targets, *, where=None, weights=None):
        """IoU, a scalar."""
        return self._iou(*_areas(self, scores, targets, where, weights))

    def _iou(self, shared, predicted, actual, weights):
        iou = divide(shared, predicted + actual - shared, rounding(weights))
        return _mean(iou, weights)
