"""Trials in batches, by any executor: the trace of one process, to the bit."""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.runtime import executors
from hypergrad.spaces import Choice, Interval, Unit

pytest.importorskip("flatbuffers")

KEY = jax.random.key(0)
BEST = jnp.array([0.3, 0.8])
SPACE = Unit(shape=(2,))
DATA = jnp.linspace(-1.0, 1.0, 24).reshape(12, 2)


def outer(w, alpha, batch):
    return jnp.sum((w - 2 * BEST) ** 2) + 0.1 * jnp.sum(alpha)


def descends():
    """No other process could import it: lambdas, a closure; batches are drawn."""
    factor = jnp.array(0.1)

    def inner(w, alpha, batch):
        x, key = batch
        noise = 0.01 * jax.random.normal(key)
        fit = jnp.mean((x @ w - x @ alpha) ** 2) + noise * jnp.sum(w)
        return fit + factor * jnp.sum(w**2)

    batches = hg.Batches(DATA, 3, with_key=True)
    return hg.Bilevel(inner, outer, batches, DATA), hg.Descent(optax.adam(0.1), 7)


def quick():
    """Known in closed form: w = 2 alpha, 4/3 gradient-equivalents a trial."""
    inner = lambda w, alpha, batch: jnp.sum((w - 2 * alpha) ** 2)
    return hg.Bilevel(inner, outer), hg.ClosedForm(lambda alpha, batch: 2 * alpha)


def search(problem=quick, searcher=None, w=None, budget=16.1, **changes):
    problem, solver = problem()
    searcher = hg.searchers.Random() if searcher is None else searcher
    w = jnp.zeros(2) if w is None else w
    settings = {"space": SPACE, "budget": budget, "key": KEY} | changes
    return hg.search(problem, solver, searcher, w, **settings)


def recorded(**changes):
    """Trials as they come back from lines of strict JSON, and the trace."""
    lines = []
    write = lambda row: lines.append(json.dumps(row, allow_nan=False))
    trace = search(trial_callback=write, **changes)
    return [json.loads(line) for line in lines], trace


def same_bits(one, other):
    """Of two traces, dtypes included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def threads():
    """The quickest of the standard library's executors."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


class Backwards:
    """An executor of a user's own: the last of a batch is done first."""

    def __init__(self):
        self.going = []

    def submit(self, fn, /, *args):
        call = type("Call", (), {})()
        call.done = lambda: self.going[-1] is call
        call.result = lambda: self.going.remove(call) or fn(*args)
        self.going.append(call)
        return call


# Batches.

LEARNING = {
    "tpe": hg.searchers.TPE(3),
    "cmaes": hg.searchers.CMAES(population=4),
    "gaussian process": hg.searchers.GaussianProcess(num_initial=3),
}


@pytest.mark.parametrize("name", LEARNING)
def test_a_batch_is_asked_for_before_it_is_told(name: str):
    """By hand: three asks of one state, then three are told, in that order."""
    searcher = LEARNING[name]
    rows, trace = recorded(searcher=searcher, trials_per_batch=3)
    init_key, key = jax.random.split(KEY)
    state, values = searcher.init(SPACE, init_key), []
    for batch in range(4):
        asked = []
        for _ in range(3):
            key, ask_key, _ = jax.random.split(key, 3)
            alpha, state = searcher.ask(state, ask_key)
            asked.append(alpha)
        for i, alpha in enumerate(asked):
            row = rows[3 * batch + i]
            np.testing.assert_array_equal(row["alpha"][0], alpha)
            values.append(float(outer(2 * alpha, alpha, None)))
            np.testing.assert_allclose(row["value"], values[-1], rtol=1e-12)
            state = searcher.tell(state, alpha, row["value"])
    assert [row["trial"] for row in rows] == list(range(12))
    np.testing.assert_allclose(trace.value, values, rtol=1e-12)


