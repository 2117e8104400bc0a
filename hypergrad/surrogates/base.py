"""What a surrogate is, and what all of them share: input checks, means, a division."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float


class Surrogate(Protocol):
    """A smooth stand-in for a metric, with its exact counterpart beside it.

    Both are in the metric's own orientation and scalars in the dtype of the scores
    (float32 at least). A surrogate is differentiable in ``scores`` and
    ``temperature``; `exact` is jit-able.

    Common to all: ``temperature`` is in the units of the scores. ``where`` marks the
    examples that count, and ``weights`` (at least 0) says how much. A masked-out
    example may hold anything, NaN included, and is as good as dropped. Where nothing is
    left to average, value and gradient are 0.

    Scores of examples that count are finite. One that is NaN, or infinite while traced,
    makes value, gradient and `exact` NaN; a concrete infinity is refused.
    """

    def __call__(
        self,
        scores: Float[ArrayLike, "..."],
        targets: ArrayLike,
        *,
        temperature: ArrayLike,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Array:
        """The smooth metric."""
        ...

    def exact(
        self,
        scores: Float[ArrayLike, "..."],
        targets: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Array:
        """The metric itself; its derivative is 0 wherever it has one.

        But for `CalibrationError`: between jumps its confidences move with the scores.
        """
        ...


class Examples(NamedTuple):
    """Checked input; what is masked out is 0 throughout.

    An example that counts without a finite score has the score NaN and the weight NaN,
    which reaches every sum.
    """

    scores: Float[Array, "..."]
    targets: Array  # 0 and 1 in the dtype of the scores, or class indices
    weights: Float[Array, "..."]
    mask: Bool[Array, "..."]


def binary(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Examples:
    """Scores [n] against targets [n] of 0 and 1."""
    scores = _scores(scores)
    if scores.ndim != 1:
        hint = "scores[:, 0]" if scores.shape[1:] == (1,) else "one score an example"
        raise ValueError(
            f"scores must be [n] for two classes, got shape {scores.shape}: pass {hint}"
        )
    return _two_valued(scores, targets, where, weights, scores.shape)


def multilabel(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Examples:
    """Scores [n, L] against targets [n, L] of 0 and 1; ``where``, ``weights`` [n]."""
    scores = _scores(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must be [n, labels], got shape {scores.shape}")
    return _two_valued(scores, targets, where, weights, scores.shape[:1])


def elementwise(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Examples:
    """Scores of any shape against 0 and 1; ``where`` and ``weights`` of that shape."""
    scores = _scores(scores)
    return _two_valued(scores, targets, where, weights, scores.shape)


def multiclass(
    scores: ArrayLike,
    targets: ArrayLike,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Examples:
    """Scores [n, C] against targets [n], integers in 0..C-1."""
    scores = _scores(scores)
    targets = _array("targets", targets)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores must be [n, classes] with 2 classes at least, got shape "
            f"{scores.shape}; for two classes one score an example, [n], will do"
        )
    if targets.shape != scores.shape[:1]:
        hints = {
            scores.shape: "of one class an example pass its index, targets.argmax(1); "
            "of labels or a ranking, scores.ravel() and targets.ravel()",
            (*scores.shape[:1], 1): "drop the last axis, targets[:, 0]",
        }
        hint = hints.get(targets.shape, "pass one class index an example")
        raise ValueError(
            f"targets must be [n] = {scores.shape[:1]} for scores of shape "
            f"{scores.shape}, got {targets.shape}: {hint}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(
            f"targets must be integer class indices for scores [n, classes], got "
            f"{targets.dtype}: write targets.astype(int)"
        )
    mask, weights = _counted(where, weights, targets.shape, scores.dtype)
    if (values := _values(targets, mask)) is not None:
        outside = values[(values < 0) | (values >= scores.shape[1])]
        if outside.size:
            raise ValueError(
                f"targets must be in 0..{scores.shape[1] - 1}, the classes that scores "
                f"has columns for; got {outside[0]}: mask such examples out by where"
            )
    scores, weights = _sound(jnp.where(mask[:, None], scores, 0), weights)
    return Examples(scores, jnp.where(mask, targets, 0), weights, mask)


def as_temperature(temperature: ArrayLike, dtype: Any) -> Array:
    """A scalar in the dtype of the scores; refuses what is not above 0.

    A traced one has no value yet: it is NaN where it is not above 0.
    """
    array = _array("temperature", temperature)
    if array.shape != ():
        raise ValueError(
            f"temperature must be a scalar, got shape {array.shape}; for several use "
            "jax.vmap"
        )
    if not isinstance(temperature, Tracer) and not np.all(np.asarray(temperature) > 0):
        raise ValueError(
            "temperature must be above 0, in the units of the scores; got "
            f"{temperature}"
        )
    return jnp.where(array > 0, array, jnp.nan).astype(dtype)


def check_setting(name: str, value: Any, above: float, most: float) -> None:
    """Refuses a number outside (above, most]; a traced one has no value yet."""
    if isinstance(value, Tracer):
        return
    if not (isinstance(value, int | float) or np.shape(value) == ()):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not above < value <= most:
        raise ValueError(
            f"{name} must be above {above} and at most {most}, got {value}"
        )


def check_not_negative(name: str, value: Any) -> None:
    """Refuses a number below 0; a traced one has no value yet."""
    if not (isinstance(value, Tracer) or np.all(np.asarray(value) >= 0)):
        raise ValueError(f"{name} must be 0 or above, got {value}")


def check_count(name: str, value: Any) -> None:
    """Refuses what is no integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer above 0, got {value!r}")


