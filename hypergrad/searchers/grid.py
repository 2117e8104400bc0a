"""Grid search."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, PyTree

from .. import spaces
from ..spaces.pytree import flatten_space
from ..validation import check_positive_int

LIMIT = 100_000


class Grid(eqx.Module):
    """Every combination of ``num`` points an axis; all values of a discrete one.

    An axis is one number of ``alpha``. Its points are evenly spaced from low to high,
    both included, in the logarithm where the space says so; of one point, the middle.
    The last axis moves fastest, so that a budget below the grid leaves out its end;
    the search ends with the grid.

    Args:
      num: points on each continuous axis. Static.

    Raises:
      ValueError: ``num`` below 1; at `init`, a grid of more than 100000 points, a
        `Simplex`, whose weights are no axes, or an unbounded space.

    Budget: 81 trials, nine an axis, for a value within 0.01 (see
    `hypergrad.searchers`).

    Cost: none beside the trials. Bias: up to half a spacing an axis.

    >>> import jax, hypergrad as hg
    >>> searcher = hg.searchers.Grid(num=3)
    >>> state = searcher.init(hg.spaces.Interval(0.01, 1.0, log=True), None)
    >>> for _ in range(3):
    ...     alpha, state = searcher.ask(state, jax.random.key(0))
    ...     print(round(float(alpha), 3))
    0.01
    0.1
    1.0
    """

    num: int = eqx.field(static=True)

    is_multi_objective = True

    def __check_init__(self):
        check_positive_int("num", self.num)

    def init(self, space: PyTree, key: Array) -> dict:
        """The space, and how many points were asked for."""
        del key
        for kind in flatten_space(space)[0]:
            if kind.unit_shape != kind.shape:
                raise ValueError(
                    f"{kind} has no grid, its entries depend on each other; use "
                    "hg.searchers.Sobol()"
                )
        sizes = self._sizes(space)
        if math.prod(sizes) > LIMIT:
            raise ValueError(
                f"the grid has {math.prod(sizes)} points ({len(sizes)} axes), at most "
                f"{LIMIT} are searched; lower num, or use hg.searchers.Sobol()"
            )
        return {"space": space, "index": 0}

    def ask(self, state: dict, key: Array) -> tuple[PyTree, dict]:
        """The next point; StopIteration after the last."""
        del key
        index, sizes = int(state["index"]), self._sizes(state["space"])
        if index >= math.prod(sizes):
            raise StopIteration
        axes = spaces.axes(state["space"])
        t = [
            cell / (size - 1) if axis.num_values is None and size > 1
            # The middle of a cell, or of a continuous axis with one point.
            else (cell + 0.5) / size
            for axis, size, cell in zip(
                axes, sizes, np.unravel_index(index, sizes), strict=True
            )
        ]  # fmt: skip
        alpha = spaces.from_unit(state["space"], np.array(t))
        return alpha, {**state, "index": index + 1}

    def tell(self, state: dict, alpha: PyTree, value: Array) -> dict:
        """Learns nothing."""
        del alpha, value
        return state

    def _sizes(self, space):
        return [axis.num_values or self.num for axis in spaces.axes(space)]
