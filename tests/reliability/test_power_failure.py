"""Files after a power failure, on a disk that keeps only what `os.fsync` wrote."""

import os
from pathlib import Path

import jax.numpy as jnp
import pytest

import hypergrad as hg
from hypergrad import checkpoint, models
from hypergrad.bench import MeasurementTable
from hypergrad.bench.loading import TableRef
from hypergrad.bench.rows import read_rows
from hypergrad.bench.runner import RunOptions, run_table
from hypergrad.checkpoint import CheckpointFolder
from hypergrad.runtime import atomic_io


class Disk:
    """Bytes of files and names in folders as they were at their last fsync.

    POSIX allows everything else to be lost.

    Attributes:
      root: The folder that is on the disk.
      content: Bytes or names by inode, as they are on the disk.
      history: ``content`` after each call of fsync.
    """

    def __init__(self, root: Path):
        self.root, self.content, self.history = root, {root.stat().st_ino: {}}, []
        self.descriptors: list[int] = []

    def fsync(self, descriptor: int) -> None:
        """Replaces ``os.fsync``; an open descriptor prevents the reuse of its inode."""
        descriptor = os.dup(descriptor)
        self.descriptors.append(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_dir():
            content = {x.name: x.stat().st_ino for x in path.iterdir()}
        else:
            content = path.read_bytes()
        self.content[os.fstat(descriptor).st_ino] = content
        self.history.append(dict(self.content))

    def restore(self, content: dict, path: Path) -> Path:
        """Creates the files that are found when the power is back."""

        def create(inode: int, path: Path) -> None:
            data = content.get(inode, b"")
            if isinstance(data, bytes):
                path.write_bytes(data)
                return
            path.mkdir()
            for name, child in data.items():
                create(child, path / name)

        create(self.root.stat().st_ino, path)
        return path


@pytest.fixture
def disk(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    yield disk
    for descriptor in disk.descriptors:
        os.close(descriptor)


def test_an_atomic_file_is_complete_or_unchanged(disk, tmp_path):
    """At every moment; once written it stays, also in folders created for it."""
    folder = disk.root / "a" / "b"
    atomic_io.make_directory(folder)
    for text in ("first", "second"):
        atomic_io.atomic_write(folder / "file", text)
        restored = disk.restore(disk.content, tmp_path / text)
        assert (restored / "a" / "b" / "file").read_text() == text
    contents = []
    for i, content in enumerate(disk.history):
        file = disk.restore(content, tmp_path / str(i)) / "a" / "b" / "file"
        contents.append(file.read_text() if file.exists() else None)
    assert list(dict.fromkeys(contents)) == [None, "first", "second"]


def test_an_atomic_write_does_not_follow_links(tmp_path):
    """A link with the name of the draft leads to another file."""
    (tmp_path / "other").write_text("other")
    (tmp_path / "file.part").symlink_to(tmp_path / "other")
    atomic_io.atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "other").read_text() == "other"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other"}


def test_appended_lines_stay(disk, tmp_path):
    with (disk.root / "rows").open("a") as file:
        atomic_io.fsync_path(disk.root)
        for num_lines in (1, 2):
            atomic_io.append_durably(file, f"{num_lines}\n")
            restored = disk.restore(disk.content, tmp_path / str(num_lines))
            lines = (restored / "rows").read_text().splitlines()
            assert lines == ["1", "2"][:num_lines]


@pytest.mark.filterwarnings("ignore:a checkpoint in .* is corrupt")
def test_a_saved_checkpoint_stays(disk, tmp_path):
    """While a step is saved, the newest is that step or the previous one, intact."""
    make_tree = lambda step: {"x": jnp.arange(3.0) * step, "y": jnp.asarray(step)}
    checkpoints = hg.Checkpoints(disk.root / "runs" / "first")
    with checkpoint.open_checkpoints(checkpoints, {}) as folder:
        for step in (1, 2, 3):
            num_before = len(disk.history)
            folder.save(step, make_tree(step))
            moments = disk.history[num_before:]
            for i, content in enumerate(moments):
                path = (
                    disk.restore(content, tmp_path / f"{step}-{i}") / "runs" / "first"
                )
                if not path.exists():
                    continue
                restored = CheckpointFolder(hg.Checkpoints(path), {})
                tree = restored.load(lambda step: make_tree(0))
                is_last = i == len(moments) - 1
                if tree is None:
                    assert step == 1
                    assert not is_last
                    continue
                assert int(tree["y"]) in ({step} if is_last else {step - 1, step})
                assert jnp.array_equal(tree["x"], make_tree(int(tree["y"]))["x"])


def test_a_saved_model_stays(disk, tmp_path):
    """While a version is saved, it is intact or missing; earlier versions stay."""
    folder = disk.root / "runs" / "models"
    for version in (1, 2):
        num_before = len(disk.history)
        models.save("ridge", jnp.full(3, version), 0.1, folder=folder)
        moments = disk.history[num_before:]
        for i, content in enumerate(moments):
            path = (
                disk.restore(content, tmp_path / f"{version}-{i}") / "runs" / "models"
            )
            found, errors = models.find(path)
            versions = [model.record["version"] for model in found]
            expected = list(range(1, version + 1))
            is_last = i == len(moments) - 1
            assert versions in ([expected] if is_last else [expected[:-1], expected])
            assert not errors
            for number in versions:
                w, _ = models.load(f"ridge@{number}", folder=path)
                assert jnp.array_equal(w, jnp.full(3, number))


def test_measured_rows_stay(disk, tmp_path, monkeypatch):
    """When a row is measured, all earlier rows are on disk, in a new folder."""
    folder, counts = disk.root / "runs", []

    def measure(cell, rows):
        restored = disk.restore(disk.content, tmp_path / str(cell["seed"]))
        counts.append(len(read_rows(restored / "runs" / "seeds.jsonl")))
        return {}

    cells = lambda scale, seeds: [{"method": "one", "seed": i} for i in range(seeds)]
    table = MeasurementTable(cells=cells, measure_cell=measure)
    (tmp_path / "seeds.py").write_text("")
    ref = TableRef(tmp_path / "seeds.py")
    monkeypatch.setattr(TableRef, "load", lambda self: table)
    run_table(ref, RunOptions("small", 3, folder, "command"))
    assert counts == [0, 1, 2]
    restored = disk.restore(disk.content, tmp_path / "end")
    assert len(read_rows(restored / "runs" / "seeds.jsonl")) == 3
