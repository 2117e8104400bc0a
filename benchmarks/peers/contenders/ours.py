"""hypergrad's public names alone, as a user who wants speed would call them.

Each work is one jitted function of the data that returns the hypergradient: what else
an `Estimate` tells is not computed where nobody asks for it. `dispatch` is the ready
function of `hypergradient` with all that it tells.
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
from ..problems import Problem, Program, flat
from ..work import Data


class InTurn(eqx.Module):
    """A `Descent` whose step t sees batch t, counted modulo their number."""

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
        batch = problems.batch_of(data, t)
        w, state = self.solver.step(inner_loss, (w, state), alpha, batch, key)
        return w, (state, t + 1)

    def solve(self, inner_loss, w, alpha, data, key):
        carry = self.init(inner_loss, w, alpha, data, key)
        step = lambda carry, _: (self.step(inner_loss, carry, alpha, data, key), None)
        (w, _), _ = jax.lax.scan(step, carry, length=self.num_steps)
        return w, inner_stats(self.num_steps, self.num_steps / len(data["y"]))


def momentum(problem: Problem) -> hg.Descent:
    given = problem.given
    optimizer = optax.sgd(given["rate"], given["momentum"])
    return hg.Descent(optimizer, given["steps"])


def at_w(problem: Problem, **options: Any) -> hg.Implicit:
    """No inner step: the derivative at the w that is given."""
    stay = hg.Descent(optax.sgd(0.0), 0)
    solver = hg.CG(rtol=0.0, max_steps=problem.given["products"])
    return hg.Implicit(stay, solver, **options)


def estimate(problem: Problem, estimator: Any) -> Callable[..., hg.Estimate]:
    """A function of the problem's arrays."""

    def f(train, val, w, alpha):
        bilevel = hg.Bilevel(problem.inner, problem.outer, train, val)
        return hg.hypergradient(bilevel, estimator)(w, alpha)

    return f


def hypergradient(problem: Problem, estimator: Any) -> Program:
    """Of `estimate` that alone."""
    whole = estimate(problem, estimator)
    return Program(lambda *arrays: whole(*arrays).hypergradient, *problem.arrays)


def logistic_unrolled(data: Data) -> Program:
    problem = problems.logistic(data)
    return hypergradient(problem, hg.Unrolled(momentum(problem), checkpoint=False))


def logistic_forward(data: Data) -> Program:
    """One penalty for all features: the derivative along ones."""
    problem = problems.logistic(data)
    problem = problem._replace(alpha=problem.alpha[0])
    return hypergradient(problem, hg.Forward(momentum(problem)))


def logistic_solve(data: Data) -> Program:
    problem = problems.logistic(data, solved=True)
    return hypergradient(problem, at_w(problem))


def logistic_whole(
    data: Data, *, solver: str, gradient: float, adjoint: float
) -> Program:
    """``solver`` is `Newton` or `LBFGS`."""
    inner = getattr(hg, solver)(tolerance=gradient)
    estimator = hg.Implicit(inner, hg.CG(rtol=adjoint))
    return hypergradient(problems.logistic(data), estimator)


def logistic_trained(data: Data) -> Program:
    problem = problems.logistic(data)
    solver = hg.CG(rtol=0.0, max_steps=problem.given["products"])
    return hypergradient(problem, hg.Implicit(momentum(problem), solver))


def cleaning_unrolled(data: Data, *, checkpoint: bool) -> Program:
    problem = problems.cleaning(data)
    estimator = hg.Unrolled(momentum(problem), checkpoint=checkpoint)
    return hypergradient(problem, estimator)


def cleaning_implicit(data: Data) -> Program:
    problem = problems.cleaning(data, solved=True)
    return hypergradient(problem, at_w(problem))


def scheduled(problem: Problem, times: int = 1) -> InTurn:
    """So many times the steps."""
    given = problem.given
    optimizer = lambda alpha: optax.sgd(jnp.exp(alpha[0]), given["momentum"])
    return InTurn(hg.Descent(optimizer, times * given["steps"]))


def schedule_reverse(data: Data) -> Program:
    """With checkpoints."""
    problem = problems.schedule(data)
    return hypergradient(problem, hg.Unrolled(scheduled(problem), checkpoint=True))


class Steady(Program):
    """A program that also tells the scratch of a longer one."""

    longer: Program

    def notes(self) -> dict[str, float]:
        """Bytes of scratch of both."""
        self.longer.compile()
        return super().notes() | {"longer": self.longer.notes()["scratch"]}


