"""What holds for every test: float64, no silent rank promotion, fixed keys."""

import zlib

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> jax.Array:
    """A random key fixed by the test's name, parameters included."""
    return jax.random.key(zlib.crc32(request.node.name.encode()) % 2**31)
