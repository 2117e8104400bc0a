"""Rows of earlier stages, and the identity of data that differ between cells."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hypergrad.bench import Row, select


def tuning_row(rows: Iterable[Row], **fields: Any) -> Row:
    """Returns the row of the stage "tuning" with the given fields.

    Raises:
      ValueError: There is no such row, or its measurement failed.
    """
    selected = select(rows, stage="tuning", **fields)
    if not selected or "error" in selected[0]:
        names = ", ".join(map(str, fields.values()))
        problem = selected[0]["error"] if selected else "has no row; run without --only"
        raise ValueError(f"the tuning of {names}: {problem}")
    return selected[0]


def fingerprint_splits(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the `fingerprint` of the arrays of all splits."""
    pairs = [(part, name) for part in splits for name in splits[part]]
    return fingerprint({f"{part} {name}": splits[part][name] for part, name in pairs})


def fingerprint(arrays: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of names and bytes of arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
