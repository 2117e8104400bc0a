"""Bytes, as XLA planned them and as a process holds them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes that a compiled program needs on each device.

    Attributes:
      arguments, outputs: what goes in and what comes out.
      temporaries: what stands in between, buffers that can share a place counted once.
      aliased: outputs that take the place of donated arguments.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def peak(self) -> int:
        """All of them: arguments and outputs are held for the whole run."""
        return self.arguments + self.outputs + self.temporaries - self.aliased


def memory(function: Callable, *args: Any) -> Memory:
    """Bytes of ``function(*args)``, which is compiled and not run.

    Args:
      function: any that JAX can compile; one that is jitted keeps its settings, such as
        the arguments that it donates.
      args: arrays, pytrees of them, or `jax.ShapeDtypeStruct`.

    Raises:
      RuntimeError: the backend does not analyse memory.

    Cost: one compilation. Bias: constants of the program and the code are left out, and
    what libraries allocate by themselves, such as a GPU's for its matrix products.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> hg.cost.memory(lambda x: x[:2] + 1.0, jnp.ones(100, jnp.float32)).arguments
    400
    """
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    return memory_from_compiled(jitted.lower(*args).compile())


def memory_from_compiled(program: Any) -> Memory:
    """Bytes of a compiled program."""
    found = program.memory_analysis()
    if found is None:
        raise RuntimeError(
            f"XLA tells no memory of programs for {jax.default_backend()}"
        )
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )


def resident_bytes() -> int | None:
    """Bytes of this process in the machine's memory; None where no one can tell.

    By Linux's ``/proc``. The one number that all of POSIX has is a peak, which a
    process that has let go of its arrays does not come down from.
    """
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
