"""Runs that continue on another machine issue a warning that names the difference."""

import concurrent.futures
import dataclasses
import json
import os
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import spaces
from hypergrad.runtime import executors, machine
from hypergrad.runtime.machine import describe_machine, parse_processors
from tests.loops import TO_ONE
from tests.processes import run_python
from tests.search.populations import search as search_population
from tests.search.problems import record, search

OTHER = {"processor": "model name Other", "vector instructions": "avx fma"}


@pytest.fixture
def other_machine(monkeypatch):
    """Returns a function that moves the process to another machine."""
    return lambda: monkeypatch.setattr(machine, "_describe_processor", lambda: OTHER)


def warns(subject: str):
    """Expects a warning that names both processors."""
    here = re.escape(OTHER["processor"])
    there = re.escape(describe_machine()["processor"])
    return pytest.warns(UserWarning, match=f"{subject}.*{there} there, {here} here")


LOOP = hg.OuterLoop(TO_ONE, hg.Implicit(hg.Newton()), optax.sgd(0.1))


def run_loop(folder, num_steps: int) -> hg.Trace:
    checkpoints = hg.Checkpoints(folder)
    state = LOOP.init(0.0, 3.0)
    return LOOP.run(state, num_steps=num_steps, checkpoints=checkpoints)


def test_a_run_that_continues_on_another_machine_says_so(tmp_path):
    """Also when it returns to the first machine, because steps of the other remain."""
    run_loop(tmp_path, 1)
    run_loop(tmp_path, 2)  # no warning on the same machine
    there = describe_machine()
    expected = warns("the checkpoints in .* were made on another machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_describe_processor", lambda: OTHER)
        with expected:
            run_loop(tmp_path, 3)
    assert describe_machine() == there
    with pytest.warns(UserWarning, match="model name Other there"):
        run_loop(tmp_path, 4)


def test_another_machine_may_round_the_coordinates_of_the_start(tmp_path, monkeypatch):
    """On the same machine other coordinates are another run."""
    space = hg.spaces.Interval(1e-4, 5.0, log=True)
    loop = dataclasses.replace(LOOP, space=space)

    def run(num_steps):
        checkpoints = hg.Checkpoints(tmp_path)
        return loop.run(
            loop.init(0.0, 3.0), num_steps=num_steps, checkpoints=checkpoints
        )

    run(1)
    inverse = spaces.inverse
    round_up = lambda space, alpha: jnp.nextafter(inverse(space, alpha), jnp.inf)
    monkeypatch.setattr(spaces, "inverse", round_up)
    jax.clear_caches()
    with pytest.raises(ValueError, match="initial state differs"):
        run(2)
    monkeypatch.setattr(machine, "_describe_processor", lambda: OTHER)
    with pytest.warns(UserWarning, match="made on another machine"):
        assert len(run(2).value) == 2


class Adaptive:
    """A searcher whose later proposals depend on rounding."""

    def __init__(self, shift):
        self.shift = shift

    def init(self, space, key):
        return 0

    def ask(self, num_told, key):
        return jnp.asarray(0.5 + self.shift * num_told), num_told

    def tell(self, num_told, alpha, value):
        return num_told + 1


def test_later_proposals_may_depend_on_the_machine(other_machine):
    """Recorded trials have the alphas that they were made with."""
    trials = []
    run = lambda shift, **options: hg.search(
        TO_ONE, hg.Descent(optax.sgd(0.1), 5), Adaptive(shift), 0.0,
        space=hg.spaces.Unit(), budget=16.0, **options,
    )  # fmt: skip
    trace = run(0.1, trial_callback=trials.append)
    with pytest.raises(ValueError, match=r"previous_trials\[1\] must have the alpha"):
        run(0.2, previous_trials=trials)
    other_machine()
    with pytest.warns(UserWarning, match="recorded on another machine"):
        chex.assert_trees_all_equal(run(0.2, previous_trials=trials), trace)


def test_a_search_that_continues_on_another_machine_says_so(other_machine):
    trials, trace = record()
    chex.assert_trees_all_equal(search(previous_trials=trials), trace)  # no warning
    expected = warns("previous_trials were recorded on another machine")
    other_machine()
    with expected:
        chex.assert_trees_all_equal(search(previous_trials=trials), trace)


