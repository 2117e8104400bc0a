"""Betty: conjugate gradients between two of its problems."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor

from .torch_losses import Alpha, Problem, cleaning, flatten, logistic

logging.disable(logging.INFO)  # Betty logs to the stream of the results


def implicit(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns the gradient of a step of the outer problem."""

    class Inner(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            return problem.module_inner_loss(self.module, self.outer())

    class Outer(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            return problem.outer(self.inner)

    modules = {"inner": problem.module(), "outer": Alpha(problem.alpha)}
    configs = {
        "inner": Config(type="cg", cg_iterations=problem.products),
        "outer": Config(retain_graph=True),
    }
    inner, outer = (
        problem_class(
            name=name,
            config=configs[name],
            module=modules[name],
            optimizer=torch.optim.SGD(modules[name].parameters(), 0.1),
            train_data_loader=[(0,)],  # the losses contain the data
        )
        for name, problem_class in (("inner", Inner), ("outer", Outer))
    )
    Engine(
        problems=[outer, inner],
        config=EngineConfig(train_iters=1),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    inner.cur_batch = inner.get_batch()

    def call() -> np.ndarray:
        outer.zero_grad()
        outer.backward(
            loss=outer.training_step(outer.get_batch()),
            params=outer.trainable_parameters(),
            paths=outer.paths,
            retain_graph=True,
        )
        return flatten(alpha.grad for alpha in outer.parameters())

    return call


WORKS = {
    "w1-solve": lambda data: implicit(logistic(data, at_solution=True)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "overhead-solve": lambda data: implicit(logistic(data, at_solution=True)),
}
