"""Estimators of the hypergradient ``dM/dalpha``."""

from .average import Average
from .base import Estimate, Estimator
from .evolution import Evolution, PersistentEvolution
from .finite_difference import CentralDifference, FiniteDifference
from .fixed_point import FixedPoint
from .forward import Forward
from .implicit import Implicit
from .penalty import Penalty
from .reversible import Reversible
from .single_loop import (
    BOME,
    DARTS,
    F2SA,
    FSLA,
    MRBO,
    PZOBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    StocBiO,
)
from .unrolled import Unrolled, unrolled_estimator

__all__ = [
    "BOME",
    "DARTS",
    "F2SA",
    "FSLA",
    "MRBO",
    "PZOBO",
    "SABA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "VRBO",
    "AmIGO",
    "Average",
    "CentralDifference",
    "Estimate",
    "Estimator",
    "Evolution",
    "FiniteDifference",
    "FixedPoint",
    "Forward",
    "Implicit",
    "Penalty",
    "PersistentEvolution",
    "Reversible",
    "StocBiO",
    "Unrolled",
    "unrolled_estimator",
]
