"""Leaves of ``w`` that are no parameters: PRNG keys and the counters of a model.

The state of a flax nnx model has both, beside its parameters. They have no derivative
and stay what they are in a whole run. Estimators and solvers never see them: they get
the parameters, with None in place of the other leaves, and a problem that holds the
other leaves as data and gives them to its losses.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .trees import is_key_or_counter

if TYPE_CHECKING:
    from .problem import Bilevel


def bind_keys(problem: "Bilevel", w: PyTree) -> tuple["Bilevel", PyTree]:
    """Returns the problem of the parameters alone, and the parameters.

    A ``w`` without keys and counters is returned as it is, with its problem.
    """
    if (keys := keys_of(w)) is None:
        return problem, w
    is_none = lambda x: x is None
    bound = eqx.tree_at(lambda p: p.keys_of_w, problem, keys, is_leaf=is_none)
    return bound, remove_keys(w)


def bind_keys_to_function(
    fn: Callable[..., Any], keys: PyTree | None
) -> Callable[..., Any]:
    """Returns ``fn(w, ...)`` as a function of the parameters in place of ``w``.

    The keys are leaves of the returned function, which is a pytree, so that compiled
    programs take them as inputs. Without keys it is ``fn`` itself.
    """
    if keys is None:
        return fn
    return jax.tree_util.Partial(_WithKeys(fn), keys)


@dataclasses.dataclass(frozen=True)
class _WithKeys:
    """Calls ``fn(w, ...)`` with ``w`` put together from its keys and parameters."""

    fn: Callable[..., Any]

    def __call__(self, keys: PyTree, parameters: PyTree, *args: PyTree) -> Any:
        return self.fn(restore_keys(parameters, keys), *args)


def remove_keys(w: PyTree) -> PyTree:
    """Returns ``w`` with None in place of keys and counters."""
    return jax.tree.map(lambda leaf: None if is_key_or_counter(leaf) else leaf, w)


def keys_of(w: PyTree) -> PyTree | None:
    """Returns ``w`` with None for parameters, or None if it has nothing else."""
    if not any(map(is_key_or_counter, jax.tree.leaves(w))):
        return None
    return jax.tree.map(lambda leaf: leaf if is_key_or_counter(leaf) else None, w)


def restore_keys(parameters: PyTree, keys: PyTree | None) -> PyTree:
    """Returns the ``w`` of parameters and of what `keys_of` has returned.

    >>> import jax
    >>> w = {"scale": 1.0, "key": jax.random.key(0)}
    >>> restore_keys({"scale": 2.0, "key": None}, keys_of(w))["scale"]
    2.0
    """
    return parameters if keys is None else eqx.combine(parameters, keys)
