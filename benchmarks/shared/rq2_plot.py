"""The figure of `rq2`; matplotlib is imported when it is drawn."""

from pathlib import Path

import numpy as np

from .plots import plain_ticks

COLORS = ("crimson", "darkorange", "goldenrod", "grey", "black", "steelblue")


def at(cost: list[float], value: list[float], when: np.ndarray) -> np.ndarray:
    """What a run has in hand at each cost; NaN before it begins."""
    index = np.searchsorted(cost, when, side="right") - 1
    return np.where(index < 0, np.nan, np.asarray(value)[np.maximum(index, 0)])


def curves(
    panels: dict[tuple[str, str], dict[str, list[tuple]]],
    budgets: dict[str, float],
    metrics: tuple[str, ...],
    path: Path,
) -> None:
    """Means over seeds of a validation metric against cost, and dots of the test.

    panels: (task, metric) -> method -> for each seed (costs, values, test value).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _ in panels))
    figure, axes = pyplot.subplots(
        2 * len(tasks), len(metrics), figsize=(12, 5.4 * len(tasks)),
        height_ratios=[3, 1.7] * len(tasks), squeeze=False, layout="constrained",
    )  # fmt: skip
    for (task, metric), methods in panels.items():
        row, place = 2 * tasks.index(task), metrics.index(metric)
        above, below = axes[row, place], axes[row + 1, place]
        first = max(run[0][0] for runs in methods.values() for run in runs)
        when = np.geomspace(first, budgets[task], 200)
        for i, (name, runs) in enumerate(methods.items()):
            color, style = COLORS[i], "--" if name.startswith("cross") else "-"
            seen = [at(cost, value, when) for cost, value, _ in runs]
            mean = 100 * np.mean(seen, axis=0)
            above.plot(when, mean, style, color=color)
            test = 100 * np.array([test for _, _, test in runs])
            below.plot(test, np.full(test.size, i), ".", color=color, alpha=0.4)
            below.plot(test.mean(), i, "D", color=color, ms=6)
        above.set_xscale("log")
        plain_ticks(above.xaxis)
        above.set_title(f"{task}: {metric}", fontsize=10)
        above.set_xlabel("gradient-equivalents", fontsize=8)
        above.set_ylabel("validation, %", fontsize=8)
        below.set_yticks(range(len(methods)), methods, fontsize=7)
        for label, color in zip(below.get_yticklabels(), COLORS, strict=False):
            label.set_color(color)
        below.set_ylim(len(methods) - 0.5, -0.5)
        below.set_xlabel("test at the end, %: seeds, and their mean", fontsize=8)
        for axis in (above, below):
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        below.tick_params(axis="y", labelsize=7)
    figure.suptitle(
        "The exact metric of the model in hand: its own surrogate by three ways, black "
        "boxes on the metric itself, and cross-entropy",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
