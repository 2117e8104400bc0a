"""Encoding of results as JSON, and comparison of two encoded results.

A case result is a pytree with string keys. It is stored as a flat dict from leaf path
to a dict of ``dtype``, ``shape`` and one of:

- ``values``: the numbers in row-major order. Each finite float is written with the
  shortest decimal that reads back as the same float; NaN and infinities are strings.
- ``fill``: the common value of a leaf of several equal elements.
- ``sha256`` and ``sum``: digest of the bytes, and sum, of a leaf of more than
  `MAX_VALUES` elements that are not all equal.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

MAX_VALUES = 200
RTOL, ATOL = 1e-5, 1e-8
SHORT_DTYPES, SHORT_RTOL, SHORT_ATOL = ("float16", "bfloat16", "float32"), 1e-2, 1e-4
COUNTS, COUNT_RTOL = ("num_", "gradient_equivalents", "total_cost", "inner_steps"), 0.1

Encoded = dict[str, dict[str, Any]]


class Difference(NamedTuple):
    """Leaf of which two encoded results disagree; None stands for a missing leaf."""

    path: str
    old: dict[str, Any] | None
    new: dict[str, Any] | None


def encode(result: Any) -> Encoded:
    """Returns the leaves of a pytree in encoded form, sorted by path."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): encode_leaf(leaf)
        for path, leaf in jax.tree.leaves_with_path(result)
    }
    return dict(sorted(leaves.items()))


def encode_leaf(leaf: Any) -> dict[str, Any]:
    """Returns dtype, shape and exact values of an array, a number or a string."""
    if isinstance(leaf, str):
        return {"dtype": "str", "shape": [], "values": [leaf]}
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    header = {"dtype": str(array.dtype), "shape": list(array.shape)}
    values = [to_json(value) for value in array.ravel().tolist()]
    if len(values) > 1 and len({repr(value) for value in values}) == 1:
        return header | {"fill": values[0]}
    if len(values) <= MAX_VALUES:
        return header | {"values": values}
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    total = to_json(math.fsum(array.ravel().tolist()))
    return header | {"sha256": digest, "sum": total}


def to_json(value: float) -> float | str:
    """Returns the value, or its name if JSON has no notation for it."""
    is_special = isinstance(value, float) and not math.isfinite(value)
    return str(value) if is_special else value


def exact_differences(old: Encoded, new: Encoded) -> Iterator[Difference]:
    """Yields every leaf of which any bit differs, NaN being equal to NaN."""
    # The text distinguishes -0.0 from 0.0 and True from 1, unlike ``==``.
    to_text = functools.partial(json.dumps, sort_keys=True)
    for path in sorted(old.keys() | new.keys()):
        if to_text(old.get(path)) != to_text(new.get(path)):
            yield Difference(path, old.get(path), new.get(path))


def approximate_differences(old: Encoded, new: Encoded) -> Iterator[Difference]:
    """Yields leaves that differ by more than another environment can explain.

    Paths, dtypes and shapes must be equal, integers, booleans and strings too. Floats
    are close up to `RTOL` and `ATOL`, or up to the tolerances of float32 in a result
    that contains such leaves. Counts of iterations that stop at a tolerance, and costs,
    are close up to `COUNT_RTOL`.
    """
    is_short = any(leaf["dtype"] in SHORT_DTYPES for leaf in old.values())
    rtol, atol = (SHORT_RTOL, SHORT_ATOL) if is_short else (RTOL, ATOL)
    for path in sorted(old.keys() | new.keys()):
        name = path.rpartition("/")[2]
        leaf_rtol = max(rtol, COUNT_RTOL) if name.startswith(COUNTS) else rtol
        if not is_close(old.get(path), new.get(path), leaf_rtol, atol):
            yield Difference(path, old.get(path), new.get(path))


def is_close(
    old: dict[str, Any] | None, new: dict[str, Any] | None, rtol: float, atol: float
) -> bool:
    """Returns True if two encoded leaves agree up to the tolerances."""
    if old is None or new is None:
        return False
    if (old["dtype"], old["shape"]) != (new["dtype"], new["shape"]):
        return False
    if "float" not in old["dtype"]:
        return old == new
    values = decode(old), decode(new)
    if values[0].shape != values[1].shape:  # only one of them is constant
        return False
    return np.allclose(*values, rtol=rtol, atol=atol, equal_nan=True)


def decode(leaf: dict[str, Any]) -> np.ndarray:
    """Returns the values of an encoded float leaf, or the sum of a digested one."""
    if "sha256" in leaf:
        return np.array([float(leaf["sum"])])
    if "fill" in leaf:
        return np.full(math.prod(leaf["shape"]), float(leaf["fill"]))
    return np.array([float(value) for value in leaf["values"]])
