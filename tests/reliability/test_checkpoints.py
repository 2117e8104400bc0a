"""Checkpoints: whatever interrupts a run, it ends with the bits of an unbroken run."""

import errno
import fcntl
import functools
import itertools
import os
import shutil
import signal
import subprocess
import threading
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import checkpoint
from hypergrad.checkpoint import CheckpointFolder
from hypergrad.cost.memory import resident_bytes
from hypergrad.outer_loop import fingerprint as outer_fingerprint
from hypergrad.outer_loop import limits as outer_limits
from hypergrad.outer_loop import run as outer_run
from hypergrad.runtime.interrupts import deferred_interrupt
from hypergrad.runtime.machine import runtime_environment
from tests.loops import TO_ZERO, ExactEstimator, assert_same_bits, run_loop
from tests.processes import run_python, start_python
from tests.reliability.checkpoint_cases import Killed, steps_in

NUM_STEPS = 6


# A run whose state has leaves of many kinds: half precision, None, keys in the state of
# the optimizer, counters, and a multiplier of the aggregator.

DATA = np.linspace(0.0, 1.0, 30).reshape(10, 3)
ALPHA = jnp.linspace(0.5, 1.5, 3)
MIXED = {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.ones((), jnp.float32), "none": None}


def inner_loss(w, alpha, batch):
    total = jnp.sum((w["a"].astype(float) - jnp.mean(batch, 0)) ** 2) + w["b"] ** 2
    return 0.5 * total + jnp.sum(alpha * w["a"].astype(float))


def outer_loss(w, alpha, batch):
    return jnp.sum((w["a"].astype(float) - 1) ** 2) + 0.1 * jnp.sum(alpha**2)


def make_estimator(cost=3.0, shift=0.0, dtype=jnp.float32):
    def solve(alpha, data):
        data = data.data if isinstance(data, hg.Batches) else data
        a = (jnp.mean(data, 0) - alpha + shift).astype(jnp.bfloat16)
        return {"a": a, "b": jnp.zeros((), dtype), "none": None}

    return ExactEstimator(solve, cost, np.ones(20, bool), noise=0.1)


METRICS = {"a": lambda w, alpha, key: jnp.sum(alpha) + jax.random.normal(key)}
NOISY = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(0.1))
PROBLEM = hg.Bilevel(inner_loss, (outer_loss, outer_loss), DATA, DATA)
SETTINGS = {
    "problem": PROBLEM,
    "estimator": make_estimator(),
    "optimizer": NOISY,
    "w": MIXED,
    "alpha": ALPHA,
    "key": jax.random.key(1),
    "aggregator": hg.objectives.AugmentedLagrangian(limits=1.0),
    "metrics": METRICS,
    "eval_every": 2,
    "record_alphas": True,
}


def run(**changes) -> hg.Trace:
    return run_loop(**{"num_steps": NUM_STEPS} | SETTINGS | changes)


@functools.cache
def unbroken(num_steps: int = NUM_STEPS) -> hg.Trace:
    return run(num_steps=num_steps)


def kill_at(step: int):
    """Returns a callback that interrupts a run after a step."""

    def progress(num_made, value):
        if num_made == step:
            raise Killed

    return progress


def run_killed(folder: Path, step: int, **changes) -> hg.Checkpoints:
    """Runs until a step and returns the checkpoints."""
    checkpoints = hg.Checkpoints(folder)
    with pytest.raises(Killed):
        run(checkpoints=checkpoints, progress=kill_at(step), **changes)
    return checkpoints


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# Resumed runs.


@pytest.mark.parametrize("last", range(1, NUM_STEPS + 1))
def test_a_run_killed_after_any_step_ends_with_the_same_bits(last: int, tmp_path):
    """Trace, rows and state; and no step is made twice."""
    checkpoints = run_killed(tmp_path, last)
    assert steps_in(tmp_path) == [step for step in (last - 1, last) if step]
    later = []
    progress = lambda num_made, value: later.append(num_made)
    trace = run(checkpoints=checkpoints, progress=progress)
    assert_same_bits(trace, unbroken())
    assert later == list(range(last + 1, NUM_STEPS + 1))


