"""Average precision of 100,000 scores with its gradient, in every form.

Question: What does average precision with its gradient cost at 100,000 scores, and is
it worth doing otherwise than by all pairs at once?

Data: Normal scores, 2% positives that are higher by 1.5, drawn from the seed, in
float32.

Forms: *n x n*: the formula of Smooth-AP as it is written, by an array of all pairs, at
5,000 scores (at 100,000 it would need 40 GB an array). At 100,000: SmoothAP, by blocks
(temperature 0.05); FastAP (100 bins); BlackboxAP (100); SoftRankAP (1e-5). Each is
compiled and run once, then timed seven times in turns with n x n in one process; a cell
holds the median of the ratios of turns. Memory is the temporary memory of the compiled
program, by its own account. Each must be within 1e-3 of its formula in float64 by
NumPy, the soft ranks by scikit-learn's isotonic regression.

Criteria: Seeds 0..4; geometric means, 95% intervals of the ratio by its logarithm.
SmoothAP costs at most twice as much a pair (positives times scores) as n x n (scores
squared). FastAP, BlackboxAP and SoftRankAP take less time than n x n at a twentieth of
the scores.
"""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import sklearn.metrics
from jaxtyping import Array
from sklearn.isotonic import isotonic_regression

import hypergrad as hg
from hypergrad.bench import Cell, Finding, MeasurementTable, Row, ratio_interval
from hypergrad.bench.report import markdown_table

from .shared.outcomes import conclude
from .shared.plots import add_grid, make_panels
from .shared.program import timed
from .shared.row_columns import column
from .shared.stages import fingerprint
from .shared.tuning import cells_of

SIZE, REFERENCE_SIZE = 100_000, 5_000
POSITIVE_FRACTION = 0.02
REPEATS = 7
TEMPERATURE = 0.05
BINS = 100
SOFT_RANK = 1e-5  # temperature: about an eighth of the mean gap between scores
MAX_PER_PAIR = 2.0  # cost of blocks per pair, relative to n x n
RTOL = 1e-3  # of a value in float32, relative to its formula in float64


def all_pairs(scores: Array, targets: Array, temperature: float) -> Array:
    """Returns Smooth-AP as its formula is written: all pairs at once, memory n²."""
    targets = targets.astype(scores.dtype)
    ranks_above = jax.nn.sigmoid((scores[None, :] - scores[:, None]) / temperature)
    ranks_above = ranks_above * (1 - jnp.eye(scores.size, dtype=scores.dtype))
    precision = (1 + ranks_above @ targets) / (1 + jnp.sum(ranks_above, axis=1))
    return jnp.sum(targets * precision) / jnp.sum(targets)


def at_temperature(surrogate: Any, temperature: float) -> Callable:
    """Returns ``(scores, targets) -> value`` at a temperature."""
    return lambda scores, targets: surrogate(scores, targets, temperature=temperature)


FORMS: dict[str, Callable] = {
    "n x n": functools.partial(all_pairs, temperature=TEMPERATURE),
    "blocks (SmoothAP)": at_temperature(hg.surrogates.SmoothAP(), TEMPERATURE),
    "histogram (FastAP)": at_temperature(hg.surrogates.FastAP(BINS), TEMPERATURE),
    "sort (BlackboxAP)": at_temperature(hg.surrogates.BlackboxAP(), 100.0),
    "soft ranks (SoftRankAP)": at_temperature(hg.surrogates.SoftRankAP(), SOFT_RANK),
}
FAST = ("histogram (FastAP)", "sort (BlackboxAP)", "soft ranks (SoftRankAP)")
TIMED = [form for form in FORMS if form != "n x n"]


