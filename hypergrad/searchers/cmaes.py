"""The covariance matrix adaptation evolution strategy, of the package cmaes."""

import copy
import functools
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from .. import spaces
from ..validation import check_positive_int, float_converter
from .base import Trials, seed_from_key

DEPTH = 300  # generations, of Python's 1000 calls


class CMAES(eqx.Module):
    """A Gaussian that moves and stretches towards the better half of each generation.

    For continuous spaces of moderate dimension, whose axes may depend on each other.
    The Gaussian lives in the unit cube of the space (log-scaled axes included), begins
    in its middle, and what falls outside is drawn again. Everything is the package
    ``cmaes``, with its defaults, and seeded by the key of each ask.

    Args:
      step_size: the first standard deviation, in units of an axis.
      population: trials a generation; None for ``4 + floor(3 log(axes))``. Static.

    Raises:
      ImportError: cmaes is not installed (``pip install hypergrad-jax[search]``).
      ValueError: ``population`` below 2; at `init`, integers or choices (use `TPE`), a
        single axis, or an unbounded space.

    Budget: 110 trials, for a value within 1e-4 (see `hypergrad.searchers`).

    Cost: a generation is O(axes^3), once: asks of other searches in between, or of a
    state that was stored, replay them. An ask draws until all axes are within the box,
    at most 100 times, by cmaes at O(axes^3) a draw. With hundreds of axes hardly a draw
    is, so that an ask takes long: there take
    ``Evolution(evosax.algorithms.Sep_CMA_ES, size)``, which has a deviation an axis in
    place of the covariance, O(axes) a trial, and no box to fall out of.

    Source: Hansen & Ostermeier 2001; Nomura & Shibata 2024, arXiv:2402.01373 (cmaes).

    >>> import jax, hypergrad as hg
    >>> searcher = hg.searchers.CMAES()
    >>> state = searcher.init(hg.spaces.Unit(shape=(2,)), jax.random.key(0))
    >>> alpha, state = searcher.ask(state, jax.random.key(1))
    >>> alpha.shape
    (2,)
    """

    step_size: ArrayLike = eqx.field(
        default=0.25, converter=float_converter("step_size")
    )
    population: int | None = eqx.field(static=True, default=None)

    citations = ("hansen2001", "nomura2024")

    def __check_init__(self):
        check_positive_int("population", self.population, 2, optional=True)

    def init(self, space: PyTree, key: Array) -> Trials:
        """No trial yet."""
        del key
        _cmaes()
        axes = spaces.axes(space)
        if any(axis.num_values is not None for axis in axes):
            raise ValueError(
                "CMAES moves a Gaussian, which has no place for Integer and Choice; "
                "use hg.searchers.TPE()"
            )
        if len(axes) < 2:
            raise ValueError(
                "CMAES needs at least two axes, the space has one; use "
                "hg.searchers.TPE()"
            )
        return Trials.none(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """A draw from the Gaussian after all full generations; the state is as it was.

        Told the same trials, cmaes arrives at the same Gaussian: its random numbers
        move only its draws.
        """
        rows = np.column_stack([state.t, state.values])
        axes, step_size = state.t.shape[1], np.asarray(self.step_size).item()
        after = functools.partial(_gaussian, axes, step_size, self.population)
        size = after(b"").population_size
        full = len(rows) // size * size
        for end in range(0, full, DEPTH * size):  # so that the last is not too deep
            after(rows[:end].tobytes())
        gaussian = after(rows[:full].tobytes())
        gaussian.reseed_rng(seed_from_key(key))
        return spaces.from_unit(state.space, gaussian.ask()), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Remembers the trial."""
        return state.told(alpha, value)


@functools.lru_cache(maxsize=8)
def _gaussian(axes: int, step_size: float, population: int | None, told: bytes) -> Any:
    """After generations, of whose trials ``told`` holds coordinates and value.

    Of the last few that were asked for, so that each goes on from the one before.
    """
    if not told:
        return _cmaes().CMA(
            mean=np.full(axes, 0.5),
            sigma=step_size,
            bounds=np.tile([0.0, 1.0], (axes, 1)),
            population_size=population,
        )
    before = functools.partial(_gaussian, axes, step_size, population)
    rows, size = np.frombuffer(told).reshape(-1, axes + 1), before(b"").population_size
    gaussian = copy.deepcopy(before(rows[:-size].tobytes()))
    gaussian.tell([(row[:-1], row[-1]) for row in rows[-size:]])
    return gaussian


def _cmaes() -> Any:
    try:
        import cmaes
    except ImportError as error:
        raise ImportError(
            "CMAES needs cmaes: pip install 'hypergrad-jax[search]'"
        ) from error
    return cmaes
