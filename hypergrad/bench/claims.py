"""Statements of a table: checks that must hold, claims, and published numbers.

Three words are kept apart. A *check* is a statement of correctness; a check that fails
makes ``hypergrad check`` exit with 1. A *claim* is a hypothesis that was written down
before the run; it ends as supported, not supported or contradicted. A published number
is *reproduced* only if the paper's own protocol was run at its own size and the mean of
ours lies within the stated tolerance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .methods import budget_factor_of, has_failed
from .rows import Row, select
from .statistics import (
    MIN_SEEDS,
    Interval,
    Resplits,
    holm_levels,
    mean_interval,
    p_value,
)

#: Errors of a function of all rows where only a part of them was made.
MISSING_ROWS = (KeyError, IndexError, TypeError, ValueError)

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

    def undecided_if(self, deviations: Sequence[str]) -> "Finding":
        """Returns the finding, undecided if a claim was not tested by its protocol."""
        is_claim = self.outcome in ("supported", "not supported", "contradicted")
        if not (is_claim and deviations):
            return self
        text = f"{self.text} (not the protocol: {', '.join(deviations)})"
        return Finding(text, "undecided")

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
        """Returns whether the statement holds; it fails if it cannot be evaluated."""
        try:
            result = self.holds(rows)
        except MISSING_ROWS as error:
            result = False, f"not evaluated, as where rows are missing: {error!r}"
        is_true, detail = result if isinstance(result, tuple) else (result, "")
        text = f"{self.text} ({detail})" if detail else self.text
        return Finding(text, "holds" if is_true else "FAILED")


@dataclass(frozen=True)
class Pair:
    """Methods of a table that are compared, seed by seed, in a metric.

    Args:
      method, baseline: Labels of two rows of the table.
      metric: Column of the rows.
      lower_is_better: Whether smaller values of the metric are better.
      as_ratio: Whether the effect is a ratio; means are then geometric.
      where: Further fields that a row must have, such as ``(("size", 100),)``.
    """

    method: str
    baseline: str
    metric: str
    lower_is_better: bool = False
    as_ratio: bool = False
    where: tuple[tuple[str, object], ...] = ()

    @property
    def no_effect(self) -> float:
        """The value of the effect if both methods are equal."""
        return 1.0 if self.as_ratio else 0.0

    def rows_of(self, label: str, rows: Sequence[Row]) -> list[Row]:
        """Returns the rows of a method that have the further fields."""
        return select(rows, method=label, **dict(self.where))

    @property
    def condition(self) -> str:
        """The further fields that a row must have, in words."""
        return "".join(f", {name} {value}" for name, value in self.where)

    def values(self, label: str, rows: Sequence[Row]) -> dict[int, float]:
        """Returns the metric of a method by seed.

        Raises:
          ValueError: There are several rows of a seed.
        """
        selected = self.rows_of(label, rows)
        seeds = [row["seed"] for row in selected]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"{label} has several rows of a seed; say which by `where`."
            )
        numbers = [_to_float(row.get(self.metric)) for row in selected]
        return dict(zip(seeds, numbers, strict=True))

    def problem(self, rows: Sequence[Row]) -> str:
        """Returns why the rows decide nothing, in words; empty if they decide."""
        labels = (self.method, self.baseline)
        values = [self.values(label, rows) for label in labels]
        if values[0].keys() != values[1].keys():
            return "a method lacks seeds of the other one"
        num_failed = sum(
            has_failed(row) for label in labels for row in self.rows_of(label, rows)
        )
        if num_failed:
            verb = "run was" if num_failed == 1 else "runs were"
            return f"{num_failed} {verb} not completed"
        if len(values[0]) < MIN_SEEDS:
            text = f"{MIN_SEEDS} seeds are needed for an interval; got {len(values[0])}"
            return text + self._mean_in_words(rows)
        numbers = np.array([list(by_seed.values()) for by_seed in values])
        if not np.all(np.isfinite(numbers)):
            return "a row has no number"
        if self.as_ratio and not np.all(numbers > 0):
            return "a ratio of numbers that are not positive"
        scale = 1.0 if self.as_ratio else np.max(np.abs(numbers))
        if np.ptp(self.gains(rows)) <= _rounding_of_differences(numbers) * scale:
            return "the seeds do not vary"
        return ""

    def _mean_in_words(self, rows: Sequence[Row]) -> str:
        """Returns the mean effect of a few seeds as the end of a sentence."""
        with np.errstate(invalid="ignore", divide="ignore"):
            gains = self.gains(rows)
        if not (gains.size and np.all(np.isfinite(gains))):
            return ""
        mean = np.mean(gains)
        return f" (mean {self._size_in_words(np.exp(mean) if self.as_ratio else mean)})"

    def _size_in_words(self, effect: float | Interval) -> str:
        return f"{effect:.3g} times" if self.as_ratio else f"{effect:+.3g}"

    def gains(self, rows: Sequence[Row]) -> np.ndarray:
        """Returns by how much the method is better, by seed; a logarithm for ratios."""
        pair = [self.values(label, rows) for label in (self.method, self.baseline)]
        seeds = sorted(pair[0].keys() & pair[1].keys())
        x, y = (np.array([by_seed[seed] for seed in seeds], float) for by_seed in pair)
        x, y = (np.log(x), np.log(y)) if self.as_ratio else (x, y)
        return y - x if self.lower_is_better else x - y

    def p_value(
        self, rows: Sequence[Row], effect: float, resplits: Resplits | None
    ) -> float:
        """Returns the p-value of an effect; 1 if the rows decide nothing."""
        if self.problem(rows):
            return 1.0
        null = math.log(effect) if self.as_ratio else effect
        return p_value(self.gains(rows), null, resplits=resplits)

    def interval(
        self, rows: Sequence[Row], level: float, resplits: Resplits | None
    ) -> Interval:
        """Returns the mean effect with its interval."""
        interval = mean_interval(self.gains(rows), level=level, resplits=resplits)
        return Interval(*np.exp(interval).tolist()) if self.as_ratio else interval

    def in_words(self, effect: Interval, level: float, num_seeds: int) -> str:
        """Returns an effect with its interval and what it is based on."""
        size = self._size_in_words(effect)
        return f"{size} ({100 * level:.4g}% interval, {num_seeds} seeds)"


def _to_float(value: Any) -> float:
    """Returns a number of a row; NaN for a text, and where there is none."""
    return math.nan if value is None or isinstance(value, str) else float(value)


def _rounding_of_differences(numbers: np.ndarray) -> float:
    """Returns up to what share of numbers their differences are rounding.

    Four units in the last place of float32 if all numbers are of float32 and not all of
    them integers, such as counts, which are exact.
    """
    with np.errstate(over="ignore"):  # too large for float32
        is_single = np.array_equal(numbers.astype(np.float32), numbers)
    is_count = np.array_equal(np.round(numbers), numbers)
    single_eps = float(np.finfo(np.float32).eps)
    return 4 * single_eps if is_single and not is_count else 1e-12


@dataclass(frozen=True)
class Claim(Pair):
    """The hypothesis that one method is better than another in a metric.

    The difference is paired by seed. With ``min_effect`` e and its confidence interval
    (corrected for the number of claims of the table by Holm), the claim is

    - *supported* if the interval lies above e,
    - *contradicted* if the interval lies below e,
    - *not supported* otherwise,
    - *undecided* if the rows decide nothing: seeds are missing or fewer than five, a
      run ended with numbers that are not finite, a row has no number, a ratio has
      numbers that are not positive, or the seeds do not vary.

    Rows of another budget, scale or number of seeds than the table's leave each claim
    undecided, see `BaseTable.evaluate`.

    Args:
      method, baseline, metric, lower_is_better, as_ratio, where: As in `Pair`.
      min_effect: Smallest difference that the claim states, in units of the metric, or
        smallest ratio with ``as_ratio``. Defaults to any difference.
    """

    min_effect: float | None = field(default=None, kw_only=True)

    def __post_init__(self):
        """Checks the smallest effect.

        Raises:
          ValueError: It is not finite, or a ratio is not positive.
        """
        effect = self.stated_effect
        if not math.isfinite(effect) or (self.as_ratio and effect <= 0):
            kind = "a positive ratio" if self.as_ratio else "a finite number"
            raise ValueError(
                f"min_effect must be {kind}; got {effect}. With as_ratio=True, 1 is no "
                "effect."
            )

    @property
    def stated_effect(self) -> float:
        """The effect against which the claim is tested."""
        return self.no_effect if self.min_effect is None else self.min_effect

    def evaluate(
        self, rows: Sequence[Row], level: float, resplits: Resplits | None
    ) -> Finding:
        """Returns how the claim ends, with the effect and its interval."""
        stated = "any" if self.min_effect is None else f"at least {self.min_effect:.3g}"
        text = f"{self.method} over {self.baseline} in {self.metric}{self.condition}"
        if problem := self.problem(rows):
            return Finding(f"{text}: {problem}, claimed {stated}", "undecided")
        effect = self.interval(rows, level, resplits)
        num_seeds = len(self.gains(rows))
        text += f": {self.in_words(effect, level, num_seeds)}, claimed {stated}"
        if effect.low > self.stated_effect:
            return Finding(text, "supported")
        if effect.high < self.stated_effect:
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

    def __post_init__(self):
        """Checks the tolerance.

        Raises:
          ValueError: It is negative or not finite.
        """
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(
                "tolerance must be a finite number that is not negative; got "
                f"{self.tolerance}."
            )

    @property
    def max_difference(self) -> float:
        """The tolerance as an absolute number."""
        return self.tolerance * abs(self.value) if self.relative else self.tolerance

    def is_reproduced(self, mean: float, scale: str) -> bool | None:
        """Returns whether our mean is close enough; None if it may not be judged."""
        if self.tag == "recalled" or scale != self.scale or not math.isfinite(mean):
            return None
        rounding = 1e-12 * max(abs(mean), abs(self.value))  # of decimal numbers
        return bool(abs(mean - self.value) <= self.max_difference + rounding)


@dataclass(frozen=True)
class Comparison:
    """The comparison of a method with others in a metric, without a claim.

    The difference is paired by seed, and its intervals are corrected for the number of
    other methods by Holm. The method is called better or worse than another one if the
    interval excludes no difference.

    Args:
      method: Label of a row of the table.
      baselines: Labels of the rows with which it is compared.
      metric, lower_is_better, as_ratio, where: As in `Pair`.
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
        return evaluate_comparisons((self,), rows, resplits)

    def pairs(self, rows: Sequence[Row]) -> list[Pair]:
        """Returns the pairs of methods that have rows."""
        labels = {row["method"] for row in rows}
        return [
            Pair(
                self.method,
                baseline,
                self.metric,
                self.lower_is_better,
                self.as_ratio,
                self.where,
            )
            for baseline in self.baselines
            if {self.method, baseline} <= labels
        ]


