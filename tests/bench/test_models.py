"""Saved models are restored to the bit, or an error names the damaged file."""

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
    """Stands for a kill: no code catches it."""


def leaf_bits(tree) -> list:
    """Returns type, dtype, shape and bytes of every leaf; keys count as their data."""

    def per_leaf(leaf):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        )
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return type(leaf), str(jnp.asarray(leaf).dtype), array.shape, array.tobytes()

    return [per_leaf(leaf) for leaf in jax.tree.leaves(tree)]


def are_same(actual, expected) -> bool:
    """Returns True if structure, types and bits of two trees agree."""
    has_same_structure = jax.tree.structure(actual) == jax.tree.structure(expected)
    return has_same_structure and leaf_bits(actual) == leaf_bits(expected)


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files, except drafts, which start with a dot."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.parts)
    }


@pytest.fixture
def without_versions(monkeypatch) -> None:
    """Skips the look-up of package versions in each of many saves."""
    monkeypatch.setattr(store, "versions", lambda: {"packages": {}})


# Trees.

DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"),
]


@pytest.mark.usefixtures("without_versions")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", ["jax", "numpy"])
def test_every_dtype_is_restored_to_the_bit(kind: str, name: str, tmp_path):
    """Arbitrary bits include NaNs with a payload, infinities, -0.0 and subnormals."""
    dtype = jnp.dtype(name)
    raw = np.random.default_rng(0).integers(0, 256, (6, 8, dtype.itemsize), np.uint8)
    if name in ("bool", "int4", "uint4"):
        raw &= 1 if name == "bool" else 7
    leaf = raw.reshape(6, -1).view(dtype)
    w = {"a": leaf, "none": leaf[:0], "scalar": leaf[0, 0], "transposed": leaf.T}
    if kind == "jax":
        w = jax.tree.map(jnp.asarray, w)
        assert np.asarray(w["a"]).tobytes() == leaf.tobytes()  # JAX holds these bits
    else:
        w["scalar"] = np.asarray(w["scalar"])
    hg.models.save("m", w, ALPHA, folder=tmp_path)
    w_loaded, alpha = hg.models.load("m", folder=tmp_path)
    assert are_same(w_loaded, w)
    assert are_same(alpha, ALPHA)
    assert all(x.dtype == dtype for x in jax.tree.leaves(w_loaded))


@pytest.mark.usefixtures("without_versions")
def test_nested_containers_and_numbers_are_restored(tmp_path):
    """Keys may contain any character, and a tree may be a single leaf."""
    alpha = {
        "a/b": (1.5, [2, True], None, {}),
        "": {3: jnp.ones(2), 1: np.float32(0.1)},
        "a'] @\n\0ü": [(), (jnp.zeros((2, 0)),), 1j],
    }
    for w in (0.1, jnp.ones(()), [jnp.ones(2), None], (W,)):
        hg.models.save("m", w, alpha, folder=tmp_path)
        loaded = hg.models.load("m", folder=tmp_path)
        expected = jax.tree.map(
            lambda x: np.asarray(x) if isinstance(x, np.generic) else x, (w, alpha)
        )
        assert are_same(loaded, expected)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_prng_keys_are_restored(impl: str, tmp_path):
    """Restored keys give the same random numbers."""
    key = jax.random.key(3, impl=impl)
    w = {"key": key, "keys": jax.random.split(key, 4), "w": jnp.ones(2)}
    hg.models.save("m", w, ALPHA, folder=tmp_path)
    w_loaded, _ = hg.models.load("m", folder=tmp_path)
    assert are_same(w_loaded, w)
    assert jax.random.key_impl(w_loaded["key"]) == jax.random.key_impl(key)
    assert jax.random.bits(w_loaded["keys"][2]) == jax.random.bits(w["keys"][2])


class Layer(eqx.Module):
    weight: jax.Array
    width: int = eqx.field(static=True)


Pair = namedtuple("Pair", "left right")