@pytest.fixture
def default_ctrl_c():
    """Lets SIGINT raise KeyboardInterrupt, also where the shell had it ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def press_ctrl_c_in_block(number: int, monkeypatch) -> None:
    """Sends SIGINT to this process before a block is computed."""
    run_block, calls = outer_run.run_block, []

    def interrupted_block(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return run_block(*args)

    monkeypatch.setattr(outer_run, "run_block", interrupted_block)


@pytest.mark.usefixtures("default_ctrl_c")
@pytest.mark.parametrize("every", [1, 2, 4])
def test_ctrl_c_ends_a_run_after_the_block_that_is_computed(
    every: int, tmp_path, monkeypatch
):
    """What was computed is saved, also between two checkpoints."""
    checkpoints = hg.Checkpoints(tmp_path, every)
    progress = (lambda *call: None) if every == 4 else None  # shorter blocks
    with monkeypatch.context() as patch:
        press_ctrl_c_in_block(2, patch)
        with pytest.raises(KeyboardInterrupt, match="steps are saved in") as error:
            run(checkpoints=checkpoints, progress=progress)
    num_made = {1: 2, 2: 4, 4: 2}[every]
    assert str(error.value).startswith(f"{num_made} steps are saved in {tmp_path}")
    assert steps_in(tmp_path)[-1] == num_made
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same_bits(run(checkpoints=checkpoints), unbroken())


def test_checkpoints_that_take_most_of_the_time_are_named(tmp_path, monkeypatch):
    """The steps of this clock take no time, and each save takes four seconds."""
    clock = itertools.count(0, 4)
    monkeypatch.setattr(outer_run.time, "monotonic", lambda: next(clock))
    with pytest.warns(
        UserWarning, match=r"seconds of this run .* every=10+\)"
    ) as issued:
        run(checkpoints=hg.Checkpoints(tmp_path))
    assert len(issued) == 1


@pytest.mark.usefixtures("default_ctrl_c")
@pytest.mark.parametrize("interrupted_step", [2, NUM_STEPS])
def test_ctrl_c_during_a_save_is_not_lost(interrupted_step, tmp_path, monkeypatch):
    """The save is completed, and not repeated, which would leave a second folder."""
    save = CheckpointFolder.save

    def interrupted_save(folder, step, tree):
        if step == interrupted_step:
            os.kill(os.getpid(), signal.SIGINT)
        save(folder, step, tree)

    message = f"{interrupted_step} steps are saved"
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", interrupted_save)
        with pytest.raises(KeyboardInterrupt, match=message):
            run(checkpoints=hg.Checkpoints(tmp_path))
    assert not list(tmp_path.glob("*corrupt*"))
    assert_same_bits(run(checkpoints=hg.Checkpoints(tmp_path)), unbroken())


@pytest.mark.usefixtures("default_ctrl_c")
def test_ctrl_c_says_that_nothing_could_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointFolder, "_write", raise_disk_is_full)
    with monkeypatch.context() as patch:
        press_ctrl_c_in_block(1, patch)
        with (
            pytest.warns(UserWarning, match="could not be written"),
            pytest.raises(KeyboardInterrupt, match="no step could be saved"),
        ):
            run(checkpoints=hg.Checkpoints(tmp_path))


def test_the_warning_of_a_folder_points_at_the_call(tmp_path):
    """And not at the standard library, through which the folder is opened."""
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="file") as issued:
        run(checkpoints=hg.Checkpoints(tmp_path / "file" / "folder"))
    assert {Path(warning.filename).parts[-2:] for warning in issued} == {
        ("tests", "loops.py")
    }


def raise_disk_is_full(*args):
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.usefixtures("default_ctrl_c")
def test_a_ctrl_c_after_the_last_step_is_not_lost(tmp_path, monkeypatch):
    """It comes while the trace is made, when nothing is left to be saved."""
    make_trace = outer_run._make_trace

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return make_trace(*args)

    monkeypatch.setattr(outer_run, "_make_trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoints=hg.Checkpoints(tmp_path))
    assert steps_in(tmp_path)[-1] == NUM_STEPS


@pytest.mark.usefixtures("default_ctrl_c")
def test_a_ctrl_c_before_the_first_step_is_one(tmp_path, monkeypatch):
    """There is no step whose progress could be shown."""
    count = outer_run._HostRun._steps_to_next_pause

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return count(self)

    monkeypatch.setattr(outer_run._HostRun, "_steps_to_next_pause", interrupted)
    with pytest.raises(KeyboardInterrupt, match="no step"):
        run(checkpoints=hg.Checkpoints(tmp_path), progress=lambda *call: None)


@pytest.mark.usefixtures("default_ctrl_c")
def test_a_second_ctrl_c_interrupts_at_once():
    def press_twice():
        with deferred_interrupt() as was_pressed:
            os.kill(os.getpid(), signal.SIGINT)
            assert was_pressed()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_a_thread_or_with_a_handler_of_the_user_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with deferred_interrupt() as was_pressed:
        assert not was_pressed()
    monkeypatch.undo()
    results = []

    def defer():
        with deferred_interrupt() as was_pressed:
            results.append(was_pressed())

    thread = threading.Thread(target=defer)
    thread.start()
    thread.join()
    assert results == [False]


def mean_inner(w, alpha, batch):
    return 0.5 * jnp.mean((w[None] - batch) ** 2) + 0.5 * jnp.sum((w - alpha) ** 2)


def noisy_inner(w, alpha, batch):
    batch, key = batch
    return mean_inner(w, alpha, batch) * (1 + jax.random.uniform(key))


def mean_outer(w, alpha, batch):
    return 0.5 * jnp.mean((w[None] - batch - 1) ** 2)


DESCENT = hg.Descent(optax.sgd(0.1, momentum=0.5), 3)
LIBRARY = {
    "Implicit": {
        "problem": hg.Bilevel(
            noisy_inner, mean_outer, hg.Batches(DATA, 2, with_key=True), DATA
        ),
        "estimator": hg.Implicit(DESCENT),
        "on_untrusted": "refine",
    },
    "SABA": {
        "problem": hg.Bilevel(
            mean_inner, mean_outer, hg.Batches(DATA, 2), hg.Batches(DATA, 5)
        ),
        "estimator": hg.SABA(optax.sgd(0.1, momentum=0.9)),
    },
}


@pytest.mark.parametrize("name", LIBRARY)
def test_estimators_of_the_library_can_be_resumed(name: str, tmp_path):
    """Warm adjoints and tables of variance reduction are part of a checkpoint."""
    changes = LIBRARY[name] | {"w": jnp.zeros(3), "aggregator": None}
    checkpoints = run_killed(tmp_path, 3, **changes)
    assert_same_bits(run(checkpoints=checkpoints, **changes), run(**changes))


def test_a_folder_may_be_in_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run(checkpoints=hg.Checkpoints("~/runs/first", 100))
    assert steps_in(tmp_path / "runs" / "first") == [6]
    assert not (tmp_path / "~").exists()
    name = "~no-such-user-of-this-machine"
    run(checkpoints=hg.Checkpoints(name, 100))
    assert steps_in(tmp_path / name) == [6]


@pytest.mark.parametrize("every", [1, 4, 100])
def test_checkpoints_change_no_bit(every: int, tmp_path):
    """At multiples and at the end; two are kept; a finished run is not repeated."""
    checkpoints = hg.Checkpoints(tmp_path / "new" / "folder", every)
    assert_same_bits(run(checkpoints=checkpoints), unbroken())
    assert steps_in(checkpoints.folder) == {1: [5, 6], 4: [4, 6], 100: [6]}[every]
    calls = []
    progress = lambda *call: calls.append(call)
    assert_same_bits(run(checkpoints=checkpoints, progress=progress), unbroken())
    assert not calls


def test_a_function_that_fails_after_a_step_loses_none(tmp_path):
    """The steps since the last checkpoint are saved, as after a Ctrl-C."""
    checkpoints = hg.Checkpoints(tmp_path, every=100)
    with pytest.raises(Killed):
        run(checkpoints=checkpoints, progress=kill_at(3))
    assert steps_in(tmp_path) == [3]
    assert_same_bits(run(checkpoints=checkpoints), unbroken())


def test_a_finished_run_can_be_extended(tmp_path):
    """To a larger number of steps, in the same folder; but not to a smaller one.

    Only the metric of the former last step differs from a longer run's.
    """
    checkpoints = hg.Checkpoints(tmp_path)
    run(checkpoints=checkpoints)
    before, calls = modification_times(tmp_path), []
    with pytest.raises(ValueError, match="num_steps"):
        run(checkpoints=checkpoints, num_steps=NUM_STEPS - 1)
    assert modification_times(tmp_path).items() >= before.items() - {tmp_path / "lock"}
    progress = lambda num_made, value: calls.append(num_made)
    trace = run(checkpoints=checkpoints, num_steps=9, progress=progress)
    assert calls == [7, 8, 9]
    metric = trace.metrics.pop("a")
    longer = unbroken(9)
    expected = longer.metrics["a"].at[5].set(unbroken().metrics["a"][5])
    np.testing.assert_array_equal(metric, expected)
    assert_same_bits(trace, eqx.tree_at(lambda t: t.metrics, longer, {}))
    assert steps_in(tmp_path) == [8, 9]


def test_a_run_with_a_budget_can_be_resumed_and_extended(tmp_path):
    """Three gradient-equivalents per step; what was spent is in the checkpoint."""
    limits = {"num_steps": None, "budget": 14.0}
    checkpoints = run_killed(tmp_path, 2, **limits)
    assert_same_bits(run(checkpoints=checkpoints, **limits), run(**limits))
    assert steps_in(tmp_path)[-1] == 5
    longer = run(checkpoints=checkpoints, num_steps=None, budget=16.0)
    assert len(longer.value) == 6
    assert_same_bits(longer.alpha, unbroken().alpha)
    with pytest.raises(ValueError, match="budget"):
        run(checkpoints=checkpoints, num_steps=None, budget=14.0)


def test_a_continued_run_can_be_resumed(tmp_path):
    """The checkpoints belong to the state from which the second run starts."""
    options = {
        name: x for name, x in SETTINGS.items() if name not in ("w", "alpha", "key")
    }
    loop = hg.OuterLoop(**options)
    first = loop.run(loop.init(MIXED, ALPHA, SETTINGS["key"]), num_steps=2)
    rest = functools.partial(
        loop.run, first.state, num_steps=4, checkpoints=hg.Checkpoints(tmp_path)
    )
    with pytest.raises(Killed):
        rest(progress=kill_at(3))
    trace = rest()
    assert int(trace.first_step) == 2
    assert_same_bits((trace.alpha, trace.state), (unbroken().alpha, unbroken().state))
    with pytest.raises(ValueError, match="folder"):
        run(num_steps=4, checkpoints=hg.Checkpoints(tmp_path))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (CheckpointFolder, "_write"),
        (CheckpointFolder, "_remove"),
        (checkpoint, "to_named_arrays"),
        (checkpoint, "digest_folder"),
        (checkpoint, "digest_json"),
        (Path, "replace"),
        (Path, "rename"),
        (os, "rmdir"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_killed_while_it_writes_can_be_resumed(
    owner, name, tmp_path, monkeypatch
):
    """Before, within and after Orbax, before the metadata and before the clean-up."""

    def die(*_, **__):
        raise Killed

    def arm(num_made, value):
        if num_made == 1:
            monkeypatch.setattr(owner, name, die)

    with pytest.raises(Killed):
        run(checkpoints=hg.Checkpoints(tmp_path), progress=arm)
    monkeypatch.undo()
    assert len(steps_in(tmp_path)) >= 1
    assert_same_bits(run(checkpoints=hg.Checkpoints(tmp_path)), unbroken())
    names = {f"step-00000000{i}" for i in (5, 6)}
    expected = {"lock", *names, *(f"{name}.json" for name in names)}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_failed_run_is_saved_as_it_ended(tmp_path):
    """Its status and its blank rows are restored, and nothing is repeated."""
    outer = lambda w, alpha, batch: w**2 + 0 * jnp.log(alpha - 1)
    problem = hg.Bilevel(lambda w, alpha, batch: (w - alpha) ** 2, outer)
    estimator = ExactEstimator()
    arguments = problem, estimator, optax.sgd(0.1, momentum=0.9), 0.0, 1.5
    plain = run_loop(*arguments, num_steps=9)
    assert plain.status == "stopped: the outer value is not finite"
    for _ in range(2):
        checkpoints = hg.Checkpoints(tmp_path, 2)
        trace = run_loop(*arguments, num_steps=9, checkpoints=checkpoints)
        assert_same_bits(trace, plain)


def test_every_kind_of_leaf_is_restored(tmp_path, key):
    """Keys, None, functions, scalars, empty arrays, half and double precision."""
    arrays = {
        "key": key,
        "keys": jax.random.split(key, (2, 3)),
        "rbg": jax.random.key(1, impl="rbg"),
        "half": jnp.asarray([1.5, -0.0, jnp.inf, jnp.nan], jnp.bfloat16),
        "double": jax.random.normal(key, (2, 3)),
        "empty": jnp.zeros((0, 3)),
        "bool": jnp.asarray([True, False]),
        "int": jnp.asarray(2**40),
        "weak": jnp.asarray(1.0),
        "numpy": np.arange(3.0),
    }
    others = {"none": None, "function": jnp.sin, "text": "a", "float": 0.1}
    blank = {
        "key": jax.random.key(9),
        "keys": jax.random.split(jax.random.key(9), (2, 3)),
        "rbg": jax.random.key(2, impl="rbg"),
    }
    blank = {name: blank.get(name, jnp.zeros_like(x)) for name, x in arrays.items()}
    blank["numpy"] = np.zeros(3)
    checkpoints = hg.Checkpoints(tmp_path)
    with checkpoint.open_checkpoints(checkpoints, {"a": "b"}) as folder:
        folder.save(3, arrays | others)
        restored = folder.load(lambda step: blank | others)
    assert {name: restored.pop(name) for name in others} == others
    assert_same_bits(restored, arrays)
    for name, x in restored.items():
        assert type(x) is type(arrays[name])
        assert getattr(x, "weak_type", None) == getattr(arrays[name], "weak_type", None)


# Corrupt files.


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """Returns the folder of a run that was killed after step 4."""
    folder = tmp_path_factory.mktemp("killed")
    run_killed(folder, 4)
    assert steps_in(folder) == [3, 4]
    return folder


def test_an_unreadable_file_is_skipped_and_kept(killed, tmp_path, monkeypatch):
    """A transient error of the disk at the newest checkpoint deletes nothing."""
    folder, path_open = tmp_path / "unread", Path.open

    def faulty_open(self, mode="r", *args, **kwargs):
        if "step-000000004/" in self.as_posix() and mode == "rb":
            raise OSError(errno.EIO, "Input/output error")
        return path_open(self, mode, *args, **kwargs)

    shutil.copytree(killed, folder)
    before = modification_times(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", faulty_open)
        with pytest.warns(UserWarning, match="corrupt"), pytest.raises(Killed):
            run(checkpoints=hg.Checkpoints(folder, every=100), progress=kill_at(5))
    assert steps_in(folder) == [3, 4, 5]
    assert modification_times(folder).keys() >= before.keys()
    assert_same_bits(run(checkpoints=hg.Checkpoints(folder)), unbroken())


def test_files_of_others_are_never_deleted(tmp_path):
    """Also if their names resemble those of checkpoints."""
    names = ("step-notes", "step-1", "step-000000001-old")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    for name in ("step-1.part", "step-notes.json", "step-000000001.json.txt", "a.part"):
        (tmp_path / name).write_text("mine")
    before = modification_times(tmp_path)
    assert_same_bits(run(checkpoints=hg.Checkpoints(tmp_path)), unbroken())
    after = modification_times(tmp_path)
    assert {path: after[path] for path in before} == before
    interrupted = tmp_path / "step-000000005"
    (tmp_path / "step-000000005.json").rename(tmp_path / "step-000000005.writing")
    with pytest.raises(ValueError, match="folder"):
        run(checkpoints=hg.Checkpoints(tmp_path), key=jax.random.key(7))
    assert interrupted.exists()  # a refused call deletes nothing at all
    run(checkpoints=hg.Checkpoints(tmp_path), num_steps=7)
    assert not interrupted.exists()


def test_a_corrupt_checkpoint_is_renamed_where_it_is_written_again(killed, tmp_path):
    folder = tmp_path / "corrupt"
    shutil.copytree(killed, folder)
    (folder / "step-000000004.json").write_text("{}")
    with pytest.warns(UserWarning, match="corrupt"):
        assert_same_bits(run(checkpoints=hg.Checkpoints(folder)), unbroken())
    assert (folder / "step-000000004.json.corrupt-1").read_text() == "{}"
    assert any((folder / "step-000000004.corrupt-1").iterdir())


# Folders of other runs.

SHIFTED = np.concatenate([DATA[:-1], DATA[-1:] + 1e-12])
LOSSES = PROBLEM.outer_loss
OTHER_RUNS = {
    "eval_every": {"eval_every": 3},
    "certify_every": {"certify_every": 2},
    "on_untrusted": {"on_untrusted": "refine"},
    "record_alphas": {"record_alphas": False},
    "key": {"key": jax.random.key(2)},
    "key: another kind": {"key": jax.random.key(1, impl="rbg")},
    "w": {"w": MIXED | {"b": jnp.asarray(1 + 1e-7, jnp.float32)}},
    "w: dtype": {
        "w": MIXED | {"b": jnp.ones(())}, "estimator": make_estimator(dtype=float)
    },
    "alpha": {"alpha": ALPHA.at[0].add(1e-15)},
    "inner_data": {"problem": hg.Bilevel(inner_loss, LOSSES, SHIFTED, DATA)},
    "inner_data: batch size": {
        "problem": hg.Bilevel(inner_loss, LOSSES, hg.Batches(DATA, 3), DATA)
    },
    "outer_data": {"problem": hg.Bilevel(inner_loss, LOSSES, DATA, SHIFTED)},
    "inner_loss": {
        "problem": hg.Bilevel(lambda *args: 2 * inner_loss(*args), LOSSES, DATA, DATA)
    },
    "outer_loss: constant": {"problem": hg.Bilevel(
        inner_loss, (outer_loss, lambda *args: outer_loss(*args) + jnp.sum(DATA)),
        DATA, DATA,
    )},
    "optimizer": {"optimizer": optax.adam(0.2)},
    "estimator": {"estimator": hg.Unrolled(DESCENT)},
    "estimator: number": {"estimator": make_estimator(cost=3.0 + 1e-12)},
    "program: constant": {"estimator": make_estimator(shift=1e-9)},
    "space": {"space": hg.spaces.Interval(-9.0, 9.0)},
    "project": {"project": lambda alpha: alpha},
    "outer_data_fn": {"outer_data_fn": lambda step, data: data},
    "aggregator": {"aggregator": hg.objectives.AugmentedLagrangian(limits=1.5)},
    "metrics": {"metrics": {"b": METRICS["a"]}},
    "program: metric": {"metrics": {"a": lambda w, alpha, key: jnp.sum(alpha)}},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Returns the folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    run(checkpoints=hg.Checkpoints(folder))
    return folder


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_the_folder_of_another_run_is_refused(name: str, finished):
    """The message names what differs, and the folder stays unchanged."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("step-*")}
    with pytest.raises(ValueError, match=name.partition(":")[0]) as refusal:
        run(checkpoints=hg.Checkpoints(finished), **OTHER_RUNS[name])
    assert str(finished) in str(refusal.value)
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("step-*")}
    assert after == before


