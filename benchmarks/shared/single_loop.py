"""Single-loop methods on one system, and one run of one of them.

A system states which problem a seed has and how far an alpha is from the best one.
`single_loop_rates` chooses the rates of a method; `single_loop_table` is the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Row
from hypergrad.extend import SingleLoopState
from hypergrad.problem import Bilevel

from .task_runs import implicit_by_cg

RANDOM_LENGTH = ("TTSA", "SUSTAIN")  # methods that sample the lengths of their series
DOUBLE_LOOP, SEARCH, TOTAL = "implicit", "random search", "random search, total"


class FirstOrderDARTS(hg.DARTS):
    """DARTS of first order also where its direction, ``dM/dalpha``, is always zero."""

    def init_memory(
        self, problem: Bilevel, state: SingleLoopState, alpha: PyTree
    ) -> None:
        """Accepts every problem."""


class SeedProblem(NamedTuple):
    """The problem of a seed.

    Attributes:
      problem: The problem.
      w, alpha: Initial values.
      suboptimality: ``(w, alpha, key) -> h(alpha) - h*``.
    """

    problem: Bilevel
    w: PyTree
    alpha: PyTree
    suboptimality: Callable[[PyTree, PyTree, Array], Array]


class System(NamedTuple):
    """The system of a table.

    Attributes:
      name: Name of the table.
      data_name: ``() -> description of the data``, which may be stand-ins.
      prepare: ``seed -> arrays``, on the host.
      make_problem: ``arrays -> SeedProblem``, under `jax.jit`.
      budget: Gradient-equivalents of a run.
      points: Approximate number of evaluations of a run.
      batches: Batches per pass over the inner data: the period of SRBA and VRBO.
      rates: Rates of ``w`` in the grid, the largest near ``1 / lambda_max``.
      ratios: Ratios in the grid, of the rate of ``alpha`` to that of ``w``.
      low, high: The box of ``alpha``, from which random search samples.
    """

    name: str
    data_name: Callable[[], str]
    prepare: Callable[[int], PyTree]
    make_problem: Callable[[PyTree], SeedProblem]
    budget: float
    points: int
    batches: int
    rates: tuple[float, ...]
    ratios: tuple[float, ...]
    low: float
    high: float

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The pairs of a rate and a ratio that the grid tries."""
        return [(rate, ratio) for rate in self.rates for ratio in self.ratios]


def falling(rate: Array | float) -> Callable[[Any], Array]:
    """Returns a schedule that falls as ``rate / sqrt(1 + t / 100)``."""
    return lambda step: rate / jnp.sqrt(1 + step / 100)


def family(rate: Array, batches: int) -> dict[str, Callable[[], Any]]:
    """Returns every method with its inner rate; inner loops have ten steps.

    The step size of a Neumann series is the rate of ``w``; the penalty of F2SA grows as
    in its paper; rates fall in the second row of SOBA alone. The last method solves the
    inner problem: ten steps on all data and ten products of conjugate gradients, both
    warm-started.
    """
    sgd = optax.sgd(rate)
    grow = lambda step: 10 * (1 + step) ** (1 / 7)
    return {
        "SOBA": lambda: hg.SOBA(sgd),
        "SOBA, falling": lambda: hg.SOBA(optax.sgd(falling(rate))),
        "SABA": lambda: hg.SABA(sgd),
        "SRBA": lambda: hg.SRBA(sgd, period=batches),
        "FSLA": lambda: hg.FSLA(sgd),
        "StocBiO": lambda: hg.StocBiO(sgd, 10, 10, step_size=rate),
        "AmIGO": lambda: hg.AmIGO(sgd, 10, 10),
        "TTSA": lambda: hg.TTSA(sgd, 10, step_size=rate),
        "MRBO": lambda: hg.MRBO(sgd, 10, step_size=rate),
        "SUSTAIN": lambda: hg.SUSTAIN(sgd, 10, step_size=rate),
        "VRBO": lambda: hg.VRBO(sgd, 3, 10, period=batches, step_size=rate),
        "F2SA": lambda: hg.F2SA(sgd, 10, penalty=grow),
        "BOME": lambda: hg.BOME(sgd, 10, step_size=rate),
        "PZOBO": lambda: hg.PZOBO(sgd, 10, 1),
        "DARTS": lambda: hg.DARTS(sgd, rate),
        "DARTS, first order": lambda: FirstOrderDARTS(sgd),
        DOUBLE_LOOP: lambda: implicit_by_cg(
            hg.Descent(sgd, 10), max_steps=10, warm_start=True
        ),
    }


METHODS = tuple(family(jnp.ones(()), 1))


def without_batches(problem: Bilevel) -> Bilevel:
    """Returns the problem with all data at once."""
    all_data = lambda data: data.data if isinstance(data, hg.Batches) else data
    return Bilevel(
        problem.inner_loss,
        problem.outer_loss,
        all_data(problem.inner_data),
        all_data(problem.outer_data),
    )


# One run.


def run(
    system: System, method: str, steps: int, points: int,
    arrays: PyTree, rate: Array, ratio: Array, key: Array,
) -> hg.Trace:  # fmt: skip
    """Returns the trace of a run that is evaluated at about ``points`` of its steps.

    With ``points=0`` it is not evaluated.
    """
    problem, w, alpha, suboptimality = system.make_problem(arrays)
    if method == DOUBLE_LOOP:
        problem = without_batches(problem)
    outer_rate = rate * ratio
    if method.endswith("falling"):
        outer_rate = falling(rate * ratio)
    loop = hg.OuterLoop(
        problem,
        family(rate, system.batches)[method](),
        optax.sgd(outer_rate),
        project=lambda alpha: optax.projections.projection_box(
            alpha, system.low, system.high
        ),
        metrics={"suboptimality": suboptimality} if points else {},
        eval_every=spacing(steps, points),
    )
    return loop.run(loop.init(w, alpha, key), num_steps=steps)


def spacing(steps: int, points: int) -> int:
    """Returns the number of steps between evaluations."""
    return max(1, steps // max(1, points))


def evaluated_steps(steps: int, points: int) -> np.ndarray:
    """Returns the steps at which the outer loop evaluates its metrics."""
    return np.unique([*range(0, steps, spacing(steps, points)), steps - 1])


def curve(
    system: System, method: str, steps: int, points: int,
    arrays: PyTree, rate: Array, ratio: Array, key: Array,
) -> Row:  # fmt: skip
    """Returns the suboptimality at each evaluation and after the run, with its cost.

    An evaluation is that of the ``alpha`` before a step; its cost is that of all
    earlier steps.
    """
    trace = run(system, method, steps, points, arrays, rate, ratio, key)
    index, step_cost = (
        evaluated_steps(steps, points),
        trace.stats["gradient_equivalents"],
    )
    problem = system.make_problem(arrays)
    final = problem.suboptimality(trace.w, trace.alpha, key)
    final = jnp.where(trace.status_code == 0, final, jnp.nan)
    total = lambda name: jnp.sum(jnp.nan_to_num(trace.stats[name]))
    return {
        "curve": jnp.append(trace.metrics["suboptimality"][index], final),
        "curve_cost": jnp.append((trace.cost - step_cost)[index], trace.cost[-1]),
        "gradient_equivalents": trace.cost[-1],
        "num_grads": total("num_grads"),
        "num_hvps": total("num_hvps"),
    }


def seed_key(seed: int) -> Array:
    """Returns the key of a seed."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def paid_for(cost: Any, budget: float) -> np.ndarray:
    """Returns which steps the budget pays for; sums are rounded in float32."""
    return np.asarray(cost) <= budget * (1 + 1e-5)
