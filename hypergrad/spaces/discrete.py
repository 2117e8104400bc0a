"""Spaces of integers and choices, which have no derivative: only for `search`."""

import contextlib
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from .base import BoundedSpace, as_shape


def _raise_not_differentiable(self: Any, x: Any) -> NoReturn:
    """Raises ValueError, because no unconstrained variable exists."""
    raise ValueError(
        f"space must have a derivative to be used in minimize; got {self}. Use "
        "hg.search, or relax the choice: mix the values by weights over Simplex(), or "
        "sample them by logits with hg.spaces.straight_through or "
        "hg.spaces.score_function."
    )


class Integer(BoundedSpace):
    """Integers from ``low`` to ``high``, both included; only for `search`.

    Args:
      low, high: Python integers of 32 bits with ``low < high``, such that there are
        fewer than 2^31 values. Static.
      shape: Shape of the leaf. Defaults to ``()``.

    Raises:
      TypeError: A bound is not an integer.
      ValueError: The bounds are out of order or too far apart. `forward`, `inverse` and
        `project` always raise it.

    >>> Integer(1, 3).contains(jnp.array([0, 1, 3])).tolist()
    [False, True, True]
    """

    low: int = eqx.field(static=True)
    high: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(
        static=True, default=(), kw_only=True, converter=as_shape
    )

    requirement = "an integer from low to high"
    ordered = True
    forward = inverse = project = _raise_not_differentiable

    def __check_init__(self):
        for name, bound in (("low", self.low), ("high", self.high)):
            if not isinstance(bound, int) or isinstance(bound, bool):
                raise TypeError(f"{name} must be an integer; got {bound!r}.")
        if not self.low < self.high:
            raise ValueError(f"low must be below high; got {self}.")
        max_int = int(np.iinfo(np.int32).max)
        if not -max_int <= self.low <= self.high < max_int:
            raise ValueError(
                f"low and high must be integers of 32 bits; got {self}. Let alpha be "
                "an exponent or a multiple, as in 2**alpha."
            )
        if self.num_values > max_int:
            raise ValueError(
                f"high - low + 1, the number of values, must be below 2^31; got {self}."
                " Let alpha be an exponent or a multiple, as in 2**alpha."
            )

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for whole numbers with ``low <= alpha <= high``."""
        alpha = jnp.asarray(alpha)
        is_whole = alpha == jnp.floor(alpha)
        return (self.low <= alpha) & (alpha <= self.high) & is_whole

    is_interior = contains

    def sample(self, key: Array) -> Array:
        """Returns uniform samples."""
        return jax.random.randint(key, self.shape, self.low, self.high + 1)

    @property
    def num_values(self) -> int:
        """Number of integers, ``high - low + 1``."""
        return self.high - self.low + 1

    def from_unit(self, t: ArrayLike) -> Array:
        """Returns ``low + floor(t n)``, so that n cells of equal size divide [0, 1]."""
        return self.low + _cell_index(t, self.num_values)

    def to_unit(self, alpha: Array) -> Array:
        """Returns the center of the cell."""
        return (alpha - self.low + 0.5) / self.num_values


class Choice(BoundedSpace):
    """A choice among several numbers without an order; only for `search`.

    Args:
      values: The numbers, all different, or their count: n stands for 0, ..., n - 1.
        Static. To choose between other things, choose an index and use it in the losses
        as ``jax.lax.switch(alpha, functions)`` or ``table[alpha]``.
      shape: Shape of the leaf, of which each entry is a choice. Defaults to ``()``.

    Raises:
      TypeError: A value is not a number.
      ValueError: Fewer than two values are given, a value is repeated, or in a search
        the dtype of the values cannot hold them. `forward`, `inverse` and `project`
        always raise it.

    >>> Choice([16, 32, 64]).contains(jnp.array([16, 48])).tolist()
    [True, False]
    >>> Choice(2).values
    (0, 1)
    """

    values: tuple[float, ...] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(
        static=True, default=(), kw_only=True, converter=as_shape
    )

    requirement = "one of its values"
    ordered = False
    forward = inverse = project = _raise_not_differentiable

    def __init__(
        self, values: ArrayLike | Sequence[float], *, shape: tuple[int, ...] = ()
    ):
        if isinstance(values, int | np.integer):
            values = range(values)
        numbers: list[Any] = [values]
        with contextlib.suppress(ValueError):  # of lists of several lengths
            numbers = np.atleast_1d(np.asarray(values)).tolist()
        for number in numbers:
            if not isinstance(number, int | float) or not math.isfinite(number):
                raise TypeError(
                    f"values must be finite numbers or their count; got {number!r}. To "
                    "choose between other things, use Choice(n) and, in the losses, "
                    "jax.lax.switch(alpha, functions)."
                )
        if len(set(numbers)) < max(len(numbers), 2):
            raise ValueError(
                f"values must be at least two different numbers; got {numbers}."
            )
        self.values = tuple(numbers)
        self.shape = as_shape(shape)

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for numbers equal to a value, rounded to the dtype."""
        alpha = jnp.asarray(alpha)
        return functools.reduce(operator.or_, [alpha == x for x in self.values])

    is_interior = contains

    def sample(self, key: Array) -> Array:
        """Returns uniform samples."""
        return jax.random.choice(key, self._as_array(), self.shape)

    @property
    def num_values(self) -> int:
        """Number of values."""
        return len(self.values)

    def from_unit(self, t: ArrayLike) -> Array:
        """Returns the value of index ``floor(t n)``: n cells divide [0, 1]."""
        return self._as_array()[_cell_index(t, self.num_values)]

    def to_unit(self, alpha: Array) -> Array:
        """Returns the center of the cell of the value, or else of the nearest one."""
        alpha = jnp.asarray(alpha)
        is_value = jnp.stack([alpha == value for value in self.values])
        numbers = alpha.astype(float)  # booleans have no difference
        distances = jnp.stack([jnp.abs(numbers - value) for value in self.values])
        # Integers above 2^24 are equal as floats.
        distances = jnp.where(is_value, -1.0, distances)
        return (jnp.argmin(distances, axis=0) + 0.5) / self.num_values

    def _as_array(self) -> Array:
        """Returns the values; raises ValueError if their dtype cannot hold them."""
        try:
            with np.errstate(over="ignore"):
                array = jnp.asarray(self.values)
                values = np.asarray(self.values).astype(array.dtype)
        except OverflowError as error:
            raise ValueError(
                f"values must be integers of 32 bits; got {self}. Let alpha be an "
                "exponent or an index, as in 2**alpha or table[alpha], or call "
                "jax.config.update('jax_enable_x64', True)."
            ) from error
        # The array is traced inside jit; the values are not.
        if len(np.unique(values)) < len(values) or not np.isfinite(values).all():
            raise ValueError(
                f"values must be different numbers of {values.dtype}; got {self}. Let "
                "alpha be an index, as in table[alpha], or call "
                "jax.config.update('jax_enable_x64', True)."
            )
        return array


def _cell_index(t: ArrayLike, num_values: int) -> Int[Array, "..."]:
    """Returns which of ``num_values`` equal parts of [0, 1] contains ``t``."""
    # Searchers pass arrays of NumPy. Most of them are of float64, which has enough
    # digits for all cells, and which JAX would convert to float32. The last cell may be
    # no number of float32, so that it is compared as an integer.
    if isinstance(t, np.ndarray | np.floating | float):
        cell = np.floor(np.asarray(t, np.float64) * num_values).astype(np.int64)
        return jnp.asarray(np.clip(cell, 0, num_values - 1), jnp.result_type(int))
    cell = jnp.floor(jnp.asarray(t) * num_values).astype(jnp.result_type(int))
    cell = jnp.where(jnp.asarray(t) < 1, cell, num_values - 1)
    return jnp.clip(cell, 0, num_values - 1)
