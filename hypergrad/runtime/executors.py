"""Calls in other processes, which receive a compiled program and arrays but no code."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..trees import is_key, to_numpy
from . import compat
from .machine import (
    Machine,
    RunFingerprint,
    describe_machine,
    runtime_environment,
    warn_of_other_machines,
)

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.001, 0.5


class Executor(Protocol):
    """Runs functions, such as an executor of `concurrent.futures` or of submitit."""

    def submit(self, fn: Callable, /, *args: Any) -> Any:
        """Starts ``fn(*args)``: a function of this package, and arguments to pickle.

        Returns:
          An object with the methods ``done()`` and ``result()``.
        """
        ...


class FailedCallsError(Exception):
    """Calls that ended with an error, or could not be started.

    Attributes:
      causes: The error of each failed call, by its number.
    """

    def __init__(self, causes: dict[int, Exception]):
        super().__init__(causes)
        self.causes = causes


class RemoteFunction:
    """A function whose calls run on an executor.

    Workers receive the program that JAX traces for the arguments of the first call,
    with everything that the function closes over, and the arrays among the arguments.
    They never import the function itself.

    Args:
      executor: Runs the calls.
      function: A function that `jax.jit` could compile.

    Raises:
      ImportError: flatbuffers is not installed; raised at the first call.
    """

    def __init__(self, executor: Executor, function: Callable):
        self.executor, self.function = executor, function
        self.program, self.machines = b"", []
        self.out_structure: Any = None

    def __call__(self, arguments: dict[int, tuple]) -> Iterator[tuple[int, PyTree]]:
        """Starts all calls and yields ``(number, output)`` of each as soon as it ends.

        Raises:
          FailedCallsError: Some calls failed; raised after all others have ended.
        """
        if not self.program:
            example = next(iter(arguments.values()))
            self.program = export_program(self.function, *example)
            outputs = eqx.filter_eval_shape(self.function, *example)
            self.out_structure = jax.tree.structure(outputs)
        pending: dict[int, Any] = {}
        causes: dict[int, Exception] = {}
        for number, args in arguments.items():
            try:
                pending[number] = self._submit(args)
            except Exception as error:  # each library of executors has its own types
                causes[number] = error
        poll_seconds = MIN_POLL_SECONDS
        while pending:
            done = [number for number, future in pending.items() if future.done()]
            for number in done:
                try:
                    machine, leaves = pending.pop(number).result()
                except Exception as error:
                    causes[number] = error
                else:
                    self._check_machine(machine)
                    leaves = map(jnp.asarray, leaves)
                    yield number, jax.tree.unflatten(self.out_structure, leaves)
            poll_seconds = (
                MIN_POLL_SECONDS if done else min(2 * poll_seconds, MAX_POLL_SECONDS)
            )
            time.sleep(poll_seconds)
        if causes:
            raise FailedCallsError(causes)

    def _check_machine(self, machine: Machine) -> None:
        """Issues a warning at the first result of each other machine."""
        if machine not in self.machines:
            self.machines.append(machine)
            warn_of_other_machines("a worker runs", [machine])

    def _submit(self, args: tuple) -> Any:
        arrays = jax.tree.leaves(eqx.filter(args, eqx.is_array))
        return self.executor.submit(
            run_program,
            self.program,
            list(map(to_numpy, arrays)),
            runtime_environment(),
            jnp.result_type(float) == jnp.float64,
        )


def export_program(function: Callable, *args: PyTree) -> bytes:
    """Returns the serialized program of a function for arguments of these shapes.

    The program maps the list of the arrays in ``args``, with the key data of PRNG keys,
    to the list of the function's outputs.

    Raises:
      ValueError: The program calls functions on the host.
    """
    export = _import_export()
    arrays, static = eqx.partition(args, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def flat_function(flat_args: list) -> list:
        arrays = structure.unflatten(map(_wrap_key_data, leaves, flat_args))
        return jax.tree.leaves(function(*eqx.combine(arrays, static)))

    flat_args = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    # Shapes without a sharding, so that the program fits any device of its kind.
    shapes = jax.eval_shape(lambda flat_args: flat_args, flat_args)
    try:
        return bytes(export.export(jax.jit(flat_function))(shapes).serialize())
    # JAX has this type for a program with functions on the host.
    except NotImplementedError as error:
        raise ValueError(
            "the program of a trial cannot be sent to an executor, which runs it in "
            f"other processes: {error}. If losses call functions on the host, as by "
            "jax.debug.print or jax.pure_callback, run the search without parallel, or "
            "with hg.Parallel(n, 'vmap') if each callback has a vmap_method."
        ) from error


def _wrap_key_data(like: Any, x: Any) -> Any:
    """Returns ``x``, or the PRNG key with this data if ``like`` is a key."""
    if not is_key(like):
        return x
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))


def run_program(
    program: bytes,
    arrays: list[np.ndarray],
    expected_environment: RunFingerprint,
    enable_x64: bool,
) -> tuple[Machine, list[np.ndarray]]:
    """Runs an exported program; this is the function that workers call.

    Returns:
      The worker's machine, and the outputs of the program.

    Raises:
      RuntimeError: The worker has another version of jax or another kind of device, on
        which results could differ in their last bits.
    """
    environment = runtime_environment()
    expected = expected_environment
    if names := [name for name in expected if environment[name] != expected[name]]:
        listing = lambda entries: ", ".join(f"{x} {entries[x]}" for x in names)
        raise RuntimeError(
            f"workers must have {listing(expected)}, as this search; got "
            f"{listing(environment)}."
        )
    with compat.enable_x64(enable_x64):
        outputs = list(map(np.asarray, _load_program(program)(arrays)))
    return describe_machine(), outputs


@functools.lru_cache(maxsize=2)
def _load_program(program: bytes) -> Callable:
    """Returns an exported program as a function that is compiled once per process."""
    return jax.jit(_import_export().deserialize(bytearray(program)).call)


def _import_export() -> Any:
    """Returns `jax.export`; raises an ImportError that names the missing package."""
    compat.import_optional("flatbuffers", "an executor needs flatbuffers", "executors")
    from jax import export

    return export
