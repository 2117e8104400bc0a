"""Inner solvers of other libraries."""

from .jaxopt import from_jaxopt
from .optimistix import from_optimistix

__all__ = ["from_jaxopt", "from_optimistix"]
