"""Reinforcement learning: discounts and an entropy weight by meta-gradients.

Question: a policy learns CartPole while its discount and entropy weight follow
meta-gradients, which cost updates that a policy with fixed ones makes instead. Does one
such run beat a run of the same cost with fixed ones: the initial ones, or the best ones
of a grid of runs? And on a random walk whose rewards are noisy in every other state:
does one discount per state beat the best one for all states?

Data: simulated. *cartpole* has Gymnasium's dynamics, 16 episodes per update, at most
500 steps each; the seed decides the networks and the experience. *mrp* is a Markov
reward process of 19 states, with 20 episodes for training and 20 for validation by the
seed.

Model: in *cartpole*, actor and critic have 32 tanh units and learn by gradient descent
with rate 0.5; the discount lies in [0.5, 0.999], the entropy weight in [1e-4, 1], and
they are 0.9 and 0.01 at first. The outer loss is minus the mean return of 16 new
episodes, after every five updates. In *mrp*, values solve the Bellman equation of the
training episodes with discounts of 0.9 at first; the outer loss is the squared error of
the returns of the validation episodes.

Budget of *cartpole*: 600 gradient-equivalents per run, of which an update costs 1.
*default* and *grid* make 600 updates. *unrolled* differentiates all five updates
between two steps of Adam, *last update* only the last one, *forward* carries both
tangents along: each makes as many updates as the rest of the budget pays for.
*implicit*, which was added after the first results and is part of no claim, shows what
the implicit function theorem makes of an update that is the gradient of no loss; a line
under the table states how many of its hypergradients are trusted, and how many are
zero. *random search* uses half of the budget for samples from the space (the discount
uniform, the entropy weight log-uniform) with 75 updates each, and goes on from the
sample with the highest return.

Budget of *mrp*: 10,000 per run. *one discount* is the best of {0.50, 0.51, ..., 1};
*implicit* solves by Newton's method and at most 20 products of CG; *unrolled*
differentiates 100 Bellman backups from the last values; *random search* samples
uniformly. Each keeps the discounts of the lowest outer loss, and ends in a solve to
convergence with them, which is not counted.

Tuning, the same for every row: in *cartpole* a row learns at each of its settings, the
setting with the highest mean return of 256 new episodes is chosen, and the row then
learns once more, from the same networks, with other experience. Settings are Adam's
rate in {0.1, 0.3}, and for *grid* the discount in {0.9, 0.97, 0.99} and the entropy
weight in {1e-4, 1e-2}; the other rows have none. In *mrp* only the outer loss chooses;
Adam's rate is 0.2.

Claims, seeds 0 to 4. *cartpole*, by the mean return of 256 new episodes that nothing
else has read: unrolled, last update and forward are each above default, and above grid.
*mrp*, by the root mean square error of the values against the true ones: implicit and
unrolled are each below one discount. The comparisons with random search claim nothing.

Horizon, rates, grid, steps and budgets were set on seeds 100 and 101; sizes are the
defaults of `hypergrad.tasks.reinforcement.make`. The rows of *cartpole* are from a
fifth run: in the first an episode counted in its own baseline of the policy gradient,
after the second the checks of *forward* and *implicit* cost more, and after the third
those of *forward* less. The fourth planned steps of *implicit* at their largest cost,
so that it spent 376 of its 600. In the second run of *mrp* a change of Newton's method
made steps of *implicit* dearer than its plan.
On another machine the rows may differ: where a rounding error decides an action,
episodes diverge.
"""

import functools
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

import hypergrad as hg
from hypergrad.bench import (
    Cell,
    Check,
    Claim,
    Column,
    Comparison,
    Finding,
    MeasurementTable,
    Row,
)
from hypergrad.estimators import Estimator
from hypergrad.tasks.cartpole import Losses, cartpole_losses_and_solver
from hypergrad.tasks.random_walk import TD
from hypergrad.tasks.reinforcement import DATA_NAME, SCALES, make
from hypergrad.tasks.semi_gradient import SemiGradient

from .shared import task_plots as plots
from .shared.program import program
from .shared.task_runs import implicit_by_cg, minimize_task, search_task
from .shared.tuning import cells_of, tune_and_run

# CartPole.

SMALL: dict[str, Any] = SCALES["cartpole"]["small"]
BUDGET = 600
NUM_STEPS = SMALL["num_steps"]  # updates between two steps of alpha
RATES = (0.1, 0.3)  # of Adam, on alpha
DISCOUNTS, ENTROPIES = (0.9, 0.97, 0.99), (1e-4, 1e-2)
NUM_TRIAL_UPDATES = BUDGET // 8  # updates of a sample of random search
TEST_LOSSES = Losses(num_episodes=256, horizon=SMALL["horizon"])


