"""Models that are kept: what was saved comes back to the bit, or an error says why."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import threading
from collections import namedtuple
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import cli
from hypergrad.models import arrays, store
from hypergrad.runs import model_commands as commands
from hypergrad.runtime import provenance

W = {"layers": [jnp.arange(6.0).reshape(2, 3), jnp.ones(3)], "bias": jnp.float64(0.5)}
ALPHA = jnp.linspace(-1, 1, 4)


class Killed(BaseException):
    """No error that anything catches."""


def bits(tree) -> list:
    """Of every leaf: its kind, dtype, shape and bytes; of a key, those of its data."""

    def of(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        )
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return type(leaf), str(jnp.asarray(leaf).dtype), array.shape, array.tobytes()

    return [of(leaf) for leaf in jax.tree.leaves(tree)]


def same(one, two) -> bool:
    """Structure, kinds and bits."""
    return jax.tree.structure(one) == jax.tree.structure(two) and bits(one) == bits(two)


def files(folder: Path) -> dict[str, bytes]:
    """All that counts: what begins with a dot does not."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts)
    }


@pytest.fixture
def quick(monkeypatch) -> None:
    """Versions that are not looked up, for each of many saves."""
    monkeypatch.setattr(store, "versions", lambda: {"packages": {}})


# To the bit.

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", ["jax", "numpy"])
def test_every_dtype_comes_back_to_the_bit(kind: str, name: str, tmp_path):
    """Of any bits: NaNs with a payload, infinities, minus zero, subnormal numbers."""
    dtype = jnp.dtype(name)
    drawn = np.random.default_rng(0).integers(0, 256, (6, 8, dtype.itemsize), np.uint8)
    if name in ("bool", "int4", "uint4"):
        drawn &= 1 if name == "bool" else 7
    leaf = drawn.reshape(6, -1).view(dtype)
    w = {"a": leaf, "none": leaf[:0], "one": leaf[0, 0], "turned": leaf.T}
    if kind == "jax":
        w = jax.tree.map(jnp.asarray, w)
        assert np.asarray(w["a"]).tobytes() == leaf.tobytes()  # JAX holds these bits
    else:
        w["one"] = np.asarray(w["one"])
    hg.models.save("m", w, ALPHA, folder=tmp_path)
    found, alpha = hg.models.load("m", folder=tmp_path)
    assert same(found, w)
    assert same(alpha, ALPHA)
    assert all(x.dtype == dtype for x in jax.tree.leaves(found))


@pytest.mark.usefixtures("quick")
def test_trees_of_any_kind_come_back(tmp_path):
    """Python's containers in each other, its numbers, names with any letter, a leaf."""
    alpha = {
        "a/b": (1.5, [2, True], None, {}),
        "": {3: jnp.ones(2), 1: np.float32(0.1)},
        "a'] @\n\0ü": [(), (jnp.zeros((2, 0)),), 1j],
    }
    for w in (0.1, jnp.ones(()), [jnp.ones(2), None], (W,)):
        hg.models.save("m", w, alpha, folder=tmp_path)
        found = hg.models.load("m", folder=tmp_path)
        expected = jax.tree.map(
            lambda x: np.asarray(x) if isinstance(x, np.generic) else x, (w, alpha)
        )
        assert same(found, expected)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_come_back(impl: str, tmp_path):
    """One and several, of every kind, and draw the same numbers."""
    key = jax.random.key(3, impl=impl)
    w = {"one": key, "several": jax.random.split(key, 4), "w": jnp.ones(2)}
    hg.models.save("m", w, ALPHA, folder=tmp_path)
    found, _ = hg.models.load("m", folder=tmp_path)
    assert same(found, w)
    assert jax.random.key_impl(found["one"]) == jax.random.key_impl(key)
    assert jax.random.bits(found["several"][2]) == jax.random.bits(w["several"][2])


class Layer(eqx.Module):
    weight: jax.Array
    width: int = eqx.field(static=True)


Pair = namedtuple("Pair", "left right")


