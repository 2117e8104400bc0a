"""The unit cube behind a space, in which searchers propose points.

Uniform coordinates give the distribution of `sample`. An `Interval` or a `Box` has one
coordinate per number, a row of a `Simplex` one fewer than it has weights. The
coordinate of an `Integer` or a `Choice` falls into one of several equal cells.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..validation import is_traced
from .pytree import flatten_space


class Axis(NamedTuple):
    """A coordinate of the unit cube.

    Attributes:
      num_values: Number of equal cells, or None for a continuum.
      ordered: Whether neighboring cells stand for similar values.

    >>> Axis(num_values=3, ordered=False).num_values
    3
    """

    num_values: int | None
    ordered: bool


def axes(space: PyTree) -> list[Axis]:
    """Returns the coordinates of a space: leaf by leaf, each in row-major order.

    Args:
      space: Pytree of bounded spaces, structured like ``alpha``.

    Raises:
      TypeError: A space lacks ``unit_shape``, ``from_unit`` and ``to_unit``.
      ValueError: A space is unbounded.

    >>> from hypergrad.spaces import Integer, Simplex
    >>> tuple(axis.num_values for axis in axes((Integer(1, 3), Simplex(shape=(3,)))))
    (3, None, None)
    """
    return [
        Axis(getattr(leaf, "num_values", None), getattr(leaf, "ordered", True))
        for leaf in _flatten_with_cube(space)[0]
        for _ in range(math.prod(leaf.unit_shape))
    ]


def from_unit(space: PyTree, t: Float[ArrayLike, " num_axes"]) -> PyTree:
    """Returns ``alpha`` at the coordinates ``t``.

    Args:
      space: As for `axes`.
      t: Coordinates between 0 and 1, ``[num_axes]``.

    Raises:
      TypeError: As for `axes`.
      ValueError: As for `axes`, or ``t`` has another shape.

    >>> from hypergrad.spaces import Interval
    >>> rate = Interval(1e-4, 1.0, log=True)
    >>> round(float(from_unit({"rate": rate}, [0.5])["rate"]), 4)
    0.01
    """
    leaf_spaces, structure = _flatten_with_cube(space)
    t = jnp.asarray(t) if is_traced(t) else np.asarray(t)
    offsets = np.cumsum([math.prod(leaf.unit_shape) for leaf in leaf_spaces])
    if t.shape != (offsets[-1],):
        raise ValueError(f"t must have shape ({offsets[-1]},); got {t.shape}.")
    bounds = itertools.pairwise([0, *offsets.tolist()])
    leaves = [
        leaf.from_unit(t[slice(*pair)].reshape(leaf.unit_shape))
        for leaf, pair in zip(leaf_spaces, bounds, strict=True)
    ]
    return structure.unflatten(leaves)


def to_unit(space: PyTree, alpha: PyTree) -> Float[Array, " num_axes"]:
    """Returns the coordinates of ``alpha``, the inverse of `from_unit`.

    The coordinate of an integer or a choice is the center of its cell.

    Args:
      space: As for `axes`.
      alpha: Pytree of arrays, structured like ``space``.

    Raises:
      TypeError, ValueError: As for `axes`.

    >>> from hypergrad.spaces import Choice, Unit
    >>> to_unit([Choice(2), Unit()], [1, 0.25]).tolist()
    [0.75, 0.25]
    """
    leaf_spaces, structure = _flatten_with_cube(space)
    pairs = zip(leaf_spaces, structure.flatten_up_to(alpha), strict=True)
    t = jnp.concatenate([jnp.ravel(leaf.to_unit(x)) for leaf, x in pairs])
    return jnp.clip(t, 0, 1)


def _flatten_with_cube(space: PyTree) -> tuple[list[Any], Any]:
    """Returns `flatten_space`; raises TypeError for a space without a cube.

    A space without leaves raises ValueError, and so does the ``unit_shape`` of an
    unbounded one.
    """
    leaf_spaces, structure = flatten_space(space)
    if not leaf_spaces:
        raise ValueError(f"space must have at least one leaf; got {space!r}.")
    for leaf in leaf_spaces:
        if not hasattr(leaf, "unit_shape"):
            raise TypeError(
                "space must have unit_shape, from_unit and to_unit for all searchers "
                "but Random and those that train populations; got "
                f"{leaf}. Write them as in hg.spaces.Interval."
            )
    return leaf_spaces, structure
