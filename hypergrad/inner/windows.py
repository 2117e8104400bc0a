"""Schedules whose values windows of steps share."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from ..settings import check_steps


def windows(values: Array, num_steps: int) -> Callable[[Array], Array]:
    """An optax schedule: ``values[count * len(values) // num_steps]``.

    Args:
      values: ``[W]``, one for each of W windows of equal length.
      num_steps: T of the run; steps beyond it keep the last value.

    One derivative a window is W numbers for `Forward` to carry, and an average over
    the window's steps has less variance than any of its own.

    Source: Micaelli & Storkey 2021 (arXiv 2007.07869).

    >>> import jax.numpy as jnp, hypergrad as hg
    >>> schedule = hg.windows(jnp.array([0.1, 0.2]), num_steps=6)
    >>> tuple(round(float(schedule(count)), 2) for count in (0, 2, 3, 5, 9))
    (0.1, 0.1, 0.2, 0.2, 0.2)
    """
    values = jnp.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"values must be a vector, one a window; got {values.shape}")
    check_steps("num_steps", num_steps)
    count_windows = values.size

    def schedule(count: Array) -> Array:
        window = jnp.asarray(count) * count_windows // num_steps
        return values[jnp.minimum(window, count_windows - 1)]

    return schedule
