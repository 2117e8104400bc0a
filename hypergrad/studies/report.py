"""A study's table in Markdown, and the verdict on its criterion."""

from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import PyTree

from .study import Study

POINTS = 2.0  # what the criterion asks for
COLUMNS = (
    ("accuracy %", "test_accuracy", 100, "{:.1f} ± {:.1f}"),
    ("F1", "f1", 1, "{:.3f} ± {:.3f}"),
    ("grad-eq", "gradient_equivalents", 1, "{:.0f}"),
    ("HVPs", "num_hvps", 1, "{:.0f}"),
    ("compile s", "compile_seconds", 1, "{:.1f}"),
    ("run s", "run_seconds", 1, "{:.1f}"),
    ("residual", "adjoint_residual", 1, "{:.1e}"),
)


def cells(result: PyTree) -> list[str]:
    """One row's columns: mean and standard deviation over seeds; a dash where none."""
    result = dict(result)
    if "curve_cost" in result:
        result["gradient_equivalents"] = result["curve_cost"][:, -1]
    texts = []
    for _, name, scale, form in COLUMNS:
        values = np.asarray(result.get(name, np.nan), dtype=float) * scale
        if np.all(np.isnan(values)):
            texts.append("-")
            continue
        top = name == "adjoint_residual"
        center = np.max(values) if top else np.mean(values)
        spread = np.std(values, ddof=1) if values.size > 1 else 0.0
        texts.append(form.format(center, spread))
    return texts


def paired(first: Any, second: Any) -> tuple[float, float, float]:
    """Mean of ``first - second`` and its 95% interval by Student's t over seeds."""
    difference = np.asarray(first) - np.asarray(second)
    mean, count = float(np.mean(difference)), difference.size
    if count < 2:
        return mean, -np.inf, np.inf
    half = scipy.stats.t.ppf(0.975, count - 1) * np.std(difference, ddof=1)
    return mean, mean - float(half) / count**0.5, mean + float(half) / count**0.5


class Claim(NamedTuple):
    """A learned row against the baseline, in points, with its 95% interval."""

    method: str
    mean: float
    low: float
    high: float

    @property
    def reproduced(self) -> bool:
        """At least 2 points on average, and surely above zero."""
        return self.mean >= POINTS and self.low > 0


def claims(study: Study, results: dict[str, PyTree]) -> list[Claim]:
    """What the criterion says of each learned row that is there."""
    baseline = study.methods[0]
    if baseline not in results:
        return []
    return [
        Claim(method, *paired(_points(results, method), _points(results, baseline)))
        for method in study.learned
        if method in results
    ]


def _points(results: dict[str, PyTree], method: str) -> np.ndarray:
    return 100 * np.asarray(results[method]["test_accuracy"])


def verdicts(study: Study, results: dict[str, PyTree]) -> list[str]:
    """Whether each learned row beats the tuned baseline by 2 points, and the rest."""
    lines = []
    for claim in claims(study, results):
        met = "reproduced" if claim.reproduced else "not reproduced"
        lines.append(
            f"{claim.method} against {study.methods[0]}: {claim.mean:+.1f} points "
            f"[{claim.low:+.1f}, {claim.high:+.1f}], at least {POINTS:+.1f} claimed: "
            f"{met}"
        )
    if "validation-only" in results:
        for method in study.learned:
            if method in results:
                mean, low, high = paired(
                    _points(results, "validation-only"), _points(results, method)
                )
                how = "beats" if low > 0 else "loses to" if high < 0 else "ties with"
                lines.append(
                    f"validation-only {how} {method}: {mean:+.1f} points "
                    f"[{low:+.1f}, {high:+.1f}]"
                )
    return lines


def markdown(study: Study, results: dict[str, PyTree], command: str) -> str:
    """The table with its command, and the verdicts under it."""
    num_seeds = len(next(iter(results.values()))["test_accuracy"])
    header = ["method", *(title for title, *_ in COLUMNS)]
    lines = [
        f"# {study.name}",
        "",
        f"{study.data_name}; {num_seeds} seeds, mean ± standard deviation; at most "
        f"{study.budget:,.0f} gradient-equivalents (grad-eq) a run. Accuracy on the "
        "untouched test split; F1 of finding wrong labels; residual is the largest "
        "adjoint residual; seconds are those of "
        "learning, all seeds and the tuning of the penalty together, without the final "
        f"training, which is the same for every row. Source: {study.source}. "
        f"Command: `{command}`",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for method, result in results.items():
        lines.append("| " + " | ".join([method, *cells(result)]) + " |")
    lines.append("")
    lines += [f"- {line}" for line in verdicts(study, results)]
    return "\n".join(lines)
