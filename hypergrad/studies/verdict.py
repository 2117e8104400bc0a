"""Verdicts on a table's rows: claims over seeds, and what cannot be told."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from .record import Row

LEAST_SEEDS = 5


class Verdict(NamedTuple):
    """A line under the table; ``failed`` makes the check fail."""

    text: str
    failed: bool = False

    @property
    def line(self) -> str:
        """Of a list in Markdown."""
        return f"- {'**FAILED** ' * self.failed}{self.text}"


def paired(first: Any, second: Any) -> tuple[float, float, float]:
    """Mean of ``first - second`` and its 95% interval by Student's t over seeds."""
    difference = np.asarray(first) - np.asarray(second)
    mean, count = float(np.mean(difference)), difference.size
    if count < 2:
        return mean, -np.inf, np.inf
    half = scipy.stats.t.ppf(0.975, count - 1) * np.std(difference, ddof=1)
    return mean, mean - float(half) / count**0.5, mean + float(half) / count**0.5


def paired_ratio(first: Any, second: Any) -> tuple[float, float, float]:
    """Geometric mean of ``first / second`` and its 95% interval over seeds.

    That of `paired` by logarithms, of which half the width is ``log(high / mean)``.
    """
    mean, low, high = np.exp(paired(np.log(first), np.log(second)))
    return float(mean), float(low), float(high)


def geometric_mean(values: Any) -> float:
    """``exp(mean(log(values)))``."""
    return float(np.exp(np.mean(np.log(values))))


def number_of_seeds(number: int) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} seed{'s' * (number != 1)}"


def within(
    what: str, values: Sequence[float], expected: float, tolerance: float
) -> Verdict:
    """Whether the mean over seeds is ``expected``, as far as its interval can tell.

    Reproduced where the 95% interval lies within the tolerance; an interval that is
    wider than what it is to tell apart is a failure, as are too few seeds.
    """
    mean, low, high = paired(values, 0.0)
    met = expected - tolerance <= low and high <= expected + tolerance
    around = f" [{low:.3g}, {high:.3g}]" if len(values) > 1 else ""
    text = (
        f"{what}: {mean:.3g}{around} over {number_of_seeds(len(values))}, "
        f"{expected:.3g} ± {tolerance:.2g} claimed"
    )
    return conclude(text, met, len(values), (high - low) / 2, tolerance)


def conclude(
    text: str, met: bool, num_seeds: int, half_width: float, effect: float
) -> Verdict:
    """*Reproduced* or not, unless there is too little to say so."""
    if num_seeds < LEAST_SEEDS:
        return Verdict(f"{text}: too few seeds, {LEAST_SEEDS} are needed", failed=True)
    if math.isnan(half_width):
        return Verdict(f"{text}: a row has no number", failed=True)
    if not half_width <= effect:  # it could not tell the claim from no effect
        return Verdict(f"{text}: interval wider than the effect", failed=True)
    return Verdict(f"{text}: {'reproduced' if met else 'not reproduced'}")


class Claim(NamedTuple):
    """That one method beats another in a column, paired by seed.

    Reproduced where the mean advantage is at least ``least`` and its 95% interval is
    above none. An interval whose half-width exceeds a positive ``least`` could not
    have told it from none, and fails the check.

    Attributes:
      first, second: the methods.
      column: of the rows.
      least: the advantage claimed, as it is shown; zero claims any. None claims
        nothing: the line says who beats whom, from two seeds on.
      lower: less is better.
      ratio: the advantage is a factor; means are geometric.
      scale, unit: of what is shown.
    """

    first: str
    second: str
    column: str
    least: float | None = 0.0
    lower: bool = False
    ratio: bool = False
    scale: float = 1.0
    unit: str = ""

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """The line on the rows of a table, NaN where a row has no number."""
        by_seed = sorted(rows, key=lambda row: row["seed"])
        first, second = (
            np.array([r.get(self.column) for r in by_seed if r["method"] == m], float)
            for m in (self.first, self.second)
        )
        if self.lower:
            first, second = second, first
        if self.ratio:
            mean, low, high = paired_ratio(first, second)
            none, form = 1.0, "{:.3g}"
        else:
            mean, low, high = self.scale * np.array(paired(first, second))
            none, form = 0.0, "{:+.3g}" if self.scale == 1 else "{:+.1f}"
        unit = " times" if self.ratio else f" {self.unit}" if self.unit else ""
        effect = f"{form.format(mean)}{unit}"
        if len(first) > 1:
            effect += f" [{form.format(low)}, {form.format(high)}]"
        if self.least is None and len(first) < 2:
            lone = "; one seed cannot tell a difference from chance"
            return Verdict(f"{self.first} against {self.second}: {effect}{lone}")
        if self.least is None:
            how = "beats" if low > none else "loses to" if high < none else "ties with"
            return Verdict(f"{self.first} {how} {self.second}: {effect}")
        least = max(self.least, none)
        asked = f"at least {form.format(least)}" if least > none else "any gain"
        text = f"{self.first} against {self.second}: {effect}, {asked} claimed"
        met = bool(mean >= least and low > none)
        distance = (lambda a, b: math.log(a / b)) if self.ratio else lambda a, b: a - b
        width = distance(high, low) / 2 if len(first) > 1 else math.inf
        told = distance(least, none) if least > none else math.inf
        if not np.isfinite(mean):
            return Verdict(f"{text}: a row has no number", failed=True)
        return conclude(text, met, len(first), width, told)
