"""Physics-informed networks: weights of a loss's terms, learned on held-out sensors.

Question: a physics-informed network is trained on three terms: the residual of the
equation, the boundary, and noisy sensors. Do weights of the terms that are learned by
hypergradients on the readings of other sensors make a better solution than equal
weights at the same cost? What a row pays for its weights it lacks in training.

Data: *poisson* is u'' = f on [0, 1] with two frequencies; 64 collocation points, both
ends, 20 sensors, 40 held-out sensors, tested on 500 points. *burgers* has viscosity
0.01 / pi; 256 random collocation points, 50 points of the initial condition and 50 of
the ends, 50 sensors, 40 held-out sensors, tested on every fourth place and time of the
reference solution, where no sensor is. Readings have noise of standard deviation 0.01.
The seed decides sensors, noise, random points and the network.

Model: a tanh network with two layers of 20. The outer loss is the mean squared misfit
at the held-out sensors. Weights lie in [1e-3, 1e3] by a sigmoid of their logarithm and
are 1 at first. The reported error is the relative L2 error.

Budget: 6,000 gradient-equivalents per run, for weights and training together. Equal
weights and one weight make 6,000 training steps. The other rows have 3,000 for the
weights, with as many outer steps of Adam as that surely pays for, and then train for
3,000 steps from the `w` that they have reached. An outer step is 50 steps of Adam, rate
0.01, from the last `w`; *unrolled* differentiates all 50; *implicit* makes at most 10
products of CG, with damping 1; *finite difference* is that of DARTS. Random search
samples log-uniformly, trains each sample for 500 steps and goes on from the sample with
the lowest outer loss. Training is by Adam; its rate falls from 0.01 to 0 as a half
cosine.

Rows, for each equation: equal weights, one weight (that of boundary and data alike; the
residual's is 1), random search, unrolled, implicit, finite difference.

Tuning, the same for every row: of the 40 held-out sensors a third is put aside; the row
learns with the others at each setting; the setting with the least misfit on the third
is chosen; the row then learns once more with all 40. Settings are Adam's rate on the
weights in {0.05, 0.15}, and of one weight {0.1, 1, 10, 100, 1000}; the other rows have
none.

Claims, seeds 0 to 9, because five are too few to distinguish a factor of 1.3 from none.
*burgers*: the relative L2 error of unrolled, implicit and finite difference is at least
1.3 times smaller than that of equal weights, by geometric means and the interval of the
paired ratio. *poisson*: no claim. The protocol claimed 1.3 here too, but in the first
run the errors of half of the rows differed tenfold and more between seeds, so that ten
seeds cannot distinguish 1.3 from none. The comparisons with equal weights, one weight
and random search claim nothing. No row solves *burgers*: a network of this size and
training ends at mean errors of 27 to 32%, whatever the weights.

Sizes, noise, rates, damping, steps and budget were set on seeds 100 and 101; sizes and
noise are the defaults of `hypergrad.tasks.physics.make`.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import Cell, Claim, Column, Comparison, MeasurementTable, Row
from hypergrad.estimators import Estimator
from hypergrad.tasks.physics import SOLVER, TERMS, burgers_reference, make

from .shared import task_plots as plots
from .shared.program import program
from .shared.task_runs import implicit_by_cg, minimize_task, search_task
from .shared.tuning import cells_of, trace_columns, tune_and_run

SYSTEMS = ("poisson", "burgers")
BUDGET = 6000
LEARNING_BUDGET = BUDGET // 2  # for the weights; the rest is for the final training
RATES = (0.05, 0.15)  # of Adam, on the weights
WEIGHTS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # one weight, of boundary and data
NUM_TRIAL_STEPS = 500  # of a sample of random search
MIN_RATIO = 1.3  # times smaller than with equal weights, on burgers


def trainer(num_steps: int) -> hg.Descent:
    """Returns Adam with a cosine schedule from 0.01 to 0."""
    rate = optax.cosine_decay_schedule(1e-2, num_steps)
    return hg.Descent(optax.adam(rate), num_steps)


TRIAL_SOLVER = trainer(NUM_TRIAL_STEPS)
# A step costs T inner gradients, and two outer ones that count 1 each; T products of 2;
# 2 per product of CG, at most 10 and two; or one outer and three inner gradients.
NUM_STEPS = SOLVER.num_steps
ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "unrolled": (
        hg.Unrolled(SOLVER, checkpoint=False, warm_start=True),
        3 * NUM_STEPS + 2,
    ),
    "implicit": (
        implicit_by_cg(SOLVER, rtol=1e-2, max_steps=10, damping=1.0),
        NUM_STEPS + 2 + 2 * 12,
    ),
    "finite difference": (hg.FiniteDifference(SOLVER), NUM_STEPS + 3 + 1),
}
BASELINES = ("equal weights", "one weight", "random search")


def learn(
    system: str, method: str, key: Array, hold_out: Array, rate: Array
) -> hg.Trace:
    """Returns the trace of a method with as many outer steps as fit the budget."""
    task = make(key=key, variant=system, hold_out=hold_out)
    estimator, cost = ESTIMATORS[method]
    return minimize_task(
        task, estimator, optax.adam(rate), key, num_steps=int(LEARNING_BUDGET / cost)
    )


def finish(
    system: str, num_steps: int, key: Array, hold_out: Array, w: PyTree, alpha: PyTree
) -> dict[str, Array]:
    """Returns measurements after training from ``w`` with the weights.

    ``selection`` is minus the error at held-out sensors.
    """
    task = make(key=key, variant=system, hold_out=hold_out)
    problem, val = task.problem, task.problem.outer_data
    solver = trainer(num_steps)
    w, _ = solver.solve(problem.inner_loss, w, alpha, problem.inner_data, key)
    held_out = val | {"use": 1 - val["use"]}
    return {
        "selection": -problem.outer_value(w, alpha, held_out),
        "val_loss": problem.outer_value(w, alpha, val),
        **task.metric_values(w, alpha, key),
    }


def measure_cell(cell: Cell, rows: list[Row]) -> Row:
    """Returns the row of a system, method and seed, tuned by `tune_and_run`."""
    del rows
    system, method = cell["method"].split(", ", 1)
    key = jax.random.key(cell["seed"])
    is_learned = method in ESTIMATORS
    has_half = is_learned or method == "random search"
    num_steps = LEARNING_BUDGET if has_half else BUDGET

    def run_once(setting: float, hold_out: bool) -> Row:
        task = make(key=key, variant=system, hold_out=hold_out)
        w, alpha = task.w, task.alpha
        result: Row = {"gradient_equivalents": 0.0}
        start_time = time.perf_counter()
        if is_learned:
            run = program(learn, system, method)
            result = trace_columns(trace := run(key, hold_out, jnp.float32(setting)))
            w, alpha = trace.w, trace.alpha
        elif method == "random search":
            trace = search_task(task, LEARNING_BUDGET, key, solver=TRIAL_SOLVER)
            result = trace_columns(trace)
            w, alpha = trace.w, trace.alpha
        elif method == "one weight":
            alpha = alpha | {"boundary": setting, "data": setting}
        measurements = program(finish, system, num_steps)(key, hold_out, w, alpha)
        result |= {name: float(x) for name, x in measurements.items()}
        result |= {f"alpha_{name}": float(alpha[name]) for name in TERMS}
        result["gradient_equivalents"] += num_steps
        return result | {"run_seconds": time.perf_counter() - start_time}

    settings = {"one weight": WEIGHTS} | dict.fromkeys(ESTIMATORS, RATES)
    result = tune_and_run(run_once, settings.get(method, (1.0,)))
    if is_learned:
        seconds = program(learn, system, method).compile_seconds
        result |= {"compile_seconds": seconds}
    return result


def compare(system: str, method: str, others: tuple[str, ...]) -> Comparison:
    """Returns the comparison of a method's errors with those of others."""
    return Comparison(
        f"{system}, {method}",
        tuple(f"{system}, {other}" for other in others),
        "relative_error",
        lower_is_better=True,
        as_ratio=True,
    )


