"""A folder of models: ``NAME/VERSION/`` holds arrays, their description and SHA-256s.

A version is written to a draft folder, forced to disk, and then renamed into place; it
is never written again. ``sha256sum -c SHA256SUMS`` checks it without this package.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from ..problem import Bilevel
from ..problem_checks import check_problem_type
from ..runtime import atomic_io
from ..runtime.fingerprint import HASH, digest
from ..runtime.provenance import utc_now, versions
from . import arrays

FOLDER = "runs/models"
RECORD, ARRAYS, SUMS = "model.json", "arrays.npz", "SHA256SUMS"
FILES = RECORD, ARRAYS
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SUMS_LINE = r"([0-9a-f]{{64}})  {}\n"
SUMS_CONTENT = re.compile("".join(SUMS_LINE.format(re.escape(x)) for x in FILES))
TREES = ("w", "alpha")


@dataclass(frozen=True)
class Model:
    """The metadata of a saved model, without its arrays.

    Attributes:
      path: Folder of the version.
      sha256: SHA-256 of the file of arrays.
      record: Content of the version's ``model.json``.
    """

    path: Path
    sha256: str
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Name without the version."""
        return self.record["name"]

    @property
    def version(self) -> int:
        """Version, from 1."""
        return self.record["version"]

    @property
    def reference(self) -> str:
        """``NAME@VERSION``."""
        return f"{self.name}@{self.version}"

    @property
    def metrics(self) -> dict[str, float | None]:
        """Metrics that were saved with the model; None for one that is not finite."""
        return self.record["metrics"]

    @property
    def run(self) -> dict[str, Any]:
        """Origin of the model: command, versions, and data if they were given."""
        return self.record["run"]

    @property
    def leaves(self) -> dict[str, dict[str, Any]]:
        """dtype, shape and origin of each leaf of both trees."""
        return self.record["w"]["leaves"] | self.record["alpha"]["leaves"]


def save(
    name: str,
    w: PyTree,
    alpha: PyTree,
    *,
    folder: str | os.PathLike = FOLDER,
    metrics: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    problem: Bilevel | None = None,
    deduplicate_by: Sequence[str] = (),
) -> Model:
    """Saves ``(w, alpha)`` as the next version of a name.

    Several processes may save under one name at the same time: each gets a version of
    its own. An interrupted call leaves no version.

    Args:
      name: Name of letters, digits, ".", "_" and "-".
      w, alpha: Pytrees of arrays, numbers and PRNG keys. After `minimize`, ``trace.w``
        belongs to the ``alpha`` before the last step: train again for a pair.
      folder: Folder of all models.
      metrics: ``{name: number}``, such as the validation loss.
      run: Origin of the model as JSON, such as a configuration and a seed. It is added
        to the command and the versions of all packages, which are always saved, and
        replaces entries of the same name.
      problem: Problem whose data's SHA-256 is saved.
      deduplicate_by: Keys of ``run`` that identify the run of a model, such as
        ``("seed",)``. If a version with the same values of these keys contains the same
        bits, that version is returned and none is written, so that a program that was
        killed after it had saved can save again.

    Returns:
      The metadata; ``hg.models.load(model.reference)`` returns ``(w, alpha)``, equal to
      the bit.

    Cost: a copy on the host and the time of the disk.

    Raises:
      TypeError, ValueError: An argument is invalid.
      OSError: The disk is full or the folder read-only; existing versions are intact.

    >>> import tempfile, jax.numpy as jnp, hypergrad as hg
    >>> folder = tempfile.TemporaryDirectory()
    >>> model = hg.models.save(
    ...     "ridge", {"b": jnp.zeros(3)}, jnp.float32(0.1), folder=folder.name,
    ...     metrics={"loss": 0.25}, run={"seed": 0},
    ... )
    >>> model.reference, model.metrics["loss"], model.run["seed"]
    ('ridge@1', 0.25, 0)
    >>> w, alpha = hg.models.load("ridge", folder=folder.name)
    >>> w["b"].shape, float(alpha)
    ((3,), 0.1)
    >>> folder.cleanup()
    """
    home = Path(_check_folder(folder)) / _check_name(name)
    descriptions, leaves = {}, {}
    for root, tree in zip(TREES, (w, alpha), strict=True):
        descriptions[root], tree_leaves = arrays.flatten_tree(root, tree)
        leaves |= tree_leaves
    origin = _describe_run(run, problem)
    _check_deduplicate_by(deduplicate_by, origin)
    record = {
        "format": FORMAT,
        "name": name,
        "version": None,
        "saved": utc_now(),
        "metrics": _to_floats(metrics),
        "run": origin,
        **descriptions,
    }
    content = arrays.to_npz(leaves)
    with _explain_os_errors(name, home.parent):
        atomic_io.make_directory(home)
        with (home / ".lock").open("a") as lock:
            if _acquire(lock):
                for incomplete in home.glob(".part-*"):  # from a killed process
                    shutil.rmtree(incomplete)
            if deduplicate_by:
                model = _find_equal(home, record, _sha256(content), deduplicate_by)
                if model is not None:
                    # The process that wrote it may have been killed before this call.
                    atomic_io.fsync_path(home)
                    return model
            record["version"] = 1 + max(_list_versions(home), default=0)
            return _write_version(home, record, content)