def test_other_arrays_of_a_data_function_are_refused(tmp_path):
    """They are arguments of the program, and not in its text."""
    inner = lambda w, alpha, batch: jnp.sum((w - alpha * batch) ** 2)
    outer = lambda w, alpha, batch: jnp.sum((w - batch) ** 2)
    sample = lambda arrays, key: (arrays, arrays)

    def run_on(arrays, num_steps):
        data_fn = jax.tree_util.Partial(sample, jnp.array(arrays))
        return hg.minimize(
            hg.Bilevel(inner, outer, data_fn=data_fn), hg.Implicit(hg.Newton()),
            optax.sgd(0.01), jnp.zeros(2), jnp.array(3.0), num_steps=num_steps,
            checkpoints=hg.Checkpoints(tmp_path),
        )  # fmt: skip

    run_on([1.0, 2.0], 2)
    assert len(run_on([1.0, 2.0], 3).value) == 3
    with pytest.raises(ValueError, match="data_fn"):
        run_on([1.0, 2.5], 4)


def test_a_budget_that_would_have_ended_the_run_earlier_is_refused(tmp_path):
    """Costs of 3 make six steps of a budget of 16, and five of 15."""
    run_to = lambda budget, **options: run_loop(
        TO_ZERO, ExactEstimator(), optax.sgd(0.01), 0.0, 1.0, budget=budget, **options
    )
    checkpoints = hg.Checkpoints(tmp_path)
    assert len(run_to(16.0, checkpoints=checkpoints).value) == 6
    assert len(run_to(15.0).value) == 5
    with pytest.raises(ValueError, match="budget must be above 15"):
        run_to(15.0, checkpoints=checkpoints)
    assert len(run_to(15.5, checkpoints=checkpoints).value) == 6


