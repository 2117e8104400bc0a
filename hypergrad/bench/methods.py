"""Methods of a table: their grids of settings, one run of one, and its errors."""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ..tasks.task import Task
from ..trace import (
    BAD_HYPERGRADIENT,
    BAD_STEP,
    BAD_VALUE,
    FAILED,
    NONFINITE_WEIGHTS,
    STATUS_MESSAGES,
    Trace,
)
from ..trials.trial import fits_budget
from . import timing
from .rows import Row, not_serializable

Method = Callable[..., Trace]
Settings = dict[str, Any]

MAX_CURVE_POINTS = 200
#: Statuses of runs that ended with numbers that are not finite. The ``alpha`` of such a
#: run is the last good one, and its metrics are no result of the method.
FAILED_STATUSES = [
    STATUS_MESSAGES[code]
    for code in (BAD_VALUE, BAD_HYPERGRADIENT, BAD_STEP, FAILED, NONFINITE_WEIGHTS)
]


class MethodError(ValueError):
    """A method of a table cannot be used, or its run is not valid.

    Args:
      message: What must be changed.
      costs: The costs of the run, as in `MethodRun`; none if they are not known.
    """

    def __init__(self, message: str, costs: Mapping[str, float] = MappingProxyType({})):
        super().__init__(message)
        self.costs = dict(costs)


@dataclass(frozen=True)
class MethodRun:
    """The result of one run of a method.

    Attributes:
      trace: What the method returned.
      costs: Gradient-equivalents, products and seconds.
      record: The course of the outer value over the cost, for figures, and the status
        of a run that was not completed.
    """

    trace: Trace
    costs: dict[str, float]
    record: dict[str, Any]


def with_options(method: Method, **options: Any) -> Method:
    """Returns a copy of a method with attributes that a table reads.

    Args:
      method: The method; it keeps its own attributes.
      options: ``grid``, ``keeps_w``, ``budget_factor``, ``splits`` and
        ``task_settings``; see `hypergrad.bench.Table`.
    """
    copy = functools.partial(method)
    vars(copy).update(vars(method) | options)
    return copy


def settings_of(
    method: Method, task_grid: Mapping[str, Sequence[Any]] = MappingProxyType({})
) -> list[Settings]:
    """Returns the combinations of a method's grid and of settings of the task.

    Without any grid there is one combination, which is empty.
    """
    grid = {**task_grid, **getattr(method, "grid", {})}
    return [
        dict(zip(grid, values, strict=True))
        for values in itertools.product(*grid.values())
    ]