@pytest.mark.parametrize(
    "searcher", [hg.searchers.Random(), hg.searchers.Sobol(), hg.searchers.Grid(3)]
)
def test_who_does_not_learn_makes_the_same_trials_in_batches(searcher):
    """To the bit; 4 divides neither 12 trials of the budget less 1 nor the grid's 9."""
    whole = search(searcher=searcher, budget=15.0)
    assert len(whole.value) == (9 if isinstance(searcher, hg.searchers.Grid) else 11)
    same_bits(search(searcher=searcher, budget=15.0, trials_per_batch=4), whole)


def test_a_batch_ends_with_its_generation():
    """A generation has no trial that its searcher was not told the one before of."""
    evosax = pytest.importorskip("evosax.algorithms")
    searcher = hg.searchers.EvolutionStrategy(evosax.SNES, 5)
    with jax.numpy_rank_promotion("allow"):  # evosax adds vectors to rows of them
        whole, trace = recorded(searcher=searcher)
        rows, in_batches = recorded(searcher=searcher, trials_per_batch=3)
        state = searcher.init(SPACE, KEY)
        for _ in range(5):
            _, state = searcher.ask(state, KEY)
        with pytest.raises(StopIteration):
            searcher.ask(state, KEY)
    assert rows == whole  # 5 = 3 + 2
    same_bits(in_batches, trace)


# Executors.

