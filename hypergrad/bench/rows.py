"""Rows of a table as lines of strict JSON, each with a checksum and its provenance.

A row is a flat dictionary. Its line is the canonical JSON of the dictionary with its
SHA-256 in the field ``sha256``, so that every changed bit is found: a changed value
changes the checksum, and a line that is not canonical is refused as well.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import atomic_io

Row = dict[str, Any]
Cell = dict[str, Any]


class CorruptRowError(ValueError):
    """A line of a file of rows is not what was written."""


def to_line(row: Row) -> str:
    """Returns a row as one line with its checksum; NaN and infinities become null."""
    row = {name: _to_json(value) for name, value in row.items() if name != "sha256"}
    return _canonical(row | {"sha256": _checksum(row)}) + "\n"


def parse_line(line: str, where: str) -> Row:
    """Returns the row of a line, without its checksum.

    Raises:
      CorruptRowError: The line is not exactly what `to_line` writes.
    """
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
        checksum = row.pop("sha256")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptRowError(
            f"{where} is not a row with a checksum: {error}"
        ) from None
    if checksum != _checksum(row) or line != to_line(row).rstrip("\n"):
        raise CorruptRowError(f"{where} is damaged: its checksum does not match")
    return row


def read_rows(path: Path, *, allow_cut: bool = False) -> list[Row]:
    """Returns the rows of a file.

    Args:
      path: A file that `append_row` wrote.
      allow_cut: Whether a last line without its newline, which a killed process leaves,
        is ignored.

    Raises:
      CorruptRowError: A line is damaged; the message names it.
    """
    # Bytes that are not UTF-8 become replacement characters, which no checksum matches.
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text.split("\n")
    remaining = lines.pop()
    if remaining and not allow_cut:
        raise CorruptRowError(f"{path}, line {len(lines) + 1}, is cut off")
    return [
        parse_line(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
    ]


def append_row(path: Path, row: Row) -> None:
    """Appends a row to a file; it is on the disk when the function returns."""
    with atomic_io.naming_errors(path), path.open("a", encoding="utf-8") as file:
        atomic_io.append_durably(file, to_line(row))


def move_incomplete_line(path: Path) -> None:
    """Moves what stands after the last complete line into the file ``NAME.cut``."""
    content = path.read_bytes()
    num_complete = content.rfind(b"\n") + 1
    if num_complete < len(content):
        cut_path = path.with_name(f"{path.name}.cut")
        with atomic_io.open_without_links(cut_path, "ab") as file:
            file.write(content[num_complete:] + b"\n")
        with path.open("rb+") as file:
            file.truncate(num_complete)


def cell_key(row: Row, fields: Sequence[str]) -> tuple[Any, ...]:
    """Returns the values that identify the cell of a row."""
    return tuple(hashable(row.get(field)) for field in fields)


def repeated_keys(rows: Iterable[Row], fields: Sequence[str]) -> list[tuple[Any, ...]]:
    """Returns the keys of the cells that have several rows."""
    counts = Counter(cell_key(row, fields) for row in rows)
    return [key for key, count in counts.items() if count > 1]


def key_in_words(key: Sequence[Any]) -> str:
    """Returns the values that identify a cell, for a message."""
    return ", ".join(str(value) for value in key if value is not None)


def select(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """Returns the rows that have all of the given values.

    A tuple equals the list that it becomes in a file.
    """
    values = tuple(map(hashable, fields.values()))
    return [row for row in rows if cell_key(row, tuple(fields)) == values]


def hashable(value: Any) -> Any:
    """Returns a value with tuples in place of lists."""
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


def not_serializable(row: Row) -> list[str]:
    """Returns the names of the fields that a line of JSON cannot hold."""
    return [name for name, value in row.items() if not _is_serializable(value)]


def _is_serializable(value: Any) -> bool:
    try:
        _canonical({"value": _to_json(value)})
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _canonical(row: Row) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=True, separators=(", ", ": "))


def _checksum(row: Row) -> str:
    return hashlib.sha256(_canonical(row).encode()).hexdigest()


def _to_json(value: Any) -> Any:
    """Converts NumPy and JAX numbers and arrays; a float that is not finite is None."""
    if isinstance(value, dict):
        return {str(name): _to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if hasattr(value, "dtype"):
        return _to_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not strict JSON")
