"""Digests of data and programs that are equal in every process."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..trees import to_numpy

HASH = "sha256 "
#: The option of JAX by which arrays that functions close over become arguments.
CONSTANTS_OUTSIDE = "jax_use_simplified_jaxpr_constants"
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def digest(tree: PyTree) -> str:
    """Returns the SHA-256 of structure, shapes, dtypes and bytes of a pytree.

    A leaf that is not an array, such as a function, contributes its name.

    >>> digest((1.0, jnp.sin)) == digest((1.0, jnp.sin))
    True
    >>> digest((1.0, jnp.sin)) == digest((2.0, jnp.sin))
    False
    """
    leaves, structure = jax.tree.flatten(tree)
    sha256 = hashlib.sha256(ADDRESS.sub("", str(structure)).encode())
    for leaf in leaves:
        if not eqx.is_array_like(leaf):
            sha256.update(ADDRESS.sub("", repr(leaf)).encode())
            continue
        array = to_numpy(leaf)
        sha256.update(f"{jnp.result_type(leaf)}{array.shape}".encode())
        sha256.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return HASH + sha256.hexdigest()


def digest_program(lowered: Any) -> str:
    """Returns the SHA-256 of a lowered program and of the arrays that it closes over.

    JAX writes these arrays into the text of the program or, if its option
    `CONSTANTS_OUTSIDE` is set, passes large ones as arguments beside the text.

    Raises:
      ValueError: The arrays are neither in the text nor beside it, so that two programs
        with different data would have one digest.
    """
    lowered = getattr(lowered, "lowered", lowered)  # Equinox wraps what JAX returns
    text = HASH + hashlib.sha256(lowered.as_text().encode()).hexdigest()
    constants = getattr(lowered._lowering, "const_args", None)
    if constants is None:
        if getattr(jax.config, CONSTANTS_OUTSIDE, False):  # noqa: TID251 - it is only read
            raise ValueError(
                f"JAX {jax.__version__} does not show the arrays that a program closes "
                "over, by which checkpoints, saved models and resumable searches are "
                f"compared. Set {CONSTANTS_OUTSIDE.upper()}=0 in the environment."
            )
        return text
    return digest([text, *constants]) if constants else text


def digest_function(function: Callable, *inputs: PyTree) -> str:
    """Returns the digest of a function's program for inputs of these shapes.

    The values of arrays among the inputs and their devices do not matter; numbers that
    are no arrays are part of the program.

    Cost: one trace.

    >>> times = lambda factor: lambda x: factor * x
    >>> first = digest_function(times(2.0), jnp.ones(3))
    >>> first == digest_function(times(2.0), jnp.zeros(3))
    True
    >>> first == digest_function(times(2.5), jnp.ones(3))
    False
    """
    arrays, static = eqx.partition(inputs, eqx.is_array)

    def call(arrays):
        result = function(*eqx.combine(arrays, static))
        return eqx.filter(result, eqx.is_array_like)

    shapes = jax.eval_shape(lambda arrays: arrays, arrays)
    return digest_program(jax.jit(call).lower(shapes))


def fingerprint(*digests: str) -> str:
    """Returns 16 hexadecimal digits that identify several digests."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
