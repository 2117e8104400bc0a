"""Figures of the tables; matplotlib is imported when a figure is made.

The functions take rows of a table and the path of the PNG that they write. The name of
a method may have a prefix, such as the system in 'system, method'.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .method_colors import COLORS, colors_of
from .plots import make_panels
from .row_columns import rows_by_seed

Rows = list[dict[str, Any]]


def _figure(num_panels: int) -> tuple[Any, Any]:
    """Returns a figure with panels side by side."""
    return make_panels(1, num_panels, (5 * num_panels, 3.6))


def _group_by_method(rows: Rows, prefix: str = "") -> dict[str, Rows]:
    """Returns the rows of each method that has the prefix, named without it."""
    groups: dict[str, Rows] = {}
    for row in rows:
        if row["method"].startswith(prefix):
            groups.setdefault(row["method"].removeprefix(prefix), []).append(row)
    return groups


def _plot_seeds(
    axes: Any, groups: dict[str, Rows], column: str, *, is_geometric: bool = False
) -> None:
    """Plots one line per method: a dot for each seed, and a bar for their mean."""
    for position, group in enumerate(groups.values()):
        x = [row[column] for row in group]
        axes.plot(x, [position] * len(x), "o", alpha=0.5, color="#1f77b4")
        mean = np.exp(np.mean(np.log(x))) if is_geometric else np.mean(x)
        axes.plot(mean, position, "k|", markersize=14)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()


def cleaning(rows: Rows, path: Path) -> None:
    """Plots weights of clean and wrong examples, and validation loss against cost."""
    figure, (left, right) = _figure(2)
    learned = [row for row in rows if "clean_weights" in row]
    names = list(dict.fromkeys(row["method"] for row in learned))
    selected = next((name for name in ("implicit", *names) if name in names), None)
    selected_rows = [row for row in learned if row["method"] == selected]
    for kind, color in (("clean", "#1f77b4"), ("wrong", "#d62728")):
        counts = [row[f"{kind}_weights"] for row in selected_rows]
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
    if selected is not None:
        title = f"Example weights, {selected}"
        left.set(xlabel="learned weight", ylabel="density", title=title)
        left.legend(frameon=False)
    _plot_curves(right, _group_by_method(learned), "validation loss")
    figure.savefig(path, dpi=150)


def penalties(rows: Rows, path: Path) -> None:
    """Plots validation loss against cost, one panel per system."""
    systems = ("logistic", "softmax", "mlp", "cnn")
    figure, panels = _figure(len(systems))
    for axes, system in zip(panels, systems, strict=True):
        groups = _group_by_method(rows, f"{system}, ")
        baseline = [row["val_loss"] for row in groups.get("baseline", [])]
        if baseline:
            color = COLORS["baseline"]
            axes.axhline(np.median(baseline), color=color, label="baseline")
        _plot_curves(axes, groups, "validation loss")
        axes.set_title(system)
    figure.savefig(path, dpi=150)


def schedules(rows: Rows, path: Path) -> None:
    """Plots test loss over that of the baseline, memory, and learned schedules."""
    figure, (left, middle, right) = _figure(3)
    lengths = list(dict.fromkeys(row["method"].split(", ")[0] for row in rows))
    methods = list(dict.fromkeys(row["method"].split(", ")[1] for row in rows))
    rows_by_method = {
        (length, method): rows_by_seed(rows, method=f"{length}, {method}")
        for length in lengths
        for method in methods
    }
    column = lambda rows, name: np.array([row[name] for row in rows])
    for i, length in enumerate(lengths):
        baseline_loss = column(rows_by_method[length, "baseline"], "test_loss")
        for j, method in enumerate(methods[1:]):
            test_loss = column(rows_by_method[length, method], "test_loss")
            if len(test_loss) == len(baseline_loss):
                ratio = test_loss / baseline_loss
                y = np.full(len(ratio), j + 0.2 * (i - 1))
                left.plot(ratio, y, "o", alpha=0.5, color=f"C{i}")
                mean = np.exp(np.mean(np.log(ratio)))
                left.plot(mean, y[0], "|", markersize=14, color=f"C{i}")
        for method, line in (("baseline", "--"), ("reversible", "-")):
            method_rows = rows_by_method.get((length, method))
            if method_rows:
                momentum = column(method_rows, "momentum")
                effective_rate = column(method_rows, "rate") / (1 - momentum)
                right.stairs(
                    np.median(effective_rate, axis=0),
                    np.linspace(0, 1, 1 + effective_rate.shape[1]),
                    baseline=None,
                    ls=line,
                    color=f"C{i}",
                    label=f"{length}, {method}",
                )
    left.axvline(1, color=COLORS["baseline"], lw=0.8)
    left.set_yticks(range(len(methods) - 1), methods[1:])
    left.invert_yaxis()
    left.set(xlabel="test loss / baseline's", title="Seeds, and their geometric mean")
    for method, color in colors_of(methods).items():
        points = [
            (int(length.split()[0]), group[0]["memory"] / 2**20)
            for length in lengths
            if (group := rows_by_method[length, method]) and "memory" in group[0]
        ]
        if points:
            middle.plot(*zip(*points, strict=True), "o-", label=method, color=color)
    middle.axhline(1024, color="k", lw=0.8, ls=":", label="1 GiB")
    middle.set(
        xlabel="steps of the run",
        ylabel="MiB set aside",
        xscale="log",
        yscale="log",
        title="Memory of learning",
    )
    right.set(
        xlabel="share of the run",
        ylabel="rate / (1 - momentum)",
        yscale="log",
        title="Schedules, median over seeds",
    )
    middle.legend(frameon=False, fontsize=7)
    right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def augmentation(
    operations: tuple[str, ...],
    pose: list[float],
    rows: Rows,
    path: Path,
) -> None:
    """Plots learned and true strengths of operations, and validation loss against cost.

    Args:
      operations: Names of the operations.
      pose: True magnitudes as fractions of the largest.
    """
    figure, (left, right) = _figure(2)
    learned = [row for row in rows if "curve_value" in row]
    groups = _group_by_method(learned)
    positions, width = np.arange(len(operations)), 0.8 / max(len(groups), 1)
    colors = colors_of(groups)
    for i, (name, method_rows) in enumerate(groups.items()):
        strength = np.array(
            [np.multiply(row["magnitude"], row["probability"]) for row in method_rows]
        )
        left.bar(
            positions + (i - (len(groups) - 1) / 2) * width,
            np.mean(strength, axis=0),
            width,
            yerr=np.std(strength, axis=0) if len(strength) > 1 else None,
            label=name,
            color=colors[name],
            error_kw={"linewidth": 0.8},
        )
    left.plot(positions, pose, "k_", markersize=26, label="true")
    left.set_xticks(positions, operations, rotation=30, ha="right")
    left.set(
        ylabel="magnitude x probability (of the largest)",
        title="Policies: mean and deviation over seeds",
    )
    left.legend(frameon=False)
    _plot_curves(right, _group_by_method(learned), "validation loss")
    figure.savefig(path, dpi=150)


def self_supervised(rows: Rows, grid: Any, path: Path) -> None:
    """Plots test error against temperature, and validation error against cost.

    Args:
      grid: Temperatures of the grid.
    """
    figure, (left, right) = _figure(2)
    grid_errors = [row["grid_errors"] for row in rows if "grid_errors" in row]
    if grid_errors:
        left.plot(grid, np.mean(grid_errors, axis=0), "o-", color=COLORS["baseline"])
        left.set(title="Default strengths (line), learned (crosses)")
    for name, color in colors_of(("temperature", "unrolled", "truncated")).items():
        method_rows = [row for row in rows if row["method"] == name]
        temperature = [row["temperature"] for row in method_rows]
        error = [row["test_error"] for row in method_rows]
        left.plot(temperature, error, "x", color=color, label=name)
    left.set(xlabel="temperature", ylabel="test error of the probe", xscale="log")
    left.legend(frameon=False)
    _plot_curves(right, _group_by_method(rows), "validation error of the probe")
    figure.savefig(path, dpi=150)


def unsupervised(rows: Rows, variants: Any, path: Path) -> None:
    """Plots validation loss against cost, one panel per model.

    Args:
      variants: Names of the models.
    """
    figure, panels = _figure(len(variants))
    for axes, variant in zip(panels, variants, strict=True):
        groups = _group_by_method(rows, f"{variant}, ")
        _plot_curves(axes, groups, "validation nats")
        axes.set(title=variant, yscale="linear")
        baseline = [row["val_nll"] for row in groups.get("baseline", [])]
        if baseline:
            median = np.median(baseline)
            axes.axhline(median, color=COLORS["baseline"], ls="--")
            axes.set_ylim(top=median + 0.3 * abs(median))
    figure.savefig(path, dpi=150)


def few_shot(rows: Rows, path: Path) -> None:
    """Plots the test accuracy of each seed, and query loss against cost."""
    smooth_rows = [_smooth_curve(row) for row in rows]
    methods(
        smooth_rows, path, column="test_accuracy", label="accuracy on unseen characters"
    )


def _smooth_curve(row: dict[str, Any], num_steps: int = 20) -> dict[str, Any]:
    """Returns a row with a curve averaged over ``num_steps``, except random search."""
    if len(row.get("curve_value", ())) < num_steps:
        return row
    if row["method"].startswith("random search"):
        return row
    columns = {}
    for column in ("curve_value", "curve_cost"):
        length = len(row[column]) // num_steps * num_steps
        columns[column] = np.reshape(row[column][:length], (-1, num_steps)).mean(axis=1)
    return row | columns


def methods(
    rows: Rows,
    path: Path,
    *,
    column: str,
    label: str,
    log: bool = False,
) -> None:
    """Plots a column for each seed and method, and outer value against cost.

    Args:
      column: Name of the column.
      label: Label of the column.
      log: Whether its scale is logarithmic.
    """
    figure, (left, right) = _figure(2)
    _plot_seeds(left, _group_by_method(rows), column)
    left.set(xlabel=label, title="Seeds, and their mean")
    if log:
        left.set_xscale("log")
    _plot_curves(right, _group_by_method(rows), "outer value")
    figure.savefig(path, dpi=150)


def _plot_curves(axes: Any, groups: dict[str, Rows], ylabel: str) -> None:
    """Plots median and quartiles over seeds of ``curve_value`` by ``curve_cost``.

    The curve of random search is the best value so far.
    """
    colors = colors_of(groups)
    for name, group in groups.items():
        method_rows = [row for row in group if "curve_value" in row]
        if not method_rows:
            continue
        length = min(len(row["curve_value"]) for row in method_rows)
        to_array = lambda column, rows=method_rows, length=length: np.array(
            [row[column][:length] for row in rows], float
        )
        value, cost = to_array("curve_value"), to_array("curve_cost")
        if name.startswith("random search"):
            value = np.minimum.accumulate(value, axis=1)
        low, median, high = np.nanpercentile(value, [25, 50, 75], axis=0)
        cost, color = np.median(cost, axis=0), colors[name]
        axes.plot(cost, median, label=name, color=color)
        axes.fill_between(cost, low, high, alpha=0.2, color=color, linewidth=0)
    axes.set(
        xlabel="gradient-equivalents",
        ylabel=ylabel,
        yscale="log",
        title="Median and quartiles over seeds",
    )
    if any("curve_value" in row for group in groups.values() for row in group):
        axes.legend(frameon=False)


def physics(rows: Rows, systems: Sequence[str], path: Path) -> None:
    """Plots errors by method and the learned weights, two panels per system.

    Args:
      systems: Names of the systems.
    """
    figure, panels = _figure(2 * len(systems))
    for i, system in enumerate(systems):
        left, right = panels[2 * i : 2 * i + 2]
        groups = _group_by_method(rows, f"{system}, ")
        _plot_seeds(left, groups, "relative_error", is_geometric=True)
        for position, (name, group) in enumerate(groups.items()):
            boundary, data = (
                [row[f"alpha_{term}"] / row["alpha_residual"] for row in group]
                for term in ("boundary", "data")
            )
            if name != "equal weights":
                style = {"label": name, "color": f"C{position}", "alpha": 0.7}
                right.plot(boundary, data, "o", **style)
        title = f"{system}: seeds, and their geometric mean"
        left.set(xlabel="relative L2 error", xscale="log", title=title)
        right.axhline(1, color=COLORS["baseline"], linewidth=0.5)
        right.axvline(1, color=COLORS["baseline"], linewidth=0.5)
        right.set(
            xlabel="weight of boundary / residual",
            ylabel="weight of data / residual",
            xscale="log",
            yscale="log",
            title=f"{system}: chosen weights, equal ones cross",
        )
        right.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def reinforcement(rows: Rows, path: Path) -> None:
    """Plots return, discount and entropy weight against cost, and errors of values."""
    figure, panels = _figure(4)
    runs = [row for row in rows if "curve_return" in row]
    labels = {
        "return": "return of an episode, in steps",
        "discount": "1 - discount",
        "entropy": "entropy weight",
    }
    for axes, (column, label) in zip(panels[:3], labels.items(), strict=True):
        for i, (name, method_rows) in enumerate(_group_by_method(runs).items()):
            y = np.array([row[f"curve_{column}"] for row in method_rows])
            y = 1 - y if column == "discount" else y
            if column == "return":
                y = np.array(
                    [np.convolve(curve, np.ones(5) / 5, "valid") for curve in y]
                )
            cost = np.median([row["curve_cost"] for row in method_rows], axis=0)
            style = {"label": name.removeprefix("cartpole, "), "color": f"C{i}"}
            axes.plot(cost[-y.shape[1] :], np.median(y, axis=0), **style)
        scale = "linear" if column == "return" else "log"
        title = "cartpole: median over seeds"
        axes.set(xlabel="gradient-equivalents", ylabel=label, yscale=scale, title=title)
    panels[0].legend(frameon=False, fontsize=7)
    groups = _group_by_method([row for row in rows if "value_error" in row], "mrp, ")
    _plot_seeds(panels[3], groups, "value_error", is_geometric=True)
    title = "mrp: seeds, and their geometric mean"
    panels[3].set(xlabel="error of the values", xscale="log", title=title)
    figure.savefig(path, dpi=150)


def architecture(
    rows: Rows,
    flops: Sequence[float],
    accuracy: Any,
    priced: str,
    path: Path,
) -> None:
    """Plots accuracy against FLOPs of all cells, and the cells that each method chose.

    Args:
      flops: FLOPs of all cells as fractions of the largest.
      accuracy: Accuracy of all cells; the figure leaves out values below 0.75.
      priced: Suffix of the names of methods that pay for operations.
    """
    figure, panels = _figure(2)
    chosen = [row for row in rows if "cell" in row]
    names = list(dict.fromkeys(row["method"].removesuffix(priced) for row in chosen))
    order = np.argsort(flops, kind="stable")
    sorted_flops = np.asarray(flops)[order]
    best = np.maximum.accumulate(np.asarray(accuracy)[order])
    for axes, suffix in zip(panels, ("", priced), strict=True):
        axes.plot(flops, accuracy, ".", color="#c7c7c7", label="all cells")
        axes.plot(sorted_flops, best, color="#c7c7c7", drawstyle="steps-post")
        for i, name in enumerate(names):
            method_rows = [row for row in chosen if row["method"] == name + suffix]
            points = [(row["flops"], row["accuracy"]) for row in method_rows]
            unique_points = sorted(set(points))
            # Shift the methods, so that none covers another that chose the same cell.
            x = [x + 0.025 * (i - (len(names) - 1) / 2) for x, _ in unique_points]
            y = [y for _, y in unique_points]
            sizes = [20 * points.count(point) for point in unique_points]
            axes.scatter(
                x, y, sizes, f"C{i}", alpha=0.6, linewidth=0, label=name, zorder=3
            )
        axes.set(
            xlabel="FLOPs over those of the largest cell",
            ylabel="test accuracy, mean over retrainings",
            title=f"Chosen cells{suffix}; area: by how many seeds",
            ylim=(0.75, 0.95),
        )
    legend = panels[0].legend(frameon=False, fontsize=7, loc="lower right")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([20])
    figure.savefig(path, dpi=150)
