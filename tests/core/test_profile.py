"""`profile` divides the time of an estimate among its calls."""

import functools
import importlib
import itertools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from hypergrad.problem import EstimateData

# `hypergrad.profile` is the function.
profile_module = importlib.import_module("hypergrad.profile")
SOLVER = hg.Descent(optax.sgd(0.1), 6)
ESTIMATORS = {
    "Implicit": hg.Implicit(SOLVER),
    "Implicit, batches": hg.Implicit(SOLVER, adjoint_batch_size=4, outer_batch_size=2),
    "Unrolled": hg.Unrolled(SOLVER),
    "Average": hg.Average(hg.Unrolled(SOLVER), 2),
    "CentralDifference": hg.CentralDifference(SOLVER),
}


def inner_loss(w, alpha, x):
    return jnp.mean((x @ w - 1.0) ** 2) + jnp.sum(jnp.exp(alpha) * w**2)


def outer_loss(w, alpha, x):
    return jnp.mean((x @ w - 1.0) ** 2) + 0.1 * jnp.sum(alpha**2)


def make_problem(batch_size: int | None = None, num_losses: int = 1) -> hg.Bilevel:
    x = jax.random.normal(jax.random.key(0), (20, 3))
    data = (x[:12], x[12:])
    if batch_size is not None:
        data = [hg.Batches(examples, batch_size) for examples in data]
    outer = outer_loss if num_losses == 1 else (outer_loss,) * num_losses
    return hg.Bilevel(inner_loss, outer, *data)


@pytest.fixture(autouse=True)
def _short_loops(monkeypatch):
    """Loops of at most three calls are enough where nothing is read from a clock."""
    monkeypatch.setattr(profile_module, "MAX_CALLS", 3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_calls_are_those_of_the_estimate(name):
    """Mini-batches of 4 of 12 are a third of a pass, and 2 of 8 a quarter."""
    problem, estimator = make_problem(batch_size=4), ESTIMATORS[name]
    w, alpha = jnp.zeros(3), jnp.zeros(3)
    stats = hg.hypergradient(problem, estimator)(w, alpha).stats
    calls = hg.profile(problem, estimator, w, alpha).call_times
    num_calls = {call_time.stat: call_time.num_calls for call_time in calls}
    product_fraction = 1.0 if name == "CentralDifference" else 1 / 3
    outer_fraction = 1 / 4 if name == "Implicit, batches" else 1.0
    if name == "Implicit":
        product_fraction = 1.0
    expected = {
        "num_grads": stats["num_grads"] * 3,
        "num_hvps": stats["num_hvps"] / product_fraction,
        "num_values": stats["num_values"] * 3,
        "num_outer_grads": stats["num_outer_grads"] / outer_fraction,
        "num_outer_values": stats["num_outer_values"] / outer_fraction,
    }
    expected = {key: float(n) for key, n in expected.items() if n > 0}
    assert num_calls == pytest.approx(expected, abs=1e-3)


def test_a_call_for_several_losses_is_one_call():
    problem, estimator = make_problem(num_losses=3), hg.Unrolled(SOLVER)
    calls = hg.profile(problem, estimator, jnp.zeros(3), jnp.zeros(3)).call_times
    assert {c.stat: c.num_calls for c in calls}["num_outer_grads"] == 1


def test_a_single_loop_method_makes_a_hundred_steps():
    problem = make_problem(batch_size=4)
    estimator = hg.SOBA(optax.sgd(0.1))
    measured = hg.profile(problem, estimator, jnp.zeros(3), jnp.zeros(3))
    assert measured.num_estimates == 100
    assert {c.stat: c.num_calls for c in measured.call_times} == {
        "num_hvps": 100,
        "num_outer_grads": 100,
    }
    assert repr(measured).startswith("Profile of 100 steps of SOBA\n")


def test_no_call_of_a_loop_is_left_out():
    """XLA counts the body of a loop once, so that it holds a call with all its work."""
    problem = make_problem()
    data = EstimateData.sample(problem, jax.random.key(0))
    point = profile_module._Point(jnp.ones(3), jnp.ones(3), jnp.ones(3))
    args = data, point, jnp.zeros(()), jnp.asarray(5)
    compile_function = lambda function, *args: jax.jit(function).lower(*args).compile()
    for kind in profile_module._kinds(problem, hg.Unrolled(SOLVER), data):
        loop = functools.partial(profile_module._repeat_call, kind)
        repeated = compile_function(loop, *args)
        single = compile_function(kind.call, point, data, jax.random.key(0))
        num_flops = repeated.cost_analysis()["flops"], single.cost_analysis()["flops"]
        assert num_flops[0] >= num_flops[1] > 20, kind.stat


def test_times_are_medians_per_call(monkeypatch):
    """A clock whose k-th reading differs from the one before by k seconds."""
    readings = itertools.accumulate(itertools.count(1))
    monkeypatch.setattr(profile_module.time, "perf_counter", lambda: next(readings))
    # The differences within pairs of readings are 2, 4, 6, ...
    assert profile_module._time_calls(lambda: 7, 3) == (4, 7)


def test_what_is_in_no_call_is_the_rest():
    call_times = (
        profile_module.CallTime("num_grads", 10, 2e-3),
        profile_module.CallTime("num_hvps", 1, 5e-3),
    )
    program = hg.cost.compile_program(lambda x: x + 1, jnp.ones(2))
    measured = hg.Profile("Unrolled", 1, 0.05, call_times, program)
    assert measured.other_seconds == pytest.approx(0.025)
    lines = [re.sub(" +", " ", line.strip()) for line in repr(measured).splitlines()]
    assert lines[:5] == [
        "Profile of Unrolled",
        "gradients 40%: 10 calls of 2 ms",
        "HVPs 10%: 1 call of 5 ms",
        "everything else 50%",
        "all 50 ms",
    ]
    assert "<td" in measured._repr_html_()


def test_bad_arguments_raise_errors():
    problem, estimator = make_problem(), hg.Unrolled(SOLVER)
    zeros = jnp.zeros(3)
    with pytest.raises(ValueError, match="num_calls"):
        hg.profile(problem, estimator, zeros, zeros, num_calls=0)
    with pytest.raises(ValueError, match="profile needs concrete arrays"):
        jax.jit(lambda w: hg.profile(problem, estimator, w, zeros).seconds)(zeros)
    with pytest.raises(TypeError, match="estimator"):
        hg.profile(problem, SOLVER, zeros, zeros)
