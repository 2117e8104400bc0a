"""File operations that survive a power failure, as far as POSIX guarantees it.

A rename is atomic, but without `os.fsync` the renamed file may be empty after a power
failure, and a folder may lack the names of new files.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .user_warnings import warn_user

#: Errors of file systems that have no locks.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is never incomplete, and waits until it is on disk.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(Path(folder) / "table.md", "| 1 |")
    ...     [file.name for file in Path(folder).iterdir()]
    ['table.md']
    """
    draft = draft_path(path)
    draft.unlink(missing_ok=True)  # from an interrupted call, or a link to another file
    with naming_errors(path):
        try:
            with draft.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            fsync_path(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        fsync_path(path.parent)


def draft_path(path: Path) -> Path:
    """Returns the path under which `atomic_write` writes a file at first."""
    return path.with_name(path.name + ".part")


def open_without_links(path: Path, mode: str) -> IO:
    """Opens a file whose name the library chose, and never another through a link.

    Raises:
      OSError: The path is a symbolic link.
    """
    opener = lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)
    return open(path, mode, opener=opener)


def lock_file(file: IO, owner: Path) -> None:
    """Locks an open file; the operating system unlocks it when the process dies.

    A warning is issued if the file system has no locks, as some of clusters.

    Args:
      file: The file.
      owner: Path that the messages name.

    Raises:
      ValueError: Another process has locked the file.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"folder must not be in use; another process is running in {owner}. Wait "
            "for it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        warn_user(
            f"{owner} cannot be locked ({error.strerror}); let no other process write "
            "to it"
        )


def append_durably(file: IO[str], text: str) -> None:
    """Appends to an open file and waits until the text is on disk."""
    file.write(text)
    file.flush()
    _fsync(file.fileno())


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Adds a path to an error that names none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raises OSError if a folder cannot hold so many further bytes.

    Quotas and limits of the process count too, where the system can reserve space. The
    reserved space is released at once.
    """
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return
    with naming_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def make_directory(path: Path) -> None:
    """Creates a folder with its parents and waits until they are on disk."""
    created = _missing_directories(path)
    path.mkdir(parents=True, exist_ok=True)
    for folder in created:
        with contextlib.suppress(PermissionError):  # the parent may be unreadable
            fsync_path(folder.parent)


@contextlib.contextmanager
def directory_unless_error(path: Path) -> Iterator[None]:
    """Creates a folder with its parents, and removes them if the body raises.

    Only those folders are removed that did not exist before and are empty.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with contextlib.suppress(OSError):
    ...         with directory_unless_error(Path(folder) / "a" / "b"):
    ...             raise OSError
    ...     list(Path(folder).iterdir())
    []
    """
    created = _missing_directories(path)
    try:
        make_directory(path)
        yield
    except BaseException:
        for folder in created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def _missing_directories(path: Path) -> list[Path]:
    """Returns those of a folder and its parents that do not exist, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def fsync_path(path: Path) -> None:
    """Waits until the bytes of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Waits until a folder and everything in it is on disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system does not support fsync
            raise
