"""One contender at one work: `python -m benchmarks.peers.worker CONTENDER WORK DATA`.

Speaks JSON lines. First what preparing and the first call took, the peak of resident
memory and the answer, or why there is none; then, for each number of calls that comes
in on a line, how long these took and how busy other processes were meanwhile.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def busy() -> float:
    """Seconds that all cores together have worked since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(call: Callable[[], Any], number: int) -> dict[str, float]:
    """Seconds a call, and how much of a core others used at the same time."""
    others, own, start = busy(), time.process_time(), time.perf_counter()
    for _ in range(number):
        call()
    seconds = time.perf_counter() - start
    others = busy() - others - (time.process_time() - own)
    return {"seconds": seconds / number, "others": others / seconds}


def peak() -> int:
    """Bytes resident at the most so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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


def say(**line: Any) -> None:
    """To the process that asked."""
    print(json.dumps(line), flush=True)


def main(contender: str, work: str, path: str) -> None:
    """Until the input ends."""
    try:
        module = importlib.import_module(f"benchmarks.peers.contenders.{contender}")
        call = module.WORKS[work](load(path))
        start = time.perf_counter()
        answer = np.asarray(call(), float).ravel()
        first = time.perf_counter() - start
    except Exception as error:  # of a peer's, which is its row
        say(failed=f"{type(error).__name__}: {error}"[:300])
        return
    say(first=first, peak=peak(), answer=answer.tolist())
    for line in sys.stdin:
        say(**timed(call, int(line)), peak=peak())


if __name__ == "__main__":
    main(*sys.argv[1:])
