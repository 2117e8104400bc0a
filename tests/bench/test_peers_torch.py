"""Tests of the PyTorch contenders against the reference in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import environments, harness, tuning, worker
from benchmarks.peers.contenders import reference
from benchmarks.peers.work import WORKS

ROOT = Path(__file__).parents[2]
LIBRARIES = [*environments.SHARED, *list(environments.REQUIREMENTS)[1:]]

# Results that are wrong as released, with a lower bound of their error. Betty and
# moskomule's hypergrad compute the next direction of conjugate gradients from the
# previous residual, not from the new one.
MIN_ERRORS = {
    (library, work): 0.1
    for library in ("betty", "moskomule")
    for work in ("w1-solve", "w2-implicit", "overhead-solve")
}


CASES = [
    pytest.param(library, work, marks=[pytest.mark.slow] * (library != "torch_by_hand"))
    for library in LIBRARIES
    for work in harness.offered_works(library)
]


@pytest.mark.parametrize(("library", "work"), CASES)
def test_a_result_is_right_or_recorded_as_wrong(
    library: str, work: str, tmp_path: Path
) -> None:
    actual = run_contender(library, work, tmp_path)
    expected = reference.WORKS[work](WORKS[work].small())()
    error = harness.relative_error(actual, expected)
    min_error = MIN_ERRORS.get((library, work))
    if min_error is None:
        assert error <= WORKS[work].error
    else:
        assert not error < min_error  # or NaN


def test_plain_pytorch_offers_every_work_with_a_peer() -> None:
    offered = {
        work
        for library in ("torch_by_hand", "torch_func")
        for work in harness.offered_works(library)
    }
    without_peer = {"w2-lowmem", "w2-indefinite", "dispatch", "eight", "compile"}
    assert offered == set(WORKS) - without_peer


def test_a_contender_without_an_environment_runs_in_this_one() -> None:
    assert environments.interpreter("jaxopt") == Path(sys.executable)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_runs_in_its_environment(library: str) -> None:
    name = environments.SHARED.get(library, library)
    assert environments.interpreter(library).parts[-4:-2] == (".venv-peers", name)
    installed = (
        environments.BUILD_REQUIREMENTS.get(name, []) + environments.REQUIREMENTS[name]
    )
    assert "torch==2.13.0" in installed


def run_contender(library: str, work: str, folder: Path) -> np.ndarray:
    """Returns the result of a contender in its process, at the size of tests."""
    python = environments.interpreter(library)
    if not python.exists():
        # PyTorch is no dependency, and each of its libraries needs an environment.
        pytest.skip(f"{library} is not installed: `make peers` does it")
    worker.save(folder / "data.npz", WORKS[work].small())
    options = json.dumps(tuning.GRIDS[library][-1] if work == tuning.WORK else {})
    command = [python, "-m", "benchmarks.peers.worker", library, work]
    process = subprocess.run(
        [*command, folder / "data.npz", options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input="",
        capture_output=True,
        text=True,
        check=True,
    )
    first_line = json.loads(process.stdout.splitlines()[-1])
    assert "failed" not in first_line, first_line
    return np.array(first_line["answer"])
