"""The table of few-shot learning: what to share among tasks, and how it is learned.

Each row learns on tasks of the training characters, sets its one setting by the
accuracy on those of the validation characters, and is judged once by the accuracy on
tasks of characters that it never saw.
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
from ..estimators import Estimator, Implicit, Unrolled
from ..linear import CG
from ..minimize import minimize
from ..searchers import Random
from ..tasks.few_shot import SOLVERS, characters, make
from ..trace import Trace
from .program import Program, program, search
from .record import Row
from .study import Column, Study, task_data, trace_columns, tune_and_run
from .verdict import Claim

BUDGET = 4_000
RATES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of Adam; 0 leaves all as it begins
PENALTIES = (0.1, 1.0, 10.0, 100.0)
TOTAL = BUDGET * (1 + len(RATES))  # with tuning
QUERY = 15.0  # queries for one example to learn from, what an outer gradient costs
PRODUCTS = 5


@functools.cache
def drawings() -> tuple[str, np.ndarray, int]:
    """Returns the digits, which are available without a download."""
    return characters("small", "")


def by_gradient(
    variant: str, estimator: Callable[[Any], Estimator], cost_of_step: float
) -> Callable:
    """Returns a method that makes as many outer steps as fit the budget."""
    num_steps = int(BUDGET / cost_of_step)

    def learn(images: Array, key: Array, rate: Array) -> tuple[PyTree, Trace]:
        task = make(key=key, variant=variant, images=images, num_turns=drawings()[2])
        trace = minimize(
            task.problem,
            estimator(task.solver),
            optax.adam(rate),
            task.w,
            task.alpha,
            num_steps=num_steps,
            key=jax.random.fold_in(key, 1),
        )
        return trace.alpha, trace

    return learn


def random_search(
    budget: float, images: Array, key: Array, rate: Array
) -> tuple[PyTree, Trace | None]:
    """Returns the best of random initial networks with a closed-form head."""
    del rate
    task = make(key=key, variant="ridge", images=images, num_turns=drawings()[2])
    trace = search(
        task.problem,
        task.solver,
        Random(),
        task.w,
        space=jax.tree.map(around_zero, task.alpha)
        | {
            "log_penalty": spaces.Interval(-3.0, 3.0),
            "scale": spaces.Interval(0.1, 10.0, log=True),
        },
        budget=budget,
        key=jax.random.fold_in(key, 1),
    )
    return trace.alpha, trace


def around_zero(leaf: Array) -> spaces.Interval:
    """Returns a uniform space of variance 1 / fan-in, with biases up to 0.1."""
    bound = (3 / leaf.shape[0]) ** 0.5 if leaf.ndim == 2 else 0.1
    return spaces.Interval(-bound, bound, shape=leaf.shape)


def of_pixels(images: Array, key: Array, penalty: Array) -> tuple[PyTree, Trace | None]:
    """Returns ridge regression on pixels, which shares nothing between tasks."""
    task = make(
        key=key, variant="ridge", hidden=(), images=images, num_turns=drawings()[2]
    )
    return task.alpha | {"log_penalty": jnp.log(penalty)}, None


# Costs of a step: T inner gradients, an outer one (two where trust is judged), and 2 a
# product, or T more gradients and T products for the reverse pass.
STEPS = {name: solver.num_steps for name, solver in SOLVERS.items()}
METHODS: dict[str, tuple[str, Callable, tuple[float, ...]]] = {
    "baseline": ("ridge", of_pixels, PENALTIES),
    "random search": ("ridge", functools.partial(random_search, BUDGET), (0.0,)),
    "random search, total": (
        "ridge",
        functools.partial(random_search, TOTAL),
        (0.0,),
    ),
    "maml": (
        "maml",
        by_gradient("maml", Unrolled, 4 * STEPS["maml"] + 1 + QUERY),
        RATES,
    ),
    "imaml": (
        "imaml",
        by_gradient(
            "imaml",
            lambda solver: Implicit(solver, CG(max_steps=PRODUCTS)),
            STEPS["imaml"] + 2 * (PRODUCTS + 2) + 2 * QUERY,
        ),
        RATES,
    ),
    "ridge head": (
        "ridge",
        by_gradient("ridge", Unrolled, 4 + QUERY),
        RATES,
    ),
}


def measure(
    variant: str, hidden: tuple[int, ...], metric: str, images: Array, key: Array,
    alpha: PyTree,
) -> Array:  # fmt: skip
    """Returns the accuracy on 100 new tasks of validation or test characters."""
    task = make(
        key=key, variant=variant, hidden=hidden, images=images, num_turns=drawings()[2]
    )
    return task.metrics[metric](task.w, alpha, jax.random.fold_in(key, 2))


# Rows.


def row(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned on the validation characters."""
    variant, learn, settings = METHODS[method]
    hidden = () if method == "baseline" else (64,)
    on_host = method.startswith("random search")
    run = learn if on_host else program(learn)
    images, key = jnp.asarray(drawings()[1]), jax.random.key(seed)

    def run_once(setting: float, choosing: bool) -> Row:
        start_time = time.perf_counter()
        alpha, trace = run(images, key, jnp.float32(setting))
        seconds = time.perf_counter() - start_time
        metric = "val_accuracy" if choosing else "test_accuracy"
        score = program(measure, variant, hidden, metric)(images, key, alpha)
        result: Row = {metric: float(score), "run_seconds": seconds}
        if choosing:
            result["selection"] = float(score)
        if trace is not None:
            result |= trace_columns(trace)
        return result

    result = tune_and_run(run_once, settings)
    if isinstance(run, Program):
        result |= {"compile_seconds": run.compile_seconds}
    return result


STUDY = Study(
    name="few_shot",
    paradigm="few-shot",
    source="Finn et al. 2017 (arXiv 1703.03400), Rajeswaran et al. 2019 (1909.04630)",
    about=(
        f"Five-way one-shot tasks; at most {BUDGET:,} gradient-equivalents (grad-eq) a "
        "run; of 'random search, total' what the others spend with their tuning. "
        "Accuracy on a hundred tasks of characters that no row has seen."
    ),
    data=lambda: (drawings()[0], {"x": drawings()[1]}),
    split=lambda key: task_data(
        make(key=key, images=jnp.asarray(drawings()[1]), num_turns=drawings()[2])
    ),
    methods={method: functools.partial(row, method) for method in METHODS},
    columns=(Column("accuracy %", "test_accuracy", scale=100),),
    claims=(
        *(
            Claim(method, "baseline", "test_accuracy", scale=100, unit="points")
            for method in ("maml", "imaml", "ridge head")
        ),
        *(
            Claim(
                *(method, other, "test_accuracy"),
                least=None,
                scale=100,
                unit="points",
            )
            for other in ("random search", "random search, total")
            for method in ("maml", "imaml", "ridge head")
        ),
    ),
    draw=plots.few_shot,
    minutes=7,
)
