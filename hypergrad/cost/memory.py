"""Bytes that XLA plans for a program, and bytes that a process holds."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes that a compiled program needs on each device.

    Attributes:
      arguments: Bytes of the arguments.
      outputs: Bytes of the outputs.
      temporaries: Bytes of intermediate values; buffers that share memory count once.
      aliased: Bytes of outputs that reuse the memory of donated arguments.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def peak(self) -> int:
        """Bytes of all of them, because arguments and outputs exist throughout."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


def memory(function: Callable, *args: Any) -> Memory:
    """Returns the bytes of ``function(*args)``, which is compiled and not run.

    Args:
      function: Any function that JAX can compile. A jitted function keeps its settings,
        such as the arguments that it donates.
      args: Arrays, pytrees of arrays, or `jax.ShapeDtypeStruct`.

    Raises:
      RuntimeError: The backend does not analyze memory.

    Cost: one compilation.
    Bias:
      The analysis leaves out the code, constants of the program, and memory that
      libraries allocate themselves, such as a GPU's for matrix products.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> hg.cost.memory(lambda x: x[:2] + 1.0, jnp.ones(100, jnp.float32)).arguments
    400
    """
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    return memory_from_compiled(jitted.lower(*args).compile())


def memory_from_compiled(program: Any) -> Memory:
    """Returns the bytes of a program that was compiled by ``lower(...).compile()``."""
    program = getattr(program, "compiled", program)  # that of equinox is inside
    analysis = program.memory_analysis()
    if analysis is None:
        raise RuntimeError(
            f"XLA does not report the memory of programs for {jax.default_backend()}. "
            "Use the CPU, or measure the memory while the program runs."
        )
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
    )


def resident_bytes() -> int | None:
    """Returns the bytes of main memory that this process holds; None if unknown.

    The number is read from ``/proc`` of Linux. All of POSIX has only the maximum so
    far, which does not fall when a process frees its arrays.
    """
    try:
        num_pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(num_pages) * os.sysconf("SC_PAGE_SIZE")
