"""The provenance of rows: source code, packages, device, command."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax

import hypergrad

from ..runtime.provenance import source_commit
from .source import digest_sources, local_imports

PACKAGES = ("jax", "jaxlib", "equinox", "lineax", "optax", "numpy")

#: Fields of the process that measures a cell, which may be a worker elsewhere.
PROCESS_FIELDS = ("versions", "device", "float")
#: Fields that must be equal in all rows of one file.
COMMON_FIELDS = ("source", *PROCESS_FIELDS)


def collect(table_file: Path, command: str) -> dict[str, Any]:
    """Returns the provenance of the rows of a run.

    Args:
      table_file: File of the table.
      command: The command without anything from the environment.

    Returns:
      ``commit`` of the package's checkout, with "+" if files differ from it, or None
      for an installed package; ``source``, ``command`` and `PROCESS_FIELDS`.
    """
    return {
        "commit": _commit(table_file),
        "source": digest_sources(table_file),
        "command": command,
        **describe_process(),
    }


def describe_process() -> dict[str, Any]:
    """Returns `PROCESS_FIELDS` of this process."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "versions": {
            "python": platform.python_version(),
            "hypergrad": hypergrad.__version__,
            **versions,
        },
        "device": jax.devices()[0].device_kind,
        "float": str(jax.dtypes.canonicalize_dtype(float)),
    }


def _commit(table_file: Path) -> str | None:
    """Returns the commit, with "+" if the package or the table differs from it."""
    package = Path(hypergrad.__file__).parent
    files = local_imports(table_file.resolve())
    is_inside = all(file.is_relative_to(package.parent) for file in files)
    return source_commit(package, *(files if is_inside else ()))
