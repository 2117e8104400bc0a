"""The base class of surrogates, and the arithmetic that they share."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ..trees import power_of_two_below, without_derivative
from .inputs import Scalar, as_temperature, binary_examples

#: Size of a quotient beyond which the derivative of a sigmoid is 0 in float64.
MAX_QUOTIENT = 1e4


class Surrogate(eqx.Module):
    """A smooth stand-in for a metric, together with the exact metric.

    A subclass writes two formulas for input that has been checked, `smooth_value` and
    `exact_value`, both in the orientation of the metric. The base class adds what all
    surrogates promise:

    - ``surrogate(scores, targets, *, temperature, where=None, weights=None)`` is a
      scalar in the dtype of the scores, float32 at least, and differentiable in
      ``scores`` and ``temperature``.
    - ``surrogate.exact(scores, targets, *, where=None, weights=None)`` is the metric.
      It can be jitted, and its derivative is 0 wherever it exists, except for
      `CalibrationError`, whose confidences move with the scores.
    - ``temperature`` is above 0 and in the units of the scores. One that is infinite,
      or below the smallest normal number of the dtype, is an error, or NaN if traced.
    - ``where`` marks the examples that count. Defaults to all. An example that is
      masked out may contain anything, NaN included; the result is as if it were absent.
      If nothing is left to average, value and gradient are 0.
    - ``weights`` are at least 0. Defaults to 1.
    - Scores that count must be finite. A NaN, or an infinity inside ``jit``, makes
      value, gradient and `exact` NaN; a concrete infinity is an error.
    - Targets that count must be valid, such as 0 or 1 for two classes. An invalid
      target or a negative weight is an error if it is concrete. Inside ``jit`` and in
      the outer loss it makes value, gradient and `exact` NaN.

    Numbers that a user may sweep are fields that hold data; counts, axes and choices
    are static fields. An object whose ``__call__`` and ``exact`` have these signatures
    can stand wherever the library takes a surrogate, even without this class.

    Attributes:
      check_inputs: Function ``(scores, targets, where, weights) -> Examples`` that
        raises an error for bad input, set in the class as a ``staticmethod``. Defaults
        to `binary_examples`: scores [n] and targets [n] of 0 and 1. Others are in
        `hypergrad.surrogates.inputs`.
      citations: Keys of ``references.bib``, for `hypergrad.citation`. Defaults to none.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> from hypergrad.surrogates.base import weighted_mean
    >>> class Specificity(hg.surrogates.Surrogate):
    ...     '''Fraction of the negatives whose score is below 0.'''
    ...     def smooth_value(self, examples, temperature):
    ...         is_below = jax.nn.sigmoid(-examples.scores / temperature)
    ...         return weighted_mean(is_below, examples.negative_weights)
    ...     def exact_value(self, examples):
    ...         is_below = (examples.scores < 0).astype(examples.scores.dtype)
    ...         return weighted_mean(is_below, examples.negative_weights)
    >>> scores, targets = jnp.array([2.0, -1.0, 3.0, -2.0]), jnp.array([1, 0, 0, 1])
    >>> specificity = Specificity()
    >>> float(specificity(scores, targets, temperature=0.1))
    0.500
    >>> float(specificity.exact(scores, targets, where=scores < 3))
    1.0
    """

    check_inputs: ClassVar[Callable[..., Any]] = staticmethod(binary_examples)
    citations: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def smooth_value(self, examples: Any, temperature: Array, /) -> Array:
        """Returns the smooth metric, a scalar.

        Args:
          examples: What `check_inputs` returned.
          temperature: Scalar above 0 in the dtype of the scores.
        """
        ...

    @abstractmethod
    def exact_value(self, examples: Any, /) -> Array:
        """Returns the exact metric, a scalar, of what `check_inputs` returned."""
        ...

    def __call__(
        self,
        scores: Float[ArrayLike, "..."],
        targets: ArrayLike,
        *,
        temperature: ArrayLike,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Scalar:
        """Returns the smooth metric."""
        examples = self.check_inputs(scores, targets, where, weights)
        temperature = as_temperature(temperature, examples.scores.dtype)
        return self.smooth_value(examples, temperature)

    def exact(
        self,
        scores: Float[ArrayLike, "..."],
        targets: ArrayLike,
        *,
        where: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> Scalar:
        """Returns the exact metric."""
        return self.exact_value(self.check_inputs(scores, targets, where, weights))


def subtract_threshold(
    scores: Array, threshold: ArrayLike, name: str = "threshold"
) -> Array:
    """Returns ``scores - threshold`` in the dtype of the scores.

    Raises:
      ValueError: The threshold does not broadcast to the shape of the scores.
    """
    threshold = jnp.asarray(threshold, scores.dtype)
    shape = (1,) * (scores.ndim - threshold.ndim) + threshold.shape
    matches = [size in (1, n) for size, n in zip(shape, scores.shape, strict=False)]
    if len(shape) != scores.ndim or not all(matches):
        raise ValueError(
            f"{name} must be a number, or broadcast to the shape of scores, "
            f"{scores.shape}; got shape {threshold.shape}. Pass one number."
        )
    return scores - threshold


def divide_by_temperature(differences: Array, temperature: ArrayLike) -> Array:
    """Returns ``differences / temperature``, clipped to numbers that are finite."""
    temperature = jnp.asarray(temperature, differences.dtype)
    # The derivative contains the square of the divisor, which may leave the range.
    unit = power_of_two_below(without_derivative(temperature))
    limit = 0.25 * jnp.finfo(differences.dtype).max  # so differences stay finite
    return jnp.clip(differences / unit, -limit, limit) / (temperature / unit)


@jax.custom_jvp
def sigmoid_at(differences: Array, temperature: Array) -> Array:
    """Returns the sigmoid of ``differences / temperature``.

    The derivative is 0 where the quotient overflows, which the derivative of a division
    would make NaN.
    """
    return jax.nn.sigmoid(differences / temperature)


@sigmoid_at.defjvp
def _sigmoid_at_jvp(primals, tangents):
    differences, temperature = primals
    differences_tangent, temperature_tangent = tangents
    value = sigmoid_at(differences, temperature)
    slope = value * (1 - value) / temperature
    quotient = jnp.clip(differences / temperature, -MAX_QUOTIENT, MAX_QUOTIENT)
    return value, slope * (differences_tangent - quotient * temperature_tangent)


def softmax_at(scores: Array, temperature: ArrayLike) -> Array:
    """Returns the softmax of ``scores / temperature`` over the last axis.

    The largest score is subtracted first, because differences are exact where quotients
    are not.
    """
    top = jnp.max(without_derivative(scores), axis=-1, keepdims=True)
    return jax.nn.softmax(divide_by_temperature(scores - top, temperature), axis=-1)


def weighted_mean(values: Array, weights: Array) -> Scalar:
    """Returns the weighted mean of all values, or 0 if the weights sum to 0."""
    return safe_divide(jnp.sum(weights * values), jnp.sum(weights))


def safe_divide(
    numerator: Array, denominator: Array, min_denominator: ArrayLike = 0
) -> Array:
    """Returns the quotient, or 0 if the denominator is 0, NaN if it is NaN.

    A positive denominator below ``min_denominator`` is replaced by it, because it and
    the numerator then are rounding errors of 0.
    """
    # The divisor is replaced before the division, so that no derivative is NaN.
    is_zero = denominator <= 0
    divisor = jnp.where(is_zero, 1, jnp.maximum(denominator, min_denominator))
    # The derivative contains the square of the divisor, which may leave the range, and
    # XLA writes (a / u) / (b / u) as a u / (b u). Factors stay where they are.
    unit = power_of_two_below(without_derivative(divisor))
    factor = 1 / jnp.minimum(unit, 1 / jnp.finfo(unit.dtype).tiny)
    return jnp.where(is_zero, 0, numerator * factor) / (divisor * factor)


def negligible_weight(weights: Array) -> Scalar:
    """Returns the rounding error of the smallest positive weight.

    A weighted sum of sigmoids below it consists of their tails.
    """
    weights = without_derivative(weights)
    min_weight = jnp.min(jnp.where(weights > 0, weights, jnp.inf))
    limits = jnp.finfo(weights.dtype)
    rounding_error = limits.eps * jnp.where(jnp.isfinite(min_weight), min_weight, 1)
    return jnp.maximum(rounding_error, limits.tiny)


def propagate_nan(values: Array, inputs: Array) -> Array:
    """Returns the values, or NaN, gradient included, for NaN along the last axis.

    A sum of products is not enough, because XLA replaces NaN times a false comparison
    by 0.
    """
    # 0, or NaN for NaN; the product has it as its derivative.
    zeros = 0 * without_derivative(inputs)
    return values + jnp.sum(zeros * inputs, axis=-1)
