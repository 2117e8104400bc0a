"""Optimistix with checkpoints of every step, or with implicit differentiation."""

from typing import Any

import lineax as lx
import optax
import optimistix as optx

from .. import problems
from ..problems import Problem, Program
from ..work import Data
from .jaxopt import hypergradient

POSITIVE = frozenset({lx.positive_semidefinite_tag})


def hypergradient_at_minimum(problem: Problem, solver: Any, adjoint: Any) -> Program:
    """Returns the gradient at the result of ``solver`` within the work's steps."""

    def run(w, alpha, train):
        solution = optx.minimise(
            lambda w, args: problem.inner(w, *args),
            solver,
            w,
            (alpha, train),
            adjoint=adjoint,
            max_steps=problem.constants["steps"],
            throw=False,
            tags=POSITIVE,
        )
        return solution.value

    return hypergradient(problem, run)


def descent(problem: Problem, tolerance: float) -> optx.OptaxMinimiser:
    constants = problem.constants
    optimizer = optax.sgd(constants["rate"], constants["momentum"])
    return optx.OptaxMinimiser(optimizer, rtol=tolerance, atol=tolerance)


def unrolled(problem: Problem) -> Program:
    adjoint = optx.RecursiveCheckpointAdjoint(checkpoints=problem.constants["steps"])
    return hypergradient_at_minimum(problem, descent(problem, 0.0), adjoint)


def implicit_adjoint(tolerance: float) -> optx.ImplicitAdjoint:
    return optx.ImplicitAdjoint(lx.CG(rtol=tolerance, atol=0.0))


def implicit_from_zero(
    data: Data, *, rate: float, momentum: float, gradient: float, adjoint: float
) -> Program:
    problem = problems.logistic(data | {"rate": rate, "momentum": momentum})
    return hypergradient_at_minimum(
        problem, descent(problem, gradient), implicit_adjoint(adjoint)
    )


def logistic_unrolled(data: Data) -> Program:
    return unrolled(problems.logistic(data))


WORKS = {
    "w1-unrolled": logistic_unrolled,
    "w1-whole": implicit_from_zero,
    "w2-unrolled": lambda data: unrolled(problems.cleaning(data)),
    "overhead": logistic_unrolled,
}