def plot(rows: list[Row], path: Path) -> None:
    """Plots errors per seed and the learned weights of each system."""
    plots.physics(rows, SYSTEMS, path)


table = MeasurementTable(
    cells=cells_of(
        f"{system}, {method}"
        for system in SYSTEMS
        for method in (*BASELINES, *ESTIMATORS)
    ),
    measure_cell=measure_cell,
    columns=(
        Column("relative_error", "error %", ".2f", scale=100),
        Column("val_loss", "validation loss", ".5f", has_deviation=False),
    ),
    claims=tuple(
        Claim(
            f"burgers, {method}",
            "burgers, equal weights",
            "relative_error",
            min_effect=MIN_RATIO,
            lower_is_better=True,
            as_ratio=True,
        )
        for method in ESTIMATORS
    ),
    comparisons=(
        *(compare("poisson", method, BASELINES) for method in ESTIMATORS),
        *(compare("burgers", method, BASELINES[1:]) for method in ESTIMATORS),
    ),
    plot=plot,
    minutes=12,
    seeds=10,
    ranked_by="-relative_error",
    paradigm="physics-informed",
    source="McClenny & Braga-Neto 2023 (arXiv 2009.04544)",
    data=(
        "Poisson's equation, and Burgers' equation, by the quadrature of Cole and "
        "Hopf; noisy sensors"
    ),
    arrays=lambda: burgers_reference(None),
)
