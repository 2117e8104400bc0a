"""PyTorch's own transformations, `torch.func`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap
from torch.nn import functional as F

from .torch_losses import (
    Params,
    Problem,
    convolutional_scores,
    flatten,
    from_torch_order,
    logistic,
    schedule,
    tasks,
)


def outer_value_fn(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Returns the outer loss after the inner run, as a function of alpha."""
    inner_grad_fn = grad(problem.inner_loss)

    def value(alpha: Tensor) -> Tensor:
        params = problem.init_params
        velocity = [torch.zeros_like(w) for w in params]
        rate = problem.rate(alpha)
        for step in range(problem.steps):
            gradient = inner_grad_fn(params, alpha, step)
            velocity = [
                g.add(v, alpha=problem.momentum)
                for v, g in zip(velocity, gradient, strict=True)
            ]
            params = [w - rate * v for w, v in zip(params, velocity, strict=True)]
        return problem.outer_loss(params)

    return value


def along_ones(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns the derivative along ones."""
    value, alpha = outer_value_fn(problem), problem.alpha.detach()
    return lambda: flatten(
        [jvp(value, (alpha,), (torch.ones_like(alpha),))[1].reshape(1)]
    )


def forward(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns all derivatives by forward mode."""
    gradient_fn, alpha = jacfwd(outer_value_fn(problem)), problem.alpha.detach()
    return lambda: flatten([gradient_fn(alpha)])


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Returns MAML, four tasks at a time; all would need many times the memory."""
    few_shot = tasks(data)
    gradient_fn = grad(
        lambda params, x, y: F.cross_entropy(convolutional_scores(params, x), y),
    )

    def loss(
        init: Params, x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor
    ) -> Tensor:
        params = init
        for _ in range(few_shot.steps):
            gradient = gradient_fn(params, x, y)
            params = [
                w.sub(g, alpha=few_shot.rate)
                for w, g in zip(params, gradient, strict=True)
            ]
        return F.cross_entropy(convolutional_scores(params, x_val), y_val)

    task_gradients = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), chunk_size=4)

    def call() -> np.ndarray:
        gradients = task_gradients(few_shot.init, *few_shot[:4])
        return flatten(from_torch_order(g.mean(0) for g in gradients))

    return call


WORKS = {
    "w1-forward": lambda data: along_ones(logistic(data)),
    "w3-forward": lambda data: forward(schedule(data)),
    "w4": maml,
}