def mean(values: Array, weights: Array) -> Array:
    """Weighted mean of all values; 0 where no weight is left."""
    return divide(jnp.sum(weights * values), jnp.sum(weights))


def divide(numerator: Array, denominator: Array, least: ArrayLike = 0) -> Array:
    """``numerator / denominator``; 0 where the denominator is 0, NaN where it is NaN.

    A denominator below ``least`` counts as that, and stands for the 0 that both tend
    to.
    """
    none = denominator <= 0
    safe = jnp.where(none, 1, jnp.maximum(denominator, least))
    return jnp.where(none, 0, numerator) / safe


def rounding(weights: Array) -> Array:
    """Of the lightest example: sums of sigmoids below it are in their tails."""
    weights = jax.lax.stop_gradient(weights)
    lightest = jnp.min(jnp.where(weights > 0, weights, jnp.inf))
    numbers = jnp.finfo(weights.dtype)
    floor = numbers.eps * jnp.where(jnp.isfinite(lightest), lightest, 1)
    return jnp.maximum(floor, numbers.tiny)


def flagged(values: Array, inputs: Array) -> Array:
    """The values, or NaN where an input along the last axis is; so the gradients.

    A sum does not always do it: XLA takes NaN times a false comparison for 0.
    """
    zeros = 0 * jax.lax.stop_gradient(inputs)
    return values + jnp.sum(zeros * inputs, axis=-1)


def _array(name: str, value: ArrayLike) -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array: {error}") from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(f"{name} must be numbers, got {array.dtype}")
    return array


def _scores(scores: ArrayLike) -> Array:
    """Floating point, float32 at least: counts in less stop at 2,048."""
    scores = _array("scores", scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(
            f"scores is {scores.dtype}, which has no derivative; pass the model's "
            "floating-point output, not its predictions"
        )
    if scores.size == 0 or scores.ndim == 0:
        raise ValueError(
            f"scores must hold one example at least, got shape {scores.shape}"
        )
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def _two_valued(
    scores: Array,
    targets: ArrayLike,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    shape: tuple[int, ...],
) -> Examples:
    targets = _array("targets", targets)
    if targets.shape != scores.shape:
        column = targets.shape == (*scores.shape, 1)
        hint = ": drop the last axis, targets[..., 0]" if column else ""
        raise ValueError(
            f"targets must have the shape of scores, {scores.shape}, got "
            f"{targets.shape}{hint}"
        )
    mask, weights = _counted(where, weights, shape, scores.dtype)
    kept = jnp.broadcast_to(
        mask.reshape(shape + (1,) * (scores.ndim - len(shape))), scores.shape
    )
    if (values := _values(targets, kept)) is not None:
        outside = values[(values != 0) & (values != 1)]
        if outside.size:
            raise ValueError(
                f"targets must be 0 or 1, got {outside[0]}: for labels of -1 and 1 "
                "pass targets > 0; mask examples without a label out by where"
            )
    targets = jnp.where(kept, targets, 0).astype(scores.dtype)
    scores, weights = _sound(jnp.where(kept, scores, 0), weights)
    return Examples(scores, targets, weights, mask)


def _sound(scores: Array, weights: Array) -> tuple[Array, Array]:
    """Both with NaN for an example that counts and has a score that is not finite."""
    each, counted = scores.reshape(*weights.shape, -1), weights != 0
    values = _values(each, jnp.broadcast_to(counted[..., None], each.shape))
    if values is not None and np.isinf(values).any():
        raise ValueError(
            f"scores must be finite, got {values[np.isinf(values)][0]}: mask such "
            "examples out, pass where=jnp.isfinite(scores)"
        )
    sound = jnp.all(jnp.isfinite(each), axis=-1) & jnp.isfinite(weights)
    factor = jnp.where(counted & ~sound, jnp.nan, jnp.ones_like(weights))
    each = jnp.where((counted | sound)[..., None], each, 0) * factor[..., None]
    return each.reshape(scores.shape), weights * factor


def _counted(
    where: ArrayLike | None, weights: ArrayLike | None, shape: tuple, dtype: Any
) -> tuple[Array, Array]:
    """The mask, and the weights with 0 where it is False."""
    mask = jnp.ones(shape, bool) if where is None else _array("where", where)
    if mask.dtype != bool:
        raise TypeError(f"where must be boolean, got {mask.dtype}: write where != 0")
    weights = jnp.ones(shape, dtype) if weights is None else _array("weights", weights)
    for name, array in (("where", mask), ("weights", weights)):
        if array.shape != shape:
            raise ValueError(
                f"{name} must have the examples' shape {shape}, got {array.shape}"
            )
    values = _values(weights, mask)
    if values is not None and not np.all(values >= 0):
        raise ValueError(f"weights must be 0 or above, got {values[~(values >= 0)][0]}")
    return mask, jnp.where(mask, weights, 0).astype(dtype)


def _values(array: Array, mask: Array) -> np.ndarray | None:
    """What counts, as NumPy; None while it is traced and has no value yet."""
    if isinstance(array, Tracer) or isinstance(mask, Tracer):
        return None
    return np.asarray(array)[np.asarray(mask)]
