"""The federated table: a loss per class, learned without sharing data."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import plots, spaces
from ..estimators import Implicit
from ..inner import Newton
from ..linear import CG, Neumann
from ..minimize import minimize
from ..problem import Bilevel
from ..searchers import Random
from ..tasks import federated
from ..tasks.federated import SCALES, FedAvg, LocalImplicit
from ..trace import Trace
from .program import program, search
from .record import Row
from .study import (
    DIGITS,
    MODEL,
    Column,
    Study,
    digits,
    task_data,
    trace_columns,
    tune_and_run,
)
from .verdict import Claim, Verdict, paired

BUDGET = 3000
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # of Adam, on alpha
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)  # see `by_frequency`
WIDTHS = (0.01, 0.03, 0.1, 0.3)  # of random search, in parts of the space's
TOTAL = BUDGET * (1 + len(RATES))  # with tuning
SEARCHES = {"random search": BUDGET, "random search, total": TOTAL / (1 + len(WIDTHS))}
SMALL = SCALES["small"]
SOLVER = FedAvg(SMALL["step_size"], SMALL["num_rounds"], SMALL["num_local_steps"])
# Trains a random draw from zero.
LONG = FedAvg(SMALL["step_size"], 20, SMALL["num_local_steps"])
SOLVE = CG(rtol=1e-2, max_steps=10)
# A step costs T rounds of local steps and a correction, an outer gradient or two, and 2
# a product: at most 10 of CG, one for where it begins, one for its residual and one;
# Neumann 9, 10 for its step size and one.
ROUNDS = SMALL["num_rounds"] * (SMALL["num_local_steps"] + 1)
ESTIMATORS = {
    "global": (Implicit(SOLVER, SOLVE), ROUNDS + 2 + 2 * 13),
    "global, neumann": (
        Implicit(SOLVER, Neumann(num_terms=10)), ROUNDS + 2 + 2 * 20
    ),
    "local": (LocalImplicit(SOLVER, SOLVE), ROUNDS + 2 + 2 * 13),
}  # fmt: skip
IID = ", iid clients"


def learn(name: str, data: PyTree, start: PyTree, rate: Array, key: Array) -> Trace:
    """Returns the trace of an estimator with as many steps as fit the budget."""
    estimator, cost = ESTIMATORS[name]
    problem = Bilevel(federated.train_loss, federated.val_loss, *data)
    w, alpha, space = start
    return minimize(
        problem, estimator, optax.adam(rate), w, alpha,
        num_steps=int(BUDGET / cost), key=key, space=space,
    )  # fmt: skip


def train(split: str, w: PyTree, alpha: PyTree, batch: PyTree) -> PyTree:
    """Returns the model after training from zero to convergence."""
    del split  # of a size of its own
    return Newton().solve(
        federated.train_loss, w, alpha, batch, jax.random.key(0)
    )[0]  # fmt: skip


def by_frequency(batch: PyTree, power: float) -> PyTree:
    """Returns class weights that are larger for rare classes and have mean 1."""
    count = np.bincount(np.ravel(batch["y"]), minlength=federated.NUM_CLASSES)
    weight = jnp.asarray(np.maximum(count, 1.0) ** -power, jnp.float32)
    alpha = {"delta": jnp.ones_like(weight), "iota": jnp.zeros_like(weight)}
    return alpha | {"omega": weight / jnp.mean(weight)}


def around_neutral(width: float) -> dict[str, spaces.Interval]:
    """Returns the task's space, narrowed to ``width`` around the neutral ``alpha``."""
    shape, factor, shift = (federated.NUM_CLASSES,), 10.0**width, 3.0 * width
    weight = spaces.Interval(1 / factor, factor, log=True, shape=shape)
    iota = spaces.Interval(-shift, shift, shape=shape)
    return {"omega": weight, "delta": weight, "iota": iota}


