"""A program and its whole account: traced once, compiled, then run."""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .flops import Flops, count_jaxpr_flops
from .memory import Memory, memory_from_compiled


class CompiledProgram:
    """A compiled function, called with arguments of the shapes it was compiled for.

    Attributes:
      flops, memory: of one call.
      trace_seconds, compile_seconds: what it took to make, by the clock on the wall.
    """

    flops: Flops
    memory: Memory
    trace_seconds: float
    compile_seconds: float

    def __init__(self, function: Callable, *args: Any):
        arrays, self._rest = eqx.partition(args, _is_data)
        began = time.perf_counter()
        run = lambda arrays: function(*eqx.combine(arrays, self._rest))
        traced = jax.jit(run).trace(arrays)
        seen = time.perf_counter()
        self._compiled = traced.lower().compile()
        self.trace_seconds = seen - began
        self.compile_seconds = time.perf_counter() - seen
        self.flops = count_jaxpr_flops(traced.jaxpr)
        self.memory = memory_from_compiled(self._compiled)

    def __call__(self, *args: Any) -> Any:
        """What the function returns; nothing is traced or compiled."""
        arrays, rest = eqx.partition(args, _is_data)
        if not eqx.tree_equal(rest, self._rest):
            raise ValueError(
                "the program was compiled for other arguments: all but arrays, such as "
                f"functions and numbers, must be the same; got {rest}"
            )
        return self._compiled(arrays)

    def __repr__(self) -> str:
        """The account."""
        loops = "".join(
            f"\n  {loop.flops:.3g} FLOPs an iteration: {loop.where}"
            for loop in self.flops.loops
        )
        return (
            f"Program: {self.flops.fixed:.3g} FLOPs, {self.memory.peak:.3g} bytes, "
            f"traced in {self.trace_seconds:.2g} s, "
            f"compiled in {self.compile_seconds:.2g} s{loops}"
        )


def _is_data(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def compile_program(function: Callable, *args: Any) -> CompiledProgram:
    """``function(*args)``, compiled and not run, with its operations, bytes, seconds.

    Args:
      function: any that JAX can trace, such as a step, an estimate or a whole run; it
        returns arrays, or pytrees of them.
      args: pytrees; arrays in them are what the program takes, all else is fixed. An
        array that ``function`` closes over is a constant of the program, and not among
        the bytes: pass a problem as an argument.

    Raises:
      RuntimeError: the backend does not analyse memory.

    A loop that may end early is of unknown length, that of `minimize` over its outer
    steps and those of tolerance-driven solvers among them: ``program.flops.total``
    takes the iterations that each makes in all, in the order of ``program.flops.loops``
    (``len(trace.value)``, and the sums of counts in ``trace.stats``).

    Cost: one trace and one compilation. Bias: those of `flops` and `memory`.

    >>> import jax, jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2)
    >>> def run(problem, w, alpha):
    ...     estimator = hg.Unrolled(hg.Descent(optax.sgd(0.1), 10))
    ...     return hg.hypergradient(problem, estimator)(w, alpha)
    >>> problem, zeros = hg.Bilevel(inner, outer), jnp.zeros(100)
    >>> program = hg.cost.compiled(run, problem, zeros, zeros)
    >>> program.flops.total() > 100 * 10, program.memory.peak > 2 * 100 * 4
    (True, True)
    >>> with hg.cost.measured(watts=65.0, grams_per_kwh=300.0) as spent:
    ...     estimate = jax.block_until_ready(program(problem, zeros, zeros))
    """
    return CompiledProgram(function, *args)
