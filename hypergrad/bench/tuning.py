"""The setting of a method that its tuning runs choose, and what they cost."""

import math
from collections.abc import Sequence

from .methods import MethodError, has_failed
from .rows import Row, select

FAILED_SCORES = (-math.inf,)


def choose_setting(
    label: str, seed: int, num_settings: int, rows: Sequence[Row]
) -> int:
    """Returns the index of the setting with the best scores of a seed.

    A run that ended with numbers that are not finite has no scores.

    Args:
      label: Label of the method.
      seed: The seed.
      num_settings: Number of settings of the method.
      rows: Rows of the tuning runs, of any method and seed.

    Raises:
      MethodError: No setting ended with finite scores.
    """
    if num_settings == 1:
        return 0
    tuning_rows = select(rows, stage="tuning", method=label, seed=seed)
    scores = [_scores_of(tuning_rows, index) for index in range(num_settings)]
    best = max(range(num_settings), key=lambda index: scores[index])
    if scores[best] == FAILED_SCORES:
        reasons = [row.get("error") or row.get("stopped") for row in tuning_rows]
        text = "no setting of its grid ended with a finite score"
        raise MethodError(": ".join([text, *filter(None, reasons)][:2]))
    return best


def _scores_of(tuning_rows: Sequence[Row], index: int) -> tuple[float, ...]:
    """Returns the scores of a setting; higher is better."""
    rows = select(tuning_rows, setting_index=index)
    if not rows or has_failed(rows[0]):
        return FAILED_SCORES
    scores = rows[0]["selection"]
    return FAILED_SCORES if scores is None or None in scores else tuple(scores)


def tuning_fields(
    label: str, seed: int, rows: Sequence[Row], compile_seconds: float
) -> Row:
    """Returns the cost of tuning, and the longest compilation of the method.

    The tuning runs come first and compile what the reported run uses again. A run that
    failed counts if its cost is known.
    """
    tuning_rows = select(rows, stage="tuning", method=label)
    compilations = [x.get("compile_seconds") or 0.0 for x in tuning_rows]
    fields = {"compile_seconds": max([compile_seconds, *compilations])}
    cost = sum(
        x["gradient_equivalents"] or 0.0 for x in tuning_rows if x["seed"] == seed
    )
    return fields | ({"tuning_cost": cost} if cost else {})