def test_other_classes_are_restored_with_like(tmp_path):
    """Modules and named tuples need ``like``; its structure and shapes are checked."""
    w = {"a": Layer(jnp.ones((2, 3)), 3), "b": Pair(jnp.zeros(2), jax.random.key(1))}
    hg.models.save("m", w, ALPHA, folder=tmp_path)
    load = lambda like=None: hg.models.load("m", folder=tmp_path, like=like)
    with pytest.raises(ValueError, match="like"):
        load()
    zeros = lambda tree: jax.tree.map(lambda x: x * 0 if x.ndim else x, tree)
    assert are_same(load((zeros(w), zeros(ALPHA))), (w, ALPHA))
    assert are_same(load((jax.eval_shape(lambda: w), ALPHA)), (w, ALPHA))
    others = {
        "'a'": w | {"a": Layer(jnp.ones((3, 2)), 2)},
        "'c'": w | {"c": ALPHA},
        "'b'..left": {"a": w["a"]},
        "'b'..right": w | {"b": Pair(jnp.zeros(2), jnp.zeros(2))},
    }
    for leaf, like in others.items():
        with pytest.raises(ValueError, match=leaf):
            load((like, ALPHA))
    with pytest.raises(TypeError, match="like"):
        load(w)


def test_64_bits_are_never_truncated(tmp_path):
    """Without x64, JAX would truncate them; NumPy and Python leaves are unaffected."""
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    hg.models.save("n", np.full(2, 0.1), 0.1, folder=tmp_path)
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match=r"w\['bias'\]"):
            hg.models.load("m", folder=tmp_path)
        assert hg.models.export("m", tmp_path / "m.npz", folder=tmp_path).version == 1
        w, alpha = hg.models.load("n", folder=tmp_path)
    assert w.tobytes() == np.full(2, 0.1).tobytes()
    assert alpha == 0.1


# Metadata.


def test_metadata_contain_the_origin_of_a_model(tmp_path):
    """They contain command, versions, data, shapes and the SHA-256 of the arrays."""
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
    saved = hg.models.save(
        "m", trace.w, trace.alpha, folder=tmp_path, problem=problem, run=settings,
        metrics={"loss": trace.value[-1], "nan": jnp.nan},
    )  # fmt: skip
    model = hg.models.get("m", folder=tmp_path)
    assert model == saved
    assert are_same(hg.models.load("m@1", folder=tmp_path), (trace.w, trace.alpha))
    assert (model.name, model.version, model.reference) == ("m", 1, "m@1")
    assert model.metrics == {"loss": float(trace.value[-1]), "nan": None}
    assert settings.items() <= model.run.items()
    assert model.run["versions"]["packages"]["jax"] == jax.__version__
    assert model.run["versions"]["git"] == provenance.source_commit(
        Path(hg.__file__).parent
    )
    assert model.leaves["w"] == {"dtype": "float64", "shape": [2], "was": "jax"}
    content = (tmp_path / "m" / "1" / "arrays.npz").read_bytes()
    assert model.sha256 == hashlib.sha256(content).hexdigest()
    other_problem = hg.Bilevel(problem.inner_loss, problem.outer_loss, data, data + 1)
    other = hg.models.save(
        "m", trace.w, trace.alpha, folder=tmp_path, problem=other_problem
    )
    assert other.run["data"] != saved.run["data"]
    assert other.sha256 == saved.sha256


