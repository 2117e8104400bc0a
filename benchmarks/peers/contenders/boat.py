"""BOAT: gradient descent below, automatic differentiation (RAD) or CG above."""

import os
from collections.abc import Callable
from typing import Any

import boat_torch
import numpy as np
import torch
from torch import Tensor, nn

from .torch_losses import Alpha, Problem, cleaning, flat, logistic


def lower_loss(
    feed: dict[str, Any], alpha: nn.Module, module: nn.Module, **given: Any
) -> Tensor:
    """As BOAT calls it: `given` may hold the parameters of `module`."""
    parts = given.get("params", list(module.parameters()))
    return feed["problem"].inner(lambda x: module(x, **given), parts, alpha(), 0)


def upper_loss(
    feed: dict[str, Any], alpha: nn.Module, module: nn.Module, **given: Any
) -> Tensor:
    """As `lower_loss`."""
    return feed["problem"].outer(lambda x: module(x, **given))


def hypergradient(problem: Problem, operation: str) -> Callable[[], np.ndarray]:
    """Of one iteration, by an `operation` of its `na_ol`."""
    module, alpha = problem.module(), Alpha(problem.alpha)
    below = torch.optim.SGD(
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
        "lower_level_opt": below,
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
    both = boat_torch.Problem(
        config,
        {
            name: {"function": f"{loss.__module__}.{loss.__name__}"}
            for name, loss in names.items()
        },
    )
    both.build_ll_solver()
    both.build_ul_solver()
    feed = {"problem": problem}

    def call() -> np.ndarray:
        alpha.zero_grad()
        slopes, _ = both.run_iter(feed, feed, current_iter=0)
        return flat(slopes)

    return call


def whole(
    data: dict[str, Any], *, rate: float, momentum: float, steps: int, products: int
) -> Callable[[], np.ndarray]:
    """From 0: the heavy ball, as it has no other."""
    problem = logistic(data)._replace(
        rate=lambda alpha: rate, momentum=momentum, steps=steps, products=products
    )
    return hypergradient(problem, "CG")


WORKS = {
    "w1-unrolled": lambda data: hypergradient(logistic(data), "RAD"),
    "w1-whole": whole,
    "w2-unrolled": lambda data: hypergradient(cleaning(data), "RAD"),
    "overhead": lambda data: hypergradient(logistic(data), "RAD"),
}
