"""The interface of a space, and helpers that the spaces of this package share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from ..trees import PrettyModule


@runtime_checkable
class Space(Protocol):
    """The admissible values of one leaf of ``alpha``.

    A space maps an unconstrained variable ``u``, which the optimizer moves, to
    ``alpha``. The methods are pure, keep shape and dtype, and act element by element
    (`Simplex`: row by row).

    Searchers propose points of a unit cube, all but `hypergrad.searchers.Random` and
    those that train populations. They use these further attributes, which have no
    default unless one is stated:

    - ``shape``: Shape of the leaf. Defaults to ``()``, which fits a leaf of any shape.
    - ``unit_shape``: Shape of the coordinates of the leaf.
    - ``from_unit(t)``: Maps coordinates in [0, 1] to ``alpha``. Uniform coordinates
      have the distribution of `sample`.
    - ``to_unit(alpha)``: The inverse of ``from_unit``.
    - ``num_values``: Number of equal cells into which a coordinate falls. Defaults to
      None, a continuum.
    - ``ordered``: Whether neighboring cells stand for similar values. Defaults to
      True.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> class Softplus:
    ...     requirement = "above 0"
    ...
    ...     def forward(self, u):
    ...         return jax.nn.softplus(u)
    ...
    ...     def inverse(self, alpha):
    ...         return alpha + jnp.log(-jnp.expm1(-alpha))
    ...
    ...     def project(self, u):
    ...         return u
    ...
    ...     def contains(self, alpha):
    ...         return alpha >= 0
    ...
    ...     def is_interior(self, alpha):
    ...         return alpha > 0
    ...
    ...     def sample(self, key):
    ...         return jax.random.exponential(key)
    >>> isinstance(Softplus(), hg.spaces.Space)
    True
    >>> space = {"penalty": Softplus(), "weights": hg.spaces.Simplex()}
    >>> alpha = {"penalty": jnp.asarray(2.0), "weights": jnp.array([0.25, 0.75])}
    >>> u = hg.spaces.inverse(space, alpha)
    >>> round(float(hg.spaces.forward(space, u)["penalty"]), 6)
    2.0
    """

    requirement: str
    """The condition for `is_interior` in words, for error messages."""

    def forward(self, u: ArrayLike) -> Array:
        """Returns ``alpha``, an admissible value for every ``u``."""
        ...

    def inverse(self, alpha: ArrayLike) -> Array:
        """Returns ``u``: finite for an admissible ``alpha``, and NaN for any other."""
        ...

    def project(self, u: ArrayLike) -> Array:
        """Returns the admissible ``u`` nearest to ``u``; called after each step."""
        ...

    def contains(self, alpha: ArrayLike) -> Array:
        """Returns True for each admissible number of ``alpha``."""
        ...

    def is_interior(self, alpha: ArrayLike) -> Array:
        """Returns True for each number from which a run may start.

        `forward` and `inverse` are exact there.
        """
        ...

    def sample(self, key: Array) -> Array:
        """Returns a random ``alpha`` of the shape of the space."""
        ...


class BoundedSpace(PrettyModule):
    """A space of leaves of one shape, with a coordinate in [0, 1] for each number."""

    shape: eqx.AbstractVar[tuple[int, ...]]

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates, which is the shape of the leaf."""
        return self.shape

    @abstractmethod
    def from_unit(self, t: ArrayLike) -> Array:
        """Returns ``alpha`` at coordinates in [0, 1]."""

    def sample(self, key: Array) -> Array:
        """Returns a sample that is uniform in the coordinates."""
        return self.from_unit(jax.random.uniform(key, self.shape))


def as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    """Returns a shape as a tuple; a single integer is the length of a vector."""
    is_integer = lambda x: isinstance(x, int | np.integer) and x >= 0
    sizes: Any = shape if isinstance(shape, tuple | list | np.ndarray) else (shape,)
    if not all(map(is_integer, sizes)):
        raise ValueError(
            "shape must be an integer of at least 0, or a tuple of such integers; got "
            f"{shape!r}."
        )
    return tuple(map(int, sizes))


def identity(self: Any, x: Any) -> Any:
    """Returns its argument; the map of a space that needs none."""
    return x


def raise_unbounded(self: Any, key: Any = None) -> NoReturn:
    """Raises ValueError, because an unbounded space has no uniform distribution."""
    raise ValueError(
        f"space must be bounded to be sampled or searched; got {self}. Use "
        "Interval(low, high), with log=True for a scale."
    )


def as_float(x: ArrayLike) -> Array:
    """Returns an array of the dtype of ``x``, or of the default one for integers."""
    return jnp.asarray(x, jnp.result_type(x, float))
