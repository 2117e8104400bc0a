"""Studies of optuna in the coordinates of the unit cube, for `TPE` and `NSGA2`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from .. import spaces
from ..runtime.compat import import_optional
from ..runtime.fingerprint import digest, fingerprint
from ..spaces import Axis


def import_optuna(searcher: str) -> Any:
    """Returns the package; raises an ImportError that says how to install it."""
    return import_optional("optuna", f"{searcher} needs optuna", "search")


def distributions(optuna: Any, axes: list[Axis]) -> dict[str, Any]:
    """Returns a distribution per axis, with names in the order of the axes."""

    def distribution(axis: Axis) -> Any:
        if axis.num_values is None:
            return optuna.distributions.FloatDistribution(0.0, 1.0)
        if axis.ordered:
            return optuna.distributions.IntDistribution(0, axis.num_values - 1)
        return optuna.distributions.CategoricalDistribution(range(axis.num_values))

    return {_name(i): distribution(axis) for i, axis in enumerate(axes)}


def to_params(axes: list[Axis], t: Float[np.ndarray, " axes"]) -> dict[str, Any]:
    """Returns a point as optuna's parameters; for a discrete axis the cell's index."""
    cell = lambda x, n: min(int(x * n), n - 1)
    return {
        _name(i): float(x) if axis.num_values is None else cell(x, axis.num_values)
        for i, (axis, x) in enumerate(zip(axes, t, strict=True))
    }


def from_params(axes: list[Axis], params: dict[str, Any]) -> Float[np.ndarray, " axes"]:
    """Returns the point of optuna's parameters, in the middle of a discrete cell."""
    t = []
    for i, axis in enumerate(axes):
        x = params[_name(i)]
        t.append(x if axis.num_values is None else (x + 0.5) / axis.num_values)
    return np.array(t)


def _name(index: int) -> str:
    return f"{index:06d}"


def to_optuna_trials(
    optuna: Any,
    space: PyTree,
    t: Float[np.ndarray, "trials axes"],
    values: Float[np.ndarray, " trials"] | None = None,
) -> list[Any]:
    """Returns trials as trials of optuna, which are running if there are no values."""
    axes = spaces.axes(space)
    kinds = distributions(optuna, axes)
    state = optuna.trial.TrialState.COMPLETE
    if values is None:
        state, values = optuna.trial.TrialState.RUNNING, np.full(len(t), None)
    return [
        optuna.trial.create_trial(
            state=state, params=to_params(axes, row), distributions=kinds, value=value
        )
        for row, value in zip(t, values, strict=True)
    ]


@contextmanager
def open_journal(
    optuna: Any, journal: str | os.PathLike, space: PyTree, problem: str
) -> Iterator[Any]:
    """Opens the study of a space and a problem in a file that several processes share.

    Args:
      optuna: The package.
      journal: The file, which may contain studies of other spaces and problems.
      space: The space.
      problem: The name of the problem.

    Raises:
      ValueError: The file cannot be read or written.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = os.path.expanduser(journal)
    lock: Any = JournalLock(path)  # has the interface of optuna's lock
    name = f"space {_fingerprint_space(space)}, problem {problem}"
    try:
        with quiet(optuna):
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(path, lock)),
                study_name=name,
                load_if_exists=True,
            )
        yield study
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            "journal must be a file of optuna that can be read and written; got "
            f"{path}, which raised {error!r}. Make room, or use another file in an "
            "existing folder."
        ) from error


def _fingerprint_space(space: PyTree) -> str:
    """Returns a fingerprint of the structure of a space and of three of its points.

    The structure does not show the numbers in a class that is no pytree. The points
    have four digits, because processors round differently.
    """
    num_axes = len(spaces.axes(space))
    points = [spaces.from_unit(space, np.full(num_axes, t)) for t in (0.1, 0.37, 0.9)]
    to_text = lambda leaf: [f"{x:.3e}" for x in np.ravel(leaf).tolist()]
    return fingerprint(digest(space), digest(jax.tree.map(to_text, points)))


class JournalLock:
    """Lets one process at a time write to a journal.

    optuna's own lock is a second file, which a process that is killed leaves behind. In
    some versions the other processes then wait forever. The operating system releases
    this lock when its process ends.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    def acquire(self) -> bool:
        """Waits for the lock and removes an incomplete last line of the file."""
        import fcntl

        self.file = self.path.open("rb+")  # closed by `release`
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            content = self.file.read()
            num_complete_bytes = content.rfind(b"\n") + 1
            if content and not num_complete_bytes:
                raise ValueError("the file has no complete line")
            self.file.truncate(num_complete_bytes)
        except BaseException:
            self.file.close()
            raise
        return True

    def release(self) -> None:
        """Releases the lock."""
        self.file.close()


@contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Silences optuna's message about each new study, but not its warnings."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
