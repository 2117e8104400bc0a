"""Checkpoints: whatever interrupts a run, it ends with the bits of an unbroken one."""

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import checkpoint
from hypergrad.checkpoint import CheckpointFolder
from hypergrad.cost.memory import resident_bytes
from tests.loops import run_loop

STEPS = 6


class Killed(BaseException):
    """No error that anything catches."""


def inner(w, alpha, batch):
    x, key = batch if isinstance(batch, tuple) else (batch, None)
    noise = 0.0 if key is None else 0.1 * jax.random.normal(key)
    total = jnp.sum((w["a"].astype(float) - jnp.mean(x, 0)) ** 2) + w["b"] ** 2
    return 0.5 * (1 + noise) * (total + jnp.sum(alpha * w["a"].astype(float)))


def outer(w, alpha, batch):
    return jnp.sum((w["a"].astype(float) - 1) ** 2) + 0.1 * jnp.sum(alpha**2)


DATA = np.linspace(0.0, 1.0, 30).reshape(10, 3)
START = {"a": jnp.zeros(3), "b": jnp.ones(()), "none": None}
MIXED = {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.ones((), jnp.float32), "none": None}
ALPHA = jnp.linspace(0.5, 1.5, 3)
SGD = optax.sgd(0.1, momentum=0.9)
DESCENT = hg.Descent(optax.sgd(0.1, momentum=0.5), 3)
NOISY = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.adam(0.1))
PROBLEM = hg.Bilevel(inner, outer, hg.Batches(DATA, 2, with_key=True), DATA)
SEEN = {"a": lambda w, alpha, key: jnp.sum(alpha) + jax.random.normal(key)}
# What moves: an adjoint, keys in the optimizer's state, tables, a multiplier of the
# combiner, half precision; what does not: None.
RUNS = {
    "implicit": {
        "estimator": hg.Implicit(DESCENT), "optimizer": NOISY, "metrics": SEEN,
        "eval_every": 2, "on_untrusted": "skip",
    },
    "half precision": {
        "estimator": hg.Unrolled(DESCENT), "w": MIXED,
        "problem": hg.Bilevel(inner, outer, DATA, DATA),
    },
    "tables": {
        "estimator": hg.SABA(SGD), "problem": hg.Bilevel(
            inner, outer, hg.Batches(DATA, 2), hg.Batches(DATA, 5)
        ),
    },
    "limits": {
        "estimator": hg.Implicit(DESCENT, rtol=0.1),
        "problem": hg.Bilevel(inner, (outer, outer), DATA, DATA),
        "combine": hg.objectives.AugmentedLagrangian(limits=1.0),
    },
}  # fmt: skip


def run(name="implicit", **changes):
    settings = {
        "problem": PROBLEM, "optimizer": SGD, "w": START, "alpha": ALPHA,
        "num_steps": STEPS, "key": jax.random.key(1),
    }  # fmt: skip
    return run_loop(**settings | RUNS[name] | changes)


def bits(tree) -> list[bytes]:
    """Of every number, with its dtype."""
    arrays = map(np.asarray, jax.tree.leaves(tree))
    return [x.tobytes() + str((x.dtype, x.shape)).encode() for x in arrays]


@functools.cache
def unbroken(name: str = "implicit") -> list[bytes]:
    return bits(run(name))


def steps_in(folder: Path) -> list[int]:
    return sorted(int(file.stem[-9:]) for file in folder.glob("step-*.json"))


# Going on.


@pytest.mark.parametrize("name", RUNS)
def test_killed_after_any_step_it_ends_with_the_same_bits(name: str, tmp_path):
    """Trace, rows, ledger; and no step is made twice."""
    for last in range(1, STEPS + 1):
        folder = tmp_path / str(last)
        keep = hg.Checkpoints(folder, every=1)

        def die(done, value, last=last):
            if done == last:
                raise Killed

        with pytest.raises(Killed):
            run(name, checkpoints=keep, progress=die)
        assert steps_in(folder) == [step for step in (last - 1, last) if step]
        later = []
        tell = lambda done, value, later=later: later.append(done)
        found = run(name, checkpoints=keep, progress=tell)
        assert bits(found) == unbroken(name)
        assert later == list(range(last + 1, STEPS + 1))


