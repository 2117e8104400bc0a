"""Optimistix's L-BFGS, implicitly differentiated."""

import optimistix as optx

from .. import problems
from ..problems import Program
from ..work import GRADIENT, Data
from .optimistix import implicit, solved


def whole(data: Data) -> Program:
    solver = optx.LBFGS(rtol=GRADIENT, atol=GRADIENT)
    return solved(problems.logistic(data), solver, implicit())


WORKS = {"w1-whole": whole}