def test_a_folder_that_refused_other_runs_still_serves_its_own(finished):
    assert_same_bits(run(checkpoints=hg.Checkpoints(finished)), unbroken())


@pytest.mark.parametrize("name", ["jax", "device", "number of processes"])
def test_another_environment_is_refused(name: str, finished, monkeypatch):
    """Its bits would differ."""
    environment = runtime_environment() | {name: "something else"}
    monkeypatch.setattr(outer_fingerprint, "runtime_environment", lambda: environment)
    with pytest.raises(ValueError, match=f"{name} is .* and something else now"):
        run(checkpoints=hg.Checkpoints(finished))


def test_another_number_of_devices_is_named_alone(finished, monkeypatch):
    """The texts of all functions of a run on several devices depend on it."""
    monkeypatch.setattr(outer_fingerprint, "_number_of_devices", lambda *args: 4)
    with pytest.raises(ValueError, match=r"number of devices is 1 in .* and 4 now"):
        run(checkpoints=hg.Checkpoints(finished))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    """Of two processes or of one; a dead process holds no lock."""
    script = """
        import fcntl, sys, time
        lock = open(sys.argv[1] + "/lock", "a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("locked", flush=True)
        time.sleep(600)
    """
    holder = start_python(script, tmp_path, stdout=subprocess.PIPE)
    checkpoints = hg.Checkpoints(tmp_path)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process"):
            run(checkpoints=checkpoints)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()

    def run_within(num_made, value):
        with pytest.raises(ValueError, match="another process"):
            run(checkpoints=checkpoints)

    assert_same_bits(run(checkpoints=checkpoints, progress=run_within), unbroken())


