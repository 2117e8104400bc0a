"""The single-loop family on one system: its methods, and one run of one of them.

A system says what is drawn for a seed and how far an alpha is from the best. Rates are
chosen in `single_loop_grid`; `single_loop_table` makes the table of the reported seeds.
See README.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.problem import Bilevel
from hypergrad.studies.record import Row

DRAWN = ("TTSA", "SUSTAIN")  # how long their series are
DOUBLE_LOOP, SEARCH, TOTAL = "implicit", "random search", "random search, total"


class Drawn(NamedTuple):
    """What a seed's run begins with.

    suboptimality: ``(w, alpha, key) -> h(alpha) - h*``.
    """

    problem: Bilevel
    w: PyTree
    alpha: PyTree
    suboptimality: Callable[[PyTree, PyTree, Array], Array]


class System(NamedTuple):
    """What a table of the family runs on.

    Attributes:
      name, source, minutes: of the table.
      about: ``() -> what the data are``.
      prepare: ``seed -> arrays``, on the host.
      draw: ``arrays -> Drawn``, under `jax.jit`.
      budget: gradient-equivalents of a run.
      points: at which a run is evaluated, about.
      batches: of one pass over the inner data: the period of SRBA and VRBO.
      rates: of ``w``, the largest near ``1 / lambda_max``.
      ratios: of the rate of ``alpha`` to that of ``w``.
      low, high: the box in which ``alpha`` is kept, and random search draws.
    """

    name: str
    source: str
    minutes: float
    about: Callable[[], str]
    prepare: Callable[[int], PyTree]
    draw: Callable[[PyTree], Drawn]
    budget: float
    points: int
    batches: int
    rates: tuple[float, ...]
    ratios: tuple[float, ...]
    low: float
    high: float

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """What the grid tries."""
        return [(rate, ratio) for rate in self.rates for ratio in self.ratios]


def falling(rate: Array) -> Callable[[Array], Array]:
    """A schedule."""
    return lambda step: rate / jnp.sqrt(1 + step / 100)


def family(rate: Array, batches: int) -> dict[str, Callable[[], Any]]:
    """Every method with its inner rate; inner loops have ten steps.

    The step of a Neumann series is the rate of ``w``; F2SA's penalty grows as in its
    paper; rates fall in SOBA's second row alone, as ``rate / sqrt(1 + t / 100)``. The
    last one solves: ten steps of all data, ten products of conjugate gradients, both
    from where the last ended.
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
        "DARTS, first order": lambda: hg.DARTS(sgd),
        DOUBLE_LOOP: lambda: hg.Implicit(
            hg.Descent(sgd, 10), hg.CG(max_steps=10), warm_start=True
        ),
    }


METHODS = tuple(family(jnp.ones(()), 1))


def whole(problem: Bilevel) -> Bilevel:
    """On all data at once."""
    of = lambda data: data.data if isinstance(data, hg.Batches) else data
    return Bilevel(
        problem.inner_loss,
        problem.outer_loss,
        of(problem.inner_data),
        of(problem.outer_data),
    )


# One run.


def run(
    system: System, method: str, steps: int, points: int,
    arrays: PyTree, rate: Array, ratio: Array, key: Array,
) -> hg.Trace:  # fmt: skip
    """One run, evaluated at ``points`` of its steps and its last; 0: at none."""
    problem, w, alpha, suboptimality = system.draw(arrays)
    if method == DOUBLE_LOOP:
        problem = whole(problem)
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
    """Of evaluations."""
    return max(1, steps // max(1, points))


def evaluated(steps: int, points: int) -> np.ndarray:
    """The steps at which `minimize` evaluates."""
    return np.unique([*range(0, steps, spacing(steps, points)), steps - 1])


def curve(
    system: System, method: str, steps: int, points: int,
    arrays: PyTree, rate: Array, ratio: Array, key: Array,
) -> Row:  # fmt: skip
    """Where a run was at each evaluation and at its end, and what that had cost.

    An evaluation is of the ``alpha`` before a step, and costs what led there.
    """
    trace = run(system, method, steps, points, arrays, rate, ratio, key)
    at, of_step = evaluated(steps, points), trace.stats["gradient_equivalents"]
    last = system.draw(arrays).suboptimality(trace.w, trace.alpha, key)
    last = jnp.where(trace.status_code == 0, last, jnp.nan)
    total = lambda name: jnp.sum(jnp.nan_to_num(trace.stats[name]))
    return {
        "curve": jnp.append(trace.metrics["suboptimality"][at], last),
        "curve_cost": jnp.append((trace.cost - of_step)[at], trace.cost[-1]),
        "gradient_equivalents": trace.cost[-1],
        "num_grads": total("num_grads"),
        "num_hvps": total("num_hvps"),
    }


def seed_key(seed: int) -> Array:
    return jax.random.fold_in(jax.random.key(seed), 1)


def paid_for(cost: Any, budget: float) -> np.ndarray:
    """Which steps the budget pays for; in float32 what adds up is rounded."""
    return np.asarray(cost) <= budget * (1 + 1e-5)
