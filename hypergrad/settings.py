"""What setting-holders share: checks of the numbers in them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np


def check_steps(
    name: str, value: int | None, least: int = 1, *, optional: bool = False
) -> None:
    """A static count must be a plain integer of at least ``least``."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name} must be an integer of at least {least}; got {value!r}"
        )


def refuse_changing(name: str, function: Any) -> None:
    """A function that is compared by value and may change, as no program can know."""
    if type(function).__hash__ is None:
        raise TypeError(
            f"{name} is a {type(function).__name__}, which may change, is compared by "
            "value and has no hash: a program compiled for what it was would be run "
            "for what it is; make it a frozen dataclass"
        )


def refuse_optax(name: str, value: Any) -> None:
    """A function of optax's own where one of ``alpha`` belongs: not called yet."""
    if callable(value) and getattr(value, "__module__", "").startswith("optax"):
        called = getattr(value, "__name__", "it")
        raise TypeError(
            f"{name} is optax's function {called}, which would be given alpha; call it "
            f"first, as in optax.{called}(0.1), or write a function alpha -> {name}"
        )


def number(
    name: str, *, optional: bool = True, least: float | None = None
) -> Callable[[Any], Any]:
    """A converter for a setting that is data: a float, an array or, if optional, None.

    Integers become floats, so that 1 and 2.0 run the same program. What is below
    ``least``, or NaN, is refused, but for arrays, which may be traced.
    """

    def convert(value: Any) -> Any:
        if optional and value is None:
            return value
        # NumPy's float64 is a float, of another type to jax.
        if isinstance(value, float | int) and not isinstance(value, bool):
            if least is not None and not value >= least:
                raise ValueError(f"{name} must be at least {least:g}; got {value!r}")
            return float(value)
        dtype, is_list = getattr(value, "dtype", None), isinstance(value, list | tuple)
        if dtype is None or not jnp.issubdtype(dtype, jnp.number):
            raise TypeError(
                f"{name} must be a number or an array; got {type(value).__name__} "
                f"{value!r}" + ("; write jnp.array(...)" if is_list else "")
            )
        is_integer = jnp.issubdtype(dtype, jnp.integer)
        return float(value) if is_integer and isinstance(value, np.generic) else value

    return convert