def test_files_can_be_checked_and_read_without_hypergrad(tmp_path):
    """sha256sum checks them, and NumPy reads the exported arrays without pickle."""
    w = {"W": jnp.arange(4, dtype=jnp.bfloat16) / 3, "n": jnp.array([-8, 7], jnp.int4)}
    w |= {"f": jnp.float8_e4m3fn(0.3), "key": jax.random.key(7)}
    model = hg.models.save("m", w, {"rate": 0.1}, folder=tmp_path)
    check = ["sha256sum", "-c", "SHA256SUMS"]
    output = subprocess.check_output(check, cwd=model.path, text=True)
    assert output == "model.json: OK\narrays.npz: OK\n"
    hg.models.export("m", tmp_path / "m.npz", folder=tmp_path)
    with np.load(tmp_path / "m.npz", allow_pickle=False) as exported:
        assert set(exported) == {
            "w['W']",
            "w['n']",
            "w['f']",
            "w['key']",
            "alpha['rate']",
        }
        assert exported["w['W']"].dtype == np.float32
        np.testing.assert_array_equal(exported["w['W']"], np.asarray(w["W"], float))
        np.testing.assert_array_equal(exported["w['n']"], [-8, 7])
        assert exported["w['f']"] == float(w["f"])
        np.testing.assert_array_equal(exported["w['key']"], [0, 7])
        assert exported["alpha['rate']"] == 0.1
    with pytest.raises(ValueError, match="path"):
        hg.models.export("m", tmp_path / "m.npz", folder=tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_dtypes_unknown_to_numpy_are_widened_exactly():
    """Checks all numbers of each dtype."""
    for name in dir(ml_dtypes):
        dtype = getattr(ml_dtypes, name)
        if not isinstance(getattr(jnp, name, None), type(jnp.float32)):
            continue
        if "int" in name:
            info = jnp.iinfo(dtype)
            values = np.arange(int(info.min), int(info.max) + 1)
            widened = arrays.widen_dtype(values.astype(dtype))
            np.testing.assert_array_equal(widened, values)
            assert widened.dtype == np.int8
        elif "float8" in name or name == "bfloat16":
            bits_dtype = np.uint16 if name == "bfloat16" else np.uint8
            values = (
                np.arange(np.iinfo(bits_dtype).max + 1).astype(bits_dtype).view(dtype)
            )
            widened = arrays.widen_dtype(values)
            assert widened.dtype == np.float32
            with np.errstate(invalid="ignore"):  # a NaN, and none in some dtypes
                widened = widened.astype(dtype)
                is_number = ~np.isnan(values.astype(np.float32))
            assert widened[is_number].tobytes() == values[is_number].tobytes()


# Names and versions.


@pytest.mark.usefixtures("without_versions")
def test_versions_increase_and_are_never_reused(tmp_path):
    """A reference without a version is the newest one."""
    for i in range(1, 12):
        assert hg.models.save("m", i, ALPHA, folder=tmp_path).version == i
        assert hg.models.load("m", folder=tmp_path)[0] == i
    hg.models.save("a.b-c_1", 0, ALPHA, folder=tmp_path)
    (tmp_path / "m" / "notes").mkdir()
    models, errors = hg.models.find(tmp_path)
    assert [x.reference for x in models] == [
        "a.b-c_1@1",
        *(f"m@{i}" for i in range(1, 12)),
    ]
    assert not errors
    assert [hg.models.load(f"m@{i}", folder=tmp_path)[0] for i in (1, 11)] == [1, 11]
    shutil.rmtree(tmp_path / "m" / "3")
    assert hg.models.save("m", 12, ALPHA, folder=tmp_path).version == 12


@pytest.mark.usefixtures("without_versions")
def test_deduplicate_by_returns_the_version_with_equal_bits_and_run(tmp_path):
    """A damaged version is not returned."""

    def save(w=W, deduplicate_by=("cell", "started"), **run):
        run = {"cell": ["m", 0], "started": "noon", "command": "a", **run}
        return hg.models.save(
            "m", w, ALPHA, folder=tmp_path, run=run, deduplicate_by=deduplicate_by
        )

    assert [save().version, save(command="b").version] == [1, 1]
    assert save(deduplicate_by=()).version == 2
    assert save(deduplicate_by=()).version == 3
    assert save().version == 3  # the newest of several
    assert save(started="midnight").version == 4
    assert save(W | {"bias": jnp.float64(0.5 + 2.0**-50)}).version == 5
    assert save({**W, "layers": tuple(W["layers"])}).version == 6
    assert save().version == 3
    for version in ("1", "2", "3"):
        file = tmp_path / "m" / version / "arrays.npz"
        file.write_bytes(file.read_bytes()[:-1])
    assert save().version == 7
    for keys in (("seed",), "cell", 3):
        with pytest.raises(ValueError, match="deduplicate_by"):
            save(deduplicate_by=keys)


def test_missing_models_and_invalid_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reference"):
        hg.models.load("m", folder=tmp_path / "nowhere")
    hg.models.save("m", 0, ALPHA, folder=tmp_path)
    hg.models.save("m", 0, ALPHA, folder=tmp_path)
    for version in ("3", "0", "-1", "01", "1.0", "", "newest", "1@2"):
        with pytest.raises(ValueError, match="reference"):
            hg.models.get(f"m@{version}", folder=tmp_path)
    with pytest.raises(ValueError, match="reference"):
        hg.models.export("n", tmp_path / "n.npz", folder=tmp_path)
    for name in ("", "../m", "m/1", ".m", "m n", "ü", "/m", "@1", None, 3, "m\n"):
        with pytest.raises(ValueError, match="name"):
            hg.models.load(name, folder=tmp_path)
        with pytest.raises(ValueError, match="name"):
            hg.models.save(name, 0, ALPHA, folder=tmp_path)
    assert hg.models.find(tmp_path / "nowhere") == ([], [])


def test_moved_folders_are_refused(tmp_path):
    """The record contains the name and version under which it was written."""
    path = hg.models.save("m", 0, ALPHA, folder=tmp_path).path
    shutil.copytree(path, tmp_path / "m" / "2")
    shutil.copytree(path, tmp_path / "n" / "1")
    for reference in ("m@2", "n@1"):
        with pytest.raises(ValueError, match="m@1"):
            hg.models.load(reference, folder=tmp_path)
    assert len(hg.models.find(tmp_path)[1]) == 2


def test_traced_arrays_are_refused():
    def save(w):
        hg.models.save("m", w, ALPHA, folder="/proc/hypergrad")

    with pytest.raises(TypeError, match="w must be concrete"):
        jax.jit(save)(1.0)


# Damage.


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    hg.models.save("m", W, ALPHA, folder=folder, metrics={"loss": 0.5})
    return folder


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.json", "arrays.npz"])
def test_damaged_files_are_named_and_not_parsed(name: str, saved_folder, monkeypatch):
    """Checks 150 flipped bits, 50 truncations, an added byte and a missing file."""
    file = saved_folder / "m" / "1" / name
    original, rng = file.read_bytes(), np.random.default_rng(0)
    damaged = [b"", original[:-1], original + b"\0", original + b"\n"]
    for position in rng.choice(len(original), 150, replace=len(original) < 150):
        flipped = bytearray(original)
        flipped[position] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    damaged += [original[:end] for end in rng.integers(1, len(original), 50)]

    def parse(*_, **__):
        raise AssertionError("parsed before it was checked")

    monkeypatch.setattr(np, "load", parse)
    monkeypatch.setattr(json, "loads", parse)
    try:
        for content in damaged:
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"m/1 is damaged"):
                hg.models.load("m", folder=saved_folder)
        file.unlink()
        with pytest.raises(ValueError, match=f"m/1 is damaged: {name}"):
            hg.models.load("m", folder=saved_folder)
    finally:
        file.write_bytes(original)
    monkeypatch.undo()
    assert are_same(hg.models.load("m", folder=saved_folder), (W, ALPHA))


