"""Few-shot learning: what tasks share, and how it is learned.

Question: given one drawing of each of five characters never seen before, is a model
that learned from many such tasks better than one that learned nothing?

Data: scikit-learn's digits, 170 drawings of each, 8x8 pixels divided by 16. A
permutation by the seed selects four digits for training, three for validation and three
for testing. Each digit, upright and turned by 90 degrees, makes two classes, so that
there are eight, six and six classes. There are no half turns: a 6 would be a 9, and a
0, 1 or 8 nearly itself. `hypergrad.tasks.few_shot.make` takes Omniglot where its file
exists; the table does not, so that everybody gets the same numbers.

Model: a task has five classes, one drawing of each to learn from and 15 queries. The
network has two layers of 64 tanh units; an outer step samples four tasks. The row maml
learns a shared start of the network and a linear head by reverse mode through five
steps of gradient descent with rate 0.4. The row imaml learns the same start as a
proximal term of strength 2, with 16 steps of rate 0.2 and at most 5 products of CG. The
row ridge head learns shared features, penalty and scale; its head is in closed form.
The baseline is ridge regression on the pixels of each task and shares nothing.

Budget: 4,000 gradient-equivalents per run; a gradient on the queries counts as 15.
Random search samples networks as they are initialized, for the ridge head, and keeps
the one with the lowest query loss; "random search, total" has as much as another row's
run and tuning together, 28,000. The other rows keep their last `alpha`: each step's
loss is of other tasks, and the lowest one is that of the easiest tasks.

Tuning, the same for every row: the one setting of a row is the rate of Adam in {0,
1e-4, 3e-4, 1e-3, 3e-3, 1e-2}, or the baseline's penalty in {0.1, 1, 10, 100}. The
setting with the best accuracy on a hundred tasks of the validation characters is
chosen. Random search has none. Rate 0 leaves everything as it begins: what is learned
from so few classes may be worse than nothing, and then the row says so.

Claims, seeds 0 to 4: maml, imaml and ridge head are each more accurate than the
baseline on a hundred tasks of the test characters. The comparisons with random search
claim nothing.

The rates of the inner steps are near those of the papers; budget and grids were set on
seeds 100 and 101. There imaml gains until about 4,000 and no more from there to 8,000,
with best rates 1e-3 and 3e-3. The rows maml and ridge head gain nothing that validation
can show, at any budget: rate 0 was best except for maml on seed 101 (3e-4). In a first
run, with four turns, a 6:2:2 split, 10,000 per run and no rate below 1e-3, none of the
three claims was supported.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Claim, Column, Comparison, MeasurementTable, Row
from hypergrad.estimators import Estimator
from hypergrad.tasks.few_shot import SOLVERS, characters, make

from .shared import task_plots as plots
from .shared.program import Program, program
from .shared.tuning import cells_of, trace_columns, tune_and_run

BUDGET = 4_000
RATES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of Adam; 0 leaves all as it begins
PENALTIES = (0.1, 1.0, 10.0, 100.0)
TOTAL_BUDGET = BUDGET * (1 + len(RATES))  # with tuning
QUERY_COST = 15.0  # an outer gradient reads 15 queries per example to learn from
NUM_PRODUCTS = 5


@functools.cache
def drawings() -> tuple[str, np.ndarray, int]:
    """Returns the digits, which are available without a download."""
    return characters("small", "")


def gradient_method(
    variant: str, estimator: Callable[[Any], Estimator], step_cost: float
) -> Callable:
    """Returns a method that makes as many outer steps as fit the budget."""
    num_steps = int(BUDGET / step_cost)

    def learn(images: Array, key: Array, rate: Array) -> tuple[PyTree, hg.Trace]:
        task = make(key=key, variant=variant, images=images, num_turns=drawings()[2])
        trace = hg.minimize(
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
) -> tuple[PyTree, hg.Trace | None]:
    """Returns the best of random initial networks with a closed-form head."""
    del rate
    task = make(key=key, variant="ridge", images=images, num_turns=drawings()[2])
    trace = hg.search(
        task.problem,
        task.solver,
        hg.searchers.Random(),
        task.w,
        space=jax.tree.map(initial_space, task.alpha)
        | {
            "log_penalty": hg.spaces.Interval(-3.0, 3.0),
            "scale": hg.spaces.Interval(0.1, 10.0, log=True),
        },
        budget=budget,
        key=jax.random.fold_in(key, 1),
    )
    return trace.alpha, trace


def initial_space(leaf: Array) -> hg.spaces.Interval:
    """Returns a uniform space of variance 1 / fan-in, with biases up to 0.1."""
    bound = (3 / leaf.shape[0]) ** 0.5 if leaf.ndim == 2 else 0.1
    return hg.spaces.Interval(-bound, bound, shape=leaf.shape)


def pixel_ridge(
    images: Array, key: Array, penalty: Array
) -> tuple[PyTree, hg.Trace | None]:
    """Returns ridge regression on pixels, which shares nothing between tasks."""
    task = make(
        key=key, variant="ridge", hidden=(), images=images, num_turns=drawings()[2]
    )
    return task.alpha | {"log_penalty": jnp.log(penalty)}, None


class MethodConfig(NamedTuple):
    """A method: the variant of its task, what it learns, and its settings."""

    variant: str
    learn: Callable[[Array, Array, Array], tuple[PyTree, hg.Trace | None]]
    settings: tuple[float, ...]


# Costs of a step: T inner gradients, an outer one (two where trust is measured), and 2
# per product, or T more gradients and T products for the reverse pass.
NUM_STEPS = {name: solver.num_steps for name, solver in SOLVERS.items()}
BASELINES = ("baseline", "random search", "random search, total")
METHODS = {
    "baseline": MethodConfig("ridge", pixel_ridge, PENALTIES),
    "random search": MethodConfig(
        "ridge", functools.partial(random_search, BUDGET), (0.0,)
    ),
    "random search, total": MethodConfig(
        "ridge", functools.partial(random_search, TOTAL_BUDGET), (0.0,)
    ),
    "maml": MethodConfig(
        "maml",
        gradient_method("maml", hg.Unrolled, 4 * NUM_STEPS["maml"] + 1 + QUERY_COST),
        RATES,
    ),
    "imaml": MethodConfig(
        "imaml",
        gradient_method(
            "imaml",
            lambda solver: hg.Implicit(solver, hg.CG(max_steps=NUM_PRODUCTS)),
            NUM_STEPS["imaml"] + 2 * (NUM_PRODUCTS + 2) + 2 * QUERY_COST,
        ),
        RATES,
    ),
    "ridge head": MethodConfig(
        "ridge", gradient_method("ridge", hg.Unrolled, 4 + QUERY_COST), RATES
    ),
}
LEARNED = ("maml", "imaml", "ridge head")


def accuracy(
    variant: str, hidden: tuple[int, ...], metric: str, images: Array, key: Array,
    alpha: PyTree,
) -> Array:  # fmt: skip
    """Returns the accuracy on 100 new tasks of validation or test characters."""
    task = make(
        key=key, variant=variant, hidden=hidden, images=images, num_turns=drawings()[2]
    )
    return task.metrics[metric](task.w, alpha, jax.random.fold_in(key, 2))


def measure_cell(cell: Cell, rows: list[Row]) -> Row:
    """Returns the row of a cell, whose setting the validation characters choose."""
    del rows
    method, seed = cell["method"], cell["seed"]
    variant, learn, settings = METHODS[method]
    hidden = () if method == "baseline" else (64,)
    is_search = method.startswith("random search")
    run = learn if is_search else program(learn)
    images, key = jnp.asarray(drawings()[1]), jax.random.key(seed)

    def run_once(setting: float, hold_out: bool) -> Row:
        start_time = time.perf_counter()
        alpha, trace = run(images, key, jnp.float32(setting))
        seconds = time.perf_counter() - start_time
        metric = "val_accuracy" if hold_out else "test_accuracy"
        score = program(accuracy, variant, hidden, metric)(images, key, alpha)
        result: Row = {metric: float(score), "run_seconds": seconds}
        if hold_out:
            result["selection"] = float(score)
        if trace is not None:
            result |= trace_columns(trace)
        return result

    result = tune_and_run(run_once, settings)
    if isinstance(run, Program):
        result |= {"compile_seconds": run.compile_seconds}
    return result


table = MeasurementTable(
    cells=cells_of(METHODS),
    measure_cell=measure_cell,
    columns=(Column("test_accuracy", "accuracy %", ".1f", scale=100),),
    claims=tuple(Claim(method, "baseline", "test_accuracy") for method in LEARNED),
    comparisons=tuple(
        Comparison(method, BASELINES[1:], "test_accuracy") for method in LEARNED
    ),
    plot=plots.few_shot,
    minutes=7,
    paradigm="few-shot",
    source=(
        "Finn et al. 2017 (arXiv 1703.03400), Rajeswaran et al. 2019 (arXiv 1909.04630)"
    ),
    data="rotated scikit-learn digits (10 digits, 2 rotations)",
    arrays=lambda: {"x": drawings()[1]},
)
