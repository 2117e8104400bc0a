"""The gap between a surrogate and its metric along a run."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from ..runtime.equal_optimizers import first_equal
from ..validation import floats_to_arrays
from .base import Surrogate


class GapMetric(eqx.Module):
    """A choice among three metrics; its arrays are data, so new ones trace nothing."""

    kind: Literal["exact", "surrogate", "gap"] = eqx.field(static=True)
    surrogate: Any
    predict: Callable = eqx.field(static=True)
    batch: PyTree
    targets: Array
    temperature: Any
    schedule: Callable | None = eqx.field(static=True, converter=first_equal)
    masks: dict[str, Array | None]

    def at_step(self, step: Array) -> "GapMetric":
        """Returns the metric at the temperature of a step, for `minimize`."""
        if self.schedule is None:
            return self
        return dataclasses.replace(self, temperature=self.schedule(step))

    def __call__(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        """Returns the exact metric, the surrogate, or the surrogate less the metric."""
        del key
        scores = self.predict(w, alpha, self.batch)
        exact = self.surrogate.exact(scores, self.targets, **self.masks)
        if self.kind == "exact":
            return exact
        temperature = self.temperature
        if callable(temperature):
            temperature = temperature(scores, self.targets, **self.masks)
        smooth = self.surrogate(
            scores, self.targets, temperature=temperature, **self.masks
        )
        return smooth if self.kind == "surrogate" else smooth - exact


def gap_metrics(
    name: str,
    surrogate: Surrogate,
    predict: Callable[[PyTree, PyTree, PyTree], Array],
    batch: PyTree,
    targets: ArrayLike,
    *,
    temperature: ArrayLike | Callable[..., Array],
    schedule: Callable[[Array], Array] | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> dict[str, Callable[[PyTree, PyTree, Array], Array]]:
    """Returns metrics for `minimize` that record a surrogate, its metric and their gap.

    Args:
      name: Name of the exact metric.
      surrogate: The surrogate, such as ``Accuracy()``.
      predict: Function ``(w, alpha, batch) -> scores``.
      batch: Batch that ``predict`` receives, a pytree of arrays.
      targets, where, weights: As for the surrogate.
      temperature: A number, or a function ``(scores, targets, *, where, weights)`` that
        returns one, such as `temperature_from_scores`. For a surrogate with a threshold
        pass ``functools.partial(temperature_from_scores, threshold=0.0)``.
      schedule: Function ``step -> temperature`` of a run whose temperature changes,
        which replaces ``temperature`` in `minimize`.

    Returns:
      ``{name: exact, name_surrogate: smooth, name_gap: smooth - exact}``, each a
      function ``(w, alpha, key) -> scalar``. Merge several by ``|``.

    Cost: one prediction per metric, not counted in ``trace.cost``.

    Raises:
      TypeError: ``predict`` is not a function.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> predict = lambda w, alpha, batch: batch @ w
    >>> x, y = jnp.array([[1.0], [-2.0], [3.0]]), jnp.array([1, 1, 1])
    >>> metrics = hg.surrogates.gap_metrics(
    ...     "accuracy", hg.surrogates.Accuracy(), predict, x, y, temperature=0.5
    ... )
    >>> values = {name: fn(jnp.ones(1), None, None) for name, fn in metrics.items()}
    >>> {name: round(float(value), 3) for name, value in values.items()}
    {'accuracy': 0.667, 'accuracy_surrogate': 0.632, 'accuracy_gap': -0.035}
    """
    if not callable(predict):
        raise TypeError(
            f"predict must be a function (w, alpha, batch) -> scores; got {predict!r}."
        )
    as_array = lambda x: None if x is None else jnp.asarray(x)
    targets, masks = jnp.asarray(targets), {"where": where, "weights": weights}
    masks = {name: as_array(mask) for name, mask in masks.items()}
    # A float is static under jit: as an array, another temperature traces nothing.
    make_metric = lambda kind: floats_to_arrays(
        GapMetric(
            kind, surrogate, predict, batch, targets, temperature, schedule, masks
        )
    )

    return {
        name: make_metric("exact"),
        f"{name}_surrogate": make_metric("surrogate"),
        f"{name}_gap": make_metric("gap"),
    }
