"""Plain JAX, written by hand for each work: what a library is measured against."""

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
    """A step of ``(w, v)``, by ``gradient(w, t)``."""

    def step(carry, t):
        w, v = carry
        v = jax.tree.map(lambda v, g: momentum * v + g, v, gradient(w, t))
        return (jax.tree.map(lambda w, v: w - rate * v, w, v), v), None

    return step


def loop(step: Callable, w: PyTree, steps: int, segments: int = 1) -> PyTree:
    """``w`` after so many steps; of segments only the start is kept."""
    segment = lambda carry, ts: (jax.lax.scan(step, carry, ts)[0], None)
    if segments > 1:
        segment = jax.checkpoint(segment)
    ts = jnp.arange(steps).reshape(segments, -1)
    return jax.lax.scan(segment, (w, optax.tree.zeros_like(w)), ts)[0][0]


def descended(
    problem: Problem,
    train: PyTree,
    w: PyTree,
    alpha: PyTree,
    segments: int = 1,
) -> PyTree:
    """``w`` after the inner run on the same batch throughout."""
    given = problem.given
    gradient = lambda w, t: jax.grad(problem.inner)(w, alpha, train)
    step = heavy_ball(gradient, given["rate"], given["momentum"])
    return loop(step, w, given["steps"], segments)


def in_turn(
    problem: Problem,
    train: PyTree,
    w: PyTree,
    alpha: Array,
    segments: int = 1,
) -> PyTree:
    """``w`` after the inner run of `schedule`."""
    given, one = problem.given, lambda t: problems.batch_of(train, t)
    gradient = lambda w, t: jax.grad(problem.inner)(w, alpha, one(t))
    step = heavy_ball(gradient, jnp.exp(alpha[0]), given["momentum"])
    return loop(step, w, given["steps"], segments)


def divisor(number: int) -> int:
    """The largest up to the square root."""
    return next(d for d in range(math.isqrt(number), 0, -1) if number % d == 0)


def conjugate_gradients(product: Callable, b: PyTree, steps: int) -> PyTree:
    """So many steps from 0, and none where nothing is left."""
    dot = optax.tree.vdot
    add = lambda a, s, b: jax.tree.map(lambda a, b: a + s * b, a, b)
    over = lambda a, b: jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))

    def step(_, carry):
        x, r, p, rr = carry
        Hp = product(p)
        length = over(rr, dot(p, Hp))
        r = add(r, -length, Hp)
        next_rr = dot(r, r)
        return add(x, length, p), r, add(r, over(next_rr, rr), p), next_rr

    start = optax.tree.zeros_like(b), b, b, dot(b, b)
    return jax.lax.fori_loop(0, steps, step, start)[0]


def product(problem: Problem, train: PyTree, w: PyTree, alpha: PyTree) -> Callable:
    """``v -> H v``."""
    gradient = lambda w: jax.grad(problem.inner)(w, alpha, train)
    return lambda v: jax.jvp(gradient, (w,), (v,))[1]


def implicit(
    problem: Problem,
    train: PyTree,
    val: PyTree,
    w: PyTree,
    alpha: PyTree,
):
    """At ``w``; the outer loss reads no alpha."""
    b = jax.grad(problem.outer)(w, alpha, val)
    H = product(problem, train, w, alpha)
    v = conjugate_gradients(H, b, problem.given["products"])
    by_alpha = lambda w: jax.grad(problem.inner, argnums=1)(w, alpha, train)
    return optax.tree.scale(-1, jax.jvp(by_alpha, (w,), (v,))[1])


def newton(
    problem: Problem,
    train: PyTree,
    w: PyTree,
    alpha: PyTree,
    steps: int,
    products: int,
) -> PyTree:
    """The minimiser, near enough, of a convex loss; so many products a step."""

    def step(_, w):
        gradient = jax.grad(problem.inner)(w, alpha, train)
        H = product(problem, train, w, alpha)
        d = conjugate_gradients(H, gradient, products)
        return optax.tree.sub(w, d)

    return jax.lax.fori_loop(0, steps, step, w)


