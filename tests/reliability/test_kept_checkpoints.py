"""What the folder of checkpoints keeps: the last intact ones, and files of others."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import checkpoint
from hypergrad.checkpoint import CheckpointFolder, open_checkpoints
from hypergrad.runtime import array_folder
from tests.loops import assert_same_bits
from tests.reliability.checkpoint_cases import (
    Killed,
    blank_state,
    make_state,
    read_files,
    steps_in,
)

ARRAYS = "step-{:09d}"
METADATA = "step-{:09d}.json"
MARKER = "step-{:09d}.writing"
ORBAX = "step-{:09d}.orbax-checkpoint-tmp"
NOTES = "my notes"


@contextmanager
def resumed(path: Path, step: int | None) -> Iterator[CheckpointFolder]:
    """Yields the folder of a run that continues from a step; None is a new run."""
    with open_checkpoints(hg.Checkpoints(path), {"problem": "a"}) as folder:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a checkpoint in .* is corrupt")
            state = folder.load(blank_state)
        if step is None:
            assert state is None
        else:
            assert_same_bits(state, make_state(step))
        yield folder


def save(path: Path, resumed_step: int | None, *steps: int) -> None:
    with resumed(path, resumed_step) as folder:
        for step in steps:
            folder.save(step, make_state(step))


def save_without_pruning(path: Path, monkeypatch, *steps: int) -> None:
    """Saves as processes do that are killed before they remove old checkpoints."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "NUM_KEPT", 100)
        save(path, None, *steps)


def corrupt(path: Path, *steps: int) -> None:
    for step in steps:
        (path / ARRAYS.format(step) / "manifest.ocdbt").write_bytes(b"x")


def intact_steps(path: Path) -> list[int]:
    """Returns the steps whose files have the digests in their metadata."""

    def is_intact(step: int) -> bool:
        files = json.loads((path / METADATA.format(step)).read_text())["files"]
        return files == array_folder.digest_folder(path / ARRAYS.format(step))

    return [step for step in steps_in(path) if is_intact(step)]


def file_state(path: Path) -> tuple[int, int, int, int]:
    """Returns what changes when a file is replaced or written, but not when read."""
    status = path.lstat()
    return status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns


# The last intact checkpoints.


def test_corrupt_checkpoints_of_later_steps_do_not_count(tmp_path, monkeypatch):
    """After a run that continues from step 3, the next one continues from step 4."""
    save_without_pruning(tmp_path, monkeypatch, 3, 6, 9)
    corrupt(tmp_path, 6, 9)
    save(tmp_path, 3, 4)
    assert intact_steps(tmp_path) == [3, 4]
    save(tmp_path, 4, 5)
    assert intact_steps(tmp_path) == [4, 5]
    save(tmp_path, 5, 6)
    assert intact_steps(tmp_path) == [5, 6]
    assert (tmp_path / f"{METADATA.format(6)}.corrupt-1").exists()
    save(tmp_path, 6, 8, 10)
    assert intact_steps(tmp_path) == [8, 10]


@pytest.mark.parametrize("seed", range(8))
def test_the_last_two_intact_checkpoints_stay(seed, tmp_path, monkeypatch):
    """Whatever was corrupt; corrupt ones of later steps may stay beside them."""
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.choice(np.arange(1, 10), 4, replace=False)).tolist()
    save_without_pruning(tmp_path, monkeypatch, *steps)
    corrupt(tmp_path, *rng.choice(steps, rng.integers(1, 4), replace=False))
    for _ in range(4):
        resumed_step = intact_steps(tmp_path)[-1]
        new_steps = resumed_step + np.cumsum(rng.integers(1, 4, rng.integers(1, 3)))
        save(tmp_path, resumed_step, *new_steps.tolist())
        assert intact_steps(tmp_path) == [resumed_step, *new_steps][-2:]
        if rng.random() < 0.5:
            corrupt(tmp_path, new_steps[-1])


def test_a_kill_while_a_corrupt_checkpoint_is_renamed_blocks_no_step(
    tmp_path, monkeypatch
):
    save(tmp_path, None, 3, 4)
    corrupt(tmp_path, 4)
    rename, targets = Path.rename, []

    def rename_once(self, target):
        targets.append(target)
        if len(targets) == 2:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_once)
        with pytest.raises(Killed):
            save(tmp_path, 3, 4)
    save(tmp_path, 3, 4)
    assert intact_steps(tmp_path) == [3, 4]


def test_a_failed_write_names_the_newest_intact_checkpoint(tmp_path, monkeypatch):
    save_without_pruning(tmp_path, monkeypatch, 3, 9)
    corrupt(tmp_path, 9)
    (tmp_path / ARRAYS.format(4)).mkdir()
    with pytest.warns(UserWarning, match="the newest is of step 3"):
        save(tmp_path, 3, 4)
    assert (tmp_path / ARRAYS.format(4)).is_dir()  # it was not made by a run


