"""A tree as named arrays and a description in JSON: no class is stored, no pickle."""

import io
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..runtime.devices import needs_gather
from ..trees import is_key, to_numpy
from ..validation import is_traced

Arrays = Mapping[str, np.ndarray]
Described = dict[str, Any]
JAX, NUMPY, NUMBER = "jax", "numpy", "number"  # what a leaf was; of a key, which kind


def take_apart(root: str, tree: PyTree) -> tuple[Described, dict[str, np.ndarray]]:
    """Structure and leaves in words, and the leaves by names such as ``w['bias']``.

    Raises:
      TypeError: a leaf is no array and no number; its name says which.
      ValueError: there is none, or two have one name.
    """
    names, leaves = _named(root, tree)
    if not names:
        raise ValueError(f"{root} has no leaves; pass at least one array")
    if len(set(names)) < len(names):
        raise ValueError(f"{root} has leaves of one name: {', '.join(names)}")
    arrays, about = {}, {}
    for name, leaf in zip(names, leaves, strict=True):
        arrays[name] = x = _array(name, leaf)
        about[name] = {"dtype": x.dtype.name, "shape": [*x.shape], "was": _was(leaf)}
    named = jax.tree.unflatten(jax.tree.structure(tree), names)
    return {"structure": _structure(named), "leaves": about}, arrays


def _structure(named: PyTree) -> Any:
    """Names in Python's own containers; of any other class no more than what it is."""
    kind = type(named)
    if named is None or kind is str:
        return named
    if kind is dict and all(type(key) in (str, int) for key in named):
        return {"dict": [[key, _structure(child)] for key, child in named.items()]}
    if kind in (list, tuple):
        return {kind.__name__: [_structure(child) for child in named]}
    return {"class": f"{kind.__module__}.{kind.__qualname__}"}


def _array(name: str, leaf: Any) -> np.ndarray:
    if is_traced(leaf):
        raise TypeError(f"{name} is traced; save outside of jit, vmap and grad")
    if needs_gather(leaf):
        raise ValueError(
            f"{name} lies in parts on several processes; make it whole, and save from "
            "one of them"
        )
    if not eqx.is_array_like(leaf):
        raise TypeError(f"{name} must be an array; got {type(leaf).__name__}")
    array = to_numpy(leaf)
    if not isinstance(getattr(jnp, array.dtype.name, None), type(jnp.float32)):
        raise TypeError(f"{name} must hold numbers; got dtype {array.dtype}")
    return array


def _was(leaf: Any) -> str:
    if is_key(leaf):
        return str(jax.random.key_impl(leaf))
    if isinstance(leaf, np.ndarray | np.generic):
        return NUMPY
    return NUMBER if isinstance(leaf, bool | int | float | complex) else JAX


def put_together(
    root: str, described: Described, arrays: Arrays, like: PyTree | None
) -> PyTree:
    """The tree again; with the structure of ``like`` where that is given.

    Raises:
      ValueError: classes are in it and there is no ``like``, or that has other leaves;
        or a leaf has 64 bits where JAX has 32.
    """
    about = described["leaves"]
    found = {name: _leaf(name, arrays[name], about[name]["was"]) for name in about}
    if like is None:
        return _built(root, described["structure"], found)
    names, leaves = _named(root, like)
    wanted = dict(zip(names, map(_kind, leaves), strict=True))
    there = {name: _kind(leaf) for name, leaf in found.items()}
    for name in [*there, *wanted]:
        if there.get(name) != wanted.get(name):
            raise ValueError(
                f"{name} is {there.get(name, 'not there')} in the model and "
                f"{wanted.get(name, 'not there')} in like"
            )
    return jax.tree.unflatten(jax.tree.structure(like), map(found.get, names))


def _named(root: str, tree: PyTree) -> tuple[list[str], list[Any]]:
    """Names of the leaves, and the leaves."""
    paths = jax.tree.leaves_with_path(tree)
    return [root + jax.tree_util.keystr(p) for p, _ in paths], [x for _, x in paths]


def _kind(leaf: Any) -> str:
    """Of an array, or of its shape and dtype alone."""
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _built(root: str, structure: Any, leaves: Mapping[str, Any]) -> PyTree:
    if structure is None:
        return None
    if isinstance(structure, str):
        return leaves[structure]
    ((kind, inside),) = structure.items()
    if kind == "class":
        raise ValueError(
            f"{root} holds {inside}, and no class is stored; give like=(w, alpha) of "
            "the same structure"
        )
    if kind == "dict":
        return {key: _built(root, child, leaves) for key, child in inside}
    kinds = {"list": list, "tuple": tuple}
    return kinds[kind](_built(root, child, leaves) for child in inside)


def _leaf(name: str, array: np.ndarray, was: str) -> Any:
    """As it was: of JAX, of NumPy, a number of Python's, or keys."""
    if was == NUMPY:
        return array
    if was == NUMBER:
        return array.item()
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"{name} is {array.dtype}, and JAX has 32 bits here; first "
            "jax.config.update('jax_enable_x64', True)"
        )
    if was == JAX:
        return jnp.asarray(array)
    return jax.random.wrap_key_data(jnp.asarray(array), impl=was)


# Files.


def written(arrays: Arrays) -> bytes:
    """As npz; of dtypes that NumPy does not know, the bits."""
    file = io.BytesIO()
    bits: dict[str, Any] = {name: _bits(array) for name, array in arrays.items()}
    np.savez(file, **bits)
    return file.getvalue()


def read(content: bytes, leaves: Described) -> dict[str, np.ndarray]:
    """Those leaves of an npz, in their dtypes."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in leaves}
    for name, array in arrays.items():
        dtype = jnp.dtype(leaves[name]["dtype"])
        arrays[name] = array.view(dtype) if _is_foreign(dtype) else array
    return arrays


def widened(array: np.ndarray) -> np.ndarray:
    """With the same numbers, in a dtype that NumPy knows."""
    if not _is_foreign(array.dtype):
        return array
    if jnp.issubdtype(array.dtype, jnp.floating):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return array.astype(np.float32)  # none of these has more bits
    return array.astype(np.int8)  # nor these: they have four at most


def _is_foreign(dtype: np.dtype) -> bool:
    return dtype.isbuiltin == 2


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}") if _is_foreign(array.dtype) else array
