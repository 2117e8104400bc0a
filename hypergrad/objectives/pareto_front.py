"""A Pareto front: traced by preferences, and measured."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from ..estimators.base import Estimator
from ..minimize import OuterLoop
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
    preferences: Array,
    *,
    aggregator_fn: Callable[[Array], Aggregator] = WeightedSum,
    num_steps: int,
    key: Array | None = None,
    **options: Any,
) -> Trace:
    """One run of `hypergrad.minimize` a preference, all in one program under ``vmap``.

    Args:
      problem, estimator, optimizer, w, alpha, num_steps, key: as for
        `hypergrad.minimize`; every run starts from the same ``w``, ``alpha``, ``key``.
      preferences: ``[P, ...]``; each row makes a combiner: ``[P, K]`` of weights.
      aggregator_fn: ``preference -> aggregator``, such as `WeightedSum` or
        ``lambda p: hg.objectives.SmoothTchebycheff(p, 0.01)``.
      **options: others of `hypergrad.minimize`, but for ``progress``.

    Returns:
      A trace whose leaves lead with P: ``trace.alpha`` are the Pareto set's points,
      ``trace.value[:, -1]``, ``[P, K]``, the front's, at the ``alpha`` before the last
      step.

    Cost: P runs; each step has one inner solve, and one adjoint solve for all K losses
    together: they are columns of one loop, which linearises the inner gradient once.
    The ledger counts a product for each column.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: (w - alpha) ** 2
    >>> outer = (lambda w, alpha, batch: w**2, lambda w, alpha, batch: (w - 1.0) ** 2)
    >>> preferences = jnp.array([[3.0, 1.0], [1.0, 3.0]]) / 4
    >>> trace = hg.objectives.front(
    ...     hg.Bilevel(inner, outer), hg.Implicit(hg.Newton()), optax.sgd(0.25),
    ...     0.0, 3.0, preferences, num_steps=30,
    ... )
    >>> trace.alpha.round(4).tolist()
    [0.25, 0.75]
    """
    if jnp.ndim(preferences) == 0:
        raise ValueError("preferences must be [P, ...], a row a run; got one number")
    if not callable(aggregator_fn):
        raise TypeError(
            "aggregator_fn must be a function of a preference that returns a combiner, such "
            f"as hg.objectives.EPO without arguments; got {aggregator_fn!r}"
        )
    if not is_traced(preferences):
        for preference in jnp.asarray(preferences):
            _check_taken(preference, aggregator_fn)

    def run(preference: Array) -> Trace:
        aggregator = aggregator_fn(preference)
        loop = OuterLoop(
            problem, estimator, optimizer, aggregator=aggregator, **options
        )
        return loop.run(loop.init(w, alpha, key), num_steps=num_steps)

    return jax.vmap(run)(jnp.asarray(preferences))


def _check_taken(
    preference: Array, aggregator_fn: Callable[[Array], Aggregator]
) -> None:
    """The combiner refuses what it cannot take, by its value."""
    try:
        aggregator_fn(preference)
    except ValueError as error:
        if preference.ndim:
            raise
        raise ValueError(
            "each of preferences is one number here; for weights they must be [P, K], "
            f"a row a run: {error}"
        ) from error


def non_dominated(points: Array) -> Array:
    """``[P]``: whether no other point is as low in every value and lower in one.

    Args:
      points: ``[P, K]``, values to be minimised; one with a NaN is dominated and
        dominates none. Equal points do not dominate each other.

    Cost: P² comparisons.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> points = jnp.array([[1.0, 3.0], [2.0, 1.0], [2.0, 3.0]])
    >>> hg.objectives.non_dominated(points).tolist() == [True, True, False]
    True
    """
    points = jnp.asarray(points)
    if points.ndim != 2:
        raise ValueError(f"points must be [P, K]; got shape {points.shape}")
    one, other = points[:, None], points[None]
    below = jnp.all(other <= one, axis=-1) & jnp.any(other < one, axis=-1)
    return ~jnp.any(below, axis=1) & ~jnp.any(jnp.isnan(points), axis=1)


def hypervolume(points: Array, reference: Array) -> Array:
    """Volume that the points dominate, bounded by ``reference``; exact.

    Args:
      points: ``[P, K]``, values to be minimised; a dominated one adds nothing, nor does
        one that is not below ``reference`` in every value.
      reference: ``[K]``, a bad value of each loss.

    Cost: ``P^(K-1)`` times ``log P``, memory alike: for few losses. NaN where a point
    is.

    Source: Zitzler & Thiele 1999.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> points = jnp.array([[1.0, 3.0], [2.0, 1.0]])
    >>> float(hg.objectives.hypervolume(points, jnp.array([4.0, 4.0])))
    7.0
    """
    points, reference = jnp.asarray(points), jnp.asarray(reference)
    if points.ndim != 2 or points.size == 0 or reference.shape != points.shape[1:]:
        raise ValueError(
            "points must be [P, K] and reference [K]; got shapes "
            f"{points.shape} and {reference.shape}"
        )
    return _volume(jnp.minimum(points, reference[None]), reference)


hypervolume.citations = ("zitzler1999",)  # pyright: ignore[reportFunctionMemberAccess]


def _volume(points: Array, reference: Array) -> Array:
    """By slices: between two points' last values it is the volume of those below."""
    if reference.size == 1:
        return reference[0] - jnp.min(points)
    points = points[jnp.argsort(points[:, -1])]
    heights = jnp.diff(points[:, -1], append=reference[-1])
    rest, end = points[:, :-1], reference[:-1]
    if reference.size == 2:
        return heights @ (end - jax.lax.cummin(rest[:, 0]))
    below = jnp.tri(len(points), dtype=bool)
    slices = jax.vmap(lambda i: _volume(jnp.where(i[:, None], rest, end[None]), end))
    return heights @ slices(below)
