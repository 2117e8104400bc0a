"""Counts of what one device of several does, each with equally many examples.

``python -m benchmarks.shared.growth_devices METHOD`` prints them, in a process whose
host platform has been forced to have several devices.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hypergrad.bench import Row

from .growth_programs import Sizes, init_arrays, run

DEVICES = [2, 4, 8, 16]
SIZES_PER_DEVICE = {"parameters": 100, "examples": 1000}
FLAG = "--xla_force_host_platform_device_count"


@functools.cache
def count_on_devices(method: str) -> dict[int, Row]:
    """Returns `count_one_device` by the number of devices, from another process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={max(DEVICES)}"
    command = [sys.executable, "-m", "benchmarks.shared.growth_devices", method]
    result = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return dict(zip(DEVICES, json.loads(result.stdout), strict=True))


def count_one_device(method: str, num_devices: int) -> Row:
    """Returns the compiler's counts of one device's part of the program.

    The body of a loop is counted once.
    """
    sizes = Sizes(**SIZES_PER_DEVICE | {"devices": num_devices})
    sizes = sizes._replace(examples=sizes.examples * num_devices)
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    data, *args = jax.eval_shape(functools.partial(init_arrays, sizes))
    data = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), data
    )
    program = jax.jit(functools.partial(run, method, sizes))
    compiled: Any = program.lower(data, data, *args).compile()
    return {
        "operations": compiled.cost_analysis()["flops"],
        "scratch": compiled.memory_analysis().temp_size_in_bytes,
        "unknown": [],
    }


if __name__ == "__main__":
    print(json.dumps([count_one_device(sys.argv[1], number) for number in DEVICES]))
