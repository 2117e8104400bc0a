"""Pictures; matplotlib is imported when one is drawn."""

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


def penalties(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against cost, a panel a system; the baseline as a line."""
    systems = ("logistic", "softmax", "mlp", "cnn")
    figure, panels = _figure(len(systems))
    by_system(panels, rows, systems)
    _save(figure, path)


def schedules(rows: list[dict[str, Any]], path: Path) -> None:
    """Test loss against the baseline's, memory, and what was learned, by length.

    Args:
      rows: of the study, methods named 'length, method', with rate and momentum.
      path: of the PNG.
    """
    figure, (left, middle, right) = _figure(3)
    lengths = list(dict.fromkeys(row["method"].split(", ")[0] for row in rows))
    methods = list(dict.fromkeys(row["method"].split(", ")[1] for row in rows))
    lanes = {
        (length, method): sorted(
            (row for row in rows if row["method"] == f"{length}, {method}"),
            key=lambda row: row["seed"],
        )
        for length in lengths
        for method in methods
    }
    column = lambda lane, name: np.array([row[name] for row in lane])
    for i, length in enumerate(lengths):
        base = lanes[length, "baseline"]
        for j, method in enumerate(methods[1:]):
            lane = lanes[length, method]
            if len(lane) == len(base):
                ratio = column(lane, "test_loss") / column(base, "test_loss")
                at = np.full(len(ratio), j + 0.2 * (i - 1))
                left.plot(ratio, at, "o", alpha=0.5, color=f"C{i}")
                mean = np.exp(np.mean(np.log(ratio)))
                left.plot(mean, at[0], "|", markersize=14, color=f"C{i}")
        for method, line in (("baseline", "--"), ("reversible", "-")):
            lane = lanes.get((length, method))
            if lane:
                pace = column(lane, "rate") / (1 - column(lane, "momentum"))
                right.stairs(
                    np.median(pace, axis=0),
                    np.linspace(0, 1, 1 + pace.shape[1]),
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
            (int(length.split()[0]), lanes[length, method][0]["memory"] / 2**20)
            for length in lengths
            if lanes[length, method] and "memory" in lanes[length, method][0]
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


def by_system(panels: Any, rows: list[dict[str, Any]], systems: Sequence[str]) -> None:
    """`curves` of the methods ``"system, method"``, and their baseline's loss."""
    for axes, system in zip(panels, systems, strict=True):
        named = [
            row | {"method": row["method"].removeprefix(f"{system}, ")}
            for row in rows
            if row["method"].startswith(f"{system}, ")
        ]
        base = [row["val_loss"] for row in named if row["method"] == "baseline"]
        if base:
            axes.axhline(np.median(base), color=COLORS["baseline"], label="baseline")
        curves(axes, named, "validation loss")
        axes.set_title(system)


def augmentation(
    operations: tuple[str, ...],
    pose: list[float],
    rows: list[dict[str, Any]],
    path: Path,
) -> None:
    """Strength of each operation, learned and true; validation loss against cost.

    Args:
      operations, pose: names, and the true magnitudes as shares of the largest.
      rows: of the study, with magnitude, probability and curves.
      path: of the PNG.
    """
    figure, (left, right) = _figure(2)
    learned = [row for row in rows if "curve_value" in row]
    names = list(dict.fromkeys(row["method"] for row in learned))
    places = np.arange(len(operations))
    for i, name in enumerate(names):
        strength = np.array(
            [
                np.multiply(row["magnitude"], row["probability"])
                for row in learned
                if row["method"] == name
            ]
        )
        left.bar(
            places + (i - (len(names) - 1) / 2) * 0.8 / len(names),
            np.mean(strength, axis=0),
            0.8 / len(names),
            yerr=np.std(strength, axis=0) if len(strength) > 1 else None,
            label=name,
            color=COLORS.get(name),
            error_kw={"linewidth": 0.8},
        )
    left.plot(places, pose, "k_", markersize=26, label="true")
    left.set_xticks(places, operations, rotation=30, ha="right")
    left.set(
        ylabel="magnitude x probability, share of the largest",
        title="Policies: mean and deviation over seeds",
    )
    left.legend(frameon=False)
    curves(right, learned, "validation loss")
    _save(figure, path)


def self_supervised(rows: list[dict[str, Any]], grid: Any, path: Path) -> None:
    """Test error of a grid of temperatures and of the learned; validation error.

    Args:
      rows: of the study.
      grid: the temperatures.
      path: of the PNG.
    """
    figure, (left, right) = _figure(2)
    tried = [row["grid_errors"] for row in rows if "grid_errors" in row]
    if tried:
        left.plot(grid, np.mean(tried, axis=0), "o-", color=COLORS["baseline"])
        left.set(title="Default strengths (line), learned (crosses)")
    for name in ("temperature", "unrolled", "truncated"):
        mine = [row for row in rows if row["method"] == name]
        at, error = ([r[c] for r in mine] for c in ("temperature", "test_error"))
        left.plot(at, error, "x", color=COLORS.get(name), label=name)
    left.set(xlabel="temperature", ylabel="test error of the probe", xscale="log")
    left.legend(frameon=False)
    curves(right, rows, "validation error of the probe")
    _save(figure, path)


def unsupervised(rows: list[dict[str, Any]], variants: Any, path: Path) -> None:
    """Validation loss against cost, a panel a model.

    Args:
      rows: of the study, its methods named 'model, method'.
      variants: the models.
      path: of the PNG.
    """
    figure, panels = _figure(len(variants))
    for axes, variant in zip(panels, variants, strict=True):
        start = f"{variant}, "
        mine = [
            row | {"method": row["method"].removeprefix(start)}
            for row in rows
            if row["method"].startswith(start)
        ]
        curves(axes, mine, "validation nats")
        axes.set(title=variant, yscale="linear")
        baseline = [row["val_nll"] for row in mine if row["method"] == "baseline"]
        if baseline:
            axes.axhline(np.median(baseline), color=COLORS["baseline"], ls="--")
            middle = np.median(baseline)
            axes.set_ylim(top=middle + 0.3 * abs(middle))
    _save(figure, path)


def few_shot(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy of each row, seed by seed; query loss against cost.

    Args:
      rows: of the study.
      path: of the PNG.
    """
    smooth = [smoothed(row) for row in rows]
    methods(smooth, path, column="test_accuracy", label="accuracy on unseen characters")


def smoothed(row: dict[str, Any], num_steps: int = 20) -> dict[str, Any]:
    """A row whose curve is averaged over so many steps; random search's is left."""
    if "curve_value" not in row or row["method"].startswith("random search"):
        return row
    part = {}
    for column in ("curve_value", "curve_cost"):
        whole = len(row[column]) // num_steps * num_steps
        part[column] = np.reshape(row[column][:whole], (-1, num_steps)).mean(axis=1)
    return row | part


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


def physics(rows: list[dict[str, Any]], systems: Sequence[str], path: Path) -> None:
    """Errors by method, and where the learned weights lie; two panels a system.

    Args:
      rows: of the study.
      systems: the part of a method's name before the comma.
      path: of the PNG.
    """
    figure, panels = _figure(2 * len(systems))
    for i, system in enumerate(systems):
        left, right = panels[2 * i : 2 * i + 2]
        mine = [row for row in rows if row["method"].startswith(f"{system}, ")]
        names = list(dict.fromkeys(row["method"] for row in mine))
        for place, name in enumerate(names):
            lane = [row for row in mine if row["method"] == name]
            errors = np.array([row["relative_error"] for row in lane])
            left.plot(errors, [place] * len(errors), "o", alpha=0.5, color="#1f77b4")
            left.plot(np.exp(np.mean(np.log(errors))), place, "k|", markersize=14)
            short = name.removeprefix(f"{system}, ")
            relative = {
                term: [row[f"alpha_{term}"] / row["alpha_residual"] for row in lane]
                for term in ("boundary", "data")
            }
            if short != "equal weights":
                look = {"label": short, "color": f"C{place}", "alpha": 0.7}
                right.plot(relative["boundary"], relative["data"], "o", **look)
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
    """CartPole's return, discount and entropy weight against cost; errors of values.

    Args:
      rows: of the study.
      path: of the PNG.
    """
    figure, panels = _figure(4)
    runs = [row for row in rows if "curve_return" in row]
    shown = {
        "return": "return of an episode, in steps",
        "discount": "1 - discount",
        "entropy": "entropy weight",
    }
    for axes, (column, label) in zip(panels[:3], shown.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(row["method"] for row in runs)):
            mine = [row for row in runs if row["method"] == name]
            y = np.array([row[f"curve_{column}"] for row in mine])
            y = 1 - y if column == "discount" else y
            if column == "return":
                y = np.array([np.convolve(lane, np.ones(5) / 5, "valid") for lane in y])
            cost = np.median([row["curve_cost"] for row in mine], axis=0)
            label_of = {"label": name.removeprefix("cartpole, "), "color": f"C{i}"}
            axes.plot(cost[-y.shape[1] :], np.median(y, axis=0), **label_of)
        scale = "linear" if column == "return" else "log"
        title = "cartpole: median over seeds"
        axes.set(xlabel="gradient-equivalents", ylabel=label, yscale=scale, title=title)
    panels[0].legend(frameon=False, fontsize=7)
    errors = [row for row in rows if "value_error" in row]
    names = list(dict.fromkeys(row["method"] for row in errors))
    for place, name in enumerate(names):
        mine = [row["value_error"] for row in errors if row["method"] == name]
        panels[3].plot(mine, [place] * len(mine), "o", alpha=0.5, color="#1f77b4")
        panels[3].plot(np.exp(np.mean(np.log(mine))), place, "k|", markersize=14)
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
    """Accuracy of every cell against its operations, and the chosen ones of each row.

    Args:
      rows: of the study.
      flops, accuracy: of all cells, as shares; the figure leaves out those below 0.75.
      priced: how the names of rows end for which operations have a price.
      path: of the PNG.
    """
    figure, panels = _figure(2)
    chosen = [row for row in rows if "cell" in row]
    names = list(dict.fromkeys(row["method"].removesuffix(priced) for row in chosen))
    order = np.argsort(flops, kind="stable")
    best = np.maximum.accumulate(np.asarray(accuracy)[order])
    for axes, ending in zip(panels, ("", priced), strict=True):
        axes.plot(flops, accuracy, ".", color="#c7c7c7", label="all cells")
        axes.plot(
            np.asarray(flops)[order], best, color="#c7c7c7", drawstyle="steps-post"
        )
        for i, name in enumerate(names):
            mine = [row for row in chosen if row["method"] == name + ending]
            points = [(row["flops"], row["accuracy"]) for row in mine]
            places = sorted(set(points))
            # Aside, so that those who choose the same cell are all seen.
            x = [x + 0.025 * (i - (len(names) - 1) / 2) for x, _ in places]
            y = [y for _, y in places]
            sizes = [20 * points.count(place) for place in places]
            axes.scatter(
                x, y, sizes, f"C{i}", alpha=0.6, linewidth=0, label=name, zorder=3
            )
        axes.set(
            xlabel="FLOPs, share of the largest cell's",
            ylabel="test accuracy, mean over retrainings",
            title=f"Chosen cells{ending}; area: by how many seeds",
            ylim=(0.75, 0.95),
        )
    legend = panels[0].legend(frameon=False, fontsize=7, loc="lower right")
    for handle in legend.legend_handles[1:]:
        handle.set_sizes([20])
    _save(figure, path)
