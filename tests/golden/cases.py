"""All golden cases, by name; importing this module needs 64-bit mode."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from tests.golden import (
    implicit,
    minimize,
    objectives,
    procedures,
    searchers,
    single_loop,
    solvers,
    spaces,
    surrogates,
    tasks,
)

if not jax.config.jax_enable_x64:
    raise RuntimeError("golden cases must be imported with jax_enable_x64=True")

MODULES = (
    implicit,
    procedures,
    single_loop,
    minimize,
    solvers,
    searchers,
    surrogates,
    spaces,
    objectives,
    tasks,
)


def merge_cases(modules: tuple[ModuleType, ...]) -> dict[str, Callable[[], Any]]:
    """Returns the cases of all modules; raises ValueError if two share a name."""
    cases: dict[str, Callable[[], Any]] = {}
    for module in modules:
        if duplicates := cases.keys() & module.CASES.keys():
            raise ValueError(f"{module.__name__} repeats cases {sorted(duplicates)}")
        cases |= module.CASES
    return cases


CASES = merge_cases(MODULES)
