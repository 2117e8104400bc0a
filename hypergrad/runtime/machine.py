"""The machine on which numbers are computed, and warnings about other machines."""

import functools
import os
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from .console import printable
from .user_warnings import warn_user

Machine = dict[str, str]
#: What determines the bits of a run: names, and digests or texts.
RunFingerprint = dict[str, str]

PROCESSORS = Path("/proc/cpuinfo")
#: Flags of the instructions by which XLA computes on several numbers at once. They
#: decide the order of its sums, and whether it rounds between product and sum.
VECTOR_FLAG = re.compile(r"(s?sse|avx|amx|fma|f16c|asimd|sve|sme(?!p)|fphp|bf16)\w*")


def describe_machine() -> Machine:
    """Returns what rounding depends on, besides JAX and the kind of device.

    For a CPU these are its model, its vector instructions and the number of cores that
    this process may use, among which XLA divides a matrix product. For any other device
    it is the version of its driver.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        return {"driver": " ".join(str(device.client.platform_version).split())}
    return dict(_describe_processor())


@functools.cache
def _describe_processor() -> Machine:
    text = PROCESSORS.read_text() if PROCESSORS.exists() else ""
    return parse_processors(text) | {"cores": str(_count_cores())}


def _count_cores() -> int:
    """Returns the number of cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_processors(text: str) -> Machine:
    """Returns model and vector instructions of the first processor of a Linux system.

    Args:
      text: Content of ``/proc/cpuinfo``, or an empty text on another system.
    """
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    names = (
        ("model name", "cpu family", "model"),  # x86
        ("CPU implementer", "CPU part", "CPU variant"),  # Arm
    )
    model = [f"{name} {fields[name]}" for x in names for name in x if name in fields]
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": ", ".join(model) or platform.processor() or platform.machine(),
        "vector instructions": " ".join(sorted(filter(VECTOR_FLAG.fullmatch, flags))),
    }


def warn_of_other_machines(subject: str, machines: Iterable[Any]) -> None:
    """Issues a warning that names in what other machines differ from this one.

    Args:
      subject: What was made there, as the beginning of a sentence.
      machines: Results of `describe_machine`; anything else is an unknown machine.
    """
    current = describe_machine()
    texts = [_describe_difference(x, current) for x in machines if x != current]
    if texts:
        warn_user(
            f"{subject} on another machine ({'; or '.join(dict.fromkeys(texts))}). "
            "Numbers that are computed here may differ from those in their last digits"
        )


def _describe_difference(saved: Any, current: Machine) -> str:
    if not isinstance(saved, Mapping) or not saved:
        return "which was not recorded"
    texts = []
    for name in sorted(saved.keys() | current.keys()):
        old, new = str(saved.get(name, "unknown")), current.get(name, "unknown")
        if old == new:
            continue
        if name != "vector instructions":
            texts.append(f"{name}: {old} there, {new} here")
            continue
        for flags, reference, where in ((old, new, "there"), (new, old, "here")):
            if only := sorted(set(flags.split()) - set(reference.split())):
                texts.append(f"{name} only {where}: {' '.join(only)}")
    return printable(", ".join(texts))


def runtime_environment() -> RunFingerprint:
    """Returns what the bits of a run depend on in addition to its program."""
    from jaxlib.version import __version__ as jaxlib_version

    device = jax.devices()[0]
    return {
        "jax": f"{jax.__version__} on jaxlib {jaxlib_version}",
        "device": f"{device.platform} {device.device_kind}",
        "number of processes": str(jax.process_count()),
    }
