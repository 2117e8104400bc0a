"""BOAT: gradient descent, with automatic differentiation (RAD) or CG."""

import os
from collections.abc import Callable
from typing import Any

import boat_torch
import numpy as np
import torch
from torch import Tensor, nn

from .torch_losses import Alpha, Problem, cleaning, flatten, logistic


def lower_loss(
    feed: dict[str, Any], alpha: nn.Module, module: nn.Module, **kwargs: Any
) -> Tensor:
    """Returns the inner loss; BOAT may pass the parameters of ``module``."""
    params = kwargs.get("params", list(module.parameters()))
    return feed["problem"].inner(lambda x: module(x, **kwargs), params, alpha(), 0)


def upper_loss(
    feed: dict[str, Any], alpha: nn.Module, module: nn.Module, **kwargs: Any
) -> Tensor:
    """Returns the outer loss; BOAT may pass the parameters of ``module``."""
    return feed["problem"].outer(lambda x: module(x, **kwargs))


def hypergradient(problem: Problem, operation: str) -> Callable[[], np.ndarray]:
    """Returns the hypergradient of one iteration by an operation of ``na_op``."""
    module, alpha = problem.module(), Alpha(problem.alpha)
    inner_optimizer = torch.optim.SGD(
        module.parameters(), problem.rate(problem.alpha), momentum=problem.momentum
    )
    config = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": [operation],
        "lower_level_model": module,
        "upper_level_model": alpha,
        "lower_level_var": list(module.parameters()),
        "upper_level_var": list(alpha.parameters()),
        "lower_level_opt": inner_optimizer,
        "upper_level_opt": torch.optim.SGD(alpha.parameters(), 0.1),
        "lower_iters": problem.steps,
        "device": "cpu",
        "return_grad": True,
        "accumulate_grad": False,
        "copy_last_param": False,
        "loss_log_path": os.devnull,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
        "RGT": {"truncate_iter": 0},
        "CG": {"k": problem.products, "tolerance": 1e-10},
    }
    names = {"lower_level_loss": lower_loss, "upper_level_loss": upper_loss}
    bilevel = boat_torch.Problem(
        config,
        {
            name: {"function": f"{loss.__module__}.{loss.__name__}"}
            for name, loss in names.items()
        },
    )
    bilevel.build_ll_solver()
    bilevel.build_ul_solver()
    feed = {"problem": problem}

    def call() -> np.ndarray:
        alpha.zero_grad()
        gradient, _ = bilevel.run_iter(feed, feed, current_iter=0)
        return flatten(gradient)

    return call


def implicit_from_zero(
    data: dict[str, Any], *, rate: float, momentum: float, steps: int, products: int
) -> Callable[[], np.ndarray]:
    """Returns heavy-ball descent from 0, its only solver, followed by CG."""
    problem = logistic(data)._replace(
        rate=lambda alpha: rate, momentum=momentum, steps=steps, products=products
    )
    return hypergradient(problem, "CG")


WORKS = {
    "w1-unrolled": lambda data: hypergradient(logistic(data), "RAD"),
    "w1-whole": implicit_from_zero,
    "w2-unrolled": lambda data: hypergradient(cleaning(data), "RAD"),
    "overhead": lambda data: hypergradient(logistic(data), "RAD"),
}