def test_classes_come_back_by_what_they_are_like(tmp_path):
    """None is stored: a module, a named tuple; structure and shapes of like count."""
    w = {"a": Layer(jnp.ones((2, 3)), 3), "b": Pair(jnp.zeros(2), jax.random.key(1))}
    hg.models.save("m", w, ALPHA, folder=tmp_path)
    load = lambda like=None: hg.models.load("m", folder=tmp_path, like=like)
    with pytest.raises(ValueError, match=r"w holds .*Layer, and no class .* like=\(w,"):
        load()
    zeros = lambda tree: jax.tree.map(lambda x: x * 0 if x.ndim else x, tree)
    assert same(load((zeros(w), zeros(ALPHA))), (w, ALPHA))
    assert same(load((jax.eval_shape(lambda: w), ALPHA)), (w, ALPHA))
    other = {
        "w.'a'..weight is": w | {"a": Layer(jnp.ones((3, 2)), 2)},
        "w.'c'. is not there in the model": w | {"c": ALPHA},
        "w.'b'..left is float64.2. in the model and not there in like": {"a": w["a"]},
        "w.'b'..right is key<fry>.. in the model and float64.2. in": w
        | {"b": Pair(jnp.zeros(2), jnp.zeros(2))},
    }
    for message, like in other.items():
        with pytest.raises(ValueError, match=message):
            load((like, ALPHA))
    with pytest.raises(TypeError, match=r"like must be \(w, alpha\)"):
        load(w)


def test_64_bits_are_never_cut(tmp_path):
    """JAX with 32 would; what NumPy or Python held, they hold still."""
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    hg.models.save("n", np.full(2, 0.1), 0.1, folder=tmp_path)
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"w\['bias'\] is float64, and JAX has 32"):
            hg.models.load("m", folder=tmp_path)
        assert hg.models.export("m", tmp_path / "m.npz", folder=tmp_path).version == 1
        w, alpha = hg.models.load("n", folder=tmp_path)
    assert w.tobytes() == np.full(2, 0.1).tobytes()
    assert alpha == 0.1


# What is known of it.


def test_a_model_knows_what_made_it(tmp_path):
    """Command, versions, data, what was said; shapes, and the hash of its arrays."""
    data = jnp.arange(6.0).reshape(3, 2)
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum((batch @ w - 1.0) ** 2),
        data,
        data,
    )
    trace = hg.minimize(
        problem, hg.Implicit(hg.Descent(optax.sgd(0.25), 3)), optax.sgd(0.1),
        jnp.zeros(2), jnp.ones(2), num_steps=2,
    )  # fmt: skip
    settings = {"seed": 0, "configuration": {"rate": 0.1}, "status": trace.status}
    kept = hg.models.save(
        "m", trace.w, trace.alpha, folder=tmp_path, problem=problem, run=settings,
        metrics={"loss": trace.value[-1], "nan": jnp.nan},
    )  # fmt: skip
    found = hg.models.get("m", folder=tmp_path)
    assert found == kept
    assert same(hg.models.load("m@1", folder=tmp_path), (trace.w, trace.alpha))
    assert (found.name, found.version, found.reference) == ("m", 1, "m@1")
    assert found.metrics == {"loss": float(trace.value[-1]), "nan": None}
    assert settings.items() <= found.run.items()
    assert found.run["versions"]["packages"]["jax"] == jax.__version__
    assert found.run["versions"]["git"] == provenance.source_commit(
        Path(hg.__file__).parent
    )
    assert found.leaves["w"] == {"dtype": "float64", "shape": [2], "was": "jax"}
    content = (tmp_path / "m" / "1" / "arrays.npz").read_bytes()
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    moved = hg.Bilevel(problem.inner_loss, problem.outer_loss, data, data + 1)
    other = hg.models.save("m", trace.w, trace.alpha, folder=tmp_path, problem=moved)
    assert other.run["data"] != kept.run["data"]
    assert other.sha256 == kept.sha256