def test_records_of_another_format_are_refused(saved_folder, tmp_path):
    """Their SHA-256 is correct."""
    shutil.copytree(saved_folder / "m", tmp_path / "m")
    path = tmp_path / "m" / "1"
    record = json.loads((path / "model.json").read_text())
    for record_content in (
        [],
        {},
        record | {"w": 3},
        record | {"format": 2},
        "m",
        None,
    ):
        content = json.dumps(record_content).encode()
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


@pytest.mark.usefixtures("without_versions")
@pytest.mark.parametrize("has_time_to_clean_up", [True, False])
def test_kill_at_any_file_operation_loses_nothing(
    has_time_to_clean_up: bool, tmp_path, monkeypatch
):
    """The process may or may not have time to clean up."""
    save = lambda w: hg.models.save("m", w, ALPHA, folder=tmp_path)
    save(W)
    before, killed = read_files(tmp_path), 0
    for owner, name in MOMENTS:
        for call in itertools.count():
            calls, function = itertools.count(), getattr(owner, name)

            def die(*args, calls=calls, call=call, function=function, **kwargs):
                if next(calls) == call:
                    raise Killed
                return function(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, die)
                if not has_time_to_clean_up:
                    patch.setattr(store, "_remove_draft", lambda draft: None)
                try:
                    save(jnp.zeros(3))
                except Killed:
                    killed += 1
                else:
                    break
            if (tmp_path / "m" / "2").exists():  # all of it was, before it was killed
                assert are_same(hg.models.load("m", folder=tmp_path)[0], jnp.zeros(3))
                shutil.rmtree(tmp_path / "m" / "2")
            assert read_files(tmp_path) == before
            assert are_same(hg.models.load("m", folder=tmp_path), (W, ALPHA))
        shutil.rmtree(tmp_path / "m" / "2")
    assert killed >= 12
    assert save(W).version == 2
    assert not list((tmp_path / "m").glob(".part*"))


@pytest.mark.usefixtures("without_versions")
def test_concurrent_saves_never_overwrite_each_other(tmp_path):
    """Eight threads save five versions each."""
    numbers, errors = {}, []

    def work(thread: int) -> None:
        try:
            for i in range(5):
                number = 10 * thread + i
                model = hg.models.save("m", number, ALPHA, folder=tmp_path)
                numbers[model.version] = number
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(numbers) == list(range(1, 41))
    for version, number in numbers.items():
        assert hg.models.load(f"m@{version}", folder=tmp_path)[0] == number


