"""The table of architecture search: the chosen cell against the ranking of all 125.

Every row ends with a cell, and is measured by what `hypergrad.tasks.architecture`
knows of it: its mean over retrainings. A hypergradient moves the mixture, and the cell
is the heaviest operation of each edge.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import plots
from ..estimators import DARTS, Estimator, Implicit
from ..inner import Descent
from ..linear import Neumann
from ..minimize import minimize
from ..problem import Batches, Bilevel
from ..tasks.architecture import (
    BATCH_SIZE,
    CELLS,
    EDGES,
    OPERATIONS,
    SIZES,
    SOLVER,
    cross_entropy,
    expected_flops,
    make,
    most_likely_cell,
    one_hot,
    ranking,
    train_loss,
    val_loss,
)
from ..tasks.classifier import held_out_examples, mask_held_out
from ..trace import Trace
from .program import CachedFunction, program
from .record import Row
from .study import DIGITS, Column, Study, digits, task_data, tune_and_run
from .verdict import Claim, Verdict

BUDGET = 300
RATES = (0.0003, 0.001, 0.003)  # of Adam, on alpha
PRICE = 0.2
PRICED = f", price {PRICE}"
RATE = 0.2  # of the weights, in the search
STEPS = 300
FINAL = Descent(
    optax.sgd(optax.cosine_decay_schedule(RATE, STEPS), momentum=0.9), STEPS
)

# Gradient-equivalents. A batch is a part of training, and so is one of validation. A
# step of DARTS is one or four gradients and an outer one; of implicit five gradients, a
# residual, an outer gradient and 2 a product of Neumann's five, the cross term
# included. A cell: its training and its loss on validation.
NUM_TRAIN, NUM_VAL, _ = SIZES["small"]
BATCH = BATCH_SIZE / NUM_TRAIN
ESTIMATORS: dict[str, tuple[Estimator, float]] = {
    "DARTS, first order": (DARTS(optax.sgd(RATE)), 2 * BATCH),
    "DARTS, second order": (DARTS(optax.sgd(RATE), step_size=RATE), 5 * BATCH),
    "implicit": (
        Implicit(
            SOLVER,
            Neumann(num_terms=5, step_size=RATE),
            adjoint_batch_size=BATCH_SIZE,
            outer_batch_size=BATCH_SIZE,
        ),
        17 * BATCH,
    ),
}
TRAINING = STEPS * BATCH + NUM_VAL / NUM_TRAIN / 3
TOTAL = BUDGET + len(RATES) * (BUDGET + TRAINING)  # with tuning


def train(data: PyTree, cell: Array, key: Array) -> dict[str, Array]:
    """Trains a cell from a random start and returns accuracies and losses."""
    task = make(key=key, data=data)
    inner, val = task.problem.inner_data, task.problem.outer_data.data
    test: Any = task.metrics["test_accuracy"]
    key = jax.random.fold_in(key, 1)
    w, _ = FINAL.solve(train_loss, task.w, cell, inner, key)
    held = held_out_examples(mask_held_out(val, True))
    return task.metric_values(w, cell, key) | {
        "test_loss": cross_entropy(w, cell, test.args[0]),
        "val_loss": cross_entropy(w, cell, val),
        "held_loss": cross_entropy(w, cell, held),
    }


def learn(
    method: str, data: PyTree, key: Array, price: Array, hold_out: Array, rate: Array
) -> Trace:
    """Returns the trace of a search whose number of steps fits the budget."""
    task = make(key=key, price=price, hold_out=hold_out, data=data)
    estimator, cost = ESTIMATORS[method]
    val = Batches(task.problem.outer_data.data, BATCH_SIZE)
    return minimize(
        Bilevel(train_loss, val_loss, task.problem.inner_data, val),
        estimator,
        optax.adam(rate),
        task.w,
        task.alpha,
        num_steps=int(BUDGET / cost),
        key=jax.random.fold_in(key, 2),
        space=task.space,
    )


@CachedFunction
def trained(cell: tuple[int, ...], seed: int) -> dict[str, float]:
    """Returns the results of one training of a cell, and its seconds."""
    run = program(train)
    prev_seconds = run.run_seconds
    result = run(digits(), jnp.array(cell), jax.random.key(seed))
    numbers = {name: float(x) for name, x in result.items()}
    return numbers | {"run_seconds": run.run_seconds - prev_seconds}


@functools.cache
def share(cell: tuple[int, ...]) -> float:
    """Returns the operations of a cell as a fraction of the largest cell's."""
    side = int(digits()["x"].shape[1] ** 0.5)
    return float(expected_flops(one_hot(cell), jnp.zeros((1, side, side))))


