"""What a searcher is."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .. import spaces


@runtime_checkable
class Searcher(Protocol):
    """Proposes ``alpha`` without gradients; what it has seen is its state.

    One that can be told K values, of K outer losses, says so by an attribute
    ``is_multi_objective = True``.
    """

    def init(self, space: PyTree, key: Array) -> Any:
        """The state before any trial."""
        ...

    def ask(self, state: Any, key: Array) -> tuple[PyTree, Any]:
        """The next ``alpha`` to try, also before those asked for earlier are told.

        StopIteration where none is left, as of a grid, or none until those that were
        asked for are told, as of a generation.
        """
        ...

    def tell(self, state: Any, alpha: PyTree, value: Array) -> Any:
        """Takes the value of a tried ``alpha``, or ``[K]``; lower is better.

        A trial with a value that is not finite failed.
        """
        ...


class Trials(eqx.Module):
    """The state of a searcher that learns from all that it was told.

    A pytree of plain numbers: ``jax.tree.leaves`` of it can be stored, and put back by
    ``jax.tree.unflatten`` into the structure of a fresh ``init``.

    Attributes:
      space: what is searched.
      t: [trials, axes], coordinates in the unit cube.
      values: [trials], or [trials, K] of K outer losses; a trial with one that is
        not finite failed and is kept as infinity.

    >>> from hypergrad.spaces import Unit
    >>> Trials.none(Unit()).told(0.25, 3.0).t.tolist()
    [[0.25]]
    """

    space: PyTree
    t: np.ndarray
    values: np.ndarray

    @classmethod
    def none(cls, space: PyTree) -> "Trials":
        """Before any trial; errors as `hypergrad.spaces.axes`."""
        return cls(space, np.zeros((0, len(spaces.axes(space)))), np.zeros(0))

    def told(self, alpha: PyTree, value: Array) -> "Trials":
        """With one more trial."""
        t = np.asarray(spaces.to_unit(self.space, alpha), np.float64)
        told = np.asarray(value, np.float64)
        told = np.where(np.isfinite(told).all(), told, np.inf)
        values = np.concatenate([self.values.reshape(-1, *told.shape), told[None]])
        return Trials(self.space, np.vstack([self.t, t]), values)


def replace_nonfinite(values: np.ndarray) -> np.ndarray:
    """With the worst finite value for what is not finite; 0 if none is.

    >>> finite(np.array([1.0, np.inf, 2.0])).tolist()
    [1.0, 2.0, 2.0]
    """
    known = np.isfinite(values)
    return np.where(known, values, values[known].max() if known.any() else 0.0)


def seed_from_key(key: Array) -> int:
    """A seed for libraries with random numbers of their own.

    >>> 0 <= seed_of(jax.random.key(0)) < 2**32
    True
    """
    return int(jax.random.bits(key, (), jnp.uint32))