# Folders that cannot be written to.


def test_a_folder_that_cannot_be_created_issues_a_warning(tmp_path):
    """The run is the same without checkpoints; a file is an error."""
    with pytest.warns(UserWarning, match="no checkpoint can be written to /proc/hyper"):
        trace = run(checkpoints=hg.Checkpoints("/proc/hypergrad"))
    assert_same_bits(trace, unbroken())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder"):
        run(checkpoints=hg.Checkpoints(tmp_path / "file"))


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").symlink_to(tmp_path / "other")
    with pytest.warns(UserWarning, match="no checkpoint can be written"):
        run(checkpoints=hg.Checkpoints(folder))
    assert not (tmp_path / "other").exists()


def test_a_read_only_folder_is_read(killed, tmp_path, monkeypatch):
    """A run continues from its checkpoints and issues a warning."""
    folder, calls = tmp_path / "killed", []
    shutil.copytree(killed, folder)
    before = modification_times(folder)
    path_open = Path.open

    def read_only_open(path, mode="r", *args, **kwargs):
        if folder in (path, *path.parents) and set(mode) & set("wa+x"):
            raise PermissionError(30, "Read-only file system", str(path))
        return path_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only_open)
    open_file = lambda path, mode: path.open(mode)
    monkeypatch.setattr(checkpoint.atomic_io, "open_without_links", open_file)
    progress = lambda num_made, value: calls.append(num_made)
    with pytest.warns(UserWarning, match="no checkpoint can be written.*Read-only"):
        trace = run(checkpoints=hg.Checkpoints(folder), progress=progress)
    assert_same_bits(trace, unbroken())
    assert calls == [5, 6]
    assert modification_times(folder) == before


