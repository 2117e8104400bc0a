"""PyTorch without a library, as its user writes it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn import functional as F

from .torch_losses import (
    Params,
    Problem,
    as_column_major_tensors,
    as_leaves,
    cleaning,
    convolutional_scores,
    flatten,
    from_torch_order,
    inner_minimizer,
    logistic,
    schedule,
    tasks,
)


def descend(
    problem: Problem,
    params: Params,
    velocity: Params,
    steps: Sequence[int],
    create_graph: bool = True,
) -> tuple[Params, Params]:
    """Returns parameters and velocity after steps of heavy-ball gradient descent."""
    rate = problem.rate(problem.alpha)
    for step in steps:
        loss = problem.inner_loss(params, problem.alpha, step)
        gradient = grad(loss, params, create_graph=create_graph)
        with torch.set_grad_enabled(create_graph):
            velocity = [
                g.add(v, alpha=problem.momentum)
                for v, g in zip(velocity, gradient, strict=True)
            ]
            params = [w - rate * v for w, v in zip(params, velocity, strict=True)]
        if not create_graph:
            params = as_leaves(params)
    return params, velocity


def init_state(problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """Returns parameters and velocity before the first step."""
    velocity = [torch.zeros_like(w) for w in problem.init_params]
    return as_leaves(problem.init_params), velocity


def unrolled(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns reverse mode through all steps."""

    def call() -> np.ndarray:
        params, _ = descend(problem, *init_state(problem), range(problem.steps))
        return flatten(grad(problem.outer_loss(params), [problem.alpha]))

    return call


