"""Figures of runs, fronts, certificates and hypergradients.

Each function returns a matplotlib figure, which a notebook shows and
``figure.savefig("run.png")`` writes. Nothing is shown or saved by itself, and pyplot is
not used. Matplotlib is imported when a figure is drawn; the extra ``display`` installs
it. Colors can be told apart with any color vision (Okabe and Ito).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from .display.tables import to_printable_array
from .display.trace import count_rows_made
from .runtime.compat import import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .trace import Trace

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "black")
MAX_COLUMNS = 3
MAX_LINES_PER_LEAF = 20
MAX_CROSSES = 40
EDGE_HEIGHT = 0.03  # of crosses without a number, as a part of the panel
MAX_LABELS = 11
PANEL_WIDTH, PANEL_HEIGHT = 4.2, 3.0  # inches


def plot_trace(trace: "Trace") -> "Figure":
    """Draws the value, the errors, the metrics and ``alpha`` of a run over its steps.

    The outer value is drawn over the steps and over the cost. A cross marks a step
    whose estimate is not trusted, or a trial that failed; it is at the lower edge where
    there is no finite number. Errors, metrics and ``alpha`` have a panel each if
    they were recorded, ``alpha`` with ``record_alphas=True``. A leaf with more than 20
    entries is drawn by its median and the range of its entries.

    Args:
      trace: The record of a single run.

    Returns:
      A matplotlib figure with up to five panels.

    Raises:
      ValueError: The trace is a batch of runs.
      ImportError: Matplotlib is not installed.

    >>> import optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = lambda w, alpha, batch: (w - 1.0) ** 2
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.25),
    ...     0.0, 3.0, num_steps=9,
    ... )
    >>> labels = [axes.get_ylabel() for axes in hg.plots.plot_trace(trace).axes]
    >>> print(*labels, sep="; ")
    outer value; outer value; estimated relative error
    """
    steps = trace.steps  # an error for a batch of runs
    num_rows = count_rows_made(trace)
    steps = steps[:num_rows]
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _plot_values(axes, trace, steps, f"outer {trace.row_kind}")
    ]
    if "gradient_equivalents" in trace.stats:
        cost = np.asarray(trace.cost)[:num_rows]
        label = "cost (gradient-equivalents)"
        panels.append(lambda axes: _plot_values(axes, trace, cost, label))
    errors = to_printable_array(trace.stats.get("error_estimate", np.nan * steps))[
        :num_rows
    ]
    if np.any(errors > 0):
        panels.append(lambda axes: _plot_errors(axes, trace, steps, errors))
    if trace.metrics:
        panels.append(lambda axes: _plot_metrics(axes, trace, steps))
    if trace.alphas is not None:
        panels.append(lambda axes: _plot_alphas(axes, trace.alphas, steps))
    figure, all_axes = make_figure(len(panels))
    for axes, draw_panel in zip(all_axes, panels, strict=True):
        draw_panel(axes)
    return figure


def plot_front(
    values: Any, names: Sequence[str] = ("first loss", "second loss")
) -> "Figure":
    """Draws the values of two losses, to be minimized, and their Pareto front.

    Points that no other one dominates are joined by the border of the region that they
    dominate; all other points are grey.

    Args:
      values: ``[P, 2]``, such as ``trace.value[:, -1]`` of
        `hypergrad.objectives.pareto_front`, or ``trace.value`` of a search. Points that
        are not finite are left out.
      names: Names of the two losses, for the axes.

    Returns:
      A matplotlib figure with one panel.

    Raises:
      ValueError: ``values`` is not a matrix with two columns.
      ImportError: Matplotlib is not installed.

    >>> figure = plot_front([[1.0, 3.0], [2.0, 1.0], [2.0, 3.0]])
    >>> print(*(line.get_label() for line in figure.axes[0].lines), sep="; ")
    dominated; not dominated
    """
    values = to_printable_array(values)
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(f"values must have shape [P, 2]; got {values.shape}.")
    values = values[np.isfinite(values).all(axis=1)]
    values = values[np.lexsort(values.T[::-1])]
    is_front = _is_not_dominated(values)
    front = values[is_front]
    figure, (axes,) = make_figure(1)
    if not is_front.all():
        axes.plot(*values[~is_front].T, "o", color=GREY, ms=4, label="dominated")
    axes.plot(
        *front.T, "o-", color=BLUE, ms=5, drawstyle="steps-post", label="not dominated"
    )
    axes.set(xlabel=names[0], ylabel=names[1])
    _add_legend(axes)
    return figure


def _is_not_dominated(values: np.ndarray) -> np.ndarray:
    """Returns for each of the points whether none is as low in both and lower in one.

    Args:
      values: ``[P, 2]``, finite.
    """
    # Sorted by the first loss, and by the second where it is equal.
    points, index = np.unique(values, axis=0, return_inverse=True)
    lowest = np.minimum.accumulate(np.append(np.inf, points[:, 1]))[:-1]
    return (points[:, 1] < lowest)[index.reshape(-1)]


def plot_reliability(
    error_estimates: Any, errors: Any, trusted: Any = None
) -> "Figure":
    """Draws estimated errors against the errors themselves, on logarithmic axes.

    A point on the diagonal is an error that was estimated exactly. Points below it have
    an error that is larger than the estimate.

    Args:
      error_estimates: ``[N]`` relative errors as estimated, such as those of
        `hypergrad.certify`.
      errors: ``[N]`` relative errors with respect to the exact hypergradients. Zeros
        and infinities are drawn at the ends of the diagonal; pairs with a NaN are left
        out, and the title counts them.
      trusted: ``[N]`` booleans. Defaults to all trusted.

    Returns:
      A matplotlib figure with one panel.

    Raises:
      ValueError: The arguments differ in shape.
      ImportError: Matplotlib is not installed.

    >>> figure = plot_reliability([1e-3, 0.2], [2e-3, 0.2], [True, False])
    >>> print(*(line.get_label() for line in figure.axes[0].lines), sep="; ")
    equal; trusted; not trusted
    """
    x, y = to_printable_array(errors), to_printable_array(error_estimates)
    is_trusted = np.ones(x.shape, bool) if trusted is None else np.asarray(trusted)
    if x.ndim != 1 or not x.shape == y.shape == is_trusted.shape:
        raise ValueError(
            "error_estimates, errors and trusted must have one shape [N]; got "
            f"{y.shape}, {x.shape} and {is_trusted.shape}."
        )
    is_number = ~np.isnan(x) & ~np.isnan(y)
    x, y, is_trusted = x[is_number], y[is_number], is_trusted[is_number] == 1
    figure, (axes,) = make_figure(1)
    numbers = np.concatenate([x, y])
    positive = numbers[np.isfinite(numbers) & (numbers > 0)]
    if not positive.size:
        positive = np.array([np.finfo(float).eps, 1.0])
    limits = [positive.min(), positive.max()]
    axes.plot(limits, limits, "-", color=GREY, lw=1, label="equal")
    x, y = np.clip(x, *limits), np.clip(y, *limits)
    if not is_number.all():
        axes.set_title(f"{np.sum(~is_number)} with NaN are left out", loc="left")
    groups = (
        (is_trusted, "o", BLUE, "trusted"),
        (~is_trusted, "x", RED, "not trusted"),
    )
    for mask, marker, color, label in groups:
        if mask.any():
            axes.plot(x[mask], y[mask], marker, color=color, ms=4, label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="relative error",
        ylabel="estimated relative error",
    )
    _add_legend(axes)
    return figure


def plot_hypergradient(hypergradient: PyTree) -> "Figure":
    """Draws each leaf of a hypergradient as a heat map.

    A vector is a row; of a larger array the first axis is drawn downwards and all
    others, joined, to the right. Red is positive: there the outer value falls if
    ``alpha`` is lowered. White is zero, grey is not a number, and each leaf has a scale
    of its own.

    Args:
      hypergradient: An `hypergrad.Estimate`, or a pytree of arrays.

    Returns:
      A matplotlib figure with a panel per leaf.

    Raises:
      ValueError: There is no leaf.
      ImportError: Matplotlib is not installed.

    >>> figure = plot_hypergradient({"a": np.ones(3), "b": np.ones((2, 4))})
    >>> print(*(axes.get_title() for axes in figure.axes[:2]), sep="; ")
    alpha.a; alpha.b
    """
    tree = getattr(hypergradient, "hypergradient", hypergradient)
    leaves = jax.tree.leaves_with_path(tree)
    leaves = [(path, leaf) for path, leaf in leaves if np.size(leaf) > 0]
    if not leaves:
        raise ValueError("hypergradient must have at least one number; got none.")
    figure, all_axes = make_figure(len(leaves))
    for axes, (path, leaf) in zip(all_axes, leaves, strict=True):
        array = np.atleast_1d(to_printable_array(leaf))
        matrix = array.reshape(1 if array.ndim == 1 else len(array), -1)
        limit = float(np.max(np.abs(matrix), initial=0, where=np.isfinite(matrix))) or 1
        image = axes.imshow(
            matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto"
        )
        image.set_cmap(image.get_cmap().with_extremes(bad=GREY))
        axes.set_title(_leaf_name(path))
        axes.locator_params(integer=True)
        axis_labels = (axes.yaxis, "row"), (axes.xaxis, "entry")
        for (axis, label), size in zip(axis_labels, matrix.shape, strict=True):
            axis.set_label_text(label if size > 1 else "")
            axis.set_visible(size > 1)
        figure.colorbar(image, ax=axes, label="derivative of the outer value")
    return figure


def make_figure(num_panels: int) -> tuple["Figure", list["Axes"]]:
    """Returns a figure with panels side by side, three in a row.

    Raises:
      ImportError: Matplotlib is not installed.
    """
    import_optional("matplotlib", "plots need matplotlib", "display")
    from .display.notebook_figure import NotebookFigure

    num_columns = min(num_panels, MAX_COLUMNS)
    num_lines = math.ceil(num_panels / num_columns)
    size = (PANEL_WIDTH * num_columns, PANEL_HEIGHT * num_lines)
    figure = NotebookFigure(figsize=size, layout="constrained")
    grid = (num_lines, num_columns)
    return figure, [figure.add_subplot(*grid, i + 1) for i in range(num_panels)]


def _plot_values(axes: "Axes", trace: "Trace", x: np.ndarray, xlabel: str) -> None:
    """Draws the outer values over steps or cost, a line for each of K losses.

    The trials of a search are points, below which a line is the lowest so far. A star
    is the best one, which need not be the lowest of a population.
    """
    values = to_printable_array(trace.value)[: len(x)]
    values = values.reshape(len(values), -1)
    is_single = values.shape[1] == 1
    for i, (column, color) in enumerate(_with_colors(values.T)):
        label = None if is_single else f"loss {i}"
        if trace.row_kind != "trial":
            axes.plot(x, column, "-", color=color, label=label, **_dots(column))
            continue
        axes.plot(x, column, "o", color=color, ms=3, label=label or "trial")
        if is_single:
            finite = np.where(np.isfinite(column), column, np.nan)
            lowest = np.fmin.accumulate(finite)
            axes.plot(x, lowest, color=color, drawstyle="steps-post", label="lowest")
            if trace.best_row is not None and np.isfinite(finite).any():
                best = int(trace.best_row)
                axes.plot(x[best], column[best], "*", color=color, ms=9, label="best")
    _mark_untrusted(axes, trace, x, values)
    axes.set(xlabel=xlabel, ylabel="outer value")


def _dots(values: np.ndarray) -> dict[str, Any]:
    """Returns the style of a line with a dot where no finite number is beside one."""
    is_finite = np.isfinite(values)
    prev_is_finite = np.pad(is_finite, (1, 0))[:-1]
    next_is_finite = np.pad(is_finite, (0, 1))[1:]
    is_alone = is_finite & ~prev_is_finite & ~next_is_finite
    points = np.flatnonzero(is_alone).tolist()
    return {"marker": "o", "ms": 3, "markevery": points} if points else {}


def _plot_errors(
    axes: "Axes", trace: "Trace", steps: np.ndarray, errors: np.ndarray
) -> None:
    axes.plot(steps, errors, "-", color=BLUE, **_dots(errors))
    _mark_untrusted(axes, trace, steps, errors[:, None])
    axes.set(
        xlabel=f"outer {trace.row_kind}",
        ylabel="estimated relative error",
        yscale="log",
    )


def _mark_untrusted(
    axes: "Axes", trace: "Trace", x: np.ndarray, values: np.ndarray
) -> None:
    """Draws a cross at each value whose estimate is not trusted, or at 40 of many.

    Where the value is not finite, the cross is at the lower edge.
    """
    is_untrusted = np.zeros(len(x), bool)
    if "trusted" in trace.stats:
        is_untrusted = np.asarray(trace.stats["trusted"])[: len(x)] != 1
    if count := int(np.sum(is_untrusted)):
        reason = "not finite" if trace.row_kind == "trial" else "not trusted"
        label = f"{reason} ({count} of {len(x)})"
        is_lost = is_untrusted & ~np.isfinite(values).all(axis=1)
        crosses = [(is_untrusted & ~is_lost, column, {}) for column in values.T]
        at_edge = {"transform": axes.get_xaxis_transform()}
        crosses.append((is_lost, np.full(len(x), EDGE_HEIGHT), at_edge))
        for mask, heights, options in crosses:
            if mask.any():
                axes.plot(
                    x[mask],
                    heights[mask],
                    "x",
                    color=RED,
                    ms=5,
                    markevery=-(-int(np.sum(mask)) // MAX_CROSSES),
                    label=label,
                    **options,
                )
                label = None  # one entry in the legend
    _add_legend(axes)


def _plot_metrics(axes: "Axes", trace: "Trace", steps: np.ndarray) -> None:
    """Draws each metric at the steps at which it was evaluated."""
    for (name, column), color in _with_colors(trace.metrics.items()):
        values = to_printable_array(column)[: len(steps)]
        is_evaluated = ~np.isnan(values)
        points = steps[is_evaluated], values[is_evaluated]
        axes.plot(*points, "o-", color=color, ms=3, label=name)
    axes.set(xlabel=f"outer {trace.row_kind}", ylabel="metric")
    _add_legend(axes)


def _plot_alphas(axes: "Axes", alphas: PyTree, steps: np.ndarray) -> None:
    """Draws the entries of each leaf, or the median and the range of many.

    Few entries have a color each, and more of them the color of their leaf.
    """
    leaves = [
        (_leaf_name(path), to_printable_array(leaf)[: len(steps)])
        for path, leaf in jax.tree.leaves_with_path(alphas)
        if np.size(leaf) > 0
    ]
    if sum(leaf[0].size for _, leaf in leaves) <= len(COLORS):
        leaves = [
            (name + (f"{list(index)}" if index else ""), leaf[:, *index])
            for name, leaf in leaves
            for index in np.ndindex(leaf.shape[1:])
        ]
    for (name, leaf), color in _with_colors(leaves):
        entries = leaf.reshape(len(steps), -1)
        median = np.median(entries, axis=1)
        style = {"color": color, **_dots(median)}
        if entries.shape[1] <= MAX_LINES_PER_LEAF:
            lines = axes.plot(steps, entries, "-", lw=1, **style)
            lines[0].set_label(name)
            continue
        axes.plot(steps, median, "-", label=f"{name}, median", **style)
        bounds = entries.min(axis=1), entries.max(axis=1)
        axes.fill_between(
            steps, *bounds, color=color, alpha=0.2, lw=0, label=f"{name}, range"
        )
    axes.set(xlabel="outer step", ylabel="alpha")
    _add_legend(axes)


def _leaf_name(path: Any) -> str:
    """Returns a name such as ``alpha.penalty``."""
    return ".".join(["alpha", *(jax.tree_util.keystr((k,), simple=True) for k in path)])


def _add_legend(axes: "Axes") -> None:
    """Adds a legend on top of the panel, if a line has a label."""
    handles, labels = axes.get_legend_handles_labels()
    num_hidden = len(labels) - MAX_LABELS
    if num_hidden > 1:
        handles, labels = handles[:MAX_LABELS], labels[:MAX_LABELS]
        handles.append(axes.plot([], [], alpha=0)[0])
        labels.append(f"and {num_hidden} more")
    if labels:
        axes.legend(
            handles,
            labels,
            loc="lower right",
            bbox_to_anchor=(1, 1),
            ncols=min(len(labels), 3),
            frameon=False,
            fontsize="small",
            borderaxespad=0.2,
        )


def _with_colors(items: Any) -> Any:
    return zip(items, itertools.cycle(COLORS), strict=False)