def test_a_failed_write_issues_a_warning_and_loses_nothing(tmp_path, monkeypatch):
    """The run continues, and resumes from the last checkpoint that was written."""

    def fill_disk(num_made, value):
        if num_made == 2:
            name = "fsync_tree"
            monkeypatch.setattr(checkpoint.atomic_io, name, raise_disk_is_full)

    checkpoints = hg.Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="could not be written.*of step 2") as caught:
        trace = run(checkpoints=checkpoints, progress=fill_disk)
    assert len(caught) == 1
    monkeypatch.undo()
    assert steps_in(tmp_path) == [1, 2]
    calls = []
    progress = lambda num_made, value: calls.append(num_made)
    assert_same_bits(run(checkpoints=checkpoints, progress=progress), trace)
    assert calls == [3, 4, 5, 6]
    assert_same_bits(trace, unbroken())


FULL_DISK = """
    import resource, sys, warnings

    import jax, jax.numpy as jnp, optax
    import hypergrad as hg
    from tests.loops import TO_ONE, ExactEstimator, assert_same_bits, run_loop

    alpha = jax.random.normal(jax.random.key(0), (100_000,))
    estimator, optimizer = ExactEstimator(), optax.adam(0.1)
    run = lambda **options: run_loop(
        TO_ONE, estimator, optimizer, alpha, alpha, num_steps=5, **options
    )
    checkpoints, size = hg.Checkpoints(sys.argv[1]), resource.RLIMIT_FSIZE
    plain = run()

    def fill_disk(num_made, value):
        if num_made == 2:  # no file may grow beyond 100 kB
            resource.setrlimit(size, (100_000, resource.getrlimit(size)[1]))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of Orbax
        trace = run(checkpoints=checkpoints, progress=fill_disk)
    messages = [str(warning.message) for warning in caught]
    (message,) = messages
    assert "could not be written" in message, message
    assert "of step 2" in message, message
    try:
        hg.models.save("large", alpha, alpha, folder=sys.argv[1] + "/models")
    except OSError as error:
        assert "too large" in str(error), error
    else:
        raise AssertionError("the disk is not full")
    resource.setrlimit(size, (resource.getrlimit(size)[1],) * 2)
    resumed = run(checkpoints=checkpoints)
    assert_same_bits(trace, plain)
    assert_same_bits(resumed, plain)
"""


