"""The figure of the table `surrogates`."""

from pathlib import Path

import numpy as np

from .plots import add_grid, make_figure


def surrogates(
    panels: dict[str, dict[str, dict[str, list[float]]]],
    own: dict[str, str],
    curves: dict[str, list[tuple]],
    path: Path,
) -> None:
    """Plots dots with intervals, a row of panels per task, and the costs to reach.

    Args:
      panels: ``{task: {method: {metric: (mean, low, high)}}}``, differences to the
        baseline in points.
      own: ``{metric: method of its surrogate}``, which is drawn larger.
      curves: ``{method: runs}``; a run is (cost, value, target, cost to reach or None).
      path: File of the figure.
    """
    heights = [len(methods) for methods in panels.values()] + [9]
    figure = make_figure((11, 1.5 + 0.26 * sum(heights)))
    grid = figure.add_gridspec(len(heights), len(own), height_ratios=heights)
    for i, (task, methods) in enumerate(panels.items()):
        for j, metric in enumerate(own):
            axis = figure.add_subplot(grid[i, j])
            _plot_dots(axis, methods, metric, own[metric])
            axis.set_title(f"{task}: test {metric}", fontsize=10)
            if j:
                axis.set_yticklabels([])
            axis.set_xlabel("points above the baseline", fontsize=8)
    _plot_curves(figure.add_subplot(grid[-1, :]), curves)
    figure.suptitle(
        "Each outer objective against the tuned baseline: mean over seeds, paired 95% "
        "interval.\nRed: the metric's own surrogate (light: its other forms). Blue: "
        "another objective. Grey: no hypergradients. Arrow: further left.",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _plot_dots(axis, methods: dict, metric: str, own: str) -> None:
    """Plots one panel; a method far below the rest becomes an arrow at the edge."""
    names = list(methods)
    means = np.array([methods[name][metric][0] for name in names])
    floor = max(means.min(), -3 * max(np.ptp(means[means > np.median(means)]), 1))
    lows = [methods[name][metric][1] for name in names]
    visible = [low for low, mean in zip(lows, means, strict=True) if mean >= floor]
    edge = min(visible) - 0.06 * np.ptp([*visible, means.max()])
    for position, name in enumerate(names):
        mean, low, high = methods[name][metric]
        has_no_gradients = "search" in name or "validation" in name
        is_other_form = own == "Smooth-AP" and name in (
            "FastAP",
            "soft-rank AP",
            "blackbox AP",
        )
        color = "steelblue"
        if has_no_gradients:
            color = "grey"
        elif is_other_form:
            color = "lightcoral"
        color = "crimson" if name == own else color
        if mean < floor:
            axis.plot(edge, position, "<", color=color, ms=5)
            axis.annotate(
                f"{mean:.0f}",
                (edge, position),
                (6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=color,
            )
            continue
        axis.plot([low, high], [position, position], color=color, lw=1.5)
        axis.plot(mean, position, "o", color=color, ms=7 if name == own else 5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlim(left=edge - 0.04 * (means.max() - edge))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    add_grid(axis, axis="x")


LOOP_COLORS = ("black", "darkorange", "crimson", "steelblue")


def _plot_curves(axis, curves: dict[str, list[tuple]]) -> None:
    """Plots value minus target along each run, and where the target is reached."""
    colors = dict(zip(curves, LOOP_COLORS, strict=True))
    for name, runs in curves.items():
        reached = [run[3] for run in runs if run[3] is not None]
        label = f"{name}: reached on {len(reached)} of {len(runs)} seeds"
        for i, (cost, value, target, reached_at) in enumerate(runs):
            difference = 100 * (np.array(value) - target)
            axis.plot(
                cost,
                difference,
                color=colors[name],
                lw=1,
                alpha=0.5,
                label=label if not i else None,
            )
            if reached_at is not None:
                height = difference[cost.index(reached_at)]
                axis.plot(reached_at, height, "o", color=colors[name], ms=5)
    all_runs = [run for runs in curves.values() for run in runs]
    values = [100 * (x - target) for _, value, target, _ in all_runs for x in value]
    axis.set_ylim(bottom=1.1 * np.percentile(values, 1))  # a run may diverge
    axis.axhline(0, color="grey", lw=0.8)
    axis.set_xscale("log")
    axis.set_xlim(left=50)  # the first evaluation of a single loop is nearly free
    axis.set_xlabel("gradient-equivalents of the last run", fontsize=8)
    axis.set_ylabel("points of validation mAP\nabove the double loop's end", fontsize=8)
    axis.set_title(
        "joint, digits: exact mAP of the retrained model, a line a seed; dots: reached",
        fontsize=10,
    )
    axis.legend(fontsize=8, frameon=False)
    add_grid(axis)
