"""What `benchmarks.peers.work` states, in PyTorch, for each of its libraries.

Losses take `scores`, a function from inputs to the network's outputs, so that they
serve libraries that carry parameters in a module and those that carry them in a list.
"""

import os
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

Parts = list[Tensor] | tuple[Tensor, ...]
Scores = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """One bilevel problem.

    Attributes:
      alpha: hyperparameters, with gradient.
      start: parameters of the first step, or those at which an implicit answer is.
      network: outputs of a list of parameters and inputs.
      module: the same with its own parameters, of `start`, in their order.
      inner, outer: losses; an inner one of its step as well.
      rate: of gradient descent, a function of alpha.
    """

    alpha: Tensor
    start: list[Tensor]
    network: Callable[[Parts, Tensor], Tensor]
    module: Callable[[], nn.Module]
    inner: Callable[[Scores, Parts, Tensor, int], Tensor]
    outer: Callable[[Scores], Tensor]
    rate: Callable[[Tensor], Any]
    momentum: float
    steps: int
    products: int = 0

    def inner_loss(self, parts: Parts, alpha: Tensor, step: int = 0) -> Tensor:
        """Of a list of parameters."""
        return self.inner(lambda x: self.network(parts, x), parts, alpha, step)

    def outer_loss(self, parts: Parts) -> Tensor:
        """Of a list of parameters."""
        return self.outer(lambda x: self.network(parts, x))

    def inner_of(self, module: nn.Module, alpha: Tensor, step: int = 0) -> Tensor:
        """Of a module."""
        return self.inner(module, list(module.parameters()), alpha, step)


def logistic(data: dict[str, Any], solved: bool = False) -> Problem:
    """Logistic regression from 0, or at its minimiser."""
    given = by_columns(data)
    start = [given.w if solved else torch.zeros_like(given.w)]

    def inner(scores: Scores, parts: Parts, alpha: Tensor, _: int) -> Tensor:
        penalty = 0.5 * (alpha.exp() * parts[0].square()).sum()
        return F.softplus(-given.y * scores(given.x)).mean() + penalty

    return Problem(
        given.alpha.requires_grad_(),
        start,
        lambda parts, x: x @ parts[0],
        lambda: Linear(start[0]),
        inner,
        lambda scores: F.softplus(-given.y_val * scores(given.x_val)).mean(),
        lambda alpha: given.rate,
        given.momentum,
        given.steps,
        given.products,
    )


def cleaning(data: dict[str, Any]) -> Problem:
    """Hyper-cleaning, at ``w`` where that is given."""
    given = tensors(data)
    start = given.w if "w" in data else given.init

    def inner(scores: Scores, parts: Parts, alpha: Tensor, _: int) -> Tensor:
        losses = F.cross_entropy(scores(given.x), given.y, reduction="none")
        return (alpha.sigmoid() * losses).mean() + given.penalty * half(parts)

    return Problem(
        given.alpha.requires_grad_(),
        start,
        lambda parts, x: perceptron(parts, x, torch.relu),
        lambda: layers(start, nn.ReLU()),
        inner,
        lambda scores: F.cross_entropy(scores(given.x_val), given.y_val),
        lambda alpha: given.rate,
        given.momentum,
        given.steps,
        given.products,
    )


def schedule(data: dict[str, Any]) -> Problem:
    """A long run on batches, whose rate and penalties are sought."""
    given = tensors(data)

    def inner(scores: Scores, parts: Parts, alpha: Tensor, step: int) -> Tensor:
        batch = step % len(given.x)
        loss = F.cross_entropy(scores(given.x[batch]), given.y[batch])
        # Tensors without axes times numbers become float64 in `torch.func` (2.13.0).
        squares = torch.stack([w.square().sum() for w in (parts[0], parts[2])])
        return loss + 0.5 * torch.dot(alpha[1:].exp(), squares)

    return Problem(
        given.alpha.requires_grad_(),
        given.init,
        lambda parts, x: perceptron(parts, x, torch.tanh),
        lambda: layers(given.init, nn.Tanh()),
        inner,
        lambda scores: F.cross_entropy(scores(given.x_val), given.y_val),
        lambda alpha: alpha[0].exp(),
        given.momentum,
        given.steps,
    )


