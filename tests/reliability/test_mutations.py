"""Damaged files of checkpoints: the newest intact one is read, or an error raised."""

import contextlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import hypergrad as hg
from hypergrad.checkpoint import CheckpointFolder
from tests.loops import assert_same_bits
from tests.reliability.checkpoint_cases import blank_state, make_state, read_files

STEPS = (3, 4)


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    """Returns a folder with the checkpoints of two steps."""
    folder = CheckpointFolder(hg.Checkpoints(tmp_path / "run"), {"problem": "a"})
    with contextlib.ExitStack() as stack:
        folder.open(stack)
        for step in STEPS:
            folder.save(step, make_state(step))
    return folder


def mutate(content: bytes, rng: np.random.Generator) -> bytes | None:
    """Returns a damaged copy of a file, or None for a file that is lost."""
    position = int(rng.integers(len(content)))
    head, tail = content[:position], content[position:]
    flipped = bytes([tail[0] ^ (1 << int(rng.integers(8)))])
    copies = (
        head + flipped + tail[1:],
        head,  # truncated
        content + bytes(rng.integers(256, size=3, dtype=np.uint8)),
        head + tail[1:],
        head + bytes(len(tail)) + b"\0",
        head + tail[:5] + tail,
        b"",
        None,
    )
    return copies[int(rng.integers(len(copies)))]


def is_other(file: Path, content: bytes | None, original: bytes) -> bool:
    """Returns whether a file has another meaning; its metadata may have spaces."""
    if file.suffix == ".json":
        with contextlib.suppress(ValueError, TypeError):
            return json.loads(content) != json.loads(original)
    return content != original


def write(file: Path, content: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


@pytest.mark.parametrize(
    "num_mutations",
    [
        100,
        pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)
def test_a_damaged_file_is_never_read(num_mutations, checkpoints):
    """One or two files are damaged at a time, and no call changes any file."""
    contents = read_files(checkpoints.path)
    files = [file for file, content in contents.items() if content]  # no empty lock
    metadata = checkpoints.path / f"step-{STEPS[-1]:09d}.json"
    rng, num_errors, num_earlier = np.random.default_rng(0), 0, 0
    for _ in range(num_mutations):
        chosen = rng.choice(len(files), size=rng.integers(1, 3), replace=False)
        damaged = {files[i]: mutate(contents[files[i]], rng) for i in chosen}
        for file, content in damaged.items():
            write(file, content)
        bad_names = {
            file.relative_to(checkpoints.path).parts[0].removesuffix(".json")
            for file, content in damaged.items()
            if is_other(file, content, contents[file])
        }
        intact = [step for step in STEPS if f"step-{step:09d}" not in bad_names]
        written = read_files(checkpoints.path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if intact:
                state = checkpoints.load(blank_state)
                assert_same_bits(state, make_state(intact[-1]))
                is_earlier = STEPS[-1] not in intact
                has_metadata = metadata.exists()
                assert bool(caught) == (is_earlier and has_metadata)
                num_earlier += is_earlier
            elif not list(checkpoints.path.glob("*.json")):
                # Without metadata there is no checkpoint.
                assert checkpoints.load(blank_state) is None
            else:
                with pytest.raises(ValueError, match="intact checkpoint"):
                    checkpoints.load(blank_state)
                num_errors += 1
        assert read_files(checkpoints.path) == written
        for file in damaged:
            write(file, contents[file])
    assert min(num_errors, num_earlier) > num_mutations / 20
