"""The table of schedules: a rate and a momentum a window, at three lengths of the run.

Every row begins at one rate and one momentum for all steps, which the baseline chooses
by a third of the validation examples, held out. The baseline stays there; the greedy
rule chooses how fast its rate may follow, the learned rows an Adam rate, and random
search how far a draw may lie. All is computed in float64, as `Reversible` asks.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import plots, spaces
from ..estimators import Estimator, Forward, Unrolled
from ..inner import Descent
from ..minimize import minimize
from ..searchers import Random
from ..tasks import schedules
from ..tasks.classifier import held_out_examples
from ..tasks.schedules import MOMENTA, RATES, SMALL, hypergradient_descent
from ..trace import Trace
from .program import CachedFunction, program, search
from .record import Row
from .study import Column, Study, digits, task_data, trace_columns, tune_and_run
from .verdict import Claim, Verdict

STEPS = {"100 steps": 100, "1000 steps": 1000, "10000 steps": 10_000}
RUNS = {"100 steps": 300, "1000 steps": 60, "10000 steps": 20}  # the budget, in runs
LONGEST = "10000 steps"
BATCH = 32 / SMALL[0]  # gradient-equivalents of a step
ORDERS = 4  # of the batches, in the final training
GRID = tuple((r, m) for r in (0.01, 0.03, 0.1, 0.2, 0.4, 0.8) for m in (0.5, 0.9))
FOLLOWS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # step sizes of the greedy rule
ADAM = (0.3, 0.1)
FACTORS = (2.0, 8.0)
GIBIBYTE = 2**30


# Windows that each method learns, and what its estimate costs in runs: the run, once
# more from checkpoints or backwards, and a product a step; or the run and a product a
# step for each of four numbers. A product counts 2.
LEARNED = {"unrolled": (5, 4), "reversible": (5, 4), "forward": (2, 9)}


def estimator_of(system: str, method: str) -> Estimator:
    """Returns the estimator of a mode; all modes differentiate the same steps."""
    steps = STEPS[system]
    solver = Descent(schedules.momentum_descent(steps), steps)
    return {
        "unrolled": Unrolled(solver),
        "reversible": schedules.reversible_estimator(steps),
        "forward": Forward(solver),
    }[method]


def budget(system: str) -> float:
    """Returns the budget of a row in gradient-equivalents."""
    return RUNS[system] * STEPS[system] * BATCH


def task_of(
    system: str, data: PyTree, key: Array, hold_out: Any = False, num_windows: int = 5
) -> Any:
    """Returns the task with a number of steps."""
    return schedules.make(
        key=key,
        num_steps=STEPS[system],
        num_windows=num_windows,
        hold_out=hold_out,
        data=data,
    )


def constant(alpha: PyTree, start: Array) -> PyTree:
    """Returns a schedule with the same rate and momentum in all windows."""
    rate, momentum = start
    return {
        "rate": jnp.full_like(alpha["rate"], rate),
        "momentum": jnp.full_like(alpha["momentum"], momentum),
    }


def learn(
    system: str, method: str, data: PyTree, key: Array, hold_out: Any, start: Array,
    adam: Array,
) -> Trace:  # fmt: skip
    """Returns the trace of a mode with as many outer steps as fit the budget."""
    num_windows, cost = LEARNED[method]
    task = task_of(system, data, key, hold_out, num_windows)
    outer = 1 + SMALL[1] / SMALL[0]  # the last inner gradient, and the outer one
    num_steps = int(budget(system) / (cost * STEPS[system] * BATCH + outer))
    return minimize(
        task.problem,
        estimator_of(system, method),
        optax.adam(optax.cosine_decay_schedule(adam, num_steps)),
        task.w,
        constant(task.alpha, start),
        num_steps=num_steps,
        key=key,
        space=task.space,
    )


def greedy(alpha: PyTree) -> optax.GradientTransformation:
    """Returns the run of the greedy rule with the settings of ``alpha``."""
    return hypergradient_descent(alpha["rate"], alpha["momentum"], alpha["follow"])


def evaluate(
    system: str, kind: str, data: PyTree, key: Array, hold_out: Any, alpha: PyTree
) -> dict[str, Array]:
    """Returns mean measurements over trainings with other orders of the batches.

    ``selection`` is minus the loss on held-out examples.
    """
    del kind  # whose ``alpha`` has a shape of its own
    task = task_of(system, data, key, hold_out)
    problem, val = task.problem, task.problem.outer_data
    solver = task.solver
    if "follow" in alpha:
        solver = Descent(greedy, STEPS[system])

    def per_order(order: Array) -> dict[str, Array]:
        w, _ = solver.solve(
            problem.inner_loss, task.w, alpha, problem.inner_data, order
        )
        return {
            "selection": -problem.outer_value(w, alpha, held_out_examples(val)),
            "val_loss": problem.outer_value(w, alpha, val),
            **task.metric_values(w, alpha, order),
        }

    orders = jax.random.split(jax.random.fold_in(key, 1), ORDERS)
    return jax.tree.map(jnp.mean, jax.vmap(per_order)(orders))


def measured(
    system: str, key: Array, hold_out: bool, alpha: PyTree, kind: str = "constant"
) -> Row:
    """Returns the numbers of `evaluate` and the schedule."""
    result = program(evaluate, system, kind)(digits(), key, hold_out, alpha)
    schedule = {
        name: np.atleast_1d(alpha[name]).tolist() for name in ("rate", "momentum")
    }
    return {name: float(x) for name, x in result.items()} | schedule


@CachedFunction
def baseline(system: str, seed: int) -> Row:
    """Returns the row of the best rate and momentum of the grid."""
    key = jax.random.key(seed)

    def run_once(start: tuple[float, float], hold_out: bool) -> Row:
        start_time = time.perf_counter()
        alpha = dict(
            zip(("rate", "momentum"), jnp.asarray(start)[:, None], strict=True)
        )
        result = measured(system, key, hold_out, alpha)
        seconds = time.perf_counter() - start_time
        cost = ORDERS * STEPS[system] * BATCH
        return result | {"gradient_equivalents": cost, "run_seconds": seconds}

    return tune_and_run(run_once, GRID)


def start_of(system: str, seed: int) -> tuple[Array, float]:
    """Returns the schedule of the baseline and the cost of its tuning."""
    first = baseline(system, seed)
    return jnp.array([first["rate"][0], first["momentum"][0]]), first["tuning_cost"]


def with_tuning(result: Row, first: float) -> Row:
    """Returns a row with the cost of the baseline's tuning added."""
    return result | {"tuning_cost": result.get("tuning_cost", 0.0) + first}