def judged(cell: tuple[int, ...], price: float) -> Row:
    """Returns means over the retrainings of a cell, and its regret and rank."""
    means = {name: np.mean(x, axis=1) for name, x in ranking().items()}
    accuracy, at = means["test_accuracy"], CELLS.index(cell)
    flops = np.array([share(cell) for cell in CELLS])
    objective = means["test_loss"] + price * flops
    return {
        "cell": " ".join(OPERATIONS[o] for o in cell),
        "accuracy": float(accuracy[at]),
        "regret": float(accuracy.max() - accuracy[at]),
        "rank": 1 + int(np.sum(accuracy > accuracy[at])),
        "flops": float(flops[at]),
        "objective": float(objective[at]),
    }


def selection(cell: tuple[int, ...], seed: int, price: float) -> Row:
    """Returns the score of a cell on held-out validation images."""
    loss = trained(cell, seed)["held_loss"] + price * share(cell)
    return {"selection": -loss}


# The rows.


def by_gradient(method: str, seed: int, price: float) -> Row:
    """Returns the row of the cell with the largest weights of the learned mixture."""
    run, key = program(learn, method), jax.random.key(seed)

    def run_once(rate: float, hold_out: bool) -> Row:
        prev_seconds = run.run_seconds
        trace = run(digits(), key, price, hold_out, rate)
        cell = tuple(most_likely_cell(trace.alpha).tolist())
        cost = float(trace.cost[-1])
        result = judged(cell, price) | {
            "gradient_equivalents": cost,
            "num_hvps": float(jnp.nansum(trace.stats["num_hvps"])),
            "run_seconds": run.run_seconds - prev_seconds,
            "alpha": np.asarray(trace.alpha, float).tolist(),
        }
        if not hold_out:
            return result
        result["gradient_equivalents"] += TRAINING
        return result | selection(cell, seed, price)

    return tune_and_run(run_once, RATES) | {"compile_seconds": run.compile_seconds}


def one_operation(seed: int, price: float) -> Row:
    """Returns the row of the best cell with the same operation on every edge."""

    def run_once(operation: int, hold_out: bool) -> Row:
        cell = (operation,) * len(EDGES)
        cost = {"gradient_equivalents": TRAINING if hold_out else 0.0}
        return judged(cell, price) | cost | selection(cell, seed, price)

    return tune_and_run(run_once, range(len(OPERATIONS)))


def random_search(budget: float, seed: int, price: float) -> Row:
    """Returns the row of the best of random cells on the validation data."""
    rng, count = np.random.default_rng(seed), int(budget / TRAINING)
    cells = [CELLS[i] for i in rng.permutation(len(CELLS))[:count]]
    result = [trained(cell, seed) for cell in cells]
    losses = [
        measured["val_loss"] + price * share(cell)
        for measured, cell in zip(result, cells, strict=True)
    ]
    return judged(cells[int(np.argmin(losses))], price) | {
        "gradient_equivalents": count * TRAINING,
        "run_seconds": sum(measured["run_seconds"] for measured in result),
    }


