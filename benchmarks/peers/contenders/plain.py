"""Plain JAX, written by hand for each work."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import problems
from ..problems import Problem, Program
from ..work import Data


def heavy_ball(gradient: Callable, rate: Array, momentum: float) -> Callable:
    """Returns a step of ``(w, v)``; ``gradient(w, t)`` is the gradient of step t."""

    def step(carry, t):
        w, v = carry
        v = jax.tree.map(lambda v, g: momentum * v + g, v, gradient(w, t))
        return (jax.tree.map(lambda w, v: w - rate * v, w, v), v), None

    return step


def loop(step: Callable, w: PyTree, steps: int, segments: int = 1) -> PyTree:
    """Returns ``w`` after the steps; of each segment only the first state is stored."""
    segment = lambda carry, ts: (jax.lax.scan(step, carry, ts)[0], None)
    if segments > 1:
        segment = jax.checkpoint(segment)
    ts = jnp.arange(steps).reshape(segments, -1)
    return jax.lax.scan(segment, (w, optax.tree.zeros_like(w)), ts)[0][0]


def final_w(
    problem: Problem,
    train: PyTree,
    w: PyTree,
    alpha: PyTree,
    segments: int = 1,
) -> PyTree:
    """Returns ``w`` after the inner run on the full batch."""
    constants = problem.constants
    gradient = lambda w, t: jax.grad(problem.inner)(w, alpha, train)
    step = heavy_ball(gradient, constants["rate"], constants["momentum"])
    return loop(step, w, constants["steps"], segments)


def final_w_of_schedule(
    problem: Problem,
    train: PyTree,
    w: PyTree,
    alpha: Array,
    segments: int = 1,
) -> PyTree:
    """Returns ``w`` after the inner run of `schedule`."""
    constants, batch = problem.constants, lambda t: problems.batch_at(train, t)
    gradient = lambda w, t: jax.grad(problem.inner)(w, alpha, batch(t))
    step = heavy_ball(gradient, jnp.exp(alpha[0]), constants["momentum"])
    return loop(step, w, constants["steps"], segments)


def num_segments(num_steps: int) -> int:
    """Returns the largest divisor of the steps that is at most their square root."""
    return next(d for d in range(math.isqrt(num_steps), 0, -1) if num_steps % d == 0)


def conjugate_gradients(product: Callable, b: PyTree, steps: int) -> PyTree:
    """Returns the iterate after the steps from 0; without a residual it stays."""
    dot = optax.tree.vdot
    add = lambda a, s, b: jax.tree.map(lambda a, b: a + s * b, a, b)
    ratio = lambda a, b: jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))

    def step(_, carry):
        x, r, p, rr = carry
        Hp = product(p)
        step_size = ratio(rr, dot(p, Hp))
        r = add(r, -step_size, Hp)
        next_rr = dot(r, r)
        return add(x, step_size, p), r, add(r, ratio(next_rr, rr), p), next_rr

    init_carry = optax.tree.zeros_like(b), b, b, dot(b, b)
    return jax.lax.fori_loop(0, steps, step, init_carry)[0]


def hvp_fn(problem: Problem, train: PyTree, w: PyTree, alpha: PyTree) -> Callable:
    """Returns ``v -> H v``."""
    gradient = lambda w: jax.grad(problem.inner)(w, alpha, train)
    return lambda v: jax.jvp(gradient, (w,), (v,))[1]


def implicit(
    problem: Problem,
    train: PyTree,
    val: PyTree,
    w: PyTree,
    alpha: PyTree,
):
    """Returns ``-J' H^-1 dM/dw`` at ``w``; the outer loss does not depend on alpha."""
    b = jax.grad(problem.outer)(w, alpha, val)
    H = hvp_fn(problem, train, w, alpha)
    v = conjugate_gradients(H, b, problem.constants["products"])
    alpha_grad = lambda w: jax.grad(problem.inner, argnums=1)(w, alpha, train)
    return optax.tree.scale(-1, jax.jvp(alpha_grad, (w,), (v,))[1])


def newton(
    problem: Problem,
    train: PyTree,
    w: PyTree,
    alpha: PyTree,
    steps: int,
    products: int,
) -> PyTree:
    """Returns ``w`` after Newton steps, each by ``products`` steps of CG."""

    def step(_, w):
        gradient = jax.grad(problem.inner)(w, alpha, train)
        H = hvp_fn(problem, train, w, alpha)
        d = conjugate_gradients(H, gradient, products)
        return optax.tree.sub(w, d)

    return jax.lax.fori_loop(0, steps, step, w)


