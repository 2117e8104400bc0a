"""PyTorch without a library: what its user writes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import functional as F

from .torch_losses import (
    Parts,
    Problem,
    by_columns,
    cleaning,
    convolutions,
    flat,
    leaves,
    logistic,
    minimise,
    schedule,
    stated,
    tasks,
)


def descend(
    problem: Problem,
    parts: Parts,
    speed: Parts,
    steps: Sequence[int],
    graph: bool = True,
) -> tuple[Parts, Parts]:
    """Gradient descent by heavy ball, with its graph or without."""
    rate = problem.rate(problem.alpha)
    for step in steps:
        slopes = grad(
            problem.inner_loss(parts, problem.alpha, step), parts, create_graph=graph
        )
        with torch.set_grad_enabled(graph):
            speed = [
                g.add(v, alpha=problem.momentum)
                for v, g in zip(speed, slopes, strict=True)
            ]
            parts = [w - rate * v for w, v in zip(parts, speed, strict=True)]
        if not graph:
            parts = leaves(parts)
    return parts, speed


def begin(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and speeds before the first step."""
    return leaves(problem.start), [torch.zeros_like(w) for w in problem.start]


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Reverse through all steps at once."""

    def call() -> np.ndarray:
        parts, _ = descend(problem, *begin(problem), range(problem.steps))
        return flat(grad(problem.outer_loss(parts), [problem.alpha]))

    return call


def checkpointed(problem: Problem) -> Callable[[], np.ndarray]:
    """Reverse through the square root of all steps at a time, from kept states."""
    length = math.isqrt(problem.steps)
    number = len(problem.start)
    segments = [
        range(first, min(first + length, problem.steps))
        for first in range(0, problem.steps, length)
    ]

    def call() -> np.ndarray:
        parts, speed = begin(problem)
        kept = []
        for steps in segments:
            kept.append((parts, speed))
            parts, speed = descend(problem, parts, speed, steps, graph=False)
        back = [*grad(problem.outer_loss(parts), parts), *map(torch.zeros_like, speed)]
        total = torch.zeros_like(problem.alpha)
        for steps, (parts, speed) in zip(
            reversed(segments), reversed(kept), strict=True
        ):
            state = leaves([*parts, *speed])
            ends = descend(problem, state[:number], state[number:], steps)
            *back, share = grad([*ends[0], *ends[1]], [*state, problem.alpha], back)
            total += share
        return flat([total])

    return call


def implicit(
    problem: Problem, at: Callable[[], Parts] | None = None
) -> Callable[[], np.ndarray]:
    """By conjugate gradients on Hessian products."""

    def call() -> np.ndarray:
        parts = leaves(problem.start if at is None else at())
        slopes = grad(
            problem.inner_loss(parts, problem.alpha), parts, create_graph=True
        )
        found = conjugate_gradients(
            lambda v: grad(slopes, parts, v, retain_graph=True),
            grad(problem.outer_loss(parts), parts),
            problem.products,
        )
        return -flat(grad(slopes, [problem.alpha], found))

    return call


def conjugate_gradients(
    product: Callable[[Parts], Parts], target: Parts, products: int
) -> Parts:
    """From 0, no further than float32 goes."""
    found = [torch.zeros_like(b) for b in target]
    residual = direction = target
    size = dot(residual, residual)
    smallest = torch.finfo(torch.float32).eps ** 2 * size
    for _ in range(products):
        image = product(direction)
        length = size / dot(direction, image)
        found = along(found, length, direction)
        residual = along(residual, -length, image)
        size, before = dot(residual, residual), size
        if size <= smallest:
            break
        direction = along(residual, size / before, direction)
    return found


def dot(a: Parts, b: Parts) -> float:
    """Of all parts together."""
    pairs = zip(a, b, strict=True)
    return sum(torch.dot(x.reshape(-1), y.reshape(-1)).item() for x, y in pairs)


def along(start: Parts, length: float, direction: Parts) -> Parts:
    """Start + length * direction."""
    return [x.add(d, alpha=length) for x, d in zip(start, direction, strict=True)]


def whole(
    data: dict[str, Any], *, gradient: float, products: int
) -> Callable[[], np.ndarray]:
    """From 0: L-BFGS, then conjugate gradients."""
    problem = logistic(data)._replace(products=products)
    return implicit(problem, lambda: minimise(problem, gradient))


def trained(problem: Problem) -> Callable[[], np.ndarray]:
    """Implicit where the inner run ends."""
    run = lambda: descend(problem, *begin(problem), range(problem.steps), graph=False)
    return implicit(problem, lambda: run()[0])


def forward(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Logistic regression with its tangent along ones, both gradients written out."""
    given = by_columns(data)
    penalty, n = given.alpha.exp(), len(given.x)

    def call() -> np.ndarray:
        w, v, dw, dv = torch.zeros(4, len(penalty))
        for _ in range(given.steps):
            off = torch.sigmoid(-given.y * (given.x @ w))
            g = penalty * w - (off * given.y) @ given.x / n
            bent = off * (1 - off) * (given.x @ dw)
            dg = penalty * (dw + w) + bent @ given.x / n
            v, dv = g + given.momentum * v, dg + given.momentum * dv
            w, dw = w - given.rate * v, dw - given.rate * dv
        off = torch.sigmoid(-given.y_val * (given.x_val @ w))
        slope = -(off * given.y_val) @ given.x_val / len(given.x_val)
        return flat([slope @ dw.reshape(-1, 1)])

    return call


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """One task after another."""
    given = tasks(data)

    def adapted(init: Parts, x: Tensor, y: Tensor) -> Parts:
        parts = init
        for _ in range(given.steps):
            loss = F.cross_entropy(convolutions(parts, x), y)
            slopes = grad(loss, parts, create_graph=True)
            parts = [
                w.sub(g, alpha=given.rate) for w, g in zip(parts, slopes, strict=True)
            ]
        return parts

    def call() -> np.ndarray:
        init = leaves(given.init)
        for x, y, x_val, y_val in zip(*given[:4], strict=True):
            loss = F.cross_entropy(convolutions(adapted(init, x, y), x_val), y_val)
            (loss / len(given.x)).backward(inputs=init)
        return flat(stated(w.grad for w in init))

    return call


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w1-forward": forward,
    "w1-solve": lambda data: implicit(logistic(data, solved=True)),
    "w1-whole": whole,
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "w3-1000": lambda data: unrolled(schedule(data)),
    "w3-10000": lambda data: checkpointed(schedule(data)),
    "w4": maml,
    "w6": lambda data: trained(logistic(data)),
    "overhead": lambda data: unrolled(logistic(data)),
    "overhead-solve": lambda data: implicit(logistic(data, solved=True)),
}
