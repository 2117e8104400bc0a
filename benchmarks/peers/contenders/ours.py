"""hypergrad by its public names, as a user who wants speed would call them.

Each work is one jitted function of the data that returns the hypergradient alone, so
that XLA removes the other fields of an `Estimate`. `dispatch` calls the function that
`hypergradient` returns, with all fields.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.inner import inner_stats

from .. import problems
from ..problems import Problem, Program, flatten
from ..work import Data


class CyclicDescent(eqx.Module):
    """A `Descent` whose step t uses batch t modulo the number of batches."""

    solver: hg.Descent

    differentiable = True

    @property
    def num_steps(self) -> int:
        return self.solver.num_steps

    def init(self, inner_loss, w, alpha, data, key):
        w, state = self.solver.init(inner_loss, w, alpha, data, key)
        return w, (state, jnp.asarray(0))

    def step(self, inner_loss, carry, alpha, data, key):
        w, (state, t) = carry
        batch = problems.batch_at(data, t)
        w, state = self.solver.step(inner_loss, (w, state), alpha, batch, key)
        return w, (state, t + 1)

    def solve(self, inner_loss, w, alpha, data, key):
        carry = self.init(inner_loss, w, alpha, data, key)
        step = lambda carry, _: (self.step(inner_loss, carry, alpha, data, key), None)
        (w, _), _ = jax.lax.scan(step, carry, length=self.num_steps)
        return w, inner_stats(self.num_steps, self.num_steps / len(data["y"]))


def heavy_ball(problem: Problem) -> hg.Descent:
    """Returns the inner solver of a work."""
    constants = problem.constants
    optimizer = optax.sgd(constants["rate"], constants["momentum"])
    return hg.Descent(optimizer, constants["steps"])


def implicit_at_w(problem: Problem, **options: Any) -> hg.Implicit:
    """Returns implicit differentiation at ``w``, without an inner step."""
    inner_solver = hg.Descent(optax.sgd(0.0), 0)
    linear_solver = hg.CG(
        rtol=0.0, max_steps=problem.constants["products"], preconditioner=None
    )
    return hg.Implicit(inner_solver, linear_solver, **options)


def estimate_fn(problem: Problem, estimator: Any) -> Callable[..., hg.Estimate]:
    """Returns the estimate as a function of the problem's arrays."""

    def f(train, val, w, alpha):
        bilevel = hg.Bilevel(problem.inner, problem.outer, train, val)
        return hg.hypergradient(bilevel, estimator)(w, alpha)

    return f


def hypergradient(problem: Problem, estimator: Any) -> Program:
    """Returns a program of the hypergradient alone."""
    estimate = estimate_fn(problem, estimator)
    return Program(lambda *arrays: estimate(*arrays).hypergradient, *problem.arrays)


def logistic_unrolled(data: Data) -> Program:
    problem = problems.logistic(data)
    return hypergradient(problem, hg.Unrolled(heavy_ball(problem), checkpoint=False))


def logistic_forward(data: Data) -> Program:
    """Returns the derivative along ones, with one penalty for all features."""
    problem = problems.logistic(data)
    problem = problem._replace(alpha=problem.alpha[0])
    return hypergradient(problem, hg.Forward(heavy_ball(problem)))


def logistic_solve(data: Data) -> Program:
    problem = problems.logistic(data, at_solution=True)
    return hypergradient(problem, implicit_at_w(problem))


def logistic_whole(
    data: Data, *, solver: str, gradient: float, adjoint: float
) -> Program:
    """Returns implicit differentiation from 0; ``solver`` is `Newton` or `LBFGS`."""
    inner_solver = getattr(hg, solver)(tolerance=gradient)
    estimator = hg.Implicit(inner_solver, hg.CG(rtol=adjoint, preconditioner=None))
    return hypergradient(problems.logistic(data), estimator)


def logistic_trained(data: Data) -> Program:
    problem = problems.logistic(data)
    solver = hg.CG(
        rtol=0.0, max_steps=problem.constants["products"], preconditioner=None
    )
    return hypergradient(problem, hg.Implicit(heavy_ball(problem), solver))


def cleaning_unrolled(data: Data, *, checkpoint: bool) -> Program:
    problem = problems.cleaning(data)
    estimator = hg.Unrolled(heavy_ball(problem), checkpoint=checkpoint)
    return hypergradient(problem, estimator)


def cleaning_implicit(data: Data) -> Program:
    problem = problems.cleaning(data, at_solution=True)
    return hypergradient(problem, implicit_at_w(problem))


def cyclic_descent(problem: Problem, factor: int = 1) -> CyclicDescent:
    """Returns the inner solver of `schedule`, with a multiple of its steps."""
    constants = problem.constants
    optimizer = lambda alpha: optax.sgd(jnp.exp(alpha[0]), constants["momentum"])
    return CyclicDescent(hg.Descent(optimizer, factor * constants["steps"]))


def schedule_reverse(data: Data) -> Program:
    """Returns reverse mode with checkpoints."""
    problem = problems.schedule(data)
    return hypergradient(problem, hg.Unrolled(cyclic_descent(problem), checkpoint=True))


class ProgramWithLonger(Program):
    """A program that also reports the scratch memory of a longer one."""

    longer: Program

    def notes(self) -> dict[str, float]:
        """Returns the bytes of scratch memory of both."""
        self.longer.compile()
        return super().notes() | {"longer": self.longer.notes()["scratch"]}


