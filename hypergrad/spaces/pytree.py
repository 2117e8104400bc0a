"""Spaces over a pytree: each leaf of ``alpha`` in its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ..runtime.devices import replicate
from .continuous import Real, Space


def forward(space: PyTree, u: PyTree) -> PyTree:
    """``alpha`` from ``u``, leaf by leaf.

    Args:
      space: pytree of spaces, like ``u`` or a prefix of it; None is ``Real()``.
      u: any pytree of arrays.

    Raises:
      ValueError: structures or shapes do not match.
      TypeError: a leaf of ``space`` is not a space.

    >>> from hypergrad.spaces import Positive
    >>> float(forward({"a": Positive(), "b": None}, {"a": 0.0, "b": 3.0})["a"])
    1.0
    """
    return _map("forward", space, u)


def inverse(space: PyTree, alpha: PyTree) -> PyTree:
    """``u`` from ``alpha``; arguments and errors as ``forward``.

    >>> from hypergrad.spaces import Unit
    >>> float(inverse([Unit()], [0.5])[0])
    0.0
    """
    return _map("inverse", space, alpha)


def project(space: PyTree, u: PyTree) -> PyTree:
    """The nearest admissible ``u``; arguments and errors as ``forward``.

    >>> import jax.numpy as jnp
    >>> from hypergrad.spaces import Box
    >>> project(Box(0.0, 1.0), jnp.array([-1.0, 0.5])).tolist()
    [0.0, 0.5]
    """
    return _map("project", space, u)


def contains(space: PyTree, alpha: PyTree) -> PyTree:
    """Booleans like ``alpha``; arguments and errors as ``forward``.

    >>> import jax.numpy as jnp
    >>> from hypergrad.spaces import Unit
    >>> contains(Unit(), jnp.array([0.5, 2.0])).tolist()
    [True, False]
    """
    return _map("contains", space, alpha)


def sample(space: PyTree, key: Array) -> PyTree:
    """A random ``alpha``, each leaf of its space's ``shape``.

    Raises:
      ValueError: a space is unbounded.

    >>> from hypergrad.spaces import Unit
    >>> sample({"weights": Unit(shape=(2, 3))}, jax.random.key(0))["weights"].shape
    (2, 3)
    """
    kinds, structure = spaces_of(space)
    keys = jax.random.split(key, max(len(kinds), 1))
    drawn = [kind.sample(key) for kind, key in zip(kinds, keys, strict=True)]
    return structure.unflatten(drawn)


def spaces_of(space: PyTree) -> tuple[list[Any], Any]:
    """The spaces of the leaves, and the structure of ``alpha``; None is ``Real()``.

    >>> from hypergrad.spaces import Unit
    >>> spaces_of({"a": Unit()})[0] == [Unit()]
    True
    """
    kinds, structure = jax.tree.flatten(space, is_leaf=_is_space)
    _refuse_others(space)
    return [Real() if kind is None else kind for kind in kinds], structure


def check(space: PyTree, alpha: PyTree) -> None:
    """Refuses an ``alpha`` of another shape or outside its space, or an infinite ``u``.

    Tracers are passed over; errors as ``forward``, naming the leaf.

    >>> from hypergrad.spaces import Positive
    >>> check({"rate": Positive()}, {"rate": -1.0})
    Traceback (most recent call last):
    ValueError: alpha['rate'] is -1.0, but Positive() allows finite values above 0; ...
    """
    kinds, leaves, _ = _pair(space, alpha)
    paths = [path for path, _ in jax.tree.leaves_with_path(alpha)]
    for kind, leaf, path in zip(kinds, leaves, paths, strict=True):
        name = f"alpha{jax.tree_util.keystr(path)}"
        shape = getattr(kind, "shape", ())
        if shape and shape != jnp.shape(leaf):
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)}, and its space {kind} is of shape "
                f"{shape}; give both one shape, or the space none"
            )
        try:
            inside = kind.interior(leaf)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        inside = replicate(inside)
        if isinstance(inside, Tracer) or np.all(inside):
            continue
        leaf = replicate(leaf)
        index = tuple(np.argwhere(~np.asarray(inside))[0].tolist())
        raise ValueError(
            f"{name}{list(index) or ''} is {np.asarray(leaf)[index]}, but {kind} "
            f"allows {kind.allowed}; start from such a value, or declare another space"
        )


def _map(method, space, tree):
    kinds, leaves, structure = _pair(space, tree)
    pairs = zip(kinds, leaves, strict=True)
    return structure.unflatten([getattr(kind, method)(x) for kind, x in pairs])


def _pair(space, tree):
    """One space for each leaf of ``tree``, its leaves and its structure."""
    kinds, prefix = jax.tree.flatten(space, is_leaf=_is_space)
    _refuse_others(space)
    leaves, structure = jax.tree.flatten(tree)
    try:
        subtrees = prefix.flatten_up_to(tree)
    except ValueError:
        raise ValueError(
            f"space must have the structure of alpha or be a prefix of it, got space "
            f"{prefix} and alpha {structure}; give one space for each leaf, or one for "
            "a whole subtree"
        ) from None
    spread = [
        Real() if kind is None else kind
        for kind, subtree in zip(kinds, subtrees, strict=True)
        for _ in jax.tree.leaves(subtree)
    ]
    return spread, leaves, structure


def _is_space(x: Any) -> bool:
    return x is None or (isinstance(x, Space) and not isinstance(x, type))


def _refuse_others(space: PyTree) -> None:
    for path, kind in jax.tree.leaves_with_path(space, is_leaf=_is_space):
        if not _is_space(kind):
            is_class = isinstance(kind, type)
            hint = f"write {kind.__name__}()" if is_class else "see hg.spaces"
            raise TypeError(
                f"space{jax.tree_util.keystr(path)} must be a space such as "
                f"Positive(), got {kind!r} of type {type(kind).__name__}; {hint}"
            )