def schedule_forward(data: Data) -> Program:
    """Uses forward mode, which `hg.unrolled_estimator` selects for few hyperparameters.

    Ten times the steps are compiled as well, when the first call is over.
    """
    problem = problems.schedule(data)
    once, longer = (
        hypergradient(
            problem, hg.unrolled_estimator(scheduled(problem, times), problem.alpha)
        )
        for times in (1, 10)
    )
    steady = Steady(once.f, *once.arrays)
    steady.longer = longer
    return steady


def few_shot(data: Data) -> Program:
    """Task by task, by `lax.map`."""
    problem = problems.few_shot(data)
    given = problem.given
    solver = hg.Descent(optax.sgd(given["rate"]), given["steps"])
    estimator = hg.Unrolled(solver, checkpoint=False)
    shared = lambda w, alpha: alpha

    def f(train, val, w, alpha):
        def one(task):
            bilevel = hg.Bilevel(problem.inner, problem.outer, *task, init_fn=shared)
            return hg.hypergradient(bilevel, estimator)(w, alpha).hypergradient

        each = jax.lax.map(one, (train, val))
        return jax.tree.map(lambda g: jnp.mean(g, 0), each)

    return Program(f, *problem.arrays)


# What the table of the issue asks beside the works that peers do.


def ready(problem: Problem, estimator: Any) -> Callable[[], np.ndarray]:
    """`hypergradient` made once and called, with all that it tells."""
    train, val, w, alpha = problem.arrays
    bilevel = hg.Bilevel(problem.inner, problem.outer, train, val)
    gradient = hg.hypergradient(bilevel, estimator)
    return lambda: flat(gradient(w, alpha).hypergradient)


def dispatch(data: Data) -> Callable[[], np.ndarray]:
    problem = problems.logistic(data, solved=True)
    return ready(problem, at_w(problem))


def several(data: Data) -> Program:
    """All validation losses, each of its own labels, in one estimate."""
    problem = problems.logistic(data, solved=True)

    def loss(row, w, alpha, batch):
        one = {"x": batch["x"], "y": batch["y"][row]}
        return problems.misfit(w, alpha, one)

    number = len(data["y_val"])
    outer = tuple(functools.partial(loss, row) for row in range(number))
    return hypergradient(problem._replace(outer=outer), at_w(problem))


def compiles(make: Callable[[Data], Program], data: Data) -> Callable[[], np.ndarray]:
    """Traces and compiles anew at every call, and runs once."""

    def call():
        jax.clear_caches()
        return make(data)()

    return call


def anew(data: Data) -> Program:
    """`logistic_unrolled`, no part of which was ever traced."""
    problem = problems.logistic(data)
    inner = lambda w, alpha, batch: problems.penalised(w, alpha, batch)
    outer = lambda w, alpha, batch: problems.misfit(w, alpha, batch)
    estimator = hg.Unrolled(momentum(problem), checkpoint=False)
    return hypergradient(problem._replace(inner=inner, outer=outer), estimator)


class Flagged(Program):
    """A program of a hypergradient and of what is told of it.

    The answer is the first; notes tell the others, and whether it is finite.
    """

    TOLD = "trusted", "ritz_min", "adjoint_residual"

    def __call__(self) -> np.ndarray:
        whole = super().__call__()
        answer, told = whole[: -len(self.TOLD)], whole[-len(self.TOLD) :]
        self.told = dict(zip(self.TOLD, map(float, told), strict=True))
        self.told["finite"] = float(np.isfinite(answer).all())
        return answer

    def notes(self) -> dict[str, float]:
        """And scratch; what nothing was seen of is left out."""
        seen = {name: told for name, told in self.told.items() if np.isfinite(told)}
        return super().notes() | seen


def flagged(problem: Problem, estimator: Any) -> Flagged:
    """With `Flagged.TOLD` of its estimate."""
    whole = estimate(problem, estimator)

    def f(*arrays):
        found = whole(*arrays)
        told = [found.stats[name].astype(float) for name in Flagged.TOLD]
        return found.hypergradient, *told

    return Flagged(f, *problem.arrays)


def indefinite(data: Data) -> Flagged:
    """At the initialisation, where H has negative eigenvalues."""
    problem = problems.cleaning(data)
    return flagged(problem, at_w(problem))


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
    "eight": several,
    "compile": functools.partial(compiles, anew),
}