@pytest.mark.parametrize("every", [1, 4, 6, 100])
def test_neither_checkpoints_nor_their_distance_change_a_bit(every: int, tmp_path):
    """At multiples and at the end; two are kept; a finished run is not made again."""
    keep = hg.Checkpoints(tmp_path / "new" / "folder", every)
    assert bits(run(checkpoints=keep)) == unbroken()
    assert steps_in(keep.folder) == {1: [5, 6], 4: [4, 6]}.get(every, [6])
    called = []
    tell = lambda done, value: called.append(done)
    assert bits(run(checkpoints=keep, progress=tell)) == unbroken()
    assert not called


def test_killed_while_it_writes(tmp_path, monkeypatch):
    """Before, within and after orbax; before the seal and before the old one goes."""
    moments = [
        (CheckpointFolder, "_write"), (CheckpointFolder, "_remove"), (checkpoint, "_named"),
        (checkpoint, "_hashes"), (checkpoint, "_seal"), (Path, "replace"),
        (shutil, "rmtree"),
    ]  # fmt: skip
    keep = hg.Checkpoints(tmp_path, every=1)

    def dies(*_, **__):
        raise Killed

    for at, (owner, name) in enumerate(moments):
        steps = iter(range(STEPS))

        def arm(done, value, owner=owner, name=name, steps=steps):
            if next(steps) == 0:
                monkeypatch.setattr(owner, name, dies)

        shutil.rmtree(tmp_path)
        with pytest.raises(Killed):
            run(checkpoints=keep, progress=arm)
        monkeypatch.undo()
        assert len(steps_in(tmp_path)) >= 1, at
        assert bits(run(checkpoints=keep)) == unbroken()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {
            "lock", "step-000000005", "step-000000005.json", "step-000000006",
            "step-000000006.json",
        }  # fmt: skip


def test_a_run_that_froze_is_kept_as_it_ended(tmp_path):
    """Its status and its NaN rows come back; nothing is tried again."""
    outer = lambda w, alpha, batch: w**2 + 0 * jnp.log(alpha - 1)
    problem = hg.Bilevel(lambda w, alpha, batch: (w - alpha) ** 2, outer)
    settings = problem, hg.Implicit(hg.Newton()), SGD, 0.0, 1.5
    plain = run_loop(*settings, num_steps=9)
    assert plain.status == "stopped: the outer value is not finite"
    for _ in range(2):
        found = run_loop(
            *settings, num_steps=9, checkpoints=hg.Checkpoints(tmp_path, 2)
        )
        assert bits(found) == bits(plain)


def test_every_kind_of_leaf_comes_back(tmp_path, key):
    """Keys, None, functions, scalars, zero sizes, half and double precision."""
    tree = {
        "key": key, "keys": jax.random.split(key, (2, 3)), "none": None, "f": jnp.sin,
        "half": jnp.asarray([1.5, -0.0, jnp.inf, jnp.nan], jnp.bfloat16),
        "double": jax.random.normal(key, (2, 3)), "zero": jnp.zeros((0, 3)),
        "bool": jnp.asarray([True, False]), "int": jnp.asarray(2**40),
        "weak": jnp.asarray(1.0), "rbg": jax.random.key(1, impl="rbg"), "text": "a",
        "float": 0.1, "numpy": np.float32(0.1),
    }  # fmt: skip
    tree = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.generic) else x, tree
    )
    clear = lambda x: jnp.zeros_like(x) if checkpoint.eqx.is_array(x) else x
    empty = {
        name: jax.random.clone(jax.random.split(key)[0]) if name == "key"
        else jax.random.split(jax.random.key(9), (2, 3)) if name == "keys"
        else jax.random.key(2, impl="rbg") if name == "rbg" else clear(x)
        for name, x in tree.items()
    }  # fmt: skip
    with checkpoint.open_checkpoints(hg.Checkpoints(tmp_path), {"a": "b"}) as folder:
        folder.save(3, tree)
        found = folder.load(empty)
    plain = lambda x: jax.random.key_data(x) if "key" in str(x.dtype) else x
    for name, x in tree.items():
        if not checkpoint.eqx.is_array(x):
            assert found[name] is x
            continue
        y = found[name]
        of = lambda x: (x.dtype, x.shape, getattr(x, "weak_type", None))
        assert of(y) == of(x), name
        assert np.asarray(plain(x)).tobytes() == np.asarray(plain(y)).tobytes(), name


