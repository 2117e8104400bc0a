"""Checked input of surrogates: scores, targets, masks, weights and temperatures.

The functions ``*_examples(scores, targets, where, weights)`` raise a ValueError or a
TypeError for bad shapes, and for bad values unless they are traced. A traced bad value
that counts makes its example NaN.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from ..trees import without_derivative
from ..validation import is_traced

Scalar = Float[Array, ""]
Vector = Float[Array, " n"]


class Examples(eqx.Module):
    """Checked input of a surrogate, in which everything that is masked out is 0.

    An example that counts has NaN for its scores and its weight, which makes every sum
    NaN, if a score is not finite, a target is not valid or the weight is negative. An
    invalid target is 0.

    Attributes:
      scores: Floating-point scores, float32 at least.
      targets: 0 and 1, or gains, in the dtype of the scores; or integer class indices.
      weights: Weights of the examples, at least 0.
      mask: True for an example that counts; same shape as ``weights``.
    """

    scores: Float[Array, "..."]
    targets: Array
    weights: Float[Array, "..."]
    mask: Bool[Array, "..."]

    @property
    def positive_weights(self) -> Array:
        """Weight times target, which need one shape."""
        return self.weights * self.targets

    @property
    def negative_weights(self) -> Array:
        """Weight times ``1 - target``, which need one shape."""
        return self.weights * (1 - self.targets)


def binary_examples(scores, targets, where=None, weights=None) -> Examples:
    """Returns scores [n] and targets [n] of 0 and 1."""
    scores = _float_scores(scores)
    if scores.ndim != 1:
        raise ValueError(
            f"scores must have shape [n] for two classes; got {scores.shape}. Pass one "
            "score per example, such as scores[:, 0]."
        )
    return _binary_targets(scores, targets, where, weights, scores.shape)


def multilabel_examples(scores, targets, where=None, weights=None) -> Examples:
    """Returns scores [n, L], targets [n, L] of 0 and 1, and mask and weights [n]."""
    scores = _float_scores(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape [n, labels]; got {scores.shape}.")
    return _binary_targets(scores, targets, where, weights, scores.shape[:1])


def elementwise_examples(scores, targets, where=None, weights=None) -> Examples:
    """Returns scores, targets of 0 and 1, mask and weights, all of one shape."""
    scores = _float_scores(scores)
    return _binary_targets(scores, targets, where, weights, scores.shape)


def graded_examples(scores, targets, where=None, weights=None) -> Examples:
    """Returns scores, gains of at least 0, mask and weights, all of one shape."""
    scores = _float_scores(scores)
    targets = _targets_like(scores, targets)
    mask, weights, counted = _mask_and_weights(
        where, weights, scores.shape, scores.dtype
    )
    is_valid = _valid_values(
        "targets",
        targets,
        counted,
        is_non_negative,
        "finite gains of at least 0",
    )
    targets = targets.astype(scores.dtype)
    return _make_examples(scores, targets, mask, weights, is_valid)


def multiclass_examples(scores, targets, where=None, weights=None) -> Examples:
    """Returns scores [n, C], and targets [n] in 0..C-1 with mask and weights [n]."""
    scores, targets = _float_scores(scores), as_array("targets", targets)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores must have shape [n, classes] with at least 2 classes; got "
            f"{scores.shape}. For two classes pass one score per example, [n]."
        )
    num_examples, num_classes = scores.shape
    if targets.shape != (num_examples,):
        raise ValueError(
            f"targets must have shape ({num_examples},) for scores of shape "
            f"{scores.shape}; got {targets.shape}. Pass class indices, such as "
            "targets.argmax(1); for labels or a ranking, flatten scores and targets."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(
            f"targets must be integer class indices for scores [n, classes]; got "
            f"{targets.dtype}. Write targets.astype(int)."
        )
    if jnp.iinfo(targets.dtype).bits < 32:  # which may not hold the number of classes
        targets = targets.astype(jnp.int32)
    mask, weights, counted = _mask_and_weights(
        where, weights, targets.shape, scores.dtype
    )
    is_class = lambda x: (x >= 0) & (x < num_classes)
    requirement = f"in 0..{num_classes - 1}"
    is_valid = _valid_values("targets", targets, counted, is_class, requirement)
    return _make_examples(scores, targets, mask, weights, is_valid)


def class_examples(scores, targets, where=None, weights=None) -> Examples:
    """Returns `binary_examples` for scores [n], else `multiclass_examples`."""
    check = binary_examples if np.ndim(scores) == 1 else multiclass_examples
    return check(scores, targets, where, weights)


def as_temperature(temperature: ArrayLike, dtype: Any) -> Scalar:
    """Returns a normal positive scalar of that dtype; NaN for any other traced one."""
    array = as_array("temperature", temperature)
    if array.shape != ():
        raise ValueError(
            f"temperature must be a scalar; got shape {array.shape}. Use jax.vmap for "
            "several temperatures."
        )
    # Processors round numbers below the smallest normal one to 0.
    array = array.astype(dtype)
    limits = jnp.finfo(dtype)
    if not isinstance(temperature, Tracer):
        value = np.asarray(temperature).astype(dtype)
        if not limits.tiny <= value <= limits.max:
            raise ValueError(
                "temperature must be above 0 and finite, in the units of the scores, "
                f"and a normal number of {dtype}; got {temperature}."
            )
    is_normal = (array >= limits.tiny) & (array <= limits.max)
    return jnp.where(is_normal, array, jnp.nan)


def as_array(name: str, value: ArrayLike) -> Array:
    """Returns an array of numbers or booleans; raises TypeError for anything else."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array: {error}") from error
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    if is_complex or not (
        jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool
    ):
        raise TypeError(f"{name} must contain real numbers; got {array.dtype}.")
    return array


