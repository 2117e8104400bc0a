"""Figures of the tables; matplotlib is imported when a figure is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLORS = {
    "baseline": "#7f7f7f",
    "random search": "#8c564b",
    "random search, total": "#c49c94",
    "implicit": "#1f77b4",
    "neumann": "#2ca02c",
    "unrolled": "#ff7f0e",
    "DADA": "#9467bd",
    "truncated": "#17becf",
    "forward": "#2ca02c",
    "reversible": "#9467bd",
}


def _figure(num_panels: int):
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "matplotlib must be installed to make figures. Run pip install "
            "'hypergrad-jax[cli]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figsize = (5 * num_panels, 3.6)
    return pyplot.subplots(1, num_panels, figsize=figsize, layout="constrained")


def cleaning(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots the weights of clean and wrong examples, and validation loss against cost.

    Args:
      rows: Rows of the table with curves and histograms.
      path: Path of the PNG.
    """
    figure, (left, right) = _figure(2)
    learned = [row for row in rows if "curve_value" in row]
    names = list(dict.fromkeys(row["method"] for row in learned))
    selected = next((name for name in ("implicit", *names) if name in names), None)
    for kind, color in (("clean", "#1f77b4"), ("wrong", "#d62728")):
        counts = [
            row[f"{kind}_weights"] for row in learned if row["method"] == selected
        ]
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
    curves(right, learned, "validation loss")
    _save(figure, path)