def row(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned by `tune_and_run`."""
    name = method.removesuffix(IID)

    def run_once(setting: float, hold_out: bool) -> Row:
        task = federated.make(
            key=jax.random.key(seed), iid=method != name, hold_out=hold_out,
            data=digits(),
        )  # fmt: skip
        problem, key = task.problem, jax.random.key(seed)
        batch, trace, start_time = problem.inner_data, None, time.perf_counter()
        if name == "baseline":
            alpha = by_frequency(batch, setting)
        elif name == "validation-only":
            val = problem.outer_data
            kept = np.asarray(val["use"][0]) > 0
            batch = {"x": val["x"][:, kept], "y": val["y"][:, kept]}
            alpha = task.alpha
        elif name in SEARCHES:
            trace = search(
                problem, LONG, Random(), task.w, space=around_neutral(setting),
                budget=SEARCHES[name], key=key,
            )  # fmt: skip
            alpha = trace.best_alpha
        else:
            data = problem.inner_data, problem.outer_data
            start = task.w, task.alpha, task.space
            trace = program(learn, name)(data, start, jnp.float32(setting), key)
            alpha = trace.best_alpha
        seconds = time.perf_counter() - start_time
        split = "val" if name == "validation-only" else "train"
        w = program(train, split)(task.w, alpha, batch)
        measured = {
            "selection": hold_out and -float(task.metrics["held_loss"](w, alpha, key)),
            "accuracy": float(task.metrics["accuracy"](w, alpha, key)),
            "val_loss": float(problem.outer_value(w, alpha, problem.outer_data)),
            "run_seconds": seconds,
            MODEL: (w, alpha),
        }
        return measured if trace is None else measured | trace_columns(trace)

    settings: dict[str, Any] = {"baseline": POWERS, "validation-only": (0.0,)}
    settings |= dict.fromkeys(SEARCHES, WIDTHS)
    result = tune_and_run(run_once, settings.get(name, RATES))
    if name in ESTIMATORS:
        result |= {"compile_seconds": program(learn, name).compile_seconds}
    return result


METHODS = (
    "baseline",
    "validation-only",
    *SEARCHES,
    *ESTIMATORS,
    f"global{IID}",
    f"local{IID}",
)


def gap(rows: list[Row]) -> list[Verdict]:
    """Compares the gain of global hypergradients on different and on equal clients."""
    column = lambda method: np.array(
        [r["accuracy"] for r in sorted(rows, key=lambda r: r["seed"])
         if r["method"] == method]
    )  # fmt: skip
    differ = column("global") - column("local")
    alike = column(f"global{IID}") - column(f"local{IID}")
    mean, low, high = 100 * np.array(paired(differ, alike))
    how = "larger" if low > 0 else "smaller" if high < 0 else "no different"
    return [
        Verdict(
            "what global gains on local is "
            f"{how} where clients differ: {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
        )
    ]


STUDY = Study(
    name="federated",
    paradigm="federated",
    source="Tarzanagh et al. 2022 (arXiv 2205.02215)",
    about=(
        f"At most {BUDGET:,} gradient-equivalents (grad-eq) a run; 'random search, "
        "total' spends with its tuning what the learned rows spend with theirs. "
        "Accuracy: the mean over classes on the untouched test split. Clients hold two "
        "or so classes, unless they are iid."
    ),
    data=lambda: (DIGITS, digits()),
    split=lambda key: task_data(
        *(federated.make(key=key, iid=iid, data=digits()) for iid in (False, True))
    ),
    methods={method: functools.partial(row, method) for method in METHODS},
    columns=(
        Column("accuracy %", "accuracy", scale=100),
        Column("validation loss", "val_loss", "{:.3f} ± {:.3f}"),
    ),
    claims=(
        *(
            Claim(method, against, "accuracy", scale=100, unit="points")
            for method, against in (
                ("global", "baseline"),
                ("global, neumann", "baseline"),
                ("global", "local"),
            )
        ),
        *(
            Claim(method, against, "accuracy", None, scale=100, unit="points")
            for method, against in (
                *(("global", name) for name in SEARCHES),
                ("global", "validation-only"),
                ("local", "baseline"),
                (f"global{IID}", f"local{IID}"),
            )
        ),
    ),
    draw=functools.partial(plots.methods, column="accuracy", label="test accuracy"),
    judge=gap,
    minutes=3,
)
