"""hypertorch (Grazzi et al. 2020), which is imported as `hypergrad`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .torch_losses import (
    Params,
    Problem,
    as_leaves,
    cleaning,
    flatten,
    inner_minimizer,
    logistic,
    schedule,
)

# The working directory contains our package of this name, so that it comes last.
sys.path.sort(key=lambda folder: Path(folder).resolve() == Path.cwd())
import hypergrad


def losses(problem: Problem) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Returns losses with hypertorch's signature; a state ends with the velocity."""
    num_params = len(problem.init_params)
    return (
        lambda params, alphas, step=(0,): problem.inner_loss(params, *alphas, *step),
        lambda state, alphas: problem.outer_loss(state[:num_params]),
    )


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns reverse mode through all steps."""
    inner, outer = losses(problem)
    descent = hypergrad.Momentum(
        inner, lambda alphas: problem.rate(*alphas), problem.momentum
    )

    def call() -> np.ndarray:
        alphas = [problem.alpha]
        state = descent.get_opt_params(as_leaves(problem.init_params))
        for _ in range(problem.steps):
            state = descent(state, alphas)
        return flatten(hypergrad.reverse_unroll(state, alphas, outer, set_grad=False))

    return call


def recomputed(problem: Problem, batches: int) -> Callable[[], np.ndarray]:
    """Returns reverse mode step by step, each repeated from its stored state."""
    inner, outer = losses(problem)
    descents = [
        hypergrad.Momentum(
            inner, lambda alphas: problem.rate(*alphas), problem.momentum, (batch,)
        )
        for batch in range(batches)
    ]
    steps = [descents[step % batches] for step in range(problem.steps)]

    def call() -> np.ndarray:
        alphas = [problem.alpha]
        states = [steps[0].get_opt_params(as_leaves(problem.init_params))]
        for step in steps:
            states.append(as_leaves(step(states[-1], alphas, create_graph=False)))
        return flatten(hypergrad.reverse(states, alphas, steps, outer, set_grad=False))

    return call


def implicit(
    problem: Problem, solve: Callable[[], Params] | None = None
) -> Callable[[], np.ndarray]:
    """Returns hypertorch's CG on the map of one step of gradient descent."""
    inner, outer = losses(problem)
    step = hypergrad.GradientDescent(inner, 1.0)

    def call() -> np.ndarray:
        params = problem.init_params if solve is None else solve()
        gradient = hypergrad.CG(
            params, [problem.alpha], problem.products, step, outer, set_grad=False
        )
        return flatten(gradient)

    return call


def implicit_from_zero(
    data: dict[str, Any], *, gradient: float, products: int
) -> Callable[[], np.ndarray]:
    """Returns L-BFGS from 0, followed by implicit differentiation."""
    problem = logistic(data)._replace(products=products)
    return implicit(problem, lambda: inner_minimizer(problem, gradient))


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w1-solve": lambda data: implicit(logistic(data, at_solution=True)),
    "w1-whole": implicit_from_zero,
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "w3-1000": lambda data: recomputed(schedule(data), len(data["x"])),
    "w3-10000": lambda data: recomputed(schedule(data), len(data["x"])),
    "overhead": lambda data: unrolled(logistic(data)),
    "overhead-solve": lambda data: implicit(logistic(data, at_solution=True)),
}
