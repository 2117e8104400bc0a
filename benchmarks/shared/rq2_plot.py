"""The figure of the table `rq2`."""

from pathlib import Path

import numpy as np

from .plots import add_grid, make_panels, plain_ticks

COLORS = ("crimson", "darkorange", "goldenrod", "grey", "black", "steelblue")


def value_at(cost: list[float], value: list[float], costs: np.ndarray) -> np.ndarray:
    """Returns the value of a run at each cost; NaN before it starts."""
    index = np.searchsorted(cost, costs, side="right") - 1
    return np.where(index < 0, np.nan, np.asarray(value)[np.maximum(index, 0)])


def curves(
    panels: dict[tuple[str, str], dict[str, list[tuple]]],
    budgets: dict[str, float],
    metrics: tuple[str, ...],
    path: Path,
) -> None:
    """Plots means over seeds of validation metrics against cost, and test metrics.

    Args:
      panels: ``{(task, metric): {method: runs}}``; a run is (costs, values,
        test value).
      budgets: ``{task: budget}``.
      metrics: Metrics, a column each.
      path: File of the figure.
    """
    tasks = list(dict.fromkeys(task for task, _ in panels))
    figure, axes = make_panels(
        2 * len(tasks),
        len(metrics),
        (12, 5.4 * len(tasks)),
        height_ratios=[3, 1.7] * len(tasks),
        squeeze=False,
    )
    for (task, metric), methods in panels.items():
        row, position = 2 * tasks.index(task), metrics.index(metric)
        upper, lower = axes[row, position], axes[row + 1, position]
        min_cost = max(run[0][0] for runs in methods.values() for run in runs)
        grid = np.geomspace(min_cost, budgets[task], 200)
        for i, (name, runs) in enumerate(methods.items()):
            color, style = COLORS[i], "--" if name.startswith("cross") else "-"
            values = [value_at(cost, value, grid) for cost, value, _ in runs]
            mean = 100 * np.mean(values, axis=0)
            upper.plot(grid, mean, style, color=color)
            test = 100 * np.array([test for _, _, test in runs])
            lower.plot(test, np.full(test.size, i), ".", color=color, alpha=0.4)
            lower.plot(test.mean(), i, "D", color=color, ms=6)
        upper.set_xscale("log")
        plain_ticks(upper.xaxis)
        upper.set_title(f"{task}: {metric}", fontsize=10)
        upper.set_xlabel("gradient-equivalents", fontsize=8)
        upper.set_ylabel("validation, %", fontsize=8)
        lower.set_yticks(range(len(methods)), methods, fontsize=7)
        for label, color in zip(lower.get_yticklabels(), COLORS, strict=False):
            label.set_color(color)
        lower.set_ylim(len(methods) - 0.5, -0.5)
        lower.set_xlabel("test at the end, %: seeds, and their mean", fontsize=8)
        for axis in (upper, lower):
            axis.tick_params(labelsize=8)
            add_grid(axis)
        lower.tick_params(axis="y", labelsize=7)
    figure.suptitle(
        "The exact metric of the model in hand: its own surrogate by three ways, black "
        "boxes on the metric itself, and cross-entropy",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