SHARDED = """
    import os, sys

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    import jax, jax.numpy as jnp, numpy as np, optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    import hypergrad as hg

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    spread = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    x, w = spread(jax.random.normal(jax.random.key(0), (40, 8))), spread(jnp.zeros(8))
    loss = lambda w, alpha, batch: jnp.mean((batch @ w - 1) ** 2)
    inner = lambda w, alpha, batch: loss(w, alpha, batch) + alpha @ w**2
    problem, estimator = hg.Bilevel(inner, loss, x, x[:20]), hg.SOBA(optax.sgd(0.05))
    optimizer = optax.adam(0.1)
    run = lambda **changes: hg.minimize(
        problem, estimator, optimizer, w, jnp.ones(8), num_steps=6, **changes
    )
    keep = hg.Checkpoints(sys.argv[1], every=3)
    plain, stopped = run(), run(checkpoints=keep, time_limit=1e-9)
    found = run(checkpoints=keep)
    assert stopped.status == "stopped: time limit"
    assert found.w.sharding == plain.w.sharding == w.sharding
    jax.tree.map(np.testing.assert_array_equal, found, plain)
"""


@pytest.mark.slow
def test_what_is_spread_over_devices_comes_back_spread(tmp_path):
    """Four devices of one process: the same bits, each part where it was."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


# Damage.


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run; its newest checkpoint is not of the last step."""
    folder = tmp_path_factory.mktemp("finished")

    def die(done, value):
        if done == 4:
            raise Killed

    with pytest.raises(Killed):
        run(checkpoints=hg.Checkpoints(folder), progress=die)
    assert steps_in(folder) == [3, 4]
    return folder


