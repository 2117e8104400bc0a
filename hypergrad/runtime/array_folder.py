"""Folders of arrays, written and read by Orbax, and digests of their files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..trees import to_numpy
from .atomic_io import check_free_space

Arrays = dict[str, np.ndarray]
BYTES_PER_FOLDER = 100_000  # the files of Orbax without the arrays
MAX_REASON = 200  # characters; messages of Orbax contain whole stacks


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


def digest_folder(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file below a folder, by relative path."""

    def digest(file: Path) -> str:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}
