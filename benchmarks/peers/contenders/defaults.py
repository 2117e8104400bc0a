"""hypergrad as its README calls it: `hypergradient` with all fields of an estimate.

The estimators have their defaults, so that `Implicit` estimates its error, and so has
`CG` in w1-whole. Where the work is a number of products, `CG` has no preconditioner,
and the estimate of the error makes up to 25 products of its own. The module `ours`
returns the hypergradient alone.
"""

from collections.abc import Callable

import numpy as np

import hypergrad as hg

from .. import problems
from ..problems import Problem
from ..work import Data
from .ours import (
    cyclic_descent,
    dispatch,
    heavy_ball,
    hypergradient_call,
    implicit_at_w,
)


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    return hypergradient_call(problem, hg.Unrolled(heavy_ball(problem)))


def logistic_forward(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.logistic(data)
    problem = problem._replace(alpha=problem.alpha[0])
    return hypergradient_call(problem, hg.Forward(heavy_ball(problem)))


def logistic_whole(
    data: Data, *, gradient: float, adjoint: float
) -> Callable[[], np.ndarray]:
    estimator = hg.Implicit(hg.Newton(tolerance=gradient), hg.CG(rtol=adjoint))
    return hypergradient_call(problems.logistic(data), estimator)


def cleaning_implicit(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.cleaning(data, at_solution=True)
    return hypergradient_call(problem, implicit_at_w(problem))


def schedule(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.schedule(data)
    return hypergradient_call(problem, hg.Unrolled(cyclic_descent(problem)))


WORKS = {
    "w1-unrolled": lambda data: unrolled(problems.logistic(data)),
    "w1-forward": logistic_forward,
    "w1-solve": dispatch,
    "w1-whole": logistic_whole,
    "w2-unrolled": lambda data: unrolled(problems.cleaning(data)),
    "w2-implicit": cleaning_implicit,
    "w3-1000": schedule,
    "overhead": lambda data: unrolled(problems.logistic(data)),
    "overhead-solve": dispatch,
}
