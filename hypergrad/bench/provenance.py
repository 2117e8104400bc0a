"""The provenance of rows: source code, packages, device, command."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax

import hypergrad

from ..runtime.provenance import source_commit

PACKAGES = ("jax", "jaxlib", "equinox", "lineax", "optax", "numpy")

#: Fields that must be equal in all rows of one file.
COMMON_FIELDS = ("source", "versions", "device")


def collect(source: dict[str, str], command: str) -> dict[str, Any]:
    """Returns the provenance of the rows of a run.

    Args:
      source: Digests of the source files, from `TableRef.source`.
      command: The command without anything from the environment.

    Returns:
      ``commit`` of the package's checkout, with "+" if files differ from it, or None
      for an installed package; ``source``, ``versions``, ``device`` and ``command``.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "commit": source_commit(Path(hypergrad.__file__).parent),
        "source": source,
        "versions": {
            "python": platform.python_version(),
            "hypergrad": hypergrad.__version__,
            **versions,
        },
        "device": jax.devices()[0].device_kind,
        "command": command,
    }
