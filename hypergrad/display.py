"""Results as small tables: aligned text in a terminal, HTML in a notebook."""

import abc
import html
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from .trees import PrettyModule, is_readable

if TYPE_CHECKING:
    from .certificate import Certificate
    from .estimators.base import Estimate
    from .trace import Trace

#: A name, and the text beside it; the lines of a text are separate statements.
Row = tuple[str, str]

TEXT_WIDTH = 88
MAX_PRINTED_NUMBERS = 4
MAX_PRINTED_INTERVALS = 4  # of consecutive steps
NUM_FINAL_RESIDUALS = 10
#: On mini-batches the residual of a good adjoint is of order 1.
MAX_ADJOINT_RESIDUAL = 10.0
MAX_ERROR_ESTIMATE = 10.0
STEP_NOUNS = "step", "steps"
#: The nouns of the counts of calls, as singular and plural.
COUNT_NOUNS = {
    "num_grads": ("gradient", "gradients"),
    "num_hvps": ("HVP", "HVPs"),
    "num_values": ("value", "values"),
    "num_outer_grads": ("outer gradient", "outer gradients"),
    "num_outer_values": ("outer value", "outer values"),
}


class ResultModule(PrettyModule):
    """A result that prints as a table if it is a single one with readable numbers.

    Under `jax.jit` and `jax.vmap`, as a batch, and after its buffers were donated, a
    result prints its fields by dtype and shape.
    """

    def __repr__(self) -> str:
        """Returns a table as text, or else the fields."""
        rows = self._readable_rows()
        if rows is None:
            return super().__repr__()
        return render_text(type(self).__name__, rows)

    def _repr_html_(self) -> str | None:
        """Returns a table as HTML; None lets a notebook show the text instead."""
        rows = self._readable_rows()
        return None if rows is None else render_html(type(self).__name__, rows)

    @abc.abstractmethod
    def _rows(self) -> list[Row] | None:
        """Returns the rows of the table, or None if there are none to show."""

    def _readable_rows(self) -> list[Row] | None:
        # Inside jit, operations on concrete arrays would otherwise yield tracers.
        with jax.ensure_compile_time_eval():
            return self._rows()


def render_text(title: str, rows: Iterable[Row]) -> str:
    """Returns a table as text, in which long lines are wrapped below each other.

    >>> print(render_text("Estimate", [("value", "0.5"), ("trusted", "True")]))
    Estimate
      value    0.5
      trusted  True
    """
    rows = list(rows)
    indent = max((len(name) for name, _ in rows), default=0) + 4
    lines = [title]
    for name, text in rows:
        wrapped = [
            textwrap.wrap(
                line,
                TEXT_WIDTH - indent,
                subsequent_indent="  ",
                break_on_hyphens=False,
            )
            for line in text.splitlines()
        ]
        values = list(itertools.chain(*wrapped)) or [""]
        names = [f"  {name}", *[""] * (len(values) - 1)]
        lines += [
            f"{name:{indent}}{value}".rstrip()
            for name, value in zip(names, values, strict=True)
        ]
    return "\n".join(lines)


def render_html(title: str, rows: Iterable[Row]) -> str:
    """Returns a table as HTML; everything is escaped.

    >>> render_html("Trace", [("metrics", "a<b")]).endswith(">a&lt;b</td></tr></table>")
    True
    """
    style = 'style="text-align: left"'  # notebooks align cells to the right
    to_html = lambda text: "<br>".join(map(html.escape, text.splitlines()))
    cells = [
        f"<tr><th {style}>{to_html(name)}</th><td {style}>{to_html(text)}</td></tr>"
        for name, text in rows
    ]
    caption = f"<caption {style}>{html.escape(title)}</caption>"
    return f"<table>{caption}{''.join(cells)}</table>"


def sentences_of_flags(
    flags: Mapping[str, Any], sentences: Mapping[str, str], result_name: str
) -> tuple[str, ...]:
    """Returns the sentence of each flag that is set, or its name if it has none.

    That of numbers that are not finite is the first: it explains the others.

    Raises:
      ValueError: A flag is a tracer or an array of several.
    """
    if any(isinstance(x, Tracer) or np.ndim(x) for x in flags.values()):
        raise ValueError(
            f"reasons needs a single concrete {result_name}; got one inside jit or a "
            "batch. Use the boolean arrays in flags there."
        )
    names = sorted(flags, key=lambda name: (name != "not_finite", name))
    return tuple(sentences.get(name, name) for name in names if flags[name])


