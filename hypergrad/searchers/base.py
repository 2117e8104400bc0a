"""The interface of a searcher, and a state that holds all trials."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from .. import spaces


@runtime_checkable
class Searcher(Protocol):
    """Proposes ``alpha`` without gradients, carrying an explicit state between calls.

    A searcher needs `init`, `ask` and `tell`, which run on the host. The library uses
    these further attributes if they exist:

    - ``is_multi_objective``: True if `tell` accepts the values ``[K]`` of K outer
      losses. Defaults to False.
    - ``journal``: Path of a file from which the searcher reads earlier trials by
      itself; `hypergrad.search` then refuses ``previous_trials``. Defaults to None. A
      searcher with a journal must have the method ``for_problem(problem)``, which
      returns the searcher that reads trials of the problem with this name only.
    - ``citations``: Keys of ``references.bib``, for `hypergrad.citation`.
    """

    def init(self, space: PyTree, key: Array) -> Any:
        """Returns the state before the first trial."""
        ...

    def ask(self, state: Any, key: Array) -> tuple[PyTree, Any]:
        """Returns the next ``alpha`` to evaluate and the next state.

        Further calls may follow before the value of the first ``alpha`` is told.

        Raises:
          StopIteration: No ``alpha`` is left, as at the end of a grid; or the values of
            the proposals so far must be told first, as at the end of a generation.
        """
        ...

    def tell(self, state: Any, alpha: PyTree, value: Array) -> Any:
        """Returns the state after a trial.

        Args:
          state: The state before.
          alpha: The ``alpha`` of the trial; it need not come from `ask`.
          value: Its outer value (lower is better), or the values ``[K]``. The trial
            failed if any value is not finite. `hypergrad.search` passes NaN if the
            trial has a ``w`` that is not finite.
        """
        ...


class Trials(eqx.Module):
    """The trials so far: the state of a searcher that learns from them.

    The leaves are arrays: ``jax.tree.leaves`` of a state can be saved and restored by
    ``jax.tree.unflatten`` with the structure of ``init``.

    Attributes:
      space: The space that is searched.
      t: Coordinates of the trials in the unit cube of the space.
      values: Values ``[trials]``, or ``[trials, K]`` for K outer losses. All values of
        a failed trial are infinity.

    >>> from hypergrad.spaces import Unit
    >>> Trials.empty(Unit()).add(0.25, 3.0).t.tolist()
    [[0.25]]
    """

    space: PyTree
    t: Float[np.ndarray, "trials axes"]
    values: Float[np.ndarray, "trials ..."]

    @classmethod
    def empty(cls, space: PyTree) -> "Trials":
        """Returns the state before the first trial.

        Raises:
          ValueError, TypeError: As `hypergrad.spaces.axes`.
        """
        return cls(space, np.zeros((0, len(spaces.axes(space)))), np.zeros(0))

    def add(self, alpha: PyTree, value: ArrayLike) -> "Trials":
        """Returns the state with one more trial."""
        t = np.asarray(spaces.to_unit(self.space, alpha), np.float64)
        value = np.asarray(value, np.float64)
        value = np.where(np.isfinite(value).all(), value, np.inf)
        values = np.concatenate([self.values.reshape(-1, *value.shape), value[None]])
        return Trials(self.space, np.vstack([self.t, t]), values)


class PendingTrials(Trials):
    """The trials so far, and the proposals that have no value yet.

    Attributes:
      pending_t: Coordinates of these proposals.

    >>> from hypergrad.spaces import Unit
    >>> state = PendingTrials.empty(Unit()).propose([0.25]).propose([0.75])
    >>> state.add(0.25, 3.0).pending_t.tolist()
    [[0.75]]
    """

    pending_t: Float[np.ndarray, "proposals axes"]

    @classmethod
    def empty(cls, space: PyTree) -> "PendingTrials":
        """Returns the state before the first proposal.

        Raises:
          ValueError, TypeError: As `hypergrad.spaces.axes`.
        """
        trials = Trials.empty(space)
        return cls(space, trials.t, trials.values, trials.t)

    def propose(self, t: Float[ArrayLike, " axes"]) -> "PendingTrials":
        """Returns the state with one more pending proposal, at the coordinates t."""
        return dataclasses.replace(self, pending_t=np.vstack([self.pending_t, t]))

    def add(self, alpha: PyTree, value: ArrayLike) -> "PendingTrials":
        """Returns the state with one more trial.

        The pending proposal nearest to ``alpha`` is pending no longer.
        """
        trials, pending_t = super().add(alpha, value), self.pending_t
        if len(pending_t):
            distances = np.linalg.norm(pending_t - trials.t[-1:], axis=1)
            pending_t = np.delete(pending_t, np.argmin(distances), axis=0)
        return PendingTrials(self.space, trials.t, trials.values, pending_t)


def replace_nonfinite(values: np.ndarray) -> np.ndarray:
    """Replaces values that are not finite by the worst finite one, or by 0.

    If all finite values are equal, the others become larger by 1: a model that sees
    only equal values cannot learn where trials fail.

    >>> replace_nonfinite(np.array([1.0, np.inf, 2.0])).tolist()
    [1.0, 2.0, 2.0]
    >>> replace_nonfinite(np.array([1.0, np.inf])).tolist()
    [1.0, 2.0]
    """
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return np.zeros_like(values)
    best, worst = values[is_finite].min(), values[is_finite].max()
    return np.where(is_finite, values, worst if worst > best else worst + 1)


def seed_from_key(key: Array) -> int:
    """Returns a seed for libraries that have their own random numbers.

    >>> 0 <= seed_from_key(jax.random.key(0)) < 2**32
    True
    """
    return int(jax.random.bits(key, (), jnp.uint32))
