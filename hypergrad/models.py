"""Saved models: pairs ``(w, alpha)`` in versions, with what made them.

A version is the folder ``NAME/VERSION``: the arrays, written by Orbax, and `model.json`
with metrics, origin and the SHA-256 of every file. It is written under another name and
renamed when it is complete and on disk; it is never changed and never removed.
"""

import base64
import itertools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .checks.problem import check_problem_type
from .problem import Bilevel
from .runtime import atomic_io
from .runtime.array_folder import (
    array_name,
    check_folder_path,
    digest_folder,
    digest_json,
    read_arrays,
    to_named_arrays,
    write_arrays,
)
from .runtime.console import printable
from .runtime.fingerprint import digest, digest_function
from .runtime.provenance import utc_now, versions
from .trees import is_key, to_numpy
from .validation import is_traced

FOLDER = "runs/models"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RECORD, ARRAYS = "model.json", "arrays"
MAX_ATTEMPTS = 1000  # other processes may take a version at the same moment


@dataclass(frozen=True, repr=False)
class Model:
    """The metadata of a saved model, without its arrays.

    Attributes:
      path: Folder of the version.
      record: Content of its ``model.json``: name, version, time, metrics, origin, and
        shape and dtype of every leaf.
    """

    path: Path
    record: dict[str, Any]

    def __repr__(self) -> str:
        """Returns the folder and the metrics; `record` has all else."""
        metrics = self.record.get("metrics", {})
        return f"Model({str(self.path)!r}, metrics={metrics})"

    @property
    def reference(self) -> str:
        """Name and version, such as ``ridge@2``, for `load` and `get`."""
        return f"{self.record['name']}@{self.record['version']}"

    @property
    def metrics(self) -> dict[str, float | None]:
        """The saved metrics; None stands for a number that is not finite."""
        return self.record["metrics"]

    @property
    def run(self) -> dict[str, Any]:
        """The origin that the caller stated."""
        return self.record["run"]


