"""The table of reinforcement learning: discounts and an entropy weight.

``cartpole``: a policy learns while its discount and entropy weight are moved along
meta-gradients, which cost updates that a policy with fixed ones makes in their place.
``mrp``: one discount a state against the best one for all.
"""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import plots
from ..estimators import Estimator, Forward, Implicit, Unrolled
from ..inner import Newton
from ..linear import CG
from ..minimize import minimize
from ..searchers import Random
from ..tasks.cartpole import Losses, cartpole_losses_and_solver
from ..tasks.random_walk import TD
from ..tasks.reinforcement import DATA_NAME, SCALES, make
from ..tasks.semi_gradient import SemiGradient
from ..trace import Trace
from .program import program, search
from .record import Row
from .study import Column, Study, task_data, tune_and_run
from .verdict import Claim, Verdict

# CartPole.

SMALL: dict[str, Any] = SCALES["cartpole"]["small"]
BUDGET = 600
STEPS = SMALL["num_steps"]  # updates between two steps of alpha
RATES = (0.1, 0.3)  # of Adam, on alpha
DISCOUNTS, ENTROPIES = (0.9, 0.97, 0.99), (1e-4, 1e-2)
TRIAL = BUDGET // 8  # updates of a draw of random search
TEST = Losses(num_episodes=256, horizon=SMALL["horizon"])


def cartpole_solver(num_steps: int) -> SemiGradient:
    """Returns a solver of the task with a number of updates."""
    return cartpole_losses_and_solver(**SMALL | {"num_steps": num_steps})[1]


# A step of alpha costs T updates and two outer gradients (each 1), one of them for the
# report, and 2 a product: one a differentiated update, forward one for each number.
ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "unrolled": (
        Unrolled(cartpole_solver(STEPS), checkpoint=False, warm_start=True),
        3 * STEPS + 2,
    ),
    "last update": (
        Unrolled(
            cartpole_solver(STEPS),
            truncation_length=1,
            checkpoint=False,
            warm_start=True,
        ),
        STEPS + 2 + 2,
    ),
    "forward": (Forward(cartpole_solver(STEPS), warm_start=True), 5 * STEPS + 2),
    # At most five steps of CG, a product to begin and one to end with.
    "implicit": (
        Implicit(cartpole_solver(STEPS), CG(max_steps=5), warm_start=True),
        STEPS + 2 + 2 * 7,
    ),
}


def meta(method: str, key: Array, run_key: Array, rate: Array) -> Trace:
    """Returns the run of a meta-gradient with as many steps as fit the budget."""
    task, (estimator, cost) = make(key=key, variant="cartpole"), ESTIMATORS[method]
    return minimize(
        task.problem,
        estimator,
        optax.adam(rate),
        task.w,
        task.alpha,
        num_steps=int(BUDGET / cost),
        key=run_key,
        space=task.space,
        metrics={
            "discount": lambda w, alpha, key: alpha["discount"],
            "entropy": lambda w, alpha, key: alpha["entropy"],
        },
    )


def course(trace: Trace) -> dict[str, Array]:
    """Returns the columns of a run."""
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


