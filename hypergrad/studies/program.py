"""A compiled function that knows its seconds; what is planned instead of run."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..cost.memory import Memory, memory_from_compiled
from ..search import search as search_by_trials
from ..trace import Trace
from . import rehearsal


class Program:
    """A function, compiled at its first call; counts its seconds."""

    def __init__(self, function: functools.partial):
        self.function, self.compiled, self.plan = function, None, None
        self.compile_seconds = self.run_seconds = 0.0

    @property
    def name(self) -> str:
        """That of the function, without its settings."""
        return self.function.func.__name__

    @property
    def memory(self) -> Memory:
        """Bytes, once it was called."""
        if rehearsal.is_rehearsed():
            assert self.plan is not None
            return self.plan.memory
        return memory_from_compiled(self.compiled)

    def __call__(self, *arguments: Any) -> Any:
        """Runs to the end; the first call compiles for shapes that then stay."""
        arguments = jax.tree.map(jnp.asarray, arguments)
        if rehearsal.is_rehearsed():
            self.plan = self.plan or rehearsal.plan(self.function, arguments)
            return rehearsal.planned(self, self.plan)
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


class Once:
    """A function whose results are kept, as by `functools.cache`.

    Those of a rehearsal are kept until it ends: they are zeros, and no run's.
    """

    def __init__(self, function: Callable):
        self.function = functools.cache(function)
        self.cache_clear = self.function.cache_clear

    def __call__(self, *arguments: Any) -> Any:
        """The result of the first call with these arguments."""
        if rehearsal.is_rehearsed():
            return rehearsal.kept(self.function.__wrapped__, arguments)
        return self.function(*arguments)


def search(*arguments: Any, **settings: Any) -> Trace:
    """`hypergrad.search`, or what one is planned as."""
    run = rehearsal.searched if rehearsal.is_rehearsed() else search_by_trials
    return run(*arguments, **settings)