class Tasks(NamedTuple):
    """Few-shot tasks, images as PyTorch has them: channels before places."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    init: list[Tensor]
    steps: int
    rate: float


def tasks(data: dict[str, Any]) -> Tasks:
    """Kernels are (out, in, 3, 3) and the last weights (5, channels) here."""
    given = tensors(data)
    images = lambda x: x.movedim(-1, -3).contiguous()
    return Tasks(
        images(given.x),
        given.y,
        images(given.x_val),
        given.y_val,
        [turned(part) for part in given.init],
        given.steps,
        given.rate,
    )


def turned(part: Tensor) -> Tensor:
    """A part of ``init`` with PyTorch's outputs before inputs."""
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    return part.permute(order[part.ndim]).contiguous()


def stated(parts: Iterable[Tensor]) -> list[Tensor]:
    """Gradients at `Tasks.init`, turned back."""
    order = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
    return [part.permute(order[part.ndim]) for part in parts]


def perceptron(
    parts: Parts, x: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """One hidden layer; weights are (inputs, outputs)."""
    first, bias, second, last = parts
    return torch.addmm(last, activation(torch.addmm(bias, x, first)), second)


def convolutions(parts: Parts, x: Tensor) -> Tensor:
    """The few-shot network."""
    *blocks, weights, biases = parts
    for kernel, scale, shift in zip(*[iter(blocks)] * 3, strict=True):
        x = F.conv2d(x, kernel, padding=1)
        x = F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-5)
        x = F.max_pool2d(F.relu(x), 2)
    return F.linear(x.flatten(1), weights, biases)


class Linear(nn.Module):
    """Scores of one vector."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Alpha(nn.Module):
    """Hyperparameters."""

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(alpha.detach())

    def forward(self) -> Tensor:
        return self.alpha


def layers(parts: Parts, activation: nn.Module) -> nn.Module:
    """`perceptron` as a module; its weights are (outputs, inputs)."""
    sizes = [parts[0].shape, parts[2].shape]
    first, second = (nn.Linear(*size) for size in sizes)
    return filled(nn.Sequential(first, activation, second), [w.t() for w in parts])


def blocks(init: list[Tensor]) -> nn.Module:
    """`convolutions` as a module."""
    found: list[nn.Module] = []
    for kernel in init[:-2:3]:
        outputs, inputs = kernel.shape[:2]
        found += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    last = nn.Linear(init[-2].shape[1], init[-2].shape[0])
    return filled(nn.Sequential(*found, nn.Flatten(), last), init)


def filled(module: nn.Module, parts: Iterable[Tensor]) -> nn.Module:
    """`module` with `parts` as its parameters."""
    with torch.no_grad():
        for own, part in zip(module.parameters(), parts, strict=True):
            own.copy_(part)
    return module


def half(parts: Parts) -> Tensor:
    """Half the sum of squares."""
    return 0.5 * sum(part.square().sum() for part in parts)


def tensors(data: dict[str, Any]) -> SimpleNamespace:
    """Arrays as tensors that share their memory, whole numbers in 64 bits."""

    def tensor(value: Any) -> Any:
        if isinstance(value, list):
            return [tensor(one) for one in value]
        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(
            value.astype(np.int64) if value.dtype.kind == "i" else value
        )

    return SimpleNamespace(**{name: tensor(value) for name, value in data.items()})


def by_columns(data: dict[str, Any]) -> SimpleNamespace:
    """`tensors` of a linear model, a feature in one piece, as JAX's contenders have it.

    Its products by a vector take less than half of the time that they take by rows.
    """
    given = tensors(data)
    given.x, given.x_val = (x.t().contiguous().t() for x in (given.x, given.x_val))
    return given


def flat(parts: Iterable[Tensor]) -> np.ndarray:
    """One array of all."""
    return np.concatenate([part.detach().numpy().ravel() for part in parts])


def leaves(parts: Iterable[Tensor]) -> list[Tensor]:
    """Cut off from what they come from, with gradient."""
    return [part.detach().requires_grad_() for part in parts]


def minimise(problem: Problem, gradient: float) -> list[Tensor]:
    """The inner minimiser by L-BFGS, PyTorch's fastest at a smooth full batch.

    To `gradient` in the largest of its entries; without a line search: in float32
    losses are equal long before gradients are small.
    """
    alpha = problem.alpha.detach()
    parts = leaves(part.clone() for part in problem.start)
    solver = torch.optim.LBFGS(
        parts,
        max_iter=100,
        tolerance_grad=gradient,
        tolerance_change=0,
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = problem.inner_loss(parts, alpha)
        value.backward()
        return value

    solver.step(loss)
    return parts
