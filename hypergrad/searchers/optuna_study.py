"""What searchers by optuna share: its studies, in coordinates of the unit cube."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..spaces import Axis


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


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's line about each new study; its warnings are left."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
