"""Fixtures of the tests of the command line and its tables."""

import sys
from collections.abc import Iterator

import jax
import pytest

from hypergrad.studies import STUDIES
from hypergrad.studies import program as programs


@pytest.fixture
def single_precision() -> Iterator[None]:
    """Switches to float32, JAX's default, without results cached in float64."""
    modules = [sys.modules[f"hypergrad.studies.{name}"] for name in STUDIES]

    def clear_caches() -> None:
        for module in (programs, *modules):
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()

    clear_caches()
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    clear_caches()
