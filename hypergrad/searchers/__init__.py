"""How ``alpha`` is proposed without gradients."""

from .cmaes import CMAES
from .gaussian_process import GaussianProcess
from .grid import Grid
from .nsga2 import NSGA2
from .populations import Hyperband, PopulationBased, SuccessiveHalving
from .protocol import Searcher
from .random import Random
from .reinforce import Reinforce
from .sobol import Sobol
from .tpe import TPE

__all__ = [
    "CMAES",
    "NSGA2",
    "TPE",
    "GaussianProcess",
    "Grid",
    "Hyperband",
    "PopulationBased",
    "Random",
    "Reinforce",
    "Searcher",
    "Sobol",
    "SuccessiveHalving",
]
