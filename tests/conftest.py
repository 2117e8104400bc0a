"""What holds for every test: float64, no silent rank promotion, fixed keys."""

import zlib
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key fixed by the test's name, parameters included."""
    return jax.random.key(zlib.crc32(request.node.name.encode()) % 2**31)


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs() -> Iterator[None]:
    """Thousands of live programs exhaust the memory maps of one process."""
    yield
    jax.clear_caches()


# The modules that take most of the time; the fast half of CI leaves them out.
HEAVY = {
    "test_adapters",
    "test_argmin",
    "test_compilation",
    "test_estimators",
    "test_testing",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of heavy modules."""
    for item in items:
        if item.path.stem in HEAVY:
            item.add_marker(pytest.mark.heavy)
