"""Pareto fronts, computed from preferences."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from ..estimators.base import Estimator
from ..outer_loop.loop import OuterLoop
from ..problem import Bilevel
from ..trace import Trace
from ..validation import is_traced
from .base import Aggregator
from .scalarization import WeightedSum


def pareto_front(
    problem: Bilevel,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    w: PyTree,
    alpha: PyTree,
    preferences: Float[Array, "P ..."],
    *,
    aggregator_fn: Callable[[Array], Aggregator] = WeightedSum,
    num_steps: int,
    key: Array | None = None,
    **options: Any,
) -> Trace:
    """Returns the trace of one run per preference, all in one program under ``vmap``.

    Args:
      problem, estimator, optimizer: As for `hypergrad.OuterLoop`.
      w, alpha, key: Where every run starts, as for `hypergrad.minimize`.
      preferences: One row per run, such as weights ``[P, K]``.
      aggregator_fn: Function that makes an aggregator of a preference, such as
        `EPO` or ``lambda p: hg.objectives.SmoothTchebycheff(p, 0.01)``. Defaults to
        `WeightedSum`.
      num_steps: Number of steps of each run.
      **options: Further options of `hypergrad.OuterLoop`.

    Returns:
      A trace whose leaves have a leading axis of size P. ``trace.alpha`` holds the
      points of the Pareto set. ``trace.value[:, -1]``, ``[P, K]``, holds the front, at
      the ``alpha`` before the last step.

    Cost: P runs. Each step makes one inner solve and one adjoint solve, in which the K
    losses are columns of one loop, so that the inner gradient is linearized once. The
    statistics count a product for each column.

    Raises:
      TypeError, ValueError: An argument is invalid.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = (lambda w, alpha, batch: w**2, lambda w, alpha, batch: (w - 1.0) ** 2)
    >>> preferences = jnp.array([[3.0, 1.0], [1.0, 3.0]]) / 4
    >>> trace = hg.objectives.pareto_front(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.25),
    ...     0.0, 3.0, preferences, num_steps=30,
    ... )
    >>> trace.alpha.round(4).tolist()
    [0.25, 0.75]
    """
    if jnp.ndim(preferences) == 0:
        raise ValueError("preferences must have shape [P, ...]; got one number.")
    if len(preferences) == 0:
        raise ValueError("preferences must have at least one row; got none.")
    if not callable(aggregator_fn):
        raise TypeError(
            "aggregator_fn must be a function of a preference that returns an "
            f"aggregator, such as hg.objectives.EPO; got {aggregator_fn!r}."
        )
    if not is_traced(preferences):
        for preference in jnp.asarray(preferences):
            _check_preference(preference, aggregator_fn)

    def run(preference: Array) -> Trace:
        aggregator = aggregator_fn(preference)
        loop = OuterLoop(
            problem, estimator, optimizer, aggregator=aggregator, **options
        )
        return loop.run(loop.init(w, alpha, key), num_steps=num_steps)

    return jax.vmap(run)(jnp.asarray(preferences))


def _check_preference(
    preference: Array, aggregator_fn: Callable[[Array], Aggregator]
) -> None:
    """Raises ValueError if no aggregator can be made of a preference."""
    try:
        aggregator_fn(preference)
    except TypeError as error:
        raise TypeError(
            "aggregator_fn must make an aggregator of a preference, as "
            f"hg.objectives.EPO does; got {aggregator_fn!r}: {error}"
        ) from error
    except ValueError as error:
        if preference.ndim:
            raise
        raise ValueError(
            "preferences must have shape [P, K] for an aggregator with weights; got "
            f"one number per run: {error}"
        ) from error
