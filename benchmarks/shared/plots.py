"""Figures of tables; matplotlib is imported when one is drawn."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hypergrad.runtime.compat import import_optional

LEAST = 1e-16  # an error of 0 is drawn as this


def make_figure(size: tuple[float, float]) -> Any:
    """Returns an empty figure; it has no part in the state of pyplot."""
    import_optional("matplotlib", "figures need matplotlib", "cli")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def make_panels(
    num_rows: int, num_columns: int, size: tuple[float, float], **options: Any
) -> tuple[Any, Any]:
    """Returns a figure with its panels; the options are those of `Figure.subplots`."""
    figure = make_figure(size)
    return figure, figure.subplots(num_rows, num_columns, **options)


def palette(name: str) -> Any:
    """Returns the colors of a qualitative color map of matplotlib."""
    import matplotlib

    return matplotlib.colormaps[name].colors


def add_grid(panel: Any, alpha: float = 0.3, **options: Any) -> None:
    """Draws a grid, and leaves out the frame above and on the right."""
    panel.grid(alpha=alpha, **options)
    panel.spines[["top", "right"]].set_visible(False)


def add_legend_outside(figure: Any, axes: Iterable[Any], **options: Any) -> None:
    """Adds one legend of all panels, which names each label once."""
    handles = {}
    for axis in axes:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    loc = "outside right center"
    figure.legend(handles.values(), handles.keys(), loc=loc, **options)


def plain_ticks(axis) -> None:
    """A logarithmic axis of less than two decades in plain numbers, and few."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if high < 100 * low:
        subs = (1, 2, 5) if high > 4 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
        axis.set_major_locator(ticker.LogLocator(subs=subs))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())


def errors(
    panels: dict[str, list[list[float | None]]],
    rows: list[str],
    columns: list[str],
    path: Path,
) -> None:
    """A heat map of log10 relative error a panel; None is a cell that cannot be."""
    size = (3.2 + 0.58 * len(columns) * len(panels), 1.9 + 0.3 * len(rows))
    figure, axes = make_panels(1, len(panels), size, sharey=True)
    for axis, (title, cells) in zip(axes, panels.items(), strict=True):
        values = np.array(cells, dtype=float)  # None becomes NaN
        digits = np.log10(np.maximum(values, LEAST))
        image = axis.imshow(digits, cmap="RdYlBu_r", vmin=-16, vmax=0, aspect="auto")
        for (i, j), digit in np.ndenumerate(digits):
            text = "n/a" if np.isnan(digit) else f"{round(digit)}"
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
    figure.suptitle(
        "Relative error of each hypergradient, as a power of ten: the worst structure "
        "of a problem; in brackets, what error the estimator admits"
    )
    figure.savefig(path, dpi=130)


