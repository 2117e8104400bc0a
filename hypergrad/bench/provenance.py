"""The provenance of rows: source code, packages, device, command."""

import contextlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import jax

import hypergrad

from ..runtime.provenance import source_commit
from .source import digest_sources, local_imports

PACKAGES = ("jax", "jaxlib", "equinox", "lineax", "optax", "numpy")
#: Packages that only some tables use. Their versions count where they are installed,
#: whether or not they are imported, which may differ between two cells.
OPTIONAL_PACKAGES = (
    "cmaes", "evosax", "flax", "jaxopt", "optimistix", "optuna", "scikit-learn",
    "scipy",
)  # fmt: skip
#: Settings of JAX that change numbers. Its precision is the field ``float``.
JAX_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)

#: Fields of the process that measures a cell, which may be a worker elsewhere. They
#: must be equal in all rows of a file; older rows have no ``jax_settings``.
PROCESS_FIELDS = ("versions", "device", "float", "jax_settings")


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
    for name in OPTIONAL_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": {
            "python": platform.python_version(),
            "hypergrad": hypergrad.__version__,
            **versions,
        },
        "device": jax.devices()[0].device_kind,
        "float": str(jax.dtypes.canonicalize_dtype(float)),
        "jax_settings": {name: _read_config(name) for name in JAX_SETTINGS},
    }


def _read_config(name: str) -> Any:
    return getattr(jax.config, name)  # noqa: TID251 - it is only read


def _commit(table_file: Path) -> str | None:
    """Returns the commit, with "+" if the package or the table differs from it."""
    package = Path(hypergrad.__file__).parent
    files = local_imports(table_file.resolve())
    is_inside = all(file.is_relative_to(package.parent) for file in files)
    return source_commit(package, *(files if is_inside else ()))
