"""What rows of every table share: strict JSON, and what they were made with."""

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
    """Packages, Python and device of this process."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0].device_kind
    return {"device": device, "python": platform.python_version()} | packages


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """SHA-256 over names and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def line(row: Row) -> str:
    """One line of strict JSON, which has no NaN and no infinity: they are null."""
    return json.dumps({k: _clean(x) for k, x in row.items()}, allow_nan=False) + "\n"


def _clean(x: Any) -> Any:
    if isinstance(x, list):
        return [_clean(each) for each in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read(path: Path, *, whole: bool = True) -> list[Row]:
    """The rows of a file; ValueError for a line that is no strict JSON object.

    Where it need not be ``whole``, a last line that was cut off is left out.
    """
    rows, text = [], path.read_text()
    if not whole:
        text = text[: text.rfind("\n") + 1]
    for number, one in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(one, parse_constant=_refuse)
            rows.append(dict(row))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, is no strict JSON: {error}"
            ) from error
    return rows


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} stands for no number; write null")
