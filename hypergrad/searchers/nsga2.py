"""The non-dominated sorting genetic algorithm of optuna."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from .. import spaces
from ..number_checks import check_positive_int
from . import optuna_study
from .base import Trials, seed_from_key


class NSGA2(eqx.Module):
    """Breeds each generation from non-dominated parents that are far apart.

    The first ``population_size`` trials are random. The parents of each later
    generation are the best ``population_size`` of all earlier parents and children:
    ordered by the number of fronts that dominate theirs, then by their distance to
    neighbors on the front. A child takes each coordinate from one of two parents, and
    sometimes a random one.

    NSGA-II is for several outer losses and compares trials by dominance only. For a
    single loss it is a genetic algorithm. Everything is left to optuna's
    ``NSGAIISampler`` with its default parameters, on the coordinates of
    `hypergrad.spaces.axes`, seeded by the key of each proposal.

    Args:
      population_size: Number of trials per generation, at least 2, static. A search
        with fewer trials is random.

    Raises:
      ImportError: optuna is not installed (``pip install 'hypergrad-jax[search]'``).
      ValueError: ``population_size`` is below 2. In `init`: the space is unbounded.

    Budget: for one value and generations of 20, 80 trials for a value within 0.01 (see
      `hypergrad.searchers`), or 310 with choices.
    Cost: a proposal reads all trials.

    Source: Deb, Pratap, Agarwal & Meyarivan 2002; Akiba, Sano, Yanase, Ohta & Koyama
      2019, arXiv:1907.10902 (optuna).

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> searcher = hg.searchers.NSGA2(population_size=10)
    >>> state = searcher.init({"depth": hg.spaces.Integer(1, 4)}, jax.random.key(0))
    >>> alpha, state = searcher.ask(state, jax.random.key(1))
    >>> state = searcher.tell(state, alpha, jnp.array([0.5, 2.0]))
    >>> state.values.shape
    (1, 2)
    """

    population_size: int = eqx.field(static=True, default=50)

    citations = ("deb2002", "akiba2019")
    is_multi_objective = True

    def __check_init__(self):
        check_positive_int("population_size", self.population_size, 2)

    def init(self, space: PyTree, key: Array) -> Trials:
        """Returns the state without a trial."""
        del key
        optuna_study.import_optuna("NSGA2")
        return Trials.empty(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """Returns the next proposal and the unchanged state."""
        optuna = optuna_study.import_optuna("NSGA2")
        axes = spaces.axes(state.space)
        with optuna_study.quiet(optuna):
            study = self._make_study(optuna, state)
            study.sampler = self._make_sampler(optuna, seed_from_key(key))
            params = study.ask(optuna_study.distributions(optuna, axes)).params
        t = optuna_study.from_params(axes, params)
        return spaces.from_unit(state.space, t), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Returns the state with one more trial."""
        return state.add(alpha, value)

    def _make_sampler(self, optuna: Any, seed: int) -> Any:
        return optuna.samplers.NSGAIISampler(
            population_size=self.population_size, seed=seed
        )

    def _make_study(self, optuna: Any, state: Trials) -> Any:
        """Returns a study of all trials in which each belongs to its generation."""
        axes = spaces.axes(state.space)
        distributions = optuna_study.distributions(optuna, axes)
        num_values = state.values[:1].size or 1
        values = state.values.reshape(-1, num_values).tolist()
        study = optuna.create_study(
            sampler=self._make_sampler(optuna, 0), directions=["minimize"] * num_values
        )
        system_attrs = {}
        for i, (t, trial_values) in enumerate(zip(state.t, values, strict=True)):
            params = optuna_study.to_params(axes, t)
            if i % self.population_size == 0:
                # The first trial of a generation is proposed again: optuna selects the
                # parents when its parameters are read, and notes the generation.
                study.enqueue_trial(params)
                trial = study.ask(distributions)
                _ = trial.relative_params
                study.tell(trial, trial_values)
                system_attrs = study.get_trials(deepcopy=False)[-1].system_attrs
                continue
            study.add_trial(
                optuna.trial.create_trial(
                    params=params,
                    distributions=distributions,
                    values=trial_values,
                    system_attrs=system_attrs,
                )
            )
        return study
