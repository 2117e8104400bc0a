"""What a task is."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from ..inner.base import InnerSolver
from ..minimize import Metric
from ..problem import Bilevel


class Task(eqx.Module):
    """A problem with real data, where to begin, and what to measure.

    Attributes:
      name, paradigm, source: what it is, and the paper it comes from.
      problem, solver: the two losses with their data, and the inner solver.
      w, alpha: starting points.
      space: what ``alpha`` may be.
      metrics: exact ones, ``{name: fn(w, alpha, key) -> scalar}``.
      exact: ``alpha -> hypergradient`` where it is known in closed form, else None.
    """

    name: str = eqx.field(static=True)
    paradigm: str = eqx.field(static=True)
    source: str = eqx.field(static=True)
    problem: Bilevel
    solver: InnerSolver
    w: PyTree
    alpha: PyTree
    space: PyTree
    metrics: dict[str, Metric]
    exact: Callable[[PyTree], PyTree] | None = eqx.field(static=True, default=None)

    def metric_values(self, w: PyTree, alpha: PyTree, key: Array) -> dict[str, Array]:
        """Every metric at one point."""
        return {name: metric(w, alpha, key) for name, metric in self.metrics.items()}


def sizes_of(name: str, standard: dict[str, Any], given: dict[str, Any]) -> dict:
    """The standard sizes, and those given in their place; refuses others."""
    if unknown := set(given) - set(standard):
        raise TypeError(
            f"{name}.make has no argument {', '.join(sorted(unknown))}; its sizes are "
            f"{', '.join(standard)}"
        )
    return standard | given
