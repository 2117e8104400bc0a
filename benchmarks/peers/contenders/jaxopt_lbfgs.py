"""JAXopt's L-BFGS with implicit differentiation, its fastest accurate solver."""

import functools

import jaxopt
from jaxopt import linear_solve

from .. import problems
from ..problems import Program
from ..work import Data
from .jaxopt import hypergradient


def implicit_from_zero(data: Data, *, gradient: float, adjoint: float) -> Program:
    problem = problems.logistic(data)
    solver = jaxopt.LBFGS(
        problem.inner,
        tol=gradient,
        implicit_diff_solve=functools.partial(linear_solve.solve_cg, tol=adjoint),
    )
    return hypergradient(problem, lambda *args: solver.run(*args).params)


WORKS = {"w1-whole": implicit_from_zero}
