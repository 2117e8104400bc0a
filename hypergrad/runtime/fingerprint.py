"""Whose numbers they are: digests of trees and of programs, the same in any process."""

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
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def digest(tree: PyTree) -> str:
    """SHA-256 over structure, shapes, dtypes and bytes; functions count by name.

    >>> digest((1.0, jnp.sin)) == digest((1.0, jnp.sin))
    True
    >>> digest((1.0, jnp.sin)) == digest((2.0, jnp.sin))
    False
    """
    leaves, structure = jax.tree.flatten(tree)
    found = hashlib.sha256(ADDRESS.sub("", str(structure)).encode())
    for leaf in leaves:
        if not eqx.is_array_like(leaf):
            found.update(ADDRESS.sub("", repr(leaf)).encode())
            continue
        array = to_numpy(leaf)
        found.update(f"{jnp.result_type(leaf)}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return HASH + found.hexdigest()


def digest_program(lowered: Any) -> str:
    """SHA-256 of a program, its constants included: what functions close over."""
    return HASH + hashlib.sha256(lowered.as_text().encode()).hexdigest()


def digest_function(function: Callable, *inputs: PyTree) -> str:
    """That of its program for inputs of these shapes, whatever they are and lie on.

    Cost: one trace.

    >>> times = lambda factor: lambda x: factor * x
    >>> first = digest_function(times(2.0), jnp.ones(3))
    >>> first == digest_function(times(2.0), jnp.zeros(3))
    True
    >>> first == digest_function(times(2.5), jnp.ones(3))
    False
    """
    arrays, static = eqx.partition(inputs, eqx.is_array)
    found = lambda arrays: function(*eqx.combine(arrays, static))
    numbers = lambda arrays: eqx.filter(found(arrays), eqx.is_array_like)
    shapes = jax.eval_shape(lambda arrays: arrays, arrays)
    return digest_program(jax.jit(numbers).lower(shapes))


def fingerprint(*digests: str) -> str:
    """Several digests in a short word."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