LOSS = quick()[0].inner_loss
CASES = {
    "formula": {},
    "descent": {"problem": descends, "budget": 17.0},
    "float32": {"problem": descends, "budget": 17.0, "w": jnp.zeros(2, jnp.float32)},
    "learning": {"searcher": hg.searchers.TPE(3)},
    "metrics": {"metrics": {"coin": lambda w, alpha, key: jax.random.normal(key)}},
    "several": {
        "problem": lambda: (hg.Bilevel(LOSS, (outer, outer)), hg.Newton()),
    },
    "mixed": {
        "problem": lambda: (
            hg.Bilevel(
                lambda w, alpha, batch: jnp.sum((w - alpha["rate"]) ** 2),
                lambda w, alpha, batch: jnp.sum(w) * (1 + alpha["kind"]),
            ),
            hg.Newton(),
        ),
        "space": {"rate": Interval(0.1, 1.0, log=True), "kind": Choice(3)},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_executor_makes_the_trace_of_one_process(name: str, threads):
    """Bit for bit, w of the best included, and the rows too where they are sorted."""
    number = lambda row: row["trial"]
    for kind in (threads, Backwards()):
        settings = CASES[name] | {"batch_size": 4}
        whole, trace = recorded(**settings)
        rows, by_executor = recorded(**settings, executor=kind)
        same_bits(by_executor, trace)
        assert sorted(rows, key=number) == whole
    assert rows != whole  # as they were done
    _, resumed = recorded(**settings, executor=threads, previous_trials=rows[:6])
    same_bits(resumed, trace)


def test_a_search_killed_within_a_batch_repeats_no_trial():
    """Whichever of a batch of four are there: the others are run, and no other."""
    whole, trace = recorded(trials_per_batch=4)
    for there in ([1], [3, 0], [0, 1, 2, 3], [2, 0, 1, 3, 6], [0, 1, 2, 3, 7, 5]):
        for kind in (None, Backwards()):
            known = [whole[i] for i in there]
            rest, resumed = recorded(
                trials_per_batch=4, previous_trials=known, executor=kind
            )
            assert {row["trial"] for row in rest} == set(range(12)) - set(there)
            assert len(rest) == 12 - len(there)
            same_bits(resumed, trace)
    for there, said in (
        (
            [0, 1, 2, 5],
            r"trials\[3\] was recorded .* number 5, but number 3 of a batch",
        ),
        ([0, 1, 1], r"trials\[2\] .* number 1, as was trials\[1\]; pass each"),
    ):
        with pytest.raises(ValueError, match=said):
            search(trials_per_batch=4, previous_trials=[whole[i] for i in there])
    for wrong in ("2", -1, None, 1.5):
        with pytest.raises(ValueError, match=r"trials\[0\] is no trial.*its number"):
            search(trials_per_batch=4, previous_trials=[whole[0] | {"trial": wrong}])
    old = [{k: x for k, x in row.items() if k != "trial"} for row in whole[:5]]
    same_bits(search(trials_per_batch=4, previous_trials=old), trace)


BATCHES = {"problem": descends, "budget": 17.0, "batch_size": 3}


def test_side_by_side_in_one_program():
    """The trials of one by one, but for rounding; each batch is one call."""
    settings = BATCHES
    whole, trace = recorded(**settings)
    rows, together = recorded(**settings, executor="vmap")
    assert len(rows) == len(whole) == 8  # of 7/4 + 1/3 each; the last batch has two
    for one, other in zip(rows, whole, strict=True):
        np.testing.assert_array_equal(one["alpha"][0], other["alpha"][0])
    for x, y in zip(*map(jax.tree.leaves, (together, trace)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-12, equal_nan=True)
    for other in ({}, {"executor": "vmap", "batch_size": 4}):  # their bits are others
        with pytest.raises(ValueError, match="was recorded with another"):
            search(**settings | other, previous_trials=rows[:3])


@pytest.mark.parametrize(
    "k", [5, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3, 8))]
)
def test_side_by_side_goes_on_to_the_same_bits(k: int):
    """After a batch, and within one."""
    rows, together = recorded(**BATCHES, executor="vmap")
    rest, resumed = recorded(**BATCHES, executor="vmap", previous_trials=rows[:k])
    assert rest == rows[k:]
    same_bits(resumed, together)


class Fails:
    """One whose calls number 2 and 5 come to nothing, in two ways."""

    def __init__(self, pool):
        self.pool, self.count = pool, 0

    def submit(self, fn, /, *args):
        self.count += 1
        if self.count == 6:
            raise OSError("no node is free")
        if self.count == 3:
            return self.pool.submit(int, "of node 7")
        return self.pool.submit(fn, *args)


def test_what_comes_to_nothing_is_named_and_nothing_is_lost(threads):
    """By number, alpha and error, once the others of its batch are recorded."""
    whole, trace = recorded(trials_per_batch=4)
    kept, executor = [], Fails(threads)
    run = lambda: search(
        trials_per_batch=4,
        executor=executor,
        trial_callback=kept.append,
        previous_trials=list(kept),
    )
    for index, error in ((2, "ValueError: invalid"), (4, "OSError: no node is free")):
        with pytest.raises(RuntimeError) as found:
            run()
        said = str(found.value)
        alpha = whole[index]["alpha"]
        assert f"number {index} at alpha {alpha} by {error}" in said
        assert "by previous_trials= the same search goes on" in said
        assert said.count("number ") == 1
    assert {row["trial"] for row in kept} == {0, 1, 2, 3, 5, 6, 7}
    same_bits(run(), trace)
    assert sorted(row["trial"] for row in kept) == list(range(12))
    with pytest.raises(RuntimeError, match="give trial_callback= to keep"):
        search(trials_per_batch=4, executor=Fails(threads))


def test_a_worker_unlike_the_search_is_refused(threads, monkeypatch):
    """Its bits would be others; both are named."""
    here = executors.place()
    monkeypatch.setattr(
        executors.Remote, "_submit",
        lambda self, inputs: threads.submit(
            executors.run, self.program, [], here | {"jax": "0.1"}, True
        ),
    )  # fmt: skip
    with pytest.raises(
        RuntimeError, match=r"this worker has jax .*, the search jax 0\.1"
    ):
        search(executor=threads)


def test_bad_settings_are_refused(threads, monkeypatch):
    """Before anything runs, with what to write."""
    for wrong in ("pmap", 4, Backwards.submit):
        with pytest.raises(TypeError, match=r"executor must be .*ProcessPoolExecutor"):
            search(executor=wrong)
    with pytest.raises(TypeError, match=r"executor is the class Backwards; write"):
        search(executor=Backwards)
    for wrong in (0, 1.5, True, None):
        with pytest.raises(ValueError, match="batch_size must be an integer"):
            search(trials_per_batch=wrong)
    for given in ({"executor": threads}, {"executor": "vmap"}, {"batch_size": 2}):
        with pytest.raises(ValueError, match="SuccessiveHalving trains its members"):
            search(descends, hg.searchers.SuccessiveHalving(4), **given)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="executor is for a search by one process"):
        search(executor=threads)


