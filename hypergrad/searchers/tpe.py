"""The tree-structured Parzen estimator, of optuna."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, PyTree

from .. import spaces
from ..settings import check_steps
from .trials import Trials, seed_of


class TPE(eqx.Module):
    """Samples where good trials are dense and bad ones are not.

    A density ``l(alpha)`` is fitted to the best trials and another, ``g``, to the
    rest; of candidates drawn from ``l`` the one with the largest ``l / g`` is tried.
    Integers and choices are at home here.

    Everything is optuna's ``TPESampler``, with its defaults, on the coordinates of
    `hypergrad.spaces.axes`, and seeded by the key of each ask.

    Args:
      num_initial: random trials at first. Static.

    Raises:
      ImportError: optuna is not installed (``pip install hypergrad-jax[search]``).
      ValueError: ``num_initial`` below 1; an unbounded space.

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

    citations = ("bergstra2011", "akiba2019")

    def __check_init__(self):
        check_steps("num_initial", self.num_initial)

    def init(self, space: PyTree, key: Array) -> Trials:
        """No trial yet."""
        del key
        _optuna()
        return Trials.none(space)

    def ask(self, state: Trials, key: Array) -> tuple[PyTree, Trials]:
        """The next proposal; the state is as it was."""
        optuna = _optuna()
        axes = spaces.axes(state.space)
        sizes = [axis.num_values for axis in axes]
        distributions = {f"{i:06d}": _distribution(x) for i, x in enumerate(axes)}
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=self.num_initial, seed=seed_of(key)
        )
        with _quiet(optuna):
            study = optuna.create_study(sampler=sampler)
            for t, value in zip(state.t, state.values, strict=True):
                cells = [
                    float(x) if n is None else int(x * n)
                    for x, n in zip(t, sizes, strict=True)
                ]
                params = dict(zip(distributions, cells, strict=True))
                study.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=distributions, value=value
                    )
                )
            asked = study.ask(distributions).params
        t = [
            asked[name] if n is None else (asked[name] + 0.5) / n
            for name, n in zip(distributions, sizes, strict=True)
        ]
        return spaces.from_unit(state.space, np.array(t)), state

    def tell(self, state: Trials, alpha: PyTree, value: Array) -> Trials:
        """Remembers the trial."""
        return state.told(alpha, value)


def _distribution(axis: spaces.Axis) -> Any:
    kinds = _optuna().distributions
    if axis.num_values is None:
        return kinds.FloatDistribution(0.0, 1.0)
    if axis.ordered:
        return kinds.IntDistribution(0, axis.num_values - 1)
    return kinds.CategoricalDistribution(range(axis.num_values))


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's line about each new study; its warnings are left."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "TPE needs optuna: pip install 'hypergrad-jax[search]'"
        ) from error
    return optuna
