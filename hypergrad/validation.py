"""Checks and conversions of arguments, made before anything is compiled.

Structure is checked by shapes. Values are checked only where they are concrete, so that
the same entry points work inside `jax.jit` and `jax.vmap`.
"""

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from .runtime.devices import is_on_host
from .trees import is_key, is_key_or_counter

KEY_SHAPE = jax.eval_shape(lambda: jax.random.key(0))

#: What to do about a leaf of ``w`` or ``alpha`` that is not floating-point.
_REMEDIES = {
    "w": (
        "Put constants into the data, or split w (equinox.partition, nnx.split) and "
        "close over them in the losses."
    ),
    "alpha": (
        "Use hg.search for integers and choices, and hg.Batches(..., with_key=True) "
        "for keys."
    ),
}


# Trees of arrays.


def as_input_arrays(
    w: PyTree, alpha: PyTree, *, differentiable: bool = True
) -> tuple[PyTree, PyTree]:
    """Returns ``w`` and ``alpha`` as arrays.

    Raises:
      TypeError: A leaf of ``w`` is neither floating-point nor a key or a counter, or
        a leaf of ``alpha`` is not floating-point although ``differentiable`` is True.
      ValueError: A concrete leaf contains NaN, or a tree has no leaves.
    """
    w = _as_float_arrays("w", w, is_key_or_counter)
    if all(map(is_key_or_counter, jax.tree.leaves(w))):
        raise ValueError(
            "w must hold at least one floating-point array; got keys and counters only."
        )
    convert = _as_float_arrays if differentiable else _as_arrays
    alpha = convert("alpha", alpha)
    check_no_nan(w, alpha)
    return w, alpha


def as_proposed_alpha(alpha: PyTree) -> PyTree:
    """Returns the ``alpha`` of a trial, which may hold integers, as arrays.

    Raises:
      TypeError: A leaf is no array.
      ValueError: A leaf contains NaN, or there is no leaf.
    """
    alpha = _as_arrays("alpha", alpha)
    check_no_nan((), alpha)
    return alpha


def check_no_nan(w: PyTree, alpha: PyTree) -> None:
    """Raises ValueError if a concrete leaf of ``w`` or ``alpha`` contains NaN."""
    if not any(map(_has_nan, jax.tree.leaves((w, alpha)))):
        return
    for name, tree in (("w", w), ("alpha", alpha)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if _has_nan(leaf):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} must not contain NaN. "
                    "Choose another starting value."
                )


def as_key(key: Any) -> Array:
    """Returns a typed PRNG key; None stands for ``jax.random.key(0)``."""
    if key is None:
        return jax.random.key(0)
    if isinstance(key, int | np.integer):
        raise TypeError(
            f"key must be a PRNG key; got {key}. Write jax.random.key({key})."
        )
    if not hasattr(key, "dtype"):
        raise TypeError(f"key must be a PRNG key; got {type(key).__name__}.")
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    typed_key = key if is_typed else jax.random.wrap_key_data(key)
    if typed_key.shape != ():
        raise ValueError(
            f"key must be a single PRNG key; got an array of shape {typed_key.shape}. "
            "Use jax.vmap over the key for several runs."
        )
    return typed_key


def floats_to_arrays(settings: PyTree) -> PyTree:
    """Returns the settings with numbers as arrays, so that new values trace nothing."""
    is_number = lambda x: isinstance(x, float | np.ndarray | np.generic)
    return jax.tree.map(lambda x: jnp.asarray(x) if is_number(x) else x, settings)


