"""Search for equal optimizers, so that a compiled program is used again.

Optimizers are static arguments of compiled programs, and JAX compares those by ``==``.
Two results of ``optax.adam(0.1)`` are tuples of different functions, so that a call
with an optimizer written in place would be compiled every time.
"""

import dataclasses
import functools
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import optax

T = TypeVar("T")

MAX_OPTIMIZERS = 256


class _UnknownContentError(Exception):
    """A function closes over something without a key, such as an array or a dict."""


@dataclasses.dataclass(frozen=True)
class _Content:
    """An optimizer that is compared by the key of its content."""

    key: Any
    optimizer: Any = dataclasses.field(compare=False)


def first_equal(optimizer: T) -> T:
    """Returns the first optimizer with the same content, or the given one.

    Functions of optax have the same content if they have the same code and close over
    the same content. Any other function, such as a schedule written by a user, equals
    only itself. An optimizer that closes over an array or over a dict or list, which
    may change, is returned as it is. So is anything that is neither a transformation
    nor a function of optax.

    >>> import optax
    >>> first_equal(optax.adam(0.1)) is first_equal(optax.adam(0.1))
    True
    >>> first_equal(optax.adam(0.1)) is first_equal(optax.adam(0.2))
    False
    """
    if not (
        isinstance(optimizer, optax.GradientTransformation) or _is_of_optax(optimizer)
    ):
        return optimizer
    try:
        content = _Content(_key_of(optimizer, ()), optimizer)
    except _UnknownContentError:
        return optimizer
    return _first_optimizer(content)


@functools.lru_cache(MAX_OPTIMIZERS)
def _first_optimizer(content: _Content) -> Any:
    """Returns the optimizer of the first content with an equal key."""
    return content.optimizer


def _key_of(value: Any, parents: tuple[int, ...]) -> Any:
    """Returns a hashable key that only values with the same content have.

    Args:
      value: A constant, function or tuple inside of an optimizer.
      parents: Identities of the values that contain it.
    """
    if id(value) in parents:
        raise _UnknownContentError  # A function that refers to itself.
    kind = type(value)
    key_of = functools.partial(_key_of, parents=(*parents, id(value)))
    if kind in (type(None), bool, int, str) or isinstance(value, np.dtype):
        return kind, value
    if kind is float:
        return kind, value.hex()  # Unlike == it distinguishes 0.0 from -0.0.
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if isinstance(value, tuple):
        return kind, *map(key_of, value)
    if kind is functools.partial:
        keywords = tuple(value.keywords.items())
        return kind, key_of(value.func), key_of(value.args), key_of(keywords)
    if _is_of_optax(value):
        return kind, value.__code__, *map(key_of, _contents_of(value))
    if isinstance(value, type) or kind is FunctionType:
        return value  # Both are compared by identity.
    raise _UnknownContentError


def _is_of_optax(value: Any) -> bool:
    """True for a function that was written in optax."""
    if type(value) is not FunctionType:
        return False
    # Not `__module__`, which `functools.wraps` copies to functions of others.
    return value.__globals__.get("__name__", "").split(".")[0] == "optax"


def _contents_of(function: Any) -> tuple[Any, ...]:
    """Returns all that the result of a call depends on besides its code."""
    try:
        cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    except ValueError as error:  # A variable without a value.
        raise _UnknownContentError from error
    keyword_defaults = tuple((function.__kwdefaults__ or {}).items())
    attributes = tuple(function.__dict__.items())
    return cells, function.__defaults__, keyword_defaults, attributes