def medians(lanes: dict[str, list[dict]], path: Path, title: str) -> None:
    """Suboptimality against cost and against seconds; medians, quartiles shaded."""
    figure, panels = make_panels(1, 2, (13, 5.5))
    colors = palette("tab20")
    for i, (method, rows) in enumerate(lanes.items()):
        values = np.array([row["curve"] for row in rows], float)
        values[np.isnan(values)] = 1e300  # a run that broke off is as bad as can be
        quartiles = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
        low, middle, high = np.where(quartiles < 1e200, quartiles, np.nan)
        cost = np.median([row["curve_cost"] for row in rows], axis=0)
        seconds = [row["run_seconds"] for row in rows if "run_seconds" in row]
        style = {"color": colors[i % 20], "ls": "-" if i < 10 else "--"}
        for axis, whole in zip(
            panels, (cost[-1], np.median(seconds or [np.nan])), strict=True
        ):
            at = whole * cost / cost[-1]
            at = np.where(at > 0, at, np.nan)  # the start has no place on a log axis
            axis.plot(at, middle, lw=1.5, label=method, **style)
            axis.fill_between(at, low, high, color=style["color"], alpha=0.12, lw=0)
    labels = "gradient-equivalents", "seconds, in proportion to cost"
    for axis, label in zip(panels, labels, strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
        add_grid(axis)
    panels[0].set_ylabel("h(alpha) - h*, median and quartiles")
    panels[1].legend(
        fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=140)


def strips(
    panels: dict[str, dict[str, list[float]]],
    path: Path,
    label: str,
    lines: tuple[str, ...],
    most: float | None = None,
) -> None:
    """A dot a seed and a bar at the median, a row a method; lines at some medians.

    most: what is claimed not to be exceeded, another line.
    """
    names = list(next(iter(panels.values())))
    figure, axes = make_panels(
        1, len(panels), (13, 1.2 + 0.27 * len(names)), sharey=True
    )
    for axis, (title, of_method) in zip(np.ravel(axes), panels.items(), strict=True):
        for row, (name, values) in enumerate(of_method.items()):
            height = row + np.linspace(-0.25, 0.25, len(values))
            axis.plot(values, height, ".", ms=5, color="C0", alpha=0.5)
            axis.plot([np.median(values)] * 2, [row - 0.38, row + 0.38], "C3", lw=2)
            if name in lines:
                axis.axvline(np.median(values), color="0.6", lw=1, ls="--", zorder=0)
        if most is not None:
            axis.axvline(
                most, color="k", lw=1, ls=":", label=f"at most {most:g} claimed"
            )
            axis.legend(frameon=False, fontsize=8)
        axis.set(title=title, xlabel=label)
        add_grid(axis, alpha=0.25, axis="x")
        axis.set_yticks(range(len(names)), names)
    np.ravel(axes)[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def remaining(
    panels: dict[str, dict[str, list[tuple[list[float], list[float]]]]],
    dashed: tuple[str, ...],
    near: float,
    path: Path,
    unit: str = "gradient-equivalents",
) -> None:
    """What is left of the way at each cost: the median of the runs, a line a method.

    panels: title -> method -> for each seed (cost, left).
    """
    figure, axes = make_panels(1, len(panels), (14, 4.6), sharey=True)
    least = near / 30
    names = [name for methods in panels.values() for name in methods]
    names = list(dict.fromkeys(names))
    colors = dict(zip(names, palette("tab10"), strict=False))
    for axis, (title, methods) in zip(axes, panels.items(), strict=True):
        for name, runs in methods.items():
            low = max(cost[0] for cost, _ in runs)
            at = np.geomspace(low, max(cost[-1] for cost, _ in runs), 200)
            held = [
                np.array(left)[np.searchsorted(cost, at, side="right") - 1]
                for cost, left in runs
            ]
            middle = np.maximum(np.median(held, axis=0), least)
            style = "--" if name in dashed else "-"
            axis.plot(at, middle, style, color=colors[name], lw=1.8, label=name)
        axis.axhline(near, color="black", lw=0.8, ls=":")
        axis.set(xscale="log", yscale="log", title=title, xlabel=unit)
        add_grid(axis)
    axes[0].set_ylabel(f"left of the way to L-BFGS, median, {least:.2%} at the least")
    add_legend_outside(figure, axes, frameon=False)
    figure.suptitle("Solid: with hypergradients; dashed: without, until there (dotted)")
    figure.savefig(path, dpi=130)


def trade_off(
    panels: dict[str, dict[str, list[tuple[float, float, bool]]]], path: Path
) -> None:
    """Bytes against gradient-equivalents; a dot a seed, hollow where never there."""
    figure, axes = make_panels(1, len(panels), (6 * len(panels), 6))
    colors = palette("tab10")
    for axis, (title, points) in zip(np.ravel(axes), panels.items(), strict=True):
        for color, (name, runs) in zip(colors, points.items(), strict=False):
            for i, (cost, kilobytes, there) in enumerate(runs):
                face = color if there else "none"
                label = name if i == 0 else None
                axis.plot(cost, kilobytes, "o", mec=color, mfc=face, ms=7, label=label)
        heights = [kilobytes for runs in points.values() for _, kilobytes, _ in runs]
        scale = "log" if max(heights) > 10 * min(heights) else "linear"
        axis.set(xscale="log", yscale=scale, title=title)
        axis.set_xlabel("gradient-equivalents; hollow: spent, and never there")
        axis.set_ylabel("peak, kB")
        add_grid(axis, which="both")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    figure.savefig(path, dpi=130)


def growth(
    panels: dict[tuple[str, str], dict[str, tuple[list, list]]], path: Path
) -> None:
    """Counts against sizes, a line a method, both logarithmic.

    panels: (what is counted, what grows) -> method -> (sizes, counts).
    """
    counted = list(dict.fromkeys(column for column, _ in panels))
    grows = list(dict.fromkeys(axis for _, axis in panels))
    figure, axes = make_panels(
        len(counted),
        len(grows),
        (3.6 * len(grows) + 2.4, 3.2 * len(counted)),
        sharex="col",
        squeeze=False,
    )
    colors = palette("tab20")
    for (column, axis), lines in panels.items():
        panel = axes[counted.index(column), grows.index(axis)]
        for i, (name, (sizes, counts)) in enumerate(lines.items()):
            width = 5 - 0.3 * i  # what lies under others is seen beside them
            panel.plot(sizes, counts, "o-", color=colors[i], ms=3, lw=width, label=name)
        panel.set(xscale="log", yscale="log")
        plain_ticks(panel.xaxis)
        plain_ticks(panel.yaxis)
        panel.set_title(f"{column} against {axis}", fontsize=10)
        add_grid(panel)
    for panel, name in zip(axes[-1], grows, strict=True):
        panel.set_xlabel(name)
    add_legend_outside(figure, axes.flat, frameon=False)
    figure.savefig(path, dpi=120)
