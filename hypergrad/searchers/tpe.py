"""The tree-structured Parzen estimator of optuna."""

import dataclasses
import os
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .. import spaces
from ..number_checks import check_positive_int
from . import optuna_study
from .base import PendingTrials, Trials, seed_from_key


class TPE(eqx.Module):
    """Samples where good trials are dense and bad trials are not.

    A density ``l(alpha)`` is fitted to the best trials and another one, ``g``, to all
    others. Of candidates sampled from ``l`` the one with the largest ``l / g`` is
    proposed. TPE suits integers and choices.

    Everything is left to optuna's ``TPESampler`` with its default parameters, on the
    coordinates of `hypergrad.spaces.axes`, seeded by the key of each proposal.
    Proposals of a batch that have no value yet are running trials of optuna, which
    count as bad ones since its version 5, so that a batch spreads out.

    Args:
      num_initial: Number of initial random trials, static.
      journal: Path of a file that several searches of one problem share, possibly on
        several machines of one kind with a common file system that supports locks.
        Each search learns from the trials of all searches with its space and
        ``problem``, and a search that is killed does not block the others. The file is
        optuna's journal, which optuna-dashboard displays. Proposals then depend on when
        other trials end, so a search does not repeat to the bit and `hypergrad.search`
        refuses ``previous_trials``: restart a search that was killed with the rest of
        its budget, it knows all trials of the journal and repeats none. Searches that
        run at the same time need different keys: with one key they begin with the same
        random trials. Static.
      problem: Name of the problem, with which its trials are found in the journal,
        static. `hypergrad.search` replaces it by a fingerprint of problem, data, solver
        and ``w``, so that trials of another problem are never used. It depends on the
        platform for which the program of a trial is lowered, such as cpu or cuda. Set
        the name if you call `ask` and `tell` yourself.

    Raises:
      ImportError: optuna is not installed (``pip install 'hypergrad-jax[search]'``).
      TypeError: ``journal`` is not a path, or ``problem`` is not a string.
      ValueError: ``num_initial`` is below 1, the space is unbounded, or the journal
        cannot be read or written.

    Budget: 30 trials for a value within 0.01 (see `hypergrad.searchers`); 80 with
      choices.
    Cost: a proposal reads all trials.

    Source: Bergstra, Bardenet, Bengio & Kegl 2011; Akiba, Sano, Yanase, Ohta & Koyama
      2019, arXiv:1907.10902 (optuna).

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
    problem: str = eqx.field(static=True, default="")

    citations = ("bergstra2011", "akiba2019")

    def __check_init__(self):
        check_positive_int("num_initial", self.num_initial)
        if not isinstance(self.journal, str | os.PathLike | None):
            raise TypeError(
                f"journal must be a path, such as 'tpe.log'; got {self.journal!r}."
            )
        if not isinstance(self.problem, str):
            raise TypeError(f"problem must be a string; got {self.problem!r}.")

    def for_problem(self, problem: str) -> "TPE":
        """Returns the searcher that shares trials with searches of one problem only."""
        return dataclasses.replace(self, problem=problem)

    def init(self, space: PyTree, key: Array) -> PendingTrials:
        """Returns the state without a trial of this search."""
        del key
        optuna_study.import_optuna("TPE")
        return PendingTrials.empty(space)

    def ask(self, state: PendingTrials, key: Array) -> tuple[PyTree, PendingTrials]:
        """Returns the next proposal, and the state with it as pending."""
        optuna = optuna_study.import_optuna("TPE")
        axes = spaces.axes(state.space)
        trials = self._all_trials(optuna, state)
        # A restarted search has the keys of its start, and would repeat its trials.
        if num_other_trials := len(trials) - len(state.values):
            key = jax.random.fold_in(key, num_other_trials)
        if len(state.pending_t):
            trials += optuna_study.to_optuna_trials(
                optuna, state.space, state.pending_t
            )
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=self.num_initial, seed=seed_from_key(key)
        )
        with optuna_study.quiet(optuna):
            study = optuna.create_study(sampler=sampler)
            study.add_trials(trials)
            params = study.ask(optuna_study.distributions(optuna, axes)).params
        t = optuna_study.from_params(axes, params)
        return spaces.from_unit(state.space, t), state.propose(t)

    def tell(self, state: PendingTrials, alpha: PyTree, value: Array) -> PendingTrials:
        """Returns the state with one more trial, which is also added to the journal."""
        state = state.add(alpha, value)
        if self.journal is not None:
            optuna = optuna_study.import_optuna("TPE")
            last_trial = state.space, state.t[-1:], state.values[-1:]
            (trial,) = optuna_study.to_optuna_trials(optuna, *last_trial)
            with self._open_journal(optuna, state) as study:
                study.add_trial(trial)
        return state

    def _all_trials(self, optuna: Any, state: Trials) -> list[Any]:
        """Returns the trials of this search, or of all searches with this journal."""
        if self.journal is None:
            return optuna_study.to_optuna_trials(
                optuna, state.space, state.t, state.values
            )
        with self._open_journal(optuna, state) as study:
            return study.trials

    def _open_journal(self, optuna: Any, state: Trials) -> Any:
        assert self.journal is not None
        return optuna_study.open_journal(
            optuna, self.journal, state.space, self.problem
        )