def test_metadata_of_another_step_are_corrupt(tmp_path):
    """They were copied by hand; the state has the shapes of its own step."""
    save(tmp_path, None, 3)
    content = (tmp_path / METADATA.format(3)).read_text()
    (tmp_path / METADATA.format(5)).write_text(content)
    shutil.copytree(tmp_path / ARRAYS.format(3), tmp_path / ARRAYS.format(5))
    folder = CheckpointFolder(hg.Checkpoints(tmp_path), {"problem": "a"})
    with pytest.warns(UserWarning, match="step 5: step-000000005.json is not as"):
        assert_same_bits(folder.load(blank_state), make_state(3))


def test_checkpoints_of_a_billion_steps_are_read(tmp_path):
    """Their names have ten digits, and a name with a further zero is of others."""
    step = 10**9
    (tmp_path / "step-0999999999.json").write_text(NOTES)
    save(tmp_path, None, step - 1, step)
    save(tmp_path, step, step + 1)
    names = {METADATA.format(step), METADATA.format(step + 1), "step-0999999999.json"}
    assert {path.name for path in tmp_path.glob("*.json")} == names


# Files of others.


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_files_and_folders_within_a_checkpoint_are_kept(tmp_path):
    """Everything that the library wrote around them is removed."""
    save(tmp_path, None, 1)
    folder = tmp_path / ARRAYS.format(1)
    (folder / "my_notes.txt").write_text(NOTES)
    (folder / "ocdbt.process_0" / "d" / "my_notes.txt").write_text(NOTES)
    (folder / "empty").mkdir()
    with open_checkpoints(hg.Checkpoints(tmp_path), {"problem": "a"}) as checkpoints:
        for step in (2, 3):  # without a check of step 1, which has other files now
            checkpoints.save(step, make_state(step))
    assert steps_in(tmp_path) == [2, 3]
    assert names_in(tmp_path) >= {"lock", METADATA.format(3)}
    assert not list(tmp_path.glob("*.writing"))
    assert names_in(folder) == {
        "my_notes.txt", "empty", "ocdbt.process_0", "ocdbt.process_0/d",
        "ocdbt.process_0/d/my_notes.txt",
    }  # fmt: skip
    assert (folder / "my_notes.txt").read_text() == NOTES


@pytest.mark.parametrize("name", [".DS_Store", "d/.nfs0001", "unreadable"])
def test_a_further_file_is_no_damage(name, tmp_path):
    """As a desktop or a file system writes it; its content does not matter."""
    save(tmp_path, None, 1)
    path = tmp_path / ARRAYS.format(1) / name
    path.write_text(NOTES)
    if name == "unreadable":
        path.chmod(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 1, 2)
    assert path.exists()


@pytest.mark.parametrize("name", ["", "d", "manifest.ocdbt"])
def test_links_in_place_of_a_checkpoint_are_not_followed(name, tmp_path):
    """The folder, a folder in it, or a file is a link to a copy elsewhere."""
    path, moved = tmp_path / "run", tmp_path / "moved"
    save(path, None, 1)
    linked = path / ARRAYS.format(1) / name
    linked.rename(moved)
    linked.symlink_to(moved)
    before = read_files(tmp_path / "moved") or moved.read_bytes()
    with open_checkpoints(hg.Checkpoints(path), {"problem": "a"}) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, make_state(step))
    assert steps_in(path) == [2, 3]
    assert linked.is_symlink()
    assert (read_files(tmp_path / "moved") or moved.read_bytes()) == before


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "my_notes.txt").write_text(NOTES)


FOREIGN = {
    "a text": (MARKER, lambda path: path.write_text(NOTES)),
    "an empty file": (MARKER, Path.touch),
    "a folder": (MARKER, make_folder),
    "a link": (MARKER, lambda path: path.symlink_to("elsewhere")),
    "a damaged marker": (MARKER, lambda path: path.write_text('{"step": 3}')),
    "metadata of another step": (
        MARKER,
        lambda path: path.write_bytes((path.parent / METADATA.format(1)).read_bytes()),
    ),
    "a folder with the name of Orbax": (ORBAX, make_folder),
    "a file with the name of Orbax": (ORBAX, lambda path: path.write_text(NOTES)),
    "a link in place of the draft": (
        f"{MARKER}.part",
        lambda path: path.symlink_to("elsewhere"),
    ),
    "a draft": (f"{MARKER}.part", lambda path: path.write_text(NOTES)),
}