def random_cell(seed: int, price: float) -> Row:
    """Returns the mean over all cells, the expectation of a random cell."""
    del seed
    every = [judged(cell, price) for cell in CELLS]
    columns = ("accuracy", "regret", "flops", "objective")
    return {name: float(np.mean([row[name] for row in every])) for name in columns}


ROWS: dict[str, Callable[..., Row]] = {
    "baseline": one_operation,
    "random cell": random_cell,
    "random search": functools.partial(random_search, BUDGET),
    "random search, total": functools.partial(random_search, TOTAL),
} | {method: functools.partial(by_gradient, method) for method in ESTIMATORS}
METHODS: dict[str, Callable[[int], Row]] = {
    name + ending: functools.partial(row, price=price)
    for ending, price in (("", 0.0), (PRICED, PRICE))
    for name, row in ROWS.items()
}


def judge(rows: list[Row]) -> list[Verdict]:
    """Compares the regret with the standard deviation of retraining the best cell."""
    accuracy = ranking()["test_accuracy"]
    best = np.argmax(np.mean(accuracy, axis=1))
    deviation = 100 * np.std(accuracy[best], ddof=1)
    lines = []
    for method in ESTIMATORS:
        regret = [100 * row["regret"] for row in rows if row["method"] == method]
        word = "reproduced" if max(regret) < deviation else "not reproduced"
        lines.append(
            Verdict(
                f"{method}: regret {np.mean(regret):.2f} points on average, at most "
                f"{max(regret):.2f}, below one standard deviation of retraining the "
                f"best cell, {deviation:.2f}, on every seed claimed: {word}"
            )
        )
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Draws all cells and marks the chosen ones."""
    accuracy = np.mean(ranking()["test_accuracy"], axis=1)
    plots.architecture(rows, [share(cell) for cell in CELLS], accuracy, PRICED, path)


def beats(first: str, second: str, least: float | None) -> Claim:
    """Returns a claim about accuracy in percentage points."""
    return Claim(first, second, "accuracy", least, scale=100, unit="points")


STUDY = Study(
    name="architecture",
    paradigm="supervised",
    source="Liu, Simonyan & Yang 2019 (arXiv 1806.09055), section 2",
    about=(
        f"At most {BUDGET:,} gradient-equivalents (grad-eq) a search; of "
        "'random search, total' what the others spend with their tuning. Accuracy and "
        "loss on the untouched test images, means over retrainings of the chosen cell; "
        "regret: what the best of 125 cells has more; FLOPs: of the largest cell's. "
        "'random cell' is the mean of all 125, of which nine let nothing through and "
        "stay at chance. Seconds of random search are those of its trainings, which "
        "the rows with a price share. "
        f"Price {PRICE}: of the largest cell's FLOPs, in nats, and the objective is "
        "test loss and price."
    ),
    data=lambda: (DIGITS, digits()),
    split=lambda key: task_data(make(key=key, data=digits())),
    methods=METHODS,
    columns=(
        Column("accuracy %", "accuracy", scale=100),
        Column("regret", "regret", scale=100),
        Column("FLOPs %", "flops", "{:.0f} ± {:.0f}", scale=100),
        Column("objective", "objective", "{:.3f} ± {:.3f}"),
    ),
    claims=(
        *(beats(method, "random cell", 0.0) for method in ESTIMATORS),
        *(
            Claim(method + PRICED, method, "flops", 0.0, True, scale=100, unit="%")
            for method in ESTIMATORS
        ),
        *(
            Claim(method + PRICED, "baseline" + PRICED, "objective", 0.0, lower=True)
            for method in ESTIMATORS
        ),
        *(
            beats(method, other, None)
            for other in ("baseline", "random search")
            for method in ESTIMATORS
        ),
        *(
            Claim(method + PRICED, other + PRICED, "objective", None, lower=True)
            for other in ("random search", "random search, total")
            for method in ESTIMATORS
        ),
    ),
    draw=draw,
    judge=judge,
    minutes=9,
)
