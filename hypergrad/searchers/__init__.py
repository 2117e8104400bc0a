"""How ``alpha`` is proposed without gradients."""

from .populations import Hyperband, PopulationBased, SuccessiveHalving
from .protocol import Searcher
from .random import Random

__all__ = [
    "Hyperband",
    "PopulationBased",
    "Random",
    "Searcher",
    "SuccessiveHalving",
]