def schedule_forward(data: Data) -> Program:
    """Returns forward mode, which `hg.unrolled_estimator` selects for a small alpha.

    After the first call a program with ten times the steps is compiled as well.
    """
    problem = problems.schedule(data)
    program, longer = (
        hypergradient(
            problem,
            hg.unrolled_estimator(cyclic_descent(problem, factor), problem.alpha),
        )
        for factor in (1, 10)
    )
    reporting = ProgramWithLonger(program.f, *program.arrays)
    reporting.longer = longer
    return reporting


def few_shot(data: Data) -> Program:
    """Returns a loop over tasks by `lax.map`."""
    problem = problems.few_shot(data)
    constants = problem.constants
    solver = hg.Descent(optax.sgd(constants["rate"]), constants["steps"])
    estimator = hg.Unrolled(solver, checkpoint=False)
    init_fn = lambda w, alpha: alpha

    def f(train, val, w, alpha):
        def task_gradient(task):
            bilevel = hg.Bilevel(problem.inner, problem.outer, *task, init_fn=init_fn)
            return hg.hypergradient(bilevel, estimator)(w, alpha).hypergradient

        gradients = jax.lax.map(task_gradient, (train, val))
        return jax.tree.map(lambda g: jnp.mean(g, 0), gradients)

    return Program(f, *problem.arrays)


# Works without a peer.


def hypergradient_call(problem: Problem, estimator: Any) -> Callable[[], np.ndarray]:
    """Returns a call of the function that `hypergradient` returns."""
    train, val, w, alpha = problem.arrays
    bilevel = hg.Bilevel(problem.inner, problem.outer, train, val)
    estimate = hg.hypergradient(bilevel, estimator)
    return lambda: flatten(estimate(w, alpha).hypergradient)


def dispatch(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.logistic(data, at_solution=True)
    return hypergradient_call(problem, implicit_at_w(problem))


def several_losses(data: Data) -> Program:
    """Returns one estimate of all validation losses, which differ in their labels."""
    problem = problems.logistic(data, at_solution=True)

    def loss(row, w, alpha, batch):
        labels = batch["y"][row]
        return problems.logistic_loss(w, alpha, batch | {"y": labels})

    rows = range(len(data["y_val"]))
    outer = tuple(functools.partial(loss, row) for row in rows)
    return hypergradient(problem._replace(outer=outer), implicit_at_w(problem))


def recompiling_call(
    make: Callable[[Data], Program], data: Data
) -> Callable[[], np.ndarray]:
    """Returns a call that traces, compiles and runs a program."""

    def call():
        jax.clear_caches()
        return make(data)()

    return call


def untraced_unrolled(data: Data) -> Program:
    """Returns `logistic_unrolled` with losses that JAX has not traced before."""
    problem = problems.logistic(data)
    inner = lambda w, alpha, batch: problems.penalized_loss(w, alpha, batch)
    outer = lambda w, alpha, batch: problems.logistic_loss(w, alpha, batch)
    estimator = hg.Unrolled(heavy_ball(problem), checkpoint=False)
    return hypergradient(problem._replace(inner=inner, outer=outer), estimator)


class ProgramWithStats(Program):
    """A program that returns the hypergradient with some of its statistics.

    The result of a call is the hypergradient; notes contain the statistics, and whether
    the hypergradient is finite.
    """

    NAMES = "trusted", "ritz_min", "adjoint_residual"

    def __call__(self) -> np.ndarray:
        values = super().__call__()
        num_stats = len(self.NAMES)
        result, stats = values[:-num_stats], values[-num_stats:]
        self.stats = dict(zip(self.NAMES, map(float, stats), strict=True))
        self.stats["finite"] = float(np.isfinite(result).all())
        return result

    def notes(self) -> dict[str, float]:
        """Returns the scratch memory and the statistics that are finite."""
        stats = {name: x for name, x in self.stats.items() if np.isfinite(x)}
        return super().notes() | stats


def hypergradient_and_stats(problem: Problem, estimator: Any) -> ProgramWithStats:
    """Returns a program of the hypergradient and `ProgramWithStats.NAMES`."""
    estimate = estimate_fn(problem, estimator)

    def f(*arrays):
        result = estimate(*arrays)
        stats = [result.stats[name].astype(float) for name in ProgramWithStats.NAMES]
        return result.hypergradient, *stats

    return ProgramWithStats(f, *problem.arrays)


def indefinite(data: Data) -> ProgramWithStats:
    """Returns the estimate at the initial parameters, where H is indefinite."""
    problem = problems.cleaning(data)
    return hypergradient_and_stats(problem, implicit_at_w(problem))


WORKS = {
    "w1-unrolled": logistic_unrolled,
    "w1-forward": logistic_forward,
    "w1-solve": logistic_solve,
    "w1-whole": logistic_whole,
    "w2-unrolled": functools.partial(cleaning_unrolled, checkpoint=False),
    "w2-lowmem": functools.partial(cleaning_unrolled, checkpoint=True),
    "w2-implicit": cleaning_implicit,
    "w2-indefinite": indefinite,
    "w3-1000": schedule_reverse,
    "w3-10000": schedule_reverse,
    "w3-forward": schedule_forward,
    "w4": few_shot,
    "w6": logistic_trained,
    "overhead": logistic_unrolled,
    "overhead-solve": logistic_solve,
    "dispatch": dispatch,
    "eight": several_losses,
    "compile": functools.partial(recompiling_call, untraced_unrolled),
}
