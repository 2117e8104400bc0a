"""Comparison of two runs: their configuration, data, versions, models and numbers."""

import math
from typing import Any, NamedTuple

from .. import models
from ..studies.record import Row
from ..studies.table import VERSIONS
from .data import describe_row_differences, describe_split_differences
from .manifest import Run

# Columns that depend on the machine and the call; seconds do too.
ENVIRONMENT = {*VERSIONS, "command"}

Cell = tuple[str, int]  # method and seed
Rows = dict[Cell, Row]


class Difference(NamedTuple):
    """A difference between two runs.

    Attributes:
      category: One of configuration, data, versions, models and numbers.
      text: Description of the difference.
    """

    category: str
    text: str


def compare(first: Run, second: Run) -> list[Difference]:
    """Returns the differences in the order in which to look for a cause.

    Seconds are ignored.
    """
    texts = [
        ("configuration", _compare_fields(first.configuration, second.configuration)),
        ("data", _compare_data(first, second)),
        ("versions", _compare_versions(first, second)),
        ("models", _compare_models(first, second)),
        ("numbers", _compare_numbers(first, second)),
    ]
    return [Difference(category, text) for category, group in texts for text in group]


def have_equal_numbers(first: Run, second: Run) -> bool:
    """Returns True if both runs have the same cells with numbers equal to the bit."""
    return not _compare_numbers(first, second)


def _compare_fields(first: Row, second: Row) -> list[str]:
    to_text = lambda value: "none" if value is None else str(value)
    return [
        f"{field}: {to_text(first.get(field))} | {to_text(second.get(field))}"
        for field in dict.fromkeys([*first, *second])
        if first.get(field) != second.get(field)
    ]


def _compare_data(first: Run, second: Run) -> list[str]:
    data, other_data = first.manifest["data"], second.manifest["data"]
    if data["sha256"] != other_data["sha256"]:
        without_splits = [
            {name: value for name, value in fields.items() if name != "splits"}
            for fields in (data, other_data)
        ]
        rows = describe_row_differences(first.digests, second.digests)
        return _compare_fields(*without_splits) + rows
    difference = describe_split_differences(data, other_data)
    return [difference] if difference else []


def _compare_versions(first: Run, second: Run) -> list[str]:
    pairs = [(first.versions, second.versions), (first.packages, second.packages)]
    if not ("format" in first.manifest and "format" in second.manifest):
        # Rows without a manifest contain only some of the versions.
        pairs = [_select_common_fields(*pair) for pair in pairs]
    return [text for pair in pairs for text in _compare_fields(*pair)]


def _select_common_fields(first: Row, second: Row) -> tuple[Row, Row]:
    names = first.keys() & second.keys()
    select = lambda fields: {k: v for k, v in fields.items() if k in names}
    return select(first), select(second)


def _compare_models(first: Run, second: Run) -> list[str]:
    """Returns the models that differ, of cells with a model in both, or are damaged."""
    saved, others = first.models, second.models
    pairs = [(saved[cell], others[cell]) for cell in saved if cell in others]
    texts = [
        f"{model.reference} | {other.reference}: other arrays"
        for model, other in pairs
        if model.sha256 != other.sha256
    ]
    for model in (model for pair in pairs for model in pair):
        try:
            models.get(model.reference, folder=model.path.parent.parent)
        except ValueError as error:
            texts.append(str(error))
    return texts


def _compare_numbers(first: Run, second: Run) -> list[str]:
    """Returns the cells that only one run has, and the columns that differ."""
    rows, other_rows = (
        {(row["method"], row["seed"]): row for row in run.rows}
        for run in (first, second)
    )
    texts = [
        *_describe_extra_cells(rows, other_rows, "first"),
        *_describe_extra_cells(other_rows, rows, "second"),
    ]
    common = [cell for cell in rows if cell in other_rows]
    columns = dict.fromkeys(
        name for cell in common for name in [*rows[cell], *other_rows[cell]]
    )
    for column in columns:
        if column in ENVIRONMENT or column.endswith("seconds"):
            continue
        get = lambda rows, cell, column=column: rows[cell].get(column)
        cells = [c for c in common if get(rows, c) != get(other_rows, c)]
        if cells:
            texts.append(_describe_column(column, cells, rows, other_rows))
    return texts


def _describe_extra_cells(rows: Rows, other_rows: Rows, run: str) -> list[str]:
    extra = [f"{method}, seed {seed}" for method, seed in rows.keys() - other_rows]
    return [f"only in the {run}: {'; '.join(sorted(extra))}"] if extra else []


def _describe_column(
    column: str, cells: list[Cell], rows: Rows, other_rows: Rows
) -> str:
    """Returns the largest difference of a column among cells in which it differs."""

    def distance(cell: Cell) -> float:
        pairs = zip(
            _as_list(rows[cell].get(column)),
            _as_list(other_rows[cell].get(column)),
            strict=True,
        )
        try:
            return max(abs(x - y) for x, y in pairs)
        except (TypeError, ValueError):
            return math.inf  # a value is not a number, or the lengths differ

    worst = max(cells, key=distance)
    method, seed = worst
    value, other_value = rows[worst].get(column), other_rows[worst].get(column)
    count = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
    if isinstance(value, list) or isinstance(other_value, list):
        largest = f"at most {distance(worst):.3g}"
    else:
        largest = f"largest difference {value} | {other_value}"
    return f"{column} differs in {count}, {largest} ({method}, seed {seed})"


def _as_list(x: Any) -> list:
    return x if isinstance(x, list) else [x]
