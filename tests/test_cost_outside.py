"""Bytes against arrays of known size; energy against arithmetic with units."""

import sys
import time
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.cost.memory import resident_bytes

# Memory.

N, STEPS = 100, 1000


def run(A, x):
    """x <- tanh(A x), whose reverse pass needs every tanh."""
    step = lambda x, _: (jnp.tanh(A @ x), None)
    return jnp.sum(jax.lax.scan(step, x, length=STEPS)[0])


def test_arguments_and_outputs_are_their_sizes():
    """In float64: 8 bytes a number."""
    found = hg.cost.memory(lambda A, x: A @ x, jnp.eye(N), jnp.ones(N))
    assert (found.arguments, found.outputs) == (8 * (N * N + N), 8 * N)
    assert found.peak == found.arguments + found.outputs + found.temporaries


def test_what_a_reverse_pass_stores_is_seen():
    """A number a step and unit at least; not without a derivative."""
    args = jnp.eye(N), jnp.ones(N)
    stored = 8 * STEPS * N
    assert stored <= hg.cost.memory(jax.grad(run), *args).temporaries < 4 * stored
    assert hg.cost.memory(run, *args).temporaries < 0.1 * stored


def test_checkpoints_need_less():
    """Of an unrolled network: 2 sqrt(T) carries instead of T."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((jnp.tanh(w) - jnp.exp(alpha)) ** 2)
    outer = lambda w, alpha, batch: jnp.sum(w**2)
    solver = hg.Descent(optax.sgd(0.1), STEPS)
    peak = lambda checkpoint: (
        hg.cost.memory(
            hg.hypergradient(
                hg.Bilevel(inner, outer), hg.Unrolled(solver, checkpoint=checkpoint)
            ),
            *(jnp.zeros(N), jnp.zeros(N)),
        ).peak
    )
    assert peak(False) > 8 * STEPS * N
    assert peak(True) < 0.5 * peak(False)


def test_a_donated_argument_is_not_held_twice():
    """The output takes its place; the settings of jit are kept."""
    step = lambda x: x + 1.0
    x = jax.ShapeDtypeStruct((N,), float)
    assert hg.cost.memory(step, x).peak == 2 * 8 * N
    assert hg.cost.memory(jax.jit(step, donate_argnums=0), x).peak == 8 * N


def test_a_backend_that_tells_no_memory_is_an_error():
    """Rather than zeros."""
    silent = types.SimpleNamespace(memory_analysis=lambda: None)
    lowered = types.SimpleNamespace(compile=lambda: silent)
    with pytest.raises(RuntimeError, match="tells no memory"):
        hg.cost.memory(types.SimpleNamespace(lower=lambda *_: lowered))


# Energy.


@pytest.mark.skipif(resident_bytes() is None, reason="a system that cannot tell")
def test_resident_memory_rises_by_what_is_filled_and_falls_again():
    """Linux adds up to 64 pages a thread late, a megabyte or two: 5% of 256 MB."""
    before = resident_bytes()
    block = np.ones(2**25)
    assert resident_bytes() - before == pytest.approx(block.nbytes, rel=0.05)
    size = block.nbytes
    del block
    assert resident_bytes() - before < 0.05 * size


def test_energy_is_power_times_time():
    """A kilowatt for an hour is a kilowatt-hour; a watt for a second, 1 / 3.6e6."""
    assert hg.cost.energy(3600, watts=1000, grams_per_kwh=450) == (1, 450)
    kwh, grams = hg.cost.energy(1, watts=1, grams_per_kwh=3.6e6)
    assert (kwh, grams) == pytest.approx((1 / 3.6e6, 1))


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_block_spends_the_stated_power_over_its_seconds(monkeypatch):
    """Where there is no tracker."""
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with hg.cost.measure(watts=100.0, grams_per_kwh=300.0) as spent:
        assert spent.seconds != spent.seconds
        spin(0.05)
    assert 0.05 <= spent.seconds < 60
    expected = hg.cost.energy(spent.seconds, watts=100.0, grams_per_kwh=300.0)
    assert (spent.kwh, spent.grams) == pytest.approx(expected)
    assert spent.source == "stated"


class Tracker:
    """Stands in for codecarbon's."""

    def __init__(self, **settings):
        self.running = False

    def start(self):
        self.running = True

    def stop(self):
        if self.running:
            self.final_emissions_data = types.SimpleNamespace(energy_consumed=0.25)


class Failing(Tracker):
    """Raises nothing, as codecarbon's."""

    def start(self):
        pass


def with_tracker(monkeypatch, tracker: type) -> None:
    module = types.ModuleType("codecarbon")
    module.__spec__ = ModuleSpec("codecarbon", None)
    module.OfflineEmissionsTracker = tracker
    monkeypatch.setitem(sys.modules, "codecarbon", module)


def test_a_tracker_that_fails_leaves_the_stated_power(monkeypatch):
    """And the source says so."""
    with_tracker(monkeypatch, Failing)
    with hg.cost.measure(watts=3.6e6, grams_per_kwh=300.0) as spent:
        pass
    assert spent.kwh == pytest.approx(spent.seconds)
    assert spent.source == "stated"


def test_a_tracker_is_asked_where_there_is_one(monkeypatch):
    """And stopped where the block raises."""
    with_tracker(monkeypatch, Tracker)
    kept = []

    def failing():
        with hg.cost.measure(watts=100.0, grams_per_kwh=300.0) as spent:
            kept.append(spent)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    (spent,) = kept
    assert (spent.kwh, spent.grams, spent.source) == (0.25, 75.0, "codecarbon")
    assert spent.seconds > 0


@pytest.mark.skipif(find_spec("codecarbon") is None, reason="needs codecarbon")
def test_codecarbon_itself_tracks_a_block():
    """A machine at work draws between 1 W and 10 kW."""
    with hg.cost.measure(watts=0.0, grams_per_kwh=300.0) as spent:
        spin(2.0)
    assert spent.source == "codecarbon"
    assert 1 < 3.6e6 * spent.kwh / spent.seconds < 1e4
    assert spent.grams == pytest.approx(300 * spent.kwh)
