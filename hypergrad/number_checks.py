"""Checks and converters of numbers: counts, and fields that hold a number as data."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .runtime.equal_optimizers import first_equal


def check_positive_int(
    name: str, value: int | None, minimum: int = 1, *, optional: bool = False
) -> None:
    """Raises ValueError unless a static count is an integer of at least ``minimum``."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        is_whole = isinstance(value, float) and value.is_integer() and value >= minimum
        is_whole |= isinstance(value, np.integer) and value >= minimum
        remedy = f" Write {value:.0f}." if is_whole else ""
        raise ValueError(
            f"{name} must be an integer of at least {minimum}; got {value!r}.{remedy}"
        )


def float_converter(name: str, *, optional: bool = True) -> Callable[[Any], Any]:
    """Returns a converter for a field that holds a number as data.

    Integers become floats, so that 1 and 2.0 run the same program. Arrays are passed
    unchanged, because they may be traced.

    Args:
      name: Name of the field, for error messages.
      optional: Whether None is accepted.
    """

    def convert(value: Any) -> Any:
        if optional and value is None:
            return value
        # NumPy's float64 is a Python float, but another type to JAX.
        if isinstance(value, float | int) and not isinstance(value, bool):
            return float(value)
        dtype = getattr(value, "dtype", None)
        kinds = jnp.floating, jnp.integer
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            remedy = " Write jnp.array(...)." if isinstance(value, list | tuple) else ""
            raise TypeError(
                f"{name} must be a real number or an array; got {type(value).__name__} "
                f"{value!r}.{remedy}"
            )
        is_integer = jnp.issubdtype(dtype, jnp.integer)
        return float(value) if is_integer and isinstance(value, np.generic) else value

    return convert


def finite(
    name: str, *, optional: bool = False, allow_array: bool = False
) -> Callable[[Any], Any]:
    """Returns a converter for a field that holds a finite number, or an array."""
    return _range_converter(name, "finite", np.isfinite, optional, allow_array)


def positive(
    name: str, *, optional: bool = False, allow_inf: bool = False
) -> Callable[[Any], Any]:
    """Returns a converter for a field that holds a finite number above 0.

    With ``allow_inf`` the number may be infinity.
    """
    requirement = "above 0" if allow_inf else "above 0 and finite"
    is_within = lambda x: (x > 0) & (allow_inf | np.isfinite(x))
    return _range_converter(name, requirement, is_within, optional)


def non_negative(
    name: str,
    *,
    optional: bool = False,
    allow_array: bool = False,
    allow_inf: bool = False,
) -> Callable[[Any], Any]:
    """Returns a converter for a field that holds a finite number of at least 0.

    With ``allow_array`` it may hold an array of such numbers, and with ``allow_inf``
    infinity.
    """
    requirement = "at least 0" if allow_inf else "at least 0 and finite"
    is_within = lambda x: (x >= 0) & (allow_inf | np.isfinite(x))
    return _range_converter(name, requirement, is_within, optional, allow_array)


def in_unit_interval(name: str) -> Callable[[Any], Any]:
    """Returns a converter for a field that holds a number in [0, 1]."""
    return _range_converter(name, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))


def positive_up_to(name: str, upper: float) -> Callable[[Any], Any]:
    """Returns a converter for a field that holds a number in (0, upper]."""
    return _range_converter(name, f"in (0, {upper}]", lambda x: (x > 0) & (x <= upper))


def below_one(name: str) -> Callable[[Any], Any]:
    """Returns a converter for a field that holds a number in [0, 1)."""
    return _range_converter(name, "in [0, 1)", lambda x: (x >= 0) & (x < 1))


def or_schedule(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns the converter extended to schedules ``step -> number``."""
    return lambda value: first_equal(value) if callable(value) else convert(value)


def boolean(name: str, *, optional: bool = False) -> Callable[[Any], Any]:
    """Returns a converter for a static field that holds True or False, or None."""

    def convert(value: Any) -> bool | None:
        if optional and value is None:
            return None
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False; got {value!r}.")
        return bool(value)

    return convert


def _range_converter(
    name: str,
    requirement: str,
    is_within: Callable[[np.ndarray], Any],
    optional: bool = False,
    allow_array: bool = False,
) -> Callable[[Any], Any]:
    to_number = float_converter(name, optional=optional)

    def convert(value: Any) -> Any:
        value = to_number(value)
        shape = np.shape(value)
        if shape and not allow_array:
            raise ValueError(f"{name} must be a single number; got shape {shape}.")
        is_concrete = value is not None and not isinstance(value, Tracer)
        if is_concrete and not np.all(is_within(np.asarray(value))):
            raise ValueError(f"{name} must be {requirement}; got {value!r}.")
        return value

    return convert