def damage(folder: Path, rng: np.random.Generator) -> str:
    """One byte flipped, or a file cut off, emptied, removed or added."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = files[rng.integers(len(files))]
    text, kind = bytearray(file.read_bytes()), rng.integers(8)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        (file.parent / "more").write_bytes(bytes(text))
    elif kind in (2, 3):
        file.write_bytes(text[: rng.integers(len(text) + 1)])
    elif text:
        text[rng.integers(len(text))] ^= 1 << rng.integers(8)
        file.write_bytes(text)
    return f"{file.relative_to(folder)}, kind {kind}"


@pytest.mark.parametrize(
    "seeds",
    [range(20), *(pytest.param(range(20 * i, 20 * i + 20), marks=pytest.mark.slow)
                  for i in range(1, 15))],
    ids=lambda seeds: f"{seeds.start}",
)  # fmt: skip
def test_a_damaged_file_never_leads_to_a_wrong_result(seeds, finished, tmp_path):
    """The right bits, by the checkpoint before where that is needed."""
    warned = 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        shutil.copytree(finished, folder)
        what = damage(folder, np.random.default_rng(seed))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = run(checkpoints=hg.Checkpoints(folder))
        assert bits(found) == unbroken(), what
        assert all("is damaged" in str(each.message) for each in said), what
        warned += len(said)
    assert warned  # the newest was hit at least once


def test_a_file_that_cannot_be_read_is_as_a_damaged_one(
    finished, tmp_path, monkeypatch
):
    """An error of the disk at the newest arrays: the checkpoint before is used."""
    folder, read, once = tmp_path / "unread", Path.open, [True]

    def faulty(self, mode="r", *args, **kwargs):
        if "step-000000004/" in self.as_posix() and mode == "rb" and once:
            once.clear()
            raise OSError(errno.EIO, "Input/output error")
        return read(self, mode, *args, **kwargs)

    shutil.copytree(finished, folder)
    monkeypatch.setattr(Path, "open", faulty)
    with pytest.warns(UserWarning, match=r"is damaged.*cannot be read"):
        found = run(checkpoints=hg.Checkpoints(folder))
    assert bits(found) == unbroken()


def test_two_damaged_checkpoints_are_an_error(finished, tmp_path):
    """Named, with what to do; nothing is deleted."""
    folder = tmp_path / "both"
    for seed in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        rng = np.random.default_rng(seed)
        for step in (3, 4):
            name = f"step-{step:09d}"
            files = [folder / f"{name}.json", *folder.glob(f"{name}/*"),
                     *folder.glob(f"{name}/d/*")]  # fmt: skip
            files = [file for file in files if file.is_file() and file.stat().st_size]
            file = files[rng.integers(len(files))]
            file.write_bytes(file.read_bytes()[:-3])
        before = sorted(folder.rglob("*"))
        with pytest.raises(ValueError, match=r"whole.*delete the folder to begin anew"):
            run(checkpoints=hg.Checkpoints(folder))
        assert sorted(folder.rglob("*")) == before


# Whose folder it is.

LATER = np.concatenate([DATA[:-1], DATA[-1:] + 1e-12])
OTHERS = {
    "num_steps": ("num_steps is 6 there and 7 here", {"num_steps": 7}),
    "eval_every": ("eval_every is 2 there and 3 here", {"eval_every": 3}),
    "certify_every": ("certify_every is None there and 2", {"certify_every": 2}),
    "on_untrusted": ("is skip there and record here", {"on_untrusted": "record"}),
    "key": ("key differs", {"key": jax.random.key(2)}),
    "kind of key": ("key differs", {"key": jax.random.key(1, impl="rbg")}),
    "w": ("w differs", {"w": START | {"b": jnp.asarray(1 + 1e-15)}}),
    "dtype of w": ("w differs", {"w": START | {"b": jnp.ones((), jnp.float32)}}),
    "structure of w": ("w differs", {"w": START | {"none": jnp.zeros(2)}}),
    "alpha": ("alpha differs", {"alpha": ALPHA.at[0].add(1e-15)}),
    "inner data": (
        "inner_data differs",
        {"problem": hg.Bilevel(inner, outer, hg.Batches(LATER, 2, with_key=True), DATA)},
    ),
    "batch size": (
        "inner_data differs",
        {"problem": hg.Bilevel(inner, outer, hg.Batches(DATA, 3, with_key=True), DATA)},
    ),
    "outer data": (
        "outer_data differs",
        {"problem": hg.Bilevel(inner, outer, PROBLEM.inner_data, LATER)},
    ),
    "inner loss": (
        "inner_loss differs",
        {"problem": hg.Bilevel(
            lambda *inputs: 2 * inner(*inputs), outer, PROBLEM.inner_data, DATA
        )},
    ),
    "constant in a loss": (
        "outer_loss differs",
        {"problem": hg.Bilevel(
            inner, lambda *inputs: outer(*inputs) + jnp.sum(DATA), PROBLEM.inner_data,
            DATA,
        )},
    ),
    "rate": ("optimizer differs", {"optimizer": optax.sgd(0.2, momentum=0.9)}),
    "estimator": ("estimator differs", {"estimator": hg.Implicit(hg.Newton())}),
    "number in the estimator": (
        "estimator differs", {"estimator": hg.Implicit(DESCENT, damping=1e-9)},
    ),
    "rate of the solver": (
        "program differs",
        {"estimator": hg.Implicit(hg.Descent(optax.sgd(0.11, momentum=0.5), 3))},
    ),
    "space": ("space differs", {"space": hg.spaces.Interval(-9.0, 9.0)}),
    "projection": ("project differs", {"project": lambda alpha: alpha}),
    "annealing": ("anneal differs", {"anneal": lambda step, data: data}),
    "metrics": ("metrics differs", {"metrics": {"b": SEEN["a"]}}),
    "code of a metric": (
        "program differs", {"metrics": {"a": lambda w, alpha, key: jnp.sum(alpha)}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_folder_of_another_run_is_refused(name: str, tmp_path):
    """By what differs; the folder stays as it was, and the first run can go on."""
    message, changes = OTHERS[name]
    settings = {"optimizer": SGD}
    keep = hg.Checkpoints(tmp_path, every=3)
    trace = run(checkpoints=keep, **settings)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step-*")}
    with pytest.raises(ValueError, match=message) as refusal:
        run(checkpoints=keep, **settings | changes)
    assert str(tmp_path) in str(refusal.value)
    assert "another folder" in str(refusal.value)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step-*")}
    assert after == before
    assert bits(run(checkpoints=keep, **settings)) == bits(trace)


@pytest.mark.parametrize("name", ["jax", "device", "number of processes"])
def test_another_place_is_refused(name: str, tmp_path, monkeypatch):
    """Its bits would be others."""
    run(checkpoints=hg.Checkpoints(tmp_path, 6))
    here = checkpoint.runtime_environment()
    there = lambda: here | {name: "something else"}
    monkeypatch.setattr(sys.modules["hypergrad.minimize"], "place", there)
    with pytest.raises(ValueError, match=f"{name} is .* there and something else here"):
        run(checkpoints=hg.Checkpoints(tmp_path, 6))


def test_two_runs_on_one_folder_are_refused(tmp_path):
    """Of two processes or of one; a dead process holds nothing."""
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent("""
            import fcntl, sys, time
            lock = open(sys.argv[1] + "/lock", "a")
            fcntl.flock(lock, fcntl.LOCK_EX)
            print("held", flush=True)
            time.sleep(600)
         """), str(tmp_path)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    keep = hg.Checkpoints(tmp_path)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"another process .* another folder"):
            run(checkpoints=keep)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()

    def once_more(done, value):
        with pytest.raises(ValueError, match="another process"):
            run(checkpoints=keep)

    assert bits(run(checkpoints=keep, progress=once_more)) == unbroken()


# What cannot be written.


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    """/proc takes no folder from anybody; the run is the same without."""
    with pytest.warns(UserWarning, match="no checkpoint can be written to /proc/hyper"):
        assert bits(run(checkpoints=hg.Checkpoints("/proc/hypergrad"))) == unbroken()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        run(checkpoints=hg.Checkpoints(tmp_path / "file"))


def test_a_read_only_folder_is_read(finished, tmp_path, monkeypatch):
    """A run goes on from what is there, and says that it keeps nothing."""
    folder, called = tmp_path / "finished", []
    shutil.copytree(finished, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    opens = Path.open

    def read_only(path, mode="r", *rest, **more):
        if folder in (path, *path.parents) and set(mode) & set("wa+x"):
            raise PermissionError(30, "Read-only file system", str(path))
        return opens(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.warns(UserWarning, match="no checkpoint can be written.*Read-only"):
        found = run(
            checkpoints=hg.Checkpoints(folder),
            progress=lambda done, value: called.append(done),
        )
    assert bits(found) == unbroken()
    assert called == [5, 6]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


FULL = """
    import resource, sys, warnings

    import jax, jax.numpy as jnp, numpy as np, optax
    import hypergrad as hg

    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2),
    )
    noise = jax.random.normal(jax.random.key(0), (100_000,))
    optimizer, estimator = optax.adam(0.1), hg.Implicit(hg.Newton())
    run = lambda **changes: hg.minimize(
        problem, estimator, optimizer, jnp.zeros(100_000), noise, num_steps=5, **changes
    )
    keep, size = hg.Checkpoints(sys.argv[1]), resource.RLIMIT_FSIZE
    plain = run()

    def fill(done, value):
        if done == 2:
            resource.setrlimit(size, (100_000, resource.getrlimit(size)[1]))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trace = run(checkpoints=keep, progress=fill)
    said = [str(each.message) for each in said]
    assert len(said) == 3, said
    assert all("could not be written" in each for each in said), said
    assert all("the last is of step 2" in each for each in said), said
    resource.setrlimit(size, (resource.getrlimit(size)[1],) * 2)
    later = []
    again = run(checkpoints=keep, progress=lambda done, value: later.append(done))
    assert later == [3, 4, 5], later
    for one in (trace, again):
        jax.tree.map(np.testing.assert_array_equal, plain, one)
