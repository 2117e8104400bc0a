"""Optimistix's L-BFGS with implicit differentiation."""

import optimistix as optx

from .. import problems
from ..problems import Program
from ..work import Data
from .optimistix import hypergradient_at_minimum, implicit_adjoint


def implicit_from_zero(data: Data, *, gradient: float, adjoint: float) -> Program:
    solver = optx.LBFGS(rtol=gradient, atol=gradient)
    problem = problems.logistic(data)
    return hypergradient_at_minimum(problem, solver, implicit_adjoint(adjoint))


WORKS = {"w1-whole": implicit_from_zero}