def checkpointed(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns reverse mode through segments of sqrt(steps), from stored states."""
    length = math.isqrt(problem.steps)
    num_params = len(problem.init_params)
    segments = [
        range(step, min(step + length, problem.steps))
        for step in range(0, problem.steps, length)
    ]

    def call() -> np.ndarray:
        params, velocity = init_state(problem)
        states = []
        for steps in segments:
            states.append((params, velocity))
            params, velocity = descend(
                problem, params, velocity, steps, create_graph=False
            )
        outer_grad = grad(problem.outer_loss(params), params)
        cotangents = [*outer_grad, *map(torch.zeros_like, velocity)]
        total = torch.zeros_like(problem.alpha)
        for steps, (params, velocity) in zip(
            reversed(segments), reversed(states), strict=True
        ):
            state = as_leaves([*params, *velocity])
            new_params, new_velocity = descend(
                problem, state[:num_params], state[num_params:], steps
            )
            *cotangents, alpha_grad = grad(
                [*new_params, *new_velocity], [*state, problem.alpha], cotangents
            )
            total += alpha_grad
        return flatten([total])

    return call


def implicit(
    problem: Problem, solve: Callable[[], Params] | None = None
) -> Callable[[], np.ndarray]:
    """Returns implicit differentiation by conjugate gradients, at ``solve()``."""

    def call() -> np.ndarray:
        params = as_leaves(problem.init_params if solve is None else solve())
        loss = problem.inner_loss(params, problem.alpha)
        inner_grad = grad(loss, params, create_graph=True)
        adjoint = conjugate_gradients(
            lambda v: grad(inner_grad, params, v, retain_graph=True),
            grad(problem.outer_loss(params), params),
            problem.products,
        )
        return -flatten(grad(inner_grad, [problem.alpha], adjoint))

    return call


def conjugate_gradients(
    hvp_fn: Callable[[Params], Params], b: Params, num_steps: int
) -> Params:
    """Returns the iterate from 0; steps end at the rounding error of float32."""
    x = [torch.zeros_like(leaf) for leaf in b]
    r = p = b
    rr = dot(r, r)
    min_rr = torch.finfo(torch.float32).eps ** 2 * rr
    for _ in range(num_steps):
        Hp = hvp_fn(p)
        step_size = rr / dot(p, Hp)
        x = add_scale(x, step_size, p)
        r = add_scale(r, -step_size, Hp)
        rr, prev_rr = dot(r, r), rr
        if rr <= min_rr:
            break
        p = add_scale(r, rr / prev_rr, p)
    return x


def dot(a: Params, b: Params) -> float:
    """Returns the inner product of two lists of tensors."""
    pairs = zip(a, b, strict=True)
    return sum(torch.dot(x.reshape(-1), y.reshape(-1)).item() for x, y in pairs)


def add_scale(x: Params, factor: float, y: Params) -> Params:
    """Returns ``x + factor * y``."""
    return [a.add(b, alpha=factor) for a, b in zip(x, y, strict=True)]


def implicit_from_zero(
    data: dict[str, Any], *, gradient: float, products: int
) -> Callable[[], np.ndarray]:
    """Returns L-BFGS from 0, followed by implicit differentiation."""
    problem = logistic(data)._replace(products=products)
    return implicit(problem, lambda: inner_minimizer(problem, gradient))


def trained(problem: Problem) -> Callable[[], np.ndarray]:
    """Returns implicit differentiation after the inner run."""

    def solve() -> Params:
        state = init_state(problem)
        return descend(problem, *state, range(problem.steps), create_graph=False)[0]

    return implicit(problem, solve)


def forward(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Returns the derivative along ones, with gradient and tangent in closed form."""
    tensors = as_column_major_tensors(data)
    penalty, n = tensors.alpha.exp(), len(tensors.x)

    def call() -> np.ndarray:
        w, v, dw, dv = torch.zeros(4, len(penalty))
        for _ in range(tensors.steps):
            p = torch.sigmoid(-tensors.y * (tensors.x @ w))
            g = penalty * w - (p * tensors.y) @ tensors.x / n
            dp = p * (1 - p) * (tensors.x @ dw)
            dg = penalty * (dw + w) + dp @ tensors.x / n
            v, dv = g + tensors.momentum * v, dg + tensors.momentum * dv
            w, dw = w - tensors.rate * v, dw - tensors.rate * dv
        p = torch.sigmoid(-tensors.y_val * (tensors.x_val @ w))
        outer_grad = -(p * tensors.y_val) @ tensors.x_val / len(tensors.x_val)
        return flatten([outer_grad @ dw.reshape(-1, 1)])

    return call


def maml(data: dict[str, Any]) -> Callable[[], np.ndarray]:
    """Returns MAML, one task after another."""
    few_shot = tasks(data)

    def adapt(init: Params, x: Tensor, y: Tensor) -> Params:
        params = init
        for _ in range(few_shot.steps):
            loss = F.cross_entropy(convolutional_scores(params, x), y)
            gradient = grad(loss, params, create_graph=True)
            params = [
                w.sub(g, alpha=few_shot.rate)
                for w, g in zip(params, gradient, strict=True)
            ]
        return params

    def call() -> np.ndarray:
        init = as_leaves(few_shot.init)
        for x, y, x_val, y_val in zip(*few_shot[:4], strict=True):
            loss = F.cross_entropy(
                convolutional_scores(adapt(init, x, y), x_val), y_val
            )
            (loss / len(few_shot.x)).backward(inputs=init)
        return flatten(from_torch_order(w.grad for w in init))

    return call


WORKS = {
    "w1-unrolled": lambda data: unrolled(logistic(data)),
    "w1-forward": forward,
    "w1-solve": lambda data: implicit(logistic(data, at_solution=True)),
    "w1-whole": implicit_from_zero,
    "w2-unrolled": lambda data: unrolled(cleaning(data)),
    "w2-implicit": lambda data: implicit(cleaning(data)),
    "w3-1000": lambda data: unrolled(schedule(data)),
    "w3-10000": lambda data: checkpointed(schedule(data)),
    "w4": maml,
    "w6": lambda data: trained(logistic(data)),
    "overhead": lambda data: unrolled(logistic(data)),
    "overhead-solve": lambda data: implicit(logistic(data, at_solution=True)),
}
