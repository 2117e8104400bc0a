"""Detection: which boxes are right, and the average precision of their scores."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from .average_precision import soft_precision
from .base import as_temperature, check_not_negative, divide
from .ranking import at_thresholds, mean_over_rows


def match_boxes(
    boxes: Float[ArrayLike, "images boxes 4"],
    scores: Float[ArrayLike, "images boxes"],
    truths: Float[ArrayLike, "images truths 4"],
    *,
    threshold: ArrayLike = 0.5,
    where: Bool[ArrayLike, "images boxes"] | None = None,
    where_truths: Bool[ArrayLike, "images truths"] | None = None,
) -> Bool[Array, "images boxes"]:
    """Which predicted boxes are right: the targets of `DetectionAP`.

    In each image, from the best score down, a box takes the true box not yet taken with
    which it overlaps most, if their intersection over union is at least ``threshold``.

    Args:
      boxes, truths: ``[images, most, 4]``, corners ``(x0, y0, x1, y1)``; images with
        fewer are padded.
      scores: of the boxes; ties go in their order.
      threshold: of the intersection over union, above 0.
      where, where_truths: what is no padding; None for all. For one class of several,
        that the box (the truth) is of the class.

    Cost: a step a box, each over the true boxes; memory boxes times truths an image.
    Nothing is differentiable: a matching is constant between ties.

    Source: the protocol of COCO (Lin et al. 2014, arXiv 1405.0312).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> boxes = jnp.array([[[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]]])
    >>> truths = jnp.array([[[0.0, 0, 2, 2]]])
    >>> scores = jnp.array([[0.8, 0.9, 0.7]])
    >>> hg.surrogates.match_boxes(boxes, scores, truths).tolist()
    [[False, True, False]]
    """
    boxes, scores, truths = map(jnp.asarray, (boxes, scores, truths))
    shape = scores.shape
    if len(shape) != 2 or boxes.shape != (*shape, 4):
        raise ValueError(
            "boxes must be [images, boxes, 4] and scores [images, boxes], got shapes "
            f"{boxes.shape} and {shape}"
        )
    if truths.ndim != 3 or truths.shape[::2] != (shape[0], 4):
        raise ValueError(
            f"truths must be [images, truths, 4] for {shape[0]} images, got shape "
            f"{truths.shape}"
        )
    where = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    most = truths.shape[:2]
    free = jnp.ones(most, bool) if where_truths is None else jnp.asarray(where_truths)
    for name, mask, expected in (
        ("where", where, shape),
        ("where_truths", free, most),
    ):
        if mask.shape != expected or mask.dtype != bool:
            raise ValueError(
                f"{name} must be boolean of shape {expected}, got {mask.dtype} of "
                f"shape {mask.shape}"
            )
    if most[1] == 0:
        return jnp.zeros(shape, bool)

    def one_image(boxes, scores, truths, where, free):
        order = jnp.argsort(jnp.where(where, -scores, jnp.inf))

        def take(free, box):
            overlaps = jnp.where(free, _overlaps(boxes[box], truths), -1)
            best = jnp.argmax(overlaps)
            hit = where[box] & (overlaps[best] >= threshold)
            return free.at[best].set(free[best] & ~hit), hit

        _, hits = lax.scan(take, free, order)
        return jnp.zeros_like(hits).at[order].set(hits)

    return jax.vmap(one_image)(boxes, scores, truths, where, free)


def _overlaps(box: Array, truths: Array) -> Float[Array, " truths"]:
    """Intersection over union of one box with each of the others."""
    low = jnp.maximum(box[None, :2], truths[:, :2])
    high = jnp.minimum(box[None, 2:], truths[:, 2:])
    area = lambda low, high: jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    both = area(low, high)
    return divide(
        both, area(box[:2], box[2:]) + area(truths[:, :2], truths[:, 2:]) - both
    )


class DetectionAP(eqx.Module):
    """Average precision of detections: recall counts true boxes, found or not.

    The precision at a recall is the best at that recall or more. The mean is taken over
    the true boxes, those never found having 0, or over evenly spaced recalls. The
    surrogate has the matching held fixed and takes `soft_rank` for the ranks, so that
    precision moves with the scores.

    Args:
      num_truths: true boxes in all images, found or not: a number, or one for each
        row. Fewer than the hits are refused, or where traced the result is NaN. Data.
      num_points: recalls from 0 to 1, 11 as in Pascal VOC 2007, 101 as in COCO; None
        for the area, as in Pascal VOC since 2010. Static.
      axis: detections are ranked along it; the mean is taken over the others. Static.

    Call with the scores of all images' boxes in one row, ``scores.reshape(-1)``, and
    their targets, `match_boxes`; or with a row for each class, ``[classes, boxes]``,
    and ``where`` for padding and for boxes of other classes. ``where`` and ``weights``
    are of the shape of the scores, or [n] along the axis.

    Ties: share one threshold, and in the surrogate their mean rank. Rows: one without
    truths has AP 0 and counts, one of which all is masked out does not. Cost: two soft
    ranks and a sort; memory O(n). Bias: none where the temperature is at most the
    smallest gap between scores, and no gradient either.

    Source: Everingham et al. 2010 (Pascal VOC); Lin et al. 2014 (COCO, arXiv
    1405.0312); ranks by Blondel et al. 2020 (arXiv 2002.08871).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> scores, hits = jnp.array([0.9, 0.8, 0.7]), jnp.array([1, 0, 1])
    >>> ap = hg.surrogates.DetectionAP(num_truths=4)
    >>> round(float(ap(scores, hits, temperature=0.05)), 4)
    0.4167
    >>> round(float(ap.exact(scores, hits)), 4)
    0.4167
    """

    num_truths: ArrayLike
    num_points: int | None = eqx.field(static=True, default=None)
    axis: int = eqx.field(static=True, default=-1, kw_only=True)

    citations = ("everingham2010", "lin2014", "blondel2020")

    def __check_init__(self):
        check_not_negative("num_truths", self.num_truths)
        points = self.num_points
        if points is not None and not (isinstance(points, int) and points > 1):
            raise ValueError(
                f"num_points must be an integer above 1 or None, got {points!r}"
            )

    def __call__(self, scores, targets, *, temperature, where=None, weights=None):
        """The smooth average precision, a scalar."""

        def precision(scores, hits, weights):
            t = as_temperature(temperature, scores.dtype)
            order = jnp.argsort(-lax.stop_gradient(scores))
            return order, soft_precision(scores, hits, weights, t)[order]

        return self._mean(precision, scores, targets, where, weights)

    def exact(self, scores, targets, *, where=None, weights=None):
        """The average precision, a scalar."""

        def precision(scores, hits, weights):
            order, (found, seen) = at_thresholds(scores, hits, weights)
            return order, divide(found, seen)

        return self._mean(precision, scores, targets, where, weights)

    def _mean(self, precision, scores, targets, where, weights):
        """Over rows; ``precision`` gives the order and the precisions in that order."""

        @jax.vmap
        def of_rows(scores, targets, weights, num_truths):
            hits = weights * targets
            order, at = precision(scores, hits, weights)
            hits, best = hits[order], lax.cummax(at, reverse=True)
            sound = jnp.where(_short(hits, num_truths), jnp.nan, 1)
            if self.num_points is None:
                return sound * divide(jnp.sum(hits * best), num_truths)
            # Recall i / intervals is reached where hits * intervals >= i * truths: in
            # integers, since a quotient may round to either side.
            intervals = self.num_points - 1
            wanted = jnp.arange(self.num_points) * num_truths
            first = jnp.searchsorted(jnp.cumsum(hits) * intervals, wanted)
            reached = jnp.append(best, 0)[first]
            return sound * jnp.where(num_truths > 0, jnp.mean(reached), 0)

        self._check_truths(targets, where, weights)
        return mean_over_rows(
            of_rows, scores, targets, where, weights, self.axis, beside=self.num_truths
        )

    def _check_truths(self, targets, where, weights):
        """Refuses fewer true boxes than were found, unless a number is traced."""
        short = jax.vmap(lambda _, y, w, truths: _short(w * y, truths).astype(w.dtype))
        rows = mean_over_rows(
            short, jnp.zeros(np.shape(targets)), targets, where, weights, self.axis,
            beside=self.num_truths,
        )  # fmt: skip
        if not isinstance(rows, Tracer) and rows > 0:
            raise ValueError(
                f"num_truths must be at least the number of hits in each row, got "
                f"{self.num_truths}: count the true boxes that were not found as well"
            )


def _short(hits: Array, num_truths: Array) -> Array:
    """More hits than true boxes, by more than the rounding of their sum."""
    slack = hits.size * jnp.finfo(hits.dtype).eps
    return jnp.sum(hits) * (1 - slack) > num_truths
