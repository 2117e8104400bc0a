"""Tests of estimators on problems whose hypergradients are known."""

from .conformance import RepeatedSteps, check_estimator, quadratic
from .trust import TrustCounts, UnitCounts, check_trust, trust_counts, unit_counts

__all__ = [
    "RepeatedSteps",
    "TrustCounts",
    "UnitCounts",
    "check_estimator",
    "check_trust",
    "quadratic",
    "trust_counts",
    "unit_counts",
]