def estimate_rows(estimate: "Estimate") -> list[Row] | None:
    """Returns the rows of a single estimate, or None for a batch or unread numbers."""
    checks = (estimate.stats, estimate.flags)
    if not _are_scalars(checks) or not is_readable_tree(estimate.value):
        return None
    if np.ndim(estimate.value) > bool(estimate.stats or estimate.flags):
        return None  # a batch, or K losses without a statistic that tells them apart
    reasons = estimate.reasons
    stats = {name: float(x) for name, x in estimate.stats.items()}
    has_error = not np.isnan(error := stats.get("error_estimate", np.nan))
    rows = [
        ("value", format_numbers(estimate.value)),
        ("hypergradient", describe_tree(estimate.hypergradient, with_norm=True)),
        ("w", describe_tree(estimate.w)),
        ("trusted", str(not reasons)),
        *_reason_rows(reasons),
        ("error_estimate", _format_error(error) if has_error else "not available"),
    ]
    for name in ("standard_error", "distance_to_implicit"):
        if not np.isnan(stats.get(name, np.nan)):
            rows.append((name, _format_error(stats[name])))
    return rows + _cost_rows(stats)


def certificate_rows(certificate: "Certificate") -> list[Row] | None:
    """Returns the rows of a single certificate, or None for a batch."""
    bounds = (certificate.distance_bound, certificate.adjoint_error_bound)
    scalars = (
        *(certificate.error_estimate, certificate.trusted, certificate.flags),
        *(certificate.inner_grad_norm, certificate.corrected_grad_norm),
        *(certificate.ritz_min, certificate.ritz_max, certificate.stats, bounds),
    )
    if not _are_scalars(scalars):
        return None
    corrected = describe_tree(certificate.corrected_hypergradient, with_norm=True)
    norms = (certificate.inner_grad_norm, certificate.corrected_grad_norm)
    spectrum = map(_format_error, (certificate.ritz_min, certificate.ritz_max))
    rows = [
        ("trusted", str(bool(certificate.trusted))),
        *_reason_rows(certificate.reasons),
        ("error_estimate", _format_error(certificate.error_estimate)),
        ("corrected_hypergradient", corrected),
        ("inner_grad_norm", "{}, {} at corrected_w".format(*map(_format_error, norms))),
        ("ritz_min, ritz_max", ", ".join(spectrum)),
    ]
    for name in ("distance_bound", "adjoint_error_bound"):
        if not np.isnan(bound := float(getattr(certificate, name))):
            rows.append((name, _format_error(bound)))
    return rows + _cost_rows({k: float(x) for k, x in certificate.stats.items()})


def trace_rows(trace: "Trace") -> list[Row] | None:
    """Returns the rows of a single run, or None for a batch or unread numbers."""
    columns = (trace.value, trace.stats, trace.metrics, trace.flags)
    if not is_readable_tree((*columns, trace.status_code, trace.first_step)):
        return None
    if np.ndim(trace.status_code) or not np.ndim(trace.value):
        return None
    num_rows = count_rows_made(trace)
    stats = {name: np.asarray(x)[:num_rows] for name, x in trace.stats.items()}
    rows = [
        ("status", _describe_status(trace)),
        (f"{trace.row_kind}s", _describe_steps(trace, num_rows)),
        ("value", _describe_values(trace, num_rows)),
        ("alpha", describe_tree(trace.alpha)),
        ("w", describe_tree(trace.w)),
    ]
    if "trusted" in stats:
        num_trusted = int(np.sum(stats["trusted"] == 1))
        # A trial makes no hypergradient; it passes if its value and ``w`` are finite.
        name = "finite" if trace.row_kind == "trial" else "trusted"
        rows.append((name, f"{num_trusted} of {num_rows}"))
    rows += _reason_rows(
        f"{format_steps(steps, trace.record_every, trace.row_kind)}: {reason}"
        for reason, steps in trace.reasons().items()
    )
    rows += _error_rows(trace, stats) + _adjoint_rows(trace, stats)
    rows += _cost_rows({name: _sum_of_known(x) for name, x in stats.items()})
    metrics = [_describe_metric(trace, name) for name in trace.metrics]
    return [*rows, ("metrics", "\n".join(metrics))] if metrics else rows


def _describe_status(trace: "Trace") -> str:
    is_finite = "not finite" not in trace.status
    return trace.status if is_finite else f"{trace.status}; hg.diagnose says where"


