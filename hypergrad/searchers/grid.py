"""Grid search."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, PyTree

from .. import spaces
from ..number_checks import check_positive_int
from ..spaces.pytree import flatten_space

MAX_POINTS = 100_000


class Grid(eqx.Module):
    """Proposes all combinations of ``num`` points per axis.

    An axis is one number of ``alpha``. The points of a continuous axis are evenly
    spaced from low to high inclusive, on a logarithmic scale if the space has one; a
    single point is the middle. A discrete axis has a point for each value. The last
    axis varies fastest, so a budget that is smaller than the grid omits its end. The
    search ends with the grid.

    Args:
      num: Number of points per continuous axis, static.

    Raises:
      ValueError: ``num`` is below 1. In `init`: the grid has more than 100000 points,
        the space is unbounded, or it has a `Simplex`, whose weights are dependent.

    Budget: 81 trials, nine per axis, for a value within 0.01 (see
      `hypergrad.searchers`).
    Cost: none besides the trials.
    Bias: up to half a spacing per axis.

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
        """Returns the space and the number of proposals."""
        del key
        spaces.axes(space)
        for leaf in flatten_space(space)[0]:
            shape = getattr(leaf, "shape", ())
            if shape and leaf.unit_shape != shape:
                raise ValueError(
                    f"space must have independent entries for Grid; got {leaf}. Use "
                    "hg.searchers.Sobol()."
                )
        sizes = self._sizes(space)
        if math.prod(sizes) > MAX_POINTS:
            raise ValueError(
                f"num must give at most {MAX_POINTS} points; got {math.prod(sizes)} "
                f"points on {len(sizes)} axes. Lower num, or use hg.searchers.Sobol()."
            )
        return {"space": space, "index": 0}

    def ask(self, state: dict, key: Array) -> tuple[PyTree, dict]:
        """Returns the next point; raises StopIteration after the last."""
        del key
        space, index = state["space"], int(state["index"])
        sizes = self._sizes(space)
        if index >= math.prod(sizes):
            raise StopIteration
        positions = np.unravel_index(index, sizes)
        t = [
            position / (size - 1)
            if axis.num_values is None and size > 1
            # The middle of a cell, or of a continuous axis with a single point.
            else (position + 0.5) / size
            for axis, size, position in zip(
                spaces.axes(space), sizes, positions, strict=True
            )
        ]
        return spaces.from_unit(space, np.array(t)), {**state, "index": index + 1}

    def tell(self, state: dict, alpha: PyTree, value: Array) -> dict:
        """Returns the unchanged state."""
        del alpha, value
        return state

    def _sizes(self, space: PyTree) -> list[int]:
        return [axis.num_values or self.num for axis in spaces.axes(space)]
