"""Adapters of minimizers of other libraries to the interface of inner solvers."""

from .jaxopt import from_jaxopt
from .optimistix import from_optimistix

__all__ = ["from_jaxopt", "from_optimistix"]
