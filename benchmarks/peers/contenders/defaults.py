"""hypergrad as its README calls it: a ready function, and all that an estimate tells.

Estimators are by their defaults, so that `Unrolled` keeps checkpoints; `ours` beside it
asks for the hypergradient alone.
"""

from collections.abc import Callable

import numpy as np

import hypergrad as hg

from .. import problems
from ..problems import Problem
from ..work import Data
from .ours import at_w, dispatch, momentum, ready, scheduled


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    return ready(problem, hg.Unrolled(momentum(problem)))


def logistic_forward(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.logistic(data)
    problem = problem._replace(alpha=problem.alpha[0])
    return ready(problem, hg.Forward(momentum(problem)))


def logistic_whole(
    data: Data, *, gradient: float, adjoint: float
) -> Callable[[], np.ndarray]:
    inner = hg.Newton(tolerance=gradient)
    return ready(problems.logistic(data), hg.Implicit(inner, hg.CG(rtol=adjoint)))


def cleaning_implicit(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.cleaning(data, solved=True)
    return ready(problem, at_w(problem))


def schedule(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.schedule(data)
    return ready(problem, hg.Unrolled(scheduled(problem)))


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