def save(
    name: str,
    w: PyTree,
    alpha: PyTree,
    *,
    folder: str | os.PathLike = FOLDER,
    metrics: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    problem: Bilevel | None = None,
) -> Model:
    """Saves ``(w, alpha)`` as the next version of a name.

    Several processes may save under one name at the same time: each gets a version of
    its own. A call that fails or is interrupted leaves no version and no new folder; a
    killed process may leave a hidden folder ``.draft-*``, which nothing reads.

    Args:
      name: Name of letters, digits, ".", "_" and "-".
      w, alpha: Pytrees of arrays, numbers and PRNG keys. After `minimize`, ``trace.w``
        belongs to the ``alpha`` before the last step: train again for a pair.
      folder: Folder of all models.
      metrics: ``{name: number}``, such as the validation loss.
      run: Origin of the model as JSON, such as its settings, a seed or a command. The
        versions of all packages are always saved.
      problem: Problem whose data's SHA-256 is saved.

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
    home = _check_folder(folder) / _check_name(name)
    leaves, structure = _flatten(w, alpha)
    record = {
        "name": name,
        "saved": utc_now(),
        "metrics": _check_metrics(metrics),
        "run": _check_run(run),
        "versions": versions(),
        "structure": structure,
        "leaves": [
            _describe(leaf) | {"path": path}
            for leaf, path in zip(leaves, _leaf_paths((w, alpha)), strict=True)
        ],
    }
    if problem is not None:
        check_problem_type(problem)
        record["data"] = _digest_data(problem)
    draft = home / f".draft-{uuid.uuid4().hex}"
    with atomic_io.directory_unless_error(home):
        try:
            atomic_io.make_directory(draft)
            write_arrays(draft / ARRAYS, to_named_arrays(leaves))
            atomic_io.fsync_tree(draft / ARRAYS)
            record["files"] = digest_folder(draft / ARRAYS)
            return _rename_to_next_version(draft, record)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # after an error, else renamed


def _digest_data(problem: Bilevel) -> str:
    """Returns the digest of the data of a problem, or of its data_fn.

    The latter is that of the arrays of a `jax.tree_util.Partial` and of the program.
    """
    data_fn = problem.data_fn
    if data_fn is None:
        return digest((problem.inner_data, problem.outer_data))
    call = lambda data_fn, key: data_fn(key)  # the arrays are no constants of it
    program = digest_function(call, data_fn, jax.random.key(0))
    return digest((digest(data_fn), program))


def _rename_to_next_version(draft: Path, record: dict[str, Any]) -> Model:
    """Writes the metadata, and makes a draft the next version of its name."""
    home = draft.parent
    for _ in range(MAX_ATTEMPTS):
        record["version"] = 1 + max(_versions(home), default=0)
        path = home / str(record["version"])
        text = json.dumps(record | {"sha256": digest_json(record)}, indent=1)
        atomic_io.atomic_write(draft / RECORD, text + "\n")
        try:
            draft.rename(path)
        except OSError:
            if path.exists():
                continue  # another process took this version
            raise
        try:
            atomic_io.fsync_path(home)
        except BaseException:
            path.rename(draft)  # the caller removes it
            raise
        return Model(path, record)
    raise OSError(f"no version in {home} was free in {MAX_ATTEMPTS} attempts.")


def load(
    reference: str,
    *,
    like: tuple[PyTree, PyTree] | None = None,
    folder: str | os.PathLike = FOLDER,
) -> tuple[PyTree, PyTree]:
    """Loads ``(w, alpha)`` of a model, after its files have been checked.

    Args:
      reference: ``name@version``, or a name for its newest version.
      like: ``(w, alpha)`` of the structure of the saved pair, with the same names. It
        is needed if the pair contains other containers than lists, tuples and
        dictionaries with strings as keys.
      folder: Folder of all models.

    Returns:
      ``(w, alpha)`` with NumPy arrays and PRNG keys, equal to what was saved to the
      bit, also if the precision of this process is lower.

    Cost: the files are read twice, once for their digests.

    Raises:
      TypeError: ``folder`` is not a path, or ``reference`` is no text.
      ValueError: There is no such model, it is damaged, or ``like`` has another
        structure.
    """
    model = get(reference, folder=folder)
    record = model.record
    try:
        files = digest_folder(model.path / ARRAYS, record["files"])
    except OSError as error:
        raise ValueError(f"{reference} cannot be read: {error}.") from error
    if files != record["files"]:
        raise ValueError(f"{reference} is damaged: the arrays are not as written.")
    blanks = {
        array_name(i): np.empty(leaf["shape"], jnp.dtype(leaf["dtype"]))
        for i, leaf in enumerate(record["leaves"])
    }
    stored = {name: blank for name, blank in blanks.items() if blank.size}
    arrays = blanks | read_arrays(model.path / ARRAYS, stored)
    leaves = [
        _restore(arrays[array_name(i)], leaf) for i, leaf in enumerate(record["leaves"])
    ]
    return jax.tree.unflatten(_structure(record, like), leaves)


def get(reference: str, *, folder: str | os.PathLike = FOLDER) -> Model:
    """Returns the metadata of ``name@version``, or of the newest version of a name.

    Raises:
      TypeError: ``folder`` is not a path, or ``reference`` is no text.
      ValueError: There is no such model, or its metadata are damaged.
    """
    if not isinstance(reference, str):
        raise TypeError(
            "reference must be text such as 'ridge' or 'ridge@2', which the attribute "
            f"reference of a model contains; got {type(reference).__name__}."
        )
    name, separator, version = reference.partition("@")
    home = _check_folder(folder) / _check_name(name)
    existing = _versions(home)
    if not existing or (separator and version not in map(str, existing)):
        raise ValueError(
            f"{folder} has no model {reference!r}; hg.models.find lists the models."
        )
    return _read(home / (version or str(max(existing))))


def find(folder: str | os.PathLike = FOLDER) -> tuple[list[Model], list[str]]:
    """Returns all models of a folder, and the errors of damaged metadata.

    Args:
      folder: Folder of all models; one that does not exist contains none.

    Cost: the metadata of each model are read, but no arrays.

    Raises:
      TypeError: ``folder`` is not a path.
      ValueError: ``folder`` is a file.
    """
    models, errors = [], []
    homes = [x for x in sorted(_check_folder(folder).glob("*")) if x.is_dir()]
    for home in homes:
        for version in _versions(home):
            try:
                models.append(_read(home / str(version)))
            except ValueError as error:
                errors.append(printable(error))
    return models, errors


def _versions(home: Path) -> list[int]:
    return sorted(int(x.name) for x in home.glob("[1-9]*") if x.name.isdecimal())


def _read(path: Path) -> Model:
    """Returns a model whose metadata are as they were written."""
    try:
        record = json.loads((path / RECORD).read_text())
        sha256 = record.pop("sha256")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / RECORD} cannot be read: {error}.") from error
    if sha256 != digest_json(record):
        raise ValueError(f"{path / RECORD} is damaged: its checksum does not match.")
    if [record["name"], str(record["version"])] != [path.parent.name, path.name]:
        raise ValueError(
            f"{path} was moved: it holds version {record['version']!r} of "
            f"{record['name']!r}."
        )
    return Model(path, record)


# Trees.


def _flatten(w: PyTree, alpha: PyTree) -> tuple[list, str | None]:
    """Returns the leaves, and the structure as text if it has only plain containers."""
    for argument, tree in (("w", w), ("alpha", alpha)):
        leaves = jax.tree.leaves(tree)
        if any(map(is_traced, leaves)):
            raise TypeError(
                f"{argument} must have values; got a traced array. Call save outside "
                "of jax.jit, jax.vmap and jax.grad."
            )
        wrong = [leaf for leaf in leaves if not _can_be_stored(leaf)]
        if wrong or not leaves:
            raise TypeError(
                f"{argument} must have arrays, numbers and PRNG keys as leaves; got "
                f"{wrong[0] if wrong else tree!r}."
            )
    leaves, structure = jax.tree.flatten((w, alpha))
    try:
        text = base64.b64encode(structure.serialize_using_proto()).decode()
    except ValueError:  # a class of the caller's
        text = None
    return [leaf if is_key(leaf) else to_numpy(leaf) for leaf in leaves], text


def _leaf_paths(tree: PyTree) -> list[str]:
    """Returns where each leaf is, such as ``[0]['layer'].weight``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in leaves]