def data(size: int, seed: int) -> tuple[Array, Array]:
    """Returns normal scores; the positives, exactly 2%, are higher by 1.5."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(size) < POSITIVE_FRACTION * size
    scores = rng.normal(size=size) + 1.5 * targets
    return jnp.asarray(scores, jnp.float32), jnp.asarray(targets)


@functools.cache
def program(form: str, size: int) -> Any:
    """Returns the compiled ``(scores, targets) -> (value, gradient)``."""
    function = jax.jit(jax.value_and_grad(FORMS[form]))
    return function.lower(*data(size, 0)).compile()


def peak_bytes(form: str, size: int) -> int | None:
    """Returns the temporary memory that the compiler states."""
    analysis = program(form, size).memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns times of both programs in alternation, after one call of each."""
    del rows
    form, inputs = cell["method"], data(SIZE, cell["seed"])
    small_inputs = data(REFERENCE_SIZE, cell["seed"])
    call, reference = program(form, SIZE), program("n x n", REFERENCE_SIZE)
    value, gradient = call(*inputs)
    timed(reference, *small_inputs)
    times = [
        (timed(call, *inputs)[1], timed(reference, *small_inputs)[1])
        for _ in range(REPEATS)
    ]
    ratio = statistics.median(x / reference for x, reference in times)
    num_pairs = round(POSITIVE_FRACTION * SIZE) * SIZE
    exact = sklearn.metrics.average_precision_score(inputs[1], inputs[0])
    return {
        "seconds": statistics.median(x for x, _ in times),
        "reference_seconds": statistics.median(x for _, x in times),
        "ratio": ratio,
        "per_pair": ratio * REFERENCE_SIZE**2 / num_pairs,
        "bytes": peak_bytes(form, SIZE),
        "reference_bytes": peak_bytes("n x n", REFERENCE_SIZE),
        "value": float(value),
        "finite": bool(jnp.all(jnp.isfinite(gradient))),
        "exact": float(exact),
        "formula": formula(form, *inputs, exact),
        "data_sha256": fingerprint({"scores": inputs[0], "targets": inputs[1]}),
    }


def formula(form: str, scores: Array, targets: Array, exact: float) -> float:
    """Returns the value in float64 by the formula of its paper."""
    s, y = np.asarray(scores, float), np.asarray(targets)
    formulas = {
        "blocks (SmoothAP)": smooth_ap,
        "histogram (FastAP)": fast_ap,
        "sort (BlackboxAP)": lambda s, y: exact,
        "soft ranks (SoftRankAP)": soft_rank_ap,
    }
    return float(formulas[form](s, y))


def smooth_ap(s: np.ndarray, y: np.ndarray) -> float:
    """Returns the mean over positives i of ``(1 + sum y_j g_ij) / (1 + sum g_ij)``."""
    precisions = []
    for i in np.flatnonzero(y):
        ranks_above = scipy.special.expit((s - s[i]) / TEMPERATURE)
        ranks_above[i] = 0
        precisions.append((1 + ranks_above @ y) / (1 + ranks_above.sum()))
    return np.mean(precisions)


def fast_ap(s: np.ndarray, y: np.ndarray) -> float:
    """Returns the mean of ``H+(s_i) / H(s_i)``; an item counts one in its totals."""
    centres = np.linspace(s.max(), s.min(), BINS)
    left_bin = np.clip(np.searchsorted(-centres, -s, "right") - 1, 0, BINS - 2)
    right_weight = (centres[left_bin] - s) / (centres[0] - centres[1])

    def totals(weights):
        bins = np.bincount(left_bin, weights * (1 - right_weight), BINS)
        bins += np.bincount(left_bin + 1, weights * right_weight, BINS)
        own_weight = weights * right_weight * (1 - right_weight)
        return np.interp(-s, -centres, np.cumsum(bins)) + own_weight

    return np.mean((totals(1.0 * y) / totals(np.ones_like(s)))[y])


def soft_rank_ap(s: np.ndarray, y: np.ndarray) -> float:
    """Returns the mean of the rank among the positives over the rank among all."""

    def ranks(s):
        order = np.argsort(s)
        sizes, numbers = -s[order] / SOFT_RANK, np.arange(s.size, 0, -1.0)
        correction = isotonic_regression(sizes - numbers, increasing=False)
        result = np.empty_like(s)
        result[order] = sizes - correction
        return result

    return np.mean(ranks(s[y]) / ranks(s)[y])


# Findings.


