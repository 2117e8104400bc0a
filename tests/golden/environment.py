"""The software and hardware on which the bits of a result depend."""

import os
import platform
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "equinox",
    "optax",
    "lineax",
    "flax",
    "jaxopt",
    "optimistix",
    "optuna",
    "cmaes",
    "evosax",
    "scikit-learn",
    "scipy",
)


def get_environment() -> dict[str, str]:
    """Returns versions, processor and compiler settings of this process."""
    return {
        "python": platform.python_version(),
        **{name: get_version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "cpu": get_cpu_model(),
        "NPROC": os.environ.get("NPROC", ""),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def get_version(package: str) -> str:
    """Returns the installed version of a package, or 'none'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def get_cpu_model() -> str:
    """Returns name, family and model of the processor, as far as the system knows."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in file.read_text().splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    keys = ("model name", "cpu family", "model")
    return ", ".join(f"{key} {fields[key]}" for key in keys if key in fields)
