"""Arrays on several devices, also those of other processes."""

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def placed(tree: PyTree, *axes: str) -> PyTree:
    """Whole on every device, or its leading axis over all of them, as a named axis.

    With several processes each has to call this, with the same numbers.
    """
    mesh = Mesh(np.array(jax.devices()), axes or ("all",))
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # device_put takes no keys to the devices of other processes.
    return jax.jit(lambda tree: tree, out_shardings=sharding)(tree)


def is_apart(x: object) -> bool:
    """Whether other processes hold parts that this one lacks."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array):
        return False
    return not (x.is_fully_addressable or x.is_fully_replicated)


def readable(tree: PyTree) -> PyTree:
    """For the host to read: whole on every device where it `is_apart`."""
    return jax.tree.map(lambda x: placed(x) if is_apart(x) else x, tree)
