"""Searchers: rules that propose ``alpha`` without gradients.

Each searcher states a *budget*: the number of trials (or gradient-equivalents, for a
population) that suffice, on one small problem, for a best value within the stated
distance of the optimum. It is twice the median of what seeds 0 to 9 needed, rounded up
to tens (to hundreds for populations): a single run may need more, and a difference of a
factor of two between two searchers means nothing. Two budgets are no measurements: that
of `Grid` is its number of points, and that of `OneShot` is for a probability.

The value is the squared distance from the optimum in units of the axes' lengths, so
0.01 is a tenth of an axis. The space has two axes, one of them logarithmic (both are
linear for populations); "with choices" adds an `Integer` of 8 and a `Choice` of 3
values. `OneShot` and `Reinforce` choose one of twelve combinations.

Tested by ``pytest tests/search -k budget``.
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