@pytest.mark.usefixtures("without_versions")
def test_versions_are_not_overwritten_without_file_locks(tmp_path, monkeypatch):
    """Some network file systems do not support locks."""
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    before = read_files(tmp_path)

    def none(lock, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    (tmp_path / "m" / ".part-of-another").mkdir()  # may be in use
    assert hg.models.save("m", 1, ALPHA, folder=tmp_path).version == 2
    assert (tmp_path / "m" / ".part-of-another").exists()
    before = read_files(tmp_path)
    monkeypatch.setattr(store, "_list_versions", lambda home: [])
    with pytest.raises(OSError, match="m could not be saved"):
        hg.models.save("m", 0, ALPHA, folder=tmp_path)
    assert read_files(tmp_path) == before


@pytest.mark.usefixtures("without_versions")
def test_full_disk_is_reported_and_loses_nothing(tmp_path):
    """A limit of the process keeps files below 10 kB."""
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    before, size = read_files(tmp_path), resource.RLIMIT_FSIZE
    limits = resource.getrlimit(size)
    try:
        resource.setrlimit(size, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"model m could not be saved in .*too large"):
            hg.models.save("m", jnp.ones(2_000), ALPHA, folder=tmp_path)
    finally:
        resource.setrlimit(size, limits)
    assert read_files(tmp_path) == before
    assert not list((tmp_path / "m").glob(".part*"))
    assert hg.models.save("m", jnp.ones(2_000), ALPHA, folder=tmp_path).version == 2


def test_read_only_folder_is_reported_and_can_be_read(tmp_path, monkeypatch):
    """The folder cannot be created, or no file can be written in it."""
    with pytest.raises(OSError, match="m could not be saved in /proc/hypergrad"):
        hg.models.save("m", W, ALPHA, folder="/proc/hypergrad")
    hg.models.save("m", W, ALPHA, folder=tmp_path)
    path_open = Path.open

    def read_only(path, mode="r", *args, **kwargs):
        if set(mode) & set("wa+x"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return path_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(OSError, match=r"m could not be saved .*Read-only"):
        hg.models.save("m", W, ALPHA, folder=tmp_path)
    assert are_same(hg.models.load("m", folder=tmp_path), (W, ALPHA))
    assert len(hg.models.find(tmp_path)[0]) == 1


# The command line.


def test_commands_list_show_and_load(tmp_path, monkeypatch, capsys):
    """Errors exit with one line."""
    with pytest.raises(SystemExit, match="no model in"):
        commands.list_models(tmp_path)
    for seed in (0, 1):
        model = hg.models.save(
            "m", W, ALPHA, folder=tmp_path, metrics={"loss": seed + 0.25},
            run={"seed": seed, "command": "a command"},
        )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = lambda *words: monkeypatch.setattr("sys.argv", ["hypergrad", *words])
    run("models", "list", str(tmp_path))
    cli.main()
    output = " ".join(capsys.readouterr().out.split())
    assert "m@1" in output
    assert "loss 1.25" in output
    assert "seed 1" in output
    run("models", "show", "m@2", "--folder", str(tmp_path))
    cli.main()
    output = "".join(capsys.readouterr().out.split())
    for text in (
        model.sha256,
        "float64[2,3]",
        "w['layers'][0]",
        "acommand",
        "loss1.25",
    ):
        assert text in output
    assert f"jax{jax.__version__}" in output
    run("models", "load", "m", "--folder", str(tmp_path))
    cli.main()
    output = capsys.readouterr().out
    assert "4 arrays, 14 numbers" in output
    assert "wrote m-2.npz" in output
    with np.load(tmp_path / "m-2.npz", allow_pickle=False) as exported:
        np.testing.assert_array_equal(exported["alpha"], ALPHA)
    for words in (("load", "m"), ("load", "n"), ("show", "m@3"), ("show", "m n")):
        run("models", *words, "--folder", str(tmp_path))
        with pytest.raises(SystemExit, match="hypergrad: "):
            cli.main()
    (tmp_path / "m" / "1" / "model.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"m/1 is damaged: model\.json"):
        commands.list_models(tmp_path)
    assert "m@2" in capsys.readouterr().out
