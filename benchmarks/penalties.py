"""The table of penalties: one for all weights against one an input of each layer.

Every row begins at one penalty for all weights, and every row may go from there as far
as a third of the validation examples, held out, finds good: the baseline chooses the
penalty by them and stays, the others choose an Adam rate, or how far a draw may lie.
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

from .. import datasets as datasets
from .. import plots, spaces
from ..estimators import Estimator, Implicit, Unrolled
from ..inner import Descent, Newton
from ..linear import CG, Neumann
from ..minimize import minimize
from ..searchers import Random
from ..tasks.classifier import held_out_examples
from ..tasks.penalties import SOLVER, VARIANTS, dataset_name, make, tolerances
from ..trace import Trace
from .program import CachedFunction, program, search
from .record import Row
from .study import MODEL, Column, Study, task_data, trace_columns, tune_and_run
from .verdict import Claim, Verdict

SYSTEMS = ("logistic", "softmax", "mlp", "cnn")
BUDGET = 3000
GRID = tuple(float(x) for x in range(-10, 0))  # log-penalties
RATES = (0.03, 0.1, 0.3)
WIDTHS = (0.5, 1.0, 2.0)
FINAL = Descent(optax.sgd(0.3, momentum=0.9), num_steps=500)
FINE = jnp.arange(-12.0, 1.0, 0.1)  # the grid that HOAG is judged by
HOAG_STEPS = 60


@functools.cache
def arrays(system: str) -> dict[str, np.ndarray]:
    """Returns the data, which are loaded once per process."""
    return datasets.load(dataset_name(system, "small"))


# Costs of a step in gradient-equivalents: T inner gradients and 2 a product (CG at most
# 20 and two; Neumann 19, 10 for its step size and one), or T more gradients and T
# products for the reverse pass; beside them two outer gradients.
STEPS = SOLVER.num_steps
ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "implicit": (Implicit(SOLVER, CG(rtol=1e-2, max_steps=20)), STEPS + 2 * 22),
    "neumann": (Implicit(SOLVER, Neumann(num_terms=20)), STEPS + 2 * 30),
    "unrolled": (Unrolled(SOLVER, warm_start=True), 4 * STEPS + 1),
}


def learn(
    system: str, method: str, data: PyTree, key: Array, hold_out: Any, start: Any,
    rate: Any,
) -> Trace:  # fmt: skip
    """Returns the trace of an estimator with as many steps as fit the budget."""
    task = make(
        key=key, variant=system, init_log_penalty=start, hold_out=hold_out, data=data
    )
    estimator, cost = ESTIMATORS[method]
    num_train, num_val, _ = VARIANTS[system].small
    num_steps = int(BUDGET / (cost + 2 * num_val / num_train))
    return minimize(
        task.problem,
        estimator,
        optax.adam(rate),
        task.w,
        task.alpha,
        num_steps=num_steps,
        key=key,
        space=task.space,
    )


def evaluate(
    system: str, data: PyTree, key: Array, hold_out: Any, alpha: PyTree
) -> dict[str, Any]:
    """Returns measurements after a long training with the penalties.

    ``selection`` is minus the loss on held-out examples.
    """
    task = make(key=key, variant=system, hold_out=hold_out, data=data)
    problem, val = task.problem, task.problem.outer_data
    w, _ = FINAL.solve(problem.inner_loss, task.w, alpha, problem.inner_data, key)
    return {
        "w": w,
        "selection": -problem.outer_value(w, alpha, held_out_examples(val)),
        "val_loss": problem.outer_value(w, alpha, val),
        **task.metric_values(w, alpha, key),
    }


def measured(system: str, key: Array, hold_out: bool, alpha: PyTree) -> Row:
    """Returns the numbers of `evaluate` and the model."""
    result = program(evaluate, system)(arrays(system), key, hold_out, alpha)
    numbers = {name: float(x) for name, x in result.items() if name != "w"}
    return numbers | {MODEL: (result["w"], alpha)}


@CachedFunction
def baseline(system: str, seed: int) -> Row:
    """Returns the row of the best shared penalty of the grid."""
    key = jax.random.key(seed)

    def run_once(penalty: float, hold_out: bool) -> Row:
        start_time = time.perf_counter()
        task = make(
            key=key, variant=system, init_log_penalty=penalty, data=arrays(system)
        )
        result = measured(system, key, hold_out, task.alpha)
        seconds = time.perf_counter() - start_time
        cost = float(FINAL.num_steps)
        return result | {"gradient_equivalents": cost, "run_seconds": seconds}

    return tune_and_run(run_once, GRID)


def by_gradient(system: str, method: str, seed: int) -> Row:
    """Returns the row of penalties that are learned from the baseline's penalty."""
    run, key = program(learn, system, method), jax.random.key(seed)
    first = baseline(system, seed)

    def run_once(rate: float, hold_out: bool) -> Row:
        start = jnp.asarray(first["setting"], float)
        prev_seconds = run.run_seconds
        trace = run(arrays(system), key, hold_out, start, jnp.asarray(rate))
        result = measured(system, key, hold_out, trace.best_alpha)
        seconds = {"run_seconds": run.run_seconds - prev_seconds}
        return result | trace_columns(trace) | seconds

    result = tune_and_run(run_once, RATES) | {"compile_seconds": run.compile_seconds}
    return result | {"tuning_cost": result["tuning_cost"] + first["tuning_cost"]}