def test_others_can_check_and_read_it(tmp_path):
    """coreutils by their own list of hashes; NumPy without pickle, widened."""
    w = {"W": jnp.arange(4, dtype=jnp.bfloat16) / 3, "n": jnp.array([-8, 7], jnp.int4)}
    w |= {"f": jnp.float8_e4m3fn(0.3), "key": jax.random.key(7)}
    kept = hg.models.save("m", w, {"rate": 0.1}, folder=tmp_path)
    check = ["sha256sum", "-c", "SHA256SUMS"]
    said = subprocess.check_output(check, cwd=kept.path, text=True)
    assert said == "model.json: OK\narrays.npz: OK\n"
    hg.models.export("m", tmp_path / "m.npz", folder=tmp_path)
    with np.load(tmp_path / "m.npz", allow_pickle=False) as found:
        assert set(found) == {"w['W']", "w['n']", "w['f']", "w['key']", "alpha['rate']"}
        assert found["w['W']"].dtype == np.float32
        np.testing.assert_array_equal(found["w['W']"], np.asarray(w["W"], float))
        np.testing.assert_array_equal(found["w['n']"], [-8, 7])
        assert found["w['f']"] == float(w["f"])
        np.testing.assert_array_equal(found["w['key']"], [0, 7])
        assert found["alpha['rate']"] == 0.1
    with pytest.raises(ValueError, match="is there already; give another file"):
        hg.models.export("m", tmp_path / "m.npz", folder=tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_every_small_float_and_integer_is_widened_exactly():
    """All numbers of each dtype that NumPy lacks."""
    for name in dir(ml_dtypes):
        dtype = getattr(ml_dtypes, name)
        if not isinstance(getattr(jnp, name, None), type(jnp.float32)):
            continue
        if "int" in name:
            info = jnp.iinfo(dtype)
            values = np.arange(int(info.min), int(info.max) + 1)
            found = arrays.widened(values.astype(dtype))
            np.testing.assert_array_equal(found, values)
            assert found.dtype == np.int8
        elif "float8" in name or name == "bfloat16":
            bits_of = np.uint16 if name == "bfloat16" else np.uint8
            every = np.arange(np.iinfo(bits_of).max + 1).astype(bits_of).view(dtype)
            found = arrays.widened(every)
            assert found.dtype == np.float32
            with np.errstate(invalid="ignore"):  # a NaN, and none in some dtypes
                found = found.astype(dtype)
                number = ~np.isnan(every.astype(np.float32))
            assert found[number].tobytes() == every[number].tobytes()


# Names and versions.


@pytest.mark.usefixtures("quick")
def test_versions_count_up_and_stay(tmp_path):
    """Each with its own numbers; the newest is meant where none is named."""
    for i in range(1, 12):
        assert hg.models.save("m", i, ALPHA, folder=tmp_path).version == i
        assert hg.models.load("m", folder=tmp_path)[0] == i
    hg.models.save("a.b-c_1", 0, ALPHA, folder=tmp_path)
    (tmp_path / "m" / "notes").mkdir()
    found, flaws = hg.models.find(tmp_path)
    assert [x.reference for x in found] == [
        "a.b-c_1@1",
        *(f"m@{i}" for i in range(1, 12)),
    ]
    assert not flaws
    assert [hg.models.load(f"m@{i}", folder=tmp_path)[0] for i in (1, 11)] == [1, 11]
    shutil.rmtree(tmp_path / "m" / "3")
    assert hg.models.save("m", 12, ALPHA, folder=tmp_path).version == 12


@pytest.mark.usefixtures("quick")
def test_once_takes_what_is_there_of_the_same_bits_and_run(tmp_path):
    """And nothing else; not one that is damaged."""

    def save(w=W, once=("cell", "started"), **run):
        run = {"cell": ["m", 0], "started": "noon", "command": "a", **run}
        return hg.models.save("m", w, ALPHA, folder=tmp_path, run=run, once=once)

    assert [save().version, save(command="b").version] == [1, 1]
    assert save(once=()).version == 2
    assert save(once=()).version == 3
    assert save().version == 3  # the newest of several
    assert save(started="midnight").version == 4
    assert save(W | {"bias": jnp.float64(0.5 + 2.0**-50)}).version == 5
    assert save({**W, "layers": tuple(W["layers"])}).version == 6
    assert save().version == 3
    for version in ("1", "2", "3"):
        file = tmp_path / "m" / version / "arrays.npz"
        file.write_bytes(file.read_bytes()[:-1])
    assert save().version == 7
    for once in (("seed",), "cell", 3):
        with pytest.raises(ValueError, match=r"once must be keys of run, .*, started"):
            save(once=once)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no model m in .*; there is none yet"):
        hg.models.load("m", folder=tmp_path / "nowhere")
    hg.models.save("m", 0, ALPHA, folder=tmp_path)
    hg.models.save("m", 0, ALPHA, folder=tmp_path)
    for version in ("3", "0", "-1", "01", "1.0", "", "newest", "1@2"):
        with pytest.raises(ValueError, match=f"no version '{version}' of m .* 1, 2"):
            hg.models.get(f"m@{version}", folder=tmp_path)
    with pytest.raises(ValueError, match=r"no model n in .*; there is m"):
        hg.models.export("n", tmp_path / "n.npz", folder=tmp_path)
    for name in ("", "../m", "m/1", ".m", "m n", "ü", "/m", "@1", None, 3, "m\n"):
        with pytest.raises(ValueError, match="name must be of letters"):
            hg.models.load(name, folder=tmp_path)
        with pytest.raises(ValueError, match="name must be of letters"):
            hg.models.save(name, 0, ALPHA, folder=tmp_path)
    assert hg.models.find(tmp_path / "nowhere") == ([], [])


def test_a_folder_of_another_name_or_version_is_refused(tmp_path):
    """As whose model it says that it is would be believed."""
    path = hg.models.save("m", 0, ALPHA, folder=tmp_path).path
    shutil.copytree(path, tmp_path / "m" / "2")
    shutil.copytree(path, tmp_path / "n" / "1")
    for reference in ("m@2", "n@1"):
        with pytest.raises(ValueError, match=r"says that it is m@1, .* was moved"):
            hg.models.load(reference, folder=tmp_path)
    assert len(hg.models.find(tmp_path)[1]) == 2


def test_traced_arrays_are_refused():
    def save(w):
        hg.models.save("m", w, ALPHA, folder="/proc/hypergrad")

    with pytest.raises(TypeError, match="w is traced; save outside of jit"):
        jax.jit(save)(1.0)


# Damage.


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    hg.models.save("m", W, ALPHA, folder=folder, metrics={"loss": 0.5})
    return folder


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.json", "arrays.npz"])
def test_damage_is_named_and_nothing_is_parsed(name: str, kept, monkeypatch):
    """Each of 150 flipped bytes, 50 truncations, an added byte, and the file gone."""
    file = kept / "m" / "1" / name
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    damaged = [b"", whole[:-1], whole + b"\0", whole + b"\n"]
    for place in rng.choice(len(whole), 150, replace=len(whole) < 150):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    damaged += [whole[:end] for end in rng.integers(1, len(whole), 50)]

    def parse(*_, **__):
        raise AssertionError("parsed before it was checked")

    monkeypatch.setattr(np, "load", parse)
    monkeypatch.setattr(json, "loads", parse)
    try:
        for content in damaged:
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"m/1 is damaged: .* not as it was"):
                hg.models.load("m", folder=kept)
        file.unlink()
        with pytest.raises(ValueError, match=f"m/1 is damaged: {name} cannot be read"):
            hg.models.load("m", folder=kept)
    finally:
        file.write_bytes(whole)
    monkeypatch.undo()
    assert same(hg.models.load("m", folder=kept), (W, ALPHA))