def test_without_flatbuffers_it_says_what_to_install(threads, monkeypatch):
    """At the first trial; the other two ways need nothing."""
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"hypergrad-jax\[executors\]"):
        search(executor=threads)
    assert len(search(executor="vmap", trials_per_batch=4).value) == 12


# True processes.


def spawned() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    )


class Dies:
    """A pool whose worker dies at the fourth call, having done three."""

    def __init__(self, pool):
        self.pool, self.count = pool, 0

    def submit(self, fn, /, *args):
        self.count += 1
        call = (os._exit, 1) if self.count == 4 else (fn, *args)
        return self.pool.submit(*call)


def test_a_pool_of_processes_makes_the_same_trace_and_may_lose_a_worker():
    """Losses that no process could import; the dead one's trials are named."""
    settings = {"problem": descends, "budget": 17.0, "batch_size": 5}
    whole, trace = recorded(**settings)
    kept = []
    with spawned() as pool:
        rows, by_pool = recorded(**settings, executor=pool)
        same_bits(by_pool, trace)
        assert sorted(rows, key=lambda row: row["trial"]) == whole
        with pytest.raises(RuntimeError) as found:
            search(**settings, executor=Dies(pool), trial_callback=kept.append)
    said = str(found.value)
    assert f"number 3 at alpha {whole[3]['alpha']} by BrokenProcessPool" in said
    assert "number 4 at alpha" in said  # which waited for the same worker
    assert sorted(row["trial"] for row in kept) == [0, 1, 2]
    same_bits(search(**settings, previous_trials=kept), trace)


KILLED = """
    import json, os, signal, sys

    import jax

    jax.config.update("jax_enable_x64", True)
    from tests.test_executors import descends, search, spawned

    def record(row):
        with open(sys.argv[1], "a") as file:
            file.write(json.dumps(row) + "\\n")
        if row["trial"] == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    with spawned() as pool:
        search(descends, budget=17.0, trials_per_batch=4, executor=pool, trial_callback=record)
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", [2, 5])
def test_a_search_that_is_killed_goes_on(last: int, tmp_path):
    """By SIGKILL, once a trial within a batch is recorded: none is lost or repeated."""
    settings = {"problem": descends, "budget": 17.0, "batch_size": 4}
    whole, trace = recorded(**settings)
    file = tmp_path / "trials.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(file), str(last)],
        start_new_session=True,
    )
    process.wait()
    os.killpg(process.pid, signal.SIGKILL)  # a pool outlives who made it
    assert process.returncode == -signal.SIGKILL
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == whole[: last + 1]
    rest, resumed = recorded(**settings, previous_trials=kept)
    assert rest == whole[last + 1 :]
    same_bits(resumed, trace)


@pytest.mark.slow
def test_submitit_runs_trials(tmp_path):
    """Its local executor: a process a trial, by files, as its clusters do."""
    submitit = pytest.importorskip("submitit")
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(timeout_min=5)
    settings = {"batch_size": 2, "budget": 5.0}
    same_bits(search(**settings, executor=executor), search(**settings))


@pytest.mark.slow
def test_the_script_of_the_page_runs(tmp_path):
    """Its pool makes the trials that one process makes; a second start makes none."""
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    script = page.split('```python title="search.py"\n')[1].split("```")[0]
    (tmp_path / "search.py").write_text(script)
    run = lambda: subprocess.run(
        [sys.executable, "search.py"], cwd=tmp_path, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    first = run()
    assert first.returncode == 0, first.stderr
    assert first.stdout.split()[0] == "9"  # of 500 1/3, in whole batches but the last
    rows = (tmp_path / "trials.jsonl").read_text()
    again = run()
    assert again.stdout == first.stdout
    assert (tmp_path / "trials.jsonl").read_text() == rows