def random_search(system: str, seed: int) -> Row:
    """Returns the row of the best of random penalties around the baseline's."""
    key, first = jax.random.key(seed), baseline(system, seed)

    def run_once(width: float, hold_out: bool) -> Row:
        start_time = time.perf_counter()
        task = make(key=key, variant=system, hold_out=hold_out, data=arrays(system))
        low, high = first["setting"] - width, first["setting"] + width
        box = lambda leaf: spaces.Box(low, high, shape=leaf.shape)
        trace = search(
            task.problem,
            task.solver,
            Random(),
            task.w,
            space=jax.tree.map(box, task.alpha),
            budget=BUDGET,
            key=key,
        )
        seconds = time.perf_counter() - start_time
        result = measured(system, key, hold_out, trace.best_alpha)
        return result | trace_columns(trace) | {"run_seconds": seconds}

    result = tune_and_run(run_once, WIDTHS)
    return result | {"tuning_cost": result["tuning_cost"] + first["tuning_cost"]}


# HOAG, and fifty images.


def hoag(data: PyTree, key: Array, rtol: Array) -> tuple[Array, Trace]:
    """Returns the best penalty of a fine grid and the trace of HOAG."""
    task = make(key=key, variant="hoag", data=data)
    problem = task.problem

    def value(alpha):
        w, _ = Newton().solve(
            problem.inner_loss, task.w, alpha, problem.inner_data, key
        )
        return problem.outer_value(w, alpha, problem.outer_data)

    trace = minimize(
        problem,
        Implicit(SOLVER, rtol=rtol),
        optax.adam(0.3),
        task.w,
        task.alpha,
        num_steps=HOAG_STEPS,
        key=key,
        space=task.space,
    )
    return FINE[jnp.argmin(jax.lax.map(value, FINE))], trace


def by_hoag(schedule: str, seed: int) -> Row:
    """Returns the row with the distance of HOAG's log-penalty from the grid's best."""
    run = program(hoag)
    prev_seconds = run.run_seconds
    rtol = (
        jnp.full(HOAG_STEPS, 1e-4)
        if schedule == "constant"
        else tolerances(schedule, HOAG_STEPS)
    )
    best, trace = run(arrays("hoag"), jax.random.key(seed), rtol)
    result = {"run_seconds": run.run_seconds - prev_seconds}
    result |= {"from_grid": float(abs(trace.alpha - best))}
    return trace_columns(trace) | result


