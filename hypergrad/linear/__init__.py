"""Linear solvers, which apply ``H^-1`` through the interface of lineax.

The solvers of lineax can be used in their place. Those of this package also count their
products and report what they observe of the spectrum of ``H``.
"""

from .cg import CG
from .identity import Identity
from .minres import MINRES
from .neumann import Neumann
from .nystrom import Nystrom, NystromCG

__all__ = ["CG", "MINRES", "Identity", "Neumann", "Nystrom", "NystromCG"]
