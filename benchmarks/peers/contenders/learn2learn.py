"""learn2learn: its MAML."""

from collections.abc import Callable
from typing import Any

import numpy as np
from learn2learn.algorithms import MAML
from torch.nn import functional as F

from .torch_losses import blocks, flat, stated, tasks


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """One task after another."""
    given = tasks(data)
    module = MAML(blocks(given.init), lr=given.rate)

    def call() -> np.ndarray:
        module.zero_grad()
        for x, y, x_val, y_val in zip(*given[:4], strict=True):
            learner = module.clone()
            for _ in range(given.steps):
                learner.adapt(F.cross_entropy(learner(x), y))
            loss = F.cross_entropy(learner(x_val), y_val)
            (loss / len(given.x)).backward()
        return flat(stated(w.grad for w in module.parameters()))

    return call


WORKS = {"w4": maml}
