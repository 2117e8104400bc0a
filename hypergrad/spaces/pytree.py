"""Spaces over a pytree: one space for each leaf of ``alpha``.

A pytree of spaces is structured like ``alpha`` or is a prefix of it: a space in the
place of a subtree stands for each of its leaves, and None stands for ``Real()``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ..runtime.devices import replicate
from .base import Space
from .continuous import Real


def forward(space: PyTree, u: PyTree) -> PyTree:
    """Returns ``alpha`` for the unconstrained ``u``.

    Args:
      space: Pytree of spaces, structured like ``u`` or a prefix of it.
      u: Pytree of arrays.

    Raises:
      TypeError: A leaf of ``space`` is not a space.
      ValueError: Structures or shapes do not match, or a space has no derivative.

    >>> from hypergrad.spaces import Positive
    >>> float(forward({"a": Positive(), "b": None}, {"a": 0.0, "b": 3.0})["a"])
    1.0
    """
    return _map("forward", space, u)


def inverse(space: PyTree, alpha: PyTree) -> PyTree:
    """Returns the unconstrained ``u`` for ``alpha``; NaN outside the space.

    Args:
      space: Pytree of spaces, structured like ``alpha`` or a prefix of it.
      alpha: Pytree of arrays.

    Raises:
      TypeError, ValueError: As for `forward`.

    >>> from hypergrad.spaces import Unit
    >>> float(inverse([Unit()], [0.5])[0])
    0.0
    """
    return _map("inverse", space, alpha)


def project(space: PyTree, u: PyTree) -> PyTree:
    """Returns the admissible ``u`` nearest to ``u``.

    Args:
      space: Pytree of spaces, structured like ``u`` or a prefix of it.
      u: Pytree of arrays.

    Raises:
      TypeError, ValueError: As for `forward`.

    >>> import jax.numpy as jnp
    >>> from hypergrad.spaces import Box
    >>> project(Box(0.0, 1.0), jnp.array([-1.0, 0.5])).tolist()
    [0.0, 0.5]
    """
    return _map("project", space, u)


def contains(space: PyTree, alpha: PyTree) -> PyTree:
    """Returns booleans structured like ``alpha``: True for each admissible number.

    Args:
      space: Pytree of spaces, structured like ``alpha`` or a prefix of it.
      alpha: Pytree of arrays.

    Raises:
      TypeError, ValueError: As for `forward`.

    >>> import jax.numpy as jnp
    >>> from hypergrad.spaces import Unit
    >>> contains(Unit(), jnp.array([0.5, 2.0])).tolist()
    [True, False]
    """
    return _map("contains", space, alpha)


def sample(space: PyTree, key: Array) -> PyTree:
    """Returns a random ``alpha``; each leaf has the ``shape`` of its space.

    Args:
      space: Pytree of bounded spaces, structured like ``alpha``.
      key: PRNG key.

    Raises:
      TypeError: A leaf of ``space`` is not a space.
      ValueError: A space is unbounded, or there is none.

    >>> from hypergrad.spaces import Unit
    >>> sample({"weights": Unit(shape=(2, 3))}, jax.random.key(0))["weights"].shape
    (2, 3)
    """
    leaf_spaces, structure = flatten_space(space)
    if not leaf_spaces:
        raise ValueError(f"space must have at least one leaf; got {space!r}.")
    keys = jax.random.split(key, len(leaf_spaces))
    samples = [leaf.sample(key) for leaf, key in zip(leaf_spaces, keys, strict=True)]
    return structure.unflatten(samples)


def flatten_space(space: PyTree) -> tuple[list[Any], Any]:
    """Returns the spaces of the leaves, and the structure of ``alpha``.

    >>> from hypergrad.spaces import Unit
    >>> flatten_space({"a": Unit()})[0] == [Unit()]
    True
    """
    leaf_spaces, structure = jax.tree.flatten(space, is_leaf=_is_space)
    _check_leaves(space)
    return [Real() if leaf is None else leaf for leaf in leaf_spaces], structure


def check(space: PyTree, alpha: PyTree) -> None:
    """Checks that a run may start from ``alpha``; traced values are not checked.

    Raises:
      TypeError: A leaf of ``space`` is not a space.
      ValueError: Structures or shapes do not match, or ``alpha`` is outside its space
        or on its boundary, where ``u`` would be infinite.

    >>> from hypergrad.spaces import Positive
    >>> check({"rate": Positive()}, {"rate": -1.0})
    Traceback (most recent call last):
    ValueError: alpha['rate'] must be finite and above 0 for Positive(); got -1.0. ...
    """
    leaf_spaces, leaves, _ = _broadcast_prefix(space, alpha)
    paths = [path for path, _ in jax.tree.leaves_with_path(alpha)]
    for leaf_space, leaf, path in zip(leaf_spaces, leaves, paths, strict=True):
        name = f"alpha{jax.tree_util.keystr(path)}"
        shape = getattr(leaf_space, "shape", ())
        if shape and shape != jnp.shape(leaf):
            raise ValueError(
                f"{name} must have the shape {shape} of its space {leaf_space}; got "
                f"{jnp.shape(leaf)}. Change one of them, or leave out shape."
            )
        try:
            is_interior = leaf_space.is_interior(leaf)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        is_interior = replicate(is_interior)
        if isinstance(is_interior, Tracer) or np.asarray(is_interior).all():
            continue
        leaf = replicate(leaf)
        index = tuple(np.argwhere(~np.asarray(is_interior))[0].tolist())
        raise ValueError(
            f"{name}{list(index) or ''} must be {leaf_space.requirement} for "
            f"{leaf_space}; got {np.asarray(leaf)[index]}. Start from such a value, or "
            "use another space."
        )


def _map(method: str, space: PyTree, tree: PyTree) -> PyTree:
    leaf_spaces, leaves, structure = _broadcast_prefix(space, tree)
    pairs = zip(leaf_spaces, leaves, strict=True)
    return structure.unflatten([getattr(leaf, method)(x) for leaf, x in pairs])


def _broadcast_prefix(space: PyTree, tree: PyTree) -> tuple[list[Any], list[Any], Any]:
    """Returns a space for each leaf of ``tree``, its leaves and its structure."""
    leaf_spaces, prefix = flatten_space(space)
    leaves, structure = jax.tree.flatten(tree)
    try:
        subtrees = prefix.flatten_up_to(tree)
    except ValueError:
        raise ValueError(
            "space must have the structure of alpha or be a prefix of it; got space "
            f"{prefix} and alpha {structure}. Give one space for each leaf, or one for "
            "a whole subtree."
        ) from None
    repeated = [
        leaf
        for leaf, subtree in zip(leaf_spaces, subtrees, strict=True)
        for _ in jax.tree.leaves(subtree)
    ]
    return repeated, leaves, structure


def _is_space(x: Any) -> bool:
    return x is None or (isinstance(x, Space) and not isinstance(x, type))


def _check_leaves(space: PyTree) -> None:
    """Raises TypeError unless every leaf is a space or None."""
    for path, leaf in jax.tree.leaves_with_path(space, is_leaf=_is_space):
        if not _is_space(leaf):
            is_class = isinstance(leaf, type)
            remedy = f"Write {leaf.__name__}()" if is_class else "See hg.spaces"
            raise TypeError(
                f"space{jax.tree_util.keystr(path)} must be a space such as "
                f"Positive(); got {leaf!r} of type {type(leaf).__name__}. {remedy}."
            )