def overfitted(per: str, data: PyTree, key: Array) -> tuple[Array, Trace]:
    """Returns the validation accuracy after overfitting, and its trace."""
    task = make(key=key, variant="overfit", granularity=per, data=data)
    trace = minimize(
        task.problem,
        ESTIMATORS["unrolled"][0],
        optax.adam(0.2),
        task.w,
        task.alpha,
        num_steps=40,
        key=key,
        space=task.space,
    )
    test: Any = task.metrics["test_accuracy"]  # the same on the other part
    on_val = jax.tree_util.Partial(test.func, task.problem.outer_data)
    return on_val(trace.w, trace.alpha, key), trace


def by_overfitting(per: str, seed: int) -> Row:
    """Returns the row of overfitting to 50 training and 50 validation images."""
    run = program(overfitted, per)
    prev_seconds = run.run_seconds
    accuracy, trace = run(arrays("overfit"), jax.random.key(seed))
    result = {"run_seconds": run.run_seconds - prev_seconds}
    return trace_columns(trace) | result | {"val_accuracy": float(accuracy)}


# The table.

LEARNED = {system: tuple(ESTIMATORS) for system in SYSTEMS} | {"cnn": ("unrolled",)}
METHODS: dict[str, Callable[[int], Row]] = {}
for name in SYSTEMS:
    METHODS |= {
        f"{name}, baseline": functools.partial(baseline, name),
        f"{name}, random search": functools.partial(random_search, name),
    }
    METHODS |= {
        f"{name}, {method}": functools.partial(by_gradient, name, method)
        for method in LEARNED[name]
    }
SCHEDULES = ("quadratic", "cubic", "exponential", "constant")
METHODS |= {f"HOAG, {s}": functools.partial(by_hoag, s) for s in SCHEDULES}
METHODS |= {
    "overfit, one penalty": functools.partial(by_overfitting, "model"),
    "overfit, one a weight": functools.partial(by_overfitting, "parameter"),
}


def judge(rows: list[Row]) -> list[Verdict]:
    """Returns verdicts on claims that must hold for every seed."""

    def line(text: str, method: str, column: str, holds: Callable) -> Verdict:
        values = [row[column] for row in rows if row["method"] == method]
        kept = all(map(holds, values))
        word = "reproduced" if kept else "not reproduced"
        return Verdict(f"{method}: {text.format(max(values))}: {word}", not kept)

    lines = [
        line(
            "at most {:.2f} from the grid's log-penalty, 0.5 claimed",
            *(f"HOAG, {schedule}", "from_grid", lambda x: x <= 0.5),
        )
        for schedule in SCHEDULES
    ]
    every = "every validation image is right on every seed"
    one_a_weight = ("overfit, one a weight", "val_accuracy", lambda x: x == 1.0)
    return [*lines, line(every, *one_a_weight)]


STUDY = Study(
    name="penalties",
    paradigm="supervised",
    source="Pedregosa 2016 (arXiv 1602.02355); Lorraine et al. 2020 (arXiv 1911.02590)",
    about=(
        f"On the four systems at most {BUDGET:,} gradient-equivalents (grad-eq) a run, "
        "after which every row trains the same way; loss and accuracy on the untouched "
        "test split. Baseline: one penalty; the others: one an input of each layer. "
        f"HOAG makes {HOAG_STEPS} outer steps, overfit 40."
    ),
    data=lambda: (
        "scikit-learn breast cancer (569 tumours) and digits (1,797 8x8 images)",
        {f"{s}_{name}": x for s in SYSTEMS[:2] for name, x in arrays(s).items()},
    ),
    split=lambda key: task_data(
        *(make(key=key, variant=s, data=arrays(s)) for s in VARIANTS)
    ),
    methods=METHODS,
    columns=(
        Column("test loss", "test_loss", "{:.3f} ± {:.3f}"),
        Column("accuracy %", "test_accuracy", scale=100),
        Column("val loss", "val_loss", "{:.3f} ± {:.3f}"),
        Column("val accuracy %", "val_accuracy", scale=100),
        Column("from grid", "from_grid", "{:.2f}", largest=True),
    ),
    claims=tuple(
        Claim(f"{s}, {m}", f"{s}, baseline", "test_loss", lower=True, ratio=True)
        for s in SYSTEMS
        for m in LEARNED[s]
    ),
    draw=plots.penalties,
    judge=judge,
    minutes=6,
)
