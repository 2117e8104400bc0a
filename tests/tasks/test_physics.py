"""Tests of residuals and reference solutions, and of hypergradients on them."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.tasks import physics
from tests.loops import run_loop

KEY = jax.random.key(0)
TINY = {"num_collocation": 12, "num_sensors": 4, "num_held_out": 4, "hidden": (4,)}
SIZES = {"poisson": TINY, "burgers": TINY | {"num_boundary": 4}}
ALPHA = {"residual": 0.5, "boundary": 3.0, "data": 2.0}
CONTROL = physics.make(key=KEY, variant="control")


def test_residuals_are_zero_for_solutions_only(monkeypatch, key):
    """Known solutions have no residual, and every term counts with its sign."""
    set_network = lambda u: monkeypatch.setattr(physics, "network", lambda w, x: u(x))
    line, plane = (jax.random.uniform(key, (9, d)) for d in (1, 2))
    set_network(physics.poisson_solution)
    np.testing.assert_allclose(physics.poisson_residual(None, line), 0, atol=1e-10)
    set_network(lambda x: x[:, 0] ** 2 + 3 * x[:, 0])
    np.testing.assert_allclose(physics.control_residual(None, line), 0, atol=1e-12)
    set_network(lambda x: x[:, 0] / (1 + x[:, 1]))
    np.testing.assert_allclose(physics.burgers_residual(None, plane), 0, atol=1e-12)
    # u = sin(x) has u u_x - nu u_xx = sin(x) (cos(x) + nu).
    set_network(lambda x: jnp.sin(x[:, 0]))
    expected = np.sin(plane[:, 0]) * (np.cos(plane[:, 0]) + physics.VISCOSITY)
    actual = physics.burgers_residual(None, plane)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_cole_hopf_solves_burgers_equation():
    """Its central differences satisfy the equation before the shock."""
    x, t = (grid.ravel() for grid in np.meshgrid([-0.6, 0.2, 0.9], [0.05, 0.2]))
    u, h = physics.cole_hopf, 1e-4
    u_t = (u(x, t + h) - u(x, t - h)) / (2 * h)
    u_x = (u(x + h, t) - u(x - h, t)) / (2 * h)
    u_xx = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2
    residual = u_t + u(x, t) * u_x - physics.VISCOSITY * u_xx
    np.testing.assert_allclose(residual, 0, atol=1e-5)
    assert np.max(np.abs(u_t)) > 0.5
    np.testing.assert_allclose(u(x, 0 * t), -np.sin(np.pi * x), atol=1e-12)


@pytest.mark.data
def test_cole_hopf_equals_the_published_reference():
    """It agrees at every eleventh point of the file, also in the shock."""
    if not os.environ.get(hg.datasets.VARIABLE):
        # The reference is a file of the authors, which is not on PyPI.
        pytest.skip(f"{hg.datasets.VARIABLE} is not set")
    reference = hg.datasets.load("burgers")
    grid = np.meshgrid(reference["x"], reference["t"], indexing="ij")
    u = physics.cole_hopf(*(x.ravel()[::11] for x in grid))
    np.testing.assert_allclose(u, reference["u"].ravel()[::11], atol=1e-9)


def test_reference_file_is_used_as_soon_as_it_exists(monkeypatch):
    """A missing file is not cached, and is an error in a folder that was named."""
    monkeypatch.delenv(hg.datasets.VARIABLE, raising=False)
    for data_dir in (None, ""):
        assert physics.burgers_reference(data_dir) is physics.cole_hopf_grid()
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        physics.make(key=jax.random.key(0), variant="burgers", data_dir="/nowhere")
    reference = {"x": np.zeros(1)}
    monkeypatch.setattr(physics.datasets, "load", lambda name, data_dir: reference)
    assert physics.burgers_reference("/nowhere") is reference


@pytest.mark.parametrize(
    "variant", ["poisson", pytest.param("burgers", marks=pytest.mark.slow)]
)
def test_unrolled_hypergradient_equals_central_differences(variant, key):
    """Ten steps of Adam are differentiated from a random network.

    Errors are below 1e-5 of the largest derivative.
    """
    task = physics.make(key=key, variant=variant, **SIZES[variant])
    solver = hg.Descent(optax.adam(1e-2), 10)
    estimators = hg.Unrolled(solver, checkpoint=False), hg.CentralDifference(solver)
    actual, expected = (
        ravel_pytree(
            hg.hypergradient(task.problem, estimator)(task.w, ALPHA, key).hypergradient
        )[0]
        for estimator in estimators
    )
    atol = 1e-5 * jnp.max(jnp.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_closed_form_of_the_control_is_the_derivative_of_its_integral():
    """It is the derivative of the integral for the parabola with these ends."""

    @jax.jit
    @jax.grad
    def expected_fn(alpha):
        nodes, weights = np.polynomial.legendre.leggauss(8)
        x = (nodes + 1) / 2
        error = (alpha[1] - alpha[0] - 1) * x + alpha[0]
        return jnp.sum(weights / 2 * error**2)

    for alpha in (jnp.ones(2), jnp.array([0.3, -0.7]), jnp.array([0.0, 1.0])):
        actual = CONTROL.exact(alpha)
        np.testing.assert_allclose(actual, expected_fn(alpha), atol=1e-14)
    np.testing.assert_allclose(CONTROL.exact(CONTROL.alpha), [2 / 3, 1 / 3], rtol=1e-14)


@pytest.mark.slow  # Minutes of second-order optimization.
def test_gradient_descent_finds_the_optimal_control():
    """It starts at (1, 1) with an accurate hypergradient and ends near (0, 1).

    The certificate detects the negative curvature and does not trust the estimate.
    """
    estimator = hg.Implicit(hg.Newton(max_steps=20), hg.CG(rtol=1e-2, max_steps=100))
    estimate = hg.hypergradient(CONTROL.problem, estimator)(CONTROL.w, CONTROL.alpha)
    np.testing.assert_allclose(estimate.hypergradient, [2 / 3, 1 / 3], atol=0.03)
    trace = run_loop(
        *(CONTROL.problem, estimator, optax.sgd(1.0), estimate.w, CONTROL.alpha),
        num_steps=15,
    )
    assert trace.status == "completed"
    np.testing.assert_allclose(trace.alpha, [0, 1], atol=0.02)
    certificate = hg.certify(CONTROL.problem, estimate.w, CONTROL.alpha)
    assert certificate.negative_curvature
    assert not certificate.trusted


SOLUTIONS = {
    "poisson": physics.poisson_solution,
    "burgers": lambda x: physics.cole_hopf(*np.asarray(x).T),
}


@pytest.mark.parametrize(
    ("variant", "counts"),
    [("poisson", (64, 2, 20, 40)), ("burgers", (256, 100, 50, 40))],
    ids=["poisson", "burgers"],
)
def test_small_scale_follows_its_protocol(variant, counts, key):
    """It has the stated points and layers, and noise of 0.01 around the solution."""
    task = physics.make(key=key, variant=variant)
    train, val = task.problem.inner_data, task.problem.outer_data
    parts = (train["boundary"], train["data"], val)
    assert (len(train["collocation"]), *(len(part["u"]) for part in parts)) == counts
    assert [layer["W"].shape[1] for layer in task.w] == [20, 20, 1]
    x, u = (np.concatenate([part[name] for part in parts[1:]]) for name in ("x", "u"))
    noise = np.sqrt(np.mean((u - SOLUTIONS[variant](x)) ** 2))
    assert 0.006 < noise < 0.014  # Four standard errors of 60 readings.
    x, u = (np.asarray(train["boundary"][name]) for name in ("x", "u"))
    np.testing.assert_allclose(u, SOLUTIONS[variant](x), atol=1e-9)


def test_training_validation_and_test_points_differ():
    """The three parts of Burgers' equation have no point in common."""
    task = physics.make(key=jax.random.key(1), variant="burgers")
    train, val = task.problem.inner_data["data"], task.problem.outer_data
    test = task.metrics["relative_error"].args[0]
    parts = [np.asarray(part["x"]).round(9) for part in (train, val, test)]
    assert [len(part) for part in parts] == [50, 40, 64 * 25]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 50 + 40 + 64 * 25


