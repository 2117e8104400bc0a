"""The covariance matrix adaptation evolution strategy of the package cmaes."""

import copy
import functools
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .. import spaces
from ..number_checks import check_positive_int, positive
from ..runtime.compat import import_optional
from .base import Trials, seed_from_key

MAX_DEPTH = 300  # generations per recursion; Python allows 1000 nested calls


class CMAES(eqx.Module):
    """Adapts a Gaussian to the better half of each generation.

    CMA-ES suits continuous spaces of moderate dimension whose axes depend on each
    other. The Gaussian lives in the unit cube of the space (log-scaled axes included)
    and starts in its middle; samples outside the cube are repeated. Everything is left
    to the package ``cmaes`` with its default parameters, seeded by the key of each
    proposal. A generation in which every trial failed changes nothing. The search ends
    when the package considers it converged, or when the Gaussian is too narrow for the
    dtype of ``alpha``; search again with another key to spend the rest of a budget.

    Args:
      step_size: Initial standard deviation in units of an axis.
      population_size: Number of trials per generation, static. Defaults to
        ``4 + floor(3 log(axes))``.

    Raises:
      ImportError: cmaes is not installed (``pip install 'hypergrad-jax[search]'``).
      ValueError: ``population_size`` is below 4, or ``step_size`` is not above 0. In
        `init`: the space is unbounded, has an `Integer` or a `Choice`, or a single
        axis.

    Budget: 130 trials for a value within 1e-4 (see `hypergrad.searchers`).
    Cost: O(axes^3) once per generation. Proposals of several searches in turn, or from
      a restored state, repeat the generations. A proposal samples until all axes are
      within the cube, at most 100 times, each O(axes^3). With hundreds of axes hardly
      any sample is: use ``EvolutionStrategy(evosax.algorithms.Sep_CMA_ES,
      population_size)``, which has one deviation per axis instead of a covariance and
      no bounds.

    Source: Hansen & Ostermeier 2001; Nomura & Shibata 2024, arXiv:2402.01373 (cmaes).

    >>> import jax, hypergrad as hg
    >>> searcher = hg.searchers.CMAES()
    >>> state = searcher.init(hg.spaces.Unit(shape=(2,)), jax.random.key(0))
    >>> alpha, state = searcher.ask(state, jax.random.key(1))
    >>> alpha.shape
    (2,)
    """

    step_size: ArrayLike = eqx.field(default=0.25, converter=positive("step_size"))
    population_size: int | None = eqx.field(static=True, default=None)

    citations = ("hansen2001", "nomura2024")

    def __check_init__(self):
        check_positive_int("population_size", self.population_size, 4, optional=True)

    def init(self, space: PyTree, key: Array) -> Trials:
        """Returns the state without a trial."""
        del key
        _import_cmaes()
        axes = spaces.axes(space)
        if any(axis.num_values is not None for axis in axes):
            raise ValueError(
                "space must be continuous for CMAES; got an Integer or a Choice. Use "
                "hg.searchers.TPE()."
            )
        if len(axes) < 2:
            raise ValueError(
                "space must have at least two axes for CMAES; got one. Use "
                "hg.searchers.TPE()."
            )
        return Trials.empty(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """Returns a sample of the Gaussian after all full generations.

        Raises StopIteration at the end of the search.

        The library reaches the same Gaussian whenever it is told the same trials,
        because its random numbers affect samples only.
        """
        trials = np.column_stack([state.t, state.values])
        optimizer_after = functools.partial(
            _optimizer_after,
            state.t.shape[1],
            np.asarray(self.step_size).item(),
            self.population_size,
        )
        size = optimizer_after(b"").population_size
        num_told = len(trials) // size * size
        for stop in range(0, num_told, MAX_DEPTH * size):  # bounds the recursion below
            optimizer_after(trials[:stop].tobytes())
        optimizer = optimizer_after(trials[:num_told].tobytes())
        if optimizer.should_stop():
            raise StopIteration
        optimizer.reseed_rng(seed_from_key(key))
        alpha = spaces.from_unit(state.space, optimizer.ask())
        mean = spaces.from_unit(state.space, np.clip(optimizer.mean, 0, 1))
        if jax.tree.all(jax.tree.map(np.array_equal, alpha, mean)):
            raise StopIteration  # they differ by less than the rounding of alpha
        return alpha, state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Returns the state with one more trial."""
        return state.add(alpha, value)


@functools.lru_cache(maxsize=8)
def _optimizer_after(
    num_axes: int, step_size: float, population_size: int | None, trials: bytes
) -> Any:
    """Returns the library's optimizer after full generations.

    The last few results are cached, so that each continues from the one before.

    Args:
      num_axes, step_size, population_size: Parameters of the optimizer.
      trials: Bytes of an array ``[trials, num_axes + 1]`` of coordinates and value.
    """
    if not trials:
        return _import_cmaes().CMA(
            mean=np.full(num_axes, 0.5),
            sigma=step_size,
            bounds=np.tile([0.0, 1.0], (num_axes, 1)),
            population_size=population_size,
        )
    optimizer_after = functools.partial(
        _optimizer_after, num_axes, step_size, population_size
    )
    size = optimizer_after(b"").population_size
    rows = np.frombuffer(trials).reshape(-1, num_axes + 1)
    previous_optimizer = optimizer_after(rows[:-size].tobytes())
    if np.isinf(rows[-size:, -1]).all():
        return previous_optimizer
    optimizer = copy.deepcopy(previous_optimizer)
    optimizer.tell([(row[:-1], row[-1]) for row in rows[-size:]])
    return optimizer


def _import_cmaes() -> Any:
    return import_optional("cmaes", "CMAES needs cmaes", "search")
