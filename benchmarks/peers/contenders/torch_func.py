"""PyTorch's own transformations, `torch.func`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap
from torch.nn import functional as F

from .torch_losses import (
    Parts,
    Problem,
    convolutions,
    flat,
    logistic,
    schedule,
    stated,
    tasks,
)


def trained(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The outer loss at the end of the run, a function of alpha."""
    slopes_of = grad(problem.inner_loss)

    def value(alpha: Tensor) -> Tensor:
        parts = problem.start
        speed = [torch.zeros_like(w) for w in parts]
        rate = problem.rate(alpha)
        for step in range(problem.steps):
            slopes = slopes_of(parts, alpha, step)
            speed = [
                g.add(v, alpha=problem.momentum)
                for v, g in zip(speed, slopes, strict=True)
            ]
            parts = [w - rate * v for w, v in zip(parts, speed, strict=True)]
        return problem.outer_loss(parts)

    return value


def along_ones(problem: Problem) -> Callable[[], np.ndarray]:
    """One derivative."""
    value, alpha = trained(problem), problem.alpha.detach()
    return lambda: flat([jvp(value, (alpha,), (torch.ones_like(alpha),))[1].reshape(1)])


def forward(problem: Problem) -> Callable[[], np.ndarray]:
    """All derivatives at once."""
    slopes, alpha = jacfwd(trained(problem)), problem.alpha.detach()
    return lambda: flat([slopes(alpha)])


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Four tasks at a time: all at once take many times the memory."""
    given = tasks(data)
    slopes_of = grad(
        lambda parts, x, y: F.cross_entropy(convolutions(parts, x), y),
    )

    def loss(init: Parts, x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> Tensor:
        parts = init
        for _ in range(given.steps):
            slopes = slopes_of(parts, x, y)
            parts = [
                w.sub(g, alpha=given.rate) for w, g in zip(parts, slopes, strict=True)
            ]
        return F.cross_entropy(convolutions(parts, x_val), y_val)

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=4)

    def call() -> np.ndarray:
        slopes = each(given.init, *given[:4])
        return flat(stated(g.mean(0) for g in slopes))

    return call


WORKS = {
    "w1-forward": lambda data: along_ones(logistic(data)),
    "w3-forward": lambda data: forward(schedule(data)),
    "w4": maml,
}
