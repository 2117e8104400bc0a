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

from ..trees import PrettyModule, is_key, is_readable

if TYPE_CHECKING:
    from ..certificate import Certificate
    from ..estimators.base import Estimate

#: A name, and the text beside it; the lines of a text are separate statements.
Row = tuple[str, str]

TEXT_WIDTH = 88
MAX_PRINTED_NUMBERS = 10
MAX_NAMED_LEAVES = 12  # of a tree, in an error message
#: The nouns of the counts of calls, as singular and plural.
COUNT_NOUNS = {
    "num_grads": ("gradient", "gradients"),
    "num_hvps": ("HVP", "HVPs"),
    "num_values": ("value", "values"),
    "num_outer_grads": ("outer gradient", "outer gradients"),
    "num_outer_values": ("outer value", "outer values"),
}


class ResultModule(PrettyModule):
    """A result that prints as a table if its numbers are readable.

    Under `jax.jit` and `jax.vmap`, and after its buffers were donated, a result prints
    its fields by dtype and shape. So do batches, but for a batch of runs with a single
    axis.
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

    That of numbers that are not finite stands alone: it explains the others.

    Raises:
      ValueError: A flag is a tracer or an array of several.
    """
    if any(isinstance(x, Tracer) or np.ndim(x) for x in flags.values()):
        raise ValueError(
            f"reasons needs a single concrete {result_name}; got one inside jit or a "
            "batch. Use the boolean arrays in flags there."
        )
    if flags.get("not_finite", False):
        return (sentences["not_finite"],)
    names = sorted(flags)
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
    rows = [
        ("value", format_numbers(estimate.value)),
        ("hypergradient", describe_tree(estimate.hypergradient, with_norm=True)),
        ("w", describe_tree(estimate.w)),
        ("trusted", str(not reasons)),
        *reason_rows(reasons),
        ("error_estimate", _describe_error(estimate)),
    ]
    if not np.isnan(stats.get("standard_error", np.nan)):
        rows.append(("standard_error", format_error(stats["standard_error"])))
    return rows + cost_rows(stats)


def _describe_error(estimate: "Estimate") -> str:
    """Returns the estimated error, or why there is none."""
    error = float(estimate.stats.get("error_estimate", np.nan))
    if np.isnan(error) or estimate.flags.get("not_finite", False):
        return "not available"
    has_adjoint = not np.isnan(float(estimate.stats.get("adjoint_residual", np.nan)))
    if error == 0 and not has_adjoint:
        return "0: the exact derivative of this run"
    return format_error(error)


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
    spectrum = map(format_error, (certificate.ritz_min, certificate.ritz_max))
    rows = [
        ("trusted", str(bool(certificate.trusted))),
        *reason_rows(certificate.reasons),
        ("error_estimate", format_error(certificate.error_estimate)),
        ("corrected_hypergradient", corrected),
        ("inner_grad_norm", "{}, {} at corrected_w".format(*map(format_error, norms))),
        ("ritz_min, ritz_max", ", ".join(spectrum)),
    ]
    for name in ("distance_bound", "adjoint_error_bound"):
        if not np.isnan(bound := float(getattr(certificate, name))):
            rows.append((name, format_error(bound)))
    return rows + cost_rows({k: float(x) for k, x in certificate.stats.items()})


def describe_tree(tree: PyTree, *, with_norm: bool = False) -> str:
    """Returns few numbers as they are, and more of them by dtype and shape.

    Several leaves have their paths in front.

    >>> describe_tree(np.array([1.0, 2.5])), describe_tree(np.zeros((3, 4)))
    ('[1, 2.5]', 'float64[3,4]')
    >>> describe_tree({"rate": 0.1, "decay": np.array([2.0, 3.0])})
    "['decay']: [2, 3], ['rate']: 0.1"
    >>> describe_tree({"a": np.ones(9), "b": np.ones(7)}, with_norm=True)
    '2 leaves, 16 numbers, norm 4'
    """
    # A PRNG key is no number, and is left out.
    tree = jax.tree.map(lambda leaf: None if is_key(leaf) else leaf, tree)
    leaves = jax.tree.leaves(tree)
    is_readable = is_readable_tree(leaves)
    sizes = [int(np.prod(getattr(leaf, "shape", ()))) for leaf in leaves]
    if len(leaves) == 1:
        (leaf,) = leaves
        if is_readable and np.ndim(leaf) <= 1 and sizes[0] <= MAX_PRINTED_NUMBERS:
            return format_numbers(leaf)
        text = _describe_leaf(leaf)
    elif is_readable and leaves and sum(sizes) <= MAX_PRINTED_NUMBERS:
        return ", ".join(
            f"{jax.tree_util.keystr(path)}: {format_numbers(leaf)}"
            for path, leaf in jax.tree.leaves_with_path(tree)
        )
    else:
        num_numbers = format_count(sum(sizes), ("number", "numbers"))
        text = f"{len(leaves)} leaves, {num_numbers}"
    if with_norm and leaves and is_readable:
        squares = [np.sum(np.abs(to_printable_array(leaf)) ** 2) for leaf in leaves]
        text += f", norm {np.sqrt(sum(squares)):.4g}"
    return text