@pytest.mark.parametrize("has_folder", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_with_the_name_of_a_marker_is_kept(name, has_folder, tmp_path):
    """One warning names it where the step would be saved; later steps are saved."""
    save(tmp_path, None, 1, 2)
    pattern, make = FOREIGN[name]
    foreign = tmp_path / pattern.format(3)
    make(foreign)
    if has_folder:
        make_folder(tmp_path / ARRAYS.format(3))
    before = read_files(tmp_path) | {foreign: file_state(foreign)}
    save(tmp_path, 2)
    expected = f"of step 3 could not be written.*{ARRAYS.format(3)}"
    with pytest.warns(UserWarning, match=expected) as caught:
        save(tmp_path, 2, 3, 4, 5)
    assert len(caught) == 1
    assert steps_in(tmp_path) == [4, 5]
    after = read_files(tmp_path)
    kept = {
        path
        for path in before
        if path.relative_to(tmp_path).parts[0][5:14] == "000000003"
    }
    assert {path: after.get(path) for path in kept - {foreign}} == {
        path: before[path] for path in kept - {foreign}
    }
    assert file_state(foreign) == before[foreign]


def test_a_foreign_file_is_not_replaced_when_its_step_is_removed(tmp_path):
    save(tmp_path, None, 1, 2)
    marker = tmp_path / MARKER.format(1)
    marker.write_text(NOTES)
    save(tmp_path, 2, 3, 4)
    assert marker.read_text() == NOTES
    assert steps_in(tmp_path)[-2:] == [3, 4]


# Interrupted calls.


def interrupt(name: str, monkeypatch) -> None:
    """Kills the next write while or after Orbax writes, or the next removal."""

    def die(*_):
        raise Killed

    def write_half(folder, arrays):
        array_folder.write_arrays(folder, arrays)
        draft = folder.rename(folder.with_name(f"{folder.name}.orbax-checkpoint-tmp"))
        (draft / "ocdbt.process_0" / "manifest.ocdbt.__lock").touch()
        (draft / "commit_success.txt").unlink(missing_ok=True)  # of newer versions
        raise Killed

    owner, attribute, replacement = {
        "within Orbax": (checkpoint, "write_arrays", write_half),
        "after Orbax": (checkpoint.atomic_io, "fsync_tree", die),
        "before the metadata": (Path, "rename", die),
        "within the removal": (array_folder.os, "rmdir", die),
    }[name]
    monkeypatch.setattr(owner, attribute, replacement)


@pytest.mark.parametrize("has_notes", [False, True])
@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("within Orbax", 3),
        ("after Orbax", 3),
        ("before the metadata", 3),
        ("within the removal", 1),
    ],
)
def test_only_own_files_of_an_interrupted_call_are_removed(
    name, step, has_notes, tmp_path, monkeypatch
):
    """With a file of the user in each folder, these folders stay with that file."""
    save(tmp_path, None, 1, 2)
    with monkeypatch.context() as patch:
        interrupt(name, patch)
        with pytest.raises(Killed):
            save(tmp_path, 2, 3)
    assert (tmp_path / MARKER.format(step)).exists()
    resumed_step = 2 if step == 3 else 3
    leftovers = [
        path
        for pattern in (ARRAYS, ORBAX)
        for path in (tmp_path / pattern.format(step)).glob("**/")
    ]
    assert leftovers
    notes = [folder / "my_notes.txt" for folder in leftovers] if has_notes else []
    for path in notes:
        path.write_text(NOTES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(tmp_path, resumed_step, *range(resumed_step + 1, 6))
    assert len(caught) == (has_notes and step == 3)
    assert steps_in(tmp_path) == [4, 5]
    names = [path.name for path in tmp_path.iterdir()]
    complete = ["lock", *(x.format(i) for x in (ARRAYS, METADATA) for i in (4, 5))]
    assert set(names) - set(complete) == ({leftovers[0].name} if has_notes else set())
    if has_notes:
        remaining = {path for path in leftovers[0].rglob("*") if path.is_file()}
        assert remaining == set(notes)
        assert {path.read_text() for path in notes} == {NOTES}


def test_an_error_of_the_disk_while_files_are_removed_is_made_up_for(
    tmp_path, monkeypatch
):
    """It issues no warning, and the next write removes what is left."""

    def fail(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    save(tmp_path, None, 1, 2)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        with resumed(tmp_path, 2) as folder:
            patch.setattr(checkpoint, "remove_arrays", fail)
            folder.save(3, make_state(3))
    assert steps_in(tmp_path) == [2, 3]
    assert (tmp_path / ARRAYS.format(1)).exists()
    save(tmp_path, 3, 4)
    names = {x.format(i) for x in (ARRAYS, METADATA) for i in (3, 4)}
    assert {path.name for path in tmp_path.iterdir()} == {"lock", *names}
