"""Runs of estimators that the golden cases share, and the problems of these runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import hypergrad as hg
from tests.golden import problems
from tests.golden.problems import Setup
from tests.golden.results import estimate_to_dict

NUM_STEPS = 12
DESCENT = hg.Descent(optax.sgd(0.3, momentum=0.5), NUM_STEPS)
LONG_DESCENT = hg.Descent(optax.sgd(0.3, momentum=0.5), 60)
TUNED_DESCENT = hg.Descent(
    lambda alpha: optax.sgd(alpha["rate"], momentum=alpha["momentum"]), NUM_STEPS
)

RIDGE = problems.ridge
BATCHES = partial(problems.ridge, batch_size=6)
TWO_LOSSES = partial(problems.ridge, num_losses=2)
TWO_LOSSES_BATCHES = partial(problems.ridge, num_losses=2, batch_size=6)
#: Kinds of problems on which every estimator runs.
PROBLEMS = {
    "dict variables": problems.logistic,
    "batches": BATCHES,
    "keyed batches": problems.keyed_batches,
    "keyed full batches": partial(problems.keyed_batches, None),
    "float32": partial(problems.ridge, dtype="float32"),
    "init_fn": partial(problems.ridge, init_fn=problems.shifted_init),
    "data_fn": problems.episodes,
}


@eqx.filter_jit
def compute_estimate(estimator, problem, state, alpha, key):
    """Calls the estimator in one compiled program."""
    return estimator.estimate(problem, state, alpha, key)


@eqx.filter_jit
def refine_estimate(estimator, problem, state, alpha, key):
    """Repeats the previous estimate with more work, in one compiled program."""
    return estimator.refine(problem, state, alpha, key)


def run_estimates(
    estimator: Any, make_setup: Callable[[], Setup], num_estimates: int = 2
) -> dict[str, Any]:
    """Returns consecutive estimates, and ``w`` of the final state.

    Each estimate is made at another alpha, from the state that the previous one left.
    Leaves have a leading axis of the estimates.
    """
    problem, w, alpha = make_setup()
    init_key, *keys = jax.random.split(jax.random.key(7), num_estimates + 1)
    state = estimator.init(problem, w, alpha, init_key)
    estimates = []
    for key in keys:
        estimate, state = compute_estimate(estimator, problem, state, alpha, key)
        estimates.append(estimate_to_dict(estimate))
        alpha = jax.tree.map(lambda leaf: 0.9 * leaf + 0.05, alpha)
    return stack(estimates) | {"state w": state.w}


def run_refined(estimator: Any, make_setup: Callable[[], Setup]) -> dict[str, Any]:
    """Returns an estimate and its refinement on the same data, and the final ``w``."""
    problem, w, alpha = make_setup()
    init_key, key = jax.random.split(jax.random.key(7))
    state = estimator.init(problem, w, alpha, init_key)
    estimate, state = compute_estimate(estimator, problem, state, alpha, key)
    refined, state = refine_estimate(estimator, problem, state, alpha, key)
    return stack(list(map(estimate_to_dict, (estimate, refined)))) | {
        "state w": state.w
    }


def stack(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one result whose leaves have a leading axis of the results."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
