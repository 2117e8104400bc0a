"""Average precision of 100,000 scores with its gradient, in every form, against n x n.

Each cell times one form and the n x n sum of 5,000 scores in turns, in one process.
See README.md for the protocol.
"""

import functools
import statistics
import time
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
from hypergrad.studies import record
from hypergrad.studies.record import Row
from hypergrad.studies.table import Table, cell_by_cell
from hypergrad.studies.verdict import Verdict, conclude, paired_ratio

from .shared import plots

SIZE, REFERENCE_SIZE = 100_000, 5_000
POSITIVE = 0.02
REPEATS = 7
TEMPERATURE = 0.05
BINS = 100
SOFT = 1e-5  # of soft ranks: about an eighth of the mean gap between scores
PER_PAIR = 2.0  # the most that blocks may cost a pair, in those of n x n
CLOSE = 1e-3  # how far a value in float32 may be from its formula in float64


def all_pairs(scores: Array, targets: Array, temperature: float) -> Array:
    """Smooth AP as it is written: every pair at once, memory n²."""
    targets = targets.astype(scores.dtype)
    above = jax.nn.sigmoid((scores[None, :] - scores[:, None]) / temperature)
    above = above * (1 - jnp.eye(scores.size, dtype=scores.dtype))
    precision = (1 + above @ targets) / (1 + jnp.sum(above, axis=1))
    return jnp.sum(targets * precision) / jnp.sum(targets)


def of(surrogate: Any, temperature: float) -> Callable:
    return lambda scores, targets: surrogate(scores, targets, temperature=temperature)


FORMS: dict[str, Callable] = {
    "n x n": functools.partial(all_pairs, temperature=TEMPERATURE),
    "blocks (SmoothAP)": of(hg.surrogates.SmoothAP(), TEMPERATURE),
    "histogram (FastAP)": of(hg.surrogates.FastAP(BINS), TEMPERATURE),
    "sort (BlackboxAP)": of(hg.surrogates.BlackboxAP(), 100.0),
    "soft ranks (SoftRankAP)": of(hg.surrogates.SoftRankAP(), SOFT),
}
FAST = ("histogram (FastAP)", "sort (BlackboxAP)", "soft ranks (SoftRankAP)")
TIMED = [form for form in FORMS if form != "n x n"]


def data(size: int, seed: int) -> tuple[Array, Array]:
    """Normal scores; positives, 2% of them exactly, are higher by 1.5."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(size) < POSITIVE * size
    scores = rng.normal(size=size) + 1.5 * targets
    return jnp.asarray(scores, jnp.float32), jnp.asarray(targets)


@functools.cache
def program(form: str, size: int) -> Any:
    """``(scores, targets) -> (value, gradient)``, compiled, not run."""
    function = jax.jit(jax.value_and_grad(FORMS[form]))
    return function.lower(*data(size, 0)).compile()


def peak_bytes(form: str, size: int) -> int | None:
    """Temporary memory by the compiler's own account."""
    analysis = program(form, size).memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def seconds(call: Callable, arguments: tuple) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - started


def plan(scale: str, seeds: int) -> list[Row]:
    del scale
    return [{"method": form, "seed": seed} for form in TIMED for seed in range(seeds)]


def measure(cell: Row) -> Row:
    """Both programs once to warm up, then in turns; the ratio is that of each turn."""
    form, here = cell["method"], data(SIZE, cell["seed"])
    there = data(REFERENCE_SIZE, cell["seed"])
    call, reference = program(form, SIZE), program("n x n", REFERENCE_SIZE)
    value, gradient = call(*here)
    seconds(reference, there)
    turns = [(seconds(call, here), seconds(reference, there)) for _ in range(REPEATS)]
    ratio = statistics.median(ours / theirs for ours, theirs in turns)
    num_pairs = round(POSITIVE * SIZE) * SIZE
    exact = sklearn.metrics.average_precision_score(here[1], here[0])
    return {
        "seconds": statistics.median(ours for ours, _ in turns),
        "reference_seconds": statistics.median(theirs for _, theirs in turns),
        "ratio": ratio,
        "per_pair": ratio * REFERENCE_SIZE**2 / num_pairs,
        "bytes": peak_bytes(form, SIZE),
        "reference_bytes": peak_bytes("n x n", REFERENCE_SIZE),
        "value": float(value),
        "finite": bool(jnp.all(jnp.isfinite(gradient))),
        "exact": float(exact),
        "formula": formula(form, *here, exact),
        "data_sha256": record.fingerprint({"scores": here[0], "targets": here[1]}),
    }


def formula(form: str, scores: Array, targets: Array, exact: float) -> float:
    """The value in float64, as its paper writes it, by NumPy and scikit-learn."""
    s, y = np.asarray(scores, float), np.asarray(targets)
    of_form = {
        "blocks (SmoothAP)": smooth,
        "histogram (FastAP)": binned,
        "sort (BlackboxAP)": lambda s, y: exact,
        "soft ranks (SoftRankAP)": by_soft_ranks,
    }
    return float(of_form[form](s, y))


