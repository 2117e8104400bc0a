"""Conversion between pytrees and named arrays with a JSON description, without pickle.

No class is stored: a tree of other containers than dict, list, tuple and None can be
restored only into a tree of the same structure.
"""

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
Description = dict[str, Any]

# Origin of a leaf; for PRNG keys it is the name of their implementation.
JAX, NUMPY, NUMBER = "jax", "numpy", "number"


def flatten_tree(root: str, tree: PyTree) -> tuple[Description, dict[str, np.ndarray]]:
    """Returns a description of a tree and its leaves as NumPy arrays.

    Args:
      root: Name of the tree, with which the names of its leaves start.
      tree: Pytree of arrays, numbers and PRNG keys.

    Returns:
      The description, which JSON can hold, and ``{name: array}`` with names such as
      ``w['bias']``.

    Raises:
      TypeError: A leaf is neither an array nor a number; the message names the leaf.
      ValueError: The tree has no leaves, or two leaves have the same name.
    """
    names, leaves = _named_leaves(root, tree)
    if not names:
        raise ValueError(f"{root} must have at least one array; got no leaves.")
    if len(set(names)) < len(names):
        raise ValueError(
            f"{root} must have leaves of distinct names; got {', '.join(names)}."
        )
    arrays, descriptions = {}, {}
    for name, leaf in zip(names, leaves, strict=True):
        array = _to_array(name, leaf)
        arrays[name] = array
        descriptions[name] = {
            "dtype": array.dtype.name,
            "shape": [*array.shape],
            "was": _origin(leaf),
        }
    tree_of_names = jax.tree.unflatten(jax.tree.structure(tree), names)
    structure = _describe_structure(tree_of_names)
    return {"structure": structure, "leaves": descriptions}, arrays


def _describe_structure(tree: PyTree) -> Any:
    """Returns a tree of leaf names as JSON; of other classes only the class name."""
    kind = type(tree)
    if tree is None or kind is str:
        return tree
    if kind is dict and all(type(key) in (str, int) for key in tree):
        items = [[key, _describe_structure(child)] for key, child in tree.items()]
        return {"dict": items}
    if kind in (list, tuple):
        return {kind.__name__: [_describe_structure(child) for child in tree]}
    return {"class": f"{kind.__module__}.{kind.__qualname__}"}


def _to_array(name: str, leaf: Any) -> np.ndarray:
    if is_traced(leaf):
        raise TypeError(
            f"{name} must be concrete; got a tracer. Save outside of jit, vmap and "
            "grad."
        )
    if needs_gather(leaf):
        raise ValueError(
            f"{name} must be on one process; got an array distributed over several. "
            "Replicate it, and save from one of them."
        )
    if not eqx.is_array_like(leaf):
        raise TypeError(f"{name} must be an array; got {type(leaf).__name__}.")
    array = to_numpy(leaf)
    if not isinstance(getattr(jnp, array.dtype.name, None), type(jnp.float32)):
        raise TypeError(f"{name} must contain numbers; got dtype {array.dtype}.")
    return array


def _origin(leaf: Any) -> str:
    """Returns the library of a leaf, or the implementation of a PRNG key."""
    if is_key(leaf):
        return str(jax.random.key_impl(leaf))
    if isinstance(leaf, np.ndarray | np.generic):
        return NUMPY
    return NUMBER if isinstance(leaf, bool | int | float | complex) else JAX


def unflatten_tree(
    root: str, description: Description, arrays: Arrays, like: PyTree | None
) -> PyTree:
    """Returns the tree from what `flatten_tree` returned.

    Args:
      root: Name of the tree.
      description, arrays: Results of `flatten_tree`.
      like: Tree of arrays, or of shapes and dtypes, with the structure of the result;
        None for the structure in the description.

    Raises:
      ValueError: The tree contains classes and ``like`` is not given; ``like`` has
        other leaves; or a leaf has 64 bits but JAX is limited to 32.
    """
    leaves = {
        name: _restore_leaf(name, arrays[name], leaf["was"])
        for name, leaf in description["leaves"].items()
    }
    if like is None:
        return _build_tree(root, description["structure"], leaves)
    names, like_leaves = _named_leaves(root, like)
    expected = dict(zip(names, map(_dtype_and_shape, like_leaves), strict=True))
    stored = {name: _dtype_and_shape(leaf) for name, leaf in leaves.items()}
    for name in [*stored, *expected]:
        if stored.get(name) != expected.get(name):
            raise ValueError(
                f"like must have the leaves of the model; got {name} as "
                f"{expected.get(name, 'no leaf')}, which is "
                f"{stored.get(name, 'no leaf')} in the model."
            )
    return jax.tree.unflatten(jax.tree.structure(like), map(leaves.get, names))


def _named_leaves(root: str, tree: PyTree) -> tuple[list[str], list[Any]]:
    """Returns the names of the leaves and the leaves."""
    paths = jax.tree.leaves_with_path(tree)
    names = [root + jax.tree_util.keystr(path) for path, _ in paths]
    return names, [leaf for _, leaf in paths]


def _dtype_and_shape(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _build_tree(root: str, structure: Any, leaves: Mapping[str, Any]) -> PyTree:
    """Returns the tree that a structure of `_describe_structure` describes."""
    if structure is None:
        return None
    if isinstance(structure, str):
        return leaves[structure]
    ((kind, children),) = structure.items()
    if kind == "class":
        raise ValueError(
            f"like must be given, because {root} contains {children} and classes are "
            "not stored. Pass like=(w, alpha) of the same structure."
        )
    if kind == "dict":
        return {key: _build_tree(root, child, leaves) for key, child in children}
    container = {"list": list, "tuple": tuple}[kind]
    return container(_build_tree(root, child, leaves) for child in children)


def _restore_leaf(name: str, array: np.ndarray, origin: str) -> Any:
    """Returns an array as a leaf of its origin."""
    if origin == NUMPY:
        return array
    if origin == NUMBER:
        return array.item()
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(
            f"{name} must have at most 32 bits, because JAX is limited to 32; got "
            f"{array.dtype}. Call jax.config.update('jax_enable_x64', True) first."
        )
    if origin == JAX:
        return jnp.asarray(array)
    return jax.random.wrap_key_data(jnp.asarray(array), impl=origin)


# Files.


def to_npz(arrays: Arrays) -> bytes:
    """Returns the content of an npz file; dtypes unknown to NumPy are kept as bits."""
    file = io.BytesIO()
    bits: dict[str, Any] = {name: _to_bits(array) for name, array in arrays.items()}
    np.savez(file, **bits)
    return file.getvalue()


def from_npz(content: bytes, descriptions: Description) -> dict[str, np.ndarray]:
    """Returns the described leaves of an npz file in their dtypes."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in descriptions}
    for name, array in arrays.items():
        dtype = jnp.dtype(descriptions[name]["dtype"])
        arrays[name] = array.view(dtype) if _is_extension(dtype) else array
    return arrays


def widen_dtype(array: np.ndarray) -> np.ndarray:
    """Returns the same numbers in a dtype that NumPy has without extensions."""
    if not _is_extension(array.dtype):
        return array
    if jnp.issubdtype(array.dtype, jnp.floating):
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return array.astype(np.float32)  # no such dtype has more bits
    return array.astype(np.int8)  # the extensions' integers have at most four bits


def _is_extension(dtype: np.dtype) -> bool:
    """Returns True for a dtype that a package adds to NumPy, such as bfloat16."""
    return dtype.isbuiltin == 2


def _to_bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}") if _is_extension(array.dtype) else array
