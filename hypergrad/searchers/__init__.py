"""How ``alpha`` is proposed without gradients."""

from .grid import Grid
from .protocol import Searcher
from .random import Random
from .sobol import Sobol

__all__ = ["Grid", "Random", "Searcher", "Sobol"]
