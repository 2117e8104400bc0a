"""Traces of outer losses beside those that a paper prints at some of its steps."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

import hypergrad as hg
from hypergrad.bench import Column, Finding, Published, Row, select
from hypergrad.bench.claims import Tag
from hypergrad.bench.report import markdown_table

from .plots import add_legend_outside, make_panels, palette

NUM_POINTS = 200  # of a curve in a row
COUNT_COLUMNS = (
    Column("gradient_equivalents", "grad-eq", ".0f", has_deviation=False),
    Column("num_grads", "inner gradients", ".0f", has_deviation=False),
    Column("num_hvps", "HVPs", ".0f", has_deviation=False),
)


def step_columns(steps: Iterable[int], form: str = ".6f") -> tuple[Column, ...]:
    """Returns the columns of the outer loss at the steps."""
    return tuple(
        Column(f"step_{step}", f"step {step}", form, has_deviation=False)
        for step in steps
    )


def published_steps(
    label: str,
    values: Mapping[int, float],
    tolerance: float,
    tag: Tag,
    source: str,
) -> dict[tuple[str, str], Published]:
    """Returns a paper's outer losses by step, with a relative tolerance."""
    return {
        (label, f"step_{step}"): Published(
            value, tolerance, tag, source=source, relative=True
        )
        for step, value in values.items()
    }


def largest_differences(
    rows: list[Row], losses: Mapping[str, Mapping[int, float]]
) -> Finding:
    """Returns the largest relative difference from the losses of each method."""
    texts = []
    for method, values in losses.items():
        row = select(rows, method=method)[0]
        differences = [abs(row[f"step_{k}"] / x - 1) for k, x in values.items()]
        texts.append(f"{method} {max(differences):.1e}")
    return Finding(
        f"Largest relative difference from the printed losses: {'; '.join(texts)}"
    )


def method_lines(rows: list[Row], columns: Iterable[Column]) -> list[str]:
    """Returns the lines of a table with a line per method."""
    columns = list(columns)
    texts = [
        [method, *(column.text(select(rows, method=method)) for column in columns)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return markdown_table(["method", *(x.heading for x in columns)], texts)


def trace_row(trace: hg.Trace, steps: Iterable[int]) -> Row:
    """Returns the outer loss at the steps and at the last one, costs, and a curve.

    The loss of a step is the one before ``alpha`` moves. Costs are those of all steps.
    """
    values, costs = np.asarray(trace.value, float), np.asarray(trace.cost, float)
    total = lambda name: float(np.nansum(np.asarray(trace.stats[name], float)))
    row = {f"step_{step}": values[step] for step in steps if step < len(values)}
    return row | {
        "final": values[-1],
        "gradient_equivalents": costs[-1],
        "num_grads": total("num_grads"),
        "num_hvps": total("num_hvps"),
        "num_untrusted": float(np.sum(~np.asarray(trace.stats["trusted"], bool))),
        **curve(values, costs),
    }


def curve(values: np.ndarray, costs: np.ndarray) -> dict[str, list[float]]:
    """Returns steps, values and costs at steps that are evenly spaced in logarithms."""
    spaced = np.geomspace(1, len(values), min(len(values), NUM_POINTS))
    index = np.unique(spaced.round().astype(int)) - 1
    return {
        "curve_step": index.tolist(),
        "curve_value": values[index].tolist(),
        "curve_cost": costs[index].tolist(),
    }


def first_cost_below(values: np.ndarray, costs: np.ndarray, bound: float) -> float:
    """Returns the cost of the first value of at most the bound; NaN without one."""
    is_below = np.asarray(values) <= bound
    return float(costs[np.argmax(is_below)]) if np.any(is_below) else float("nan")


def plot_traces(
    rows: Sequence[Row],
    published: Mapping[tuple[str, str], Published],
    path: Path,
) -> None:
    """Plots losses by step with the published points, and losses by cost.

    Args:
      rows: Rows with curves; of a method with several seeds each one is drawn.
      published: Numbers of a paper; those of columns ``step_...`` are drawn.
      path: File of the figure.
    """
    figure, (left, right) = make_panels(1, 2, (14, 4.8))
    methods = list(dict.fromkeys(row["method"] for row in rows if "curve_step" in row))
    # Ten dark colours, then ten light ones.
    ordered = palette("tab20")[::2] + palette("tab20")[1::2]
    colors = {method: ordered[i % 20] for i, method in enumerate(methods)}
    for row in rows:
        if "curve_step" not in row:
            continue
        is_first = row["seed"] == min(
            other["seed"] for other in rows if other["method"] == row["method"]
        )
        style = {
            "color": colors[row["method"]],
            "label": row["method"] if is_first else None,
            "linewidth": 1.2,
        }
        values = np.asarray(row["curve_value"], float)
        if not row.get("is_search"):
            left.plot(np.array(row["curve_step"]) + 1, values, **style)
        right.plot(row["curve_cost"], values, **style)
    for (method, name), number in published.items():
        if name.startswith("step_"):
            left.plot(
                int(name.removeprefix("step_")) + 1,
                number.value,
                marker="o",
                markersize=6,
                markerfacecolor="none",
                color=colors.get(method, "black"),
            )
    left.plot([], [], "o", markerfacecolor="none", color="black", label="paper")
    left.set_xlabel("outer steps, counted from 1")
    right.set_xlabel("gradient-equivalents")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", ylabel="outer loss")
        axis.grid(alpha=0.2)
    add_legend_outside(figure, (left, right), fontsize=8)
    figure.savefig(path, dpi=120)
