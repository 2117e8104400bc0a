"""How ``H^-1`` is applied: linear solvers with lineax's interface.

lineax's own solvers work wherever these do; the ones here report what lineax's do not.
"""

from .cg import CG
from .identity import Identity
from .neumann import Neumann
from .nystrom import Nystrom, NystromCG

__all__ = ["CG", "Identity", "Neumann", "Nystrom", "NystromCG"]
