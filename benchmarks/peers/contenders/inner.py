"""The inner run alone in plain JAX, whose result, ``w``, is not compared."""

import functools

from .. import problems
from ..problems import Program
from ..work import Data
from .plain import final_w, final_w_of_schedule


def logistic(data: Data) -> Program:
    problem = problems.logistic(data)
    train, _, w, alpha = problem.arrays
    return Program(functools.partial(final_w, problem), train, w, alpha)


def cleaning(data: Data) -> Program:
    problem = problems.cleaning(data)
    train, _, w, alpha = problem.arrays
    return Program(functools.partial(final_w, problem), train, w, alpha)


def schedule(data: Data) -> Program:
    problem = problems.schedule(data)
    train, _, w, alpha = problem.arrays
    return Program(functools.partial(final_w_of_schedule, problem), train, w, alpha)


WORKS = {
    "w1-unrolled": logistic,
    "w1-forward": logistic,
    "w1-solve": logistic,
    "w1-whole": logistic,
    "w2-unrolled": cleaning,
    "w2-lowmem": cleaning,
    "w2-implicit": cleaning,
    "w3-1000": schedule,
    "w3-10000": schedule,
    "w3-forward": schedule,
    "w6": logistic,
    "overhead": logistic,
    "overhead-solve": logistic,
}
