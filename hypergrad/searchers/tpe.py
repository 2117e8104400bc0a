"""The tree-structured Parzen estimator, of optuna."""

import os
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from .. import spaces
from ..validation import check_positive_int
from . import optuna_study
from .base import Trials, seed_from_key


class TPE(eqx.Module):
    """Samples where good trials are dense and bad ones are not.

    A density ``l(alpha)`` is fitted to the best trials and another, ``g``, to the
    rest; of candidates drawn from ``l`` the one with the largest ``l / g`` is tried.
    Integers and choices are at home here.

    Everything is optuna's ``TPESampler``, with its defaults, on the coordinates of
    `hypergrad.spaces.axes`, and seeded by the key of each ask.

    Args:
      num_initial: random trials at first. Static.
      journal: a file that several searches share, begun side by side on one problem,
        also on several machines with one file system that has locks: each is told of
        the trials of all in its space, and one that is killed holds up no other. It is
        optuna's journal, which optuna-dashboard shows. What is asked then depends on
        when the others were done: no search is repeated to the bit, ``trials`` of
        `hypergrad.search` are refused, and one that was killed is begun anew with what
        is left of its budget, knowing all that was told. Static.

    Raises:
      ImportError: optuna is not installed (``pip install hypergrad-jax[search]``).
      TypeError: ``journal`` is no path.
      ValueError: ``num_initial`` below 1; an unbounded space; the journal cannot be
        read or written.

    Budget: 40 trials, for a value within 0.01 (see `hypergrad.searchers`); 70 with an
    integer of 8 and a choice of 3 values beside.

    Cost: an ask reads all trials. Source: Bergstra, Bardenet, Bengio & Kegl 2011;
    Akiba, Sano, Yanase, Ohta & Koyama 2019, arXiv:1907.10902 (optuna).

    >>> import jax, hypergrad as hg
    >>> searcher = hg.searchers.TPE()
    >>> state = searcher.init({"depth": hg.spaces.Integer(1, 4)}, jax.random.key(0))
    >>> alpha, state = searcher.ask(state, jax.random.key(1))
    >>> state = searcher.tell(state, alpha, 0.5)
    >>> state.values.tolist()
    [0.5]
    """

    num_initial: int = eqx.field(static=True, default=10)
    journal: str | os.PathLike | None = eqx.field(static=True, default=None)

    citations = ("bergstra2011", "akiba2019")

    def __check_init__(self):
        check_positive_int("num_initial", self.num_initial)
        if not isinstance(self.journal, str | os.PathLike | None):
            raise TypeError(
                f"journal must be a path, such as 'tpe.log'; got {self.journal!r}"
            )

    def init(self, space: PyTree, key: Array) -> Trials:
        """No trial of its own yet."""
        del key
        optuna_study.load("TPE")
        return Trials.none(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """The next proposal; the state is as it was."""
        optuna = optuna_study.load("TPE")
        kinds = optuna_study.distributions(optuna, spaces.axes(state.space))
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=self.num_initial, seed=seed_from_key(key)
        )
        with optuna_study.quiet(optuna):
            study = optuna.create_study(sampler=sampler)
            study.add_trials(self._known(state))
            asked = study.ask(kinds).params
        t = optuna_study.from_params(spaces.axes(state.space), asked)
        return spaces.from_unit(state.space, t), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Remembers the trial."""
        state = state.told(alpha, value)
        if self.journal is not None:
            optuna = optuna_study.load("TPE")
            last = Trials(state.space, state.t[-1:], state.values[-1:])
            (told,) = optuna_study.trials(optuna, last)
            with optuna_study.shared(optuna, self.journal, state.space) as study:
                study.add_trial(told)
        return state

    def _known(self, state: Trials) -> list[Any]:
        """All trials that count, as optuna has them."""
        optuna = optuna_study.load("TPE")
        if self.journal is None:
            return optuna_study.trials(optuna, state)
        with optuna_study.shared(optuna, self.journal, state.space) as study:
            return study.trials