def is_non_negative(x: Any) -> Any:
    """Returns True for finite numbers of at least 0."""
    return (x >= 0) & (x < np.inf)


def _float_scores(scores: ArrayLike) -> Array:
    scores = as_array("scores", scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(
            f"scores must be floating-point; got {scores.dtype}, which has no "
            "derivative. Pass the output of the model, not its predictions."
        )
    if scores.size == 0 or scores.ndim == 0:
        raise ValueError(f"scores must not be empty; got shape {scores.shape}.")
    # A sum of ones in half precision stops at 2,048.
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))


def _targets_like(scores: Array, targets: ArrayLike) -> Array:
    targets = as_array("targets", targets)
    if targets.shape != scores.shape:
        remedy = ""
        if targets.shape == (*scores.shape, 1):
            remedy = " Drop the last axis by targets[..., 0]."
        elif scores.shape[:-1] == targets.shape:
            remedy = " Pass the scores of one class, scores[..., k]."
        raise ValueError(
            f"targets must have the shape of scores, {scores.shape}; got "
            f"{targets.shape}.{remedy}"
        )
    return targets


def _mask_and_weights(
    where: ArrayLike | None, weights: ArrayLike | None, shape: tuple, dtype: Any
) -> tuple[Array, Array, ArrayLike | None]:
    """Returns which examples count, and how much.

    Returns:
      mask: False where masked out.
      weights: The weights, with 0 for an example that is masked out.
      counted: The mask for checks of values, None if all of them count. An example of
        weight 0 does not, unless weights are traced.
    """
    mask = jnp.ones(shape, bool) if where is None else as_array("where", where)
    factors = (
        jnp.ones(shape, dtype) if weights is None else as_array("weights", weights)
    )
    if mask.dtype != bool:
        raise TypeError(f"where must be boolean; got {mask.dtype}. Write where != 0.")
    for name, array in (("where", mask), ("weights", factors)):
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {array.shape}.")
    check_values("weights", factors, where, is_non_negative, "at least 0 and finite")
    counted = where
    if weights is not None and not is_traced((where, weights)):
        has_weight = np.asarray(weights) != 0
        counted = has_weight if where is None else has_weight & np.asarray(where)
    return mask, jnp.where(mask, factors, 0).astype(dtype), counted


