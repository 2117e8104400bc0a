"""Runs whose numbers were published, to the digits that were printed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
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
