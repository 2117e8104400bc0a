"""The process of one contender at one work, with its options as JSON:

    python -m benchmarks.peers.worker CONTENDER WORK DATA OPTIONS

It writes JSON lines. The first contains the seconds of the preparation and of the first
call, the peak of resident memory and the result, or the reason why there is none. Each
line of the input is a number of calls, which is answered by the seconds per call and
the load by other processes.
"""

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

# Packages whose versions are reported if they are imported.
REPORTED_PACKAGES = (
    "betty", "boat_torch", "higher", "hypergrad", "jax", "jaxlib", "jaxopt",
    "learn2learn", "lineax", "numpy", "optax", "optimistix", "torch", "torchopt",
)  # fmt: skip
MEMORY_FRACTION = 0.75  # of the machine, which one contender may allocate


def busy_seconds() -> float:
    """Returns the busy time of all cores since the machine was started."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def free_memory() -> None:
    """Returns unused memory to the system, for the other contenders."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def time_calls(call: Callable[[], Any], num_calls: int) -> dict[str, float]:
    """Returns the seconds per call, and the cores that other processes used."""
    init_busy, init_process = busy_seconds(), time.process_time()
    start_time = time.perf_counter()
    for _ in range(num_calls):
        call()
    seconds = time.perf_counter() - start_time
    busy, process = busy_seconds() - init_busy, time.process_time() - init_process
    return {"seconds": seconds / num_calls, "others": (busy - process) / seconds}


def peak_memory() -> int:
    """Returns the maximum of resident bytes of this process.

    That of `getrusage` includes the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])


def limit_memory() -> None:
    """Limits the memory, so that a contender that needs more fails alone."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    max_bytes = int(MEMORY_FRACTION * memory)
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def package_versions() -> dict[str, str]:
    """Returns the versions of `REPORTED_PACKAGES` by distribution."""
    distributions = importlib.metadata.packages_distributions()
    names = {
        distribution
        for package in REPORTED_PACKAGES
        if package in sys.modules
        for distribution in distributions.get(package, ())
    }
    versions = {name: importlib.metadata.version(name) for name in sorted(names)}
    return versions | {"Python": platform.python_version()}


def load(path: str) -> dict[str, Any]:
    """Returns the data that `save` wrote."""
    data: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as stored:
        for name, value in stored.items():
            head, _, index = name.partition("/")
            if index:
                data.setdefault(head, []).append(value)
            else:
                data[head] = value if value.ndim else value.item()
    return data


def save(path: Path, data: dict[str, Any]) -> None:
    """Writes arrays, numbers and lists of arrays into one file."""
    arrays = {}
    for name, value in data.items():
        if isinstance(value, list):
            arrays |= {f"{name}/{i}": leaf for i, leaf in enumerate(value)}
        else:
            arrays[name] = np.asarray(value)
    np.savez(path, **arrays)


def redirect_stdout() -> TextIO:
    """Returns standard output; all that libraries print goes to standard error."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return output


def main(contender: str, work: str, path: str, options: str = "{}") -> None:
    """Runs the first call, and then as many as each line of the input requests."""
    output = redirect_stdout()
    write_line = lambda **line: print(json.dumps(line), file=output, flush=True)
    limit_memory()
    try:
        module = importlib.import_module(f"benchmarks.peers.contenders.{contender}")
        start_time = time.perf_counter()
        call = module.WORKS[work](load(path), **json.loads(options))
        prepared_time = time.perf_counter()
        result = np.asarray(call(), float).ravel()
        first_line = {
            "prepared": prepared_time - start_time,
            "first": time.perf_counter() - prepared_time,
            "peak": peak_memory(),
        }
        free_memory()
        first_line["notes"] = call.notes() if hasattr(call, "notes") else {}
        first_line["versions"] = package_versions()
    except Exception as error:  # the row of this contender states it
        write_line(failed=f"{type(error).__name__}: {error}"[:300])
        return
    write_line(**first_line, answer=result.tolist())
    for line in sys.stdin:
        timing = time_calls(call, int(line))
        free_memory()
        write_line(**timing)


if __name__ == "__main__":
    main(*sys.argv[1:])
