"""Limits of time and memory of a run."""

import time

from ..cost.memory import resident_bytes
from ..number_checks import positive
from ..runtime.devices import process_max
from ..trace import OUT_OF_MEMORY, OUT_OF_TIME


class Limits:
    """Limits of time and memory, which are checked between chunks of steps."""

    def __init__(self, time_limit: float | None, memory_limit: float | None):
        check = lambda name: positive(name, optional=True, allow_inf=True)
        self.time_limit = check("time_limit")(time_limit)
        self.memory_limit = check("memory_limit")(memory_limit)
        self.start_time = time.monotonic()
        if memory_limit is not None and resident_bytes() is None:
            raise ValueError(
                "memory_limit needs a system that reports the memory of a process, as "
                "Linux does in /proc/self/statm. Leave it out on this system."
            )

    def get_exceeded(self) -> int:
        """Returns the status of an exceeded limit, or 0; equal on all processes."""
        if self.time_limit is None and self.memory_limit is None:
            return 0
        code = 0
        if self.memory_limit is not None and resident_bytes() > self.memory_limit:
            code = OUT_OF_MEMORY
        elapsed = time.monotonic() - self.start_time
        if self.time_limit is not None and elapsed > self.time_limit:
            code = OUT_OF_TIME
        # Clocks and memory differ, but all processes must stop after the same step.
        return process_max(code)
