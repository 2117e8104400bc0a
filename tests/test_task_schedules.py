"""Learned schedules: their derivative, the greedy rule, the memory of 10,000 steps."""

import functools
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.studies import schedules as study
from hypergrad.tasks import schedules

STEPS = 15


def estimator_named(name, task, num_steps=STEPS):
    """One of the three modes, of the same steps."""
    if name == "reversible":
        return schedules.reversible_estimator(num_steps)
    return {"unrolled": hg.Unrolled, "forward": hg.Forward}[name](task.solver)


@pytest.mark.parametrize(
    ("name", "rtol"), [("unrolled", 1e-6), ("forward", 1e-6), ("reversible", 1e-5)]
)
def test_the_hypergradient_is_that_of_the_whole_pipeline(name, rtol, key):
    """Mini-batches included, on a fixed key, by differences of fourth order.

    Reversible mode rounds momenta to 1/4096, so all of them lie on that grid.
    """
    task = schedules.make(key=key, num_steps=STEPS)
    keys = jax.random.split(key, 3)
    draw = lambda key, low, high: jax.random.uniform(key, (5,), float, low, high)
    momentum = jnp.round(draw(keys[1], 0.3, 0.9) * 4096) / 4096
    alpha = {"rate": draw(keys[0], 0.02, 0.2), "momentum": momentum}
    find = hg.hypergradient(task.problem, estimator_named(name, task))
    estimate = jax.jit(lambda alpha: find(task.w, alpha, keys[2]))
    found = estimate(alpha)
    assert found.stats["trusted"]
    direction, t = jnp.array([1.0, -2.0, 0.5, 1.5, -1.0]), 2 / 4096
    for leaf in alpha:
        at = lambda t: estimate(alpha | {leaf: alpha[leaf] + t * direction}).value  # noqa: B023
        slope = (8 * (at(t) - at(-t)) - (at(2 * t) - at(-2 * t))) / (12 * t)
        along = found.hypergradient[leaf] @ direction
        np.testing.assert_allclose(along, slope, rtol=rtol)


def test_steps_follow_the_formula(key):
    """``v <- m v + g, w <- w - r v`` with the window's own rate and momentum."""
    slope = jax.random.normal(key, (3,))
    loss = lambda w, alpha, batch: jnp.sum(w * slope) + jnp.sum(w**4) / 4
    alpha = {"rate": jnp.array([0.1, 0.01]), "momentum": jnp.array([0.5, 0.9])}
    solver = hg.Descent(schedules.momentum_descent(4), 4)
    found, _ = solver.solve(loss, jnp.ones(3), alpha, None, key)
    w, v = jnp.ones(3), jnp.zeros(3)
    for rate, momentum in ((0.1, 0.5), (0.1, 0.5), (0.01, 0.9), (0.01, 0.9)):
        v = momentum * v + slope + w**3
        w = w - rate * v
    np.testing.assert_allclose(found, w, rtol=1e-12)


def test_the_greedy_rate_follows_the_one_step_derivative(key):
    """``-g'ᵀ v`` is ``jax.grad`` of the loss after the step, and moves the rate."""
    loss = lambda w: jnp.sum(jnp.cosh(w))
    greedy = schedules.hypergradient_descent(0.1, 0.5, 0.2)
    w = jax.random.normal(key, (4,))
    state = greedy.init(w)
    for _ in range(3):
        before, gradient = w, jax.grad(loss)(w)
        updates, state = greedy.update(gradient, state)
        w = optax.apply_updates(w, updates)
    v, rate = state.v, state.rate
    np.testing.assert_allclose(w, before - rate * v, rtol=1e-12)
    slope = jax.grad(lambda r: loss(before - r * v))(rate)
    gradient = jax.grad(loss)(w)
    _, after = greedy.update(gradient, state)
    norms = jnp.linalg.norm(gradient) * jnp.linalg.norm(v)
    np.testing.assert_allclose(after.rate, rate * (1 - 0.2 * slope / norms), rtol=1e-12)
    assert state.rate != 0.1


@pytest.mark.parametrize("name", ["unrolled", "forward"])
def test_ten_thousand_steps_are_planned_in_a_gibibyte(name):
    """What XLA sets aside for one estimate; the run itself is a slow test."""
    num_steps = 10_000
    task = schedules.make(key=jax.random.key(0), num_steps=num_steps)
    estimator = estimator_named(name, task, num_steps)
    f = lambda w, alpha: hg.hypergradient(task.problem, estimator)(w, alpha)
    plan = jax.jit(f).lower(task.w, task.alpha).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 2**28


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["Unrolled", "Forward", "reversible"])
def test_ten_thousand_steps_stay_within_a_gibibyte(name):
    """Peak resident memory of a whole process of its own."""
    code = f"""
        import re
        import jax, jax.numpy as jnp, hypergrad as hg
        from hypergrad.tasks import schedules
        name, num_steps = {name!r}, 10_000
        task = schedules.make(key=jax.random.key(0), num_steps=num_steps)
        if name == "reversible":
            estimator = schedules.reversible_estimator(num_steps)
        else:
            estimator = getattr(hg, name)(task.solver)
        find = hg.hypergradient(task.problem, estimator)
        found = find(task.w, task.alpha).hypergradient
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in found.values())
        assert all(jnp.any(leaf != 0) for leaf in found.values())
        # getrusage's peak would begin at the size of the process that started this one.
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
        assert int(peak[1]) < 2**20, peak
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_papers_size_builds():
    """On shapes alone: 784-50-50-50-10, a rate and a momentum for each of 100 steps."""
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
    assert task.problem.inner_data.size == 10_000


@pytest.mark.parametrize("num_windows", [0, 51])
def test_windows_are_at_most_as_many_as_steps(num_windows, key):
    """A window without a step would learn nothing."""
    with pytest.raises(ValueError, match=r"1\.\.num_steps, 50"):
        schedules.make(key=key, num_steps=50, num_windows=num_windows)


def test_another_scale_is_refused(key):
    """With those that are known."""
    with pytest.raises(ValueError, match="paper"):
        schedules.make(key=key, scale="large")


@pytest.mark.parametrize("start", study.GRID)
@pytest.mark.parametrize("factor", study.FACTORS)
def test_random_search_draws_about_the_start(start, factor):
    """Within the task's space, the start inside."""
    space = study.around(jnp.asarray(start), factor)
    for name, value, (low, high) in (
        ("rate", start[0], schedules.RATES),
        ("momentum", start[1], schedules.MOMENTA),
    ):
        assert low <= space[name].low < value < space[name].high <= high


@pytest.mark.slow
@pytest.mark.parametrize("method", study.LEARNED)
def test_a_learned_row_keeps_the_budget(method):
    """Its curve ends below it, but would not fit two more estimates."""
    arguments = jnp.asarray(False), jnp.array([0.1, 0.9]), jnp.asarray(0.1)
    learn = functools.partial(study.learn, "100 steps", method)
    trace = jax.jit(learn)(study.digits(), jax.random.key(0), *arguments)
    budget, each = study.budget("100 steps"), np.diff(trace.cost).max()
    assert budget - 2 * each < trace.cost[-1] <= budget
