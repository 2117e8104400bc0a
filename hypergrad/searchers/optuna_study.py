"""What searchers by optuna share: its studies, in coordinates of the unit cube."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from .. import spaces
from ..runtime.fingerprint import digest, fingerprint
from ..spaces import Axis
from .base import Trials


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


@contextmanager
def shared(optuna: Any, journal: str | os.PathLike, space: PyTree) -> Iterator[Any]:
    """The study of a space in a file that several processes read and add to.

    Raises:
      ValueError: the file cannot be read or written.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = os.fspath(journal)
    lock: Any = JournalLock(path)  # of optuna's class but by name
    try:
        with quiet(optuna):
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(path, lock)),
                study_name=f"space {fingerprint(digest(space))}",
                load_if_exists=True,
            )
        yield study
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the journal {path} cannot be read or written ({error!r}); make room, or "
            "give another file, in a folder that is there"
        ) from error


class JournalLock:
    """One process at a time adds to a journal; the others wait.

    optuna's own lock is a file beside it, which one that was killed leaves behind for
    the others to wait for, for ever in some versions. This one is of the operating
    system, which lets go when the process dies.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def acquire(self) -> bool:
        """Waits, and drops a last line that was cut off: no one is writing it now."""
        import fcntl

        self.file = self.path.open("rb+")  # until it is released
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            content = self.file.read()
            whole = content.rfind(b"\n") + 1
            if content and not whole:
                raise ValueError("it has no whole line")
            self.file.truncate(whole)
        except BaseException:
            self.file.close()
            raise
        return True

    def release(self) -> None:
        """Lets the next one write."""
        self.file.close()


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Without optuna's line about each new study; its warnings are left."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
