"""Programs that are traced and compiled once, with their operations and bytes."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .flops import Flops, count_jaxpr_flops
from .memory import Memory, memory_from_compiled


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CompiledProgram:
    """A compiled function, made by `compile_program`.

    It is called with arguments of the shapes that it was compiled for.

    Attributes:
      flops, memory: Operations and bytes of one call.
      trace_seconds, compile_seconds: Wall-clock time of tracing and of compiling.
      executable: The compiled function of the arrays in the arguments.
      static_args: The arguments without their arrays, which are part of the program.
    """

    flops: Flops
    memory: Memory
    trace_seconds: float
    compile_seconds: float
    executable: Callable[[PyTree], Any]
    static_args: PyTree

    def __call__(self, *args: Any) -> Any:
        """Returns the result of the function; nothing is traced or compiled.

        Raises:
          ValueError: Arguments that are not arrays differ from those compiled for.
        """
        arrays, static_args = eqx.partition(args, _is_array)
        if not eqx.tree_equal(static_args, self.static_args):
            raise ValueError(
                "args must equal those that the program was compiled for in everything "
                f"but arrays, such as functions and numbers; got {static_args}. "
                "Compile another program."
            )
        return self.executable(arrays)

    def __repr__(self) -> str:
        """Returns the costs in words."""
        loops = "".join(
            f"\n  {loop.flops:.3g} FLOPs per iteration: {loop.location}"
            for loop in self.flops.loops
        )
        return (
            f"CompiledProgram: {self.flops.fixed:.3g} FLOPs, {self.memory.peak:.3g} "
            f"bytes, traced in {self.trace_seconds:.2g} s, "
            f"compiled in {self.compile_seconds:.2g} s{loops}"
        )


def compile_program(function: Callable, *args: Any) -> CompiledProgram:
    """Compiles ``function(*args)`` without running it, and counts its costs.

    A loop that may end early has an unknown length, such as the loop of `minimize` over
    its outer steps and those of solvers with a tolerance. ``program.flops.total`` takes
    the total number of iterations of each, in the order of ``program.flops.loops``: see
    ``len(trace.value)`` and the sums of the counts in ``trace.stats``.

    Args:
      function: Any function that JAX can trace, such as a step, an estimate or a whole
        run. It returns a pytree of arrays.
      args: Pytrees. The arrays in them, or `jax.ShapeDtypeStruct` in their place, are
        the inputs of the program, and everything else is fixed. An array that
        ``function`` closes over is a constant of the program and not counted among its
        bytes: pass a problem as an argument.

    Raises:
      RuntimeError: The backend does not analyze memory.

    Cost: one trace and one compilation.
    Bias: that of `flops` and `memory`.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2)
    >>> def run(problem, w, alpha):
    ...     estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 10))
    ...     return hg.hypergradient(problem, estimator)(w, alpha)
    >>> problem, zeros = hg.Bilevel(inner, outer), jnp.zeros(100)
    >>> program = hg.cost.compile_program(run, problem, zeros, zeros)
    >>> program.flops.total() > 100 * 10, program.memory.peak > 2 * 100 * 4
    (True, True)
    >>> with hg.cost.measure(watts=65.0, grams_per_kwh=300.0) as measurement:
    ...     estimate = jax.block_until_ready(program(problem, zeros, zeros))
    """
    arrays, static_args = eqx.partition(args, _is_array)
    start_time = time.perf_counter()
    run = lambda arrays: function(*eqx.combine(arrays, static_args))
    traced = jax.jit(run).trace(arrays)
    trace_end = time.perf_counter()
    executable = traced.lower().compile()
    compile_end = time.perf_counter()
    return CompiledProgram(
        flops=count_jaxpr_flops(traced.jaxpr),
        memory=memory_from_compiled(executable),
        trace_seconds=trace_end - start_time,
        compile_seconds=compile_end - trace_end,
        executable=executable,
        static_args=static_args,
    )


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
