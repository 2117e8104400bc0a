"""Smooth metrics, each together with the exact metric.

``surrogate(scores, targets, *, temperature, where=None, weights=None)`` is
differentiable, and ``surrogate.exact(scores, targets, *, where=None, weights=None)`` is
the metric that people report. Both have the orientation of the metric. `Surrogate`
states what they have in common and how to write one, `temperature_from_scores` proposes
a temperature, and `gap_metrics` records along a run how far both are apart.
"""

from .accuracy import Accuracy, Coverage, ExpectedAccuracy, SelectiveRisk, TopKAccuracy
from .auc import AUC, SquaredHingeAUC
from .average_precision import BlackboxAP, FastAP, SmoothAP, SoftRankAP
from .base import Surrogate
from .calibration import CalibrationError
from .detection import DetectionAP, match_boxes
from .f_score import CountRatio, FBeta, Precision, Recall
from .gap_metrics import gap_metrics
from .inputs import Examples
from .overlap import AreaRatio, Dice, IoU
from .ranking import RankingSurrogate
from .retrieval import MRR, NDCG, PrecisionAtK, RecallAtK
from .soft_rank import soft_rank
from .temperature import temperature_from_scores

__all__ = [
    "AUC",
    "MRR",
    "NDCG",
    "Accuracy",
    "AreaRatio",
    "BlackboxAP",
    "CalibrationError",
    "CountRatio",
    "Coverage",
    "DetectionAP",
    "Dice",
    "Examples",
    "ExpectedAccuracy",
    "FBeta",
    "FastAP",
    "IoU",
    "Precision",
    "PrecisionAtK",
    "RankingSurrogate",
    "Recall",
    "RecallAtK",
    "SelectiveRisk",
    "SmoothAP",
    "SoftRankAP",
    "SquaredHingeAUC",
    "Surrogate",
    "TopKAccuracy",
    "gap_metrics",
    "match_boxes",
    "soft_rank",
    "temperature_from_scores",
]
