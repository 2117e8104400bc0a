"""Statements of a table: checks that must hold, claims, and published numbers.

Three words are kept apart. A *check* is a statement of correctness; a check that fails
makes ``hypergrad check`` exit with 1. A *claim* is a hypothesis that was written down
before the run; it ends as supported, not supported or contradicted. A published number
is *reproduced* only if the paper's own protocol was run at its own size and the mean of
ours lies within the stated tolerance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .rows import Row
from .statistics import (
    LEVEL,
    MIN_SEEDS,
    Interval,
    Resplits,
    difference_interval,
    holm_levels,
    p_value,
    ratio_interval,
)

Outcome = Literal[
    "holds", "FAILED", "supported", "not supported", "contradicted", "undecided"
]
Tag = Literal["executed", "verified", "secondary", "recalled"]


@dataclass(frozen=True)
class Finding:
    """A line under a table.

    Attributes:
      text: What was compared, with numbers.
      outcome: How it ended; None for a line that only reports numbers.
    """

    text: str
    outcome: Outcome | None = None

    @property
    def failed(self) -> bool:
        """True if ``hypergrad check`` must fail."""
        return self.outcome == "FAILED"

    @property
    def markdown(self) -> str:
        """The line as an item of a Markdown list."""
        if self.outcome is None:
            return f"- {self.text}"
        return f"- **{self.outcome}**: {self.text}"


@dataclass(frozen=True)
class Check:
    """A statement of correctness about the rows of a table.

    Args:
      text: The statement.
      holds: ``rows -> bool`` or ``rows -> (bool, detail)``.
    """

    text: str
    holds: Callable[[Sequence[Row]], bool | tuple[bool, str]]

    def evaluate(self, rows: Sequence[Row]) -> Finding:
        """Returns whether the statement holds for the rows."""
        result = self.holds(rows)
        is_true, detail = result if isinstance(result, tuple) else (result, "")
        text = f"{self.text} ({detail})" if detail else self.text
        return Finding(text, "holds" if is_true else "FAILED")


@dataclass(frozen=True)
class Claim:
    """The hypothesis that one method is better than another in a metric.

    The difference is paired by seed. With ``min_effect`` e and its confidence interval
    (corrected for the number of claims of the table by Holm), the claim is

    - *supported* if the interval excludes no difference and the mean is at least e,
    - *contradicted* if the interval lies below e,
    - *not supported* otherwise.

    Args:
      method, baseline: Labels of two rows of the table.
      metric: Column of the rows.
      min_effect: Smallest difference that the claim states, in units of the metric, or
        smallest ratio with ``as_ratio``. Defaults to any difference.
      lower_is_better: Whether smaller values of the metric are better.
      as_ratio: Whether the effect is a ratio; means are then geometric.
      where: Further fields that a row must have, such as ``{"size": 100}``.
    """

    method: str
    baseline: str
    metric: str
    min_effect: float | None = None
    lower_is_better: bool = False
    as_ratio: bool = False
    where: tuple[tuple[str, object], ...] = ()

    @property
    def no_effect(self) -> float:
        """The value of the effect if both methods are equal."""
        return 1.0 if self.as_ratio else 0.0

    def pairs(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the values of both methods, better values, for the seeds of both."""
        by_seed = [
            {
                row["seed"]: row.get(self.metric)
                for row in rows
                if row["method"] == label
                and all(row.get(name) == value for name, value in self.where)
            }
            for label in (self.method, self.baseline)
        ]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        values, baseline_values = (
            np.array([values[seed] for seed in seeds], float) for values in by_seed
        )
        return (
            (baseline_values, values)
            if self.lower_is_better
            else (values, baseline_values)
        )

    def p_value(self, rows: Sequence[Row], resplits: Resplits | None) -> float:
        """Returns the p-value of no effect; 1 if it cannot be computed."""
        values, baseline_values = self.pairs(rows)
        if self.as_ratio:
            values, baseline_values = np.log(values), np.log(baseline_values)
        value = p_value(values - baseline_values, resplits=resplits)
        return 1.0 if math.isnan(value) else value

    def effect(
        self, rows: Sequence[Row], level: float, resplits: Resplits | None
    ) -> Interval:
        """Returns the effect with its interval."""
        interval = ratio_interval if self.as_ratio else difference_interval
        return interval(*self.pairs(rows), level=level, resplits=resplits)

    def compare(
        self, rows: Sequence[Row], level: float, resplits: Resplits | None
    ) -> Finding:
        """Returns which of both is better, without judging what is claimed."""
        num_seeds = len(self.pairs(rows)[0])
        effect = self.effect(rows, level, resplits)
        outcome = "no difference shown"
        if effect.low > self.no_effect:
            outcome = "better"
        elif effect.high < self.no_effect:
            outcome = "worse"
        size = f"{effect:.3g} times" if self.as_ratio else f"{effect:+.3g}"
        return Finding(
            f"{self.method} against {self.baseline} in {self.metric}"
            f"{self.condition}: {outcome}, gain {size} "
            f"({100 * level:.4g}% interval, {num_seeds} seeds)"
        )

    @property
    def condition(self) -> str:
        """The further fields that are asked of the rows, in words."""
        return "".join(f", {name} {value}" for name, value in self.where)

    def evaluate(
        self, rows: Sequence[Row], level: float, resplits: Resplits | None
    ) -> Finding:
        """Returns how the claim ends, with the effect and its interval."""
        num_seeds = len(self.pairs(rows)[0])
        min_effect = self.no_effect if self.min_effect is None else self.min_effect
        stated = "any" if self.min_effect is None else f"at least {self.min_effect:.3g}"
        unit = " times" if self.as_ratio else ""
        text = f"{self.method} over {self.baseline} in {self.metric}{self.condition}"
        if num_seeds < MIN_SEEDS:
            return Finding(f"{text}: {num_seeds} seeds of {MIN_SEEDS}", "undecided")
        effect = self.effect(rows, level, resplits)
        if not math.isfinite(effect.mean):
            return Finding(f"{text}: a row has no number", "undecided")
        spec = ".3g" if self.as_ratio else "+.3g"
        text += (
            f": {effect:{spec}}{unit} ({100 * level:.4g}% interval, {num_seeds} seeds)"
            f", claimed {stated}"
        )
        is_excluded = effect.low > self.no_effect
        if is_excluded and effect.mean >= min_effect:
            return Finding(text, "supported")
        if effect.high < min_effect:
            return Finding(text, "contradicted")
        return Finding(text, "not supported")


