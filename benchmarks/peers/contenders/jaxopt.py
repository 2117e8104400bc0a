"""JAXopt: `unroll=True`, and implicit differentiation by `custom_root`."""

import functools

import jax
import jaxopt
import optax
from jaxopt import implicit_diff, linear_solve

from .. import problems
from ..problems import Problem, Program
from ..work import Data


def hypergradient(problem: Problem, run) -> Program:
    """Returns the gradient of the outer loss at ``run(w, alpha, train)``."""

    def value(alpha, train, val, w):
        return problem.outer(run(w, alpha, train), alpha, val)

    f = lambda train, val, w, alpha: jax.grad(value)(alpha, train, val, w)
    return Program(f, *problem.arrays)


def descent(problem: Problem, **options) -> jaxopt.OptaxSolver:
    """Returns gradient descent with the rate, momentum and steps of the work."""
    constants = problem.constants
    optimizer = optax.sgd(constants["rate"], constants["momentum"])
    steps = constants["steps"]
    return jaxopt.OptaxSolver(problem.inner, optimizer, maxiter=steps, **options)


def unrolled(problem: Problem) -> Program:
    solver = descent(problem, tol=0.0, implicit_diff=False, unroll=True)
    return hypergradient(problem, lambda *args: solver.run(*args).params)


def implicit_at_w(problem: Problem) -> Program:
    """Returns implicit differentiation of a solver that returns its initial ``w``."""
    # With a tolerance of 0 a small system ends in 0 / 0 once it is solved exactly.
    solve = functools.partial(
        linear_solve.solve_cg, maxiter=problem.constants["products"], tol=1e-7
    )
    root = implicit_diff.custom_root(jax.grad(problem.inner), solve=solve)
    return hypergradient(problem, root(lambda w, alpha, train: w))


def implicit_from_zero(
    data: Data, *, rate: float, momentum: float, gradient: float, adjoint: float
) -> Program:
    problem = problems.logistic(data | {"rate": rate, "momentum": momentum})
    solve = functools.partial(linear_solve.solve_cg, tol=adjoint)
    solver = descent(
        problem, tol=gradient, implicit_diff=True, implicit_diff_solve=solve
    )
    return hypergradient(problem, lambda *args: solver.run(*args).params)


def logistic_unrolled(data: Data) -> Program:
    return unrolled(problems.logistic(data))


def logistic_solve(data: Data) -> Program:
    return implicit_at_w(problems.logistic(data, at_solution=True))


WORKS = {
    "w1-unrolled": logistic_unrolled,
    "w1-solve": logistic_solve,
    "w1-whole": implicit_from_zero,
    "w2-unrolled": lambda data: unrolled(problems.cleaning(data)),
    "w2-implicit": lambda data: implicit_at_w(
        problems.cleaning(data, at_solution=True)
    ),
    "overhead": logistic_unrolled,
    "overhead-solve": logistic_solve,
}
