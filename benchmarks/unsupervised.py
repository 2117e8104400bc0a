"""The table of density models: what held-out likelihood makes of them.

Each row chooses the hyperparameters of one of the three models by the likelihood of the
validation examples; the model is fitted anew, to convergence, and its likelihood on the
untouched test split is the result.
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

from .. import datasets as datasets
from .. import plots
from ..estimators import Estimator, Implicit, Unrolled
from ..inner import Descent
from ..linear import CG
from ..minimize import minimize
from ..searchers import Random
from ..tasks.task import Task
from ..tasks.unsupervised import make, ppca_ml_noise
from ..trace import Trace
from .program import Program, program, search
from .record import Row
from .study import MODEL, Column, Study, task_data, trace_columns
from .verdict import Claim

BUDGET = 1000
RATE = 0.2
NUM_GRID = 30
VARIANTS = ("kde", "ppca", "kmeans")
DESCENT = Descent(optax.sgd(1.0, momentum=0.5), 10)  # of kmeans, which has no formula
PRODUCTS = 10


def solver_of(variant: str, task: Task) -> Any:
    """Returns the solver that fits the model during learning."""
    return DESCENT if variant == "kmeans" else task.solver


def gradient_method(estimator: Callable, cost_of_step: Callable) -> Callable:
    """Returns a method that makes as many outer steps as fit the budget."""

    def learn(variant: str, task: Task, key: Array) -> Trace:
        solver = solver_of(variant, task)
        num_steps = int(BUDGET / cost_of_step(solver))
        return minimize(
            task.problem,
            estimator(solver),
            optax.adam(RATE),
            task.w,
            task.alpha,
            num_steps=num_steps,
            key=key,
            space=task.space,
        )

    return learn


def random_search(variant: str, task: Task, key: Array) -> Trace:
    """Returns the trace of log-uniform random search at the same budget."""
    return search(
        task.problem,
        solver_of(variant, task),
        Random(),
        task.w,
        space=task.space,
        budget=BUDGET,
        key=key,
    )


def implicit(solver: Any) -> Estimator:
    """Returns `Implicit` with at most 10 products per solve."""
    return Implicit(solver, CG(rtol=1e-3, max_steps=PRODUCTS))


def unrolled(solver: Any) -> Estimator:
    """Returns `Unrolled` with a warm start."""
    return Unrolled(solver, warm_start=True)


# Costs of a step: T inner gradients and two of the outer loss, half as large; then 2 a
# product, or T gradients and products for the reverse pass.
METHODS: dict[str, Callable] = {
    "random search": random_search,
    "implicit": gradient_method(
        implicit, lambda solver: solver.num_steps + 2 * (PRODUCTS + 1) + 1
    ),
    "unrolled": gradient_method(unrolled, lambda solver: 4 * solver.num_steps + 2),
}


@functools.cache
def wine() -> dict[str, np.ndarray]:
    """Returns the data, which are loaded once per process."""
    return datasets.load("wine")


def fitted(task: Task, alpha: PyTree) -> PyTree:
    """Returns ``w*(alpha)``, fitted to convergence."""
    problem = task.problem
    w, _ = task.solver.solve(
        problem.inner_loss, task.w, alpha, problem.inner_data, jax.random.key(0)
    )
    return w


def learn(variant: str, method: str, data: PyTree, key: Array) -> Trace:
    """Returns the trace of a method."""
    task = make(key=key, variant=variant, data=data)
    return METHODS[method](variant, task, jax.random.fold_in(key, 1))


def one_for_all(variant: str, data: PyTree, key: Array) -> PyTree:
    """Returns one hyperparameter for all features, the best on validation data.

    For PPCA it is the noise of maximum training likelihood, as in its publication.
    """
    task = make(key=key, variant=variant, data=data)
    problem, like = task.problem, jnp.ones_like(task.alpha)
    if variant == "ppca":
        return ppca_ml_noise(problem.inner_data) * like

    def value(alpha: Array) -> Array:
        return problem.outer_value(fitted(task, alpha * like), alpha * like, val)

    val = problem.outer_data
    low, high = task.space.low, task.space.high
    grid = jnp.geomspace(low, high, NUM_GRID + 2)[1:-1]
    return grid[jnp.nanargmin(jax.lax.map(value, grid))] * like


def evaluate(variant: str, data: PyTree, key: Array, alpha: PyTree) -> dict[str, Any]:
    """Returns measurements of the model that is fitted with ``alpha``."""
    task = make(key=key, variant=variant, data=data)
    w = fitted(task, alpha)
    val = task.problem.outer_value(w, alpha, task.problem.outer_data)
    return {"w": w, "val_nll": val} | task.metric_values(w, alpha, key)


# Rows.


def row(variant: str, method: str, seed: int) -> Row:
    """Returns the row of a model, method and seed."""
    key = jax.random.key(seed)
    if method == "baseline":
        alpha, result = program(one_for_all, variant)(wine(), key), {}
        if variant != "ppca":
            result = {"gradient_equivalents": float(NUM_GRID)}
    else:
        run = functools.partial(learn, variant, method)
        if method != "random search":
            run = program(learn, variant, method)
        start_time = time.perf_counter()
        trace = run(wine(), key)
        seconds = time.perf_counter() - start_time
        alpha = trace.best_alpha if method == "random search" else trace.alpha
        result: Row = trace_columns(trace) | {"run_seconds": seconds}
        if isinstance(run, Program):
            result |= {"compile_seconds": run.compile_seconds}
    measured = program(evaluate, variant)(wine(), key, alpha)
    result |= {name: float(x) for name, x in measured.items() if name != "w"}
    result[MODEL] = measured["w"], alpha
    return result | {"alpha": np.ravel(alpha).tolist()}


def plot(rows: list[Row], path: Path) -> None:
    """Draws the validation loss over cost, with a panel per model."""
    plots.unsupervised(rows, VARIANTS, path)


STUDY = Study(
    name="unsupervised",
    paradigm="unsupervised",
    source="Tipping & Bishop 1999; Duin 1976",
    about=(
        f"At most {BUDGET:,} gradient-equivalents (grad-eq) a run. Negative "
        "log-likelihood (nats) of the untouched test split; agreement is the adjusted "
        "Rand index of the clusters with the growers."
    ),
    data=lambda: ("scikit-learn wine (178 wines, 13 measurements)", wine()),
    split=lambda key: task_data(make(key=key, variant="kmeans", data=wine())),
    methods={
        f"{variant}, {method}": functools.partial(row, variant, method)
        for variant in VARIANTS
        for method in ("baseline", *METHODS)
    },
    columns=(
        Column("test nll", "test_nll", "{:.2f} ± {:.2f}"),
        Column("val nll", "val_nll", "{:.2f} ± {:.2f}"),
        Column("agreement", "agreement", "{:.2f} ± {:.2f}"),
    ),
    claims=(
        *(
            Claim(
                f"{variant}, {method}", f"{variant}, baseline", "test_nll", lower=True
            )
            for variant in VARIANTS
            for method in ("implicit", "unrolled")
        ),
        *(
            Claim(
                *(f"{variant}, implicit", f"{variant}, random search", "test_nll"),
                least=None,
                lower=True,
            )
            for variant in VARIANTS
        ),
    ),
    draw=plot,
    minutes=4,
)