def test_held_out_sensors_are_not_in_the_outer_loss(key):
    """A third of the sensors is removed, and the loss is the mean of the others."""
    make_val = lambda hold_out: (
        physics.make(key=key, hold_out=hold_out, num_held_out=20).problem.outer_data
    )
    full, reduced = make_val(False), make_val(True)
    np.testing.assert_array_equal(full["x"], reduced["x"])
    assert jnp.sum(full["use"]) == 20
    is_used = np.asarray(reduced["use"]) == 1
    assert is_used.sum() == 13
    w = physics.mlp.init(key, (1, 4, 1))
    used = {name: reduced[name][is_used] for name in ("x", "u")}
    expected = physics.misfit(w, None, used)
    np.testing.assert_allclose(physics.misfit(w, None, reduced), expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["poisson", "burgers", "control"])
def test_paper_scale_has_scalar_losses(variant):
    """The task of the paper's scale is consistent; checked on shapes only."""

    def evaluate_losses(key):
        task = physics.make(key=key, scale="paper", variant=variant)
        problem = task.problem
        return (
            problem.inner_loss(task.w, task.alpha, problem.inner_data),
            problem.outer_loss(task.w, task.alpha, problem.outer_data),
        )

    values = jax.eval_shape(evaluate_losses, KEY)
    assert [value.shape for value in values] == [(), ()]