def by_greedy_rule(system: str, seed: int) -> Row:
    """Returns the row of a rate that follows its one-step derivative during a run."""
    key, (start, first) = jax.random.key(seed), start_of(system, seed)

    def run_once(follow: float, hold_out: bool) -> Row:
        start_time = time.perf_counter()
        alpha = {"rate": start[0], "momentum": start[1], "follow": jnp.asarray(follow)}
        result = measured(system, key, hold_out, alpha, "greedy")
        seconds = time.perf_counter() - start_time
        cost = ORDERS * STEPS[system] * BATCH
        return result | {"gradient_equivalents": cost, "run_seconds": seconds}

    return with_tuning(tune_and_run(run_once, FOLLOWS), first)


def settings_of(system: str, settings: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the settings to try; only the first for the longest run."""
    return settings[:1] if system == LONGEST else settings


def by_gradient(system: str, method: str, seed: int) -> Row:
    """Returns the row of a schedule that is learned from the baseline's."""
    run, key = program(learn, system, method), jax.random.key(seed)
    start, first = start_of(system, seed)

    def run_once(adam: float, hold_out: bool) -> Row:
        prev_seconds = run.run_seconds
        trace = run(digits(), key, hold_out, start, jnp.asarray(adam))
        seconds = run.run_seconds - prev_seconds
        result = measured(system, key, hold_out, trace.alpha, method)
        trusted = float(jnp.mean(trace.stats["trusted"]))
        result |= {"trusted": trusted, "run_seconds": seconds}
        return result | trace_columns(trace)

    result = tune_and_run(run_once, settings_of(system, ADAM))
    return with_tuning(result, first) | {
        "compile_seconds": run.compile_seconds,
        "memory": run.memory.temporaries,
    }


def around(start: Array, factor: float) -> PyTree:
    """Returns a log-uniform space of schedules within a factor of the start."""
    rate, momentum = map(float, start)
    least, most = max(RATES[0], rate / factor), min(RATES[1], rate * factor)
    low, high = 1 - (1 - momentum) * factor, 1 - (1 - momentum) / factor
    return {
        "rate": spaces.Interval(least, most, log=True, shape=(5,)),
        "momentum": spaces.Interval(
            max(MOMENTA[0], low), min(MOMENTA[1], high), shape=(5,)
        ),
    }


def random_search(system: str, seed: int) -> Row:
    """Returns the row of the best of random schedules around the baseline's."""
    key, (start, first) = jax.random.key(seed), start_of(system, seed)

    def run_once(factor: float, hold_out: bool) -> Row:
        start_time = time.perf_counter()
        task = task_of(system, digits(), key, hold_out)
        trace = search(
            task.problem,
            task.solver,
            Random(),
            task.w,
            space=around(start, factor),
            budget=budget(system),
            key=key,
        )
        seconds = time.perf_counter() - start_time
        result = measured(system, key, hold_out, trace.best_alpha, "unrolled")
        return result | trace_columns(trace) | {"run_seconds": seconds}

    return with_tuning(tune_and_run(run_once, settings_of(system, FACTORS)), first)


# The table.


def in_double(run: Callable[[int], Row]) -> Callable[[int], Row]:
    """Returns the row, measured in float64."""

    def row(seed: int) -> Row:
        with jax.enable_x64(True):
            return run(seed)

    return row


METHODS: dict[str, Callable[[int], Row]] = {}
for name in STEPS:
    METHODS |= {
        f"{name}, baseline": in_double(functools.partial(baseline, name)),
        f"{name}, greedy": in_double(functools.partial(by_greedy_rule, name)),
        f"{name}, random search": in_double(functools.partial(random_search, name)),
    }
    METHODS |= {
        f"{name}, {method}": in_double(functools.partial(by_gradient, name, method))
        for method in LEARNED
    }


def judge(rows: list[Row]) -> list[Verdict]:
    """Returns the verdict on the memory of the longest run."""
    lines = []
    for method in LEARNED:
        named = f"{LONGEST}, {method}"
        memory = max(row["memory"] for row in rows if row["method"] == named)
        word = "reproduced" if memory <= GIBIBYTE else "not reproduced"
        text = f"{named}: {memory / 2**20:.0f} MiB set aside, at most 1024 claimed"
        lines.append(Verdict(f"{text}: {word}", failed=memory > GIBIBYTE))
    return lines


STUDY = Study(
    name="schedules",
    paradigm="supervised",
    source="Maclaurin et al. 2015 (arXiv 1502.03492); Micaelli & Storkey 2021 "
    "(arXiv 2007.07869); Baydin et al. 2018 (arXiv 1703.04782)",
    about=(
        "At most "
        + ", ".join(f"{runs} runs of {name}" for name, runs in RUNS.items())
        + " for a row, in gradient-equivalents (grad-eq); loss and accuracy on the "
        f"untouched test split, means over {ORDERS} runs in other orders of the "
        "batches. Memory: what the compiled program sets aside."
    ),
    data=lambda: ("scikit-learn digits (1,797 8x8 images)", digits()),
    split=lambda key: task_data(schedules.make(key=key, data=digits())),
    methods=METHODS,
    columns=(
        Column("test loss", "test_loss", "{:.3f} ± {:.3f}"),
        Column("accuracy %", "test_accuracy", scale=100),
        Column("val loss", "val_loss", "{:.3f} ± {:.3f}"),
        Column("memory MiB", "memory", "{:.1f}", scale=2.0**-20, largest=True),
        Column("trusted %", "trusted", "{:.0f}", scale=100),
    ),
    claims=tuple(
        Claim(f"{name}, {method}", f"{name}, {against}", "test_loss", least, True, True)
        for name in STEPS
        for method in LEARNED
        for against, least in (
            ("baseline", 0.0),
            ("greedy", None),
            ("random search", None),
        )
    ),
    draw=plots.schedules,
    judge=judge,
    minutes=7,
)
