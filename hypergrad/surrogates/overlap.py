"""Overlap of two masks: Dice and intersection over union."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from ..number_checks import finite
from ..trees import without_derivative
from .base import (
    Surrogate,
    negligible_weight,
    propagate_nan,
    safe_divide,
    sigmoid_at,
    subtract_threshold,
    weighted_mean,
)
from .inputs import elementwise_examples


class AreaRatio(Surrogate):
    """A ratio of areas of masks, of which a subclass writes `ratio`.

    A pixel is in the predicted mask to the fraction ``sigmoid((s - threshold) / T)``.

    Call with scores, targets of 0 and 1, ``where`` and ``weights`` of one shape: [n] is
    one mask, and for [batch, ...] the mean over the batch is taken, without images
    whose pixels are all masked out. Several classes are several masks: scores and
    one-hot targets [batch * classes, ...]. For two empty masks the value is 0, the
    limit of the surrogate and ``zero_division`` of scikit-learn.

    Args:
      threshold: Scores above it are in the predicted mask. Data.

    Ties: half in the mask. In `exact`, a score at the threshold is not in the mask.
    Cost: O(pixels).
    Bias: the tails of the background add up.
    """

    threshold: ArrayLike = eqx.field(
        default=0.0, converter=finite("threshold", allow_array=True)
    )

    check_inputs = staticmethod(elementwise_examples)

    @abstractmethod
    def ratio(
        self, intersection: Array, predicted: Array, actual: Array
    ) -> tuple[Array, Array]:
        """Returns numerator and denominator from the areas of each image."""
        ...

    def smooth_value(self, examples, temperature):
        """Returns the mean ratio of areas of fractions."""
        shifted_scores = subtract_threshold(examples.scores, self.threshold)
        return self._mean_ratio(examples, sigmoid_at(shifted_scores, temperature))

    def exact_value(self, examples):
        """Returns the mean ratio of areas of the scores above the threshold."""
        shifted_scores = subtract_threshold(examples.scores, self.threshold)
        is_predicted = (shifted_scores > 0).astype(shifted_scores.dtype)
        return self._mean_ratio(examples, is_predicted)

    def _mean_ratio(self, examples, predicted):
        actual, weights = examples.targets, examples.weights
        num_images = 1 if weights.ndim == 1 else weights.shape[0]
        as_images = lambda x: x.reshape(num_images, -1)
        area = lambda x: jnp.sum(as_images(weights * x), axis=1)
        ratio = self.ratio(area(predicted * actual), area(predicted), area(actual))
        pixel_weights = as_images(weights)
        ratios = safe_divide(*ratio, negligible_weight(pixel_weights))
        ratios = propagate_nan(ratios, pixel_weights)
        # Not > 0, so that an image with an invalid pixel, of weight NaN, counts.
        has_pixel = jnp.any(without_derivative(pixel_weights) != 0, axis=1)
        return weighted_mean(ratios, has_pixel.astype(ratios.dtype))


class Dice(AreaRatio):
    """Dice coefficient, the F1 of the pixels.

        2 sum(p y) / (sum(p) + sum(y)),    p = sigmoid((s - threshold) / T)

    Arguments and shapes are those of `AreaRatio`.

    Source: Milletari et al. 2016 (arXiv 1606.04797), whose denominator has squares,
    which are the same for 0 and 1. The exact metric is ``f1_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> dice = hg.surrogates.Dice()
    >>> float(dice(scores, targets, temperature=0.1))
    0.667
    >>> float(dice.exact(scores, targets))
    0.667
    """

    citations = ("milletari2016",)

    def ratio(self, intersection, predicted, actual):
        """Returns ``2 sum(p y)`` and ``sum(p) + sum(y)``."""
        return 2 * intersection, predicted + actual


class IoU(AreaRatio):
    """Intersection over union, the Jaccard index of the pixels.

        sum(p y) / (sum(p) + sum(y) - sum(p y)),    p = sigmoid((s - threshold) / T)

    Arguments and shapes are those of `AreaRatio`.

    Source: Rahman & Wang 2016. The exact metric is ``jaccard_score`` of scikit-learn.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, 1.0]), jnp.array([1, 1, 1, 0])
    >>> iou = hg.surrogates.IoU()
    >>> float(iou(scores, targets, temperature=0.1)), float(iou.exact(scores, targets))
    (0.500, 0.500)
    """

    citations = ("rahman2016",)

    def ratio(self, intersection, predicted, actual):
        """Returns ``sum(p y)`` and ``sum(p) + sum(y) - sum(p y)``."""
        return intersection, predicted + actual - intersection
