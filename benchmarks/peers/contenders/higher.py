"""higher: its differentiable SGD on a patched module."""

from collections.abc import Callable
from typing import Any

import higher
import numpy as np
import torch
from torch.nn import functional as F

from .torch_losses import (
    Problem,
    blocks,
    cleaning,
    flat,
    logistic,
    schedule,
    stated,
    tasks,
)


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Reverse through all steps."""
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), 1.0, momentum=problem.momentum)

    def call() -> np.ndarray:
        rate = {"lr": [problem.rate(problem.alpha)]}
        with higher.innerloop_ctx(module, optimizer, override=rate) as (inner, descent):
            for step in range(problem.steps):
                descent.step(problem.inner_of(inner, problem.alpha, step))
            return flat(torch.autograd.grad(problem.outer(inner), [problem.alpha]))

    return call


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """One task after another."""
    given = tasks(data)
    module = blocks(given.init)
    optimizer = torch.optim.SGD(module.parameters(), given.rate)

    def call() -> np.ndarray:
        module.zero_grad()
        for x, y, x_val, y_val in zip(*given[:4], strict=True):
            with higher.innerloop_ctx(
                module, optimizer, copy_initial_weights=False
            ) as (inner, descent):
                for _ in range(given.steps):
                    descent.step(F.cross_entropy(inner(x), y))
                loss = F.cross_entropy(inner(x_val), y_val)
                (loss / len(given.x)).backward()
        return flat(stated(w.grad for w in module.parameters()))

    return call


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w3-1000": lambda data: unrolled(schedule(data)),
    "w3-10000": lambda data: unrolled(schedule(data)),
    "w4": maml,
    "overhead": lambda data: unrolled(logistic(data)),
}
