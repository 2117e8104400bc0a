"""TorchOpt: MetaSGD on modules, and implicit differentiation of functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchopt
from torch import Tensor
from torch.nn import functional as F

from .torch_losses import (
    Params,
    Problem,
    cleaning,
    convolutional_module,
    flatten,
    from_torch_order,
    inner_minimizer,
    logistic,
    schedule,
    tasks,
)


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns reverse mode through all steps."""
    module = problem.module()
    init_state = torchopt.extract_state_dict(module, by="reference")

    def call() -> np.ndarray:
        rate = problem.rate(problem.alpha)
        optimizer = torchopt.MetaSGD(module, lr=rate, momentum=problem.momentum)
        for step in range(problem.steps):
            optimizer.step(problem.module_inner_loss(module, problem.alpha, step))
        (gradient,) = torch.autograd.grad(problem.outer(module), [problem.alpha])
        torchopt.recover_state_dict(module, init_state)
        return flatten([gradient])

    return call


def implicit(
    problem: Problem, minimize: Callable[[], Params] | None = None
) -> Callable[[], np.ndarray]:
    """Returns implicit differentiation by conjugate gradients, at ``minimize()``."""

    def inner(params: Params, alpha: Tensor) -> Tensor:
        return problem.inner_loss(params, alpha)

    @torchopt.diff.implicit.custom_root(
        torch.func.grad(inner),
        argnums=1,
        solve=torchopt.linear_solve.solve_cg(maxiter=problem.products, rtol=1e-7),
    )
    def solve(params: Params, alpha: Tensor) -> Params:
        return params if minimize is None else tuple(minimize())

    def call() -> np.ndarray:
        params = solve(tuple(problem.init_params), problem.alpha)
        return flatten(torch.autograd.grad(problem.outer_loss(params), [problem.alpha]))

    return call


def implicit_from_zero(
    data: dict[str, Any], *, gradient: float, products: int
) -> Callable[[], np.ndarray]:
    """Returns L-BFGS from 0, followed by implicit differentiation."""
    problem = logistic(data)._replace(products=products)
    return implicit(problem, lambda: inner_minimizer(problem, gradient))


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Returns MAML, one task after another."""
    few_shot = tasks(data)
    module = convolutional_module(few_shot.init)
    optimizer = torchopt.MetaSGD(module, lr=few_shot.rate)
    init_params = torchopt.extract_state_dict(module, by="reference")
    init_state = torchopt.extract_state_dict(optimizer, by="reference")

    def call() -> np.ndarray:
        module.zero_grad()
        for x, y, x_val, y_val in zip(*few_shot[:4], strict=True):
            for _ in range(few_shot.steps):
                optimizer.step(F.cross_entropy(module(x), y))
            loss = F.cross_entropy(module(x_val), y_val)
            (loss / len(few_shot.x)).backward()
            torchopt.recover_state_dict(module, init_params)
            torchopt.recover_state_dict(optimizer, init_state)
        return flatten(from_torch_order(w.grad for w in module.parameters()))

    return call


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w1-solve": lambda data: implicit(logistic(data, at_solution=True)),
    "w1-whole": implicit_from_zero,
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "w3-1000": lambda data: unrolled(schedule(data)),
    "w3-10000": lambda data: unrolled(schedule(data)),
    "w4": maml,
    "overhead": lambda data: unrolled(logistic(data)),
    "overhead-solve": lambda data: implicit(logistic(data, at_solution=True)),
}
