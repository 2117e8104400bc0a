"""How ``alpha`` is proposed without gradients."""

from .protocol import Searcher
from .random import Random

__all__ = ["Random", "Searcher"]
