"""Detection: matching of boxes, and the average precision of their scores."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from ..number_checks import check_positive_int, non_negative, positive_up_to
from ..trees import without_derivative
from .average_precision import soft_precisions
from .base import propagate_nan, safe_divide, weighted_mean
from .inputs import Examples, Scalar, Vector
from .ranking import RankingSurrogate, rowwise, totals_at_thresholds


def match_boxes(
    boxes: Float[ArrayLike, "images boxes 4"],
    scores: Float[ArrayLike, "images boxes"],
    true_boxes: Float[ArrayLike, "images true 4"],
    *,
    threshold: ArrayLike = 0.5,
    where: Bool[ArrayLike, "images boxes"] | None = None,
    where_true: Bool[ArrayLike, "images true"] | None = None,
) -> Bool[Array, "images boxes"]:
    """Returns True for predicted boxes that are right, the targets of `DetectionAP`.

    In each image, from the best score down, a box is matched to the free true box with
    which it overlaps most, if their intersection over union is at least ``threshold``.

    Args:
      boxes, true_boxes: Corners ``(x0, y0, x1, y1)``. Images with fewer boxes are
        padded.
      scores: Scores of the boxes. Boxes with equal scores are matched in their order.
      threshold: Smallest intersection over union of a match, in (0, 1].
      where, where_true: False for padding, or for boxes (true boxes) of another class
        than the one that is matched. Default to True.

    Raises:
      ValueError: An array has the wrong shape, or ``threshold`` is out of range.

    Cost: one step per box, each over the true boxes of its image.
    Memory: boxes times true boxes per image.
    Nothing is differentiable, because a matching is constant between ties.
    Source: the protocol of COCO (Lin et al. 2014, arXiv 1405.0312).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> boxes = jnp.array([[[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]]])
    >>> true_boxes = jnp.array([[[0.0, 0, 2, 2]]])
    >>> scores = jnp.array([[0.8, 0.9, 0.7]])
    >>> hg.surrogates.match_boxes(boxes, scores, true_boxes).tolist()
    [[False, True, False]]
    """
    boxes, scores, true_boxes = map(jnp.asarray, (boxes, scores, true_boxes))
    shape, true_shape = scores.shape, true_boxes.shape[:2]
    if len(shape) != 2 or boxes.shape != (*shape, 4):
        raise ValueError(
            "boxes must have shape [images, boxes, 4] and scores [images, boxes]; got "
            f"{boxes.shape} and {shape}."
        )
    if true_boxes.ndim != 3 or true_boxes.shape[::2] != (shape[0], 4):
        raise ValueError(
            f"true_boxes must have shape [images, true, 4] for {shape[0]} images; got "
            f"{true_boxes.shape}."
        )
    threshold = positive_up_to("threshold", 1)(threshold)
    where = _boolean_mask("where", where, shape)
    where_true = _boolean_mask("where_true", where_true, true_shape)
    if 0 in (*shape, true_shape[1]):
        return jnp.zeros(shape, bool)
    # Areas of pixels overflow in float16.
    dtype = jnp.promote_types(jnp.result_type(boxes, true_boxes), jnp.float32)
    boxes, true_boxes = boxes.astype(dtype), true_boxes.astype(dtype)
    images = boxes, scores, true_boxes, where, where_true
    return jax.vmap(_match_image, (0, 0, 0, 0, 0, None))(*images, threshold)


def _boolean_mask(name: str, mask: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    mask = jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)
    if mask.shape != shape or mask.dtype != bool:
        raise ValueError(
            f"{name} must be boolean of shape {shape}; got {mask.dtype} of shape "
            f"{mask.shape}."
        )
    return mask


def _match_image(
    boxes: Float[Array, "boxes 4"],
    scores: Float[Array, " boxes"],
    true_boxes: Float[Array, "true 4"],
    where: Bool[Array, " boxes"],
    where_true: Bool[Array, " true"],
    threshold: ArrayLike,
) -> Bool[Array, " boxes"]:
    # Integers are inverted, because the negative of an unsigned one is no order.
    is_float = jnp.issubdtype(scores.dtype, jnp.floating)
    # Padding comes last and takes no true box.
    order = jnp.lexsort((-scores if is_float else ~scores, ~where))

    def match_box(is_free, box):
        overlaps = _intersection_over_union(boxes[box], true_boxes)
        overlaps = jnp.where(is_free, overlaps, -1)
        best = jnp.argmax(overlaps)
        is_match = where[box] & (overlaps[best] >= threshold)
        return is_free.at[best].set(is_free[best] & ~is_match), is_match

    _, is_match = lax.scan(match_box, where_true, order)
    return jnp.zeros_like(is_match).at[order].set(is_match)


def _intersection_over_union(
    box: Float[Array, "4"], other_boxes: Float[Array, "true 4"]
) -> Float[Array, " true"]:
    """Returns the intersection over union of one box with each of the other boxes."""
    area = lambda low, high: jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    low = jnp.maximum(box[None, :2], other_boxes[:, :2])
    high = jnp.minimum(box[None, 2:], other_boxes[:, 2:])
    intersection = area(low, high)
    areas = area(box[:2], box[2:]) + area(other_boxes[:, :2], other_boxes[:, 2:])
    return safe_divide(intersection, areas - intersection)


class Detections(Examples):
    """Rankings of boxes together with the number of true boxes of each."""

    num_true: Float[Array, " r"]


class DetectionAP(RankingSurrogate):
    """Average precision of detections, whose recall counts all true boxes.

    The precision at a recall is the best precision at that recall or a higher one. The
    mean is taken over the true boxes, where those that are never found have precision
    0, or over evenly spaced recalls. In the surrogate the matching is fixed and ranks
    are `soft_rank`, so that the precision moves with the scores.

    Call with the scores of the boxes of all images in one row, ``scores.reshape(-1)``,
    and their targets from `match_boxes`; or with one row per class, ``[classes,
    boxes]``, and ``where`` for padding and for boxes of other classes.

    Args:
      num_true: Number of true boxes in all images, found or not: a number, or an array
        with one per ranking. If it is below the number of matches, that is an error, or
        the value is NaN if it is traced. The mean is over the rankings with true boxes,
        as in COCO: a class without true boxes does not count, whatever was detected,
        and a class with true boxes but no detections has the value 0. A row of padding
        needs the number 0. Data.
      num_points: Number of recalls from 0 to 1: 11 for Pascal VOC 2007, 101 for COCO.
        Defaults to None for the area, as in Pascal VOC since 2010. Static.
      axis: As for `RankingSurrogate`.

    Ties: share one threshold, and in the surrogate their mean rank.
    Cost: two soft ranks and a sort per ranking. Memory: O(n).
    Weights: a common factor of them and of ``num_true`` changes nothing.
    Bias: none if the temperature is at most the smallest gap between scores, divided by
    the largest weight in units of the mean weight, and then no gradient either.
    Source: Everingham et al. 2010 (Pascal VOC); Lin et al. 2014 (COCO, arXiv
    1405.0312); Blondel et al. 2020 (arXiv 2002.08871) for the ranks.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, is_match = jnp.array([0.9, 0.8, 0.7]), jnp.array([1, 0, 1])
    >>> ap = hg.surrogates.DetectionAP(num_true=4)
    >>> float(ap(scores, is_match, temperature=0.05)), float(ap.exact(scores, is_match))
    (0.4167, 0.4167)
    """

    num_true: ArrayLike = eqx.field(
        converter=non_negative("num_true", allow_array=True)
    )
    num_points: int | None = eqx.field(static=True, default=None)

    citations = ("everingham2010", "lin2014", "blondel2020")

    def __check_init__(self):
        check_positive_int("num_points", self.num_points, minimum=2, optional=True)

    def check_inputs(self, scores, targets, where, weights):
        """Returns rankings with their numbers of true boxes, if sufficient."""
        rows = super().check_inputs(scores, targets, where, weights)
        shape = list(np.shape(scores))
        del shape[self.axis]
        num_true = jnp.asarray(self.num_true, rows.scores.dtype)
        if num_true.shape not in ((), tuple(shape)):
            raise ValueError(
                f"num_true must be a number, or have the shape {tuple(shape)} of the "
                f"rankings, for scores of shape {np.shape(scores)}; got "
                f"{num_true.shape}. Pass one row of scores per class."
            )
        num_true = jnp.broadcast_to(num_true, shape).reshape(-1)
        # Scores may be traced where the matches and their weights are concrete.
        zeros = np.zeros(np.shape(scores), rows.scores.dtype)
        counted = super().check_inputs(zeros, targets, where, weights)
        is_short = jax.vmap(_has_more_matches)(counted.positive_weights, num_true)
        is_short &= jnp.any(counted.mask, axis=1)
        if not isinstance(is_short, Tracer) and np.any(is_short):
            raise ValueError(
                "num_true must be at least the number of matches in each ranking; got "
                f"{self.num_true}. Count the true boxes that were not found as well."
            )
        return Detections(rows.scores, rows.targets, rows.weights, rows.mask, num_true)

    def mean_over_rows(self, values, rows):
        """Returns the mean over the rankings with true boxes, NaN if a value is NaN."""
        values = propagate_nan(values, rows.scores)
        has_true_box = (rows.num_true > 0) | jnp.isnan(values)
        return weighted_mean(values, has_true_box.astype(values.dtype))

    @rowwise
    def smooth_rows(self, row, temperature):
        """Returns the average precision with soft ranks."""
        matches = row.positive_weights
        order = jnp.argsort(-without_derivative(row.scores))
        precisions = soft_precisions(row.scores, matches, row.weights, temperature)
        return self._average_precision(matches[order], precisions[order], row.num_true)

    @rowwise
    def exact_rows(self, row):
        """Returns the average precision."""
        matches = row.positive_weights
        order, (rank_among_matches, rank_among_all) = totals_at_thresholds(
            row.scores, matches, row.weights
        )
        precisions = safe_divide(rank_among_matches, rank_among_all)
        return self._average_precision(matches[order], precisions, row.num_true)

    def _average_precision(self, matches, precisions, num_true):
        """Returns the mean precision of items in the order of their scores."""
        # The best precision at this recall or a higher one.
        precisions = lax.cummax(precisions, reverse=True)
        nan_if_short = jnp.where(_has_more_matches(matches, num_true), jnp.nan, 1)
        if self.num_points is None:
            total = jnp.sum(matches * precisions)
            return nan_if_short * safe_divide(total, num_true)
        # Recall i / m is reached if matches * m >= i * num_true: in integers, because a
        # quotient may round to either side. Sums of fractions are rounded.
        num_intervals = self.num_points - 1
        slack = _rounding_error_of_sum(matches)
        required = jnp.arange(self.num_points) * num_true * (1 - slack)
        index = jnp.searchsorted(jnp.cumsum(matches) * num_intervals, required)
        mean_precision = jnp.mean(jnp.append(precisions, 0)[index])
        return nan_if_short * jnp.where(num_true > 0, mean_precision, 0)


def _has_more_matches(matches: Vector, num_true: Scalar) -> Bool[Array, ""]:
    """Returns True if matches exceed true boxes by more than the rounding error."""
    matches, num_true = without_derivative((matches, num_true))
    slack = _rounding_error_of_sum(matches)
    # True for NaN too.
    return ~(jnp.sum(matches) * (1 - slack) <= num_true)


def _rounding_error_of_sum(matches: Vector) -> Scalar:
    """Returns the relative rounding error of a sum: 0 for whole numbers.

    JAX adds n numbers in about log2(n) steps.
    """
    is_whole = jnp.all(matches == jnp.round(matches))
    eps = float(jnp.finfo(matches.dtype).eps)
    return jnp.where(is_whole, 0, 4 * math.log2(1 + matches.size) * eps)