def _can_be_stored(leaf: Any) -> bool:
    try:
        jnp.result_type(leaf)
    except TypeError:  # dates, objects
        return False
    if isinstance(leaf, int) and np.asarray(leaf).dtype == object:  # above 64 bits
        return False
    return eqx.is_array_like(leaf)


def _describe_leaf(name_and_shape: tuple[str, Any] | None) -> str:
    if name_and_shape is None:
        return "no leaf"
    name, shape = name_and_shape
    return f"the leaf {name} of shape {tuple(shape)}"


def _structure(record: dict, like: PyTree) -> Any:
    if like is not None:
        shapes = map(_stored_shape, jax.tree.leaves(like))
        current = zip(_leaf_paths(like), shapes, strict=True)
        saved = [(leaf["path"], leaf["shape"]) for leaf in record["leaves"]]
        for actual, expected in itertools.zip_longest(current, saved):
            if actual != expected:
                raise ValueError(
                    "like must have the names and shapes of the saved (w, alpha); got "
                    f"{_describe_leaf(actual)} in place of {_describe_leaf(expected)}. "
                    "Pass like=(w, alpha)."
                )
        return jax.tree.structure(like)
    if record["structure"] is None:
        raise ValueError(
            "like must be given, because (w, alpha) contains other containers than "
            "lists, tuples and dictionaries with strings as keys. Pass like=(w, alpha) "
            "of the same structure."
        )
    content = base64.b64decode(record["structure"])
    registry = jax.tree_util.default_registry
    return jax.tree_util.PyTreeDef.deserialize_using_proto(registry, content)


def _stored_shape(leaf: Any) -> list[int]:
    """Returns the shape in which a leaf is stored, a PRNG key as its key data."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return list(np.shape(leaf))


def _describe(leaf: Any) -> dict[str, Any]:
    """Returns shape and dtype of the stored array, and the kind of a PRNG key."""
    array = np.asarray(jax.random.key_data(leaf)) if is_key(leaf) else leaf
    implementation = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "key": implementation,
    }


def _restore(array: np.ndarray, leaf: dict[str, Any]) -> Any:
    array = np.asarray(array)
    if leaf["key"] is None:
        return array
    return jax.random.wrap_key_data(jnp.asarray(array), impl=leaf["key"])


# Arguments.


def _check_folder(folder: Any) -> Path:
    check_folder_path(folder)
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder must be a folder of models; got the file {folder}.")
    return path


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            "name must consist of letters, digits, '.', '_' and '-' and begin with a "
            f"letter or digit; got {name!r}."
        )
    return name


def _check_metrics(metrics: Any) -> dict[str, float | None]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping) or not all(isinstance(x, str) for x in metrics):
        raise TypeError(f"metrics must be {{name: number}}; got {metrics!r}.")
    for x in metrics.values():
        if isinstance(x, str | bytes | bytearray):  # which float would read
            raise TypeError(f"metrics must be {{name: number}}; got {x!r}.")
    try:
        numbers = {name: float(x) for name, x in metrics.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"metrics must be {{name: number}}; {error}.") from error
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _check_run(run: Any) -> dict[str, Any]:
    if not isinstance(run, Mapping | None):
        raise TypeError(f"run must be a dict that JSON can hold; got {run!r}.")
    try:
        return json.loads(json.dumps(dict(run or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"run must be a dict that JSON can hold; {error}.") from error
