"""Runs whose numbers were published, to the digits that were printed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from benchmarks.shared import published_traces as traces
from benchmarks.shared.reference_problems import hypertorch
from tests.loops import run_loop

# Grazzi et al. 2020, hypertorch's notebook on logistic regression.
INNER = {0: 0.693147, 10: 0.628559, 20: 0.624391, 30: 0.624111, 99: 0.624090}
OUTER = {
    **{0: 0.574399, 10: 0.533768, 20: 0.361522, 30: 0.322504},
    **{40: 0.298765, 50: 0.294467, 60: 0.290573, 70: 0.288586},
    **{870: 0.280509, 960: 0.280507, 990: 0.280506},
}


def test_hypertorch_trace():
    """All 16 numbers to 1e-5: T = 100, reverse mode over the last 10, 1000 steps."""
    reference = hypertorch()
    data, key = reference.problem.inner_data, jax.random.key(0)
    for step, printed in INNER.items():
        solver = hg.Descent(optax.sgd(0.1), step)
        w, _ = solver.solve(
            reference.problem.inner_loss, reference.w, reference.alpha, data, key
        )
        value = reference.problem.inner_loss(w, reference.alpha, data)
        np.testing.assert_allclose(value, printed, atol=1e-5)
    trace = run_loop(
        reference.problem,
        hg.Unrolled(
            hg.Descent(optax.sgd(0.1), 100), truncation_length=10, warm_start=False
        ),
        optax.sgd(1.0, momentum=0.9),
        reference.w,
        reference.alpha,
        num_steps=1000,
        project=lambda alpha: jnp.maximum(alpha, 1e-8),
    )
    for step, printed in OUTER.items():
        np.testing.assert_allclose(trace.value[step], printed, atol=1e-5)


def test_a_row_of_a_trace_has_its_losses_and_costs():
    """Losses at the printed steps, costs of all steps, and a curve with both ends."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha) ** 2, lambda w, alpha, batch: w**2
    )
    trace = hg.minimize(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), 0.0, 3.0, num_steps=300
    )
    row = traces.trace_row(trace, (0, 7, 299, 300))
    assert [row[f"step_{step}"] for step in (0, 7, 299)] == [
        float(trace.value[step]) for step in (0, 7, 299)
    ]
    assert "step_300" not in row
    assert row["final"] == float(trace.value[-1])
    assert row["gradient_equivalents"] == float(trace.cost[-1])
    assert row["num_hvps"] == float(trace.stats["num_hvps"].sum())
    steps = row["curve_step"]
    assert steps[0] == 0
    assert steps[-1] == 299
    assert len(steps) <= traces.NUM_POINTS
    assert row["curve_value"] == [float(trace.value[step]) for step in steps]
    assert row["curve_cost"] == [float(trace.cost[step]) for step in steps]


def test_the_first_cost_below_a_bound():
    values, costs = np.array([3.0, 1.0, 2.0, 0.0]), np.arange(1.0, 5.0)
    assert traces.first_cost_below(values, costs, 1.0) == 2.0
    assert np.isnan(traces.first_cost_below(values, costs, -1.0))


def test_published_steps_are_columns_with_relative_tolerances():
    published = traces.published_steps("m", {10: 4.0}, 0.25, "verified", "somewhere")
    assert list(published) == [("m", traces.step_columns([10])[0].name)]
    assert published["m", "step_10"].max_difference == 1.0
