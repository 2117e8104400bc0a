"""What numbers are made with: the machine, the packages, the commit of the source."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np


def versions() -> dict[str, Any]:
    """Of the machine, the source and all packages, as they are in this process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "float": str(np.dtype(jax.dtypes.canonicalize_dtype(float))),
        "git": source_commit(Path(__file__).parent),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """All that is installed."""
    there = importlib.metadata.distributions(path=sys.path)
    named = (one for one in there if one.name)  # a broken one has none
    return dict(sorted((one.name.lower(), one.version) for one in named))


def source_commit(package: Path) -> str | None:
    """Of a package's source, "+" where a file of it differs; None in no checkout."""
    git = lambda *words: subprocess.run(
        ["git", "-C", str(package), *words], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        # A checkout around site-packages is not the source's.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = "+" if git("status", "--porcelain", "--", ".") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return None


def utc_now() -> str:
    """In UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