def penalties(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots validation loss against cost, one panel per system."""
    systems = ("logistic", "softmax", "mlp", "cnn")
    figure, panels = _figure(len(systems))
    _plot_systems(panels, rows, systems)
    _save(figure, path)


def schedules(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots test loss over that of the baseline, memory, and learned schedules.

    Args:
      rows: Rows with rate and momentum; methods are named 'length, method'.
      path: Path of the PNG.
    """
    figure, (left, middle, right) = _figure(3)
    lengths = list(dict.fromkeys(row["method"].split(", ")[0] for row in rows))
    methods = list(dict.fromkeys(row["method"].split(", ")[1] for row in rows))
    rows_by_method = {
        (length, method): sorted(
            (row for row in rows if row["method"] == f"{length}, {method}"),
            key=lambda row: row["seed"],
        )
        for length in lengths
        for method in methods
    }
    column = lambda rows, name: np.array([row[name] for row in rows])
    for i, length in enumerate(lengths):
        baseline_rows = rows_by_method[length, "baseline"]
        for j, method in enumerate(methods[1:]):
            method_rows = rows_by_method[length, method]
            if len(method_rows) == len(baseline_rows):
                ratio = column(method_rows, "test_loss") / column(
                    baseline_rows, "test_loss"
                )
                y = np.full(len(ratio), j + 0.2 * (i - 1))
                left.plot(ratio, y, "o", alpha=0.5, color=f"C{i}")
                mean = np.exp(np.mean(np.log(ratio)))
                left.plot(mean, y[0], "|", markersize=14, color=f"C{i}")
        for method, line in (("baseline", "--"), ("reversible", "-")):
            method_rows = rows_by_method.get((length, method))
            if method_rows:
                effective_rate = column(method_rows, "rate") / (
                    1 - column(method_rows, "momentum")
                )
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
    for method in methods:
        points = [
            (
                int(length.split()[0]),
                rows_by_method[length, method][0]["memory"] / 2**20,
            )
            for length in lengths
            if rows_by_method[length, method]
            and "memory" in rows_by_method[length, method][0]
        ]
        if points:
            color = COLORS.get(method)
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
    _save(figure, path)


def _plot_systems(
    panels: Any, rows: list[dict[str, Any]], systems: Sequence[str]
) -> None:
    """Plots `curves` of the methods of each system, and the loss of its baseline."""
    for axes, system in zip(panels, systems, strict=True):
        system_rows = [
            row | {"method": row["method"].removeprefix(f"{system}, ")}
            for row in rows
            if row["method"].startswith(f"{system}, ")
        ]
        baseline = [
            row["val_loss"] for row in system_rows if row["method"] == "baseline"
        ]
        if baseline:
            axes.axhline(
                np.median(baseline), color=COLORS["baseline"], label="baseline"
            )
        curves(axes, system_rows, "validation loss")
        axes.set_title(system)


def augmentation(
    operations: tuple[str, ...],
    pose: list[float],
    rows: list[dict[str, Any]],
    path: Path,
) -> None:
    """Plots learned and true strengths of operations, and validation loss against cost.

    Args:
      operations: Names of the operations.
      pose: True magnitudes as fractions of the largest.
      rows: Rows of the table with magnitude, probability and curves.
      path: Path of the PNG.
    """
    figure, (left, right) = _figure(2)
    learned = [row for row in rows if "curve_value" in row]
    names = list(dict.fromkeys(row["method"] for row in learned))
    positions = np.arange(len(operations))
    for i, name in enumerate(names):
        strength = np.array(
            [
                np.multiply(row["magnitude"], row["probability"])
                for row in learned
                if row["method"] == name
            ]
        )
        left.bar(
            positions + (i - (len(names) - 1) / 2) * 0.8 / len(names),
            np.mean(strength, axis=0),
            0.8 / len(names),
            yerr=np.std(strength, axis=0) if len(strength) > 1 else None,
            label=name,
            color=COLORS.get(name),
            error_kw={"linewidth": 0.8},
        )
    left.plot(positions, pose, "k_", markersize=26, label="true")
    left.set_xticks(positions, operations, rotation=30, ha="right")
    left.set(
        ylabel="magnitude x probability, fraction of the largest",
        title="Policies: mean and deviation over seeds",
    )
    left.legend(frameon=False)
    curves(right, learned, "validation loss")
    _save(figure, path)


def self_supervised(rows: list[dict[str, Any]], grid: Any, path: Path) -> None:
    """Plots test error against temperature, and validation error against cost.

    Args:
      rows: Rows of the table.
      grid: Temperatures of the grid.
      path: Path of the PNG.
    """
    figure, (left, right) = _figure(2)
    grid_errors = [row["grid_errors"] for row in rows if "grid_errors" in row]
    if grid_errors:
        left.plot(grid, np.mean(grid_errors, axis=0), "o-", color=COLORS["baseline"])
        left.set(title="Default strengths (line), learned (crosses)")
    for name in ("temperature", "unrolled", "truncated"):
        method_rows = [row for row in rows if row["method"] == name]
        temperature = [row["temperature"] for row in method_rows]
        error = [row["test_error"] for row in method_rows]
        left.plot(temperature, error, "x", color=COLORS.get(name), label=name)
    left.set(xlabel="temperature", ylabel="test error of the probe", xscale="log")
    left.legend(frameon=False)
    curves(right, rows, "validation error of the probe")
    _save(figure, path)


def unsupervised(rows: list[dict[str, Any]], variants: Any, path: Path) -> None:
    """Plots validation loss against cost, one panel per model.

    Args:
      rows: Rows of the table; methods are named 'model, method'.
      variants: Names of the models.
      path: Path of the PNG.
    """
    figure, panels = _figure(len(variants))
    for axes, variant in zip(panels, variants, strict=True):
        prefix = f"{variant}, "
        variant_rows = [
            row | {"method": row["method"].removeprefix(prefix)}
            for row in rows
            if row["method"].startswith(prefix)
        ]
        curves(axes, variant_rows, "validation nats")
        axes.set(title=variant, yscale="linear")
        baseline = [
            row["val_nll"] for row in variant_rows if row["method"] == "baseline"
        ]
        if baseline:
            median = np.median(baseline)
            axes.axhline(median, color=COLORS["baseline"], ls="--")
            axes.set_ylim(top=median + 0.3 * abs(median))
    _save(figure, path)


def few_shot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots the test accuracy of each seed, and query loss against cost.

    Args:
      rows: Rows of the table.
      path: Path of the PNG.
    """
    smooth_rows = [_smooth_curve(row) for row in rows]
    methods(
        smooth_rows, path, column="test_accuracy", label="accuracy on unseen characters"
    )


def _smooth_curve(row: dict[str, Any], num_steps: int = 20) -> dict[str, Any]:
    """Returns a row with a curve averaged over ``num_steps``, except random search."""
    if "curve_value" not in row or row["method"].startswith("random search"):
        return row
    columns = {}
    for column in ("curve_value", "curve_cost"):
        length = len(row[column]) // num_steps * num_steps
        columns[column] = np.reshape(row[column][:length], (-1, num_steps)).mean(axis=1)
    return row | columns


def methods(
    rows: list[dict[str, Any]],
    path: Path,
    *,
    column: str,
    label: str,
    log: bool = False,
) -> None:
    """Plots a column for each seed and method, and outer value against cost.

    Args:
      rows: Rows of the table with curves.
      path: Path of the PNG.
      column: Name of the column.
      label: Label of the column.
      log: Whether its scale is logarithmic.
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
    """Plots median and quartiles over seeds of ``curve_value`` by ``curve_cost``.

    The curve of random search is the best value so far.
    """
    names = list(dict.fromkeys(row["method"] for row in rows if "curve_value" in row))
    for name in names:
        method_rows = [
            row for row in rows if row["method"] == name and "curve_value" in row
        ]
        length = min(len(row["curve_value"]) for row in method_rows)
        to_array = lambda column, rows=method_rows, length=length: np.array(
            [row[column][:length] for row in rows], float
        )
        value, cost = to_array("curve_value"), to_array("curve_cost")
        if name.startswith("random search"):
            value = np.minimum.accumulate(value, axis=1)
        low, median, high = np.nanpercentile(value, [25, 50, 75], axis=0)
        cost, color = np.median(cost, axis=0), COLORS.get(name)
        (line,) = axes.plot(cost, median, label=name, color=color)
        axes.fill_between(
            cost, low, high, alpha=0.2, color=line.get_color(), linewidth=0
        )
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


def physics(rows: list[dict[str, Any]], systems: Sequence[str], path: Path) -> None:
    """Plots errors by method and the learned weights, two panels per system.

    Args:
      rows: Rows of the table; methods are named 'system, method'.
      systems: Names of the systems.
      path: Path of the PNG.
    """
    figure, panels = _figure(2 * len(systems))
    for i, system in enumerate(systems):
        left, right = panels[2 * i : 2 * i + 2]
        system_rows = [row for row in rows if row["method"].startswith(f"{system}, ")]
        names = list(dict.fromkeys(row["method"] for row in system_rows))
        for position, name in enumerate(names):
            method_rows = [row for row in system_rows if row["method"] == name]
            errors = np.array([row["relative_error"] for row in method_rows])
            left.plot(errors, [position] * len(errors), "o", alpha=0.5, color="#1f77b4")
            left.plot(np.exp(np.mean(np.log(errors))), position, "k|", markersize=14)
            label = name.removeprefix(f"{system}, ")
            relative = {
                term: [
                    row[f"alpha_{term}"] / row["alpha_residual"] for row in method_rows
                ]
                for term in ("boundary", "data")
            }
            if label != "equal weights":
                style = {"label": label, "color": f"C{position}", "alpha": 0.7}
                right.plot(relative["boundary"], relative["data"], "o", **style)
        left.set_yticks(range(len(names)), [n.split(", ")[1] for n in names])
        left.invert_yaxis()
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
    _save(figure, path)


def reinforcement(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots return, discount and entropy weight against cost, and errors of values.

    Args:
      rows: Rows of the table.
      path: Path of the PNG.
    """
    figure, panels = _figure(4)
    runs = [row for row in rows if "curve_return" in row]
    labels = {
        "return": "return of an episode, in steps",
        "discount": "1 - discount",
        "entropy": "entropy weight",
    }
    for axes, (column, label) in zip(panels[:3], labels.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(row["method"] for row in runs)):
            method_rows = [row for row in runs if row["method"] == name]
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
    errors = [row for row in rows if "value_error" in row]
    names = list(dict.fromkeys(row["method"] for row in errors))
    for position, name in enumerate(names):
        values = [row["value_error"] for row in errors if row["method"] == name]
        panels[3].plot(
            values, [position] * len(values), "o", alpha=0.5, color="#1f77b4"
        )
        panels[3].plot(np.exp(np.mean(np.log(values))), position, "k|", markersize=14)
    panels[3].set_yticks(range(len(names)), [n.removeprefix("mrp, ") for n in names])
    panels[3].invert_yaxis()
    title = "mrp: seeds, and their geometric mean"
    panels[3].set(xlabel="error of the values", xscale="log", title=title)
    _save(figure, path)


def architecture(
    rows: list[dict[str, Any]],
    flops: Sequence[float],
    accuracy: Any,
    priced: str,
    path: Path,
) -> None:
    """Plots accuracy against FLOPs of all cells, and the cells that each method chose.

    Args:
      rows: Rows of the table.
      flops: FLOPs of all cells as fractions of the largest.
      accuracy: Accuracy of all cells; the figure leaves out values below 0.75.
      priced: Suffix of the names of methods that pay for operations.
      path: Path of the PNG.
    """
    figure, panels = _figure(2)
    chosen = [row for row in rows if "cell" in row]
    names = list(dict.fromkeys(row["method"].removesuffix(priced) for row in chosen))
    order = np.argsort(flops, kind="stable")
    best = np.maximum.accumulate(np.asarray(accuracy)[order])
    for axes, suffix in zip(panels, ("", priced), strict=True):
        axes.plot(flops, accuracy, ".", color="#c7c7c7", label="all cells")
        axes.plot(
            np.asarray(flops)[order], best, color="#c7c7c7", drawstyle="steps-post"
        )
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
    _save(figure, path)