def check_method(label: str, method: Any) -> None:
    """Raises MethodError unless a method has the signature that a table calls.

    A method is a function ``(task, *, budget, key, **settings)`` whose settings are
    exactly the names of its ``grid``.
    """
    if not callable(method):
        raise MethodError(f"{label} must be a function; got {method!r}.")
    grid = getattr(method, "grid", None)
    try:
        parameters = inspect.signature(method).parameters
    except ValueError as error:
        raise MethodError(f"{label} has no signature: {error}.") from None
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD]
    missing = [name for name in ("budget", "key") if name not in names]
    if missing and not takes_any:
        raise MethodError(
            f"{label} must take the keyword arguments budget and key; "
            f"{' and '.join(missing)} missing in {inspect.signature(method)}."
        )
    required = {
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    needed = required - {"budget", "key"} - set(names[:1])
    if grid is None and needed:
        example = ", ".join(f"{name!r}: (...)" for name in sorted(needed))
        raise MethodError(
            f"{label} needs {', '.join(sorted(needed))} but has no grid. Set "
            f"{label}.grid = {{{example}}}."
        )
    if grid is None:
        return
    check_grid(f"{label}.grid", grid)
    if unknown := set(grid) - set(names) if not takes_any else set():
        raise MethodError(f"{label}.grid sets {sorted(unknown)}, which {label} lacks.")
    if missing := needed - set(grid):
        raise MethodError(f"{label}.grid does not set {sorted(missing)}.")


def check_grid(name: str, grid: Any) -> None:
    """Raises MethodError unless a grid maps each setting to a sequence of values.

    The values must be such that a row can hold them.
    """
    if not isinstance(grid, Mapping) or not all(map(_is_sequence, grid.values())):
        raise MethodError(
            f"{name} must map each setting to a sequence of its values, a list, a "
            f"tuple or an array, as in {{'learning_rate': (0.1,)}}; got {grid!r}."
        )
    if names := not_serializable({key: list(grid[key]) for key in grid}):
        raise MethodError(
            f"{name} must hold numbers, strings, or lists of them, because each row "
            f"states its settings; got {grid[names[0]]!r} for {names[0]!r}. Use names "
            "in the grid, and let the method make what they name, as in "
            "{'adam': optax.adam}[optimizer]."
        )


def check_names(label: str, method: Method, task_grid: Mapping[str, Any]) -> None:
    """Raises MethodError if a method also sets what the table tunes of the task."""
    for attribute in ("grid", "task_settings"):
        names = getattr(method, attribute, {})
        if isinstance(names, Mapping) and (taken := names.keys() & task_grid.keys()):
            raise MethodError(
                f"{label}.{attribute} must not name {', '.join(sorted(taken))}: the "
                "table tunes this argument of its task for all methods. Give the "
                "method's own setting another name."
            )


def _is_sequence(values: Any) -> bool:
    """Returns True for a list, a tuple or an array with at least one value.

    The order of a set depends on the process, and rows number the settings.
    """
    if isinstance(values, np.ndarray | jax.Array):
        return values.ndim > 0 and len(values) > 0
    return (
        isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    )


def run_method(
    method: Method, task: Task, *, budget: float, key: Array, settings: Settings
) -> MethodRun:
    """Runs a method once and checks what it returns.

    Raises:
      MethodError: The result is not a `Trace`, or is not finite, or the run cost more
        than the budget allows.
    """
    with timing.measure_seconds() as seconds:
        trace = jax.block_until_ready(method(task, budget=budget, key=key, **settings))
    if not isinstance(trace, Trace):
        raise MethodError(
            f"a method must return the hg.Trace of its run; got {type(trace).__name__}."
        )
    # In float32 the sum of many small costs drifts.
    cost = np.cumsum(np.asarray(trace.stats["gradient_equivalents"], float))
    total = float(cost[-1]) if cost.size else 0.0
    trusted = np.asarray(trace.stats["trusted"], bool)[: trace.last_row + 1]
    costs = {
        "gradient_equivalents": total,
        "num_hvps": float(np.nansum(np.asarray(trace.stats["num_hvps"], float))),
        "num_untrusted": float(np.sum(~trusted)),
        "compile_seconds": seconds.compilation,
        "run_seconds": seconds.total - seconds.compilation,
    }
    leaves = jax.tree.leaves((trace.w, trace.alpha))
    if not all(np.all(np.isfinite(np.asarray(leaf, float))) for leaf in leaves):
        raise MethodError(
            f"the run ended with values that are not finite: {trace.status}", costs
        )
    if not math.isfinite(total):
        raise MethodError(
            f"the run cost {total} gradient-equivalents, so that its budget cannot be "
            "kept. An estimator of your own must return its cost: "
            "hg.extend.make_estimate(..., **hg.extend.cost_stats(...))."
        )
    # A run ends with the step that spends the rest of its budget.
    if not fits_budget(cost_before_last_step(cost, trace.record_every), budget):
        raise MethodError(
            f"the run cost {total:.0f} gradient-equivalents; its budget is "
            f"{budget:.0f}. Pass budget=budget to hg.minimize or hg.search, and leave "
            "record_every at 1, because the budget is checked once per row.",
            costs,
        )
    return MethodRun(
        trace=trace,
        costs=costs,
        record=thin_curves(np.asarray(trace.value, float), cost)
        | status_if_incomplete(trace),
    )


def cost_before_last_step(cost: np.ndarray, record_every: int) -> float:
    """Returns the cost of a run before its last step, as if a row's steps cost alike.

    Args:
      cost: ``[rows]``, the total cost after each row. Rows of no cost, in which no step
        was made, do not count.
      record_every: Number of steps per row.
    """
    earlier = cost[cost < cost[-1:]]
    before_row = float(earlier[-1]) if earlier.size else 0.0
    last_row = float(cost[-1]) - before_row if cost.size else 0.0
    return before_row + last_row * (1 - 1 / record_every)


def status_if_incomplete(trace: Trace) -> dict[str, str]:
    """Returns the status of a run that was not completed, or nothing."""
    return {"stopped": trace.status} if int(trace.status_code) else {}


def has_failed(row: Row) -> bool:
    """Returns whether the run of a row ended with numbers that are not finite."""
    return row.get("stopped") in FAILED_STATUSES


def budget_factor_of(rows: Sequence[Row]) -> float:
    """Returns the multiple of the budget that the rows of a method had."""
    return next((row["budget_factor"] for row in rows if "budget_factor" in row), 1.0)


def thin_curves(values: np.ndarray, cost: np.ndarray) -> dict[str, list[float]]:
    """Returns outer value and cost at up to 200 steps, evenly spaced.

    A run of a single step has no curve.
    """
    if len(values) < 2:
        return {}
    count = min(len(values), MAX_CURVE_POINTS)
    index = np.unique(np.linspace(0, len(values) - 1, count).round().astype(int))
    return {"curve_value": values[index].tolist(), "curve_cost": cost[index].tolist()}
