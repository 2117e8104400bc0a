"""What studies take a step to cost is what it costs at most; a grid finds its best."""

import dataclasses

import jax
import numpy as np
import pytest
from hypergrad.studies import physics, reinforcement

import hypergrad as hg
from hypergrad.tasks import cartpole, semi_gradient
from hypergrad.tasks import physics as equations
from hypergrad.tasks import reinforcement as policies


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
    task = equations.make(key=key, hidden=(3,), **sizes)
    estimator, planned = physics.ESTIMATORS[method]
    estimate = hg.hypergradient(task.problem, estimator)(task.w, task.alpha, key)
    assert 0.5 * planned < estimate.stats["gradient_equivalents"] <= planned


@pytest.mark.slow
@pytest.mark.parametrize("method", reinforcement.ESTIMATORS)
def test_a_meta_gradient_costs_what_is_planned(method: str, key):
    """On episodes of three steps."""
    task = policies.make(key=key, num_episodes=2, horizon=3)
    estimator, planned = reinforcement.ESTIMATORS[method]
    solver = semi_gradient.SemiGradient(
        cartpole.Losses(2, 3).update_loss, task.solver.optimizer, reinforcement.STEPS
    )
    estimator = dataclasses.replace(estimator, solver=solver)
    estimate = hg.hypergradient(task.problem, estimator)(task.w, task.alpha, key)
    cost = estimate.stats["gradient_equivalents"]
    assert cost == planned or (method == "implicit" and cost < planned)


def test_hypergradients_that_are_zero_are_said_with_their_trust():
    """Of the methods that solve; the others have no line."""
    row = {"method": "cartpole, implicit", "trusted": 0.0, "indefinite": 0.9}
    other = {"method": "cartpole, unrolled", "trusted": 1.0, "unsolved": 0.0}
    rows = [row | {"unsolved": 0.5}, other, row | {"unsolved": 0.1}]
    (line,) = reinforcement.trust(rows)
    assert line.text.startswith("cartpole, implicit: 0% of its hypergradients are tru")
    assert "negative curvature in 90% of the solves, and in 30% at once" in line.text
    assert not reinforcement.trust([{"method": "cartpole, implicit"}])


def test_the_best_single_discount_is_the_one_of_the_least_validation_loss(key):
    """Against a dense solve for every discount of the grid."""
    best, found = jax.jit(reinforcement.along_grid)(key)
    problem = policies.make(key=key, variant="mrp").problem
    P, r = (np.asarray(problem.inner_data[name]) for name in ("P", "r"))
    d, G = (np.asarray(problem.outer_data[name]) for name in ("d", "G"))
    values = [
        np.linalg.solve(np.eye(19) - g * P, r) for g in reinforcement.ONE_DISCOUNT
    ]
    expected = [0.5 * np.sum(d * (v - G) ** 2) for v in values]
    np.testing.assert_allclose(found["val_loss"], expected, rtol=1e-6)
    assert best == np.argmin(expected)