def is_traced(*trees: PyTree) -> bool:
    """Returns True if any leaf is a tracer of an enclosing ``jit`` or ``vmap``."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def check_same_structure(
    name: str,
    tree: PyTree,
    like: PyTree,
    like_name: str = "w",
    verb: Literal["return", "have"] = "return",
) -> None:
    """Raises ValueError unless two trees agree in structure, shapes and dtypes.

    The tree is what a function returns, or is given (``verb="have"``).
    """
    describe = lambda tree: jax.tree.map(
        lambda x: f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}", tree
    )
    has_same_structure = jax.tree.structure(tree) == jax.tree.structure(like)
    leaves = lambda tree: jax.tree.leaves(describe(tree))
    if not has_same_structure or leaves(tree) != leaves(like):
        raise ValueError(
            f"{name} must {verb} the structure, shapes and dtypes of {like_name}, "
            f"{describe(like)}; got {describe(tree)}."
        )


def _has_nan(leaf: Array) -> bool:
    """Returns True if an array is concrete and contains NaN."""
    if isinstance(leaf, Tracer) or not isinstance(leaf.dtype, np.dtype):  # a PRNG key
        return False
    # An accelerator compares on its own; only the outcome is transferred.
    array = np.asarray(leaf) if is_on_host(leaf) else leaf
    return bool((array != array).any())  # only NaN differs from itself


def _as_arrays(name: str, tree: PyTree) -> PyTree:
    is_result = hasattr(tree, "hypergradient") or hasattr(tree, "best_alpha")
    if is_result and hasattr(tree, name):  # an estimate or a trace
        raise TypeError(
            f"{name} must be a pytree of arrays; got {type(tree).__name__}. Pass its "
            f"{name}."
        )
    if not jax.tree.leaves(tree):
        got = f"{type(tree).__name__} without one"
        raise ValueError(f"{name} must hold at least one array; got {got}.")

    def with_strong_dtype(path, leaf):
        if is_key(leaf) or (isinstance(leaf, jax.Array) and not leaf.weak_type):
            return leaf
        try:
            return jnp.asarray(leaf, dtype=jnp.asarray(leaf).dtype)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array; got "
                f"{type(leaf).__name__}. {_REMEDIES[name]}"
            ) from error

    return jax.tree.map_with_path(with_strong_dtype, tree)


def _as_float_arrays(
    name: str, tree: PyTree, is_allowed: Callable[[Array], bool] = lambda leaf: False
) -> PyTree:
    tree = _as_arrays(name, tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not (jnp.issubdtype(leaf.dtype, jnp.floating) or is_allowed(leaf)):
            remedy = _REMEDIES[name]
            if jnp.issubdtype(leaf.dtype, jnp.signedinteger):
                remedy = f"Write 2.0 for 2, or x.astype(float). {remedy}"
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be floating-point; got "
                f"{leaf.dtype}, which has no derivative. {remedy}"
            )
    return tree


def to_arrays(data: PyTree, argument: str = "data") -> PyTree:
    """Converts each leaf to an array, which must be numeric; data must not be empty."""

    def convert(path, leaf):
        name = f"{argument} leaf {jax.tree_util.keystr(path)}" if path else argument
        try:
            array = jnp.asarray(leaf)
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(
                f"{name} must be a numeric array; got {type(leaf).__name__} "
                f"of {getattr(leaf, 'dtype', 'no numbers')}. {_remedy_for_data(leaf)}."
            ) from error
        if array.size == 0 and argument == "data":
            raise ValueError(
                f"{name} must hold at least one example; got shape "
                f"{array.shape}. A loss over no examples has no gradient."
            )
        _check_integers_fit(name, leaf, array.dtype)
        return array

    return jax.tree.map_with_path(convert, data)


def _check_integers_fit(name: str, leaf: Any, dtype: np.dtype) -> None:
    """Raises an error if the integers of an array would wrap around in a dtype."""
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    leaf_dtype = getattr(leaf, "dtype", dtype)
    if not isinstance(leaf_dtype, np.dtype):  # of another library, such as torch
        leaf_dtype = np.asarray(leaf).dtype
    if leaf_dtype.kind not in "iu" or leaf_dtype.itemsize <= dtype.itemsize:
        return
    limits, numbers = jnp.iinfo(dtype), np.asarray(leaf)
    for number in (numbers.min(), numbers.max()) if numbers.size else ():
        if not limits.min <= number <= limits.max:
            raise ValueError(
                f"{name} holds {number}, which {dtype} cannot hold. Renumber such "
                "indices, or set jax_enable_x64."
            )


def _remedy_for_data(leaf: Any) -> str:
    """Returns what to do with a leaf that is no numeric array."""
    if hasattr(leaf, "toarray"):  # scipy.sparse
        return "Pass its toarray()"
    has_numbers = hasattr(leaf, "dtype") or hasattr(leaf, "dtypes")
    if hasattr(leaf, "__iter__") and not (has_numbers or isinstance(leaf, str | bytes)):
        return (
            "Read a loader into arrays, or make a problem of each of its batches; see "
            "'A data loader' on the page on models"
        )
    return "Encode text and categories as integers"


# Objects.


def check_no_class(name: str, value: Any) -> None:
    """Raises TypeError for a class where an instance of it was meant."""
    if isinstance(value, type):
        class_name = value.__name__
        raise TypeError(
            f"{name} must be an instance; got the class {class_name}. Write "
            f"{class_name}(...)."
        )


def check_estimator_type(estimator: Any) -> None:
    """Raises TypeError unless the object is an estimator."""
    check_no_class("estimator", estimator)
    if not (hasattr(estimator, "init") and hasattr(estimator, "estimate")):
        name = type(estimator).__name__
        remedy = ""
        if hasattr(estimator, "solve"):
            remedy = f" Write hg.Implicit({name}(...))."
        elif hasattr(estimator, "update"):
            remedy = " An optimizer comes after the estimator."
        raise TypeError(
            "estimator must have the methods init and estimate, as hg.Implicit(solver) "
            f"and hg.Unrolled(solver) do; got {name}.{remedy}"
        )


def check_solver(solver: Any) -> None:
    """Raises TypeError unless the object is an inner solver."""
    check_no_class("solver", solver)
    if not callable(getattr(solver, "solve", None)):
        raise TypeError(
            "solver must be an inner solver such as hg.Descent(optax.sgd(0.1), 100), "
            f"hg.Newton() or hg.LBFGS(); got {type(solver).__name__}."
        )


def check_optimizer(name: str, value: Any) -> None:
    """Raises TypeError unless the value is an optax transformation."""
    if isinstance(value, optax.GradientTransformation):
        return
    got, remedy = type(value).__name__, ""
    if description := _describe_optax_function(value):
        got = description
    elif isinstance(value, type):
        got = f"the class {value.__name__}"
    elif hasattr(value, "tx"):  # of flax, with the state of the optimizer
        remedy = " Pass its .tx."
    raise TypeError(
        f"{name} must be an optax.GradientTransformation such as optax.sgd(0.1); "
        f"got {got}.{remedy}"
    )


def check_not_optax_factory(name: str, value: Any) -> None:
    """Raises TypeError for ``optax.sgd`` where ``optax.sgd(0.1)`` was meant."""
    if description := _describe_optax_function(value):
        raise TypeError(
            f"{name} must be an optax transformation or a function of alpha; got "
            f"{description}, or write a function alpha -> {name}."
        )


def _describe_optax_function(value: Any) -> str | None:
    """Returns what a function of optax is, with advice; None for anything else."""
    module, name = (getattr(value, f"__{x}__", "") for x in ("module", "qualname"))
    if not (callable(value) and str(module).startswith("optax")):
        return None
    if "<locals>" in name:
        return "a schedule. Pass it to an optimizer, as in optax.sgd(schedule)"
    return f"the factory optax.{name}. Call it first, as in optax.{name}(0.1)"


def check_hashable(name: str, function: Any) -> None:
    """Raises TypeError unless a function can be a static argument of `jax.jit`."""
    try:
        hash(function)
    except TypeError as error:
        raise TypeError(
            f"{name} must be hashable, because it is a static argument of jax.jit; got "
            f"an unhashable {type(function).__name__}. Make it a frozen dataclass "
            "without arrays, which belong to the data."
        ) from error


# Errors of a user's function.


def raise_with_context(error: Exception, context: str) -> NoReturn:
    """Raises the error of a user's function again, followed by ``context``, a sentence.

    An error of another class than TypeError, ValueError and IndexError keeps its own
    message and receives ``context`` as a note.
    """
    if type(error) in (TypeError, ValueError, IndexError):
        text = str(error).strip()
        if text and text[-1] not in ".!?":
            text += "."
        raise type(error)(f"{text} {context}".strip()) from error
    error.add_note(context)
    raise error