def fixed(
    num_updates: int, key: Array, run_key: Array, w: PyTree, alpha: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns the result of updates from ``w``; the curve is not counted as cost."""
    task = make(key=key, variant="cartpole")
    problem, solver = task.problem, task.solver

    def step(w: PyTree, key: Array) -> tuple[PyTree, Array]:
        w, _ = solver.solve(problem.inner_loss, w, alpha, problem.inner_data, key)
        return w, problem.outer_value(w, alpha, key)

    keys = jax.random.split(run_key, num_updates // STEPS)
    w, value = jax.lax.scan(step, w, keys)
    same = {name: jnp.broadcast_to(alpha[name], value.shape) for name in alpha}
    return w, {"value": value, **same}


def judged(key: Array, w: PyTree) -> Array:
    """Returns the mean return of new episodes."""
    return TEST.mean_return(w, None, key)


def on_cartpole(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned in runs with other experience."""
    key = jax.random.key(seed)
    grid = list(itertools.product(DISCOUNTS, ENTROPIES))

    def run_once(setting: Any, choosing: bool) -> Row:
        task = make(key=key, variant="cartpole")
        run_key, end_key = jax.random.split(jax.random.fold_in(key, 1 + choosing))
        w, alpha, spent, before, num_updates = task.w, task.alpha, 0.0, 0, BUDGET
        start_time = time.perf_counter()
        if method in ESTIMATORS:
            rate = jnp.float32(setting)
            trace = program(meta, method)(key, run_key, rate)
            w, curve = trace.w, course(trace)
        else:
            if method == "grid":
                discount, entropy = grid[setting]
                alpha = {"discount": discount, "entropy": entropy}
            elif method == "random search":
                trace = search(
                    task.problem, cartpole_solver(TRIAL), Random(), w,
                    space=task.space, budget=BUDGET / 2, key=run_key,
                )  # fmt: skip
                w, alpha, num_updates = trace.w, trace.alpha, BUDGET // 2
                spent, before = float(trace.cost[-1]), TRIAL
            alpha = jax.tree.map(jnp.float32, alpha)
            w, curve = program(fixed, num_updates)(key, run_key, w, alpha)
            cost = STEPS * (1.0 + np.arange(num_updates // STEPS))
            curve = curve | {"cost": cost, "num_hvps": 0.0}
        seconds = time.perf_counter() - start_time
        end = float(program(judged)(end_key, w))
        curve = {name: np.asarray(x, float) for name, x in curve.items()}
        shares = ("trusted", "indefinite", "unsolved")
        said = {name: float(curve[name]) for name in shares if name in curve}
        return said | {
            "selection": end,
            "return": end,
            "discount": float(curve["discount"][-1]),
            "entropy": float(curve["entropy"][-1]),
            "num_updates": before + len(curve["value"]) * STEPS,
            "gradient_equivalents": spent + float(curve["cost"][-1]),
            "num_hvps": float(curve["num_hvps"]),
            "run_seconds": seconds,
            "curve_return": (-SMALL["horizon"] * curve["value"]).tolist(),
            "curve_cost": (spent + curve["cost"]).tolist(),
            "curve_discount": curve["discount"].tolist(),
            "curve_entropy": curve["entropy"].tolist(),
        }

    settings = {"grid": range(len(grid))} | dict.fromkeys(ESTIMATORS, RATES)
    result = tune_and_run(run_once, settings.get(method, (0.0,)))
    if method in ESTIMATORS:
        result |= {"compile_seconds": program(meta, method).compile_seconds}
    return result


# The Markov reward process.

MRP_BUDGET = 10_000
MRP_RATE = 0.2  # of Adam
ONE_DISCOUNT = np.linspace(0.5, 1.0, 51)
# Implicit: what Newton's method and the adjoint take at most, by seeds 100 and 101.
MRP_ESTIMATORS: dict[str, tuple[Estimator, int]] = {
    "implicit": (Implicit(Newton(), CG(rtol=1e-3, max_steps=20)), 160),
    "unrolled": (Unrolled(TD, checkpoint=False, warm_start=True), 3 * TD.num_steps + 2),
}


def learn_discounts(method: str, key: Array) -> Trace:
    """Returns the trace of learned discounts, one per state, within the budget."""
    task, (estimator, cost) = make(key=key, variant="mrp"), MRP_ESTIMATORS[method]
    return minimize(
        task.problem,
        estimator,
        optax.adam(MRP_RATE),
        task.w,
        task.alpha,
        num_steps=int(MRP_BUDGET / cost),
        key=key,
        space=task.space,
    )


def values(key: Array, alpha: Array) -> dict[str, Array]:
    """Returns measurements of values that are fitted to convergence."""
    task = make(key=key, variant="mrp")
    problem = task.problem
    w, spent = task.solver.solve(
        problem.inner_loss, task.w, alpha, problem.inner_data, key
    )
    return {
        "val_loss": problem.outer_value(w, alpha, problem.outer_data),
        "num_hvps": spent["num_hvps"],
        "gradient_equivalents": spent["num_grads"] + 2 * spent["num_hvps"],
        **task.metric_values(w, alpha, key),
    }


def along_grid(key: Array) -> tuple[Array, dict[str, Array]]:
    """Returns the index of the best shared discount and `values` of all of them."""
    result = jax.vmap(functools.partial(values, key))(jnp.asarray(ONE_DISCOUNT, float))
    return jnp.argmin(result["val_loss"]), result


def on_mrp(method: str, seed: int) -> Row:
    """Returns the row of a method and seed, tuned by the validation loss."""
    key = jax.random.key(seed)
    start_time = time.perf_counter()
    if method == "one discount":
        best, tried = program(along_grid)(key)
        result: Row = {name: float(x[best]) for name, x in tried.items()}
        costs = ("gradient_equivalents", "num_hvps")
        result |= {name: float(jnp.sum(tried[name])) for name in costs}
        result["discounts"] = [float(ONE_DISCOUNT[best])]
    else:
        if method == "random search":
            task = make(key=key, variant="mrp")
            trace = search(
                task.problem, task.solver, Random(), task.w, space=task.space,
                budget=MRP_BUDGET, key=key,
            )  # fmt: skip
        else:
            trace = program(learn_discounts, method)(key)
        measured = program(values)(key, trace.best_alpha)
        result = {name: float(x) for name, x in measured.items()} | {
            "gradient_equivalents": float(trace.cost[-1]),
            "num_hvps": float(jnp.nansum(trace.stats["num_hvps"])),
            "discounts": np.asarray(trace.best_alpha, float).tolist(),
        }
    result["run_seconds"] = time.perf_counter() - start_time
    if method in MRP_ESTIMATORS:
        result["compile_seconds"] = program(learn_discounts, method).compile_seconds
    return result


def trust(rows: list[Row]) -> list[Verdict]:
    """Returns the fractions of trusted and of zero hypergradients of CartPole.

    Rows of `Unrolled` and `Forward` have no such column, because they do not solve.
    """
    lines = []
    for method in ESTIMATORS:
        mine = [row for row in rows if row["method"] == f"cartpole, {method}"]
        mean = lambda name, mine=mine: np.mean([row[name] for row in mine])
        if any(row.get("unsolved") for row in mine):
            lines.append(
                Verdict(
                    f"cartpole, {method}: {mean('trusted'):.0%} of its hypergradients "
                    "are trusted; CG met negative curvature in "
                    f"{mean('indefinite'):.0%} of the solves, and in "
                    f"{mean('unsolved'):.0%} at once: there the hypergradient is zero"
                )
            )
    return lines


# The table.

CLAIMED = ("unrolled", "last update", "forward")
CARTPOLE = ("default", "grid", "random search", *ESTIMATORS)
MRP = ("one discount", "random search", *MRP_ESTIMATORS)
METHODS: dict[str, Callable[[int], Row]] = {
    f"cartpole, {method}": functools.partial(on_cartpole, method) for method in CARTPOLE
} | {f"mrp, {method}": functools.partial(on_mrp, method) for method in MRP}


STUDY = Study(
    name="reinforcement",
    paradigm="reinforcement",
    source="Xu, van Hasselt & Silver 2018 (arXiv 1805.09801)",
    about=(
        f"At most {BUDGET:,} gradient-equivalents (grad-eq; an update on 16 episodes "
        f"is one) a run of CartPole, {MRP_BUDGET:,} of the random walk (mrp). Return: "
        "the mean of 256 fresh episodes of at most 500 steps, in steps. Error: root "
        "mean square of the values."
    ),
    data=lambda: (
        DATA_NAME, make(key=jax.random.key(0), variant="mrp").problem.inner_data
    ),
    split=lambda key: task_data(make(key=key, variant="mrp")),
    methods=METHODS,
    columns=(
        Column("return", "return", "{:.0f} ± {:.0f}"),
        Column("updates", "num_updates", "{:.0f}"),
        Column("discount", "discount", "{:.3f} ± {:.3f}"),
        Column("entropy weight", "entropy", "{:.4f}"),
        Column("error", "value_error", "{:.3f} ± {:.3f}"),
        Column("validation loss", "val_loss", "{:.3f}"),
    ),
    claims=(
        *(
            Claim(f"cartpole, {method}", f"cartpole, {against}", "return", least)
            for against, least in (
                ("default", 0.0), ("grid", 0.0), ("random search", None)
            )
            for method in CLAIMED
        ),
        *(
            Claim(
                f"mrp, {method}", f"mrp, {against}", "value_error", least,
                lower=True, ratio=True,
            )
            for against, least in (("one discount", 0.0), ("random search", None))
            for method in MRP_ESTIMATORS
        ),
    ),
    judge=trust,
    draw=plots.reinforcement,
    minutes=5,
)  # fmt: skip
