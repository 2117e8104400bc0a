"""Settings of all tests: float64, no silent rank promotion, fixed keys."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent

# Number of threads for the parts of a program, read when JAX makes its first array. If
# there are two, as on two cores, two batched decompositions in one program (such as a
# solve and eigh) may occupy one each, and both wait forever for a free thread.
os.environ.setdefault("NPROC", "8")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """Returns a random key that is fixed by the test's name and parameters."""
    return jax.random.key(zlib.crc32(request.node.name.encode()) % 2**31)


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """Frees programs, because thousands exhaust the memory maps of one process."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that ``heavy.txt`` names."""
    names = set((TESTS / "heavy.txt").read_text().splitlines())
    for item in items:
        if item.nodeid.removeprefix("tests/") in names:
            item.add_marker(pytest.mark.heavy)
