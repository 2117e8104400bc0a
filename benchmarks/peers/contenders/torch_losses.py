"""The works of `benchmarks.peers.work` as PyTorch losses.

Losses take ``scores``, a function from inputs to the network's outputs, so that they
fit libraries with parameters in a module and those with parameters in a list.
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

Params = list[Tensor] | tuple[Tensor, ...]
ScoresFn = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """A bilevel problem.

    Attributes:
      alpha: Hyperparameters, with ``requires_grad``.
      init_params: Parameters before the first step, or at which an implicit result is
        computed.
      network: Function ``(params, inputs) -> scores``.
      module: Function that returns the network as a module with ``init_params``.
      inner: Function ``(scores, params, alpha, step) -> loss``.
      outer: Function ``scores -> loss``.
      rate: Function ``alpha -> rate`` of gradient descent.
      momentum, steps, products: Constants of the work.
    """

    alpha: Tensor
    init_params: list[Tensor]
    network: Callable[[Params, Tensor], Tensor]
    module: Callable[[], nn.Module]
    inner: Callable[[ScoresFn, Params, Tensor, int], Tensor]
    outer: Callable[[ScoresFn], Tensor]
    rate: Callable[[Tensor], Any]
    momentum: float
    steps: int
    products: int = 0

    def inner_loss(self, params: Params, alpha: Tensor, step: int = 0) -> Tensor:
        """Returns the inner loss of a list of parameters."""
        return self.inner(lambda x: self.network(params, x), params, alpha, step)

    def outer_loss(self, params: Params) -> Tensor:
        """Returns the outer loss of a list of parameters."""
        return self.outer(lambda x: self.network(params, x))

    def module_inner_loss(
        self, module: nn.Module, alpha: Tensor, step: int = 0
    ) -> Tensor:
        """Returns the inner loss of a module."""
        return self.inner(module, list(module.parameters()), alpha, step)


def logistic(data: dict[str, Any], at_solution: bool = False) -> Problem:
    """Returns logistic regression at 0, or at the minimizer."""
    tensors = as_column_major_tensors(data)
    init_params = [tensors.w if at_solution else torch.zeros_like(tensors.w)]

    def inner(scores: ScoresFn, params: Params, alpha: Tensor, _: int) -> Tensor:
        penalty = 0.5 * (alpha.exp() * params[0].square()).sum()
        return F.softplus(-tensors.y * scores(tensors.x)).mean() + penalty

    return Problem(
        tensors.alpha.requires_grad_(),
        init_params,
        lambda params, x: x @ params[0],
        lambda: Linear(init_params[0]),
        inner,
        lambda scores: F.softplus(-tensors.y_val * scores(tensors.x_val)).mean(),
        lambda alpha: tensors.rate,
        tensors.momentum,
        tensors.steps,
        tensors.products,
    )


def cleaning(data: dict[str, Any]) -> Problem:
    """Returns hyper-cleaning, at ``w`` if the data contains it."""
    tensors = as_tensors(data)
    init_params = tensors.w if "w" in data else tensors.init

    def inner(scores: ScoresFn, params: Params, alpha: Tensor, _: int) -> Tensor:
        losses = F.cross_entropy(scores(tensors.x), tensors.y, reduction="none")
        penalty = tensors.penalty * half_squared_norm(params)
        return (alpha.sigmoid() * losses).mean() + penalty

    return Problem(
        tensors.alpha.requires_grad_(),
        init_params,
        lambda params, x: perceptron(params, x, torch.relu),
        lambda: perceptron_module(init_params, nn.ReLU()),
        inner,
        lambda scores: F.cross_entropy(scores(tensors.x_val), tensors.y_val),
        lambda alpha: tensors.rate,
        tensors.momentum,
        tensors.steps,
        tensors.products,
    )


def schedule(data: dict[str, Any]) -> Problem:
    """Returns a long run on batches, with its rate and penalties in ``alpha``."""
    tensors = as_tensors(data)

    def inner(scores: ScoresFn, params: Params, alpha: Tensor, step: int) -> Tensor:
        batch = step % len(tensors.x)
        loss = F.cross_entropy(scores(tensors.x[batch]), tensors.y[batch])
        # A 0-dimensional tensor times a number is float64 in `torch.func` (2.13.0).
        squares = torch.stack([w.square().sum() for w in (params[0], params[2])])
        return loss + 0.5 * torch.dot(alpha[1:].exp(), squares)

    return Problem(
        tensors.alpha.requires_grad_(),
        tensors.init,
        lambda params, x: perceptron(params, x, torch.tanh),
        lambda: perceptron_module(tensors.init, nn.Tanh()),
        inner,
        lambda scores: F.cross_entropy(scores(tensors.x_val), tensors.y_val),
        lambda alpha: alpha[0].exp(),
        tensors.momentum,
        tensors.steps,
    )


class Tasks(NamedTuple):
    """Few-shot tasks with images in PyTorch's order, channels before pixels."""

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    init: list[Tensor]
    steps: int
    rate: float


