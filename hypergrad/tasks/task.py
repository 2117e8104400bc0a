"""The description of a task, and checks of the arguments that describe one."""

from collections.abc import Callable, Collection
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from ..inner.base import InnerSolver
from ..problem import Bilevel
from ..recording import Metric, check_metrics


class Task(eqx.Module):
    """A bilevel problem with real data, starting points and exact metrics.

    Attributes:
      name: Name of the task, as in `hypergrad.tasks.TASKS`.
      paradigm: Learning paradigm, such as 'supervised'.
      source: Paper that the task follows.
      problem: The two losses and their data.
      solver: Inner solver.
      w: Inner starting point.
      alpha: Starting point of the hyperparameters.
      space: Set of admissible values of ``alpha``.
      metrics: Exact metrics ``{name: fn(w, alpha, key) -> scalar}``. No name is that of
        a column of a trace.
      splits: ``{name of a split: its examples}``, for tables and for methods that do
        not train on ``problem.inner_data``, such as training on the validation examples
        only; None if the task offers none.
      exact: ``alpha -> hypergradient`` in closed form, or None if none is known.
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
    splits: PyTree = None
    exact: Callable[[PyTree], PyTree] | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_metrics(self.metrics)

    def metric_values(self, w: PyTree, alpha: PyTree, key: Array) -> dict[str, Array]:
        """Returns the value of every metric at one point."""
        return {name: metric(w, alpha, key) for name, metric in self.metrics.items()}


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Checks an argument that takes one of a few values.

    Raises:
      ValueError: ``value`` is not one of ``choices``.
    """
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}.")


def sizes_of(name: str, defaults: dict[str, Any], sizes: dict[str, Any]) -> dict:
    """Returns the default sizes of a task, updated with the sizes of the caller.

    Args:
      name: Name of the task.
      defaults: Default sizes.
      sizes: Sizes passed to ``make``.

    Raises:
      TypeError: A size has a name that is not in ``defaults``.
    """
    if unknown := set(sizes) - set(defaults):
        raise TypeError(
            f"sizes of {name}.make must be among {', '.join(defaults)}; got "
            f"{', '.join(sorted(unknown))}."
        )
    return defaults | sizes
