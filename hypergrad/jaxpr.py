"""Facts about a function that are read from its jaxpr: what it uses and holds."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval
from jaxtyping import PyTree

from .products import Loss


def used_inputs(f: Callable[..., Any], *args: PyTree) -> Sequence[bool]:
    """Returns, for each leaf of ``args``, whether ``f`` uses it."""
    closed_jaxpr = jax.make_jaxpr(f)(*args)
    all_outputs = [True] * len(closed_jaxpr.jaxpr.outvars)
    return partial_eval.dce_jaxpr(closed_jaxpr.jaxpr, all_outputs)[1]


def unused_leaves(f: Callable[[PyTree], Any], alpha: PyTree) -> list[str]:
    """Returns the names of the leaves of ``alpha`` that ``f(alpha)`` does not use."""
    paths = (path for path, _ in jax.tree.leaves_with_path(alpha))
    return [
        f"alpha{jax.tree_util.keystr(path)}"
        for path, is_used in zip(paths, used_inputs(f, alpha), strict=True)
        if not is_used
    ]


def uses_w(loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree) -> bool:
    """Returns True if the loss uses any leaf of ``w``."""
    return any(used_inputs(loss, w, alpha, batch)[: len(jax.tree.leaves(w))])


def alpha_has_gradient(
    loss: Loss, w: PyTree, alpha: PyTree, batch: PyTree
) -> Sequence[bool]:
    """Returns, for each leaf of ``alpha``, whether a derivative of the loss reaches it.

    The derivative by a leaf that only `jax.lax.stop_gradient` or a comparison sees does
    not depend on the cotangent of the loss.
    """

    def transposed(w, alpha, batch, cotangent):
        return jax.vjp(lambda alpha: loss(w, alpha, batch), alpha)[1](cotangent)

    cotangent = jax.eval_shape(loss, w, alpha, batch)
    jaxpr = jax.make_jaxpr(transposed)(w, alpha, batch, cotangent).jaxpr
    num_outputs = len(jaxpr.outvars)
    only = lambda i: [i == j for j in range(num_outputs)]
    return [partial_eval.dce_jaxpr(jaxpr, only(i))[1][-1] for i in range(num_outputs)]


def constant_bytes(f: Callable[..., Any], *args: PyTree, **kwargs: PyTree) -> int:
    """Returns the bytes of the arrays that ``f`` closes over."""
    constants = _constants(jax.make_jaxpr(f)(*args, **kwargs))
    return sum(np.size(x) * x.dtype.itemsize for x in constants if hasattr(x, "dtype"))


def _constants(closed_jaxpr: Any) -> Iterator[Any]:
    """Yields the constants of a closed jaxpr and of the jaxprs within it."""
    has_constants = lambda x: hasattr(x, "consts")
    yield from closed_jaxpr.consts
    for equation in closed_jaxpr.jaxpr.eqns:
        for param in jax.tree.leaves(equation.params, is_leaf=has_constants):
            if has_constants(param):
                yield from _constants(param)
