"""The programs of hypergrad that its works without a peer are compared with.

`dispatch`: the jitted core, called directly. `eight`: one of the losses. `compile`: a
hundred times the steps. Results are not compared.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from .. import problems
from ..problems import Program
from ..work import Data
from . import ours


def single_loss(data: Data) -> Program:
    """Returns the estimate for the first of the losses."""
    return ours.logistic_solve(data | {"y_val": data["y_val"][0]})


def longer_unrolled(data: Data) -> Program:
    """Returns reverse mode through a hundred times the steps."""
    return ours.untraced_unrolled(data | {"steps": 100 * data["steps"]})


def jitted_core(data: Data) -> Callable[[], np.ndarray]:
    """Returns the same function under `jax.jit`, with all fields of the estimate."""
    problem = problems.logistic(data, at_solution=True)
    f = jax.jit(ours.estimate_fn(problem, ours.implicit_at_w(problem)))
    return lambda: problems.flatten(f(*problem.arrays).hypergradient)


WORKS = {
    "dispatch": jitted_core,
    "eight": single_loss,
    "compile": functools.partial(ours.recompiling_call, longer_unrolled),
}
