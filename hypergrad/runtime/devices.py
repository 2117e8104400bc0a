"""Arrays on several devices and processes, and agreement between processes."""

from collections.abc import Callable

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def shard(tree: PyTree, axis: str | None = None) -> PyTree:
    """Places a tree on all devices of all processes.

    Every process must call this function, with the same values.

    Args:
      tree: Pytree of arrays.
      axis: Name of the mesh axis over which the leading axis of each leaf is split.
        Defaults to None: every device then holds the whole tree.
    """
    mesh = Mesh(np.array(jax.devices()), (axis or "all",))
    sharding = NamedSharding(mesh, PartitionSpec(*filter(None, (axis,))))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # device_put cannot place PRNG keys on the devices of other processes.
    return jax.jit(lambda tree: tree, out_shardings=sharding)(tree)


def needs_gather(x: object) -> bool:
    """Returns True if other processes hold parts of an array that this one lacks."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        return False
    return not (x.is_fully_addressable or x.is_fully_replicated)


def is_on_host(x: jax.Array) -> bool:
    """Returns True if NumPy can read all of a concrete array without a transfer."""
    return not needs_gather(x) and all(d.platform == "cpu" for d in x.devices())


def replicate(tree: PyTree) -> PyTree:
    """Returns the tree with every leaf readable on this process; see `needs_gather`."""
    return jax.tree.map(lambda x: shard(x) if needs_gather(x) else x, tree)


def process_max(number: int) -> int:
    """Returns the maximum of the numbers that all processes pass."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def run_on_first_process(fn: Callable[[], PyTree], like: PyTree = None) -> PyTree:
    """Calls a function on the first process only and returns its result on all.

    Args:
      fn: Returns a pytree of NumPy arrays, or None.
      like: Pytree with the structure, shapes and dtypes of that result.

    Raises:
      RuntimeError: On the other processes, if ``fn`` raised an error on the first.
    """
    if jax.process_count() == 1:
        return fn()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = fn()
        except BaseException as raised:  # the others wait for the broadcast below
            error = raised
    outcome = np.array([error is not None, result is not None], np.uint8)
    failed, has_result = broadcast_one_to_all(outcome)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(
            "the first process failed, and this process cannot continue without it. "
            "See the error message of the first process."
        )
    if not has_result:
        return None
    # Bytes are sent, because the broadcast adds zeros, which would turn -0 into 0.
    to_bytes = lambda x: np.frombuffer(x.tobytes(), np.uint8)
    payload = jax.tree.map(to_bytes, like if result is None else result)
    received = broadcast_one_to_all(payload)
    from_bytes = lambda x, b: np.frombuffer(np.asarray(b), x.dtype).reshape(x.shape)
    return jax.tree.map(from_bytes, like, received)
