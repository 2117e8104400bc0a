"""Outcomes of hypotheses that are not about the difference of two methods.

`hypergrad.bench.Claim` compares two methods. These functions end any other hypothesis,
whose effect and interval the table computes itself, with the same words.
"""

import math
from collections.abc import Callable, Sequence

from hypergrad.bench import Finding, Row, mean_interval
from hypergrad.bench.statistics import MIN_SEEDS


def conclude(
    text: str, is_met: bool, num_seeds: int, half_width: float, effect: float
) -> Finding:
    """Returns how a hypothesis ends: supported, not supported, or undecided.

    Args:
      text: The hypothesis with what was measured.
      is_met: Whether it agrees with the rows.
      num_seeds: Number of seeds; fewer than five decide nothing.
      half_width: Half of the width of the interval of the effect.
      effect: Claimed effect; an interval wider than twice this decides nothing.
    """
    if num_seeds < MIN_SEEDS:
        return Finding(f"{text}: {num_seeds} seeds of {MIN_SEEDS}", "undecided")
    if math.isnan(half_width):
        return Finding(f"{text}: a row has no number", "undecided")
    if not half_width <= effect:
        return Finding(f"{text}: the interval is wider than the effect", "undecided")
    return Finding(text, "supported" if is_met else "not supported")


def within(
    label: str, values: Sequence[float], expected: float, tolerance: float
) -> Finding:
    """Returns how the hypothesis ends that the mean over seeds is ``expected``.

    It is supported if the 95% interval lies within the tolerance.
    """
    mean, low, high = mean_interval(values)
    is_met = expected - tolerance <= low and high <= expected + tolerance
    interval = f" [{low:.3g}, {high:.3g}]" if len(values) > 1 else ""
    text = (
        f"{label}: {mean:.3g}{interval} over {count_seeds(len(values))}, "
        f"{expected:.3g} ± {tolerance:.2g} claimed"
    )
    return conclude(text, is_met, len(values), (high - low) / 2, tolerance)


def stays_within(budget: float) -> Callable[[Sequence[Row]], tuple[bool, str]]:
    """Returns the check whether no row exceeds a budget, with the largest cost."""

    def check(rows: Sequence[Row]) -> tuple[bool, str]:
        max_cost = max(row["gradient_equivalents"] for row in rows)
        return max_cost <= budget, f"{max_cost:,.0f} at most"

    return check


def count_seeds(number: int) -> str:
    """Returns a text such as ``1 seed`` or ``2 seeds``."""
    return f"{number} seed{'s' * (number != 1)}"
