"""BibTeX of exactly what was combined.

A class, or a function, says what it rests on by an attribute ``citations``: a tuple of
keys of ``bibliography.BIBTEX`` (in a dataclass without annotation, so that it is no
field).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .bibliography import BIBTEX

Function = TypeVar("Function", bound=Callable)

#: What to cite where an object of another library is passed, by its top package.
_PACKAGES = {
    "optax": "deepmind2020jax",
    "lineax": "lineax2023",
    "optimistix": "optimistix2024",
    "jaxopt": "blondel2022",
    "evosax": "lange2022",
}


def citation(*objects: Any) -> str:
    """The BibTeX of ``hypergrad`` and of whatever the objects are made of.

    Args:
      *objects: estimators, solvers, optimizers...: instances, with all that their
        fields and containers hold, classes or functions.

    Returns:
      Entries separated by blank lines: hypergrad's own, then the others in the order in
      which they are first met, each once.

    Raises:
      KeyError: a class carries a key that ``BIBTEX`` lacks.
      TypeError: ``citations`` is not a tuple of keys.

    >>> print(citation())
    @software{hypergrad,
      author = {{The hypergrad authors}},
      title = {hypergrad: hypergradients in {JAX}},
      note = {Python package hypergrad-jax},
    }
    """
    found = dict.fromkeys(["hypergrad", *_keys(objects, set())])
    return "\n\n".join(BIBTEX[key] for key in found)


def cites(*keys: str) -> Callable[[Function], Function]:
    """Gives a function its ``citations``.

    >>> @cites("liu1989")
    ... def method(): ...
    >>> method.citations
    ('liu1989',)
    """

    def given(function: Function) -> Function:
        # pyright knows no attributes of a function, hence not by a dot.
        setattr(function, "citations", keys)  # noqa: B010 - see above
        return function

    return given


def _keys(thing: Any, seen: set[int]) -> Iterator[str]:
    """Keys in depth-first order; an object's own before those of its fields."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    owner = thing if isinstance(thing, type) else type(thing)
    own = getattr(thing, "citations", ())
    if not isinstance(own, tuple):
        raise TypeError(
            f"{owner.__qualname__}.citations must be a tuple of keys, got {own!r}"
        )
    for key in own:
        if key not in BIBTEX:
            raise KeyError(
                f"{key!r}, carried by {owner.__qualname__}, is not in "
                "hypergrad.bibliography.BIBTEX; add its entry there"
            )
        yield key
    package = str(getattr(thing, "__module__", "")).partition(".")[0]
    if package in _PACKAGES:
        yield _PACKAGES[package]
    for part in _parts(thing):
        yield from _keys(part, seen)


def _parts(thing: Any) -> list:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, tuple | list):
        return list(thing)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        names = [field.name for field in dataclasses.fields(thing)]
        return [getattr(thing, name) for name in names if hasattr(thing, name)]
    return []
