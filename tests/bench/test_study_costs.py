"""Tests of planned costs of steps, and of the best setting of a grid."""

import dataclasses

import jax
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import physics, reinforcement
from hypergrad.tasks import cartpole, semi_gradient
from hypergrad.tasks import physics as physics_task
from hypergrad.tasks import reinforcement as reinforcement_task


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[pytest.mark.slow] * (method != "implicit"))
        for method in physics.ESTIMATORS
    ],
)
def test_a_step_of_the_weights_costs_at_most_what_is_planned(method: str, key):
    """On a tiny network: counts of calls do not depend on its size."""
    sizes = {"num_collocation": 8, "num_sensors": 4, "num_held_out": 4}
    task = physics_task.make(key=key, hidden=(3,), **sizes)
    estimator, planned = physics.ESTIMATORS[method]
    estimate = hg.hypergradient(task.problem, estimator)(task.w, task.alpha, key)
    assert 0.5 * planned < estimate.stats["gradient_equivalents"] <= planned


@pytest.mark.slow
@pytest.mark.parametrize("method", reinforcement.ESTIMATORS)
def test_a_meta_gradient_costs_what_is_planned(method: str, key):
    """On episodes of three steps."""
    task = reinforcement_task.make(key=key, num_episodes=2, horizon=3)
    estimator, planned = reinforcement.ESTIMATORS[method]
    solver = semi_gradient.SemiGradient(
        cartpole.Losses(2, 3).update_loss,
        task.solver.optimizer,
        reinforcement.NUM_STEPS,
    )
    estimator = dataclasses.replace(estimator, solver=solver)
    estimate = hg.hypergradient(task.problem, estimator)(task.w, task.alpha, key)
    cost = estimate.stats["gradient_equivalents"]
    # Implicit may make nine products more than planned, and fewer steps of CG.
    assert cost <= planned + 18 if method == "implicit" else cost == planned


def test_a_line_states_trusted_and_zero_hypergradients():
    """The line is of the methods that solve; the others have none."""
    row = {"method": "cartpole, implicit", "trusted": 0.0, "indefinite": 0.9}
    other = {"method": "cartpole, unrolled", "trusted": 1.0, "unsolved": 0.0}
    rows = [row | {"unsolved": 0.5}, other, row | {"unsolved": 0.1}]
    (finding,) = reinforcement.describe_trust(rows)
    assert finding.text.startswith("cartpole, implicit: 0% of its hypergradients are t")
    assert "negative curvature in 90% of the solves, and in 30% in" in finding.text
    assert not reinforcement.describe_trust([{"method": "cartpole, implicit"}])


def test_the_best_shared_discount_has_the_least_validation_loss(key):
    """Against a dense solve for every discount of the grid."""
    best, result = jax.jit(reinforcement.try_shared_discounts)(key)
    problem = reinforcement_task.make(key=key, variant="mrp").problem
    P, r = (np.asarray(problem.inner_data[name]) for name in ("P", "r"))
    d, G = (np.asarray(problem.outer_data[name]) for name in ("d", "G"))
    values = [
        np.linalg.solve(np.eye(19) - discount * P, r)
        for discount in reinforcement.SHARED_DISCOUNTS
    ]
    expected = [0.5 * np.sum(d * (v - G) ** 2) for v in values]
    np.testing.assert_allclose(result["val_loss"], expected, rtol=1e-6)
    assert best == np.argmin(expected)
