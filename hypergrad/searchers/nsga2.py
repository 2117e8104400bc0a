"""The non-dominated sorting genetic algorithm, of optuna."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .. import spaces
from ..validation import check_positive_int
from . import optuna_study
from .base import Trials, seed_from_key


class NSGA2(eqx.Module):
    """Generations of parents that no other dominates, far apart from each other.

    The first ``population_size`` trials are random. Of each later generation the
    parents are the best as many of all parents and children before: by how many fronts
    are before theirs, then by how much room they have on it. A child takes each
    coordinate from one of two parents, and now and then a random one.

    For several outer losses: a trial's values need no order but dominance. For one loss
    it is a genetic algorithm.

    Everything is optuna's ``NSGAIISampler``, with its defaults, on the coordinates of
    `hypergrad.spaces.axes`, and seeded by the key of each ask.

    Args:
      population_size: trials of a generation, at least 2; a search of fewer trials is
        a random one. Static.

    Raises:
      ImportError: optuna is not installed (``pip install hypergrad-jax[search]``).
      ValueError: ``population_size`` below 2; an unbounded space.

    Budget: of one value, generations of 20, 50 trials, or 370 with choices, for a value
    within 0.01 (see `hypergrad.searchers`).

    Cost: an ask reads all trials. Source: Deb, Pratap, Agarwal & Meyarivan 2002; Akiba,
    Sano, Yanase, Ohta & Koyama 2019, arXiv:1907.10902 (optuna).

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
        """No trial yet."""
        del key
        optuna_study.load("NSGA2")
        return Trials.none(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """The next proposal; the state is as it was."""
        optuna = optuna_study.load("NSGA2")
        axes = spaces.axes(state.space)
        kinds = optuna_study.distributions(optuna, axes)
        sampler = lambda seed: optuna.samplers.NSGAIISampler(
            population_size=self.population_size, seed=seed
        )
        num_values = state.values[:1].size or 1
        values = state.values.reshape(-1, num_values)
        with optuna_study.quiet(optuna):
            study = optuna.create_study(
                sampler=sampler(0), directions=["minimize"] * num_values
            )
            noted = {}
            for i, (t, told) in enumerate(zip(state.t, values.tolist(), strict=True)):
                params = optuna_study.to_params(axes, t)
                if i % self.population_size:
                    trial = optuna.trial.create_trial(
                        params=params, distributions=kinds, values=told,
                        system_attrs=noted,
                    )  # fmt: skip
                    study.add_trial(trial)
                    continue
                # The first of a generation is asked for again: as its parameters are
                # read, optuna chooses the parents and notes which generation it is.
                study.enqueue_trial(params)
                trial = study.ask(kinds)
                _ = trial.relative_params
                study.tell(trial, told)
                noted = study.get_trials(deepcopy=False)[-1].system_attrs
            study.sampler = sampler(seed_from_key(key))
            asked = study.ask(kinds).params
        t = optuna_study.from_params(axes, asked)
        return spaces.from_unit(state.space, t), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Remembers the trial."""
        return state.told(alpha, value)
