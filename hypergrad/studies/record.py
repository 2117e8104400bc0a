"""Rows of tables as strict JSON, with the versions with which they were made."""

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

Row = dict[str, Any]
PACKAGES = ("hypergrad-jax", "jax", "jaxlib", "optax", "lineax", "scikit-learn")


def versions() -> Row:
    """Returns the device and the versions of Python and the packages."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0].device_kind
    return {"device": device, "python": platform.python_version()} | packages


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of names and bytes of arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def line(row: Row) -> str:
    """Returns a line of strict JSON, in which null stands for NaN and infinity."""
    strict_row = {name: _replace_non_finite(x) for name, x in row.items()}
    return json.dumps(strict_row, allow_nan=False) + "\n"


def _replace_non_finite(x: Any) -> Any:
    if isinstance(x, list):
        return [_replace_non_finite(item) for item in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read(path: Path, *, whole: bool = True) -> list[Row]:
    """Returns the rows of a file.

    Args:
      path: File with a JSON object per line.
      whole: Whether the last line must be complete; else an incomplete one is ignored.

    Raises:
      ValueError: A line is not a strict JSON object.
    """
    rows, text = [], path.read_text()
    if not whole:
        text = text[: text.rfind("\n") + 1]
    for number, content in enumerate(text.splitlines(), start=1):
        try:
            rows.append(dict(json.loads(content, parse_constant=_refuse_constant)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, is not strict JSON: {error}."
            ) from error
    return rows


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"numbers must be finite; got {constant}. Write null")
