"""The gap between a surrogate and its metric, reported along a run."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from ..validation import floats_to_arrays
from .base import Surrogate


class _Reading(eqx.Module):
    """One of three metrics; arrays are data, so that another run traces nothing."""

    which: str = eqx.field(static=True)
    surrogate: Any
    predict: Callable = eqx.field(static=True)
    batch: PyTree
    targets: Array
    temperature: Any
    schedule: Callable | None = eqx.field(static=True)
    where: Array | None
    weights: Array | None

    def at_step(self, step: Array) -> "_Reading":
        """What `minimize` measures by at a step of an annealed run."""
        if self.schedule is None:
            return self
        where = lambda reading: reading.temperature
        return eqx.tree_at(
            where, self, self.schedule(step), is_leaf=lambda x: x is None
        )

    def __call__(self, w: PyTree, alpha: PyTree, key: Array) -> Array:
        del key
        scores = self.predict(w, alpha, self.batch)
        counted = {"where": self.where, "weights": self.weights}
        exact = self.surrogate.exact(scores, self.targets, **counted)
        if self.which == "exact":
            return exact
        temperature = self.temperature
        if callable(temperature):
            temperature = temperature(scores, self.targets, **counted)
        smooth = self.surrogate(
            scores, self.targets, temperature=temperature, **counted
        )
        return smooth if self.which == "surrogate" else smooth - exact


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
    """What to give `minimize` as ``metrics``, to see the gap at each evaluation.

    Args:
      name: of the exact metric.
      surrogate: such as ``Accuracy()``.
      predict: ``(w, alpha, batch) -> scores``.
      batch: what it reads; a pytree of arrays.
      targets: the surrogate's, with ``where`` and ``weights``.
      temperature: a number, or ``(scores, targets, *, where, weights) -> number`` such
        as `temperature_of`, with its threshold set for surrogates that have one:
        ``functools.partial(temperature_of, threshold=0.0)``.
      schedule: ``step -> temperature``, that of an annealed run, which `minimize` asks
        in place of ``temperature`` at each evaluation.

    Returns:
      ``{name: exact, name_surrogate: smooth, name_gap: smooth - exact}``, each a
      function ``(w, alpha, key) -> scalar``. Several merge by ``|``.

    Cost: a prediction for each, outside the ledger.

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> predict = lambda w, alpha, batch: batch @ w
    >>> x, y = jnp.array([[1.0], [-2.0], [3.0]]), jnp.array([1, 1, 1])
    >>> metrics = hg.surrogates.gap_metrics(
    ...     "accuracy", hg.surrogates.Accuracy(), predict, x, y, temperature=0.5
    ... )
    >>> readings = {name: fn(jnp.ones(1), None, None) for name, fn in metrics.items()}
    >>> {name: round(float(value), 3) for name, value in readings.items()}
    {'accuracy': 0.667, 'accuracy_surrogate': 0.632, 'accuracy_gap': -0.035}
    """
    if not callable(predict):
        raise TypeError(f"predict must be a function; got {predict!r}")
    as_array = lambda x: None if x is None else jnp.asarray(x)
    reading = lambda which: floats_to_arrays(
        _Reading(
            which,
            surrogate,
            predict,
            batch,
            jnp.asarray(targets),
            temperature,
            schedule,
            as_array(where),
            as_array(weights),
        )
    )
    return {
        name: reading("exact"),
        f"{name}_surrogate": reading("surrogate"),
        f"{name}_gap": reading("gap"),
    }