def reverse(problem: Problem, run: Callable) -> Program:
    """Through ``run(train, w, alpha) -> w``."""

    def value(alpha, train, val, w):
        return problem.outer(run(train, w, alpha), alpha, val)

    f = lambda train, val, w, alpha: jax.grad(value)(alpha, train, val, w)
    return Program(f, *problem.arrays)


def logistic_unrolled(data: Data) -> Program:
    problem = problems.logistic(data)
    return reverse(problem, functools.partial(descended, problem))


def logistic_forward(data: Data) -> Program:
    problem = problems.logistic(data)

    def f(train, val, w, alpha):
        run = lambda alpha: descended(problem, train, w, alpha)
        value = lambda alpha: problem.outer(run(alpha), alpha, val)
        return jax.jvp(value, (alpha,), (jnp.ones_like(alpha),))[1]

    # One penalty for all features has the same derivative, for less.
    problem = problem._replace(alpha=problem.alpha[0])
    return Program(f, *problem.arrays)


def logistic_solve(data: Data) -> Program:
    problem = problems.logistic(data, solved=True)
    return Program(functools.partial(implicit, problem), *problem.arrays)


def logistic_whole(data: Data, *, steps: int, products: int, adjoint: int) -> Program:
    """``adjoint`` products for the adjoint."""
    problem = problems.logistic(data | {"products": adjoint})

    def f(train, val, w, alpha):
        w = newton(problem, train, w, alpha, steps, products)
        return implicit(problem, train, val, w, alpha)

    return Program(f, *problem.arrays)


def logistic_trained(data: Data) -> Program:
    """Implicit where the inner run ends."""
    problem = problems.logistic(data)

    def f(train, val, w, alpha):
        w = descended(problem, train, w, alpha)
        return implicit(problem, train, val, w, alpha)

    return Program(f, *problem.arrays)


def cleaning_unrolled(data: Data) -> Program:
    problem = problems.cleaning(data)
    return reverse(problem, functools.partial(descended, problem))


def cleaning_solve(data: Data) -> Program:
    problem = problems.cleaning(data, solved=True)
    return Program(functools.partial(implicit, problem), *problem.arrays)


def schedule_reverse(data: Data) -> Program:
    problem = problems.schedule(data)
    segments = divisor(problem.given["steps"])
    run = functools.partial(in_turn, problem, segments=segments)
    return reverse(problem, run)


def schedule_forward(data: Data) -> Program:
    problem = problems.schedule(data)

    def f(train, val, w, alpha):
        run = lambda alpha: in_turn(problem, train, w, alpha)
        return jax.jacfwd(lambda alpha: problem.outer(run(alpha), alpha, val))(alpha)

    return Program(f, *problem.arrays)


def few_shot(data: Data) -> Program:
    """Task by task."""
    problem = problems.few_shot(data)
    rate, steps = problem.given["rate"], problem.given["steps"]

    def one(init, task):
        train, val = task

        def step(w, _):
            gradient = jax.grad(problem.inner)(w, None, train)
            return jax.tree.map(lambda w, g: w - rate * g, w, gradient), None

        w, _ = jax.lax.scan(step, init, length=steps)
        return problem.outer(w, None, val)

    def f(train, val, w, alpha):
        del w
        gradient = lambda task: jax.grad(one)(alpha, task)
        add = lambda total, task: (optax.tree.add(total, gradient(task)), None)
        total, _ = jax.lax.scan(add, optax.tree.zeros_like(alpha), (train, val))
        return optax.tree.scale(1 / len(val["y"]), total)

    return Program(f, *problem.arrays)


def cleaning_stored(data: Data) -> Program:
    """By segments, of which each is run once more."""
    problem = problems.cleaning(data)
    segments = divisor(problem.given["steps"])
    run = functools.partial(descended, problem, segments=segments)
    return reverse(problem, run)


def anew(data: Data) -> Callable[[], np.ndarray]:
    """Traces and compiles `logistic_unrolled` at every call, and runs once."""

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
    "compile": anew,
}
