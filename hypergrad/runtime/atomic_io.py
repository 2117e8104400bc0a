"""Files that a power cut leaves whole, as far as POSIX promises it.

A rename is seen whole or not at all; but unless the disk was waited for, what was
renamed may be empty after a power cut, and a folder may lack its name.
"""

import contextlib
import errno
import os
from pathlib import Path
from typing import IO


def atomic_write(path: Path, content: str | bytes) -> None:
    """Puts a file in place, whole or not at all; for good once this returns.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder) / "table.md", "| 1 |")
    ...     [file.name for file in Path(folder).iterdir()]
    ['table.md']
    """
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync_path(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync_path(path.parent)


def append_durably(file: IO[str], text: str) -> None:
    """Adds to an open file; for good once this returns."""
    file.write(text)
    file.flush()
    _sync(file.fileno())


def make_directory(path: Path) -> None:
    """Makes a folder, and those above it that are not there."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        with contextlib.suppress(PermissionError):  # one that may not be read
            fsync_path(folder.parent)


def fsync_path(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot be asked to
            raise


def fsync_tree(folder: Path) -> None:
    """All files and folders below one, and its own names."""
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)
