"""Measures randomly chosen cells of committed tables again."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..runtime.fingerprint import HASH
from .columns import Column, is_time
from .loading import TableRef
from .report import TableResult
from .rows import Row
from .runner import data_fingerprint, measure_cell

EQUAL, AS_PRINTED, DIFFERENT, FAILED = "equal", "as printed", "different", "FAILED"


@dataclass(frozen=True)
class Recomputed:
    """A cell that was measured again.

    Attributes:
      name: Name of the table.
      cell: The fields that identify the cell, in words.
      outcome: "equal" to the bit, equal "as printed", "different", or "FAILED".
      text: The columns that differ or the error; empty for equal numbers.
    """

    name: str
    cell: str
    outcome: str
    text: str


def choose_cells(
    results: Sequence[TableResult], num_cells: int, max_seconds: float, seed: int
) -> list[tuple[TableResult, Row]]:
    """Returns reported rows, drawn at random from as many tables as possible.

    Args:
      results: The tables. Rows that were converted from an older form are not chosen,
        since those of their tuning are missing, nor rows of an added method, which do
        not say where its file is.
      num_cells: Number of rows to choose. Fewer are returned if there are fewer.
      max_seconds: Rows whose measurement took longer are not chosen.
      seed: Seed of the choice.
    """
    generator = random.Random(seed)
    choices = []
    for result in sorted(results, key=lambda x: x.name):
        rows = [
            row
            for row in result.printed_rows
            if seconds_of(result, row) <= max_seconds
            and not {"converted_from", "method_source"} & row.keys()
            and compared_columns(result, row)
        ]
        generator.shuffle(rows)
        # The first of each table are chosen before the second of any.
        keys = [(i, generator.random()) for i in range(len(rows))]
        choices += zip(keys, ((result, row) for row in rows), strict=True)
    choices.sort(key=lambda choice: choice[0])
    return [cell for _, cell in choices[:num_cells]]


def seconds_of(result: TableResult, row: Row) -> float:
    """Returns the measured seconds of a row, or else its share of the table's."""
    compiling, running = row.get("compile_seconds"), row.get("run_seconds")
    if compiling is None or running is None:
        return 60 * result.table.minutes / len(result.rows)
    return compiling + running


def compared_columns(result: TableResult, row: Row) -> list[Column]:
    """Returns the columns in which the row has a number or None, except times.

    A number that is not finite is None in a row that was read.
    """
    return [
        column
        for column in result.table.printed_columns
        if column.name in row
        and isinstance(row[column.name], int | float | None)
        and not is_time(column.name)
    ]


def recompute(result: TableResult, ref: TableRef, row: Row) -> Recomputed:
    """Returns how a row differs from a new measurement of its cell.

    The earlier stages, such as tuning, are not repeated: their rows are read.
    """
    fields = result.table.key_fields
    cell = {name: row[name] for name in fields if name in row}
    words = ", ".join(str(value) for value in cell.values())
    try:
        fingerprint = data_fingerprint(result.table)
    except (ValueError, OSError) as error:  # such as a missing file
        return Recomputed(result.name, words, FAILED, str(error))
    # Rows that are older than the prefix have digests of another kind.
    if str(row.get("data")).startswith(HASH) and row["data"] != fingerprint:
        text = f"the data have the fingerprint {fingerprint}, the row {row.get('data')}"
        return Recomputed(result.name, words, FAILED, text)
    earlier = [x for x in result.rows if x.get("stage") is not None]
    outcome = measure_cell(ref, cell, result.scale, earlier)
    if isinstance(outcome, str):
        return Recomputed(result.name, words, FAILED, outcome)
    changed = list(changed_columns(compared_columns(result, row), row, outcome))
    differs = any(old_text != new_text for _, old_text, new_text in changed)
    kind = DIFFERENT if differs else AS_PRINTED if changed else EQUAL
    text = "; ".join(f"{title} {old} | {new}" for title, old, new in changed)
    return Recomputed(result.name, words, kind, text)


def changed_columns(
    columns: Sequence[Column], row: Row, outcome: Row
) -> Iterator[tuple[str, str, str]]:
    """Yields the heading and both printed numbers of each column that differs.

    A number that is not finite is None in a row that was read.
    """
    for column in columns:
        old, new = row[column.name], outcome.get(column.name)
        if new is not None and not math.isfinite(new):
            new = None
        if old != new:
            old_text, new_text = (column.text([{column.name: x}]) for x in (old, new))
            yield column.heading, old_text, new_text
