"""The problem of the table `bilo`, against what the notebook of the authors prints."""

import jax
import jax.numpy as jnp
import numpy as np

import hypergrad as hg
from benchmarks import bilo


def test_the_starting_weights_have_the_losses_that_the_notebook_prints():
    """Step 0: res_loss 4.109e+01, resgrad_loss 3.575e-02."""
    start = bilo.torch_start()
    residual, derivative = bilo.residuals(start, jnp.asarray(1.0))
    np.testing.assert_allclose(jnp.mean(residual**2), 41.09, atol=5e-3)
    np.testing.assert_allclose(jnp.mean(derivative**2), 0.03575, atol=5e-6)
    expected = jnp.mean(residual**2) + 0.1 * jnp.mean(derivative**2)
    actual = bilo.operator_loss(start, jnp.asarray(1.0), None)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_the_minimum_of_the_energy_solves_the_equation():
    u, D = jnp.zeros(bilo.NUM_INTERVALS - 1), jnp.asarray(2.0)
    u, _ = hg.Newton().solve(bilo.energy, u, D, None, jax.random.key(0))
    x = np.arange(1, bilo.NUM_INTERVALS) / bilo.NUM_INTERVALS
    np.testing.assert_allclose(u, np.sin(np.pi * x) / 2, atol=1e-4)


def test_the_best_fit_is_that_of_the_data_loss():
    """The least-squares coefficient is a minimum of the exact solution's error."""
    x, y, _ = bilo.observations()
    row = bilo.least_squares()
    error = lambda D: np.mean((np.sin(np.pi * x) / D - y) ** 2)
    np.testing.assert_allclose(row["data_loss"], error(row["D"]), rtol=1e-5)
    assert error(row["D"]) < min(error(row["D"] - 0.05), error(row["D"] + 0.05))