def cartpole_solver(num_steps: int) -> SemiGradient:
    """Returns a solver of the task with a number of updates."""
    return cartpole_losses_and_solver(**SMALL | {"num_steps": num_steps})[1]


# A step of alpha costs T updates, a gradient for the report and an outer gradient, each
# 1, and 2 per product: one per differentiated update. Forward mode has one per update
# for each of the two numbers and for the rounding error.
ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "unrolled": (
        hg.Unrolled(cartpole_solver(NUM_STEPS), checkpoint=False, warm_start=True),
        3 * NUM_STEPS + 2,
    ),
    "last update": (
        hg.Unrolled(
            cartpole_solver(NUM_STEPS),
            truncation_length=1,
            checkpoint=False,
            warm_start=True,
        ),
        NUM_STEPS + 2 + 2,
    ),
    "forward": (
        hg.Forward(cartpole_solver(NUM_STEPS), warm_start=True),
        7 * NUM_STEPS + 2,
    ),
    # CG makes at most five steps. Of 14 products eight belong to the scaling in the
    # first step, and two later; the others to the warm start, the cross term and the
    # error estimate, which makes nine more where w is far from a minimum. CG makes
    # fewer where it meets negative curvature, so that this is about the mean.
    "implicit": (
        hg.Implicit(
            cartpole_solver(NUM_STEPS),
            hg.CG(max_steps=5, preconditioner="diagonal"),
            warm_start=True,
        ),
        NUM_STEPS + 2 + 2 * 19,
    ),
}


def learn_online(method: str, key: Array, run_key: Array, rate: Array) -> hg.Trace:
    """Returns the run of a meta-gradient with as many steps as fit the budget."""
    task, (estimator, cost) = make(key=key, variant="cartpole"), ESTIMATORS[method]
    return minimize_task(
        task,
        estimator,
        optax.adam(rate),
        run_key,
        num_steps=int(BUDGET / cost),
        metrics={
            "discount": lambda w, alpha, key: alpha["discount"],
            "entropy": lambda w, alpha, key: alpha["entropy"],
        },
    )


def curves_of(trace: hg.Trace) -> dict[str, Array]:
    """Returns the curves of a run, and fractions of its hypergradients."""
    return {
        "value": trace.value,
        "cost": trace.cost,
        "num_hvps": jnp.sum(trace.stats["num_hvps"]),
        "trusted": jnp.mean(trace.stats["trusted"], dtype=float),
        "indefinite": jnp.mean(trace.stats["ritz_min"] <= 0, dtype=float),
        # A residual of all of b is that of v = 0.
        "unsolved": jnp.mean(trace.stats["adjoint_residual"] == 1, dtype=float),
        **trace.metrics,
    }


