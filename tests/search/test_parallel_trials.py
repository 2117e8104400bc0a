"""Batches of trials on any executor: the trace of one process, to the bit."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.inner import inner_stats
from hypergrad.runtime import executors
from hypergrad.spaces import Choice, Interval
from tests.search.problems import (
    BEST,
    KEY,
    REGRESSION,
    SPACE,
    record,
    search,
)

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def threads():
    """The fastest executor of the standard library."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


class ReverseExecutor:
    """A user's own executor, which completes the last call of a batch first."""

    def __init__(self):
        self.pending = []

    def submit(self, fn, /, *args):
        future = type("Future", (), {})()
        future.done = lambda: self.pending[-1] is future
        future.result = lambda: self.pending.remove(future) or fn(*args)
        self.pending.append(future)
        return future


# Batches.


@pytest.mark.parametrize("name", ["TPE", "CMAES"])
def test_batch_is_proposed_before_its_values_are_told(name):
    """By hand: three proposals from one state, then three values in that order."""
    searcher = getattr(hg.searchers, name)()
    trials, trace = record(searcher=searcher, parallel=hg.Parallel(3))
    init_key, key = jax.random.split(KEY)
    state = searcher.init(SPACE, init_key)
    for start in range(0, 12, 3):
        alphas = []
        for _ in range(3):
            key, ask_key, _ = jax.random.split(key, 3)
            alpha, state = searcher.ask(state, ask_key)
            alphas.append(alpha)
        for trial, alpha in zip(trials[start : start + 3], alphas, strict=True):
            np.testing.assert_array_equal(trial["alpha"][0], alpha)
            state = searcher.tell(state, alpha, trial["value"])
    assert [trial["trial"] for trial in trials] == list(range(12))
    alphas = np.array([trial["alpha"][0] for trial in trials])
    expected = np.sum((2 * alphas - 2 * BEST[None]) ** 2, axis=1)
    np.testing.assert_allclose(trace.value, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["Random", "Sobol", "Grid"])
def test_non_adaptive_searchers_propose_the_same_trials_for_any_batch_size(name):
    """Batches of 4 divide neither the 11 trials of the budget nor the 9 of the grid."""
    searcher = getattr(hg.searchers, name)(*[3] * (name == "Grid"))
    trace = search(searcher=searcher, budget=15.0)
    assert len(trace.value) == (9 if name == "Grid" else 11)
    in_batches = search(searcher=searcher, budget=15.0, parallel=hg.Parallel(4))
    chex.assert_trees_all_equal(in_batches, trace, strict=True)


def test_batch_ends_with_its_generation():
    """Batches of 3 divide a generation of 5 into 3 and 2."""
    evosax = pytest.importorskip("evosax.algorithms")
    searcher = hg.searchers.EvolutionStrategy(evosax.SNES, 5)
    with jax.numpy_rank_promotion("allow"):  # evosax adds vectors to rows
        trials, trace = record(searcher=searcher)
        in_batches, batch_trace = record(searcher=searcher, parallel=hg.Parallel(3))
    assert in_batches == trials
    chex.assert_trees_all_equal(batch_trace, trace, strict=True)


def test_search_killed_within_a_batch_repeats_no_trial():
    """Whichever trials of a batch of four are recorded, only the others are run."""
    parallel = hg.Parallel(4)
    trials, trace = record(parallel=parallel)
    for numbers in ([1], [3, 0], [2, 0, 1, 3, 6]):
        for executor in (None, ReverseExecutor()):
            new_trials, resumed = record(
                parallel=hg.Parallel(4, executor),
                previous_trials=[trials[number] for number in numbers],
            )
            new_numbers = sorted(trial["trial"] for trial in new_trials)
            assert new_numbers == sorted(set(range(12)) - set(numbers))
            chex.assert_trees_all_equal(resumed, trace, strict=True)
    with pytest.raises(ValueError, match="trial 3"):  # of a batch before trial 5
        search(parallel=parallel, previous_trials=[trials[i] for i in (0, 1, 2, 5)])


def test_tpe_is_told_values_in_any_order():
    """The pending proposal of a value is the one at its alpha."""
    searcher, alphas = hg.searchers.TPE(2), []
    state = searcher.init(SPACE, KEY)
    for key in jax.random.split(KEY, 3):
        alpha, state = searcher.ask(state, key)
        alphas.append(alpha)
    state = searcher.tell(state, alphas[1], 0.5)
    expected = [hg.spaces.to_unit(SPACE, alphas[i]) for i in (0, 2)]
    np.testing.assert_allclose(state.pending_t, expected, rtol=1e-6)
    # An alpha that was not proposed leaves no proposal pending forever.
    for alpha in (alphas[0], alphas[2], alphas[2]):
        state = searcher.tell(state, alpha, 0.5)
    assert len(state.pending_t) == 0


class VaryingSteps(eqx.Module):
    """A user's own solver whose number of steps depends on ``alpha``."""

    differentiable = False

    def solve(self, inner_loss, w, alpha, data, key):
        num_steps = 1 + jnp.floor(5 * alpha[0])
        return 2 * alpha, inner_stats(num_steps, num_grads=num_steps)


