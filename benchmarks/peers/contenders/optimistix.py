"""Optimistix: by checkpoints of every step, and by the implicit function theorem."""

from typing import Any

import lineax as lx
import optax
import optimistix as optx

from .. import problems
from ..problems import Problem, Program
from ..work import Data
from .jaxopt import hypergradient

POSITIVE = frozenset({lx.positive_semidefinite_tag})


def solved(problem: Problem, solver: Any, adjoint: Any) -> Program:
    """At what ``solver`` finds within the work's steps."""

    def run(w, alpha, train):
        found = optx.minimise(
            lambda w, given: problem.inner(w, *given),
            solver,
            w,
            (alpha, train),
            adjoint=adjoint,
            max_steps=problem.given["steps"],
            throw=False,
            tags=POSITIVE,
        )
        return found.value

    return hypergradient(problem, run)


def descent(problem: Problem, tolerance: float) -> optx.OptaxMinimiser:
    given = problem.given
    optimizer = optax.sgd(given["rate"], given["momentum"])
    return optx.OptaxMinimiser(optimizer, rtol=tolerance, atol=tolerance)


def unrolled(problem: Problem) -> Program:
    adjoint = optx.RecursiveCheckpointAdjoint(checkpoints=problem.given["steps"])
    return solved(problem, descent(problem, 0.0), adjoint)


def implicit(tolerance: float) -> optx.ImplicitAdjoint:
    return optx.ImplicitAdjoint(lx.CG(rtol=tolerance, atol=0.0))


def whole(
    data: Data, *, rate: float, momentum: float, gradient: float, adjoint: float
) -> Program:
    problem = problems.logistic(data | {"rate": rate, "momentum": momentum})
    return solved(problem, descent(problem, gradient), implicit(adjoint))


def logistic_unrolled(data: Data) -> Program:
    return unrolled(problems.logistic(data))


WORKS = {
    "w1-unrolled": logistic_unrolled,
    "w1-whole": whole,
    "w2-unrolled": lambda data: unrolled(problems.cleaning(data)),
    "overhead": logistic_unrolled,
}
