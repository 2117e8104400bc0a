"""Inner solvers, which find ``w*(alpha)``."""

from .adapters import from_jaxopt, from_optimistix
from .base import InnerSolver, IterativeSolver, inner_stats
from .closed_form import ClosedForm
from .descent import Descent, piecewise_constant_schedule
from .lbfgs import LBFGS
from .newton import Newton

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
    "piecewise_constant_schedule",
]