def _find_equal(
    home: Path, record: dict[str, Any], sha256: str, keys: Sequence[str]
) -> Model | None:
    """Returns the newest version with the same trees and the same values of keys."""
    identity = lambda record: [
        *(record[root] for root in TREES),
        *(record["run"].get(key) for key in keys),
    ]
    for version in reversed(_list_versions(home)):
        with contextlib.suppress(ValueError):  # a damaged version equals no other
            model, _ = _read_version(home / str(version), FILES)
            if model.sha256 == sha256 and identity(model.record) == identity(record):
                return model
    return None


def _write_version(home: Path, record: dict[str, Any], content: bytes) -> Model:
    """Writes the files of a version to a draft folder and renames it into place."""
    record_content = (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()
    sums = f"{_sha256(record_content)}  {RECORD}\n{_sha256(content)}  {ARRAYS}\n"
    files = {RECORD: record_content, ARRAYS: content, SUMS: sums.encode()}
    draft, path = home / f".part-{uuid.uuid4().hex}", home / str(record["version"])
    try:
        draft.mkdir()
        for name, file_content in files.items():
            (draft / name).write_bytes(file_content)
        atomic_io.fsync_tree(draft)
        draft.rename(path)  # fails if the target has files
        atomic_io.fsync_path(home)
    except BaseException:
        _remove_draft(draft)
        raise
    return Model(path, _sha256(content), record)


def _describe_run(run: Any, problem: Any) -> dict[str, Any]:
    """Returns the origin of a model as JSON: the caller's entries and the defaults."""
    origin: dict[str, Any] = {"command": shlex.join(sys.argv)}
    if problem is not None:
        check_problem_type(problem)
        data = digest((problem.inner_data, problem.outer_data))
        origin["data"] = {"sha256": data.removeprefix(HASH)}
    if not isinstance(run, Mapping | None):
        raise TypeError(f"run must be a dict that JSON can hold; got {run!r}.")
    try:
        origin = json.loads(json.dumps(origin | dict(run or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"run must be a dict that JSON can hold; {error}.") from error
    return {"versions": versions()} | origin


def _to_floats(metrics: Any) -> dict[str, float | None]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping) or not all(isinstance(x, str) for x in metrics):
        raise TypeError(f"metrics must be {{name: number}}; got {metrics!r}.")
    try:
        numbers = {name: float(x) for name, x in metrics.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"metrics must be {{name: number}}; {error}.") from error
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _check_deduplicate_by(keys: Any, origin: dict[str, Any]) -> None:
    is_sequence = isinstance(keys, tuple | list)
    if not is_sequence or any(key not in list(origin) for key in keys):
        raise ValueError(
            f"deduplicate_by must contain keys of run, {', '.join(origin)}; got "
            f"{keys!r}."
        )


def _check_folder(folder: Any) -> Any:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, such as {FOLDER!r}; got {folder!r}.")
    return folder


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            "name must consist of letters, digits, '.', '_' and '-' and start with a "
            f"letter or digit; got {name!r}."
        )
    return name


@contextlib.contextmanager
def _explain_os_errors(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the model {name} could not be saved in {folder} ({error.strerror}). "
            "Existing versions are intact. Make room, or give another folder",
        ) from error


def _acquire(lock: Any) -> bool:
    """Waits for the lock of a name; returns False if the disk does not support it."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


def _remove_draft(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)


# Reading. SHA-256s are compared before anything is parsed.


def load(
    reference: str,
    *,
    folder: str | os.PathLike = FOLDER,
    like: tuple[PyTree, PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """Returns the saved ``(w, alpha)``, equal to the bit, after a check of its files.

    Args:
      reference: ``NAME@VERSION``, or ``NAME`` for the newest version.
      folder: Folder of all models.
      like: ``(w, alpha)`` with the structure of the result, as arrays or as
        `jax.eval_shape` returns them. Defaults to the saved structure of dicts, lists,
        tuples and None; it is required for other classes (of flax or equinox, named
        tuples), which are not stored.

    Raises:
      ValueError: The model does not exist; a file is damaged; ``like`` has other
        leaves; or a leaf has 64 bits but JAX is limited to 32.

    >>> import hypergrad as hg
    >>> hg.models.load("ridge@3", folder="no/folder")
    Traceback (most recent call last):
    ...
    ValueError: reference must name a model in no/folder, which has none; got ridge.
    """
    model, content = _open(reference, folder)
    like = (None, None) if like is None else like
    if not (isinstance(like, tuple) and len(like) == 2):
        raise TypeError(f"like must be (w, alpha); got {type(like).__name__}.")
    leaves = arrays.from_npz(content, model.leaves)
    w, alpha = (
        arrays.unflatten_tree(root, model.record[root], leaves, tree)
        for root, tree in zip(TREES, like, strict=True)
    )
    return w, alpha


def get(reference: str, *, folder: str | os.PathLike = FOLDER) -> Model:
    """Returns the metadata of a model after a check of all its files.

    Raises:
      ValueError: The model does not exist, or a file is damaged.
    """
    return _open(reference, folder)[0]


def export(
    reference: str, path: str | os.PathLike, *, folder: str | os.PathLike = FOLDER
) -> Model:
    """Writes the arrays of a model as npz, with names such as ``w['bias']``.

    The file can be read by `numpy.load`: dtypes that NumPy does not have are widened,
    such as bfloat16 to float32, and PRNG keys are stored as their data.

    Raises:
      ValueError: The model does not exist or is damaged, or the file exists.
    """
    model, content = _open(reference, folder)
    leaves = arrays.from_npz(content, model.leaves)
    leaves = {name: arrays.widen_dtype(array) for name, array in leaves.items()}
    path = Path(path)
    if path.exists():
        raise ValueError(f"path must not exist; got {path}. Give another file.")
    atomic_io.atomic_write(path, arrays.to_npz(leaves))
    return model


def find(folder: str | os.PathLike = FOLDER) -> tuple[list[Model], list[str]]:
    """Returns the models in a folder by name and version, and errors of the others.

    The arrays are not read; `get` and `load` check them.

    >>> import hypergrad as hg
    >>> hg.models.find("no/folder")
    ([], [])
    """
    models, errors = [], []
    for home in sorted(Path(_check_folder(folder)).glob("*")):
        for version in _list_versions(home):
            try:
                models.append(_read_version(home / str(version), (RECORD,))[0])
            except ValueError as error:
                errors.append(str(error))
    return models, errors


def _open(reference: str, folder: str | os.PathLike) -> tuple[Model, bytes]:
    """Returns the metadata of a model and the content of its file of arrays."""
    text = reference if isinstance(reference, str) else _check_name(reference)
    name, at_sign, version = text.partition("@")
    home = Path(_check_folder(folder)) / _check_name(name)
    existing = _list_versions(home)
    if not existing:
        names = sorted({model.name for model in find(folder)[0]})
        raise ValueError(
            f"reference must name a model in {folder}, which has "
            f"{', '.join(names) or 'none'}; got {name}."
        )
    version = version if at_sign else str(existing[-1])
    if version not in map(str, existing):
        raise ValueError(
            f"reference must name a version of {name} in {folder}, "
            f"{', '.join(map(str, existing))}; got {version!r}."
        )
    model, files = _read_version(home / version, FILES)
    return model, files[ARRAYS]


def _read_version(path: Path, names: Sequence[str]) -> tuple[Model, dict[str, bytes]]:
    """Returns the metadata of a version and the named files, which are checked."""

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise ValueError(
                f"the model {path} is damaged: {name} cannot be read "
                f"({error.strerror})."
            ) from error

    sums = SUMS_CONTENT.fullmatch(read(SUMS).decode("latin-1"))
    if sums is None:
        raise ValueError(f"the model {path} is damaged: {SUMS} was changed.")
    expected: dict[str, str] = dict(zip(FILES, sums.groups(), strict=True))
    files = {name: read(name) for name in names}
    for name, content in files.items():
        if _sha256(content) != expected[name]:
            raise ValueError(
                f"the model {path} is damaged: {name} does not have the SHA-256 with "
                "which it was written. Load another version."
            )
    return _parse_record(path, expected[ARRAYS], files[RECORD]), files


def _parse_record(path: Path, sha256: str, content: bytes) -> Model:
    """Returns the metadata of a version after a check that they are complete."""
    try:
        model = Model(path, sha256, json.loads(content))
        identity = model.reference, model.record["format"]
        _ = model.leaves, model.metrics, model.run["command"], model.run["versions"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a model of format {FORMAT}.") from error
    if identity != (f"{path.parent.name}@{path.name}", FORMAT):
        raise ValueError(
            f"{path} contains {identity[0]} of format {identity[1]}: its folder was "
            f"moved, or it is not of format {FORMAT}."
        )
    return model


def _list_versions(home: Path) -> list[int]:
    names = (path.name for path in home.glob("*"))
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]*", name))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