def test_what_is_no_model_is_no_traceback(kept, tmp_path):
    """Whole by its hashes, and of another making."""
    shutil.copytree(kept / "m", tmp_path / "m")
    path = tmp_path / "m" / "1"
    record = json.loads((path / "model.json").read_text())
    for said in ([], {}, record | {"w": 3}, record | {"format": 2}, "m", None):
        content = json.dumps(said).encode()
        (path / "model.json").write_bytes(content)
        sums = (path / "SHA256SUMS").read_text()
        digest = hashlib.sha256(content).hexdigest()
        (path / "SHA256SUMS").write_text(digest + sums[64:])
        with pytest.raises(ValueError, match="of format"):
            hg.models.load("m", folder=tmp_path)
        assert len(hg.models.find(tmp_path)[1]) == 1


# Writing.

MOMENTS = [
    (Path, "mkdir"), (Path, "open"), (os, "fsync"), (Path, "rename"), (os, "open"),
]  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("cleaned", [True, False])
def test_killed_at_any_moment_nothing_is_lost(cleaned: bool, tmp_path, monkeypatch):
    """At each call that touches the disk, and with or without time to clean up."""
    save = lambda w: hg.models.save("m", w, ALPHA, folder=tmp_path)
    save(W)
    before, killed = files(tmp_path), 0
    for owner, name in MOMENTS:
        for at in itertools.count():
            calls, real = itertools.count(), getattr(owner, name)

            def dies(*given, calls=calls, at=at, real=real, **named):
                if next(calls) == at:
                    raise Killed
                return real(*given, **named)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dies)
                if not cleaned:
                    patch.setattr(store, "_clear", lambda draft: None)
                try:
                    save(jnp.zeros(3))
                except Killed:
                    killed += 1
                else:
                    break
            if (tmp_path / "m" / "2").exists():  # all of it was, before it was killed
                assert same(hg.models.load("m", folder=tmp_path)[0], jnp.zeros(3))
                shutil.rmtree(tmp_path / "m" / "2")
            assert files(tmp_path) == before
            assert same(hg.models.load("m", folder=tmp_path), (W, ALPHA))
        shutil.rmtree(tmp_path / "m" / "2")
    assert killed >= 12
    assert save(W).version == 2
    assert not list((tmp_path / "m").glob(".part*"))


