"""A compiled function that knows its seconds; what is planned instead of run."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..search import search as search_by_trials
from ..trace import Trace
from . import rehearsal


class Program:
    """A function, compiled at its first call; counts its seconds."""

    def __init__(self, function: Callable):
        self.function, self.compiled = function, None
        self.compile_seconds = self.run_seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """Runs to the end; the first call compiles for shapes that then stay."""
        arguments = jax.tree.map(jnp.asarray, arguments)
        if rehearsal.is_rehearsed():
            return rehearsal.planned(self, self.function, arguments)
        if self.compiled is None:
            started = time.perf_counter()
            self.compiled = jax.jit(self.function).lower(*arguments).compile()
            self.compile_seconds = time.perf_counter() - started
        started = time.perf_counter()
        result = jax.block_until_ready(self.compiled(*arguments))
        self.run_seconds += time.perf_counter() - started
        return result


@functools.cache
def program(function: Callable, *settings: Any) -> Program:
    """``function`` with its first arguments set, compiled once a process."""
    return Program(functools.partial(function, *settings))


def search(*arguments: Any, **settings: Any) -> Trace:
    """`hypergrad.search`, which a rehearsal ends at.

    Raises:
      OnHostError: in a rehearsal.
    """
    if rehearsal.is_rehearsed():
        raise rehearsal.OnHostError
    return search_by_trials(*arguments, **settings)