@dataclass(frozen=True)
class Published:
    """A number that a paper prints.

    Args:
      value: The number, in units of the row's column.
      tolerance: Largest difference at which ours counts as reproduced, as an absolute
        number, or relative to ``value`` with ``relative=True``.
      tag: How the number is known: "executed" (recomputed from the authors' code),
        "verified" (read in the paper or the authors' files), "secondary" (read in
        another paper) or "recalled". A recalled number is printed and never judged.
      deviation: Standard deviation that the paper prints, if any.
      source: Where the number stands, such as "table 2".
      relative: Whether ``tolerance`` is relative.
      scale: The scale of our table at which the paper's protocol is run.
    """

    value: float
    tolerance: float
    tag: Tag
    deviation: float | None = None
    source: str = ""
    relative: bool = False
    scale: str = "paper"

    @property
    def max_difference(self) -> float:
        """The tolerance as an absolute number."""
        return self.tolerance * abs(self.value) if self.relative else self.tolerance

    def is_reproduced(self, mean: float, scale: str) -> bool | None:
        """Returns whether our mean is close enough; None if it may not be judged."""
        if self.tag == "recalled" or scale != self.scale or not math.isfinite(mean):
            return None
        return bool(abs(mean - self.value) <= self.max_difference)


@dataclass(frozen=True)
class Comparison:
    """The comparison of a method with others in a metric, without a claim.

    The difference is paired by seed, and its intervals are corrected for the number of
    other methods by Holm. The method is called better or worse than another one if the
    interval excludes no difference.

    Args:
      method: Label of a row of the table.
      baselines: Labels of the rows with which it is compared.
      metric, lower_is_better, as_ratio, where: As in `Claim`.
    """

    method: str
    baselines: tuple[str, ...]
    metric: str
    lower_is_better: bool = False
    as_ratio: bool = False
    where: tuple[tuple[str, object], ...] = ()

    def evaluate(
        self, rows: Sequence[Row], resplits: Resplits | None = None
    ) -> list[Finding]:
        """Returns a line for each other method that has rows."""
        options = {
            "lower_is_better": self.lower_is_better,
            "as_ratio": self.as_ratio,
            "where": self.where,
        }
        labels = {row["method"] for row in rows}
        claims = [
            Claim(self.method, other, self.metric, **options)
            for other in self.baselines
            if {self.method, other} <= labels
        ]
        levels = holm_levels([claim.p_value(rows, resplits) for claim in claims])
        return [
            claim.compare(rows, level, resplits)
            for claim, level in zip(claims, levels, strict=True)
        ]


def evaluate_claims(
    claims: Sequence[Claim], rows: Sequence[Row], resplits: Resplits | None = None
) -> list[Finding]:
    """Returns how each claim ends, corrected for their number by Holm's method.

    Claims about methods that have no rows are left out.
    """
    methods = {row["method"] for row in rows}
    claims = [claim for claim in claims if {claim.method, claim.baseline} <= methods]
    p_values = [claim.p_value(rows, resplits) for claim in claims]
    levels = holm_levels(p_values, level=LEVEL) if claims else []
    return [
        claim.evaluate(rows, level, resplits)
        for claim, level in zip(claims, levels, strict=True)
    ]