def describe_leaves(name: str, tree: PyTree) -> str:
    """Returns the leaves of a tree by path, with dtype and shape, for a message.

    >>> describe_leaves("w", {"kernel": np.ones((3, 1)), "bias": np.ones(1)})
    "w['bias']: float64[1], w['kernel']: float64[3,1]"
    >>> describe_leaves("batch", None)
    'batch: None'
    """
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
        return f"{name}: {tree!r}"
    texts = [
        f"{name}{jax.tree_util.keystr(path)}: {_describe_leaf(leaf)}"
        for path, leaf in leaves[:MAX_NAMED_LEAVES]
    ]
    if num_further := len(leaves) - len(texts):
        texts.append(f"{name}: {num_further} further leaves")
    return ", ".join(texts)


def is_readable_tree(tree: PyTree) -> bool:
    """Returns whether the numbers of all leaves can be read; see `is_readable`."""
    return all(map(is_readable, jax.tree.leaves(tree, is_leaf=lambda x: x is None)))


def holds_nonfinite(tree: PyTree) -> bool:
    """Returns whether a number that can be read is NaN or infinite."""
    numbers = [
        to_printable_array(leaf)
        for leaf in jax.tree.leaves(tree)
        if is_readable(leaf)
        and jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)
    ]
    return not all(np.isfinite(x).all() for x in numbers)


def format_numbers(x: Any) -> str:
    """Returns a float with six digits or an integer with all, or a list of these."""
    numbers = np.ravel(to_printable_array(x)).tolist()
    texts = [f"{x:d}" if isinstance(x, int) else f"{x:.6g}" for x in numbers]
    return f"[{', '.join(texts)}]" if np.ndim(x) else texts[0]


def _are_scalars(tree: PyTree) -> bool:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    return is_readable_tree(leaves) and not any(map(np.ndim, leaves))


def to_printable_array(x: Any) -> np.ndarray:
    """Returns a leaf as a NumPy array.

    Floats become float64, because bfloat16 cannot be formatted.
    """
    array = np.asarray(x)
    return array if array.dtype.kind in "biuc" else array.astype(float)


def _describe_leaf(leaf: Any) -> str:
    if not hasattr(leaf, "shape"):
        return type(leaf).__name__
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def format_error(x: Any) -> str:
    """Returns an error or a bound with two digits."""
    return f"{float(x):.2g}"


def reason_rows(reasons: Iterable[str]) -> list[Row]:
    """Returns the row of reasons, a line for each, or no row."""
    text = "\n".join(reasons)
    return [("reasons", text)] if text else []


def cost_rows(counts: Mapping[str, float]) -> list[Row]:
    """Returns the cost as one line, such as ``552 gradient-equivalents: ...``."""
    total = counts.get("gradient_equivalents", np.nan)
    if np.isnan(total):
        return []
    text = format_count(total, ("gradient-equivalent", "gradient-equivalents"))
    calls = [
        format_count(counts[name], nouns)
        for name, nouns in COUNT_NOUNS.items()
        if counts.get(name, np.nan) > 0
    ]
    return [("cost", f"{text}: {', '.join(calls)}" if calls else text)]


def format_count(number: float, nouns: tuple[str, str]) -> str:
    """Returns a number with its noun in the singular or plural, as ``1 step``."""
    is_whole = number >= 1e4 or abs(number - round(number)) <= 1e-6 * number
    text = f"{number:,.0f}" if is_whole else f"{number:.4g}"
    return f"{text} {nouns[number != 1]}"
