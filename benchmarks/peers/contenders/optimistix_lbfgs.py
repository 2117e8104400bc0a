"""Optimistix's L-BFGS, implicitly differentiated."""

import optimistix as optx

from .. import problems
from ..problems import Program
from ..work import Data
from .optimistix import implicit, solved


def whole(data: Data, *, gradient: float, adjoint: float) -> Program:
    solver = optx.LBFGS(rtol=gradient, atol=gradient)
    return solved(problems.logistic(data), solver, implicit(adjoint))


WORKS = {"w1-whole": whole}
