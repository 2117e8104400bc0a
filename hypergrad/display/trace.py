"""The table that a run, or a batch of runs, prints."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from ..trees import is_readable
from .tables import (
    Row,
    cost_rows,
    describe_tree,
    format_count,
    format_error,
    format_numbers,
    is_readable_tree,
    reason_rows,
    to_printable_array,
)

if TYPE_CHECKING:
    from ..trace import Trace

MAX_PRINTED_INTERVALS = 4  # of consecutive steps
NUM_FINAL_RESIDUALS = 10
#: On mini-batches the residual of a good adjoint is of order 1.
MAX_ADJOINT_RESIDUAL = 10.0
MAX_ERROR_ESTIMATE = 10.0
STEP_NOUNS = "step", "steps"


def trace_rows(trace: "Trace") -> list[Row] | None:
    """Returns the rows of a run or of a batch of runs, or None for unread numbers."""
    columns = (trace.value, trace.stats, trace.metrics, trace.flags)
    if not is_readable_tree((*columns, trace.status_code, trace.first_step)):
        return None
    num_batch_axes = np.ndim(trace.status_code)
    if num_batch_axes > 1 or np.ndim(trace.value) <= num_batch_axes:
        return None
    return _batch_rows(trace) if num_batch_axes else _run_rows(trace)


def _run_rows(trace: "Trace") -> list[Row]:
    """Returns the rows of a single run."""
    num_rows = count_rows_made(trace)
    stats = {name: to_printable_array(x)[:num_rows] for name, x in trace.stats.items()}
    rows = [
        ("status", _describe_status(trace)),
        (f"{trace.row_kind}s", _describe_steps(trace, num_rows)),
        ("value", _describe_values(trace, num_rows)),
        ("alpha", describe_tree(trace.alpha)),
        ("w", describe_tree(trace.w)),
    ]
    rows += _trust_rows(trace.row_kind, stats, num_rows)
    rows += reason_rows(
        f"{format_steps(steps, trace.record_every, trace.row_kind)}: {reason}"
        for reason, steps in trace.reasons().items()
    )
    rows += _error_rows(trace, stats) + _adjoint_rows(trace, stats)
    rows += cost_rows({name: _sum_of_known(x) for name, x in stats.items()})
    metrics = [_describe_metric(trace, name) for name in trace.metrics]
    return [*rows, ("metrics", "\n".join(metrics))] if metrics else rows


def _batch_rows(trace: "Trace") -> list[Row]:
    """Returns the rows of several runs, whose leaves have one leading axis.

    Only the columns are read, each once; other leaves may be large, or donated.
    """
    runs = _split_columns(trace)
    if not runs:
        return [("runs", "0")]
    statuses = collections.Counter(map(_describe_status, runs))
    reasons: collections.Counter[str] = collections.Counter()
    for run in runs:
        reasons.update({reason: len(steps) for reason, steps in run.reasons().items()})
    stats = {name: to_printable_array(x) for name, x in trace.stats.items()}
    num_rows = sum(map(count_rows_made, runs))
    rows = [
        ("runs", f"{len(runs):,}; jax.tree.map(lambda x: x[0], trace) is the first"),
        ("status", "\n".join(f"{count:,} {text}" for text, count in statuses.items())),
        (f"{trace.row_kind}s", _describe_steps_of_runs(runs)),
        _value_row(runs),
        ("alpha", describe_tree(trace.alpha)),
        ("w", describe_tree(trace.w)),
    ]
    rows += _trust_rows(trace.row_kind, stats, num_rows)
    rows += reason_rows(
        f"{count:,} of {num_rows:,} rows: {reason}" for reason, count in reasons.items()
    )
    totals = {name: _sum_of_known(x) for name, x in stats.items()}
    return rows + [("total cost", text) for _, text in cost_rows(totals)]


def _split_columns(trace: "Trace") -> list["Trace"]:
    """Returns a trace per run, of its columns alone."""
    columns = dataclasses.replace(
        trace, alpha=None, best_alpha=None, w=None, alphas=None, state=None
    )
    columns = jax.tree.map(np.asarray, columns)
    return [
        jax.tree.map(lambda x, i=i: x[i] if x.ndim else x, columns)
        for i in range(len(trace.value))
    ]


def _describe_steps_of_runs(runs: list["Trace"]) -> str:
    """Returns how many steps were made per run, and of how many if that differs."""
    stride = runs[0].record_every
    num_steps = [count_rows_made(run) * stride for run in runs]
    num_planned = len(runs[0].value) * stride
    text = f"{num_planned:,} per run"
    if min(num_steps) < num_planned:
        text = f"{min(num_steps):,} to {max(num_steps):,} of {text}"
    return f"{text}, one row per {stride}" if stride > 1 else text


def _value_row(runs: list["Trace"]) -> Row:
    """Returns the range of the last values of runs, or of the lowest ones of searches.

    With several outer losses there is a line for each.
    """
    is_search = runs[0].row_kind == "trial"
    name = "lowest value" if is_search else "last value"
    values = []
    for run in runs:
        column = to_printable_array(run.value)[: count_rows_made(run)]
        chosen = column[_are_finite(column)] if is_search else column[-1:]
        if len(chosen) and np.isfinite(chosen).all():
            values.append(chosen.min(axis=0))
    if not values:
        return name, "none is finite"
    lines = [
        f"{format_numbers(x.min())} to {format_numbers(x.max())}"
        for x in np.reshape(values, (len(values), -1)).T
    ]
    if np.ndim(values) > 1:
        lines = [f"loss {i}: {line}" for i, line in enumerate(lines)]
    if len(values) < len(runs):
        lines.append(f"not finite: {len(runs) - len(values)} of {len(runs)}")
    return name, "\n".join(lines)


def _trust_rows(
    row_kind: str, stats: Mapping[str, np.ndarray], num_rows: int
) -> list[Row]:
    """Returns how many estimates are trusted, or how many trials are finite.

    A trial makes no hypergradient that could be trusted.
    """
    if "trusted" not in stats:
        return []
    num_trusted = int(np.sum(stats["trusted"] == 1))
    name = "finite" if row_kind == "trial" else "trusted"
    return [(name, f"{num_trusted} of {num_rows}")]


def _describe_status(trace: "Trace") -> str:
    is_finite = "not finite" not in trace.status
    return trace.status if is_finite else f"{trace.status}; hg.diagnose says where"


def _error_rows(trace: "Trace", stats: Mapping[str, np.ndarray]) -> list[Row]:
    """Returns the largest estimated error, if it is above ``MAX_ERROR_ESTIMATE``.

    A single such step can spoil the moments of an optimizer for many later ones.
    """
    errors = np.asarray(stats.get("error_estimate", []), float)
    is_large = errors > MAX_ERROR_ESTIMATE
    if not is_large.any() or trace.row_kind == "trial":
        return []
    row = int(np.nanargmax(errors))
    text = f"largest {format_error(errors[row])} at step {trace.steps[row]}"
    num_large = format_count(int(is_large.sum()), STEP_NOUNS)
    text += f", above {MAX_ERROR_ESTIMATE:g} at {num_large}"
    return [("error_estimate", text)]


def _adjoint_rows(trace: "Trace", stats: Mapping[str, np.ndarray]) -> list[Row]:
    """Returns the residual of the adjoint that a single-loop method carries.

    Its estimates are never trusted, so that no flag tells an adjoint that diverges. The
    residual is relative to ``b = dM/dw``; where ``b`` vanishes it is infinite.
    """
    residuals = np.asarray(stats.get("adjoint_residual", []), float)
    final_residuals = residuals[~np.isnan(residuals)][-NUM_FINAL_RESIDUALS:]
    if "single_step" not in trace.flags or not final_residuals.size:
        return []
    median, count = np.median(final_residuals), len(final_residuals)
    text = f"{format_error(median)} in the median of the last {count} rows"
    if median > MAX_ADJOINT_RESIDUAL:
        text += ": far from its equation, as an adjoint of zero has 1"
    return [("adjoint_residual", text)]


def _sum_of_known(numbers: np.ndarray) -> float:
    """Returns the sum of the numbers that are not NaN, or NaN if all are."""
    return float(np.nan if np.all(np.isnan(numbers)) else np.nansum(numbers))


def count_rows_made(trace: "Trace") -> int:
    """Returns the number of rows without the blank ones after a failure."""
    next_step = getattr(trace.state, "step", None)  # a search has no state
    if next_step is not None and is_readable(next_step):
        num_steps = int(next_step) - int(trace.first_step)
        num_rows = -(-num_steps // trace.record_every)
        return min(num_rows, len(trace.value))  # a part of a trace has fewer
    is_made = _are_finite(to_printable_array(trace.value))
    if "gradient_equivalents" in trace.stats:
        is_made |= np.asarray(trace.stats["gradient_equivalents"]) > 0
    return int(np.max(np.flatnonzero(is_made), initial=-1)) + 1


def _describe_steps(trace: "Trace", num_rows: int) -> str:
    text = f"{num_rows * trace.record_every:,}"
    if num_rows < len(trace.value):
        text += f" of {len(trace.value) * trace.record_every:,}"
    if trace.record_every > 1:
        text += f", one row per {trace.record_every}"
    if int(trace.first_step):
        text += f", after {int(trace.first_step):,} of an earlier run"
    return text


def _describe_values(trace: "Trace", num_rows: int) -> str:
    """Returns the first and the last finite value, and the lowest of one loss."""
    values = to_printable_array(trace.value)[:num_rows]
    finite = np.flatnonzero(_are_finite(values))
    if not finite.size:
        return "none is finite"
    init_value, final_value = values[finite[0]], values[finite[-1]]
    text = f"first {format_numbers(init_value)}, last {format_numbers(final_value)}"
    if finite[-1] < num_rows - 1:
        text += f" at {trace.row_kind} {trace.steps[finite[-1]]}, then not finite"
    if values.ndim > 1:
        return text
    lowest = int(finite[np.argmin(values[finite])])
    step = f"{trace.row_kind} {trace.steps[lowest]}"
    return f"{text}, lowest {format_numbers(values[lowest])} at {step}"


def _are_finite(values: np.ndarray) -> np.ndarray:
    """Returns for each row of one value, or of K values, whether it is finite."""
    return np.isfinite(values).all(axis=tuple(range(1, values.ndim)))


def is_evaluated(trace: "Trace", name: str) -> np.ndarray:
    """Returns for each row whether the metric is known to have been evaluated.

    It is NaN where it was not evaluated. Of a run its last row is evaluated in any
    case, and of a search every row, so that a NaN is there the value of the metric.
    """
    is_known = ~np.isnan(np.asarray(trace.metrics[name]))
    num_rows = count_rows_made(trace)
    if trace.row_kind == "trial":
        is_known[:num_rows] = True
    elif num_rows and _has_ended_by_its_limit(trace, num_rows):
        is_known[num_rows - 1] = True
    return is_known


def _has_ended_by_its_limit(trace: "Trace", num_rows: int) -> bool:
    """Returns whether the last row is that of the last step of a completed run."""
    next_step = getattr(trace.state, "step", None)
    if next_step is None or not is_readable(next_step) or int(trace.status_code):
        return False
    return int(trace.first_step) + num_rows * trace.record_every >= int(next_step)


def _describe_metric(trace: "Trace", name: str) -> str:
    """Returns the last, the lowest and the highest value of a metric, with steps.

    In place of the last one, a search has that of the trial with the lowest value.
    """
    column = np.asarray(trace.metrics[name])
    numbers = np.flatnonzero(~np.isnan(column))
    not_numbers = np.flatnonzero(is_evaluated(trace, name) & np.isnan(column))
    if not numbers.size:
        suffix = f" at {trace.row_kind} {trace.steps[not_numbers[-1]]}"
        return f"{name}: nan{suffix}" if not_numbers.size else f"{name}: no value"
    values, steps = column[numbers], trace.steps[numbers]
    texts = [f"{format_numbers(values[-1])} at {trace.row_kind} {steps[-1]}"]
    best = _best_trial(trace)
    if best is not None and best in numbers:
        value = format_numbers(column[best])
        texts = [f"{value} at the best trial, {trace.steps[best]}"]
    elif not_numbers.size and not_numbers[-1] > numbers[-1]:
        texts[0] += f", then nan at {trace.row_kind} {trace.steps[not_numbers[-1]]}"
    if len(values) > 1:
        texts += [
            f"{word} {format_numbers(values[i])} at {steps[i]}"
            for word, i in (
                ("lowest", np.argmin(values)),
                ("highest", np.argmax(values)),
            )
        ]
    return f"{name}: {', '.join(texts)}"


def _best_trial(trace: "Trace") -> int | None:
    """Returns the row of the best trial of a search, unless all trials failed."""
    if trace.best_row is None or np.isnan(trace.value).all():
        return None
    return int(trace.best_row)


def format_steps(steps: list[int], stride: int = 1, noun: str = "step") -> str:
    """Returns step numbers with ``a to b`` for those in a row, and a count of the rest.

    Args:
      steps: Increasing step numbers.
      stride: Distance of two steps in a row.
      noun: What is counted, in the singular.

    >>> format_steps([3]), format_steps([0, 1, 2, 7])
    ('step 3', 'steps 0 to 2, 7')
    >>> format_steps([0, 2, 4, 5, 10, 20, 30, 40], stride=2)
    'steps 0 to 4, 5, 10, 20 and 2 more'
    """
    numbers = np.asarray(steps)
    intervals = np.split(numbers, np.flatnonzero(np.diff(numbers) != stride) + 1)
    texts = [
        str(x[0]) if len(x) == 1 else f"{x[0]} to {x[-1]}"
        for x in intervals[:MAX_PRINTED_INTERVALS]
    ]
    text = f"{noun}{'s' * (len(steps) != 1)} {', '.join(texts)}"
    num_further = sum(map(len, intervals[MAX_PRINTED_INTERVALS:]))
    return f"{text} and {num_further} more" if num_further else text
