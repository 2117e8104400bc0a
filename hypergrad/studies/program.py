"""Compiled functions that measure their seconds, or are planned instead of run."""

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
    """A function that is compiled at its first call and measures its seconds.

    Attributes:
      compile_seconds: Seconds of the compilation.
      run_seconds: Seconds of all calls together, without the compilation.
    """

    def __init__(self, function: functools.partial):
        self.function, self.compiled, self.plan = function, None, None
        self.compile_seconds = self.run_seconds = 0.0

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.func.__name__

    @property
    def memory(self) -> Memory:
        """Memory of the compiled function, after its first call."""
        if rehearsal.is_rehearsed():
            assert self.plan is not None
            return self.plan.memory
        return memory_from_compiled(self.compiled)

    def __call__(self, *args: Any) -> Any:
        """Returns the result, once it is computed; all calls must have equal shapes."""
        args = jax.tree.map(jnp.asarray, args)
        if rehearsal.is_rehearsed():
            self.plan = self.plan or rehearsal.plan(self.function, args)
            return rehearsal.record_calls(self, self.plan)
        if self.compiled is None:
            start_time = time.perf_counter()
            self.compiled = jax.jit(self.function).lower(*args).compile()
            self.compile_seconds = time.perf_counter() - start_time
        start_time = time.perf_counter()
        result = jax.block_until_ready(self.compiled(*args))
        self.run_seconds += time.perf_counter() - start_time
        return result


@functools.cache
def program(function: Callable, *args: Any) -> Program:
    """Returns the program of a function with its first arguments set.

    The same arguments return the same program, so that it is compiled once per process.
    """
    return Program(functools.partial(function, *args))


class CachedFunction:
    """A function with a cache of its results, as `functools.cache`.

    A dry run has a cache of its own, because its results are zeros.
    """

    def __init__(self, function: Callable):
        self.function = functools.cache(function)
        self.cache_clear = self.function.cache_clear

    def __call__(self, *args: Any) -> Any:
        """Returns the result of the first call with these arguments."""
        if rehearsal.is_rehearsed():
            return rehearsal.cached_result(self.function.__wrapped__, args)
        return self.function(*args)


def search(*args: Any, **options: Any) -> Trace:
    """Returns the trace of `hypergrad.search`, or of its plan in a dry run."""
    run = rehearsal.plan_search if rehearsal.is_rehearsed() else search_by_trials
    return run(*args, **options)