def test_a_full_disk_loses_nothing_and_is_reported_once(tmp_path):
    """As the test before, by a limit of the process on the size of files.

    Orbax, whose threads print many lines about a full disk, is not called.
    """
    assert run_python(FULL_DISK, tmp_path).stderr == ""


# Limits of time and memory.


def test_a_run_that_ran_out_of_time_continues_later(tmp_path):
    """One chunk at a time; each stop has the last good state."""
    checkpoints = hg.Checkpoints(tmp_path, every=2)
    for num_made in (2, 4):
        trace = run(checkpoints=checkpoints, time_limit=1e-9)
        assert trace.status == "stopped: time limit"
        assert np.isfinite(trace.value).all(1).tolist() == [True] * num_made
        assert_same_bits(trace.value, unbroken().value[:num_made])
        assert steps_in(tmp_path)[-1] == num_made
    # The last chunk ends the run, so that its limit does not matter.
    assert_same_bits(run(checkpoints=checkpoints, time_limit=1e-9), unbroken())


def test_a_time_limit_without_checkpoints_ends_after_a_twentieth():
    """The state can be continued; a long limit changes nothing."""
    trace = run(num_steps=60, time_limit=1e-9)
    assert trace.status == "stopped: time limit"
    assert np.isfinite(trace.value).all(1).tolist() == [True] * 3
    assert_same_bits((trace.alpha, trace.state), (unbroken(3).alpha, unbroken(3).state))
    assert_same_bits(run(time_limit=3600), unbroken())


