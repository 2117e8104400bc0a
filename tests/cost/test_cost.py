"""Tests of counted calls, memory, energy and compiled programs."""

import sys
import time
import types
from importlib.machinery import ModuleSpec

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.cost.memory import resident_bytes

# Numbers of examples, against batches counted by hand.

N, N_VAL = 42, 14  # not powers of two, so that fractions of the data are rounded
SOLVER = hg.Descent(optax.sgd(0.1), 5)


def inner_loss(w, alpha, batch):
    return jnp.mean((batch @ w - 1.0) ** 2) + 0.5 * jnp.exp(alpha) * jnp.vdot(w, w)


def outer_loss(w, alpha, batch):
    return jnp.mean((batch @ w - 1.0) ** 2)


def make_problem(batch_size, outer_batch_size, dtype=float):
    train, val = jnp.ones((N, 3), dtype), jnp.ones((N_VAL, 3), dtype)
    if batch_size is not None:
        train = hg.Batches(train, batch_size)
    if outer_batch_size is not None:
        val = hg.Batches(val, outer_batch_size)
    return hg.Bilevel(inner_loss, outer_loss, train, val)


def num_examples(problem, estimator, dtype=float):
    w, alpha = jnp.zeros(3, dtype), jnp.zeros((), dtype)
    return float(hg.hypergradient(problem, estimator)(w, alpha).stats["num_examples"])


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(
    ("batch_size", "dtype"),
    [(None, "float64"), (5, "float64"), (11, "float32")],
    ids=["full", "5", "11"],
)
def test_unrolling_uses_a_batch_per_step_and_pass(batch_size, dtype, checkpoint):
    """Checkpoints run the 5 steps again. The residual and the outer loss use all."""
    problem = make_problem(batch_size, None, dtype)
    num_passes = 3 if checkpoint else 2
    by_hand = num_passes * 5 * (batch_size or N) + N + N_VAL
    estimator = hg.Unrolled(SOLVER, checkpoint=checkpoint)
    assert num_examples(problem, estimator, dtype) == by_hand


COUNTS = {
    "num_grads": 2,
    "num_hvps": 3,
    "num_values": 4,
    "num_outer_grads": 5,
    "num_outer_values": 6,
}


def test_cost_stats_weight_each_call():
    """The data have N and N_VAL examples."""
    stats = hg.cost.cost_stats(jnp.ones((N, 2)), jnp.ones((N_VAL, 2)), **COUNTS)
    assert set(stats) == set(hg.cost.COST_STATS)
    assert {name: float(stats[name]) for name in COUNTS} == COUNTS
    assert stats["num_examples"] == N * (2 + 3 + 4) + N_VAL * (5 + 6)
    by_hand = 2 + 2 * 3 + 4 / 3 + N_VAL / N * (5 + 6 / 3)
    assert stats["gradient_equivalents"] == pytest.approx(by_hand)


def test_calls_are_counted_on_data_without_a_number_of_examples():
    stats = hg.cost.cost_stats(None, None, **COUNTS)
    assert np.isnan(stats["num_examples"])
    by_hand = 2 + 2 * 3 + 4 / 3 + 5 + 6 / 3
    assert stats["gradient_equivalents"] == pytest.approx(by_hand)


# Memory, against arrays of known sizes.

SIZE, NUM_STEPS = 100, 1000
MATRIX, VECTOR = jnp.eye(SIZE), jnp.ones(SIZE)


def scan_tanh(A, x):
    """Runs ``x <- tanh(A x)``, whose reverse pass needs every tanh."""
    step = lambda x, _: (jnp.tanh(A @ x), None)
    return jnp.sum(jax.lax.scan(step, x, length=NUM_STEPS)[0])


def test_arguments_and_outputs_have_their_sizes():
    """A float64 has 8 bytes."""
    memory = hg.cost.memory(lambda A, x: A @ x, MATRIX, VECTOR)
    assert (memory.arguments, memory.outputs) == (8 * (SIZE**2 + SIZE), 8 * SIZE)
    assert memory.peak == memory.arguments + memory.outputs + memory.temporaries


def test_a_reverse_pass_stores_every_step():
    stored = 8 * NUM_STEPS * SIZE
    memory = hg.cost.memory(jax.grad(scan_tanh), MATRIX, VECTOR)
    assert stored <= memory.temporaries < 4 * stored
    assert hg.cost.memory(scan_tanh, MATRIX, VECTOR).temporaries < 0.1 * stored


def test_the_memory_of_a_donated_argument_is_reused():
    step = lambda x: x + 1.0
    x = jax.ShapeDtypeStruct((SIZE,), float)
    assert hg.cost.memory(step, x).peak == 2 * 8 * SIZE
    assert hg.cost.memory(jax.jit(step, donate_argnums=0), x).peak == 8 * SIZE


def test_a_backend_without_memory_analysis_is_an_error():
    program = types.SimpleNamespace(memory_analysis=lambda: None)
    lowered = types.SimpleNamespace(compile=lambda: program)
    with pytest.raises(RuntimeError, match="memory"):
        hg.cost.memory(types.SimpleNamespace(lower=lambda *_: lowered))


@pytest.mark.skipif(resident_bytes() is None, reason="needs /proc of Linux")
def test_resident_memory_rises_and_falls_with_an_array():
    """Linux updates up to 64 pages per thread late, which is below 5% of 256 MB."""
    before = resident_bytes()
    block = np.ones(2**25)
    num_bytes = block.nbytes
    assert resident_bytes() - before == pytest.approx(num_bytes, rel=0.05)
    del block
    assert resident_bytes() - before < 0.05 * num_bytes


# Energy.