def findings(rows: list[Row]) -> list[Finding]:
    """Returns wrong values, or the claims on time."""
    wrong = [row for row in rows if not (row["finite"] and is_close(row))]
    if wrong:
        name = lambda row: f"{row['method']}, seed {row['seed']}"
        return [Finding(f"wrong value: {name(row)}", "FAILED") for row in wrong]
    labels = {row["method"] for row in rows}
    claims = [("blocks (SmoothAP)", "per_pair", "seconds per pair", MAX_PER_PAIR)]
    claims += [(form, "ratio", "seconds", 1.0) for form in FAST]
    return [ratio_claim(rows, *claim) for claim in claims if claim[0] in labels]


def is_close(row: Row) -> bool:
    """Returns True if the value is that of its formula in float64."""
    return abs(row["value"] - row["formula"]) <= RTOL * row["formula"]


def ratio_claim(
    rows: list[Row], form: str, name: str, quantity: str, max_ratio: float
) -> Finding:
    """Returns whether the interval of a ratio lies below ``max_ratio``."""
    ratios = column(rows, name, method=form)
    ratio = ratio_interval(ratios, np.ones(len(ratios)))
    text = (
        f"{form}, {SIZE:,} scores against n x n of {REFERENCE_SIZE:,}, ratio of "
        f"{quantity}: {ratio:.2g}, at most {max_ratio:g} claimed"
    )
    half_width = (ratio.high - ratio.low) / 2
    return conclude(text, ratio.high <= max_ratio, len(ratios), half_width, max_ratio)


# Report.


def body(rows: list[Row]) -> list[str]:
    """Returns a row per form."""
    headings = (
        "form", "MB", "seconds", "n x n MB", "n x n seconds", "ratio", "per pair",
        "value - exact",
    )  # fmt: skip
    cells = []
    for form in dict.fromkeys(row["method"] for row in rows):
        mean = lambda name, form=form: np.mean(column(rows, name, method=form))
        cells.append(
            [
                form,
                f"{mean('bytes') / 1e6:.1f}",
                f"{mean('seconds'):.3g}",
                f"{mean('reference_bytes') / 1e6:.0f}",
                f"{mean('reference_seconds'):.3g}",
                f"{mean('ratio'):.3g}",
                "-" if form in FAST else f"{mean('per_pair'):.2f}",
                f"{mean('value') - mean('exact'):+.1e}",
            ]
        )
    return markdown_table(headings, cells)


def plot(rows: list[Row], path: Path) -> None:
    """Plots seconds and memory of each form beside those of n x n."""
    forms = list(dict.fromkeys(row["method"] for row in rows))
    labels = [f"n x n, {REFERENCE_SIZE:,}", *(f"{form}, {SIZE:,}" for form in forms)]
    panels = {
        label: [column(rows, f"reference_{name}", method=forms[0])]
        + [column(rows, name, method=form) for form in forms]
        for label, name in (("seconds", "seconds"), ("temporary bytes", "bytes"))
    }
    figure, axes = make_panels(1, len(panels), (10, 1.4 + 0.35 * len(labels)))
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        for position, x in enumerate(values):
            color = "black" if position == 0 else "steelblue"
            axis.plot(x, [position] * len(x), "o", color=color, alpha=0.6)
        axis.axvline(np.mean(values[0]), color="black", lw=0.8, ls=":")
        axis.set_xscale("log")
        axis.set_xlabel(name)
        axis.set_yticks(range(len(labels)), labels if axis is axes[0] else [])
        axis.set_ylim(len(labels) - 0.5, -0.5)
        add_grid(axis, axis="x")
    figure.suptitle("Average precision with its gradient")
    figure.savefig(path, dpi=130)


table = MeasurementTable(
    cells=cells_of(TIMED),
    measure_cell=measure,
    findings=findings,
    body=body,
    plot=plot,
    seeds=5,
    minutes=5,
    paradigm="smooth metrics",
    source="Brown et al. 2020 (arXiv 2007.12163); Cakir et al. 2019; Rolinek et al. "
    "2020 (arXiv 1912.03500); Blondel et al. 2020 (arXiv 2002.08871)",
    data="simulated scores",
)