def _error_rows(trace: "Trace", stats: Mapping[str, np.ndarray]) -> list[Row]:
    """Returns the largest estimated error, if that estimate is mostly error.

    A single such step can spoil the moments of an optimizer for many later ones.
    """
    errors = np.asarray(stats.get("error_estimate", []), float)
    is_wild = errors > MAX_ERROR_ESTIMATE
    if not is_wild.any() or trace.row_kind == "trial":
        return []
    row = int(np.nanargmax(errors))
    text = f"largest {_format_error(errors[row])} at step {trace.steps[row]}"
    text += (
        f", above {MAX_ERROR_ESTIMATE:g} at {_count(int(is_wild.sum()), STEP_NOUNS)}"
    )
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
    text = f"{_format_error(median)} in the median of the last {count} rows"
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
        return -(-num_steps // trace.record_every)
    is_made = _are_finite(to_wide(trace.value))
    if "gradient_equivalents" in trace.stats:
        is_made |= np.asarray(trace.stats["gradient_equivalents"]) > 0
    return int(np.max(np.flatnonzero(is_made), initial=-1)) + 1


def describe_tree(tree: PyTree, *, with_norm: bool = False) -> str:
    """Returns few numbers as they are, and more of them by dtype and shape.

    >>> describe_tree(np.array([1.0, 2.5])), describe_tree(np.zeros((3, 4)))
    ('[1, 2.5]', 'float64[3,4]')
    >>> describe_tree({"a": np.ones(9), "b": np.ones(7)}, with_norm=True)
    '2 leaves, 16 numbers, norm 4'
    """
    leaves = jax.tree.leaves(tree)
    is_readable = is_readable_tree(leaves)
    sizes = [int(np.prod(getattr(leaf, "shape", ()))) for leaf in leaves]
    if len(leaves) == 1:
        (leaf,) = leaves
        if is_readable and np.ndim(leaf) <= 1 and sizes[0] <= MAX_PRINTED_NUMBERS:
            return format_numbers(leaf)
        text = _describe_leaf(leaf)
    else:
        text = f"{len(leaves)} leaves, {_count(sum(sizes), ('number', 'numbers'))}"
    if with_norm and leaves and is_readable:
        squares = [np.sum(np.abs(to_wide(leaf)) ** 2) for leaf in leaves]
        text += f", norm {np.sqrt(sum(squares)):.4g}"
    return text


def is_readable_tree(tree: PyTree) -> bool:
    """Returns whether the numbers of all leaves can be read; see `is_readable`."""
    return all(map(is_readable, jax.tree.leaves(tree, is_leaf=lambda x: x is None)))


def holds_nonfinite(tree: PyTree) -> bool:
    """Returns whether a number that can be read is NaN or infinite."""
    numbers = [
        to_wide(leaf)
        for leaf in jax.tree.leaves(tree)
        if is_readable(leaf)
        and jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
    ]
    return not all(np.isfinite(x).all() for x in numbers)


def format_numbers(x: Any) -> str:
    """Returns a number with six digits, or a list of such numbers."""
    numbers = np.ravel(to_wide(x)).tolist()
    texts = [f"{number:.6g}" for number in numbers]
    return f"[{', '.join(texts)}]" if np.ndim(x) else texts[0]


def _are_scalars(tree: PyTree) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    return is_readable_tree(leaves) and not any(map(np.ndim, leaves))


def to_wide(x: Any) -> np.ndarray:
    """Returns a leaf in the precision of Python, as bfloat16 has no formats."""
    array = np.asarray(x)
    return array if array.dtype.kind in "biuc" else array.astype(float)


def _describe_leaf(leaf: Any) -> str:
    if not hasattr(leaf, "shape"):
        return type(leaf).__name__
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _format_error(x: Any) -> str:
    return f"{float(x):.2g}"


def _reason_rows(reasons: Iterable[str]) -> list[Row]:
    text = "\n".join(reasons)
    return [("reasons", text)] if text else []


def _cost_rows(counts: Mapping[str, float]) -> list[Row]:
    """Returns the cost as one line, such as ``552 gradient-equivalents: ...``."""
    total = counts.get("gradient_equivalents", np.nan)
    if np.isnan(total):
        return []
    text = _count(total, ("gradient-equivalent", "gradient-equivalents"))
    calls = [
        _count(counts[name], nouns)
        for name, nouns in COUNT_NOUNS.items()
        if counts.get(name, np.nan) > 0
    ]
    return [("cost", f"{text}: {', '.join(calls)}" if calls else text)]


def _count(number: float, nouns: tuple[str, str]) -> str:
    is_whole = number == round(number) or number >= 1e4
    text = f"{number:,.0f}" if is_whole else f"{number:.4g}"
    return f"{text} {nouns[number != 1]}"


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
    values = to_wide(trace.value)[:num_rows]
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


def _describe_metric(trace: "Trace", name: str) -> str:
    """Returns the last, the lowest and the highest value of a metric, with steps."""
    column = np.asarray(trace.metrics[name])
    evaluated = np.flatnonzero(~np.isnan(column))
    if not evaluated.size:
        return f"{name}: not evaluated"
    values, steps = column[evaluated], trace.steps[evaluated]
    texts = [f"{format_numbers(values[-1])} at {trace.row_kind} {steps[-1]}"]
    if len(values) > 1:
        texts += [
            f"{word} {format_numbers(values[i])} at {steps[i]}"
            for word, i in (
                ("lowest", np.argmin(values)),
                ("highest", np.argmax(values)),
            )
        ]
    return f"{name}: {', '.join(texts)}"


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
