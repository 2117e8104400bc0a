"""Claims of a table whose tasks split their data in different ways.

A table has one `hypergrad.bench.Resplits` for all of its claims. Where only some tasks
re-split one data set with a test split that is smaller than the other splits, each
claim has its own.
"""

from collections.abc import Sequence

from hypergrad.bench import Claim, Finding, Resplits, Row
from hypergrad.bench.statistics import holm_levels


def evaluate_split_claims(
    claims: Sequence[tuple[Claim, Resplits | None]], rows: Sequence[Row]
) -> list[Finding]:
    """Returns how each claim ends, corrected for their number by Holm's method.

    All claims count, also those about methods that have no rows; of these no line is
    returned.
    """
    p_values = [
        claim.p_value(rows, claim.stated_effect, resplits) for claim, resplits in claims
    ]
    labels = {row["method"] for row in rows}
    return [
        claim.evaluate(rows, level, resplits)
        for (claim, resplits), level in zip(claims, holm_levels(p_values), strict=True)
        if {claim.method, claim.baseline} <= labels
    ]
