"""The programs of other libraries on the page on migration, in their environments."""

import os
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.peers import environments

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
LIBRARIES = {
    "torchopt": "import torchopt",
    "higher": "import higher",
    "learn2learn": "from learn2learn.algorithms import MAML",
    "hypertorch": "import hypergrad as hypertorch",
    "betty": "import betty",
}


def test_each_program_is_of_one_library():
    setup, *programs = BLOCKS
    assert "np.load" in setup
    assert len(programs) == len(LIBRARIES)
    for start, program in zip(LIBRARIES.values(), programs, strict=True):
        assert program.startswith(start)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_program_prints_our_hypergradient(library: str, tmp_path: Path):
    python = environments.interpreter(library)
    if not python.exists():
        # PyTorch is no dependency, and its libraries need an environment each.
        pytest.skip(f"{library} is not installed: `make peers` does it")
    key = jax.random.key
    x = np.asarray(jax.random.normal(key(0), (60, 5)), "float32")
    noise = np.asarray(jax.random.normal(key(1), (60,)), "float32")
    y = x @ np.array([1.0, -2.0, 0.5, 0.0, 0.0], "float32") + noise
    np.savez(tmp_path / "ridge.npz", x=x, y=y)
    program = BLOCKS[0] + BLOCKS[1 + list(LIBRARIES).index(library)]
    done = subprocess.run(
        [python, "-c", program],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"tensor\((-?[\d.e-]+)\)", done.stdout)
    np.testing.assert_allclose(float(printed[-1]), ridge_slope(x, y), rtol=1e-3)


def ridge_slope(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the derivative at ``alpha = -1`` by the closed form of ``w*``."""

    def value(alpha: float) -> float:
        matrix = x[:30].T @ x[:30] / 30 + np.exp(alpha) * np.eye(5)
        w = np.linalg.solve(matrix, x[:30].T @ y[:30] / 30)
        return 0.5 * np.mean((x[30:] @ w - y[30:]) ** 2)

    x, y = x.astype(float), y.astype(float)
    return (value(-1 + 1e-5) - value(-1 - 1e-5)) / 2e-5
