"""``w`` as one vector, for programs whose size does not depend on its leaves.

XLA compiles sums and products of trees leaf by leaf, and implicit differentiation with
its error estimate has many of them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .problem import Bilevel

#: Number of parameters from which the leaves stay apart. They may be spread over
#: devices then, and the program is compiled in less time than it runs.
MAX_SIZE = 2**22


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of the leaves of ``w`` in one vector.

    Attributes:
      structure: Structure of ``w``; None if its leaves stay apart.
      shapes: Shapes of its leaves.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_w(cls, problem: Bilevel, w: PyTree) -> "Layout":
        """Returns the layout for the parameters of a problem.

        Leaves stay apart if there is one at most, if they differ in dtype or have many
        numbers, or if ``w`` also has keys, which the losses take as inputs.
        """
        leaves, structure = jax.tree.flatten(w)
        dtypes = {leaf.dtype for leaf in leaves}
        has_keys = problem.keys_of_w is not None
        size = sum(leaf.size for leaf in leaves)
        if len(leaves) <= 1 or len(dtypes) > 1 or has_keys or size > MAX_SIZE:
            return cls(None)
        return cls(structure, tuple(leaf.shape for leaf in leaves))

    def join(self, tree: PyTree) -> PyTree:
        """Returns the vector of a tree like ``w``; None stays None.

        Leading axes that all leaves have, as one of K losses, are those of the vector.
        """
        if self.structure is None or tree is None:
            return tree
        leaves = jax.tree.leaves(tree)
        leading_axes = leaves[0].shape[: leaves[0].ndim - len(self.shapes[0])]
        rows = [
            leaf.reshape(*leading_axes, math.prod(shape))
            for leaf, shape in zip(leaves, self.shapes, strict=True)
        ]
        return jnp.concatenate(rows, axis=-1)

    def split(self, vector: PyTree) -> PyTree:
        """Returns the tree of a vector; the inverse of ``join``."""
        if self.structure is None or vector is None:
            return vector
        sizes = [math.prod(shape) for shape in self.shapes]
        rows = jnp.split(vector, np.cumsum(sizes)[:-1], axis=-1)
        leaves = [
            row.reshape(*vector.shape[:-1], *shape)
            for row, shape in zip(rows, self.shapes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)

    def with_vector(self, problem: Bilevel) -> Bilevel:
        """Returns the problem whose losses take the vector, without its data.

        Its derivatives are therefore those at a given batch.
        """
        if self.structure is None:
            return problem
        losses: Sequence[Any] = [_LossOfVector(x, self) for x in problem.outer_losses]
        return Bilevel(
            _LossOfVector(problem.inner_loss, self),
            losses[0] if problem.num_objectives is None else tuple(losses),
        )


@dataclasses.dataclass(frozen=True)
class _LossOfVector:
    """Calls ``loss(w, ...)`` with the ``w`` of a vector.

    Two of them are equal if their losses and layouts are, so that JAX traces a loss
    once for all products.
    """

    loss: Callable[..., Any]
    layout: Layout

    def __call__(self, vector: Array, *args: PyTree) -> Any:
        return self.loss(self.layout.split(vector), *args)