@pytest.mark.parametrize("every", [1, 2])
def test_a_limit_of_time_needs_no_memory_for_steps_that_are_not_made(every, tmp_path):
    """Their rows would take terabytes; the steps that were made can be continued."""
    options = {"checkpoints": hg.Checkpoints(tmp_path, every=2), "record_every": every}
    options |= {"eval_every": every, "time_limit": 1e-9}
    trace = run(num_steps=2 * 10**12, **options)
    assert trace.status == "stopped: time limit"
    assert len(trace.value) == len(trace.rows()) == 2 // every
    assert_same_bits(trace.alpha, unbroken(2).alpha)


def test_a_failed_run_has_blank_rows_also_with_a_limit(monkeypatch):
    """A limit that is exceeded at the same moment does not count."""
    nan = optax.scale_by_schedule(lambda count: jnp.where(count == 2, jnp.nan, 0.1))
    fail = lambda **options: run(num_steps=60, optimizer=nan, **options)
    assert_same_bits(fail(time_limit=1e-9), fail())
    assert len(fail(time_limit=1e-9).value) == 60


def test_a_run_until_a_limit_of_time_that_fails_has_the_rows_that_were_made(tmp_path):
    """Blank rows would take terabytes; the folder can be read again."""
    nan = optax.scale_by_schedule(lambda count: jnp.where(count == 5, jnp.nan, 0.1))
    options = {"checkpoints": hg.Checkpoints(tmp_path, every=2), "time_limit": 3600.0}
    for _ in range(2):
        trace = run(num_steps=2 * 10**12, optimizer=nan, **options)
        assert trace.status != "completed"
        assert len(trace.value) == 6


def test_a_run_that_takes_too_much_memory_stops_and_continues(tmp_path, monkeypatch):
    """The last good state is saved; at its end no limit stops a run."""

    def report(*sizes):
        remaining = iter(sizes)  # before the run, and after each step
        monkeypatch.setattr(outer_limits, "resident_bytes", lambda: next(remaining))

    checkpoints = hg.Checkpoints(tmp_path)
    report(0, 100, 100, 101)
    trace = run(checkpoints=checkpoints, memory_limit=100)
    assert trace.status == "stopped: memory limit"
    assert_same_bits(trace.alpha, unbroken(3).alpha)
    assert steps_in(tmp_path)[-1] == 3
    report(0, 100, 100, 101)
    assert_same_bits(run(checkpoints=checkpoints, memory_limit=100), unbroken())
    report(None)
    with pytest.raises(ValueError, match="memory_limit"):
        run(memory_limit=100)


@pytest.mark.skipif(resident_bytes() is None, reason="needs /proc/self/statm")
def test_the_memory_of_the_process_is_limited():
    """No Python process fits into a byte; every one fits into an exbibyte."""
    trace = run(memory_limit=1)
    assert trace.status == "stopped: memory limit"
    assert np.isfinite(trace.value).all(1).tolist() == [True]
    assert_same_bits(run(memory_limit=2**60), unbroken())


def test_invalid_checkpoints_are_refused():
    paths = [types.SimpleNamespace(__fspath__=lambda: "a")]  # of the class alone
    for folder in (None, 3, ["a"], "", b"a", *paths):
        with pytest.raises(TypeError, match="folder"):
            hg.Checkpoints(folder)
    for every in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="every"):
            hg.Checkpoints("a", every)
    assert not os.path.exists("a")


def test_a_folder_without_locks_gets_checkpoints_and_a_warning(tmp_path, monkeypatch):
    """As on a file system of a cluster."""

    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"):
        trace = run(checkpoints=hg.Checkpoints(tmp_path))
    assert_same_bits(trace, unbroken())
    assert (tmp_path / "step-000000006").is_dir()
