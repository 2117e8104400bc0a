"""Folders of arrays, written and read by Orbax, and digests of their files."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np

from ..trees import to_numpy
from .atomic_io import check_free_space

Arrays = dict[str, np.ndarray]
BYTES_PER_FOLDER = 100_000  # the files of Orbax without the arrays
MAX_REASON = 200  # characters; messages of Orbax contain whole stacks
#: Names of the files and folders that Orbax writes, some of them only for a moment.
ORBAX_NAME = re.compile(
    r"(_[A-Z_]+|commit_success\.txt|manifest\.ocdbt|ocdbt\.process_\d+|d|[0-9a-f]{32})"
    r"(\.__lock)?"
)


def check_folder_path(folder: Any) -> None:
    """Raises TypeError unless the argument is a path: a text, or of any class of paths.

    An empty path is refused, because it would be the working directory.
    """
    path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise TypeError(f"folder must be a path, such as 'runs/first'; got {folder!r}.")


def array_name(index: int) -> str:
    """Returns the name under which the leaf with this index is stored."""
    return f"{index:05d}"


def to_named_arrays(leaves: list) -> Arrays:
    """Returns the leaves by index, without empty ones, which Orbax cannot store."""
    return {
        array_name(i): to_numpy(leaf) for i, leaf in enumerate(leaves) if np.size(leaf)
    }


def write_arrays(folder: Path, arrays: Arrays) -> None:
    """Writes arrays into a new folder.

    Raises:
      OSError: The disk is full, or cannot be written to.
    """
    # Orbax writes in threads, each of which prints many lines if the disk is full.
    num_bytes = sum(array.nbytes for array in arrays.values())
    check_free_space(folder.parent, num_bytes + BYTES_PER_FOLDER)
    try:
        with make_checkpointer() as checkpointer:
            checkpointer.save(folder.absolute(), arrays)
    except OSError:
        raise
    except Exception as error:  # Orbax reports errors of the disk by several types
        reason = str(error).partition("\n")[0][:MAX_REASON]
        raise OSError(f"{folder} cannot be written: {reason}") from error


def read_arrays(folder: Path, like: Arrays) -> Arrays:
    """Reads the arrays of a folder.

    Args:
      folder: A folder of `write_arrays`.
      like: Arrays of the same names, shapes and dtypes.
    """
    with make_checkpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), like)


def temporary_folders(folder: Path) -> list[Path]:
    """Returns the folders in which interrupted calls of `write_arrays` wrote."""
    return list(folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"))


def remove_arrays(folder: Path, names: Collection[str]) -> None:
    """Removes files of `write_arrays`, and their folders if these are then empty.

    Symbolic links are neither followed nor removed.

    Args:
      folder: A folder of `write_arrays`, in which there may be other files.
      names: Relative paths of the files to remove. If this is empty, because the call
        was interrupted, these are all whose names are those of Orbax.
    """
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    own_names = folders.union(names)

    def is_own(path: Path) -> bool:
        name = path.relative_to(folder)
        if own_names:
            return name.as_posix() in own_names
        return all(map(ORBAX_NAME.fullmatch, name.parts))

    if folder.is_symlink():
        return
    for parent, _, files in os.walk(folder, topdown=False):
        for file in map(Path(parent).joinpath, files):
            if is_own(file) and not file.is_symlink():
                file.unlink()
        if is_own(Path(parent)):
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(parent)


def make_checkpointer() -> Any:
    """Returns an Orbax checkpointer that does not wait for other processes."""
    import orbax.checkpoint as ocp

    options = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="hypergrad",
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def digest_json(metadata: dict) -> str:
    """Returns the SHA-256 of a dictionary that JSON can hold."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def digest_folder(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """Returns the SHA-256 of each file below a folder, by relative path.

    Args:
      folder: A folder of `write_arrays`.
      names: Relative paths of the files to read, of which missing ones are left out.
        Defaults to all files. Desktops and network file systems may add others.
    """

    def digest(file: Path) -> str:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    if names is None:
        names = [x.relative_to(folder).as_posix() for x in sorted(folder.rglob("*"))]
    return {name: digest(folder / name) for name in names if (folder / name).is_file()}
