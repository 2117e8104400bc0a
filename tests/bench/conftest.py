"""A table of a user's own, as files in an empty folder, and runs of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from hypergrad.bench.loading import TableRef, parse_method
from hypergrad.bench.runner import RunOptions, RunResult, run_table
from hypergrad.runtime.compat import enable_x64
from tests.bench.toy_table import write_table


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the file of a table that no test changes, so that programs are shared."""
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """Returns the file of a table that the test may change."""
    return write_table(tmp_path)


Run = Callable[..., RunResult]


def make_run(table_file: Path, folder: Path) -> Run:
    """Returns a function that runs the table into ``folder / out``."""

    def run_it(
        *methods: str,
        seeds: int = 2,
        out: str = "out",
        progress: Callable[[int, int, str], None] = lambda done, total, label: None,
        **options,
    ) -> RunResult:
        budget = options.pop("budget", None)
        files = tuple(parse_method(f"{table_file.parent}/{name}") for name in methods)
        options = {
            "scale": "small",
            "seeds": seeds,
            "folder": folder / out,
            "command": "hypergrad run quadratic.py",
        } | options
        ref = TableRef(table_file, files, budget)
        return run_table(ref, RunOptions(**options), progress)

    return run_it


@pytest.fixture
def run(shared_file: Path, tmp_path: Path) -> Run:
    """Returns a function that runs the shared table into folders of the test."""
    return make_run(shared_file, tmp_path)


@pytest.fixture
def run_own(own_file: Path) -> Run:
    """Returns a function that runs the table that the test may change."""
    return make_run(own_file, own_file.parent)


@pytest.fixture
def single_precision() -> Iterator[None]:
    """Switches to float32, JAX's default, without programs compiled for float64."""
    jax.clear_caches()
    with enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.clear_caches()
