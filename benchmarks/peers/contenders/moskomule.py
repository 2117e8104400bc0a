"""moskomule's hypergrad: its conjugate gradients, `lr` at 1 as they are stated."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from .torch_losses import Parts, Problem, cleaning, flat, logistic

# Ours has that name too and lies where this runs: look there last.
sys.path.sort(key=lambda place: Path(place).resolve() == Path.cwd())
from hypergrad.approx_hypergrad import conjugate_gradient


def implicit(problem: Problem) -> Callable[[], np.ndarray]:
    """Of an inner minimiser."""

    def inner(parts: Parts, alphas: Parts) -> Tensor:
        return problem.inner_loss(parts, *alphas)

    def outer(parts: Parts, alphas: Parts) -> Tensor:
        return problem.outer_loss(parts)

    parts, alphas = tuple(problem.start), (problem.alpha.detach(),)
    return lambda: flat(
        conjugate_gradient(inner, outer, parts, alphas, problem.products, 1.0)
    )


WORKS = {
    "w1-solve": lambda data: implicit(logistic(data, solved=True)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "overhead-solve": lambda data: implicit(logistic(data, solved=True)),
}
