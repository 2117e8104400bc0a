"""Machine, packages and source commit with which results are made."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .machine import describe_machine


def versions() -> dict[str, Any]:
    """Returns the versions of machine, source and packages of this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "machine": describe_machine(),
        "devices": len(jax.devices()),
        "float": str(np.dtype(jax.dtypes.canonicalize_dtype(float))),
        "git": source_commit(Path(__file__).parents[1]),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Returns the version of every installed package.

    If one is installed twice, it is the version of the copy that is imported.
    """
    versions: dict[str, str] = {}
    for package in importlib.metadata.distributions(path=sys.path):
        if package.name and package.version:  # else it is broken
            versions.setdefault(package.name.lower(), package.version)
    return dict(sorted(versions.items()))


def source_commit(package: Path, *files: Path) -> str | None:
    """Returns the commit of a package's source, or None if it is not in a checkout.

    A "+" is appended if a file of the package, or one of the further files, differs
    from the commit.
    """
    # Without optional locks git writes nothing, so that a run that is killed, or a full
    # disk, leaves no lock in the clone.
    command = ["git", "--no-optional-locks", "-C", str(package)]
    git = lambda *args: subprocess.run(
        [*command, *args], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        # A checkout that only contains site-packages does not track the package.
        git("ls-files", "--error-unmatch", "__init__.py")
        status = git("status", "--porcelain", "--", ".", *map(str, files))
        suffix = "+" if status else ""
        return git("rev-parse", "HEAD") + suffix
    except (OSError, subprocess.CalledProcessError):
        return None


def utc_now() -> str:
    """Returns the current time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
