"""How ``alpha`` is proposed without gradients.

Each states a *budget*: what it takes, on the median of seeds 0 to 9, to come so near to
the optimum's value. The value is the squared distance from the optimum, in units of the
axes' lengths: within 0.01 is a tenth of an axis. There are two axes, one of them
logarithmic; of populations both are linear. Where a budget says so, an integer and a
choice stand beside them; `OneShot` and `Reinforce` have twelve choices alone.
Tested by ``pytest tests/test_searchers.py tests/test_populations.py -k budget``.
"""

from .base import Searcher
from .cmaes import CMAES
from .evolution import EvolutionStrategy
from .gaussian_process import GaussianProcess
from .grid import Grid
from .halving import Hyperband, SuccessiveHalving
from .nsga2 import NSGA2
from .one_shot import OneShot
from .population_based import PopulationBasedTraining
from .random import Random
from .reinforce import Reinforce
from .sobol import Sobol
from .tpe import TPE

__all__ = [
    "CMAES",
    "NSGA2",
    "TPE",
    "EvolutionStrategy",
    "GaussianProcess",
    "Grid",
    "Hyperband",
    "OneShot",
    "PopulationBasedTraining",
    "Random",
    "Reinforce",
    "Searcher",
    "Sobol",
    "SuccessiveHalving",
]
