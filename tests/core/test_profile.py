"""`profile` measures an estimate, and what it takes without some of its parts."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

# `hypergrad.profile` is the function.
profile_module = importlib.import_module("hypergrad.profile")
SOLVER = hg.Descent(optax.sgd(0.1), 6)
W, ALPHA = jnp.zeros(3), jnp.zeros(3)


def inner_loss(w, alpha, x):
    return jnp.mean((x @ w - 1.0) ** 2) + jnp.sum(jnp.exp(alpha) * w**2)


def outer_loss(w, alpha, x):
    return jnp.mean((x @ w - 1.0) ** 2) + 0.1 * jnp.sum(alpha**2)


def make_problem(batch_size: int | None = None) -> hg.Bilevel:
    x = jax.random.normal(jax.random.key(0), (20, 3))
    data = (x[:12], x[12:])
    if batch_size is not None:
        data = [hg.Batches(examples, batch_size) for examples in data]
    return hg.Bilevel(inner_loss, outer_loss, *data)


def profile_programs(monkeypatch, problem, estimator):
    """Returns the last results of the programs by name, and the profile.

    A clock that is set by hand stands still but for 4 s in the whole estimate, 3 s in
    the one without its error estimate, and 1 s in the inner solve.
    """
    results, now = {}, [0.0]
    durations = {"whole": 4.0, "cheaper": 3.0, "solve": 1.0}
    median_seconds = profile_module._median_seconds

    def measure(functions, num_calls):
        def call(name, function):
            now[0] += durations[name]
            results[name] = function()
            return results[name]

        wrapped = {
            name: lambda n=name, f=f: call(n, f) for name, f in functions.items()
        }
        return median_seconds(wrapped, num_calls)

    monkeypatch.setattr(profile_module, "_median_seconds", measure)
    monkeypatch.setattr(profile_module.time, "perf_counter", lambda: now[0])
    return results, hg.profile(problem, estimator, W, ALPHA)


@pytest.mark.parametrize("batch_size", [None, 4], ids=["all data", "batches"])
def test_the_programs_are_the_estimate_its_solve_and_one_without_an_error_estimate(
    monkeypatch, batch_size
):
    """Each does what its name says, on the sample of the estimate."""
    problem, estimator = make_problem(batch_size), hg.Implicit(SOLVER)
    results, measured = profile_programs(monkeypatch, problem, estimator)
    expected = hg.hypergradient(problem, estimator)(W, ALPHA)
    whole, _ = results["whole"]
    cheaper, _ = results["cheaper"]
    solution, _ = results["solve"]
    np.testing.assert_allclose(whole.hypergradient, expected.hypergradient, rtol=1e-12)
    np.testing.assert_allclose(whole.w, solution, rtol=1e-12)
    assert whole.stats["num_hvps"] == expected.stats["num_hvps"]
    assert cheaper.stats["num_hvps"] < whole.stats["num_hvps"]
    assert (measured.seconds, measured.solve_seconds) == (4.0, 1.0)
    assert measured.error_seconds == 1.0


@pytest.mark.parametrize(
    ("estimator", "names"),
    [
        (hg.Unrolled(SOLVER), {"whole", "solve"}),
        (hg.Reversible(0.1, 0.5, 6), {"whole"}),
        (hg.Implicit(SOLVER, certify=True), {"whole", "solve", "cheaper"}),
        (hg.Implicit(SOLVER, estimate_error=False), {"whole", "solve"}),
        (hg.Implicit(SOLVER, rtol=1e-3), {"whole"}),
        (hg.Average(hg.Unrolled(SOLVER), 2), {"whole"}),
        (hg.Average(hg.Implicit(SOLVER), 2), {"whole", "cheaper"}),
        (hg.Penalty(SOLVER, 10.0), {"whole", "solve"}),
        (
            hg.PersistentEvolution(SOLVER, 0.1, 1, unroll_length=1),
            {"whole"},
        ),
        (
            hg.Implicit(SOLVER, hvp_fn=lambda w, alpha, batch, v: v),
            {"whole", "solve"},
        ),
    ],
    ids=[
        *("Unrolled", "Reversible", "Implicit, certified"),
        *("Implicit without an error estimate", "Implicit, rtol"),
        *("Average of Unrolled", "Average of Implicit", "Penalty"),
        *("PersistentEvolution", "Implicit, hvp_fn"),
    ],
)
def test_parts_that_an_estimator_lacks_are_not_measured(monkeypatch, estimator, names):
    results, measured = profile_programs(monkeypatch, make_problem(), estimator)
    assert results.keys() == names
    assert math.isnan(measured.solve_seconds) == ("solve" not in names)
    assert math.isnan(measured.error_seconds) == ("cheaper" not in names)


def test_a_single_loop_method_makes_a_hundred_steps(monkeypatch):
    """The last state is that of 100 steps, which are too short to reach the minimum."""
    problem, estimator = make_problem(), hg.SOBA(optax.sgd(1e-3))
    results, measured = profile_programs(monkeypatch, problem, estimator)
    init_key, key = jax.random.split(jax.random.key(0))
    state = estimator.init(problem, W, ALPHA, init_key)
    step = jax.jit(lambda state: estimator.estimate(problem, state, ALPHA, key)[1])
    for _ in range(100):
        prev_state, state = state, step(state)
    _, final_state = results["whole"]
    np.testing.assert_allclose(final_state.w, state.w, rtol=1e-12)
    assert not np.allclose(prev_state.w, state.w, rtol=1e-6)
    assert measured.seconds == 0.04


def test_the_programs_are_called_in_turns(monkeypatch):
    """The first calls are slow, and do not count."""
    calls, now = [], [0.0]
    durations = {"a": iter([90.0, 1.0, 5.0, 3.0]), "b": iter([90.0, 2.0, 2.0, 8.0])}

    def function(name):
        calls.append(name)
        now[0] += next(durations[name])

    functions = {name: lambda name=name: function(name) for name in durations}
    monkeypatch.setattr(profile_module.time, "perf_counter", lambda: now[0])
    assert profile_module._median_seconds(functions, 3) == {"a": 3.0, "b": 2.0}
    assert calls == ["a", "b"] * 4


def test_a_profile_prints_the_parts():
    program = hg.cost.compile_program(lambda x: x + 1, jnp.ones(2))
    measured = hg.Profile("Implicit", 0.05, 0.02, 0.005, program)
    lines = [re.sub(" +", " ", line.strip()) for line in repr(measured).splitlines()]
    assert lines[:5] == [
        "Profile of Implicit",
        "one estimate 50 ms",
        "one inner solve 20 ms, 40%",
        "error estimate 5 ms, 10%",
        "everything else 25 ms, 50%",
    ]
    assert "<td" in measured._repr_html_()
    whole = hg.Profile("SOBA", 0.05, math.nan, math.nan, program)
    assert "everything else" not in repr(whole)


def test_bad_arguments_raise_errors():
    problem, estimator = make_problem(), hg.Unrolled(SOLVER)
    with pytest.raises(ValueError, match="num_calls"):
        hg.profile(problem, estimator, W, ALPHA, num_calls=0)
    with pytest.raises(ValueError, match="profile needs concrete arrays"):
        jax.jit(lambda w: hg.profile(problem, estimator, w, ALPHA).seconds)(W)
    with pytest.raises(TypeError, match="estimator"):
        hg.profile(problem, SOLVER, W, ALPHA)


def test_a_part_that_is_within_the_noise_of_the_clock_has_no_negative_time():
    program = hg.profile(make_problem(), hg.Implicit(SOLVER), W, ALPHA).program
    measured = hg.Profile("Implicit", 1.0, 0.9, -0.1, program)
    (line,) = [x for x in repr(measured).splitlines() if "error estimate" in x]
    assert line.endswith("too short to measure")
    percentages = [int(x.rstrip("%")) for x in repr(measured).split() if "%" in x]
    assert percentages == [90, 10]