def test_a_population_that_continues_on_another_machine_says_so(other_machine):
    rounds, searcher = [], hg.searchers.PopulationBasedTraining(4)
    search_population(searcher, trial_callback=rounds.append)
    expected = warns(r"previous_trials\[-1\] was recorded on another machine")
    other_machine()
    with expected:
        search_population(searcher, previous_trials=rounds)


def test_a_worker_on_another_machine_is_named_once(monkeypatch):
    pytest.importorskip("flatbuffers")
    run_here = executors.run_program
    monkeypatch.setattr(
        executors, "run_program", lambda *args: (OTHER, run_here(*args)[1])
    )
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        pytest.warns(UserWarning, match="a worker runs on another") as caught,
    ):
        search(parallel=hg.Parallel(2, pool))
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["jax", "device"])
def test_trials_of_another_jax_or_kind_of_device_are_refused(name, monkeypatch):
    trials, _ = record(budget=1.0)
    environment = executors.runtime_environment() | {name: "something else"}
    for module in ("trials.records", "trials.rounds"):
        monkeypatch.setattr(
            f"hypergrad.{module}.runtime_environment", lambda: environment
        )
    with pytest.raises(ValueError, match=r"previous_trials\[0\]"):
        search(previous_trials=trials)


PROCESSORS = {
    "x86": (
        "processor\t: 0\nmodel name\t: AMD EPYC\ncpu family\t: 25\n"
        "flags\t\t: fpu smep sse2 avx512f fma avx\n\nprocessor\t: 1\nmodel name : B\n",
        "model name AMD EPYC, cpu family 25",
        "avx avx512f fma sse2",
    ),
    "Arm": (
        "processor\t: 0\nFeatures\t: fp asimd sve sme\nCPU implementer\t: 0x41\n"
        "CPU part\t: 0xd40\n",
        "CPU implementer 0x41, CPU part 0xd40",
        "asimd sme sve",
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_and_vector_instructions_are_read(name):
    text, processor, flags = PROCESSORS[name]
    expected = {"processor": processor, "vector instructions": flags}
    assert parse_processors(text) == expected


def test_a_device_that_is_no_cpu_has_the_version_of_its_driver(monkeypatch):
    client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 12090")
    device = types.SimpleNamespace(platform="gpu", client=client)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert describe_machine() == {"driver": "PJRT C API cuda 12090"}


CORES = """
    import json, os
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from hypergrad.runtime.machine import describe_machine
    print(json.dumps(describe_machine()))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_cores_are_those_that_the_process_may_use():
    """The system may let it use one alone."""
    output = run_python(CORES, env={"JAX_PLATFORMS": "cpu"}).stdout
    assert json.loads(output)["cores"] == "1"


def test_another_number_of_cores_is_another_machine(tmp_path, monkeypatch):
    """Results of matrix products depend on it."""
    run_loop(tmp_path, 1)
    here = describe_machine()
    monkeypatch.setattr(machine, "_describe_processor", lambda: here | {"cores": "99"})
    with pytest.warns(UserWarning, match=f"cores: {here['cores']} there, 99 here"):
        run_loop(tmp_path, 2)


def test_checkpoints_without_a_number_of_cores_are_read(tmp_path, monkeypatch):
    """Older versions recorded none."""
    older = {name: x for name, x in describe_machine().items() if name != "cores"}
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_describe_processor", lambda: older)
        run_loop(tmp_path, 1)
    with pytest.warns(UserWarning, match="cores: unknown there"):
        assert len(run_loop(tmp_path, 2).value) == 2


def test_an_unknown_system_has_a_processor():
    assert parse_processors("")["processor"]


def test_the_difference_is_named():
    """Only instructions that one of the two lacks, and no control characters."""
    saved = {"processor": "A\x1b[31m", "vector instructions": "avx avx512f fma"}
    difference = machine._describe_difference(saved, OTHER)
    assert difference == (
        r"processor: A\x1b[31m there, model name Other here, "
        "vector instructions only there: avx512f"
    )
    assert machine._describe_difference(None, OTHER) == "which was not recorded"


def test_models_and_rows_name_their_machine(tmp_path):
    model = hg.models.save("m", np.ones(2), np.ones(1), folder=tmp_path)
    assert model.record["versions"]["machine"] == describe_machine()
    assert jax.devices()[0].platform != "cpu" or "processor" in describe_machine()
