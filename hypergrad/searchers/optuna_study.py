"""What searchers by optuna share: its studies, in coordinates of the unit cube."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import PyTree

from .. import spaces
from ..identity import digest, fingerprint
from ..spaces import Axis
from .trials import Trials


def load(name: str) -> Any:
    """optuna; an ImportError that says what to install for the searcher ``name``."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            f"{name} needs optuna: pip install 'hypergrad-jax[search]'"
        ) from error
    return optuna


def distributions(optuna: Any, axes: list[Axis]) -> dict[str, Any]:
    """One an axis, by names in the order of the axes."""

    def kind(axis: Axis) -> Any:
        kinds = optuna.distributions
        if axis.num_values is None:
            return kinds.FloatDistribution(0.0, 1.0)
        if axis.ordered:
            return kinds.IntDistribution(0, axis.num_values - 1)
        return kinds.CategoricalDistribution(range(axis.num_values))

    return {f"{i:06d}": kind(axis) for i, axis in enumerate(axes)}


def to_params(axes: list[Axis], t: np.ndarray) -> dict[str, Any]:
    """A point of the cube by those names; of a discrete axis the cell."""
    sizes = [axis.num_values for axis in axes]
    return {
        f"{i:06d}": float(x) if n is None else int(x * n)
        for i, (x, n) in enumerate(zip(t, sizes, strict=True))
    }


def from_params(axes: list[Axis], params: dict[str, Any]) -> np.ndarray:
    """Back, to the middle of a cell."""
    t = [
        x if axis.num_values is None else (x + 0.5) / axis.num_values
        for axis, x in ((axis, params[f"{i:06d}"]) for i, axis in enumerate(axes))
    ]
    return np.array(t)


def trials(optuna: Any, state: Trials) -> list[Any]:
    """Each with its value, as optuna has them."""
    axes = spaces.axes(state.space)
    kinds = distributions(optuna, axes)
    return [
        optuna.trial.create_trial(
            params=to_params(axes, t), distributions=kinds, value=value
        )
        for t, value in zip(state.t, state.values, strict=True)
    ]


def shared(optuna: Any, journal: str | os.PathLike, space: PyTree) -> Any:
    """The study of a space in a file that several processes read and add to."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with quiet(optuna):
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(os.fspath(journal))),
            study_name=f"space {fingerprint(digest(space))}",
            load_if_exists=True,
        )


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's line about each new study; its warnings are left."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