def _binary_targets(scores: Array, targets, where, weights, shape: tuple) -> Examples:
    """Returns examples of that shape with one target of 0 or 1 per score."""
    targets = _targets_like(scores, targets)
    mask, weights, counted = _mask_and_weights(where, weights, shape, scores.dtype)
    is_binary = lambda x: (x == 0) | (x == 1)
    remedy = " For labels of -1 and 1 pass targets > 0."
    is_valid = _valid_values("targets", targets, counted, is_binary, "0 or 1", remedy)
    targets = targets.astype(scores.dtype)
    return _make_examples(scores, targets, mask, weights, is_valid)


def _make_examples(
    scores: Array, targets: Array, mask: Array, weights: Array, is_valid_target: Array
) -> Examples:
    """Returns examples with 0 where masked out, NaN where they count and are invalid.

    Raises:
      ValueError: A concrete score that counts is infinite.
    """
    # Before any arithmetic, because 0 * NaN is NaN.
    scores = jnp.where(_expand(mask, scores), scores, 0)
    targets = jnp.where(_expand(mask, targets) & is_valid_target, targets, 0)
    # Which examples count is piecewise constant in the weights.
    fixed_weights = without_derivative(weights)
    has_weight = fixed_weights != 0
    check_values("scores", scores, has_weight, lambda x: ~np.isinf(x), "finite")
    # One invalid value makes the whole example invalid, unless its weight is 0.
    per_example = scores.reshape(*weights.shape, -1)
    is_valid = jnp.all(jnp.isfinite(per_example), axis=-1)
    is_valid &= jnp.all(is_valid_target.reshape(*weights.shape, -1), axis=-1)
    is_valid &= (fixed_weights >= 0) & (fixed_weights < jnp.inf)
    nan_if_invalid = jnp.where(has_weight & ~is_valid, jnp.nan, jnp.ones_like(weights))
    per_example = jnp.where((has_weight | is_valid)[..., None], per_example, 0)
    scores = (per_example * nan_if_invalid[..., None]).reshape(scores.shape)
    return Examples(scores, targets, weights * nan_if_invalid, mask)


def _valid_values(
    name: str,
    array: Array,
    where: ArrayLike | None,
    is_valid: Callable[[Any], Any],
    *texts: str,
) -> Bool[Array, "..."]:
    """Returns False for traced values that are not valid, after a check of the others.

    Args:
      name, array, where, is_valid, *texts: As for `check_values`.

    Raises:
      ValueError: A concrete value that counts is not valid.
    """
    check_values(name, array, where, is_valid, *texts)
    if is_traced((array, where)):
        return is_valid(array)
    # Values that were checked need no operation in the compiled program.
    return jnp.asarray(is_valid(np.asarray(array)))


def check_values(
    name: str,
    array: Array,
    where: ArrayLike | None,
    is_valid: Callable[[Any], Any],
    requirement: str,
    remedy: str = " Mask other examples out by where.",
) -> None:
    """Raises ValueError for an invalid value that counts, unless values are traced."""
    if is_traced((array, where)):
        return
    values = np.asarray(array)
    if where is not None:
        # In NumPy, because JAX would trace the expansion of a constant mask.
        mask = np.asarray(where)
        mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
        values = values[np.broadcast_to(mask, values.shape)]
    invalid = values[~is_valid(values)]
    if invalid.size:
        raise ValueError(f"{name} must be {requirement}; got {invalid[0]}.{remedy}")


def _expand(mask: Array, like: Array) -> Array:
    """Returns the mask of the examples broadcast to an array with further axes."""
    ones = (1,) * (like.ndim - mask.ndim)
    return jnp.broadcast_to(mask.reshape(mask.shape + ones), like.shape)