@pytest.mark.parametrize("budget", [15.0, 21.0, 30.0, 44.0])
@pytest.mark.parametrize("name", ["Random", "TPE"])
def test_search_in_batches_continues_with_a_larger_budget(name, budget):
    """Also if a trial costs less than the one before it, which cut off a batch."""
    searcher = getattr(hg.searchers, name)(*[3] * (name == "TPE"))
    options = {"searcher": searcher, "solver": VaryingSteps()}
    run = lambda budget, **more: record(
        **options, parallel=hg.Parallel(4), budget=budget, **more
    )
    trials, _ = run(budget)
    expected_trials, expected = run(60.0)
    assert len(trials) < len(expected_trials)
    new_trials, resumed = run(60.0, previous_trials=trials)
    assert trials + new_trials == expected_trials
    chex.assert_trees_all_equal(resumed, expected, strict=True)


# Executors.

CHOICES = hg.Bilevel(
    lambda w, alpha, batch: jnp.sum((w - alpha["rate"]) ** 2),
    lambda w, alpha, batch: jnp.sum(w) * (1 + alpha["kind"]),
)
CASES = {
    "batches, keys and float32": REGRESSION | {"w": jnp.zeros(2, jnp.float32)},
    # Unlike normal numbers, uniform ones have the same bits in a batch of trials.
    "TPE and metrics": {
        "searcher": hg.searchers.TPE(3),
        "metrics": {"random": lambda w, alpha, key: jax.random.uniform(key)},
    },
    "choices": {
        "problem": CHOICES,
        "solver": hg.Newton(),
        "space": {"rate": Interval(0.1, 1.0, log=True), "kind": Choice(3)},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_executor_makes_the_trace_of_one_process(name, threads):
    """Trials are recorded in the order in which they end."""
    options, number = CASES[name], lambda trial: trial["trial"]
    trials, trace = record(**options, parallel=hg.Parallel(4))
    for executor in (threads, ReverseExecutor()):
        parallel = hg.Parallel(4, executor)
        remote_trials, remote_trace = record(**options, parallel=parallel)
        chex.assert_trees_all_equal(remote_trace, trace, strict=True)
        assert sorted(remote_trials, key=number) == trials
    assert remote_trials != trials
    previous = remote_trials[:6]
    resumed = search(**options, parallel=parallel, previous_trials=previous)
    chex.assert_trees_all_equal(resumed, trace, strict=True)


def test_vmap_makes_the_trace_of_one_process_up_to_rounding():
    """Its bits differ, so its trials serve no other executor or batch size."""
    trials, trace = record(**REGRESSION)
    parallel = hg.Parallel(3, "vmap")
    vmap_trials, vmap_trace = record(**REGRESSION, parallel=parallel)
    alphas = lambda trials: [trial["alpha"] for trial in trials]
    assert len(trials) == 8
    assert alphas(vmap_trials) == alphas(trials)
    chex.assert_trees_all_close(vmap_trace, trace, rtol=1e-12)
    for other in (hg.Parallel(3), hg.Parallel(4, "vmap")):
        with pytest.raises(ValueError, match=r"previous_trials\[0\]"):
            search(**REGRESSION, parallel=other, previous_trials=vmap_trials[:3])
    # Resumed within a batch, to the bit.
    previous = vmap_trials[:5]
    new_trials, resumed = record(
        **REGRESSION, parallel=parallel, previous_trials=previous
    )
    assert new_trials == vmap_trials[5:]
    chex.assert_trees_all_equal(resumed, vmap_trace, strict=True)


class FailingExecutor:
    """Fails at the third call, in the call, and at the sixth, when it is submitted."""

    def __init__(self, pool):
        self.pool, self.num_calls = pool, 0

    def submit(self, fn, /, *args):
        self.num_calls += 1
        if self.num_calls == 6:
            raise OSError("no node is free")
        if self.num_calls == 3:
            return self.pool.submit(int, "of node 7")
        return self.pool.submit(fn, *args)


def test_failed_trials_are_named_and_all_others_are_recorded(threads):
    """Another search with what was recorded makes the same trace."""
    trials, trace = record(parallel=hg.Parallel(4))
    recorded, parallel = [], hg.Parallel(4, FailingExecutor(threads))
    run = lambda: search(
        parallel=parallel,
        trial_callback=recorded.append,
        previous_trials=list(recorded),
    )
    for number, error in ((2, "ValueError: invalid"), (4, "OSError: no node is free")):
        with pytest.raises(RuntimeError, match=f"trial {number} .*{error}") as caught:
            run()
        assert str(trials[number]["alpha"]) in str(caught.value)
        assert str(caught.value).count(" at alpha ") == 1
    assert {trial["trial"] for trial in recorded} == {0, 1, 2, 3, 5, 6, 7}
    chex.assert_trees_all_equal(run(), trace, strict=True)
    assert sorted(trial["trial"] for trial in recorded) == list(range(12))


def test_worker_in_another_environment_is_refused(threads):
    """Its results could differ in their last bits."""
    environment = executors.runtime_environment()

    class OtherEnvironment:
        def submit(self, fn, program, arrays, expected, enable_x64):
            other = environment | {"jax": "0.1"}
            return threads.submit(fn, program, arrays, other, enable_x64)

    with pytest.raises(RuntimeError, match=r"workers must have jax 0\.1"):
        search(parallel=hg.Parallel(1, OtherEnvironment()))


def test_executor_needs_flatbuffers(threads, monkeypatch):
    """The other ways to run a batch do not."""
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match="flatbuffers"):
        search(parallel=hg.Parallel(1, threads))
    assert len(search(parallel=hg.Parallel(4, "vmap")).value) == 12


def test_a_loss_that_calls_the_host_is_no_program_for_an_executor(threads):
    def inner(w, alpha, batch):
        shape = jax.ShapeDtypeStruct((), float)
        return jax.pure_callback(lambda x: x, shape, w - w, vmap_method="sequential")

    problem = hg.Bilevel(lambda w, alpha, batch: (w - alpha) ** 2, inner)
    make = lambda **options: hg.search(
        problem, hg.Newton(), hg.searchers.Sobol(), 0.0,
        space=hg.spaces.Unit(), budget=20, **options,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"call functions on the host.*'vmap'"):
        make(parallel=hg.Parallel(2, threads))
    for options in ({}, {"parallel": hg.Parallel(2, "vmap")}):
        assert len(make(**options).value) > 1


# Arguments that are refused; `tests/reliability/test_fuzz.py` has further ones.


@pytest.mark.parametrize("executor", [ReverseExecutor.submit, ReverseExecutor])
def test_executor_must_have_submit(executor):
    with pytest.raises(TypeError, match="executor"):
        hg.Parallel(2, executor)


def test_parallel_is_refused_where_it_cannot_be_used(threads, monkeypatch):
    """By populations, and with an executor in a search of several processes."""
    halving = hg.searchers.SuccessiveHalving(4)
    with pytest.raises(ValueError, match="parallel"):
        search(**REGRESSION, searcher=halving, parallel=hg.Parallel(2))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="parallel"):
        search(parallel=hg.Parallel(2, threads))


