"""Columns of a printed table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .rows import Row


@dataclass(frozen=True)
class Column:
    """A column of the printed table: mean and standard deviation over the seeds.

    Args:
      name: Field of the rows.
      title: Heading. Defaults to ``name`` with spaces.
      form: Format of a number.
      scale: Factor applied to the values, such as 100 for percentages.
      use_max: Whether the maximum over the seeds is printed instead of the mean.
      has_deviation: Whether the standard deviation is printed.
    """

    name: str
    title: str | None = None
    form: str = ".3g"
    scale: float = 1.0
    use_max: bool = False
    has_deviation: bool = True

    @property
    def heading(self) -> str:
        """The heading of the column."""
        return self.name.replace("_", " ") if self.title is None else self.title

    def values(self, rows: Sequence[Row]) -> np.ndarray:
        """Returns the scaled values of the rows, NaN where a row has none."""
        return np.array([row.get(self.name) for row in rows], float) * self.scale

    def text(self, rows: Sequence[Row], num_missing: int = 0) -> str:
        """Returns the cell of the printed table; "-" if no row has a number.

        If some runs have no number or are missing, the cell says how many are counted.
        Rows without the field do not count as runs.
        """
        values = self.values([row for row in rows if self.name in row])
        num_runs = values.size + num_missing
        values = values[~np.isnan(values)]
        if not values.size:
            return "-"
        is_partial = values.size < num_runs
        suffix = f" ({values.size} of {num_runs})" if is_partial else ""
        if self.use_max:
            return format(np.max(values), self.form) + suffix
        mean = format(np.mean(values), self.form)
        if values.size > 1 and self.has_deviation:
            mean += f" ± {format(np.std(values, ddof=1), self.form)}"
        return mean + suffix


def is_time(name: str) -> bool:
    """Returns True for a field that differs whenever a cell is measured again."""
    return name.endswith("seconds")


COST_COLUMNS = (
    Column("gradient_equivalents", "grad-eq", ".0f", has_deviation=False),
    Column("num_hvps", "HVPs", ".0f", has_deviation=False),
    Column("tuning_cost", "tuning grad-eq", ".0f", has_deviation=False),
    Column("compile_seconds", "compile s", ".1f", use_max=True),
    Column("run_seconds", "run s", ".2f", has_deviation=False),
    Column("num_untrusted", "untrusted", ".0f", has_deviation=False),
)
