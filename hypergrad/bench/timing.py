"""Seconds of a call, apart from those in which XLA compiles."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(eq=False)  # blocks with equal numbers are different blocks
class Seconds:
    """Seconds of a block of code.

    Attributes:
      total: Wall-clock seconds, compilation included.
      compilation: Seconds in which XLA compiled or read a compiled program from a
        cache. Tracing is not among them.
    """

    total: float = 0.0
    compilation: float = 0.0


class _OpenBlocks(threading.local):
    """The blocks that a thread measures; XLA compiles in the thread that calls."""

    def __init__(self):
        self.blocks: list[Seconds] = []


_open = _OpenBlocks()


@contextlib.contextmanager
def measure_seconds() -> Iterator[Seconds]:
    """Measures the seconds of a block; the numbers are complete after its end."""
    _listen()
    seconds, start_time = Seconds(), time.perf_counter()
    _open.blocks.append(seconds)
    try:
        yield seconds
    finally:
        _open.blocks.remove(seconds)
        seconds.total = time.perf_counter() - start_time


def _add_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event == COMPILE_EVENT:
        for seconds in _open.blocks:
            seconds.compilation += duration_secs


_is_listening = False


def _listen() -> None:
    """Registers the listener once; JAX keeps it until the process ends."""
    global _is_listening
    if not _is_listening:
        jax.monitoring.register_event_duration_secs_listener(_add_compilation)
        _is_listening = True
