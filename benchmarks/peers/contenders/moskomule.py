"""moskomule's hypergrad: conjugate gradients, with ``lr`` of 1 as in the method."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from .torch_losses import Params, Problem, cleaning, flatten, logistic

# The working directory contains our package of this name, so that it comes last.
sys.path.sort(key=lambda folder: Path(folder).resolve() == Path.cwd())
from hypergrad.approx_hypergrad import conjugate_gradient


def implicit(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns implicit differentiation at ``init_params``."""

    def inner(params: Params, alphas: Params) -> Tensor:
        return problem.inner_loss(params, *alphas)

    def outer(params: Params, alphas: Params) -> Tensor:
        return problem.outer_loss(params)

    params, alphas = tuple(problem.init_params), (problem.alpha.detach(),)
    return lambda: flatten(
        conjugate_gradient(inner, outer, params, alphas, problem.products, 1.0)
    )


WORKS = {
    "w1-solve": lambda data: implicit(logistic(data, at_solution=True)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "overhead-solve": lambda data: implicit(logistic(data, at_solution=True)),
}
