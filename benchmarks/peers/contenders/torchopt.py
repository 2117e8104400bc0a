"""TorchOpt: its MetaSGD on modules, and its implicit rule on functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchopt
from torch import Tensor
from torch.nn import functional as F

from .torch_losses import (
    Parts,
    Problem,
    blocks,
    cleaning,
    flat,
    logistic,
    minimise,
    schedule,
    stated,
    tasks,
)


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Reverse through all steps."""
    module = problem.module()
    start = torchopt.extract_state_dict(module, by="reference")

    def call() -> np.ndarray:
        rate = problem.rate(problem.alpha)
        descent = torchopt.MetaSGD(module, lr=rate, momentum=problem.momentum)
        for step in range(problem.steps):
            descent.step(problem.inner_of(module, problem.alpha, step))
        (slope,) = torch.autograd.grad(problem.outer(module), [problem.alpha])
        torchopt.recover_state_dict(module, start)
        return flat([slope])

    return call


def implicit(
    problem: Problem, at: Callable[[], Parts] | None = None
) -> Callable[[], np.ndarray]:
    """By its conjugate gradients, no further than float32 goes."""

    def inner(parts: Parts, alpha: Tensor) -> Tensor:
        return problem.inner_loss(parts, alpha)

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(inner),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=problem.products, rtol=1e-7),
    )
    def solve(parts: Parts, alpha: Tensor) -> Parts:
        return parts if at is None else tuple(at())

    def call() -> np.ndarray:
        parts = solve(tuple(problem.start), problem.alpha)
        return flat(torch.autograd.grad(problem.outer_loss(parts), [problem.alpha]))

    return call


def whole(
    data: dict[str, Any], *, gradient: float, products: int
) -> Callable[[], np.ndarray]:
    """From 0: L-BFGS, then conjugate gradients."""
    problem = logistic(data)._replace(products=products)
    return implicit(problem, lambda: minimise(problem, gradient))


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """One task after another."""
    given = tasks(data)
    module = blocks(given.init)
    descent = torchopt.MetaSGD(module, lr=given.rate)
    start = torchopt.extract_state_dict(module, by="reference")
    fresh = torchopt.extract_state_dict(descent, by="reference")

    def call() -> np.ndarray:
        module.zero_grad()
        for x, y, x_val, y_val in zip(*given[:4], strict=True):
            for _ in range(given.steps):
                descent.step(F.cross_entropy(module(x), y))
            loss = F.cross_entropy(module(x_val), y_val)
            (loss / len(given.x)).backward()
            torchopt.recover_state_dict(module, start)
            torchopt.recover_state_dict(descent, fresh)
        return flat(stated(w.grad for w in module.parameters()))

    return call


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w1-solve": lambda data: implicit(logistic(data, solved=True)),
    "w1-whole": whole,
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "w3-1000": lambda data: unrolled(schedule(data)),
    "w3-10000": lambda data: unrolled(schedule(data)),
    "w4": maml,
    "overhead": lambda data: unrolled(logistic(data)),
    "overhead-solve": lambda data: implicit(logistic(data, solved=True)),
}