def reverse(problem: Problem, run: Callable) -> Program:
    """Returns reverse mode through ``run(train, w, alpha) -> w``."""

    def value(alpha, train, val, w):
        return problem.outer(run(train, w, alpha), alpha, val)

    f = lambda train, val, w, alpha: jax.grad(value)(alpha, train, val, w)
    return Program(f, *problem.arrays)


def logistic_unrolled(data: Data) -> Program:
    problem = problems.logistic(data)
    return reverse(problem, functools.partial(final_w, problem))


def logistic_forward(data: Data) -> Program:
    problem = problems.logistic(data)

    def f(train, val, w, alpha):
        run = lambda alpha: final_w(problem, train, w, alpha)
        value = lambda alpha: problem.outer(run(alpha), alpha, val)
        return jax.jvp(value, (alpha,), (jnp.ones_like(alpha),))[1]

    # The derivative along ones is that of one penalty for all features.
    problem = problem._replace(alpha=problem.alpha[0])
    return Program(f, *problem.arrays)


def logistic_solve(data: Data) -> Program:
    problem = problems.logistic(data, at_solution=True)
    return Program(functools.partial(implicit, problem), *problem.arrays)


def logistic_whole(data: Data, *, steps: int, products: int, adjoint: int) -> Program:
    """Returns Newton steps and a solve for the adjoint of ``adjoint`` products."""
    problem = problems.logistic(data | {"products": adjoint})

    def f(train, val, w, alpha):
        w = newton(problem, train, w, alpha, steps, products)
        return implicit(problem, train, val, w, alpha)

    return Program(f, *problem.arrays)


def logistic_trained(data: Data) -> Program:
    """Returns implicit differentiation after the inner run."""
    problem = problems.logistic(data)

    def f(train, val, w, alpha):
        w = final_w(problem, train, w, alpha)
        return implicit(problem, train, val, w, alpha)

    return Program(f, *problem.arrays)


def cleaning_unrolled(data: Data) -> Program:
    problem = problems.cleaning(data)
    return reverse(problem, functools.partial(final_w, problem))


def cleaning_solve(data: Data) -> Program:
    problem = problems.cleaning(data, at_solution=True)
    return Program(functools.partial(implicit, problem), *problem.arrays)


def schedule_reverse(data: Data) -> Program:
    problem = problems.schedule(data)
    segments = num_segments(problem.constants["steps"])
    run = functools.partial(final_w_of_schedule, problem, segments=segments)
    return reverse(problem, run)


def schedule_forward(data: Data) -> Program:
    problem = problems.schedule(data)

    def f(train, val, w, alpha):
        run = lambda alpha: final_w_of_schedule(problem, train, w, alpha)
        return jax.jacfwd(lambda alpha: problem.outer(run(alpha), alpha, val))(alpha)

    return Program(f, *problem.arrays)


def few_shot(data: Data) -> Program:
    """Returns a loop over tasks."""
    problem = problems.few_shot(data)
    rate, steps = problem.constants["rate"], problem.constants["steps"]

    def task_loss(init, task):
        train, val = task

        def step(w, _):
            gradient = jax.grad(problem.inner)(w, None, train)
            return jax.tree.map(lambda w, g: w - rate * g, w, gradient), None

        w, _ = jax.lax.scan(step, init, length=steps)
        return problem.outer(w, None, val)

    def f(train, val, w, alpha):
        del w
        gradient = lambda task: jax.grad(task_loss)(alpha, task)
        add = lambda total, task: (optax.tree.add(total, gradient(task)), None)
        total, _ = jax.lax.scan(add, optax.tree.zeros_like(alpha), (train, val))
        return optax.tree.scale(1 / len(val["y"]), total)

    return Program(f, *problem.arrays)


def cleaning_stored(data: Data) -> Program:
    """Returns reverse mode that runs each segment a second time."""
    problem = problems.cleaning(data)
    segments = num_segments(problem.constants["steps"])
    run = functools.partial(final_w, problem, segments=segments)
    return reverse(problem, run)


def recompiling_call(data: Data) -> Callable[[], np.ndarray]:
    """Returns a call that traces, compiles and runs `logistic_unrolled`."""

    def call():
        jax.clear_caches()
        return logistic_unrolled(data)()

    return call


WORKS = {
    "w1-unrolled": logistic_unrolled,
    "w1-forward": logistic_forward,
    "w1-solve": logistic_solve,
    "w1-whole": logistic_whole,
    "w2-unrolled": cleaning_unrolled,
    "w2-implicit": cleaning_solve,
    "w2-lowmem": cleaning_stored,
    "w3-1000": schedule_reverse,
    "w3-10000": schedule_reverse,
    "w3-forward": schedule_forward,
    "w4": few_shot,
    "w6": logistic_trained,
    "overhead": logistic_unrolled,
    "overhead-solve": logistic_solve,
    "compile": recompiling_call,
}
