"""Claims about the rows of a table and their verdicts."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from .record import Row

MIN_SEEDS = 5


class Verdict(NamedTuple):
    """A line under a table; ``failed`` makes the check of the table fail."""

    text: str
    failed: bool = False

    @property
    def line(self) -> str:
        """The verdict as an item of a Markdown list."""
        return f"- {'**FAILED** ' * self.failed}{self.text}"


def paired(first: Any, second: Any) -> tuple[float, float, float]:
    """Returns the mean of ``first - second`` and its 95% interval (Student's t)."""
    difference = np.asarray(first) - np.asarray(second)
    mean, count = float(np.mean(difference)), difference.size
    if count < 2:
        return mean, -np.inf, np.inf
    half = scipy.stats.t.ppf(0.975, count - 1) * np.std(difference, ddof=1)
    return mean, mean - float(half) / count**0.5, mean + float(half) / count**0.5


def paired_ratio(first: Any, second: Any) -> tuple[float, float, float]:
    """Returns the geometric mean of ``first / second`` and its 95% interval.

    The interval is that of `paired` for the logarithms; half of its width is
    ``log(high / mean)``.
    """
    mean, low, high = np.exp(paired(np.log(first), np.log(second)))
    return float(mean), float(low), float(high)


def geometric_mean(values: Any) -> float:
    """Returns ``exp(mean(log(values)))``."""
    return float(np.exp(np.mean(np.log(values))))


def number_of_seeds(number: int) -> str:
    """Returns a text such as ``1 seed`` or ``2 seeds``."""
    return f"{number} seed{'s' * (number != 1)}"


def within(
    label: str, values: Sequence[float], expected: float, tolerance: float
) -> Verdict:
    """Returns the verdict on the claim that the mean over seeds is ``expected``.

    The claim is reproduced if the 95% interval lies within the tolerance. The check
    fails if the interval is wider than the tolerance or the seeds are too few.
    """
    mean, low, high = paired(values, 0.0)
    is_met = expected - tolerance <= low and high <= expected + tolerance
    interval = f" [{low:.3g}, {high:.3g}]" if len(values) > 1 else ""
    text = (
        f"{label}: {mean:.3g}{interval} over {number_of_seeds(len(values))}, "
        f"{expected:.3g} ± {tolerance:.2g} claimed"
    )
    return conclude(text, is_met, len(values), (high - low) / 2, tolerance)


def conclude(
    text: str, is_met: bool, num_seeds: int, half_width: float, effect: float
) -> Verdict:
    """Returns *reproduced* or *not reproduced*; fails if the rows do not suffice."""
    if num_seeds < MIN_SEEDS:
        return Verdict(f"{text}: too few seeds, {MIN_SEEDS} are needed", failed=True)
    if math.isnan(half_width):
        return Verdict(f"{text}: a row has no number", failed=True)
    if not half_width <= effect:  # the claim cannot be distinguished from no effect
        return Verdict(f"{text}: interval wider than the effect", failed=True)
    return Verdict(f"{text}: {'reproduced' if is_met else 'not reproduced'}")


class Claim(NamedTuple):
    """The claim that a method is better than another one in a column, paired by seed.

    The claim is reproduced if the mean advantage is at least ``least`` and its 95%
    interval is positive. The check fails if half of the width of the interval exceeds
    a positive ``least``, because the advantage cannot be distinguished from none.

    Attributes:
      first, second: Methods.
      column: Column of the rows.
      least: Claimed advantage in the unit of the table; 0 claims any advantage. With
        None nothing is claimed, and the line states which method is better, for at
        least two seeds.
      lower: Whether lower values are better.
      ratio: Whether the advantage is a factor; means are then geometric.
      scale, unit: Factor of the numbers, and their unit.
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
        """Returns the verdict on the rows of a table."""
        by_seed = sorted(rows, key=lambda row: row["seed"])
        first, second = (
            np.array([r.get(self.column) for r in by_seed if r["method"] == m], float)
            for m in (self.first, self.second)
        )
        if self.lower:
            first, second = second, first
        if self.ratio:
            mean, low, high = paired_ratio(first, second)
            neutral, form = 1.0, "{:.3g}"
        else:
            mean, low, high = self.scale * np.array(paired(first, second))
            neutral, form = 0.0, "{:+.3g}" if self.scale == 1 else "{:+.1f}"
        unit = " times" if self.ratio else f" {self.unit}" if self.unit else ""
        effect = f"{form.format(mean)}{unit}"
        if len(first) > 1:
            effect += f" [{form.format(low)}, {form.format(high)}]"
        if self.least is None and len(first) < 2:
            note = "; one seed cannot tell a difference from chance"
            return Verdict(f"{self.first} against {self.second}: {effect}{note}")
        if self.least is None:
            verb = "ties with"
            if low > neutral:
                verb = "beats"
            elif high < neutral:
                verb = "loses to"
            return Verdict(f"{self.first} {verb} {self.second}: {effect}")
        min_effect = max(self.least, neutral)
        is_quantified = min_effect > neutral
        claim = f"at least {form.format(min_effect)}" if is_quantified else "any gain"
        text = f"{self.first} against {self.second}: {effect}, {claim} claimed"
        is_met = bool(mean >= min_effect and low > neutral)
        distance = (lambda a, b: math.log(a / b)) if self.ratio else lambda a, b: a - b
        half_width = distance(high, low) / 2 if len(first) > 1 else math.inf
        max_width = distance(min_effect, neutral) if is_quantified else math.inf
        if not np.isfinite(mean):
            return Verdict(f"{text}: a row has no number", failed=True)
        return conclude(text, is_met, len(first), half_width, max_width)