@pytest.mark.usefixtures("quick")
def test_saves_at_a_time_never_overwrite_each_other(tmp_path):
    """Eight threads, five saves each: forty versions, each whole and its saver's."""
    kept, errors = {}, []

    def work(thread: int) -> None:
        try:
            for i in range(5):
                number = 10 * thread + i
                model = hg.models.save("m", number, ALPHA, folder=tmp_path)
                kept[model.version] = number
        except Exception as error:  # told to the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(kept) == list(range(1, 41))
    for version, number in kept.items():
        assert hg.models.load(f"m@{version}", folder=tmp_path)[0] == number


@pytest.mark.usefixtures("quick")
def test_without_locks_a_version_is_still_not_overwritten(tmp_path, monkeypatch):
    """As on a disk of a network that has none."""
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    before = files(tmp_path)

    def none(lock, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / "m" / ".part-of-another").mkdir()  # who may be at work
    assert hg.models.save("m", 1, ALPHA, folder=tmp_path).version == 2
    assert (tmp_path / "m" / ".part-of-another").exists()
    before = files(tmp_path)
    monkeypatch.setattr(store, "_versions", lambda home: [])
    with pytest.raises(OSError, match="m could not be saved"):
        hg.models.save("m", 0, ALPHA, folder=tmp_path)
    assert files(tmp_path) == before


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_reported_and_nothing_is_lost(tmp_path):
    """No file may grow beyond 10 kB, a limit of the process."""
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    before, size = files(tmp_path), resource.RLIMIT_FSIZE
    limits = resource.getrlimit(size)
    try:
        resource.setrlimit(size, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"model m could not be saved in .*too large"):
            hg.models.save("m", jnp.ones(2_000), ALPHA, folder=tmp_path)
    finally:
        resource.setrlimit(size, limits)
    assert files(tmp_path) == before
    assert not list((tmp_path / "m").glob(".part*"))
    assert hg.models.save("m", jnp.ones(2_000), ALPHA, folder=tmp_path).version == 2


def test_a_folder_that_takes_nothing_is_reported(tmp_path, monkeypatch):
    """One that cannot be made; a read-only one, from which all can still be read."""
    with pytest.raises(OSError, match="m could not be saved in /proc/hypergrad"):
        hg.models.save("m", W, ALPHA, folder="/proc/hypergrad")
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    opens = Path.open

    def read_only(path, mode="r", *rest, **more):
        if set(mode) & set("wa+x"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opens(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(OSError, match=r"m could not be saved .*Read-only"):
        hg.models.save("m", W, ALPHA, folder=tmp_path)
    assert same(hg.models.load("m", folder=tmp_path), (W, ALPHA))
    assert len(hg.models.find(tmp_path)[0]) == 1


# The command line.


def test_the_commands(tmp_path, monkeypatch, capsys):
    """List, show and load; what is wrong is said in a line."""
    with pytest.raises(SystemExit, match=r"no model in .*; hg.models.save"):
        commands.list_models(tmp_path)
    for seed in (0, 1):
        kept = hg.models.save(
            "m", W, ALPHA, folder=tmp_path, metrics={"loss": seed + 0.25},
            run={"seed": seed, "command": "a command"},
        )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = lambda *words: monkeypatch.setattr("sys.argv", ["hypergrad", *words])
    run("models", "list", str(tmp_path))
    cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "m@1" in shown
    assert "loss 1.25" in shown
    assert "seed 1" in shown
    run("models", "show", "m@2", "--folder", str(tmp_path))
    cli.main()
    shown = "".join(capsys.readouterr().out.split())
    for fact in (kept.sha256, "float64[2,3]", "w['layers'][0]", "acommand", "loss1.25"):
        assert fact in shown
    assert f"jax{jax.__version__}" in shown
    run("models", "load", "m", "--folder", str(tmp_path))
    cli.main()
    shown = capsys.readouterr().out
    assert "m@2 is as it was written: 4 arrays, 14 numbers" in shown
    assert "wrote m-2.npz" in shown
    with np.load(tmp_path / "m-2.npz", allow_pickle=False) as found:
        np.testing.assert_array_equal(found["alpha"], ALPHA)
    for words in (("load", "m"), ("load", "n"), ("show", "m@3"), ("show", "m n")):
        run("models", *words, "--folder", str(tmp_path))
        with pytest.raises(SystemExit, match="hypergrad: "):
            cli.main()
    (tmp_path / "m" / "1" / "model.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"m/1 is damaged: model\.json"):
        commands.list_models(tmp_path)
    assert "m@2" in capsys.readouterr().out
