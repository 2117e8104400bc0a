"""Spaces of integers and choices: for `search`, since they have no derivative."""

import functools
import math
import operator
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike


def _no_derivative(self, x):
    """Raises ValueError: there is no unconstrained variable to step on."""
    raise ValueError(
        f"{self} has no derivative and no unconstrained variable: use hg.search, or "
        "relax it for hg.minimize: mix the values by weights over Simplex(), or sample "
        "them by logits, with hg.spaces.straight_through or hg.spaces.score_function"
    )


class Integer(eqx.Module):
    """Integers from low to high, both included, for `search` alone.

    Args:
      low, high: Python integers, low < high. Static.
      shape: of the leaf, for `sample`.

    Raises:
      TypeError: bounds that are no integers.
      ValueError: bounds out of order; any map to or from an unconstrained variable.

    >>> Integer(1, 3).contains(jnp.array([0, 1, 3])).tolist()
    [False, True, True]
    """

    low: int = eqx.field(static=True)
    high: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True, default=(), kw_only=True)

    allowed = "integers from low to high"
    ordered = True
    forward = inverse = project = _no_derivative

    def __check_init__(self):
        for name, bound in (("low", self.low), ("high", self.high)):
            if not isinstance(bound, int) or isinstance(bound, bool):
                raise TypeError(f"{name} must be an integer, got {bound!r}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self}")

    def contains(self, alpha):
        """``low <= alpha <= high``, without a fraction."""
        alpha = jnp.asarray(alpha)
        whole = alpha == jnp.floor(alpha)
        return (self.low <= alpha) & (alpha <= self.high) & whole

    interior = contains

    def sample(self, key, shape=None, dtype=None):
        """Uniform."""
        shape = self.shape if shape is None else shape
        dtype = dtype or jnp.result_type(int)
        return jax.random.randint(key, shape, self.low, self.high + 1, dtype)

    @property
    def unit_shape(self):
        """As the leaf's."""
        return self.shape

    @property
    def num_values(self):
        """``high - low + 1``."""
        return self.high - self.low + 1

    def from_unit(self, t):
        """``low + floor(t n)``: n cells of equal size."""
        return self.low + _cell(t, self.num_values)

    def to_unit(self, alpha):
        """The middle of the cell."""
        return (alpha - self.low + 0.5) / self.num_values


class Choice(eqx.Module):
    """One of a few numbers, in no order, for `search` alone.

    Args:
      values: the numbers, all different; or how many: n stands for 0, ..., n - 1.
        Static. To choose between other things, choose an index, and read it in the
        losses by ``jax.lax.switch(alpha, functions)`` or ``table[alpha]``.
      shape: of the leaf, for `sample`: each entry is a choice of its own.

    Raises:
      TypeError: values that are no numbers.
      ValueError: fewer than two values, or a repeated one; any map to or from an
        unconstrained variable.

    >>> Choice([16, 32, 64]).contains(jnp.array([16, 48])).tolist()
    [True, False]
    >>> Choice(2).values
    (0, 1)
    """

    values: tuple[float, ...] = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True, default=(), kw_only=True)

    allowed = "its values"
    ordered = False
    forward = inverse = project = _no_derivative

    def __init__(
        self, values: ArrayLike | Sequence[float], *, shape: tuple[int, ...] = ()
    ):
        if isinstance(values, int):
            values = range(values)
        listed = np.atleast_1d(np.asarray(values)).tolist()
        for value in listed:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise TypeError(
                    f"values must be finite numbers, or how many, got {value!r}; to "
                    "choose between other things write Choice(n), and in the losses "
                    "jax.lax.switch(alpha, functions)"
                )
        if len(set(listed)) < max(len(listed), 2):
            raise ValueError(
                f"values must be at least two, all different, got {listed}"
            )
        self.values = tuple(listed)
        self.shape = shape

    def contains(self, alpha):
        """Equal to a value, rounded to the leaf's dtype."""
        alpha = jnp.asarray(alpha)
        return functools.reduce(operator.or_, [alpha == x for x in self.values])

    interior = contains

    def sample(self, key, shape=None, dtype=None):
        """Uniform."""
        shape = self.shape if shape is None else shape
        return jax.random.choice(key, jnp.asarray(self.values, dtype), shape)

    @property
    def unit_shape(self):
        """As the leaf's."""
        return self.shape

    @property
    def num_values(self):
        """How many there are."""
        return len(self.values)

    def from_unit(self, t):
        """The value number ``floor(t n)``: n cells of equal size."""
        return jnp.asarray(self.values)[_cell(t, self.num_values)]

    def to_unit(self, alpha):
        """The middle of the cell."""
        distance = [jnp.abs(alpha - value) for value in self.values]
        return (jnp.argmin(jnp.stack(distance), axis=0) + 0.5) / self.num_values


def _cell(t, num_values):
    """Which of ``num_values`` equal parts of [0, 1] holds ``t``."""
    cell = jnp.floor(jnp.asarray(t) * num_values).astype(jnp.result_type(int))
    return jnp.clip(cell, 0, num_values - 1)
