"""Checkpoints, from which a run that was killed continues to the same bits."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .number_checks import check_positive_int
from .runtime import atomic_io
from .runtime.array_folder import (
    Arrays,
    array_name,
    check_folder_path,
    digest_folder,
    digest_json,
    read_arrays,
    remove_arrays,
    temporary_folders,
    to_named_arrays,
    write_arrays,
)
from .runtime.console import printable
from .runtime.devices import run_on_first_process
from .runtime.fingerprint import HASH
from .runtime.machine import (
    RunFingerprint,
    describe_machine,
    warn_of_other_machines,
)
from .runtime.user_warnings import warn_user

Tree = TypeVar("Tree")

NO_STEP = -1
NUM_KEPT = 2  # the newest checkpoint, and the previous one in case that is corrupt
METADATA_HEAD = b'{\n "step"'  # the first bytes of all metadata
# These differ whenever anything else does, and are named only if nothing else differs.
DERIVED_NAMES = ("program", "initial state")
NUM_DEVICES = "number of devices"


@dataclass(frozen=True)
class Checkpoints:
    """The folder in which a run is saved, and the interval between checkpoints.

    A checkpoint contains everything that changes during a run: ``alpha``, ``w``, the
    states of optimizer and estimator (adjoints, tables of variance reduction), keys and
    the records of all steps. The same call with the same folder continues from the
    newest checkpoint and ends with the bits of a run that was never interrupted. After
    a finished run it returns the trace, or continues to a larger ``num_steps`` or
    ``budget``; metrics of the former last step stay, which a longer run may not have.

    Args:
      folder: Folder of this run only; it is created if it does not exist.
      every: Number of outer steps between checkpoints, rounded up to a multiple of
        ``record_every``. The end of a run is saved too, and so is the block of steps
        that Ctrl-C or an error of ``progress`` ends.

    The last two intact checkpoints are kept. A new one counts only once it is complete
    and on disk, so that it survives a power failure. The SHA-256 of all files is
    checked before they are read: a corrupt checkpoint is skipped with a warning, and
    the previous one is used.

    If the folder cannot be written to, or the disk is full, one warning is issued and
    the run continues; earlier checkpoints are kept.

    Equal bits require the same kind of device and the same version of JAX, else the run
    is refused. They also require the same processor with the same number of usable
    cores: a run that continues on another one issues a warning that names the
    difference. Functions on the host, such as those of `jax.pure_callback`, are no part
    of the program: a change of their code or numbers is not noticed.

    With several processes (`jax.distributed`) the first one writes and reads, and sends
    the others what it read, so that they need no access to the folder. Only the same
    number of processes and devices can continue the run.

    Cost: one copy of the state and of the rows of all steps so far to the host and to
    the disk per checkpoint, about 0.1 s if both are small. With ``record_alphas`` the
    rows hold an ``alpha`` each, so that the time of a checkpoint grows during the run.

    Raises:
      TypeError: ``folder`` is not a path.
      ValueError: ``every`` is not a positive integer. When the run starts: the folder
        contains another run (the message names what differs: data, starting point, key,
        settings, losses or the program), a longer run, or only corrupt checkpoints, or
        another process is running in it.

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
    >>> run().status  # continues
    'completed'
    >>> folder.cleanup()
    """

    folder: str | os.PathLike
    every: int = 1

    def __post_init__(self):
        """Checks the types of the fields."""
        check_folder_path(self.folder)
        check_positive_int("every", self.every)


def check_checkpoints(checkpoints: Any) -> None:
    """Raises TypeError unless the argument is None or a `Checkpoints`."""
    if not (checkpoints is None or isinstance(checkpoints, Checkpoints)):
        raise TypeError(
            "checkpoints must be hg.Checkpoints(folder, every); got "
            f"{type(checkpoints).__name__}."
        )


# Fingerprints.


def _check_same_run(
    folder: Path, metadata: dict[str, Any], current: RunFingerprint
) -> None:
    """Raises ValueError, naming the differences, if a folder contains another run."""
    saved = metadata["run"]
    names = [name for name in saved | current if saved.get(name) != current.get(name)]
    # Another machine may round the initial state, which is made of w and alpha there.
    is_rounded = any(x != describe_machine() for x in metadata["machines"])
    if not names or (is_rounded and names == ["initial state"]):
        return
    names = [name for name in names if name not in DERIVED_NAMES] or names
    # The texts of all functions differ as well.
    names = [NUM_DEVICES] if NUM_DEVICES in names else names

    def describe(name: str) -> str:
        old, new = saved.get(name, "unknown"), current.get(name, "unknown")
        if HASH in old + new:
            return f"{name} differs"
        return f"{name} is {printable(old)} in the folder and {new} now"

    raise ValueError(
        f"folder must not contain another run; in {folder} "
        f"{', '.join(map(describe, names))}. Repeat the call that started the run, or "
        "choose another folder."
    )


# The folder.


class CorruptCheckpointError(Exception):
    """A file of a checkpoint cannot be read or is not as it was written."""


class CheckpointFolder:
    """The checkpoints of one run, each an Orbax folder ``step-N`` and ``step-N.json``.

    The JSON file contains the fingerprint of the run, the machines on which it ran, the
    digest of every file, and its own digest under "sha256". It has the name
    ``step-N.writing`` while the others are written or removed, which marks an
    interrupted call. Only files that this class wrote are ever removed: those that the
    JSON file names and, if it names none yet, those with a name of Orbax. Corrupt
    checkpoints are renamed where their step is written again.

    Attributes:
      path: The folder.
      every: Number of steps between checkpoints.
      fingerprint: What determines the bits of the run.
      is_writable: False if checkpoints can only be read.
      machines: The machines on which the run was made so far, without this one.
      intact_steps: The last steps that were checked or written, the newest last.
      has_failed: True if a checkpoint could not be written, of which a warning told.
    """

    def __init__(self, checkpoints: Checkpoints, fingerprint: RunFingerprint):
        # `os.path` leaves a name such as "~run1" as it is if there is no such user.
        self.path = Path(os.path.expanduser(checkpoints.folder))
        self.every = checkpoints.every
        self.fingerprint, self.is_writable = fingerprint, False
        self.has_failed, self.machines = False, []
        self.intact_steps: list[int] = []

    def open(self, stack: contextlib.ExitStack) -> None:
        """Creates and locks the folder until ``stack`` is closed.

        A warning is issued if the folder cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"folder must be a folder for checkpoints; got the file {self.path}."
            )
        try:
            atomic_io.make_directory(self.path)
            file = atomic_io.open_without_links(self.path / "lock", "a")
            atomic_io.lock_file(stack.enter_context(file), self.path)
        except OSError as error:
            warn_user(
                f"no checkpoint can be written to {self.path} ({error}); the run "
                "continues without new ones"
            )
        else:
            self.is_writable = True

    def load(self, blank_fn: Callable[[int], Tree]) -> Tree | None:
        """Returns the newest intact checkpoint, or None if the folder has none.

        Args:
          blank_fn: ``step -> tree`` of the structure, shapes, dtypes and sharding that
            the checkpoint of that step has.

        Raises:
          ValueError: The folder contains another run, or only corrupt checkpoints.
        """
        newest_step = lambda: np.asarray(self._newest_step(), np.int32)
        step = int(run_on_first_process(newest_step, np.zeros((), np.int32)))
        if step == NO_STEP:
            return None
        arrays, static = eqx.partition(blank_fn(step), eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        # Leaves are stored by index, so that names of user keys need no escaping.
        like = jax.tree.map(np.empty_like, to_named_arrays(leaves))
        saved = run_on_first_process(
            lambda: read_arrays(self._arrays_path(step), like), like
        )
        leaves = [
            _fill(leaf, saved[array_name(i)]) if leaf.size else leaf
            for i, leaf in enumerate(leaves)
        ]
        return eqx.combine(jax.tree.unflatten(structure, leaves), static)

    def save(self, step: int, tree: PyTree) -> None:
        """Writes a checkpoint, or issues a warning the first time that it fails."""
        # All processes gather sharded arrays; only the first one writes.
        arrays = to_named_arrays(jax.tree.leaves(eqx.filter(tree, eqx.is_array)))
        if not self.is_writable:
            return
        try:
            self._write(step, arrays)
        except Exception as error:  # Orbax reports a full disk by several types
            with contextlib.suppress(OSError):
                self._remove_incomplete()
            if self.has_failed:
                return
            self.has_failed = True
            steps = self.intact_steps
            newest = f"the newest is of step {steps[-1]}" if steps else "none exists"
            warn_user(
                f"the checkpoint of step {step} could not be written to {self.path} "
                f"({type(error).__name__}: {error}); {newest}. The run continues "
                "and tries to write each later checkpoint, without a further warning"
            )

    def _newest_step(self) -> int:
        """Returns the step of the newest intact checkpoint, or `NO_STEP`."""
        errors = []
        for step in self._steps():
            try:
                self._check(step)
            except CorruptCheckpointError as error:
                errors.append(f"step {step}: {error}")
                continue
            if errors:
                warn_user(
                    f"a checkpoint in {self.path} is corrupt ({'; '.join(errors)}); "
                    f"the run continues from the checkpoint of step {step}"
                )
            metadata = self._read_metadata(self._metadata_path(step))
            self.machines, self.intact_steps = metadata["machines"], [step]
            warn_of_other_machines(
                f"the checkpoints in {self.path} were made", self.machines
            )
            return step
        if errors:
            raise ValueError(
                f"folder must contain an intact checkpoint; all in {self.path} are "
                f"corrupt ({'; '.join(errors)}). Delete the folder to start again."
            )
        return NO_STEP

    def _metadata_path(self, step: int) -> Path:
        return self.path / f"step-{step:09d}.json"

    def _arrays_path(self, step: int) -> Path:
        return self.path / f"step-{step:09d}"

    def _marker_path(self, step: int) -> Path:
        return self.path / f"step-{step:09d}.writing"

    def _steps(self, suffix: str = "json") -> list[int]:
        """Returns the steps of all complete checkpoints, the newest first.

        The suffix "writing" selects interrupted checkpoints instead.
        """
        names = (file.name for file in self.path.glob(f"step-*.{suffix}"))
        number = r"(\d{9}|[1-9]\d{9,})"  # as `_metadata_path` writes it
        matches = [re.fullmatch(rf"step-{number}\.{suffix}", name) for name in names]
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def _read_metadata(self, file: Path) -> dict[str, Any]:
        """Returns the metadata of a checkpoint; raises an error if it is corrupt."""
        try:
            metadata = json.loads(file.read_text())
            sha256 = metadata.pop("sha256")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptCheckpointError(f"{file.name} cannot be read") from error
        name = "step-" + str(metadata.get("step")).zfill(9)
        if sha256 != digest_json(metadata) or name != file.stem:
            raise CorruptCheckpointError(f"{file.name} is not as it was written")
        return metadata

    def _check(self, step: int) -> None:
        """Raises an error if a checkpoint is corrupt or of another run."""
        folder = self._arrays_path(step)
        metadata = self._read_metadata(self._metadata_path(step))
        _check_same_run(self.path, metadata, self.fingerprint)
        saved = metadata["files"]
        try:
            current = digest_folder(folder, saved)
        except OSError as error:
            raise CorruptCheckpointError(f"{folder.name} cannot be read") from error
        for name in saved:
            if current.get(name) != saved[name]:
                raise CorruptCheckpointError(
                    f"{folder.name}/{name} is not as it was written"
                )

    def _write(self, step: int, arrays: Arrays) -> None:
        self._remove_incomplete()
        self._set_aside(step)
        self._write_marker(step, {})
        write_arrays(self._arrays_path(step), arrays)
        atomic_io.fsync_tree(self._arrays_path(step))
        # A power failure must not leave metadata of arrays that are not on disk.
        self._write_marker(step, digest_folder(self._arrays_path(step)))
        self._marker_path(step).rename(self._metadata_path(step))
        atomic_io.fsync_path(self.path)
        # Others may be corrupt. They do not count, and those of later steps stay.
        steps = [*(x for x in self.intact_steps if x != step), step][-NUM_KEPT:]
        self.intact_steps = steps
        for old_step in self._steps() if len(steps) == NUM_KEPT else []:
            if old_step < min(steps):
                self._remove(old_step)

    def _write_marker(self, step: int, files: dict[str, str]) -> None:
        """Writes the metadata under the name that marks an incomplete checkpoint."""
        machines = [*self.machines, describe_machine()]
        metadata = {
            "step": step,
            "run": self.fingerprint,
            "machines": [x for i, x in enumerate(machines) if x not in machines[:i]],
            "files": files,
        }
        text = json.dumps(metadata | {"sha256": digest_json(metadata)}, indent=1)
        atomic_io.atomic_write(self._marker_path(step), text + "\n")

    def _remove(self, step: int) -> None:
        """Removes a checkpoint of this run, which becomes an interrupted one first."""
        metadata, marker = self._metadata_path(step), self._marker_path(step)
        with contextlib.suppress(CorruptCheckpointError, OSError):
            is_own = self._read_metadata(metadata)["run"] == self.fingerprint
            if is_own and not os.path.lexists(marker):
                metadata.rename(marker)
                self._remove_incomplete()

    def _set_aside(self, step: int) -> None:
        """Renames a corrupt checkpoint, in whose place another one is written.

        Raises:
          FileExistsError: A file or folder with a name that is needed is not of this
            class.
        """
        metadata, arrays = self._metadata_path(step), self._arrays_path(step)
        if metadata.exists():
            is_used = lambda n: any(self.path.glob(f"{arrays.name}*.corrupt-{n}"))
            number = next(n for n in itertools.count(1) if not is_used(n))
            for path in (arrays, metadata):  # arrays without metadata would stay
                if path.exists():
                    path.rename(path.with_name(f"{path.name}.corrupt-{number}"))
        paths = [metadata, arrays, *temporary_folders(arrays), self._marker_path(step)]
        draft = atomic_io.draft_path(paths[-1])
        is_regular = draft.is_file() and not draft.is_symlink()
        head = draft.read_bytes()[: len(METADATA_HEAD)] if is_regular else None
        if head not in (b"", METADATA_HEAD):
            paths.append(draft)  # not of an interrupted call
        for path in paths:
            if os.path.lexists(path):
                raise FileExistsError(f"{path.name} is not part of a checkpoint")

    def _remove_incomplete(self) -> None:
        """Removes what interrupted calls have left, and nothing else."""
        complete = self._steps()
        for step in self._steps("writing"):
            marker, folder = self._marker_path(step), self._arrays_path(step)
            if marker.is_symlink():
                continue
            # After an error of the disk the marker stays, so that this is tried again.
            with contextlib.suppress(CorruptCheckpointError, OSError):
                files = self._read_metadata(marker)["files"]
                if step not in complete:
                    for path in (folder, *temporary_folders(folder)):
                        remove_arrays(path, files)
                marker.unlink()


@contextlib.contextmanager
def open_checkpoints(
    checkpoints: Checkpoints, fingerprint: RunFingerprint
) -> Iterator[CheckpointFolder]:
    """Yields the folder, which the first process locks until the run ends."""
    folder = CheckpointFolder(checkpoints, fingerprint)
    with contextlib.ExitStack() as stack:
        run_on_first_process(lambda: folder.open(stack))
        yield folder


def _fill(leaf: Any, array: Any) -> Any:
    """Returns an array of the type and sharding of ``leaf`` with the saved values."""
    if isinstance(leaf, np.ndarray):
        return np.asarray(array)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))
    return leaf.at[...].set(array)