# Other processes.


def make_process_pool() -> concurrent.futures.ProcessPoolExecutor:
    """Returns a pool of one new process."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context)


class DyingPool:
    """A pool whose worker dies at the fourth call."""

    def __init__(self, pool):
        self.pool, self.num_calls = pool, 0

    def submit(self, fn, /, *args):
        self.num_calls += 1
        call = (os._exit, 1) if self.num_calls == 4 else (fn, *args)
        return self.pool.submit(*call)


def test_pool_of_processes_makes_the_same_trace_and_may_lose_a_worker():
    """The losses cannot be imported; the trials of the dead worker are named."""
    trials, trace = record(**REGRESSION, parallel=hg.Parallel(5))
    recorded = []
    with make_process_pool() as pool:
        pool_trials, pool_trace = record(**REGRESSION, parallel=hg.Parallel(5, pool))
        chex.assert_trees_all_equal(pool_trace, trace, strict=True)
        assert sorted(pool_trials, key=lambda trial: trial["trial"]) == trials
        with pytest.raises(
            RuntimeError, match=r"trial 3 .*BrokenProcessPool.*trial 4 "
        ):
            search(
                **REGRESSION, parallel=hg.Parallel(5, DyingPool(pool)),
                trial_callback=recorded.append,
            )  # fmt: skip
    assert sorted(trial["trial"] for trial in recorded) == [0, 1, 2]
    resumed = search(**REGRESSION, parallel=hg.Parallel(5), previous_trials=recorded)
    chex.assert_trees_all_equal(resumed, trace, strict=True)


@pytest.mark.slow
def test_submitit_runs_trials(tmp_path):
    """The local executor of submitit starts a process per trial, as on a cluster."""
    submitit = pytest.importorskip("submitit")
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(timeout_min=5)
    trace = search(budget=5.0, parallel=hg.Parallel(2))
    remote_trace = search(budget=5.0, parallel=hg.Parallel(2, executor))
    chex.assert_trees_all_equal(remote_trace, trace, strict=True)


@pytest.mark.page
@pytest.mark.slow
def test_script_of_the_documentation_runs(tmp_path):
    """A second start makes no trial; a third repeats one whose line was cut off."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    script = page.split('```python title="search.py"\n')[1].split("```")[0]
    (tmp_path / "search.py").write_text(script)
    run = lambda: subprocess.run(
        [sys.executable, "search.py"], cwd=tmp_path, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    first = run()
    assert first.returncode == 0, first.stderr
    assert first.stdout.split()[0] == "9"
    trials = (tmp_path / "trials.jsonl").read_text()
    assert run().stdout == first.stdout
    assert (tmp_path / "trials.jsonl").read_text() == trials
    (tmp_path / "trials.jsonl").write_text(trials[:-9])
    assert run().stdout == first.stdout
    assert (tmp_path / "trials.jsonl").read_text() == trials
