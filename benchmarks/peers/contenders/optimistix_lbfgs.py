"""Optimistix's L-BFGS, implicitly differentiated."""

import optimistix as optx

from .. import problems
from ..problems import Program
from ..work import Data
from .optimistix import implicit, solved

TOLERANCE = 1e-4


def whole(data: Data) -> Program:
    solver = optx.LBFGS(rtol=TOLERANCE, atol=TOLERANCE)
    return solved(problems.logistic(data), solver, implicit())


WORKS = {"w1-whole": whole}
