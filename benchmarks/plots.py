"""Figures of tables; matplotlib is imported when one is drawn."""

from pathlib import Path

import numpy as np

LEAST = 1e-16  # an error of 0 is drawn as this


def errors(
    panels: dict[str, list[list[float | None]]],
    rows: list[str],
    columns: list[str],
    path: Path,
) -> None:
    """A heat map of log10 relative error a panel; None is a cell that cannot be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3.2 + 0.58 * len(columns) * len(panels), 1.9 + 0.3 * len(rows))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, sharey=True, layout="constrained"
    )
    for axis, (title, cells) in zip(axes, panels.items(), strict=True):
        values = np.array(cells, dtype=float)  # None becomes NaN
        digits = np.log10(np.maximum(values, LEAST))
        image = axis.imshow(digits, cmap="RdYlBu_r", vmin=-16, vmax=0, aspect="auto")
        for (i, j), digit in np.ndenumerate(digits):
            text = "n/a" if np.isnan(digit) else f"{digit:.0f}"
            dark = not np.isnan(digit) and (digit < -13 or digit > -1.5)
            axis.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
        axis.set_title(title)
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1)
        axis.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, ticks=range(-16, 1, 4), pad=0.01)
    bar.set_label("log10 of the relative error")
    figure.suptitle("How far each hypergradient is from the truth (worst structure)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
