"""BibTeX of exactly what was combined.

A class or function lists its sources in an attribute ``citations``, a tuple of keys of
``references.bib``. In a dataclass it is written without annotation, so that it is not a
field.
"""

import dataclasses
import difflib
import importlib
import re
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable)

#: Entry to cite for an object of another library, by its top-level package.
PACKAGES = {
    "optax": "deepmind2020jax",
    "lineax": "lineax2023",
    "optimistix": "optimistix2024",
    "jaxopt": "blondel2022",
    "evosax": "lange2022",
}


#: Packages whose public names `find_public` knows besides those of `hypergrad`.
CITED_PACKAGES = ("searchers", "surrogates", "objectives", "spaces")


def _read_references() -> dict[str, str]:
    """Returns the entries of ``references.bib`` by key."""
    text = resources.files("hypergrad").joinpath("references.bib").read_text("utf-8")
    keys = re.findall(r"^@\w+\{([^,]+),", text, re.MULTILINE)
    return dict(zip(keys, text.strip().split("\n\n"), strict=True))


REFERENCES = _read_references()


def find_public(name: str) -> Any:
    """Returns a public class or function by its name.

    It is looked up in `hypergrad`, then in the packages of searchers, surrogates,
    objectives and spaces. The name of one of these may stand before it.

    Raises:
      ValueError: There is none; the message lists similar names.

    >>> find_public("SOBA").__name__, find_public("searchers.TPE").__name__
    ('SOBA', 'TPE')
    """
    library = importlib.import_module("hypergrad")
    objects = {key: getattr(library, key) for key in library.__all__}
    for package_name in CITED_PACKAGES:
        package = getattr(library, package_name)
        for key in package.__all__:
            objects.setdefault(key, getattr(package, key))
            objects[f"{package_name}.{key}"] = getattr(package, key)
    objects = {key: value for key, value in objects.items() if callable(value)}
    if name in objects:
        return objects[name]
    similar = difflib.get_close_matches(name, objects)
    hint = f" Similar names: {', '.join(similar)}." if similar else ""
    raise ValueError(f"there is no public class or function {name!r} to cite.{hint}")


def citation(*objects: Any) -> str:
    """Returns the BibTeX of ``hypergrad`` and of everything the objects are made of.

    Args:
      *objects: Estimators, solvers, optimizers and so on: instances, with all that
        their fields and containers hold, classes or functions.

    Returns:
      Entries separated by blank lines: that of hypergrad, then the others in the order
      in which they are first met, each once.

    Raises:
      KeyError: A class lists a key that ``references.bib`` lacks.
      TypeError: ``citations`` is not a tuple of keys.

    >>> print(citation())
    @software{hypergrad,
      author = {{The hypergrad authors}},
      title = {hypergrad: hypergradients in {JAX}},
      note = {Python package hypergrad-jax},
    }
    """
    keys = dict.fromkeys(["hypergrad", *_citation_keys(objects, set())])
    return "\n\n".join(REFERENCES[key] for key in keys)


def cites(*keys: str) -> Callable[[Function], Function]:
    """Returns a decorator that sets the ``citations`` of a function.

    >>> @cites("liu1989")
    ... def method(): ...
    >>> method.citations
    ('liu1989',)
    """

    def decorate(function: Function) -> Function:
        setattr(function, "citations", keys)  # noqa: B010 - pyright rejects `.citations =`
        return function

    return decorate


def _citation_keys(value: Any, visited: set[int]) -> Iterator[str]:
    """Yields keys in depth-first order: an object's own before those of its parts."""
    if id(value) in visited:
        return
    visited.add(id(value))
    owner = value if isinstance(value, type) else type(value)
    keys = getattr(value, "citations", ())
    if not isinstance(keys, tuple):
        raise TypeError(
            f"{owner.__qualname__}.citations must be a tuple of keys; got {keys!r}."
        )
    for key in keys:
        if key not in REFERENCES:
            raise KeyError(
                f"{owner.__qualname__}.citations must hold keys of references.bib; got "
                f"{key!r}. Add its entry there."
            )
        yield key
    package = str(getattr(value, "__module__", "")).partition(".")[0]
    if package in PACKAGES:
        yield PACKAGES[package]
    for component in _components(value):
        yield from _citation_keys(component, visited)


def _components(value: Any) -> list:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [getattr(value, name) for name in names if hasattr(value, name)]
    return []
