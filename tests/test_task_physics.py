"""Physics: residuals and references, closed forms, and central differences."""

import functools
import os

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import hypergrad as hg
from hypergrad.tasks import physics
from tests.loops import run_loop

SIZES = {
    "poisson": {"inside": 12, "sensors": 4, "held_out": 4, "hidden": (4,)},
    "burgers": {
        **{"inside": 12, "boundary": 4, "sensors": 4, "held_out": 4},
        "hidden": (4,),
    },
}


def test_residuals_vanish_at_solutions_and_only_there(monkeypatch, key):
    """Poisson's at its formula; Burgers' at ``x / (1 + t)``; y'' - 2 at x²."""
    put = lambda u: monkeypatch.setattr(physics, "network", lambda w, x: u(x))
    line = jax.random.uniform(key, (9, 1))
    put(physics.poisson_solution)
    np.testing.assert_allclose(physics.poisson_residual(None, line), 0, atol=1e-10)
    put(lambda x: x[:, 0] ** 2 + 3 * x[:, 0])
    np.testing.assert_allclose(physics.control_residual(None, line), 0, atol=1e-12)
    plane = jax.random.uniform(key, (9, 2))
    put(lambda x: x[:, 0] / (1 + x[:, 1]))
    np.testing.assert_allclose(physics.burgers_residual(None, plane), 0, atol=1e-12)
    put(lambda x: jnp.sin(x[:, 0]))  # nu u_xx counts, with its sign
    expected = np.sin(plane[:, 0]) * (np.cos(plane[:, 0]) + physics.VISCOSITY)
    found = physics.burgers_residual(None, plane)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_cole_hopf_solves_burgers_equation():
    """Central differences of the quadrature before the shock, and where it starts."""
    x, t = (grid.ravel() for grid in np.meshgrid([-0.6, 0.2, 0.9], [0.05, 0.2]))
    u, h = physics.cole_hopf, 1e-4
    time = (u(x, t + h) - u(x, t - h)) / (2 * h)
    slope = (u(x + h, t) - u(x - h, t)) / (2 * h)
    curvature = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2
    residual = time + u(x, t) * slope - physics.VISCOSITY * curvature
    np.testing.assert_allclose(residual, 0, atol=1e-5)
    assert np.max(np.abs(time)) > 0.5
    np.testing.assert_allclose(u(x, 0 * t), -np.sin(np.pi * x), atol=1e-12)


@pytest.mark.data
def test_the_quadrature_is_the_reference_that_others_publish():
    """At every point of the file, the shock included."""
    if not os.environ.get(hg.datasets.VARIABLE):
        pytest.skip(f"{hg.datasets.VARIABLE} is not set")
    found = hg.datasets.load("burgers")
    at = [g.ravel()[::11] for g in np.meshgrid(found["x"], found["t"], indexing="ij")]
    u = physics.cole_hopf(*at)
    np.testing.assert_allclose(u, found["u"].ravel()[::11], atol=1e-9)


def test_the_reference_is_looked_for_each_time(monkeypatch):
    """A file that is there now counts, whatever was found before."""
    assert "quadrature" in physics.burgers_reference("/nowhere")[0]
    there = {"x": np.zeros(1)}
    monkeypatch.setattr(physics.datasets, "load", lambda name, data_dir: there)
    assert physics.burgers_reference("/nowhere")[1] is there


ALPHA = {"residual": 0.5, "boundary": 3.0, "data": 2.0}
slow = pytest.mark.slow


def assert_central_difference(estimator, task, w, key, epsilon=None):
    """Of whole inner solves from ``w``, to 1e-5 of the largest."""
    found = hg.hypergradient(task.problem, estimator)(w, ALPHA, key)
    central = hg.CentralDifference(estimator.solver, epsilon)
    expected = hg.hypergradient(task.problem, central)(w, ALPHA, key).hypergradient
    found, expected = (
        np.array([gradient[name] for name in ALPHA])
        for gradient in (found.hypergradient, expected)
    )
    largest = np.max(np.abs(expected))
    np.testing.assert_allclose(found / largest, expected / largest, atol=1e-5)


@pytest.mark.parametrize("variant", ["poisson", pytest.param("burgers", marks=slow)])
def test_the_hypergradient_of_ten_steps_is_the_central_difference(variant, key):
    """Through Adam, from a network at random."""
    task = physics.make(key=key, variant=variant, **SIZES[variant])
    adam = hg.Unrolled(hg.Descent(optax.adam(1e-2), 10), checkpoint=False)
    assert_central_difference(adam, task, task.w, key)


# One unit that rises in the middle, and a plane: so few numbers that the loss is curved
# in each. Networks of more have flat directions, and where Newton's method ends in
# those is rounding's choice.
FEW = {
    "poisson": [
        {"W": jnp.array([[5.0]]), "b": jnp.array([-2.0])},
        {"W": jnp.ones((1, 1)), "b": jnp.zeros(1)},
    ],
    "burgers": [{"W": jnp.zeros((2, 1)), "b": jnp.zeros(1)}],
}


