"""Differences of two results, in their provenance and in their numbers."""

import math
from dataclasses import dataclass
from typing import Any

from .columns import is_time
from .report import TableResult
from .rows import Row, cell_key

PROVENANCE = (
    "commit", "source", "method_source", "versions", "device", "machine", "data",
    "scale", "budget", "budget_factor", "jax_settings", "float", "converted_from",
)  # fmt: skip
MAX_NAMED_CELLS = 3
IGNORED = {*PROVENANCE, "command", "time", "table"}


@dataclass(frozen=True)
class Difference:
    """A thing in which two results differ.

    Attributes:
      kind: "provenance", "tables", "cells", "numbers", or "damaged" for unreadable
        rows.
      text: The difference in words.
    """

    kind: str
    text: str


def compare(result: TableResult, reference: TableResult) -> list[Difference]:
    """Returns the differences of two results of one table; seconds are left out.

    Raises:
      ValueError: The results are of different tables.
    """
    if result.name != reference.name:
        raise ValueError(f"cannot compare {result.name} with {reference.name}.")
    differences = [
        Difference("provenance", f"{name}: {old} | {new}")
        for name in PROVENANCE
        for old, new in [(_values(result.rows, name), _values(reference.rows, name))]
        if old != new
    ]
    fields = result.table.key_fields
    rows = [{cell_key(r, fields): r for r in x.rows} for x in (result, reference)]
    for these, other, label in ((*rows, "result"), (*reversed(rows), "reference")):
        only = sorted(map(_cell_in_words, these.keys() - other.keys()))
        if only:
            text = ", ".join(only[:MAX_NAMED_CELLS])
            if len(only) > MAX_NAMED_CELLS:
                text += f" and {len(only) - MAX_NAMED_CELLS} further cells"
            differences.append(Difference("cells", f"only in the {label}: {text}"))
    shared = [key for key in rows[0] if key in rows[1]]
    names = dict.fromkeys(
        name for key in shared for name in rows[0][key] | rows[1][key]
    )
    for name in names:
        if name in IGNORED or name in fields or is_time(name):
            continue
        pairs = [
            (key, rows[0][key].get(name), rows[1][key].get(name)) for key in shared
        ]
        changed = [pair for pair in pairs if pair[1] != pair[2]]
        if changed:
            differences.append(Difference("numbers", _describe(name, changed)))
    return differences


def _values(rows: list[Row], name: str) -> str:
    return ", ".join(sorted({str(row.get(name)) for row in rows}))


def _cell_in_words(key: tuple[Any, ...]) -> str:
    return " ".join(str(x) for x in key if x is not None)


def _describe(name: str, changed: list[tuple[Any, Any, Any]]) -> str:
    """Returns in how many cells a field differs, and the largest difference."""
    distance = lambda pair: _distance(pair[1], pair[2])
    key, old, new = max(changed, key=distance)
    where = _cell_in_words(key)
    count = f"{len(changed)} cell{'s' * (len(changed) > 1)}"
    if isinstance(old, list) or isinstance(new, list):
        return f"{name} in {count}, by at most {_distance(old, new):.3g} ({where})"
    return f"{name} in {count}, most in {old} | {new} ({where})"


def _distance(old: Any, new: Any) -> float:
    """Returns the largest difference of two numbers or lists; infinite for others."""
    old, new = (x if isinstance(x, list) else [x] for x in (old, new))
    try:
        return max(abs(x - y) for x, y in zip(old, new, strict=True))
    except (TypeError, ValueError):
        return math.inf
