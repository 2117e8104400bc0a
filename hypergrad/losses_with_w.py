"""The outer losses that use ``w``, which alone need a derivative through ``w*``.

Of K outer losses some may be costs of ``alpha`` itself, such as a number of FLOPs.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .jaxprs.inspection import uses_w
from .problem import Bilevel


def losses_with_w(
    problem: Bilevel, w: PyTree, alpha: PyTree, batch: PyTree
) -> Sequence[int]:
    """Returns the indices of the outer losses that use ``w``; if none does, the first.

    Shapes are then those of an estimate, whose adjoint is zero.
    """
    losses = problem.outer_losses
    if len(losses) == 1:
        return (0,)
    with_w = [i for i, loss in enumerate(losses) if uses_w(loss, w, alpha, batch)]
    return with_w or (0,)


def pull_back_losses(
    problem: Bilevel,
    pullback: Callable[[PyTree], PyTree],
    outer_grad: PyTree,
    indices: Sequence[int],
) -> PyTree:
    """Returns ``pullback(dM/dw)`` of each outer loss.

    It is zero for K losses that are not among the ``indices``.
    """
    num_losses = problem.num_objectives
    if num_losses is None or len(indices) == num_losses:
        return problem.for_each_loss(pullback)(outer_grad)
    pulled = jax.vmap(pullback)(take_losses(outer_grad, indices))
    return fill_losses(pulled, indices, num_losses)


def take_losses(tree: PyTree, indices: Sequence[int]) -> PyTree:
    """Returns these entries of the leading axes."""
    return jax.tree.map(lambda leaf: leaf[np.array(indices)], tree)


def fill_losses(tree: PyTree, indices: Sequence[int], num_losses: int) -> PyTree:
    """Returns leading axes of ``num_losses``, with zeros beside the given entries."""
    order = np.full(num_losses, len(indices))
    order[np.array(indices)] = np.arange(len(indices))

    def fill(leaf):
        zero = jnp.zeros_like(leaf[:1])
        return jnp.concatenate([leaf, zero])[order]

    return jax.tree.map(fill, tree)
