"""Columns of rows in the order of the seeds, and their texts in a printed table."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hypergrad.bench import Row, select

QUARTILES = (0.25, 0.5, 0.75)


def rows_by_seed(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """Returns the rows that have all of the given values, by seed."""
    return sorted(select(rows, **fields), key=lambda row: row["seed"])


def column(rows: Iterable[Row], name: str, **fields: Any) -> np.ndarray:
    """Returns a column of `rows_by_seed`; NaN where a row has no number.

    Raises:
      KeyError: There are rows, and none of them has the field.
    """
    selected = rows_by_seed(rows, **fields)
    if selected and not any(name in row for row in selected):
        raise KeyError(name)
    return np.array([row.get(name) for row in selected], float)


def mean_text(rows: Sequence[Row], name: str, form: str, scale: float = 1.0) -> str:
    """Returns the mean over the rows that have a number; "-" if none has."""
    values = np.array([row.get(name) for row in rows], float)
    values = values[~np.isnan(values)]
    return format(scale * np.mean(values), form) if values.size else "-"


def quartiles_text(values: Sequence[float] | np.ndarray, form: str) -> str:
    """Returns the text ``median [first quartile, third quartile]``."""
    low, median, high = np.quantile(values, QUARTILES)
    return f"{median:{form}} [{low:{form}}, {high:{form}}]"
