"""The table of contrastive learning: who sets the temperature and the views.

Each method chooses temperature and strengths by the probe's validation error; four
encoders are then trained anew with what it chose, and judged by the probe on the
untouched test split, as are those of twelve temperatures with the default strengths.
The best of these is chosen by four encoders more.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import plots
from ..estimators import Estimator, Unrolled
from ..minimize import minimize
from ..problem import sample_batch
from ..searchers import Random
from ..tasks.self_supervised import BATCH, DEFAULT, NUM_TRAIN, SOLVER, SPACE, make
from ..tasks.task import Task
from ..trace import Trace
from .program import CachedFunction, Program, program, search
from .record import Row
from .study import DIGITS, Column, Study, digits, task_data, trace_columns
from .verdict import Claim, Verdict, conclude, paired

BUDGET = 1500
RATE = 0.3
LAST = 25
TEMPERATURES = np.geomspace(0.02, 2.0, 12)
NUM_TRAININGS = 4
JUDGED, CHOSEN = 2, 3  # what an encoder is for, and where its keys come from

# Costs in gradient-equivalents: a training, and an outer step that differentiates it,
# whose steps run twice (a truncated one's last steps alone) before their products.
TRAINING = SOLVER.num_steps * BATCH / NUM_TRAIN
OUTER = 0.5


def by_gradient(estimator: Estimator, cost_of_step: float, learned: set) -> Callable:
    """Returns a method that learns some of the hyperparameters within the budget."""
    num_steps = int(BUDGET / cost_of_step)
    rate = optax.cosine_decay_schedule(RATE, num_steps)  # each run is noisy
    labels = {name: "learn" if name in learned else "stay" for name in DEFAULT}
    optimizer = optax.partition(
        {"learn": optax.adam(rate), "stay": optax.set_to_zero()}, labels
    )

    def learn(task: Task, key: Array) -> Trace:
        return minimize(
            task.problem,
            estimator,
            optimizer,
            task.w,
            task.alpha,
            num_steps=num_steps,
            key=key,
            space=task.space,
        )

    return learn


def random_search(task: Task, key: Array) -> Trace:
    """Returns the trace of random search over all four, at the same budget."""
    return search(
        task.problem, task.solver, Random(), task.w, space=SPACE, budget=BUDGET, key=key
    )


WHOLE = Unrolled(SOLVER, warm_start=False)
TRUNCATED = Unrolled(SOLVER, truncation_length=LAST, warm_start=False)
METHODS: dict[str, Any] = {
    "baseline": None,
    "random search": random_search,
    "temperature": by_gradient(WHOLE, 4 * TRAINING + 1 + OUTER, {"temperature"}),
    "unrolled": by_gradient(WHOLE, 4 * TRAINING + 1 + OUTER, set(DEFAULT)),
    "truncated": by_gradient(
        TRUNCATED,
        (1 + 3 * LAST / SOLVER.num_steps) * TRAINING + 1 + OUTER,
        set(DEFAULT),
    ),
}


def learn(method: Callable, data: PyTree, key: Array) -> Trace:
    """Returns the trace of a method."""
    return method(make(key=key, data=data), jax.random.fold_in(key, 1))


def evaluate(data: PyTree, key: Array, alpha: PyTree, purpose: int) -> dict[str, Array]:
    """Returns mean errors and accuracy of encoders that are trained with new keys."""
    task = make(key=key, data=data)
    problem = task.problem

    def per_key(key: Array) -> dict[str, Array]:
        w, _ = task.solver.solve(
            problem.inner_loss, task.w, alpha, problem.inner_data, key
        )
        val = problem.outer_value(w, alpha, sample_batch(problem.outer_data, key))
        return {"val_error": val} | task.metric_values(w, alpha, key)

    keys = jax.random.split(jax.random.fold_in(key, purpose), NUM_TRAININGS)
    return jax.tree.map(jnp.mean, jax.lax.map(per_key, keys))


# Rows.


def measured(seed: int, alpha: PyTree, purpose: int) -> dict[str, float]:
    """Returns the numbers of `evaluate`."""
    result = program(evaluate)(digits(), jax.random.key(seed), alpha, purpose)
    return {name: float(x) for name, x in result.items()}


@CachedFunction
def grid(seed: int, purpose: int) -> list[dict[str, float]]:
    """Returns the measurements of each temperature with the default strengths."""
    return [
        measured(seed, DEFAULT | {"temperature": temperature}, purpose)
        for temperature in TEMPERATURES
    ]


def row(method: str, seed: int) -> Row:
    """Returns the row of a method and seed."""
    judged = grid(seed, JUDGED)
    test_errors = np.array([metrics["test_error"] for metrics in judged])
    if method == "baseline":
        tried = grid(seed, CHOSEN)
        best = int(np.argmin([metrics["val_error"] for metrics in tried]))
        cost = len(tried) * NUM_TRAININGS * TRAINING
        result: Row = judged[best] | {
            "temperature": float(TEMPERATURES[best]),
            "gradient_equivalents": cost,
            "grid_errors": test_errors.tolist(),
        }
    else:
        learned = METHODS[method]
        on_host = functools.partial(learn, learned)
        run = on_host if method == "random search" else program(learn, learned)
        start_time = time.perf_counter()
        trace = run(digits(), jax.random.key(seed))
        seconds = time.perf_counter() - start_time
        result = measured(seed, trace.alpha, JUDGED)
        result |= {name: float(x) for name, x in trace.alpha.items()}
        result |= trace_columns(trace) | {"run_seconds": seconds}
        if isinstance(run, Program):
            result |= {"compile_seconds": run.compile_seconds}
    result["beaten_by"] = float(np.mean(test_errors < result["test_error"]))
    return result


def quartile(rows: list[Row]) -> list[Verdict]:
    """Returns the verdict on the rank of the learned temperature among twelve."""
    beaten = [row["beaten_by"] for row in rows if row["method"] == "temperature"]
    mean, low, high = paired(beaten, 0.0)
    text = (
        "share of the 12 temperatures with a lower test error than the learned one: "
        f"{mean:.2f} [{low:.2f}, {high:.2f}], at most 0.25 claimed"
    )
    met = mean <= 0.25 and high < 0.5
    return [conclude(text, met, len(beaten), (high - low) / 2, 0.25)]


def plot(rows: list[Row], path: Path) -> None:
    """Draws test error over temperature and validation error over cost."""
    plots.self_supervised(rows, TEMPERATURES, path)


STUDY = Study(
    name="self_supervised",
    paradigm="self-supervised",
    source="Chen et al. 2020 (arXiv 2002.05709)",
    about=(
        f"At most {BUDGET:,} gradient-equivalents (grad-eq) a run, the twelve "
        "temperatures of the baseline outside it. Squared error (half) and accuracy of "
        "the probe on the untouched test split, means over four encoders that chose "
        "nothing; beaten by is the share of the twelve temperatures that do better."
    ),
    data=lambda: (DIGITS, digits()),
    split=lambda key: task_data(make(key=key, data=digits())),
    methods={method: functools.partial(row, method) for method in METHODS},
    columns=(
        Column("accuracy %", "test_accuracy", scale=100),
        Column("test error", "test_error", "{:.4f} ± {:.4f}"),
        Column("val error", "val_error", "{:.4f}"),
        Column("temperature", "temperature", "{:.2f} ± {:.2f}"),
        Column("beaten by", "beaten_by", "{:.2f}"),
    ),
    claims=tuple(
        Claim(first, second, "test_error", least=least, lower=True)
        for first, second, least in (
            ("unrolled", "baseline", 0.0),
            ("truncated", "baseline", 0.0),
            ("unrolled", "random search", None),
            ("temperature", "baseline", None),
        )
    ),
    draw=plot,
    judge=quartile,
    minutes=12,
    seeds=10,
)
