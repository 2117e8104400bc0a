"""How ``w*(alpha)`` is found."""

from .adapters import from_jaxopt, from_optimistix
from .descent import Descent
from .protocol import InnerSolver, IterativeSolver, inner_stats
from .second_order import LBFGS, ClosedForm, Newton
from .windows import windows

__all__ = [
    "LBFGS",
    "ClosedForm",
    "Descent",
    "InnerSolver",
    "IterativeSolver",
    "Newton",
    "from_jaxopt",
    "from_optimistix",
    "inner_stats",
    "windows",
]