"""


def test_a_full_disk_is_reported_and_nothing_is_lost(tmp_path):
    """No file may grow (a limit of the process): warned of, and the run goes on."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


# A time limit.


def test_a_run_that_ran_out_of_time_goes_on_later(tmp_path):
    """A chunk at a time, to the same bits; each stop has the last good state."""
    keep = hg.Checkpoints(tmp_path, every=2)
    for done in (2, 4):
        trace = run(checkpoints=keep, time_limit=1e-9)
        assert trace.status == "stopped: time limit"
        assert np.isfinite(trace.value).sum() == done
        assert bits(trace.value[:done]) == bits(run().value[:done])
        assert steps_in(tmp_path)[-1] == done
    assert bits(run(checkpoints=keep, time_limit=1e-9)) == unbroken()  # made in time


def test_a_time_limit_alone():
    """A twentieth of the run is the least; a long one changes nothing."""
    trace = run(num_steps=60, time_limit=1e-9)
    assert trace.status == "stopped: time limit"
    assert np.isfinite(trace.value).sum() == 3
    same = run(num_steps=3)
    assert bits((trace.alpha, trace.w)) == bits((same.alpha, same.w))
    assert bits(run(time_limit=3600)) == unbroken()


# A memory limit.


def test_a_run_that_takes_too_much_memory_stops_and_goes_on(tmp_path, monkeypatch):
    """At the last good state, which is kept; at the limit it goes on."""

    def held(*bytes_then):
        left = iter(bytes_then)  # before the run, and after each step
        monkeypatch.setattr(
            sys.modules["hypergrad.minimize"], "resident", lambda: next(left)
        )

    keep = hg.Checkpoints(tmp_path, every=1)
    held(0, 100, 100, 101)
    trace = run(checkpoints=keep, memory_limit=100)
    assert trace.status == "stopped: memory limit"
    same = run(num_steps=3)
    assert bits((trace.alpha, trace.w)) == bits((same.alpha, same.w))
    assert steps_in(tmp_path)[-1] == 3
    held(0, 100, 100, 101)  # at its end no limit stops it
    assert bits(run(checkpoints=keep, memory_limit=100)) == unbroken()
    held(None)
    with pytest.raises(ValueError, match="memory_limit needs a system"):
        run(memory_limit=100)


