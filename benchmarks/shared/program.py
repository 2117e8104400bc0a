"""Compiled functions that measure their seconds."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypergrad.cost.memory import Memory, memory_from_compiled


class Program:
    """A function that is compiled at its first call and measures its seconds.

    Attributes:
      compile_seconds: Seconds of the compilation.
      run_seconds: Seconds of all calls together, without the compilation.
    """

    def __init__(self, function: Callable):
        self.function, self.compiled = function, None
        self.compile_seconds = self.run_seconds = 0.0

    def timed(self, *args: Any) -> tuple[Any, float]:
        """Returns the result and the seconds of this call, not of its compilation."""
        prev_seconds = self.run_seconds
        result = self(*args)
        return result, self.run_seconds - prev_seconds

    @property
    def memory(self) -> Memory:
        """Memory of the compiled function, after its first call."""
        return memory_from_compiled(self.compiled)

    def __call__(self, *args: Any) -> Any:
        """Returns the result, once it is computed; all calls must have equal shapes."""
        args = jax.tree.map(jnp.asarray, args)
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


def timed(function: Callable, *args: Any) -> tuple[Any, float]:
    """Returns the result of a function, and its seconds with any compilation."""
    start_time = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start_time