def smooth(s: np.ndarray, y: np.ndarray) -> float:
    """The mean of ``(1 + sum_j y_j g_ij) / (1 + sum_j g_ij)`` over positives i."""
    precisions = []
    for i in np.flatnonzero(y):
        above = scipy.special.expit((s - s[i]) / TEMPERATURE)
        above[i] = 0
        precisions.append((1 + above @ y) / (1 + above.sum()))
    return np.mean(precisions)


def binned(s: np.ndarray, y: np.ndarray) -> float:
    """The mean of ``H+(s_i) / H(s_i)``; an item counts one in its own totals."""
    centres = np.linspace(s.max(), s.min(), BINS)
    left = np.clip(np.searchsorted(-centres, -s, "right") - 1, 0, BINS - 2)
    part = (centres[left] - s) / (centres[0] - centres[1])

    def totals(share):
        bins = np.bincount(left, share * (1 - part), BINS)
        bins += np.bincount(left + 1, share * part, BINS)
        return np.interp(-s, -centres, np.cumsum(bins)) + share * part * (1 - part)

    return np.mean((totals(1.0 * y) / totals(np.ones_like(s)))[y])


def by_soft_ranks(s: np.ndarray, y: np.ndarray) -> float:
    """The mean of the rank among the positives over that among all."""

    def ranks(s):
        order = np.argsort(s)
        sizes, numbers = -s[order] / SOFT, np.arange(s.size, 0, -1.0)
        off = isotonic_regression(sizes - numbers, increasing=False)
        found = np.empty_like(s)
        found[order] = sizes - off
        return found

    return np.mean(ranks(s[y]) / ranks(s)[y])


# Judging.


def judge(rows: list[Row]) -> list[Verdict]:
    """Values first; then the claims on time."""
    wrong = [row for row in rows if not row["finite"] or far(row)]
    if wrong:
        name = lambda row: f"{row['method']}, seed {row['seed']}"
        return [Verdict(f"wrong value: {name(row)}", failed=True) for row in wrong]
    verdicts = [
        claim(rows, "blocks (SmoothAP)", "per_pair", "seconds a pair", PER_PAIR)
    ]
    return verdicts + [claim(rows, form, "ratio", "seconds", 1.0) for form in FAST]


def far(row: Row) -> bool:
    return not abs(row["value"] - row["formula"]) <= CLOSE * row["formula"]


def column(rows: list[Row], form: str, name: str) -> list[float]:
    return [row[name] for row in rows if row["method"] == form]


def claim(rows: list[Row], form: str, name: str, what: str, most: float) -> Verdict:
    """Whether the interval of the ratio, by its logarithm, is below ``most``."""
    ratios = column(rows, form, name)
    mean, low, high = paired_ratio(ratios, 1.0)
    text = (
        f"{form}, {SIZE:,} scores against n x n of {REFERENCE_SIZE:,}, ratio of "
        f"{what}: {mean:.2g} [{low:.2g}, {high:.2g}], at most {most:g} claimed"
    )
    return conclude(text, high <= most, len(ratios), (high - low) / 2, most)


# Showing.


def markdown(table: Table, rows: list[Row], command: str) -> str:
    lines = [
        f"# {table.name}",
        "",
        f"Value and gradient of average precision of {SIZE:,} scores in float32, "
        f"{POSITIVE:.0%} positive, against the n x n sum of {REFERENCE_SIZE:,}, timed "
        f"in turns; means over seeds of the median of {REPEATS}. Error: value less "
        f"exact. Source: {table.source}. Command: `{command}`",
        "",
        "| form | MB | seconds | n x n MB | n x n seconds | ratio | per pair | error |",
        "|" + "---|" * 8,
    ]
    for form in TIMED:
        of = lambda name, form=form: np.array(column(rows, form, name), float)
        error = np.mean(of("value") - of("exact"))
        per_pair = f"{of('per_pair').mean():.2f}" if form not in FAST else "-"
        cells = [
            f"{of('bytes').mean() / 1e6:.1f}",
            f"{of('seconds').mean():.3g}",
            f"{of('reference_bytes').mean() / 1e6:.0f}",
            f"{of('reference_seconds').mean():.3g}",
            f"{of('ratio').mean():.3g}",
            per_pair,
            f"{error:+.1e}",
        ]
        lines.append("| " + " | ".join([form, *cells]) + " |")
    lines += ["", *(v.line for v in judge(rows))]
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Seconds and memory of each form, beside those of n x n."""
    small = f"n x n, {REFERENCE_SIZE:,}"
    labels = [small, *(f"{form}, {SIZE:,}" for form in TIMED)]
    first = TIMED[0]
    panels = {
        "seconds": [column(rows, first, "reference_seconds")]
        + [column(rows, form, "seconds") for form in TIMED],
        "temporary bytes": [column(rows, first, "reference_bytes")]
        + [column(rows, form, "bytes") for form in TIMED],
    }
    plots.log_dots(panels, labels, "Average precision with its gradient", path)


TABLE = Table(
    name="average-precision",
    source="Brown et al. 2020 (arXiv 2007.12163); Cakir et al. 2019; Rolinek et al. "
    "2020 (arXiv 1912.03500); Blondel et al. 2020 (arXiv 2002.08871)",
    minutes=5,
    seeds=5,
    plan=plan,
    run=cell_by_cell(measure, markdown, draw),
    judge=judge,
)
