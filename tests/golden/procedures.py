"""Golden cases of the estimators that differentiate or sample the solver's steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

import hypergrad as hg
from tests.golden import problems
from tests.golden.runs import (
    BATCHES,
    DESCENT,
    LONG_DESCENT,
    NUM_STEPS,
    PROBLEMS,
    RIDGE,
    TUNED_DESCENT,
    TWO_LOSSES,
    TWO_LOSSES_BATCHES,
    run_estimates,
)

TUNED_TWO_LOSSES = partial(
    problems.tuned,
    (problems.squared_loss, lambda w, alpha, batch: jnp.sum(jnp.tanh(w**2))),
)
ADAM = hg.Descent(optax.adam(0.1), NUM_STEPS)
DECAY = hg.Descent(optax.sgd(optax.exponential_decay(0.4, 4, 0.5)), NUM_STEPS)
FORMULA = hg.ClosedForm(lambda alpha, batch: jnp.exp(-alpha) * jnp.mean(batch["y"]))

UNROLLED = {
    "full": (hg.Unrolled(DESCENT), RIDGE),
    "without checkpoints": (hg.Unrolled(DESCENT, checkpoint=False), RIDGE),
    "truncated": (hg.Unrolled(DESCENT, truncation_length=5), RIDGE),
    "truncated to one step": (hg.Unrolled(DESCENT, truncation_length=1), RIDGE),
    "truncated, without checkpoints": (
        hg.Unrolled(DESCENT, truncation_length=5, checkpoint=False), RIDGE
    ),
    "truncation longer than the run": (
        hg.Unrolled(DESCENT, truncation_length=50), RIDGE
    ),
    "long": (hg.Unrolled(LONG_DESCENT), problems.logistic),
    "cold": (hg.Unrolled(DESCENT, warm_start=False), RIDGE),
    "tuned optimizer": (hg.Unrolled(TUNED_DESCENT), problems.tuned),
    "tuned optimizer, warm": (
        hg.Unrolled(TUNED_DESCENT, warm_start=True), problems.tuned
    ),
    "tuned optimizer, truncated": (
        hg.Unrolled(TUNED_DESCENT, truncation_length=5), problems.tuned
    ),
    "adam": (hg.Unrolled(ADAM), RIDGE),
    "schedule": (hg.Unrolled(DECAY), RIDGE),
    "two losses": (hg.Unrolled(DESCENT), TWO_LOSSES),
    "two losses, truncated": (hg.Unrolled(DESCENT, truncation_length=5), TWO_LOSSES),
    "outer batches": (hg.Unrolled(DESCENT, outer_batch_size=6), BATCHES),
    "closed form": (hg.Unrolled(FORMULA), RIDGE),
}  # fmt: skip
FORWARD = {
    "full": (hg.Forward(DESCENT), RIDGE),
    "cold": (hg.Forward(DESCENT, warm_start=False), RIDGE),
    "tuned optimizer": (hg.Forward(TUNED_DESCENT), problems.tuned),
    "two losses": (hg.Forward(DESCENT), TWO_LOSSES),
    "two losses, outer batches": (
        hg.Forward(DESCENT, outer_batch_size=6), TWO_LOSSES_BATCHES
    ),
}  # fmt: skip
reversible = partial(hg.Reversible, 0.3, 0.5, NUM_STEPS)
TUNED_REVERSIBLE = hg.Reversible(
    lambda alpha: alpha["rate"], lambda alpha: alpha["momentum"], NUM_STEPS, 0.25
)
REVERSIBLE = {
    "constants": (reversible(), RIDGE),
    "cold": (reversible(warm_start=False), RIDGE),
    "outer batches": (reversible(outer_batch_size=6), BATCHES),
    "long": (hg.Reversible(0.2, 0.9, 100), problems.logistic),
    "tuned": (TUNED_REVERSIBLE, problems.tuned),
    "schedule": (
        hg.Reversible(
            lambda alpha: optax.exponential_decay(alpha["rate"], 4, 0.5),
            lambda alpha: lambda step: alpha["momentum"] / (1 + 0.02 * step),
            NUM_STEPS,
            0.25,
        ),
        problems.tuned,
    ),
}
FIXED_POINT = {
    "8 terms": (hg.FixedPoint(DESCENT, 8), RIDGE),
    "cold": (hg.FixedPoint(DESCENT, 8, warm_start=False), RIDGE),
    "tuned optimizer": (hg.FixedPoint(TUNED_DESCENT, 8), problems.tuned),
    "two losses": (hg.FixedPoint(DESCENT, 8), TWO_LOSSES),
    "outer batches": (hg.FixedPoint(DESCENT, 8, outer_batch_size=6), BATCHES),
}
difference = partial(hg.FiniteDifference, LONG_DESCENT)
FINITE_DIFFERENCE = {
    "defaults": (difference(), RIDGE),
    "epsilon": (difference(0.01), RIDGE),
    "step_size": (difference(step_size=0.5), RIDGE),
    "cold": (hg.FiniteDifference(DESCENT, warm_start=False), RIDGE),
    "two losses": (difference(), TWO_LOSSES),
    "batches": (difference(adjoint_batch_size=6, outer_batch_size=8), BATCHES),
}
CENTRAL_DIFFERENCE = {
    "defaults": (hg.CentralDifference(DESCENT), RIDGE),
    "epsilon": (hg.CentralDifference(DESCENT, 0.01), RIDGE),
    "warm": (hg.CentralDifference(DESCENT, warm_start=True), RIDGE),
    "tuned optimizer": (hg.CentralDifference(TUNED_DESCENT), problems.tuned),
    "two losses": (hg.CentralDifference(DESCENT), TWO_LOSSES),
    "outer batches": (hg.CentralDifference(DESCENT, outer_batch_size=6), BATCHES),
}
EVOLUTION = {
    "8 pairs": (hg.Evolution(DESCENT, 0.05, 8), RIDGE),
    "warm": (hg.Evolution(DESCENT, 0.05, 8, warm_start=True), RIDGE),
    "tuned optimizer": (hg.Evolution(TUNED_DESCENT, 0.02, 8), problems.tuned),
    "two losses": (hg.Evolution(DESCENT, 0.05, 8), TWO_LOSSES),
    "outer batches": (hg.Evolution(DESCENT, 0.05, 8, outer_batch_size=6), BATCHES),
}
persistent = partial(hg.PersistentEvolution, sigma=0.05, num_pairs=4)
PERSISTENT_EVOLUTION = {
    "whole unroll": (persistent(DESCENT, unroll_length=NUM_STEPS), RIDGE),
    "tuned optimizer": (persistent(TUNED_DESCENT, unroll_length=6), problems.tuned),
    "two losses": (persistent(DESCENT, unroll_length=6), TWO_LOSSES),
    "outer batches": (
        persistent(DESCENT, unroll_length=6, outer_batch_size=6),
        BATCHES,
    ),
}
PENALTY = {
    "one-sided": (hg.Penalty(LONG_DESCENT, 100.0), RIDGE),
    "symmetric": (hg.Penalty(LONG_DESCENT, 100.0, symmetric=True), RIDGE),
    "Newton": (hg.Penalty(hg.Newton(), 1e3, symmetric=True), problems.logistic),
    "cold": (hg.Penalty(DESCENT, 100.0, warm_start=False), RIDGE),
    "two losses": (hg.Penalty(LONG_DESCENT, 100.0), TWO_LOSSES),
    "two losses, symmetric": (
        hg.Penalty(LONG_DESCENT, 100.0, symmetric=True), TWO_LOSSES
    ),
    "outer batches": (hg.Penalty(DESCENT, 100.0, outer_batch_size=6), BATCHES),
}  # fmt: skip
BATCHED_IMPLICIT = hg.Implicit(DESCENT, adjoint_batch_size=6, outer_batch_size=8)
AVERAGE = {
    "Implicit": (hg.Average(BATCHED_IMPLICIT, 4), BATCHES),
    "Implicit of two losses": (hg.Average(BATCHED_IMPLICIT, 3), TWO_LOSSES_BATCHES),
    "Evolution": (hg.Average(hg.Evolution(DESCENT, 0.05, 4), 3), RIDGE),
    "Unrolled, sampled data": (hg.Average(hg.Unrolled(DESCENT), 3), problems.episodes),
}
UNROLLED_OR_FORWARD = {
    "three hyperparameters": (
        hg.unrolled_estimator(TUNED_DESCENT, problems.tuned().alpha, warm_start=True),
        problems.tuned,
    ),
    "four hyperparameters": (
        hg.unrolled_estimator(DESCENT, jnp.zeros(4), outer_batch_size=6),
        BATCHES,
    ),
}
FAMILIES = {
    "Unrolled": UNROLLED,
    "Forward": FORWARD,
    "Reversible": REVERSIBLE,
    "FixedPoint": FIXED_POINT,
    "FiniteDifference": FINITE_DIFFERENCE,
    "CentralDifference": CENTRAL_DIFFERENCE,
    "Evolution": EVOLUTION,
    "PersistentEvolution": PERSISTENT_EVOLUTION,
    "Penalty": PENALTY,
    "Average": AVERAGE,
    "unrolled_estimator": UNROLLED_OR_FORWARD,
}
ON_ALL_PROBLEMS = {
    "Unrolled": hg.Unrolled(DESCENT),
    "Forward": hg.Forward(DESCENT),
    "Reversible": reversible(),
    "FixedPoint": hg.FixedPoint(DESCENT, 8),
    "FiniteDifference": hg.FiniteDifference(DESCENT),
    "Penalty": hg.Penalty(DESCENT, 100.0, symmetric=True),
}
ON_SELECTED_PROBLEMS = {
    "CentralDifference": hg.CentralDifference(DESCENT),
    "Evolution": hg.Evolution(DESCENT, 0.05, 4),
    "PersistentEvolution": persistent(DESCENT, unroll_length=6),
}
SELECTED_PROBLEMS = {
    name: PROBLEMS[name]
    for name in ("dict variables", "keyed batches", "init_fn", "data_fn")
}


def run_unrolls() -> dict[str, Any]:
    """Returns five estimates, three per unroll, so that a second unroll begins."""
    estimator = persistent(DESCENT, unroll_length=4)
    return run_estimates(estimator, RIDGE, num_estimates=5)


def pair_with_problems(
    estimators: dict[str, Any], setups: dict[str, Callable]
) -> dict[str, Callable[[], Any]]:
    """Returns one case for each estimator on each problem."""
    return {
        f"estimators/{name}, problem with {problem}": partial(
            run_estimates, estimator, setup
        )
        for name, estimator in estimators.items()
        for problem, setup in setups.items()
    }


CASES: dict[str, Callable[[], Any]] = {
    f"estimators/{family}, {name}": partial(run_estimates, *arguments)
    for family, variants in FAMILIES.items()
    for name, arguments in variants.items()
}
CASES |= pair_with_problems(ON_ALL_PROBLEMS, PROBLEMS)
CASES |= pair_with_problems(ON_SELECTED_PROBLEMS, SELECTED_PROBLEMS)
CASES |= {"estimators/PersistentEvolution, several unrolls": run_unrolls}