def train_policy(
    num_updates: int, key: Array, run_key: Array, w: PyTree, alpha: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the result of updates from ``w``; the curve is not counted as cost."""
    task = make(key=key, variant="cartpole")
    problem, solver = task.problem, task.solver

    def step(w: PyTree, key: Array) -> tuple[PyTree, Array]:
        w, _ = solver.solve(problem.inner_loss, w, alpha, problem.inner_data, key)
        return w, problem.outer_value(w, alpha, key)

    keys = jax.random.split(run_key, num_updates // NUM_STEPS)
    w, value = jax.lax.scan(step, w, keys)
    constants = {name: jnp.broadcast_to(alpha[name], value.shape) for name in alpha}
    return w, {"value": value, **constants}


def mean_return(key: Array, w: PyTree) -> Array:
    """Returns the mean return of new episodes."""
    return TEST_LOSSES.mean_return(w, None, key)


def measure_cartpole(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned in runs with other experience."""
    key = jax.random.key(seed)
    grid = list(itertools.product(DISCOUNTS, ENTROPIES))

    def run_once(setting: Any, is_tuning: bool) -> Row:
        task = make(key=key, variant="cartpole")
        run_key, test_key = jax.random.split(jax.random.fold_in(key, 1 + is_tuning))
        w, alpha, num_updates = task.w, task.alpha, BUDGET
        prior_cost, prior_updates = 0.0, 0  # those of random search
        start_time = time.perf_counter()
        if method in ESTIMATORS:
            rate = jnp.float32(setting)
            trace = program(learn_online, method)(key, run_key, rate)
            w, curves = trace.w, curves_of(trace)
        else:
            if method == "grid":
                discount, entropy = grid[setting]
                alpha = {"discount": discount, "entropy": entropy}
            elif method == "random search":
                trace = search_task(
                    task, BUDGET / 2, run_key, solver=cartpole_solver(NUM_TRIAL_UPDATES)
                )
                w, alpha, num_updates = trace.w, trace.alpha, BUDGET // 2
                prior_cost = float(trace.cost[-1])
                prior_updates = NUM_TRIAL_UPDATES
            alpha = jax.tree.map(jnp.float32, alpha)
            w, curves = program(train_policy, num_updates)(key, run_key, w, alpha)
            cost = NUM_STEPS * (1.0 + np.arange(num_updates // NUM_STEPS))
            curves = curves | {"cost": cost, "num_hvps": 0.0}
        seconds = time.perf_counter() - start_time
        test_return = float(program(mean_return)(test_key, w))
        curves = {name: np.asarray(x, float) for name, x in curves.items()}
        fractions = ("trusted", "indefinite", "unsolved")
        row = {name: float(curves[name]) for name in fractions if name in curves}
        return row | {
            "selection": test_return,
            "return": test_return,
            "discount": float(curves["discount"][-1]),
            "entropy": float(curves["entropy"][-1]),
            "num_updates": prior_updates + len(curves["value"]) * NUM_STEPS,
            "gradient_equivalents": prior_cost + float(curves["cost"][-1]),
            "num_hvps": float(curves["num_hvps"]),
            "run_seconds": seconds,
            "curve_return": (-SMALL["horizon"] * curves["value"]).tolist(),
            "curve_cost": (prior_cost + curves["cost"]).tolist(),
            "curve_discount": curves["discount"].tolist(),
            "curve_entropy": curves["entropy"].tolist(),
        }

    settings = {"grid": range(len(grid))} | dict.fromkeys(ESTIMATORS, RATES)
    result = tune_and_run(run_once, settings.get(method, (0.0,)))
    if method in ESTIMATORS:
        result |= {"compile_seconds": program(learn_online, method).compile_seconds}
    return result


# The Markov reward process.

MRP_BUDGET = 10_000
MRP_RATE = 0.2  # of Adam
SHARED_DISCOUNTS = np.linspace(0.5, 1.0, 51)
# The least cost of a step. That of implicit varies with the iterations of Newton's
# method, so that the budget ends its run, which the last step may exceed.
MRP_ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "implicit": (
        implicit_by_cg(hg.Newton(), rtol=1e-3, max_steps=20),
        50,
    ),
    "unrolled": (
        hg.Unrolled(TD, checkpoint=False, warm_start=True),
        3 * TD.num_steps + 2,
    ),
}


def learn_discounts(method: str, key: Array) -> hg.Trace:
    """Returns the trace of learned discounts, one per state, within the budget."""
    task, (estimator, cost) = make(key=key, variant="mrp"), MRP_ESTIMATORS[method]
    return minimize_task(
        task,
        estimator,
        optax.adam(MRP_RATE),
        key,
        num_steps=int(MRP_BUDGET / cost),
        budget=MRP_BUDGET,
    )


def fit_values(key: Array, alpha: Array) -> dict[str, Array]:
    """Returns measurements of values that are fitted to convergence."""
    task = make(key=key, variant="mrp")
    problem = task.problem
    w, solver_stats = task.solver.solve(
        problem.inner_loss, task.w, alpha, problem.inner_data, key
    )
    num_grads, num_hvps = solver_stats["num_grads"], solver_stats["num_hvps"]
    return {
        "val_loss": problem.outer_value(w, alpha, problem.outer_data),
        "num_hvps": num_hvps,
        "gradient_equivalents": num_grads + 2 * num_hvps,
        **task.metric_values(w, alpha, key),
    }


def try_shared_discounts(key: Array) -> tuple[Array, dict[str, Array]]:
    """Returns the index of the best shared discount and measurements of all of them."""
    discounts = jnp.asarray(SHARED_DISCOUNTS, float)
    result = jax.vmap(functools.partial(fit_values, key))(discounts)
    return jnp.argmin(result["val_loss"]), result


def measure_mrp(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned by the validation loss."""
    key = jax.random.key(seed)
    start_time = time.perf_counter()
    if method == "one discount":
        best, trials = program(try_shared_discounts)(key)
        result: Row = {name: float(x[best]) for name, x in trials.items()}
        costs = ("gradient_equivalents", "num_hvps")
        result |= {name: float(jnp.sum(trials[name])) for name in costs}
        result["discounts"] = [float(SHARED_DISCOUNTS[best])]
    else:
        if method == "random search":
            task = make(key=key, variant="mrp")
            trace = search_task(task, MRP_BUDGET, key)
        else:
            trace = program(learn_discounts, method)(key)
        measurements = program(fit_values)(key, trace.best_alpha)
        result = {name: float(x) for name, x in measurements.items()} | {
            "gradient_equivalents": float(trace.cost[-1]),
            "num_hvps": float(jnp.nansum(trace.stats["num_hvps"])),
            "discounts": np.asarray(trace.best_alpha, float).tolist(),
        }
    result["run_seconds"] = time.perf_counter() - start_time
    if method in MRP_ESTIMATORS:
        result["compile_seconds"] = program(learn_discounts, method).compile_seconds
    return result


# The table.

CLAIMED = ("unrolled", "last update", "forward")
CARTPOLE_METHODS = ("default", "grid", "random search", *ESTIMATORS)
MRP_METHODS = ("one discount", "random search", *MRP_ESTIMATORS)


def is_within_budget(rows: Sequence[Row]) -> tuple[bool, str]:
    """Returns whether the dearest run of *cartpole* is within the budget."""
    runs = [row for row in rows if row["method"].startswith("cartpole")]
    largest = max(row["gradient_equivalents"] for row in runs)
    return largest <= BUDGET, f"at most {largest:.0f} of {BUDGET}"


def measure_cell(cell: Cell, rows: list[Row]) -> Row:
    """Returns the row of a system, method and seed."""
    del rows
    system, method = cell["method"].split(", ", 1)
    measure = {"cartpole": measure_cartpole, "mrp": measure_mrp}[system]
    return measure(method, cell["seed"])


def describe_trust(rows: list[Row]) -> list[Finding]:
    """Returns the fractions of trusted and of zero hypergradients of CartPole.

    Rows of `Unrolled` and `Forward` have no such column, because they do not solve.
    """
    findings = []
    for method in ESTIMATORS:
        label = f"cartpole, {method}"
        method_rows = [row for row in rows if row["method"] == label]
        if not any(row.get("unsolved") for row in method_rows):
            continue
        trusted, indefinite, unsolved = (
            np.mean([row[name] for row in method_rows])
            for name in ("trusted", "indefinite", "unsolved")
        )
        findings.append(
            Finding(
                f"{label}: {trusted:.0%} of its hypergradients are trusted; CG met "
                f"negative curvature in {indefinite:.0%} of the solves, and in "
                f"{unsolved:.0%} in its first step, where the hypergradient is zero"
            )
        )
    return findings


table = MeasurementTable(
    cells=cells_of(
        (
            *(f"cartpole, {method}" for method in CARTPOLE_METHODS),
            *(f"mrp, {method}" for method in MRP_METHODS),
        )
    ),
    measure_cell=measure_cell,
    columns=(
        Column("return", form=".0f"),
        Column("num_updates", "updates", ".0f", has_deviation=False),
        Column("discount", form=".3f"),
        Column("entropy", "entropy weight", ".4f", has_deviation=False),
        Column("value_error", "error", ".3f"),
        Column("val_loss", "validation loss", ".3f", has_deviation=False),
    ),
    claims=(
        *(
            Claim(f"cartpole, {method}", f"cartpole, {baseline}", "return")
            for baseline in ("default", "grid")
            for method in CLAIMED
        ),
        *(
            Claim(
                f"mrp, {method}",
                "mrp, one discount",
                "value_error",
                lower_is_better=True,
                as_ratio=True,
            )
            for method in MRP_ESTIMATORS
        ),
    ),
    comparisons=(
        *(
            Comparison(f"cartpole, {method}", ("cartpole, random search",), "return")
            for method in CLAIMED
        ),
        *(
            Comparison(
                f"mrp, {method}",
                ("mrp, random search",),
                "value_error",
                lower_is_better=True,
                as_ratio=True,
            )
            for method in MRP_ESTIMATORS
        ),
    ),
    checks=(Check("no run of cartpole costs more than its budget", is_within_budget),),
    findings=describe_trust,
    plot=plots.reinforcement,
    minutes=5,
    ranked_by="return",
    paradigm="reinforcement",
    source="Xu, van Hasselt & Silver 2018 (arXiv 1805.09801)",
    data=DATA_NAME,
    arrays=lambda: make(key=jax.random.key(0), variant="mrp").problem.inner_data,
)
