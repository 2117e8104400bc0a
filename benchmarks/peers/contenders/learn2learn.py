"""learn2learn: MAML."""

from collections.abc import Callable
from typing import Any

import numpy as np
from learn2learn.algorithms import MAML
from torch.nn import functional as F

from .torch_losses import convolutional_module, flatten, from_torch_order, tasks


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Returns MAML, one task after another."""
    few_shot = tasks(data)
    module = MAML(convolutional_module(few_shot.init), lr=few_shot.rate)

    def call() -> np.ndarray:
        module.zero_grad()
        for x, y, x_val, y_val in zip(*few_shot[:4], strict=True):
            learner = module.clone()
            for _ in range(few_shot.steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            loss = F.cross_entropy(learner(x_val), y_val)
            (loss / len(few_shot.x)).backward()
        return flatten(from_torch_order(w.grad for w in module.parameters()))

    return call


WORKS = {"w4": maml}
