"""What is left after a power cut, by a disk that keeps nothing it was not asked to."""

import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from hypergrad import checkpoint, models
from hypergrad.checkpoint import CheckpointFolder
from hypergrad.runtime import atomic_io
from hypergrad.studies import record
from hypergrad.studies.table import Request, Table, cell_by_cell


class Disk:
    """What was waited for: bytes of files and names in folders, at the time of it.

    POSIX allows all else to be lost, and an old name to lead where it led.
    """

    def __init__(self, root: Path):
        self.root, self.held, self.kept = root, [], {}
        self.cuts: list[dict] = []

    def fsync(self, descriptor: int) -> None:
        """In place of ``os.fsync``; no inode that it has seen is used again."""
        again = os.dup(descriptor)
        self.held.append(again)
        path = Path(f"/proc/self/fd/{again}")
        if path.is_dir():
            content = {x.name: x.stat().st_ino for x in path.iterdir()}
        else:
            content = path.read_bytes()
        self.kept[os.fstat(again).st_ino] = content
        self.cuts.append(dict(self.kept))

    def restore(self, kept: dict, place: Path) -> None:
        """Makes what is found on the disk when the power is back."""

        def make(inode: int, place: Path) -> None:
            content = kept.get(inode, b"")
            if isinstance(content, bytes):
                place.write_bytes(content)
                return
            place.mkdir()
            for name, below in content.items():
                make(below, place / name)

        make(self.root.stat().st_ino, place)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    root = tmp_path / "root"
    root.mkdir()
    disk = Disk(root)
    disk.kept[root.stat().st_ino] = {}
    monkeypatch.setattr(os, "fsync", disk.fsync)
    yield disk
    for descriptor in disk.held:
        os.close(descriptor)


def test_a_file_is_there_whole_or_as_it_was(disk, tmp_path):
    """At every moment; and once written it stays, in folders made for it too."""
    folder = disk.root / "a" / "b"
    atomic_io.make_directory(folder)
    for text in ("first", "second"):
        atomic_io.atomic_write(folder / "file", text)
        disk.restore(disk.kept, tmp_path / text)
        assert (tmp_path / text / "a" / "b" / "file").read_text() == text
    seen = []
    for i, kept in enumerate(disk.cuts):
        disk.restore(kept, tmp_path / str(i))
        file = tmp_path / str(i) / "a" / "b" / "file"
        seen.append(file.read_text() if file.exists() else None)
    assert list(dict.fromkeys(seen)) == [None, "first", "second"]
    with (folder / "rows").open("a") as file:
        atomic_io.fsync_path(folder)
        for text in ("1\n", "2\n"):
            atomic_io.append_durably(file, text)
            disk.restore(disk.kept, tmp_path / f"rows{text[0]}")
    found = [(tmp_path / f"rows{i}/a/b/rows").read_text() for i in (1, 2)]
    assert found == ["1\n", "1\n2\n"]


@pytest.mark.filterwarnings("ignore:the checkpoint of step")
def test_a_checkpoint_that_was_saved_is_there_after_a_power_cut(disk, tmp_path):
    """Cut while a step is saved, it is that one or the one before, whole."""
    path = disk.root / "runs" / "first"
    of = lambda step: {"x": jnp.arange(3.0) * step, "y": jnp.asarray(step)}
    with checkpoint.open_checkpoints(checkpoint.Checkpoints(path), {}) as folder:
        for step in (1, 2, 3):
            before = len(disk.cuts)
            folder.save(step, of(step))
            cuts = disk.cuts[before:]
            for i, kept in enumerate(cuts):
                place = tmp_path / f"{step}-{i}"
                disk.restore(kept, place)
                there = CheckpointFolder(place / "runs" / "first", {})
                if not there.path.exists():
                    continue
                found = there.load(of(0))
                last = i == len(cuts) - 1
                assert int(found["y"]) in ({step} if last else {step - 1, step})
                assert jnp.array_equal(found["x"], of(int(found["y"]))["x"])


def test_a_model_that_was_saved_is_there_after_a_power_cut(disk, tmp_path):
    """Cut while a version is saved, it is whole or none; those before it stay."""
    folder = disk.root / "runs" / "models"
    for version in (1, 2):
        before = len(disk.cuts)
        models.save("ridge", jnp.full(3, version), 0.1, folder=folder)
        cuts = disk.cuts[before:]
        for i, kept in enumerate(cuts):
            place = tmp_path / f"{version}-{i}"
            disk.restore(kept, place)
            there = place / "runs" / "models"
            found, flaws = models.find(there)
            versions = [model.version for model in found]
            last = i == len(cuts) - 1
            whole = list(range(1, version + 1))
            assert versions == whole if last else versions in (whole[:-1], whole)
            assert not flaws
            for number in versions:
                w, _ = models.load(f"ridge@{number}", folder=there)
                assert jnp.array_equal(w, jnp.full(3, number))


def test_rows_that_were_measured_are_there_after_a_power_cut(disk, tmp_path):
    """When the next is measured, all before it are kept, in a folder that is new."""
    folder, counts = disk.root / "runs", []

    def measure(cell):
        place = tmp_path / str(cell["seed"])
        disk.restore(disk.kept, place)
        counts.append(len(record.read(place / "runs" / "known.jsonl")))
        return {"method": "one"}

    run = cell_by_cell(measure, lambda *_: "| table |", lambda rows, path: None)
    plan = lambda scale, seeds: [{"seed": seed} for seed in range(seeds)]
    table = Table("known", "", 1, 3, plan, run, lambda rows: [])
    table.run(table, Request("small", 3, folder, "command"))
    assert counts == [0, 1, 2]
    disk.restore(disk.kept, tmp_path / "end")
    assert len(record.read(tmp_path / "end" / "runs" / "known.jsonl")) == 3
    assert (tmp_path / "end" / "runs" / "known.md").read_text() == "| table |\n"
