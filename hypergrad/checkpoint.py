"""Checkpoints: a run that was killed goes on, to the same bits."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .runtime import atomic_io
from .runtime.devices import run_on_first_process
from .runtime.fingerprint import HASH
from .trees import to_numpy
from .validation import check_positive_int

Tree = TypeVar("Tree")
RunFingerprint = dict[str, str]
Arrays = dict[str, np.ndarray]

NO_STEP = -1
NUM_KEPT = 2  # the newest, and the one before should that be damaged
# What differs whenever anything does is named where nothing else is.
TOGETHER = ("program", "initial state")


@dataclass(frozen=True)
class Checkpoints:
    """Where `minimize` keeps what moves, and how often.

    All of it: ``alpha``, ``w``, the states of optimizer and estimator (adjoints,
    tables of variance reduction), keys, rows and ledger. The same call with the same
    folder goes on from the last checkpoint and ends with the bits of a run that was
    never interrupted, whenever it was killed; that of a finished run returns its trace.

    Args:
      folder: of this run alone; it is made where there is none.
      every: outer steps between checkpoints; where a run ends or stops there is one.

    A checkpoint is written beside the last two and counts once it is complete and on
    the disk, where a loss of power leaves it; its files are checked by SHA-256 before
    they are read. One that is damaged is passed over with a warning, and the one before
    is used.

    A folder that cannot be written to, or a full disk, brings a warning; the run goes
    on, and what was kept before stays. The same bits are promised on one kind of device
    and with one version of jax.

    Of several processes (`jax.distributed`) the first writes and reads, and sends the
    others what it read; no other has to see the folder, and the same number of
    processes and devices goes on.

    Cost: a copy of the carry to the host and to the disk, some 0.1 s for a small one.

    Raises:
      ValueError: the folder holds another run, which is told by what differs: data,
        starting point, key, settings, losses, the program; or no whole checkpoint; or
        another process that is alive runs in it.

    >>> import tempfile, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 1.0) ** 2
    >>> problem, estimator = hg.Bilevel(inner, outer), hg.Implicit(hg.Newton())
    >>> optimizer, folder = optax.sgd(0.25), tempfile.TemporaryDirectory()
    >>> loop = hg.OuterLoop(problem, estimator, optimizer)
    >>> run = lambda **limits: loop.run(
    ...     loop.init(0.0, 3.0), num_steps=4,
    ...     checkpoints=hg.Checkpoints(folder.name, every=2), **limits,
    ... )
    >>> run(time_limit=1e-9).status
    'stopped: time limit'
    >>> run().status  # goes on
    'completed'
    >>> folder.cleanup()
    """

    folder: str | os.PathLike
    every: int = 1

    def __post_init__(self):
        """Refuses what is no path, and no number of steps."""
        if not isinstance(self.folder, str | os.PathLike):
            raise TypeError(
                f"folder must be a path, such as 'runs/first'; got {self.folder!r}"
            )
        check_positive_int("every", self.every)


def check_checkpoints(checkpoints: Any) -> None:
    """Refuses what is none, before anything is traced."""
    if checkpoints is None:
        return
    if not isinstance(checkpoints, Checkpoints):
        raise TypeError(
            "checkpoints must be hg.Checkpoints(folder, every); got "
            f"{type(checkpoints).__name__}"
        )


# Whose checkpoints they are.


def runtime_environment() -> RunFingerprint:
    """What the bits depend on beside the program."""
    from jaxlib.version import __version__ as jaxlib

    device = jax.devices()[0]
    return {
        "jax": f"{jax.__version__} on jaxlib {jaxlib}",
        "device": f"{device.platform} {device.device_kind}",
        "number of processes": str(jax.process_count()),
    }


def _compare(folder: Path, there: RunFingerprint, here: RunFingerprint) -> None:
    """Refuses a folder of another run, naming what differs."""
    names = [name for name in here if there.get(name) != here[name]]
    names = [name for name in names if name not in TOGETHER] or names
    if not names:
        return

    def told(name: str) -> str:
        old, new = there.get(name, "unknown"), here[name]
        if HASH in old + new:
            return f"{name} differs"
        return f"{name} is {old} there and {new} here"

    raise ValueError(
        f"{folder} holds the checkpoints of another run: "
        f"{', '.join(map(told, names))}; go on with what began it, or give another "
        "folder"
    )


# The folder.


class CorruptCheckpointError(Exception):
    """A checkpoint that is not what was written."""


class CheckpointFolder:
    """The checkpoints of one run: ``step-N/`` by orbax, ``step-N.json`` to check it."""

    def __init__(self, path: Path, run: RunFingerprint):
        self.path, self.run, self.writable = path, run, False

    def open(self, stack: contextlib.ExitStack) -> None:
        """Holds it until ``stack`` ends; warns where nothing can be written to it."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"{self.path} is no folder; give another one for checkpoints"
            )
        try:
            atomic_io.make_directory(self.path)
            lock_file(stack.enter_context((self.path / "lock").open("a")), self.path)
            self.clear()
        except OSError as error:
            warnings.warn(
                f"no checkpoint can be written to {self.path} ({error}); the run goes "
                "on without, from what is there",
                stacklevel=8,
            )
        else:
            self.writable = True

    def load(self, blank_fn: Callable[[int], Tree]) -> Tree | None:
        """Returns the newest intact checkpoint, or None if the folder has none.

        Args:
          blank_fn: ``step -> tree`` of the structure, shapes and types that the
            checkpoint of that step has.
        """
        step = int(
            run_on_first_process(
                lambda: np.asarray(self._newest_step(), np.int32),
                np.zeros((), np.int32),
            )
        )
        if step == NO_STEP:
            return None
        arrays, static = eqx.partition(blank_fn(step), eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        like = jax.tree.map(np.empty_like, _named(leaves))
        found = run_on_first_process(lambda: self._read(step, like), like)

        def written_over(leaf, array):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
            if isinstance(leaf, np.ndarray):
                return np.asarray(array)
            return leaf.at[...].set(array)  # keeps its sharding

        leaves = [
            written_over(leaf, found[_name(i)]) if leaf.size else leaf
            for i, leaf in enumerate(leaves)
        ]
        return eqx.combine(jax.tree.unflatten(structure, leaves), static)

    def _newest_step(self) -> int:
        """Returns the step of the newest intact checkpoint, or `NO_STEP`."""
        flaws = []
        for step in self._steps():
            try:
                self._check(step)
            except CorruptCheckpointError as flaw:
                flaws.append((step, str(flaw)))
                continue
            for damaged, flaw in flaws:
                warnings.warn(
                    f"the checkpoint of step {damaged} in {self.path} is damaged "
                    f"({flaw}); the run goes on from that of step {step}",
                    stacklevel=6,
                )
                if self.writable:
                    self._remove(damaged)
            return step
        if flaws:
            said = "; ".join(f"step {step}: {flaw}" for step, flaw in flaws)
            raise ValueError(
                f"no checkpoint in {self.path} is whole ({said}); delete the folder to "
                "begin anew"
            )
        return NO_STEP

    def save(self, step: int, tree: PyTree) -> None:
        """Keeps a checkpoint, or warns that it could not be."""
        arrays = _named(jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
        if not self.writable:
            return
        try:
            self._write(step, arrays)
        except Exception as error:  # a full disk has many types, by who meets it
            with contextlib.suppress(OSError):
                self.clear()
            kept = max(self._steps(), default=None)
            have = (
                "there is none yet" if kept is None else f"the last is of step {kept}"
            )
            warnings.warn(
                f"the checkpoint of step {step} could not be written to {self.path} "
                f"({type(error).__name__}: {error}); the run goes on, {have}",
                stacklevel=4,
            )

    def _file(self, step: int) -> Path:
        return self.path / f"step-{step:09d}.json"

    def _arrays(self, step: int) -> Path:
        return self.path / f"step-{step:09d}"

    def _steps(self) -> list[int]:
        """Those that were completed, the newest first."""
        files = self.path.glob("step-*.json")
        named = [re.fullmatch(r"step-(\d{9})", file.stem) for file in files]
        return sorted((int(match[1]) for match in named if match), reverse=True)

    def _check(self, step: int) -> None:
        """Raises where anything is not as written, or of another run."""
        try:
            said = json.loads(self._file(step).read_text())
            seal = said.pop("sha256")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptCheckpointError(
                f"{self._file(step).name} cannot be read"
            ) from error
        if seal != _seal(said):
            raise CorruptCheckpointError(
                f"{self._file(step).name} is not as it was written"
            )
        _compare(self.path, said["run"], self.run)
        try:
            found = _hashes(self._arrays(step))
        except OSError as error:
            raise CorruptCheckpointError(
                f"{self._arrays(step).name} cannot be read"
            ) from error
        if found != said["files"]:
            names = sorted(found.keys() | said["files"].keys())
            wrong = [
                name for name in names if found.get(name) != said["files"].get(name)
            ]
            raise CorruptCheckpointError(
                f"{self._arrays(step).name}/{wrong[0]} is not as written"
            )

    def _read(self, step: int, like: Arrays) -> Arrays:
        with _orbax() as checkpointer:
            return checkpointer.restore(self._arrays(step).absolute(), like)

    def _write(self, step: int, arrays: Arrays) -> None:
        self._remove(step)
        with _orbax() as checkpointer:
            checkpointer.save(self._arrays(step).absolute(), arrays)
        atomic_io.fsync_tree(self._arrays(step))
        said = {"step": step, "run": self.run, "files": _hashes(self._arrays(step))}
        text = json.dumps(said | {"sha256": _seal(said)}, indent=1)
        atomic_io.atomic_write(self._file(step), text + "\n")
        for old in self._steps()[NUM_KEPT:]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        """First what says that it is complete."""
        self._file(step).unlink(missing_ok=True)
        shutil.rmtree(self._arrays(step), ignore_errors=True)

    def clear(self) -> None:
        """Removes what was begun and not completed."""
        complete = {self._arrays(step).name for step in self._steps()}
        for begun in self.path.glob("step-*"):
            if begun.is_dir() and begun.name not in complete:
                shutil.rmtree(begun, ignore_errors=True)
            elif begun.suffix == ".part":
                begun.unlink(missing_ok=True)


@contextlib.contextmanager
def open_checkpoints(
    checkpoints: Checkpoints, run: RunFingerprint
) -> Iterator[CheckpointFolder]:
    """The folder, held by the first process until the run ends or the process dies."""
    folder = CheckpointFolder(Path(checkpoints.folder), run)
    with contextlib.ExitStack() as stack:
        run_on_first_process(lambda: folder.open(stack))
        yield folder


def lock_file(file: IO, name: Path) -> None:
    """Locks a file by the operating system, which lets go when the process dies.

    Raises:
      ValueError: another process holds it; ``name`` says what.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another process is running in {name}; wait for it, or give another folder"
        ) from error


def _name(index: int) -> str:
    return f"{index:05d}"


def _named(leaves: list) -> Arrays:
    """Leaves by their place; orbax keeps no array without numbers, nor need it."""
    return {_name(i): to_numpy(leaf) for i, leaf in enumerate(leaves) if leaf.size}


def _orbax() -> Any:
    """What writes and reads arrays, waiting for no other process."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="hypergrad",
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _seal(said: dict) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""

    def of(file: Path) -> str:
        with file.open("rb") as bytes_of:
            return hashlib.file_digest(bytes_of, "sha256").hexdigest()

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): of(file) for file in files}