@pytest.mark.skipif(resident_bytes() is None, reason="a system that cannot tell")
def test_a_memory_limit_by_what_the_system_tells():
    """No process of Python fits into a byte; this one fits into all that there is."""
    trace = run(memory_limit=1)
    assert trace.status == "stopped: memory limit"
    assert np.isfinite(trace.value).sum() == 1  # a twentieth of six steps, rounded up
    assert bits(run(memory_limit=2**60)) == unbroken()


# Bad input.


def test_bad_settings_are_refused():
    """By name, before anything runs."""
    for folder in (None, 3, ["a"]):
        with pytest.raises(TypeError, match="folder must be a path"):
            hg.Checkpoints(folder)
    for every in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="every must be an integer"):
            hg.Checkpoints("a", every)
    with pytest.raises(TypeError, match=r"checkpoints must be hg\.Checkpoints"):
        run(checkpoints="a")
    for name in ("time_limit", "memory_limit"):
        for limit in (0, -1.0, float("nan"), True, "1"):
            with pytest.raises(ValueError, match=f"{name} must be a positive"):
                run(**{name: limit})


@pytest.mark.parametrize("name", ["checkpoints", "time_limit", "memory_limit"])
def test_neither_works_within_a_compiled_program(name: str, tmp_path):
    """They are the host's business."""
    given = hg.Checkpoints(tmp_path) if name == "checkpoints" else 1.0
    with pytest.raises(TypeError, match=f"{name} is seen to on the host"):
        jax.jit(lambda alpha: run(alpha=alpha, **{name: given}).alpha)(ALPHA)
    assert not os.listdir(tmp_path)
