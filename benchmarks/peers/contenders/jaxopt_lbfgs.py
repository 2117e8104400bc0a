"""JAXopt's L-BFGS, implicitly differentiated: its best road to an accurate answer."""

import functools

import jaxopt
from jaxopt import linear_solve

from .. import problems
from ..problems import Program
from ..work import Data
from .jaxopt import hypergradient


def whole(data: Data, *, gradient: float, adjoint: float) -> Program:
    problem = problems.logistic(data)
    solver = jaxopt.LBFGS(
        problem.inner,
        tol=gradient,
        implicit_diff_solve=functools.partial(linear_solve.solve_cg, tol=adjoint),
    )
    return hypergradient(problem, lambda *given: solver.run(*given).params)


WORKS = {"w1-whole": whole}