def test_energy_is_power_times_time():
    assert hg.cost.energy(3600, watts=1000, grams_per_kwh=450) == (1, 450)
    kwh, grams = hg.cost.energy(1, watts=1, grams_per_kwh=3.6e6)
    assert (kwh, grams) == pytest.approx((1 / 3.6e6, 1))


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_without_a_tracker_a_block_uses_the_stated_power(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with hg.cost.measure(watts=100.0, grams_per_kwh=300.0) as measurement:
        assert np.isnan(measurement.seconds)
        spin(0.05)
    assert 0.05 <= measurement.seconds < 60
    expected = hg.cost.energy(measurement.seconds, watts=100.0, grams_per_kwh=300.0)
    assert (measurement.kwh, measurement.grams) == pytest.approx(expected)
    assert measurement.source == "stated"


class Tracker:
    """A stand-in for the tracker of codecarbon."""

    def __init__(self, **settings):
        self.is_running = False

    def start(self):
        self.is_running = True

    def stop(self):
        if self.is_running:
            self.final_emissions_data = types.SimpleNamespace(energy_consumed=0.25)


class FailingTracker(Tracker):
    """A tracker that fails without an error, as that of codecarbon does."""

    def start(self):
        pass


def install_tracker(monkeypatch, tracker):
    module = types.ModuleType("codecarbon")
    module.__spec__ = ModuleSpec("codecarbon", None)
    module.OfflineEmissionsTracker = tracker
    monkeypatch.setitem(sys.modules, "codecarbon", module)


def test_a_failing_tracker_leaves_the_stated_power(monkeypatch):
    install_tracker(monkeypatch, FailingTracker)
    with hg.cost.measure(watts=3.6e6, grams_per_kwh=300.0) as measurement:
        pass
    assert measurement.kwh == pytest.approx(measurement.seconds)
    assert measurement.source == "stated"


def test_a_tracker_is_read_even_if_the_block_raises(monkeypatch):
    install_tracker(monkeypatch, Tracker)
    measurements = []

    def fail():
        with hg.cost.measure(watts=100.0, grams_per_kwh=300.0) as measurement:
            measurements.append(measurement)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (measurement,) = measurements
    assert (measurement.kwh, measurement.grams) == (0.25, 75.0)
    assert measurement.source == "codecarbon"
    assert measurement.seconds > 0


# Compiled programs.


def test_a_program_computes_and_counts_its_function():
    """It is traced once, for its costs and for any number of calls."""
    chex.clear_trace_counter()
    function = chex.assert_max_traces(lambda A, x: A @ x, n=1)
    program = hg.cost.compile_program(function, MATRIX, VECTOR)
    x = jnp.arange(1.0 * SIZE)
    np.testing.assert_array_equal(program(2 * MATRIX, x), 2 * x)
    np.testing.assert_array_equal(program(MATRIX, x), x)
    product = lambda A, x: A @ x
    assert program.flops == hg.cost.flops(product, MATRIX, VECTOR)
    assert program.flops.total() == 2 * SIZE**2
    assert program.memory == hg.cost.memory(product, MATRIX, VECTOR)
    assert program.trace_seconds > 0
    assert program.compile_seconds > 0


def test_shapes_suffice_to_compile():
    like = jax.ShapeDtypeStruct((SIZE,), float)
    program = hg.cost.compile_program(jnp.vdot, like, like)
    assert program(VECTOR, VECTOR) == SIZE


NUM_OUTER_STEPS = 7
UNROLLED = hg.Unrolled(hg.Descent(optax.sgd(0.1), 10))


def minimize(problem, w, alpha, key):
    return hg.minimize(
        problem, UNROLLED, optax.sgd(0.1), w, alpha, num_steps=NUM_OUTER_STEPS, key=key
    )


@pytest.fixture(scope="module")
def run():
    """Returns the program of a whole run and its arguments."""
    key = jax.random.key(0)
    X = jax.random.normal(key, (50, 20))
    mse = lambda w, alpha, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    inner = lambda w, alpha, batch: mse(w, alpha, batch) + jnp.exp(alpha) * w @ w
    problem = hg.Bilevel(inner, mse, (X, X[:, 0]), (X, X[:, 1]))
    args = problem, jnp.zeros(20), jnp.zeros(()), key
    return hg.cost.compile_program(minimize, *args), args


def test_a_whole_run_can_be_compiled(run):
    """The data are arguments, and the loop over outer steps has an unknown length."""
    program, args = run
    np.testing.assert_allclose(program(*args).value, minimize(*args).value, rtol=1e-12)
    assert program.memory.arguments >= 8 * (2 * 50 * 20 + 2 * 50)
    (loop,) = program.flops.loops
    assert program.flops.total(3) - program.flops.fixed == 3 * loop.flops
    estimate_fn = hg.hypergradient(args[0], UNROLLED)
    step_flops = hg.cost.flops(estimate_fn, *args[1:3]).total()
    assert loop.flops == pytest.approx(step_flops, rel=0.05)
    assert loop.location in repr(program)


def test_a_program_rejects_other_static_arguments_and_shapes(run):
    program, (problem, w, alpha, key) = run
    other = hg.Bilevel(
        problem.outer_loss, problem.outer_loss, problem.inner_data, problem.outer_data
    )
    with pytest.raises(ValueError, match="args"):
        program(other, w, alpha, key)
    with pytest.raises(TypeError):
        program(problem, jnp.zeros(21), alpha, key)


def test_memory_of_a_program_of_equinox_is_measured():
    """Its outputs contain a few bytes more."""
    function = lambda A, x: A @ x
    expected = hg.cost.memory(function, MATRIX, VECTOR)
    memory = hg.cost.memory(eqx.filter_jit(function), MATRIX, VECTOR)
    assert memory.arguments == expected.arguments
    assert expected.outputs <= memory.outputs <= expected.outputs + 100
