"""Smooth metrics, each beside the exact one.

``surrogate(scores, targets, *, temperature, where=None, weights=None)`` is
differentiable, ``surrogate.exact(scores, targets, *, where=None, weights=None)`` is
what people report; both in the metric's own orientation. `temperature_of` proposes a
temperature, `gap_metrics` reports how far the two are apart along a run.
"""

from .accuracy import Accuracy, Coverage, ExpectedAccuracy, SelectiveRisk, TopKAccuracy
from .auc import AUC, SquaredHingeAUC
from .calibration import CalibrationError
from .f_score import FBeta, Precision, Recall
from .gap import gap_metrics
from .overlap import Dice, IoU
from .protocol import Surrogate
from .soft_rank import soft_rank
from .temperature import temperature_of

__all__ = [
    "AUC",
    "Accuracy",
    "CalibrationError",
    "Coverage",
    "Dice",
    "ExpectedAccuracy",
    "FBeta",
    "IoU",
    "Precision",
    "Recall",
    "SelectiveRisk",
    "SquaredHingeAUC",
    "Surrogate",
    "TopKAccuracy",
    "gap_metrics",
    "soft_rank",
    "temperature_of",
]
