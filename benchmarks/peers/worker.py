"""One contender at one work, with its setting of what it leaves open, as JSON:

    python -m benchmarks.peers.worker CONTENDER WORK DATA SETTING

Speaks JSON lines. First what preparing and the first call took, the peak of resident
memory and the answer, or why there is none; then, for each number of calls that comes
in on a line, how long these took and how busy other processes were meanwhile.
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

# Of what is imported, these tell their versions.
TOLD = (
    "betty", "boat_torch", "higher", "hypergrad", "jax", "jaxlib", "jaxopt",
    "learn2learn", "lineax", "numpy", "optax", "optimistix", "torch", "torchopt",
)  # fmt: skip
SHARE = 0.75  # of the machine's memory that one contender may take


def busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def give_back() -> None:
    """Memory that is no longer needed, to others that are measured beside this."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def timed(call: Callable[[], Any], number: int) -> dict[str, float]:
    """Seconds a call, and how much of a core others used at the same time."""
    others, own, start = busy(), time.process_time(), time.perf_counter()
    for _ in range(number):
        call()
    seconds = time.perf_counter() - start
    others = busy() - others - (time.process_time() - own)
    return {"seconds": seconds / number, "others": others / seconds}


def peak() -> int:
    """Bytes resident at the most so far, of this program alone.

    What `getrusage` tells includes the process that started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0])


def limit() -> None:
    """A contender that asks for too much fails, and no other with it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = int(SHARE * memory)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def versions() -> dict[str, str]:
    """By distribution, of what is imported and `TOLD`."""
    provides = importlib.metadata.packages_distributions()
    names = {d for name in TOLD if name in sys.modules for d in provides.get(name, ())}
    found = {name: importlib.metadata.version(name) for name in sorted(names)}
    return found | {"Python": platform.python_version()}


def load(path: str) -> dict[str, Any]:
    """What `save` wrote."""
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
    """Arrays, numbers and lists of arrays; lists one by one, in their order."""
    arrays = {}
    for name, value in data.items():
        parts = value if isinstance(value, list) else None
        if parts is None:
            arrays[name] = np.asarray(value)
        else:
            arrays |= {f"{name}/{i}": part for i, part in enumerate(parts)}
    np.savez(path, **arrays)


def own_voice() -> TextIO:
    """What was standard output, to which a library may print no longer."""
    voice = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return voice


def main(contender: str, work: str, path: str, setting: str = "{}") -> None:
    """Until the input ends."""
    voice = own_voice()
    say = lambda **line: print(json.dumps(line), file=voice, flush=True)
    limit()
    try:
        module = importlib.import_module(f"benchmarks.peers.contenders.{contender}")
        start = time.perf_counter()
        call = module.WORKS[work](load(path), **json.loads(setting))
        prepared = time.perf_counter()
        answer = np.asarray(call(), float).ravel()
        first = time.perf_counter()
        most = peak()
        give_back()
        told = {
            "prepared": prepared - start,
            "first": first - prepared,
            "peak": most,
            "notes": call.notes() if hasattr(call, "notes") else {},
            "versions": versions(),
        }
    except Exception as error:  # of a peer's, which is its row
        say(failed=f"{type(error).__name__}: {error}"[:300])
        return
    say(**told, answer=answer.tolist())
    for line in sys.stdin:
        took = timed(call, int(line))
        give_back()
        say(**took)


if __name__ == "__main__":
    main(*sys.argv[1:])
