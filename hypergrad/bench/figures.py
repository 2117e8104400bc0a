"""Figures of tables; matplotlib is imported when a figure is drawn."""

import itertools
import tempfile
from pathlib import Path

import numpy as np

from ..runtime import atomic_io
from ..runtime.compat import import_optional
from .report import TableResult

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")


def plot(result: TableResult, path: Path) -> bool:
    """Draws the figure of a table, by its own plot or the default one.

    An existing file is replaced by a complete figure or not at all.

    Returns:
      True, or False for a table without a figure: without a plot or a column.
    """
    if result.table.plot is None and not result.table.columns:
        return False
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        if result.table.plot is None:
            plot_default(result, draft)
        else:
            result.table.plot(result.printed_rows, draft)
        atomic_io.atomic_write(path, draft.read_bytes())
    return True


def plot_default(result: TableResult, path: Path) -> None:
    """Draws the first column per method and, if recorded, value over cost."""
    pyplot = import_pyplot()
    has_curves = any("curve_value" in row for row in result.printed_rows)
    figure, axes = pyplot.subplots(
        1, 1 + has_curves, figsize=(5 * (1 + has_curves), 3.8), layout="constrained"
    )
    axes = np.atleast_1d(axes)
    column = result.table.columns[0]
    for position, label in enumerate(reversed(result.labels)):
        values = column.values(result.rows_of(label))
        axes[0].plot(values, np.full(len(values), position), "o", color=COLORS[0], ms=4)
        if np.any(~np.isnan(values)):
            axes[0].plot(np.nanmean(values), position, "|", color="black", ms=18)
    axes[0].set_yticks(range(len(result.labels)), list(reversed(result.labels)))
    axes[0].set_xlabel(column.heading)
    if has_curves:
        plot_curves(axes[1], result)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_curves(axes, result: TableResult) -> None:
    """Draws the outer value of each method over the gradient-equivalents spent."""
    curves = {
        label: [row for row in result.rows_of(label) if "curve_value" in row]
        for label in result.labels
    }
    curves = {label: rows for label, rows in curves.items() if rows}
    for (label, rows), color in zip(
        curves.items(), itertools.cycle(COLORS), strict=False
    ):
        for i, row in enumerate(rows):
            values = np.array(row["curve_value"], float)
            if values.ndim > 1:
                values = values.mean(axis=1)
            name = label if i == 0 else None
            axes.plot(row["curve_cost"], values, color=color, alpha=0.6, label=name)
    axes.set(xlabel="gradient-equivalents", ylabel="outer value")
    axes.legend(frameon=False, fontsize="small")


def import_pyplot():
    """Returns `matplotlib.pyplot`, with a backend that needs no screen.

    A backend that was chosen before stays, such as that of a notebook.
    """
    matplotlib = import_optional("matplotlib", "figures need matplotlib", "cli")
    if matplotlib.get_backend(auto_select=False) is None:
        matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
