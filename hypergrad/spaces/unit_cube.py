"""The unit cube behind a space, for searchers that think in coordinates.

Uniform coordinates give the distribution of ``sample``: an `Interval` has one a number,
log-scaled where it says so, a row of a `Simplex` one less than it has weights, an
`Integer` or a `Choice` one that falls into equal cells.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .pytree import spaces_of


class Axis(NamedTuple):
    """One coordinate of the cube.

    >>> Axis(num_values=3, ordered=False).num_values
    3
    """

    num_values: int | None  #: equal cells; None for a continuum
    ordered: bool  #: whether neighbouring cells are alike


def axes(space: PyTree) -> list[Axis]:
    """The coordinates of a space, leaf by leaf, each in row-major order.

    Raises:
      ValueError: a space is unbounded.
      TypeError: a space of one's own without ``unit_shape``, ``from_unit`` and
        ``to_unit``.

    >>> from hypergrad.spaces import Integer, Simplex
    >>> tuple(axis.num_values for axis in axes((Integer(1, 3), Simplex(shape=(3,)))))
    (3, None, None)
    """
    return [
        Axis(getattr(kind, "num_values", None), getattr(kind, "ordered", True))
        for kind in _kinds(space)
        for _ in range(math.prod(kind.unit_shape))
    ]


def from_unit(space: PyTree, t: ArrayLike) -> PyTree:
    """``alpha`` at coordinates ``t``, [num_axes] between 0 and 1; errors as `axes`.

    >>> from hypergrad.spaces import Interval
    >>> rate = Interval(1e-4, 1.0, log=True)
    >>> round(float(from_unit({"rate": rate}, [0.5])["rate"]), 4)
    0.01
    """
    kinds, t = _kinds(space), np.asarray(t)
    ends = np.cumsum([math.prod(kind.unit_shape) for kind in kinds])
    if t.shape != (ends[-1],):
        raise ValueError(f"t must have shape ({ends[-1]},), got {t.shape}")
    parts = np.split(t, ends[:-1])
    _, structure = spaces_of(space)
    leaves = [
        kind.from_unit(part.reshape(kind.unit_shape))
        for kind, part in zip(kinds, parts, strict=True)
    ]
    return structure.unflatten(leaves)


def to_unit(space: PyTree, alpha: PyTree) -> Array:
    """Coordinates [num_axes] of ``alpha``, which ``from_unit`` undoes.

    Of an integer or a choice, the middle of its cell. Errors as `axes`.

    >>> from hypergrad.spaces import Choice, Unit
    >>> to_unit([Choice(2), Unit()], [1, 0.25]).tolist()
    [0.75, 0.25]
    """
    _, structure = spaces_of(space)
    leaves = structure.flatten_up_to(alpha)
    pairs = zip(_kinds(space), leaves, strict=True)
    t = jnp.concatenate([jnp.ravel(kind.to_unit(leaf)) for kind, leaf in pairs])
    return jnp.clip(t, 0, 1)


def _kinds(space: PyTree) -> list[Any]:
    """The spaces of the leaves, each with coordinates."""
    kinds, _ = spaces_of(space)
    for kind in kinds:
        if not hasattr(type(kind), "unit_shape"):
            raise TypeError(
                f"{kind} lacks unit_shape, from_unit and to_unit, by which searchers "
                "other than Random see a space; write them as hg.spaces.Interval does"
            )
    return kinds
