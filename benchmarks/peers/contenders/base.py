"""Ours again, as what an extra work of ours is compared to; answers are not compared.

`dispatch`: the jitted core called directly. `eight`: one of the losses. `compile`: a
hundred times the steps.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from .. import problems
from ..problems import Program
from ..work import Data
from . import ours


def one_of(data: Data) -> Program:
    return ours.logistic_solve(data | {"y_val": data["y_val"][0]})


def longer(data: Data) -> Program:
    return ours.anew(data | {"steps": 100 * data["steps"]})


def core(data: Data) -> Callable[[], np.ndarray]:
    """The same function under `jax.jit`, all that it tells included."""
    problem = problems.logistic(data, solved=True)
    f = jax.jit(ours.estimate(problem, ours.at_w(problem)))
    return lambda: problems.flat(f(*problem.arrays).hypergradient)


WORKS = {
    "dispatch": core,
    "eight": one_of,
    "compile": functools.partial(ours.compiles, longer),
}
