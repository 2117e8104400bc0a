"""Saved models: every bit comes back, versions stay, and damage is found."""

import concurrent.futures
import importlib.metadata
import json
import multiprocessing
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import hypergrad as hg
from hypergrad import models
from hypergrad.runtime import atomic_io, provenance
from hypergrad.runtime.compat import enable_x64
from hypergrad.trees import is_key

W = {"W": jnp.arange(6.0).reshape(2, 3), "b": [jnp.zeros(3), (jnp.ones(()),)]}
DTYPES = (
    "bool", "int8", "uint16", "int64", "float16", "bfloat16", "float8_e4m3fn",
    "float32", "float64", "complex64",
)  # fmt: skip
Point = namedtuple("Point", "x y")


def to_bits(tree) -> list:
    """Returns dtype, shape and bytes of every leaf."""
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(tree)]
    arrays = [np.asarray(leaf) for leaf in leaves]
    return [(x.dtype, x.shape, x.tobytes()) for x in arrays]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_to_the_bit(name: str, tmp_path):
    generator = np.random.default_rng(0)
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    values = generator.integers(0, 2, (3, 2)) if name == "bool" else generator.normal(
        size=(3, 2)
    )  # fmt: skip
    w = values.astype(dtype)
    models.save("m", w, w[:0], folder=tmp_path)
    assert to_bits(models.load("m", folder=tmp_path)) == to_bits((w, w[:0]))


def test_containers_come_back_as_they_were(tmp_path):
    alpha = {"rate": 0.1, "none": None, "empty": {}}
    models.save("m", W, alpha, folder=tmp_path)
    w, read_alpha = models.load("m", folder=tmp_path)
    assert jax.tree.structure((w, read_alpha)) == jax.tree.structure((W, alpha))
    assert to_bits(w) == to_bits(W)
    assert read_alpha["rate"] == 0.1


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_prng_keys_come_back_as_keys(impl: str, tmp_path):
    key = jax.random.key(3, impl=impl)
    models.save("m", {"key": key}, 0.0, folder=tmp_path)
    w, _ = models.load("m", folder=tmp_path)
    assert jax.random.key_impl(w["key"]) == jax.random.key_impl(key)
    assert to_bits(w) == to_bits({"key": key})


def test_other_classes_need_like(tmp_path):
    w = Point(jnp.ones(2), jnp.zeros(1))
    models.save("m", w, 0.5, folder=tmp_path)
    with pytest.raises(ValueError, match="like"):
        models.load("m", folder=tmp_path)
    with pytest.raises(ValueError, match="like"):
        models.load("m", like=(0.0, 0.0), folder=tmp_path)
    read_w, _ = models.load("m", like=(w, 0.0), folder=tmp_path)
    assert isinstance(read_w, Point)
    assert to_bits(read_w) == to_bits(w)


def test_64_bits_survive_a_process_of_32(tmp_path):
    w = np.asarray([1.0 + 2.0**-40])
    with enable_x64(False):
        models.save("m", w, np.int64(2**40), folder=tmp_path)
        assert to_bits(models.load("m", folder=tmp_path)) == to_bits(
            (w, np.int64(2**40))
        )


def test_the_metadata_say_what_made_the_model(tmp_path):
    loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    problem = hg.Bilevel(loss, loss, jnp.arange(3.0), None)
    options = {"metrics": {"loss": 0.5, "worst": np.inf}, "run": {"seed": 1}}
    model = models.save("m", 1.0, 2.0, folder=tmp_path, problem=problem, **options)
    assert models.get("m", folder=tmp_path) == model
    assert model.metrics == {"loss": 0.5, "worst": None}
    assert model.run == {"seed": 1}
    assert "jax" in model.record["versions"]["packages"]
    other = hg.Bilevel(loss, loss, jnp.arange(4.0), None)
    again = models.save("m", 1.0, 2.0, folder=tmp_path, problem=other)
    assert again.record["data"] != model.record["data"]


def test_nothing_of_the_command_line_or_the_environment_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["train.py", "--token=SECRET"])
    monkeypatch.setenv("TOKEN", "SECRET")
    models.save("m", 1.0, 2.0, folder=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(b"SECRET" in path.read_bytes() for path in files)


def test_versions_increase_and_the_newest_is_loaded(tmp_path):
    for number in (1, 2, 3):
        model = models.save("m", float(number), 0.0, folder=tmp_path)
        assert model.reference == f"m@{number}"
    assert models.load("m", folder=tmp_path)[0] == 3.0
    assert models.load("m@1", folder=tmp_path)[0] == 1.0
    found, errors = models.find(tmp_path)
    assert [model.reference for model in found] == ["m@1", "m@2", "m@3"]
    assert not errors


@pytest.mark.parametrize("reference", ["absent", "m@2", "m@x", "../m", "", "m@"])
def test_missing_models_and_invalid_names_are_refused(reference, tmp_path):
    models.save("m", 1.0, 0.0, folder=tmp_path)
    with pytest.raises(ValueError, match=r"model|name"):
        models.load(reference, folder=tmp_path)


def test_a_reference_is_text(tmp_path):
    model = models.save("m", 1.0, 0.0, folder=tmp_path)
    with pytest.raises(TypeError, match="attribute reference"):
        models.load(model, folder=tmp_path)


def test_a_metric_beyond_floating_point_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="metrics"):
        models.save("m", 1.0, 0.0, folder=tmp_path, metrics={"loss": 10**400})