def evaluate_comparisons(
    comparisons: Sequence[Comparison], rows: Sequence[Row], resplits: Resplits | None
) -> list[Finding]:
    """Returns a line for each pair, corrected for the number of all pairs by Holm."""
    pairs = [pair for comparison in comparisons for pair in comparison.pairs(rows)]
    p_values = [pair.p_value(rows, pair.no_effect, resplits) for pair in pairs]
    return [
        _compare(pair, rows, level, resplits)
        for pair, level in zip(pairs, holm_levels(p_values), strict=True)
    ]


def _compare(
    pair: Pair, rows: Sequence[Row], level: float, resplits: Resplits | None
) -> Finding:
    method, baseline = (
        _with_budget(label, pair.rows_of(label, rows))
        for label in (pair.method, pair.baseline)
    )
    text = f"{method} against {baseline} in {pair.metric}{pair.condition}"
    if problem := pair.problem(rows):
        return Finding(f"{text}: {problem}")
    effect, outcome = pair.interval(rows, level, resplits), "no difference shown"
    if effect.low > pair.no_effect:
        outcome = "better"
    elif effect.high < pair.no_effect:
        outcome = "worse"
    size = pair.in_words(effect, level, len(pair.gains(rows)))
    return Finding(f"{text}: {outcome}, gain {size}")


def _with_budget(label: str, rows: Sequence[Row]) -> str:
    """Returns a label with the multiple of the budget that its rows had."""
    factor = budget_factor_of(rows)
    return label if factor == 1 else f"{label} (with {factor:g} times the budget)"


def evaluate_claims(
    claims: Sequence[Claim], rows: Sequence[Row], resplits: Resplits | None = None
) -> list[Finding]:
    """Returns how each claim ends, corrected for their number by Holm's method.

    All claims of a table count, also those about methods that have no rows; of these no
    line is returned.
    """
    p_values = [claim.p_value(rows, claim.stated_effect, resplits) for claim in claims]
    levels = holm_levels(p_values)
    labels = {row["method"] for row in rows}
    return [
        claim.evaluate(rows, level, resplits)
        for claim, level in zip(claims, levels, strict=True)
        if {claim.method, claim.baseline} <= labels
    ]
