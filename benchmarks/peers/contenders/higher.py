"""higher: differentiable SGD on a patched module."""

from collections.abc import Callable
from typing import Any

import higher
import numpy as np
import torch
from torch.nn import functional as F

from .torch_losses import (
    Problem,
    cleaning,
    convolutional_module,
    flatten,
    from_torch_order,
    logistic,
    schedule,
    tasks,
)


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns reverse mode through all steps."""
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), 1.0, momentum=problem.momentum)

    def call() -> np.ndarray:
        rate = {"lr": [problem.rate(problem.alpha)]}
        with higher.innerloop_ctx(module, optimizer, override=rate) as (inner, sgd):
            for step in range(problem.steps):
                loss = problem.module_inner_loss(inner, problem.alpha, step)
                sgd.step(loss)
            return flatten(torch.autograd.grad(problem.outer(inner), [problem.alpha]))

    return call


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Returns MAML, one task after another."""
    few_shot = tasks(data)
    module = convolutional_module(few_shot.init)
    optimizer = torch.optim.SGD(module.parameters(), few_shot.rate)

    def call() -> np.ndarray:
        module.zero_grad()
        for x, y, x_val, y_val in zip(*few_shot[:4], strict=True):
            with higher.innerloop_ctx(
                module, optimizer, copy_initial_weights=False
            ) as (inner, sgd):
                for _ in range(few_shot.steps):
                    sgd.step(F.cross_entropy(inner(x), y))
                loss = F.cross_entropy(inner(x_val), y_val)
                (loss / len(few_shot.x)).backward()
        return flatten(from_torch_order(w.grad for w in module.parameters()))

    return call


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w3-1000": lambda data: unrolled(schedule(data)),
    "w3-10000": lambda data: unrolled(schedule(data)),
    "w4": maml,
    "overhead": lambda data: unrolled(logistic(data)),
}