def test_traced_arrays_are_refused(tmp_path):
    save = lambda w: models.save("m", w, 0.0, folder=tmp_path)
    with pytest.raises(TypeError, match="outside"):
        jax.jit(save)(1.0)
    assert models.find(tmp_path) == ([], [])


def test_every_flipped_bit_is_found(tmp_path):
    model = models.save("m", W, 0.5, folder=tmp_path)
    generator = np.random.default_rng(0)
    for path in sorted(x for x in model.path.rglob("*") if x.is_file()):
        content = path.read_bytes()
        for _ in range(5):
            damaged = bytearray(content)
            if damaged:
                bit = int(generator.integers(8 * len(damaged)))
                damaged[bit // 8] ^= 1 << bit % 8
            else:
                damaged = bytearray(b"x")
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"damaged|read"):
                models.load("m", folder=tmp_path)
        path.write_bytes(content)
    assert to_bits(models.load("m", folder=tmp_path)[0]) == to_bits(W)


def test_a_further_file_is_no_damage(tmp_path):
    """As a desktop or a file system writes it."""
    model = models.save("m", W, 0.5, folder=tmp_path)
    for folder in [x for x in model.path.rglob("*") if x.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"x")
    assert to_bits(models.load("m", folder=tmp_path)[0]) == to_bits(W)


def test_a_missing_file_and_a_moved_folder_are_found(tmp_path):
    model = models.save("m", W, 0.5, folder=tmp_path)
    model.path.rename(tmp_path / "m" / "7")
    with pytest.raises(ValueError, match="moved"):
        models.load("m", folder=tmp_path)
    (tmp_path / "m" / "7").rename(model.path)
    next(x for x in (model.path / "arrays").rglob("*") if x.is_file()).unlink()
    with pytest.raises(ValueError, match="damaged"):
        models.load("m", folder=tmp_path)


def test_damaged_metadata_do_not_hide_other_models(tmp_path):
    models.save("a", 1.0, 0.0, folder=tmp_path)
    models.save("b", 1.0, 0.0, folder=tmp_path)
    record = tmp_path / "a" / "1" / "model.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"metrics": {"loss": 0.0}}))
    found, errors = models.find(tmp_path)
    assert [model.reference for model in found] == ["b@1"]
    assert len(errors) == 1