def tasks(data: dict[str, Any]) -> Tasks:
    """Returns tasks with kernels (out, in, 3, 3) and last weights (5, channels)."""
    tensors = as_tensors(data)
    images = lambda x: x.movedim(-1, -3).contiguous()
    return Tasks(
        images(tensors.x),
        tensors.y,
        images(tensors.x_val),
        tensors.y_val,
        [to_torch_order(leaf) for leaf in tensors.init],
        tensors.steps,
        tensors.rate,
    )


def to_torch_order(leaf: Tensor) -> Tensor:
    """Returns a leaf of ``init`` with outputs before inputs."""
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
    return leaf.permute(order[leaf.ndim]).contiguous()


def from_torch_order(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Returns gradients at `Tasks.init` in the order of the work."""
    order = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
    return [leaf.permute(order[leaf.ndim]) for leaf in gradients]


def perceptron(
    params: Params, x: Tensor, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns the scores of one hidden layer; weights are (inputs, outputs)."""
    hidden_weights, hidden_biases, weights, biases = params
    hidden = activation(torch.addmm(hidden_biases, x, hidden_weights))
    return torch.addmm(biases, hidden, weights)


def convolutional_scores(params: Params, x: Tensor) -> Tensor:
    """Returns the scores of the few-shot network."""
    *blocks, weights, biases = params
    for kernel, scale, shift in zip(*[iter(blocks)] * 3, strict=True):
        x = F.conv2d(x, kernel, padding=1)
        x = F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-5)
        x = F.max_pool2d(F.relu(x), 2)
    return F.linear(x.flatten(1), weights, biases)


class Linear(nn.Module):
    """A linear model without biases."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Alpha(nn.Module):
    """A module whose parameters are the hyperparameters."""

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.alpha = nn.Parameter(alpha.detach())

    def forward(self) -> Tensor:
        return self.alpha


def perceptron_module(params: Params, activation: nn.Module) -> nn.Module:
    """Returns `perceptron` as a module, whose weights are (outputs, inputs)."""
    hidden_layer, layer = (nn.Linear(*w.shape) for w in (params[0], params[2]))
    module = nn.Sequential(hidden_layer, activation, layer)
    return set_params(module, [w.t() for w in params])


def convolutional_module(init: list[Tensor]) -> nn.Module:
    """Returns the network of `convolutional_scores` as a module."""
    blocks: list[nn.Module] = []
    for kernel in init[:-2:3]:
        outputs, inputs = kernel.shape[:2]
        blocks += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    layer = nn.Linear(init[-2].shape[1], init[-2].shape[0])
    return set_params(nn.Sequential(*blocks, nn.Flatten(), layer), init)


def set_params(module: nn.Module, params: Iterable[Tensor]) -> nn.Module:
    """Sets the parameters of a module and returns it."""
    with torch.no_grad():
        for param, value in zip(module.parameters(), params, strict=True):
            param.copy_(value)
    return module


def half_squared_norm(params: Params) -> Tensor:
    """Returns half the sum of squares."""
    return 0.5 * sum(leaf.square().sum() for leaf in params)


def as_tensors(data: dict[str, Any]) -> SimpleNamespace:
    """Returns tensors that share the arrays' memory; integers are copied to 64 bits."""

    def tensor(value: Any) -> Any:
        if isinstance(value, list):
            return [tensor(leaf) for leaf in value]
        if not isinstance(value, np.ndarray):
            return value
        return torch.from_numpy(
            value.astype(np.int64) if value.dtype.kind == "i" else value
        )

    return SimpleNamespace(**{name: tensor(value) for name, value in data.items()})


def as_column_major_tensors(data: dict[str, Any]) -> SimpleNamespace:
    """Returns tensors of a linear model with contiguous features, as for JAX.

    Products with a vector take less than half of their time with contiguous examples.
    """
    tensors = as_tensors(data)
    to_column_major = lambda x: x.t().contiguous().t()
    tensors.x, tensors.x_val = map(to_column_major, (tensors.x, tensors.x_val))
    return tensors


def flatten(tensors: Iterable[Tensor]) -> np.ndarray:
    """Returns all numbers as one array."""
    return np.concatenate([leaf.detach().numpy().ravel() for leaf in tensors])


def as_leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns the tensors without their graph, with ``requires_grad``."""
    return [leaf.detach().requires_grad_() for leaf in tensors]


def inner_minimizer(problem: Problem, gradient: float) -> list[Tensor]:
    """Returns the inner minimizer by L-BFGS, PyTorch's fastest solver for a full batch.

    Iterations end when the largest entry of the gradient is at most ``gradient``. There
    is no line search, because in float32 losses are equal long before gradients vanish.
    """
    alpha = problem.alpha.detach()
    params = as_leaves(leaf.clone() for leaf in problem.init_params)
    solver = torch.optim.LBFGS(
        params,
        max_iter=100,
        tolerance_grad=gradient,
        tolerance_change=0,
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = problem.inner_loss(params, alpha)
        value.backward()
        return value

    solver.step(loss)
    return params
