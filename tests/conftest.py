"""What holds for every test: float64, no silent rank promotion, fixed keys."""

import os
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch

import jax
import pytest

from tests.representatives import REPRESENTATIVES

# The threads for the parts of a program, read when JAX makes its first array. With two,
# as on two cores, two batched decompositions in one program (a solve and eigh, say) may
# take one each, and both wait for the other's to do their own parts, for ever.
os.environ.setdefault("NPROC", "8")
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
    "test_kills",
    "test_testing",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of heavy modules, and the cases that only `make full` runs."""
    for item in items:
        module = item.path.stem
        if module in HEAVY:
            item.add_marker(pytest.mark.heavy)
        name, _, case = item.name.partition("[")
        kept = REPRESENTATIVES.get(module, {}).get(name)
        if kept is not None and not any(fnmatch(case[:-1], one) for one in kept):
            item.add_marker(pytest.mark.slow)
