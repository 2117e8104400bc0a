"""Tests of learned schedules: derivatives, update rules and sizes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.tasks import schedules


def make_estimator(name: str, task, num_steps: int):
    """Returns one of the three modes for the same steps."""
    if name == "Reversible":
        return schedules.reversible_estimator(num_steps)
    return getattr(hg, name)(task.solver)


@pytest.mark.parametrize(
    ("name", "rtol"),
    [
        pytest.param("Unrolled", 1e-6, id="Unrolled"),
        pytest.param("Forward", 1e-6, marks=pytest.mark.slow, id="Forward"),
        pytest.param("Reversible", 1e-5, marks=pytest.mark.slow, id="Reversible"),
    ],
)
def test_the_hypergradient_equals_fourth_order_differences(name, rtol, key):
    """A fixed key fixes the mini-batches of the 15 steps.

    Reversible mode rounds momenta to multiples of 1/4096, so all of them lie there.
    """
    task = schedules.make(key=key, num_steps=15)
    rate_key, momentum_key, estimate_key = jax.random.split(key, 3)
    momentum = jax.random.uniform(momentum_key, (5,), minval=0.3, maxval=0.9)
    alpha = {
        "rate": jax.random.uniform(rate_key, (5,), minval=0.02, maxval=0.2),
        "momentum": jnp.round(momentum * 4096) / 4096,
    }
    hypergradient_fn = hg.hypergradient(task.problem, make_estimator(name, task, 15))
    estimate_fn = jax.jit(lambda alpha: hypergradient_fn(task.w, alpha, estimate_key))
    estimate = estimate_fn(alpha)
    assert estimate.trusted
    direction, t = jnp.array([1.0, -2.0, 0.5, 1.5, -1.0]), 2 / 4096
    for leaf in alpha:
        move = lambda t, leaf=leaf: alpha | {leaf: alpha[leaf] + t * direction}
        value = lambda t, move=move: estimate_fn(move(t)).value
        near, far = value(t) - value(-t), value(2 * t) - value(-2 * t)
        actual = estimate.hypergradient[leaf] @ direction
        np.testing.assert_allclose(actual, (8 * near - far) / (12 * t), rtol=rtol)


def test_momentum_descent_uses_the_rate_and_momentum_of_its_window(key):
    """Each step is ``v <- m v + g, w <- w - r v``."""
    coefficients = jax.random.normal(key, (3,))
    loss = lambda w, alpha, batch: jnp.sum(w * coefficients) + jnp.sum(w**4) / 4
    alpha = {"rate": jnp.array([0.1, 0.01]), "momentum": jnp.array([0.5, 0.9])}
    solver = hg.Descent(schedules.momentum_descent(4), 4)
    actual, _ = solver.solve(loss, jnp.ones(3), alpha, None, key)
    w, v = jnp.ones(3), jnp.zeros(3)
    for rate, momentum in ((0.1, 0.5), (0.1, 0.5), (0.01, 0.9), (0.01, 0.9)):
        v = momentum * v + coefficients + w**3
        w = w - rate * v
    np.testing.assert_allclose(actual, w, rtol=1e-12)


def test_hypergradient_descent_follows_the_derivative_of_one_step(key):
    """``-g' v`` is the derivative of the loss after a step, by ``jax.grad``."""
    loss = lambda w: jnp.sum(jnp.cosh(w))
    optimizer = schedules.hypergradient_descent(0.1, 0.5, 0.2)
    w = jax.random.normal(key, (4,))
    state = optimizer.init(w)
    for _ in range(3):
        prev_w = w
        updates, state = optimizer.update(jax.grad(loss)(w), state)
        w = optax.apply_updates(w, updates)
    v, rate = state.v, state.rate
    assert rate != 0.1
    np.testing.assert_allclose(w, prev_w - rate * v, rtol=1e-12)
    derivative = jax.grad(lambda r: loss(prev_w - r * v))(rate)
    g = jax.grad(loss)(w)
    _, next_state = optimizer.update(g, state)
    norms = jnp.linalg.norm(g) * jnp.linalg.norm(v)
    expected = rate * (1 - 0.2 * derivative / norms)
    np.testing.assert_allclose(next_state.rate, expected, rtol=1e-12)


def test_the_paper_scale_has_one_rate_and_momentum_per_step():
    """The task is built on shapes only: 784-50-50-50-10 and 100 steps."""
    shape = jax.ShapeDtypeStruct
    data = {
        "x": shape((70_000, 784), float),
        "y": shape((70_000,), int),
        "test": shape((70_000,), bool),
    }
    make = lambda data: schedules.make(
        key=jax.random.key(0), scale="paper", num_steps=100, num_windows=100, data=data
    )
    task = eqx.filter_eval_shape(make, data)
    kernels = [layer["kernel"].shape for layer in task.w["layers"].values()]
    assert kernels == [(784, 50), (50, 50), (50, 50), (50, 10)]
    assert task.alpha["rate"].shape == task.alpha["momentum"].shape == (100,)
    assert task.problem.inner_data.num_examples == 10_000
