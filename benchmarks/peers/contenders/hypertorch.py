"""hypertorch, of Grazzi and others, which is imported as `hypergrad`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .torch_losses import (
    Parts,
    Problem,
    cleaning,
    flat,
    leaves,
    logistic,
    minimise,
    schedule,
)

# Ours has that name too and lies where this runs: look there last.
sys.path.sort(key=lambda place: Path(place).resolve() == Path.cwd())
import hypergrad


def losses(problem: Problem) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """As it takes them; speeds come after the parameters."""
    number = len(problem.start)
    return (
        lambda parts, alphas, step=(0,): problem.inner_loss(parts, *alphas, *step),
        lambda parts, alphas: problem.outer_loss(parts[:number]),
    )


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Reverse through all steps at once."""
    inner, outer = losses(problem)
    descent = hypergrad.Momentum(
        inner, lambda alphas: problem.rate(*alphas), problem.momentum
    )

    def call() -> np.ndarray:
        alphas = [problem.alpha]
        state = descent.get_opt_params(leaves(problem.start))
        for _ in range(problem.steps):
            state = descent(state, alphas)
        return flat(hypergrad.reverse_unroll(state, alphas, outer, set_grad=False))

    return call


def recomputed(problem: Problem, batches: int) -> Callable[[], np.ndarray]:
    """Reverse through one step at a time, each done again from its kept state."""
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
        states = [steps[0].get_opt_params(leaves(problem.start))]
        for step in steps:
            states.append(leaves(step(states[-1], alphas, create_graph=False)))
        return flat(hypergrad.reverse(states, alphas, steps, outer, set_grad=False))

    return call


def implicit(
    problem: Problem, at: Callable[[], Parts] | None = None
) -> Callable[[], np.ndarray]:
    """By its conjugate gradients on the map of one step of gradient descent."""
    inner, outer = losses(problem)
    step = hypergrad.GradientDescent(inner, 1.0)

    def call() -> np.ndarray:
        parts = problem.start if at is None else at()
        slopes = hypergrad.CG(
            parts, [problem.alpha], problem.products, step, outer, set_grad=False
        )
        return flat(slopes)

    return call


def whole(
    data: dict[str, Any], *, gradient: float, products: int
) -> Callable[[], np.ndarray]:
    """From 0: L-BFGS, then conjugate gradients."""
    problem = logistic(data)._replace(products=products)
    return implicit(problem, lambda: minimise(problem, gradient))


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w1-solve": lambda data: implicit(logistic(data, solved=True)),
    "w1-whole": whole,
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "w3-1000": lambda data: recomputed(schedule(data), len(data["x"])),
    "w3-10000": lambda data: recomputed(schedule(data), len(data["x"])),
    "overhead": lambda data: unrolled(logistic(data)),
    "overhead-solve": lambda data: implicit(logistic(data, solved=True)),
}