@pytest.mark.parametrize("variant", [pytest.param(name, marks=slow) for name in FEW])
def test_the_implicit_hypergradient_is_the_central_difference(variant, key):
    """At a strict minimum, from which those of both shifts are found."""
    task = physics.make(key=key, variant=variant, **SIZES[variant])
    loss, train = task.problem.inner_loss, task.problem.inner_data
    newton = hg.Newton(tolerance=1e-11)
    solve = jax.jit(functools.partial(newton.solve, loss))
    w, _ = solve(FEW[variant], ALPHA, train, key)
    flat, tree = ravel_pytree(w)
    hessian = jax.jit(jax.hessian(lambda flat: loss(tree(flat), ALPHA, train)))
    assert jnp.linalg.eigvalsh(hessian(flat))[0] > 0.1
    implicit = hg.Implicit(newton, lineax.LU())
    assert_central_difference(implicit, task, w, key, epsilon=1e-4)


CONTROL = physics.make(key=jax.random.key(0), variant="control")
NEWTON = hg.Implicit(hg.Newton(max_steps=20), hg.CG(rtol=1e-2, max_steps=100))


def test_the_controls_closed_form_is_the_derivative_of_its_integral():
    """Of ``(y - x²)²`` for the parabola through both ends; (2/3, 1/3) at (1, 1)."""

    def cost(alpha):
        nodes, weights = np.polynomial.legendre.leggauss(8)
        x = (nodes + 1) / 2
        return jnp.sum(weights / 2 * ((alpha[1] - alpha[0] - 1) * x + alpha[0]) ** 2)

    for alpha in (jnp.ones(2), jnp.array([0.3, -0.7]), jnp.array([0.0, 1.0])):
        expected = jax.grad(cost)(alpha)
        np.testing.assert_allclose(physics.exact_control(alpha), expected, atol=1e-14)
    np.testing.assert_allclose(CONTROL.exact(CONTROL.alpha), [2 / 3, 1 / 3], rtol=1e-14)


def test_descent_from_one_and_one_ends_at_the_best_control():
    """Hypergradient (2/3, 1/3) within 0.03 at first, and (0, 1) within 0.02 at last."""
    estimate = hg.hypergradient(CONTROL.problem, NEWTON)(CONTROL.w, CONTROL.alpha)
    np.testing.assert_allclose(estimate.hypergradient, [2 / 3, 1 / 3], atol=0.03)
    trace = run_loop(
        *(CONTROL.problem, NEWTON, optax.sgd(1.0), estimate.w, CONTROL.alpha),
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
)
def test_the_small_scale_is_the_protocols(variant, counts, key):
    """Points of each kind, layers, and noise of 0.01 about the solution."""
    task = physics.make(key=key, variant=variant)
    train, held_out = task.problem.inner_data, task.problem.outer_data
    parts = (train["boundary"], train["data"], held_out)
    assert (len(train["inside"]), *(len(part["u"]) for part in parts)) == counts
    assert [layer["W"].shape[1] for layer in task.w] == [20, 20, 1]
    x, u = (np.concatenate([part[name] for part in parts[1:]]) for name in ("x", "u"))
    noise = np.sqrt(np.mean((u - SOLUTIONS[variant](x)) ** 2))
    assert 0.006 < noise < 0.014  # four standard errors of 60 readings


def test_held_out_sensors_are_no_training_data_and_no_test_points():
    """M_val reads other places than the loss, the test grid others again."""
    task = physics.make(key=jax.random.key(1), variant="burgers")
    places = lambda x: {tuple(p) for p in np.asarray(x).round(9)}
    train = places(task.problem.inner_data["data"]["x"])
    held_out = places(task.problem.outer_data["x"])
    test = places(task.metrics["relative_error"].args[0]["x"])
    assert (len(train), len(held_out), len(test)) == (50, 40, 64 * 25)
    assert len(train | held_out | test) == 50 + 40 + 64 * 25
    assert "Burgers" in physics.data_name("burgers")


def test_sensors_put_aside_to_choose_by_are_out_of_the_outer_loss(key):
    """A third of them, the same ones each time; the outer loss is the others' mean."""
    parts = {}
    for hold_out in (False, True):
        task = physics.make(key=key, hold_out=hold_out, held_out=20)
        parts[hold_out] = task.problem.outer_data
        np.testing.assert_array_equal(parts[hold_out]["x"], parts[False]["x"])
    assert jnp.sum(parts[False]["use"]) == 20
    assert jnp.sum(parts[True]["use"]) == 13
    used = np.asarray(parts[True]["use"]) == 1
    mean = {name: parts[True][name][used] for name in ("x", "u")}
    found = physics.misfit(task.w, None, parts[True])
    expected = physics.misfit(task.w, None, mean)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("variant", ["poisson", "burgers", "control"])
def test_the_papers_scale_builds(variant):
    """On shapes alone, with both losses; another variant or scale is refused."""

    def losses(key):
        task = physics.make(key=key, scale="paper", variant=variant)
        inner, outer = task.problem.inner_data, task.problem.outer_data
        return (
            task.problem.inner_loss(task.w, task.alpha, inner),
            task.problem.outer_loss(task.w, task.alpha, outer),
        )

    found = jax.eval_shape(losses, jax.random.key(0))
    assert [value.shape for value in found] == [(), ()]
    with pytest.raises(ValueError, match="variant must be one of"):
        physics.make(key=jax.random.key(0), variant="waves")
    with pytest.raises(ValueError, match="scale must be"):
        physics.make(key=jax.random.key(0), variant=variant, scale="huge")
