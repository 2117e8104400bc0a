"""Calls in other processes: what they are sent is a program and numbers, no code."""

import functools
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..checkpoint import RunFingerprint, runtime_environment
from ..trees import is_key, to_numpy

PAUSES = 0.001, 0.5  # seconds between looks at what is under way, at first and at most


class Future(Protocol):
    """What comes of a call."""

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        ...

    def result(self) -> Any:
        """What it returned; raises where it did not."""
        ...


class Executor(Protocol):
    """Any of `concurrent.futures`, of submitit, or your own."""

    def submit(self, fn: Callable, /, *args: Any) -> Future:
        """Begins ``fn(*args)``: a function of this package, bytes and NumPy arrays."""
        ...


class LostError(Exception):
    """Calls that did not end well, by their number.

    Attributes:
      errors: what each raised, or why there is nothing of it.
    """

    def __init__(self, errors: dict[int, Exception]):
        super().__init__(errors)
        self.errors = errors


class Remote:
    """A function whose calls an executor runs, whatever it closes over.

    What is sent is the program that JAX traced for the inputs of the first call, so
    that processes that never saw its source can run it, and the arrays among the
    inputs; what else it closes over is in the program.

    Raises:
      ImportError: at the first call, flatbuffers is not installed.
    """

    def __init__(self, executor: Executor, function: Callable):
        self.executor, self.function = executor, function
        self.program, self.structure = b"", None

    def __call__(self, inputs: dict[int, tuple]) -> Iterator[tuple[int, PyTree]]:
        """A call each, all at once; number and outputs of each as it is done.

        Raises:
          LostError: in the end, where calls came to nothing.
        """
        if not self.program:
            self.program, form = exported(self.function, *next(iter(inputs.values())))
            self.structure = jax.tree.structure(form)
        going: dict[int, Future] = {}
        lost: dict[int, Exception] = {}
        for i, of_one in inputs.items():
            try:
                going[i] = self._submit(of_one)
            except Exception as error:  # of as many types as there are executors
                lost[i] = error
        least, most = PAUSES
        pause = least
        while going:
            ended = [i for i, future in going.items() if future.done()]
            for i in ended:
                try:
                    numbers = going.pop(i).result()
                except Exception as error:
                    lost[i] = error
                else:
                    leaves = map(jnp.asarray, numbers)
                    yield i, jax.tree.unflatten(self.structure, leaves)
            pause = least if ended else min(2 * pause, most)
            time.sleep(pause)
        if lost:
            raise LostError(lost)

    def _submit(self, inputs: tuple) -> Future:
        numbers = list(map(to_numpy, jax.tree.leaves(eqx.filter(inputs, eqx.is_array))))
        wide = jnp.result_type(float) == jnp.float64
        return self.executor.submit(
            run, self.program, numbers, runtime_environment(), wide
        )


def exported(function: Callable, *inputs: PyTree) -> tuple[bytes, PyTree]:
    """The program of a function for inputs of these shapes, and what it returns."""
    export = _export()
    arrays, static = eqx.partition(inputs, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def on_numbers(numbers: list) -> list:
        arrays = structure.unflatten(map(_like, leaves, numbers))
        return jax.tree.leaves(function(*eqx.combine(arrays, static)))

    numbers = [jax.random.key_data(x) if is_key(x) else x for x in leaves]
    shapes = jax.eval_shape(lambda numbers: numbers, numbers)  # on whatever devices
    program = export.export(jax.jit(on_numbers))(shapes).serialize()
    return bytes(program), eqx.filter_eval_shape(function, *inputs)


def run(
    program: bytes, numbers: list[np.ndarray], asked: RunFingerprint, wide: bool
) -> list[np.ndarray]:
    """What a worker does.

    Raises:
      RuntimeError: its bits would be others: another version of jax, another device.
    """
    if (here := runtime_environment()) != asked:
        raise RuntimeError(
            f"this worker has jax {here['jax']} and {here['device']}, the search jax "
            f"{asked['jax']} and {asked['device']}; give it workers like itself"
        )
    with jax.enable_x64(wide):
        return list(map(np.asarray, _loaded(program)(numbers)))


@functools.lru_cache(maxsize=2)
def _loaded(program: bytes) -> Callable:
    """Compiled once a process, at its first call."""
    return jax.jit(_export().deserialize(bytearray(program)).call)


def _like(leaf: Any, number: Any) -> Any:
    """A key again, where it was one."""
    if not is_key(leaf):
        return number
    return jax.random.wrap_key_data(number, impl=jax.random.key_impl(leaf))


def _export() -> Any:
    """By which JAX writes programs, and reads them."""
    if find_spec("flatbuffers") is None:
        raise ImportError(
            "to send trials to other processes needs flatbuffers: pip install "
            "'hypergrad-jax[executors]'"
        )
    from jax import export

    return export
