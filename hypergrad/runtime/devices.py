"""Arrays on several devices, also those of other processes; what those agree on."""

from collections.abc import Callable

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def shard(tree: PyTree, *axes: str) -> PyTree:
    """Whole on every device, or its leading axis over all of them, as a named axis.

    With several processes each has to call this, with the same numbers.
    """
    mesh = Mesh(np.array(jax.devices()), axes or ("all",))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # device_put takes no keys to the devices of other processes.
    return jax.jit(lambda tree: tree, out_shardings=sharding)(tree)


def needs_gather(x: object) -> bool:
    """Whether other processes hold parts that this one lacks."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        return False
    return not (x.is_fully_addressable or x.is_fully_replicated)


def replicate(tree: PyTree) -> PyTree:
    """For the host to read: whole on every device where it `is_apart`."""
    return jax.tree.map(lambda x: shard(x) if needs_gather(x) else x, tree)


def process_max(number: int) -> int:
    """Of the numbers that all processes bring, each its own."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def run_on_first_process(act: Callable[[], PyTree], like: PyTree = None) -> PyTree:
    """What the first process alone does; its arrays, where it returns any, in all.

    Args:
      act: returns NumPy arrays like ``like``, or None.

    Raises:
      RuntimeError: in the others, where ``act`` raised in the first.
    """
    if jax.process_count() == 1:
        return act()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    made, error = None, None
    if jax.process_index() == 0:
        try:
            made = act()
        except BaseException as raised:  # the others wait to be told
            error = raised
    state = np.array([error is not None, made is not None], np.uint8)
    failed, is_made = broadcast_one_to_all(state)
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("the first process could not go on; its message says why")
    if not is_made:
        return None
    bits = lambda x: np.frombuffer(x.tobytes(), np.uint8)  # a sum of -0 and 0 is 0
    sent = broadcast_one_to_all(jax.tree.map(bits, like if made is None else made))
    numbers = lambda x, b: np.frombuffer(np.asarray(b), x.dtype).reshape(x.shape)
    return jax.tree.map(numbers, like, sent)
