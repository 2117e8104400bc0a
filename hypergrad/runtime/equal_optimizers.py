"""Search for equal optimizers, so that a compiled program is used again.

Optimizers are static arguments of compiled programs, and JAX compares those by ``==``.
Two results of ``optax.adam(0.1)`` are tuples of different functions, so that a call
with an optimizer written in place would be compiled every time.
"""

import dataclasses
import functools
from types import CellType, FunctionType
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import optax

T = TypeVar("T")

MAX_OPTIMIZERS = 256
_NO_VALUE = object()  # of a variable that a function of optax does not need


class _UnknownContentError(Exception):
    """A function closes over something without a key, such as an array."""


@dataclasses.dataclass(frozen=True)
class _Content:
    """An optimizer that is compared by the key of its content."""

    key: Any
    optimizer: Any = dataclasses.field(compare=False)


def first_equal(optimizer: T) -> T:
    """Returns the first optimizer with the same content, or the given one.

    Functions of optax have the same content if they have the same code and close over
    the same content. An optimizer that contains an array is returned as it is, and so
    is one that contains what may change before another program is traced: a dict, a
    list, or a function that is not of optax. Anything that is neither a transformation
    nor a function of optax is returned, too.

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
        if getattr(value, "__dict__", None):  # A subclass with further content.
            raise _UnknownContentError
        return kind, *map(key_of, value)
    if isinstance(value, functools.partial):
        keywords = tuple(value.keywords.items())
        return kind, key_of(value.func), key_of(value.args), key_of(keywords)
    if _is_of_optax(value):
        # Equal code in two modules may use different globals.
        module = value.__globals__["__name__"]
        return kind, module, value.__code__, *map(key_of, _contents_of(value))
    if isinstance(value, type | jnp.ufunc) or value is _NO_VALUE:
        return value  # These are compared by identity, and never change.
    raise _UnknownContentError


def _is_of_optax(value: Any) -> bool:
    """True for a function that was written in optax."""
    if type(value) is not FunctionType:
        return False
    # Not `__module__`, which `functools.wraps` copies to functions of others.
    return value.__globals__.get("__name__", "").split(".")[0] == "optax"


def _contents_of(function: Any) -> tuple[Any, ...]:
    """Returns all that the result of a call depends on besides its code.

    The schedule of `optax.cosine_decay_schedule` replaces an int in its closure by the
    equal float when it is first called. Both contents then lead to the first optimizer
    with them.
    """
    cells = tuple(map(_value_of, function.__closure__ or ()))
    keyword_defaults = tuple((function.__kwdefaults__ or {}).items())
    attributes = tuple(function.__dict__.items())
    return cells, function.__defaults__, keyword_defaults, attributes


def _value_of(cell: CellType) -> Any:
    """Returns what a variable of a closure contains."""
    try:
        return cell.cell_contents
    except ValueError:
        return _NO_VALUE
