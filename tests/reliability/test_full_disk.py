"""A full disk: one message that names the file, and the last good state is kept."""

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypergrad.bench.figures import plot
from hypergrad.bench.loading import load_table
from hypergrad.bench.report import TableResult
from hypergrad.bench.rows import append_row, read_rows
from hypergrad.runtime import array_folder, atomic_io
from tests.bench.toy_table import write_table

ROOT = Path(__file__).parents[2]

COMMAND = """if True:
    import resource, sys
    from hypergrad import cli
    limit = int(sys.argv.pop(1))  # of the size of each file
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    cli.main()
"""


def run_command(folder: Path, limit: int) -> subprocess.CompletedProcess:
    """Runs the table with files of at most so many bytes; 0 means no limit."""
    arguments = [str(limit), "run", "quadratic.py", "--seeds", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # JAX warns of a full disk too
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_a_command_on_a_full_disk_ends_with_one_line_and_continues(tmp_path):
    write_table(tmp_path)
    # A row names the processor and all versions, so that its size is not the same on
    # every machine. Some of the ten rows must fit, and not all.
    full = run_command(tmp_path, 6000)
    assert full.returncode == 1
    is_progress = lambda line: " of 10: " in line
    (line,) = [x for x in full.stderr.splitlines() if not is_progress(x)]
    assert line.startswith("hypergrad: ")
    assert "File too large" in line
    assert "runs/quadratic.jsonl" in line
    rows = read_rows(tmp_path / "runs" / "quadratic.jsonl", allow_cut=True)
    assert 1 < len(rows) < 10
    assert run_command(tmp_path, 0).returncode == 0
    all_rows = read_rows(tmp_path / "runs" / "quadratic.jsonl")
    assert all_rows[: len(rows)] == rows
    assert len(all_rows) == 10


def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_errors_of_a_full_disk_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"rows\.jsonl"):
        append_row(tmp_path / "rows.jsonl", {"method": "a"})
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(OSError, match=r"page\.html"):
        atomic_io.atomic_write(tmp_path / "page.html", "new")
    assert (tmp_path / "page.html").read_text() == "old"


@pytest.mark.parametrize("reserves", [True, False])
def test_space_is_checked_before_arrays_are_written(reserves, tmp_path, monkeypatch):
    """By reserving it, or, where the system cannot, by the free space of the disk."""
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    atomic_io.check_free_space(tmp_path, 1000)
    with pytest.raises(OSError, match=r"No space left on device|File too large"):
        atomic_io.check_free_space(tmp_path, 2**62)
    assert not list(tmp_path.iterdir())


def test_other_errors_of_a_disk_are_one_line(tmp_path, monkeypatch):
    """Orbax raises a ValueError with many lines."""

    def raise_lines():
        raise ValueError("RESOURCE_EXHAUSTED: no space\n" + 100 * "stack\n")

    monkeypatch.setattr(array_folder, "make_checkpointer", raise_lines)
    with pytest.raises(OSError, match="RESOURCE_EXHAUSTED") as raised:
        array_folder.write_arrays(tmp_path / "arrays", {})
    assert "\n" not in str(raised.value)


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def plot_half(rows, path):
        path.write_bytes(b"half")
        fail()

    table = dataclasses.replace(load_table(write_table(tmp_path)), plot=plot_half)
    with pytest.raises(OSError, match="No space left"):
        plot(TableResult("quadratic", table, []), path)
    assert path.read_bytes() == b"old"
    assert not list(tmp_path.glob("*.part"))
