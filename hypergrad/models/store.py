"""A folder of models: ``NAME/VERSION/`` holds the arrays, what they are, and SHA-256s.

A version is written beside the others, forced to the disk, and then put in its place
by a rename; it is never written again. ``sha256sum -c SHA256SUMS`` checks it too.
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
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LINE = r"([0-9a-f]{64})  {}\n"
LINES = re.compile("".join(LINE.replace("{}", re.escape(x)) for x in (RECORD, ARRAYS)))
PARTS = ("w", "alpha")


@dataclass(frozen=True)
class Model:
    """A model that was kept: what is known of it, without its arrays.

    Attributes:
      path: of its version's folder.
      sha256: of its arrays' file.
      record: all that was written of it.
    """

    path: Path
    sha256: str
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """What it is called, without the version."""
        return self.record["name"]

    @property
    def version(self) -> int:
        """From 1."""
        return self.record["version"]

    @property
    def reference(self) -> str:
        """``NAME@VERSION``."""
        return f"{self.name}@{self.version}"

    @property
    def metrics(self) -> dict[str, float | None]:
        """Numbers that were given with it; None for one that is not finite."""
        return self.record["metrics"]

    @property
    def run(self) -> dict[str, Any]:
        """What made it: command, versions, and data where they were given."""
        return self.record["run"]

    @property
    def leaves(self) -> dict[str, dict[str, Any]]:
        """dtype, shape, and what it was, of each leaf of both trees."""
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
    once: Sequence[str] = (),
) -> Model:
    """Keeps a chosen ``(w, alpha)`` as the next version of a name.

    Args:
      name: letters, digits, ".", "_" and "-".
      w, alpha: any pytrees of arrays, numbers and PRNG keys. After `minimize` a trace's
        ``w`` belongs to the ``alpha`` before the last step: train once more for the
        pair.
      folder: of all models.
      metrics: ``{name: number}``, such as what it was chosen by.
      run: what made it, in JSON: its configuration, its seed, a number of the trace. It
        goes over what is known anyway, the command, the time and all versions.
      problem: whose data's SHA-256 is kept.
      once: keys of ``run`` that say whose model it is, such as ("seed",). A version
        that says the same under all of them and holds the same bits is then taken in
        place of a new one, so that what was killed after it saved may save again.

    Returns:
      What was kept; ``hg.models.load(model.reference)`` is ``(w, alpha)`` to the bit.

    Of several who save one name at a time each gets a version of its own. One that was
    interrupted leaves nothing that counts.

    Cost: a copy on the host and the time of the disk.

    Raises:
      TypeError, ValueError: an argument is not as above.
      OSError: the disk is full or the folder read-only; all that was there still is.

    >>> import tempfile, jax.numpy as jnp, hypergrad as hg
    >>> folder = tempfile.TemporaryDirectory()
    >>> kept = hg.models.save(
    ...     "ridge", {"b": jnp.zeros(3)}, jnp.float32(0.1), folder=folder.name,
    ...     metrics={"loss": 0.25}, run={"seed": 0},
    ... )
    >>> kept.reference, kept.metrics["loss"], kept.run["seed"]
    ('ridge@1', 0.25, 0)
    >>> w, alpha = hg.models.load("ridge", folder=folder.name)
    >>> w["b"].shape, float(alpha)
    ((3,), 0.1)
    >>> folder.cleanup()
    """
    home = Path(_folder(folder)) / _name(name)
    described, leaves = {}, {}
    for root, tree in zip(PARTS, (w, alpha), strict=True):
        described[root], named = arrays.take_apart(root, tree)
        leaves |= named
    made = _run(run, problem)
    if not isinstance(once, tuple | list) or any(x not in list(made) for x in once):
        raise ValueError(f"once must be keys of run, {', '.join(made)}; got {once!r}")
    record = {
        "format": FORMAT,
        "name": name,
        "version": None,
        "saved": utc_now(),
        "metrics": _metrics(metrics),
        "run": made,
        **described,
    }
    content = arrays.written(leaves)
    with _errors_in_words(name, home.parent):
        atomic_io.make_directory(home)
        with (home / ".lock").open("a") as lock:
            if _wait_for(lock):
                for begun in home.glob(".part-*"):  # by one that was killed
                    shutil.rmtree(begun)
            if once and (kept := _same(home, record, _sha256(content), once)):
                atomic_io.fsync_path(home)  # it may have been killed before it did
                return kept
            record["version"] = 1 + max(_versions(home), default=0)
            return _written(home, record, content)


def _same(
    home: Path, record: dict[str, Any], sha256: str, once: Sequence[str]
) -> Model | None:
    """The newest version of these trees whose run says the same under ``once``."""
    known = lambda of: [*(of[x] for x in PARTS), *(of["run"].get(x) for x in once)]
    for version in reversed(_versions(home)):
        with contextlib.suppress(ValueError):  # a damaged one stands for none
            model, _ = _checked(home / str(version), (RECORD, ARRAYS))
            if model.sha256 == sha256 and known(model.record) == known(record):
                return model
    return None


def _written(home: Path, record: dict[str, Any], content: bytes) -> Model:
    """All files of a version, and only then its folder by its name."""
    said = (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()
    sums = f"{_sha256(said)}  {RECORD}\n{_sha256(content)}  {ARRAYS}\n".encode()
    draft, path = home / f".part-{uuid.uuid4().hex}", home / str(record["version"])
    try:
        draft.mkdir()
        for file, bytes_of in ((RECORD, said), (ARRAYS, content), (SUMS, sums)):
            (draft / file).write_bytes(bytes_of)
        atomic_io.fsync_tree(draft)
        draft.rename(path)  # onto a folder with files it fails
        atomic_io.fsync_path(home)
    except BaseException:
        _clear(draft)
        raise
    return Model(path, _sha256(content), record)


def load(
    reference: str,
    *,
    folder: str | os.PathLike = FOLDER,
    like: tuple[PyTree, PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """The ``(w, alpha)`` that was saved, to the bit, once its files are checked.

    Args:
      reference: ``NAME@VERSION``, or NAME for the newest.
      folder: of all models.
      like: ``(w, alpha)``, arrays or `jax.eval_shape` of them, whose structure the
        trees are given. Trees of dicts, lists, tuples and None need none; other classes
        (of flax, equinox, named tuples) are not stored.

    Raises:
      ValueError: there is no such model; a file is damaged, which is named; ``like``
        has other leaves; a leaf has 64 bits and JAX has 32.

    >>> import hypergrad as hg
    >>> hg.models.load("ridge@3", folder="no/folder")
    Traceback (most recent call last):
    ...
    ValueError: no model ridge in no/folder; there is none yet
    """
    model, content = _open(reference, folder)
    like = (None, None) if like is None else like
    if not (isinstance(like, tuple) and len(like) == 2):
        raise TypeError(f"like must be (w, alpha); got {type(like).__name__}")
    found = arrays.read(content, model.leaves)
    w, alpha = (
        arrays.put_together(root, model.record[root], found, x)
        for root, x in zip(PARTS, like, strict=True)
    )
    return w, alpha


def get(reference: str, *, folder: str | os.PathLike = FOLDER) -> Model:
    """What is known of a model, all of its files checked.

    Raises:
      ValueError: there is no such model, or a file is damaged, which is named.
    """
    return _open(reference, folder)[0]


def export(
    reference: str, path: str | os.PathLike, *, folder: str | os.PathLike = FOLDER
) -> Model:
    """Writes a model's arrays as npz, by names such as ``w['bias']``, for `numpy.load`.

    What NumPy has no dtype for is widened, such as bfloat16 to float32; of PRNG keys it
    holds the data.

    Raises:
      ValueError: there is no such model, it is damaged, or the file is there already.
    """
    model, content = _open(reference, folder)
    found = arrays.read(content, model.leaves)
    found = {name: arrays.widened(array) for name, array in found.items()}
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already; give another file")
    atomic_io.atomic_write(path, arrays.written(found))
    return model


def find(folder: str | os.PathLike = FOLDER) -> tuple[list[Model], list[str]]:
    """All models in a folder by name and version, and what cannot be read.

    Their arrays are not read; `get` and `load` check those.

    >>> import hypergrad as hg
    >>> hg.models.find("no/folder")
    ([], [])
    """
    models, flaws = [], []
    for home in sorted(Path(_folder(folder)).glob("*")):
        for version in _versions(home):
            try:
                models.append(_checked(home / str(version), (RECORD,))[0])
            except ValueError as flaw:
                flaws.append(str(flaw))
    return models, flaws


# Reading: first SHA-256, then what it says.


def _open(reference: str, folder: str | os.PathLike) -> tuple[Model, bytes]:
    text = reference if isinstance(reference, str) else _name(reference)
    name, at, version = text.partition("@")
    home = Path(_folder(folder)) / _name(name)
    there = _versions(home)
    if not there:
        others = sorted({model.name for model in find(folder)[0]})
        hint = f"there is {', '.join(others)}" if others else "there is none yet"
        raise ValueError(f"no model {name} in {folder}; {hint}")
    wanted = version if at else str(there[-1])
    if wanted not in map(str, there):
        raise ValueError(
            f"no version {version!r} of {name} in {folder}; there is "
            f"{', '.join(map(str, there))}"
        )
    model, files = _checked(home / wanted, (RECORD, ARRAYS))
    return model, files[ARRAYS]


def _checked(path: Path, names: tuple[str, ...]) -> tuple[Model, dict[str, bytes]]:
    """The files' bytes, and what is known of the model, once all are as written."""

    def content(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise ValueError(
                f"the model {path} is damaged: {name} cannot be read ({error.strerror})"
            ) from error

    sums = LINES.fullmatch(content(SUMS).decode("latin-1"))
    if sums is None:
        raise ValueError(
            f"the model {path} is damaged: {SUMS} is not as it was written"
        )
    said: dict[str, str] = dict(zip((RECORD, ARRAYS), sums.groups(), strict=True))
    files = {name: content(name) for name in names}
    for name, bytes_of in files.items():
        if _sha256(bytes_of) != said[name]:
            raise ValueError(
                f"the model {path} is damaged: {name} is not as it was written, by its "
                "SHA-256; load another version"
            )
    try:
        model = Model(path, said[ARRAYS], json.loads(files[RECORD]))
        known = model.reference, model.record["format"]
        ask = model.leaves, model.metrics, model.run["command"], model.run["versions"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no model of format {FORMAT}") from error
    if known != (f"{path.parent.name}@{path.name}", FORMAT):
        raise ValueError(
            f"{path} says that it is {known[0]}, of format {known[1]}; its folder was "
            f"moved, or it is not of format {FORMAT}"
        )
    del ask
    return model, files


def _versions(home: Path) -> list[int]:
    names = (path.name for path in home.glob("*"))
    return sorted(int(name) for name in names if re.fullmatch(r"[1-9][0-9]*", name))


# Writing.


def _folder(folder: Any) -> Any:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, such as {FOLDER!r}; got {folder!r}")
    return folder


def _name(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            "name must be of letters, digits, '.', '_' and '-', the first a letter or "
            f"digit; got {name!r}"
        )
    return name


def _metrics(metrics: Any) -> dict[str, float | None]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping) or not all(isinstance(x, str) for x in metrics):
        raise TypeError(f"metrics must be {{name: number}}; got {metrics!r}")
    try:
        found = {name: float(x) for name, x in metrics.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"metrics must be {{name: number}}: {error}") from error
    return {name: x if math.isfinite(x) else None for name, x in found.items()}


def _run(run: Any, problem: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"command": shlex.join(sys.argv)}
    if problem is not None:
        check_problem_type(problem)
        data = digest((problem.inner_data, problem.outer_data))
        known["data"] = {"sha256": data.removeprefix(HASH)}
    if not isinstance(run, Mapping | None):
        raise TypeError(f"run must be a dict of what JSON can hold; got {run!r}")
    try:
        known = json.loads(json.dumps(known | dict(run or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"run must be a dict of what JSON can hold: {error}") from error
    return {"versions": versions()} | known


@contextlib.contextmanager
def _errors_in_words(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"the model {name} could not be saved in {folder} ({error.strerror}); what "
            "was there still is: make room, or give another folder",
        ) from error


def _wait_for(lock: Any) -> bool:
    """Until no one else saves this name; False where that cannot be told."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


def _clear(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
