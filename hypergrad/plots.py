"""Pictures; matplotlib is imported when one is drawn."""

from pathlib import Path
from typing import Any

import numpy as np

COLORS = {
    "baseline": "#7f7f7f",
    "random search": "#8c564b",
    "implicit": "#1f77b4",
    "neumann": "#2ca02c",
    "unrolled": "#ff7f0e",
}


def _figure(columns: int):
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib: pip install 'hypergrad-jax[cli]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5 * columns, 3.6), layout="constrained")


def cleaning(rows: list[dict[str, Any]], path: Path) -> None:
    """Learned weights of clean and wrong examples; validation loss against cost.

    Args:
      rows: of the study, with its curves and histograms.
      path: of the PNG.
    """
    figure, (left, right) = _figure(2)
    learned = [row for row in rows if "curve_value" in row]
    names = list(dict.fromkeys(row["method"] for row in learned))
    shown = next((name for name in ("implicit", *names) if name in names), None)
    for kind, color in (("clean", "#1f77b4"), ("wrong", "#d62728")):
        counts = [row[f"{kind}_weights"] for row in learned if row["method"] == shown]
        if counts:
            total = np.sum(counts, axis=0)
            left.stairs(
                total * len(total) / np.sum(total),
                np.linspace(0, 1, len(total) + 1),
                fill=True,
                alpha=0.6,
                label=f"{kind} label",
                color=color,
            )
    if shown is not None:
        left.set(
            xlabel="learned weight", ylabel="density", title=f"Example weights, {shown}"
        )
        left.legend(frameon=False)
    curves(right, learned, "validation loss")
    _save(figure, path)


def methods(
    rows: list[dict[str, Any]],
    path: Path,
    *,
    column: str,
    label: str,
    log: bool = False,
) -> None:
    """Every seed's number by method, and the outer value against cost.

    Args:
      rows: of the study, with its curves.
      path: of the PNG.
      column, label: what is shown on the left.
      log: its scale is logarithmic.
    """
    figure, (left, right) = _figure(2)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for i, name in enumerate(names):
        values = [row[column] for row in rows if row["method"] == name]
        left.plot(values, [i] * len(values), "o", alpha=0.5, color="#1f77b4")
        left.plot(np.mean(values), i, "k|", markersize=14)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel=label, title="Seeds, and their mean")
    if log:
        left.set_xscale("log")
    curves(right, [row for row in rows if "curve_value" in row], "outer value")
    _save(figure, path)


def curves(axes: Any, rows: list[dict[str, Any]], ylabel: str) -> None:
    """Median and quartiles over seeds of ``curve_value`` against ``curve_cost``.

    Of random search the best so far.
    """
    names = list(dict.fromkeys(row["method"] for row in rows if "curve_value" in row))
    for name in names:
        mine = [row for row in rows if row["method"] == name and "curve_value" in row]
        length = min(len(row["curve_value"]) for row in mine)
        part = lambda column, mine=mine, length=length: np.array(
            [row[column][:length] for row in mine], float
        )
        value, cost = part("curve_value"), part("curve_cost")
        if name.startswith("random search"):
            value = np.minimum.accumulate(value, axis=1)
        low, middle, high = np.nanpercentile(value, [25, 50, 75], axis=0)
        at, color = np.median(cost, axis=0), COLORS.get(name)
        (line,) = axes.plot(at, middle, label=name, color=color)
        axes.fill_between(at, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(
        xlabel="gradient-equivalents",
        ylabel=ylabel,
        yscale="log",
        title="Median and quartiles over seeds",
    )
    if names:
        axes.legend(frameon=False)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)