def list_tree(folder: Path) -> dict[str, bytes | None]:
    """Returns the content of every file below a folder, and None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(x): x.read_bytes() if x.is_file() else None for x in paths}


@pytest.mark.parametrize("error", [OSError(28, "No space"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "function",
    [
        "models.write_arrays", "models.digest_folder", "runtime.atomic_io.fsync_tree",
        "runtime.atomic_io.atomic_write", "runtime.atomic_io.fsync_path",
    ],
)  # fmt: skip
@pytest.mark.parametrize("files", [[], ["m/notes.txt"], ["notes.txt", "m/1/mine"]])
def test_a_failed_save_leaves_the_folder_as_it_was(
    files, function, error, tmp_path, monkeypatch
):
    """Wherever it fails, with and without files of others; a retry succeeds."""
    folder = tmp_path / "runs" / "models"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = list_tree(tmp_path)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"hypergrad.{function}", fail)
        with pytest.raises(type(error)):
            models.save("m", 1.0, 0.0, folder=folder)
    assert list_tree(tmp_path) == before
    model = models.save("m", 1.0, 0.0, folder=folder)
    assert models.load(model.reference, folder=folder)[0] == 1.0
    assert before.items() <= list_tree(tmp_path).items()


@pytest.mark.parametrize("step", ["mkdir", "rename"])
def test_a_failed_save_leaves_no_folder_if_the_system_refuses(
    step, tmp_path, monkeypatch
):
    """As above, for the calls that create the draft and its final name."""
    folder = tmp_path / "models"
    method = getattr(Path, step)

    def refuse(path, *args, **options):
        if path.name.startswith(".draft"):
            raise OSError(28, "No space left on device")
        return method(path, *args, **options)

    monkeypatch.setattr(Path, step, refuse)
    with pytest.raises(OSError, match="No space"):
        models.save("m", 1.0, 0.0, folder=folder)
    assert not list_tree(tmp_path)


def test_an_error_after_the_rename_leaves_no_version(tmp_path, monkeypatch):
    """The name of the version is not known to be on disk."""
    models.save("m", 1.0, 0.0, folder=tmp_path)
    before = list_tree(tmp_path)
    fsync_path = atomic_io.fsync_path

    def fail(path):
        if (tmp_path / "m" / "2").exists():
            raise OSError(28, "No space left on device")
        fsync_path(path)

    monkeypatch.setattr("hypergrad.runtime.atomic_io.fsync_path", fail)
    with pytest.raises(OSError, match="No space"):
        models.save("m", 2.0, 0.0, folder=tmp_path)
    assert list_tree(tmp_path) == before


def test_a_failed_save_leaves_the_draft_of_another_process(tmp_path, monkeypatch):
    """It appears in a folder that the failing call made."""
    other_file = tmp_path / "models" / "m" / ".draft-other" / "file"

    def fail(*_):
        other_file.parent.mkdir()
        other_file.write_text("theirs")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hypergrad.models.write_arrays", fail)
    with pytest.raises(OSError, match="No space"):
        models.save("m", 1.0, 0.0, folder=tmp_path / "models")
    assert other_file.read_text() == "theirs"
    assert [x.name for x in (tmp_path / "models" / "m").iterdir()] == [".draft-other"]


def test_foreign_files_in_the_folder_stay(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    (tmp_path / "m" / "0").mkdir()
    models.save("m", 1.0, 0.0, folder=tmp_path)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert len(models.find(tmp_path)[0]) == 1


def save_three(folder: Path, number: float) -> list[str]:
    """Saves three models; runs in a process of its own."""
    return [models.save("m", number, 0.0, folder=folder).reference for _ in range(3)]


def test_processes_that_save_at_once_get_versions_of_their_own(tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(save_three, tmp_path, float(i)) for i in range(2)]
        references = [future.result() for future in futures]
    assert sorted([*references[0], *references[1]]) == [f"m@{i}" for i in range(1, 7)]
    for number, own in enumerate(references):
        for reference in own:
            assert models.load(reference, folder=tmp_path)[0] == number


def test_like_with_other_names_of_the_same_shapes_is_refused(tmp_path):
    """Leaves are matched by their order, which names decide."""
    models.save("m", {"decoder": W["W"], "encoder": W["W"]}, 0.0, folder=tmp_path)
    like = {"encoder": W["W"], "output": W["W"]}, 0.0
    with pytest.raises(ValueError, match=r"leaf .*\['encoder'\].* in place of"):
        models.load("m", like=like, folder=tmp_path)
    like = {"decoder": W["W"], "encoder": W["W"]}, 0.0
    assert set(models.load("m", like=like, folder=tmp_path)[0]) == set(like[0])


def test_a_dictionary_with_numbers_as_keys_needs_like(tmp_path):
    w = {0: W["W"], 1: W["W"]}
    models.save("m", w, 0.0, folder=tmp_path)
    with pytest.raises(ValueError, match="dictionaries with strings as keys"):
        models.load("m", folder=tmp_path)
    assert to_bits(models.load("m", like=(w, 0.0), folder=tmp_path)[0]) == to_bits(w)


def test_the_recorded_version_is_that_of_the_first_folder(monkeypatch):
    """Python imports a package from there; an entry without a version is broken."""
    package = namedtuple("package", "name version")
    installed = [package("Numpy", "9.0"), package("numpy", "10.0"), package("x", None)]
    distributions = lambda path: iter(installed)
    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    assert provenance.packages() == {"numpy": "9.0"}


sample = lambda x, key: (x * jax.random.normal(key), None)
DATA_FNS = {
    "constant": lambda x: jax.tree_util.Partial(lambda key: sample(x, key)),
    "array": lambda x: jax.tree_util.Partial(sample, jnp.full(3, x)),
}


@pytest.mark.parametrize("kind", DATA_FNS)
def test_a_model_of_other_data_of_a_function_has_another_digest(kind, tmp_path):
    """The program of functions of one name shows its constants, but no arrays."""
    loss = lambda w, alpha, batch: w * alpha
    digests = []
    for x in (1.0, 5.0, 1.0):
        problem = hg.Bilevel(loss, loss, data_fn=DATA_FNS[kind](x))
        model = models.save("m", 1.0, 2.0, folder=tmp_path, problem=problem)
        digests.append(model.record["data"])
    assert digests[0] != digests[1]
    assert digests[0] == digests[2]


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**63, 2**64 - 1])
def test_integers_of_64_bits_come_back(number, tmp_path):
    models.save("m", number, 0.0, folder=tmp_path)
    assert int(models.load("m", folder=tmp_path)[0]) == number


class FolderPath:
    """A path that is neither a string nor of pathlib, as that of cloud libraries."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


def test_a_folder_is_any_path(tmp_path):
    """But not an empty one, which would be the working directory, or bytes."""
    folder = FolderPath(str(tmp_path / "models"))
    models.save("m", 1.0, 0.0, folder=folder)
    assert models.load("m", folder=folder)[0] == 1.0
    assert len(models.find(folder)[0]) == 1
    for wrong in ("", b"models", 3, None, FolderPath(b"models"), FolderPath("")):
        with pytest.raises(TypeError, match="folder"):
            models.find(wrong)
