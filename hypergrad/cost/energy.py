"""Energy and carbon dioxide, tracked or from a stated power."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

JOULES = 3.6e6  # in a kilowatt-hour


class Energy(NamedTuple):
    """Attributes: ``kwh``, kilowatt-hours, and ``grams`` of carbon dioxide."""

    kwh: float
    grams: float


@dataclasses.dataclass
class Measurement:
    """What a block spent, filled in where it ends.

    Attributes:
      seconds: by the clock on the wall.
      kwh, grams: kilowatt-hours, and grams of carbon dioxide.
      source: of the energy, 'codecarbon' or 'stated'.
    """

    seconds: float = math.nan
    kwh: float = math.nan
    grams: float = math.nan
    source: str = "stated"


def energy(seconds: float, *, watts: float, grams_per_kwh: float) -> Energy:
    """``watts * seconds / 3.6e6`` kilowatt-hours, and the carbon dioxide of those.

    Args:
      seconds: how long.
      watts: the power drawn, of all that is to count.
      grams_per_kwh: the grid's carbon intensity, in grams of CO2 a kilowatt-hour.

    >>> import hypergrad as hg
    >>> hg.cost.energy(3600, watts=500.0, grams_per_kwh=300.0)
    Energy(kwh=0.5, grams=150.0)
    """
    kwh = watts * seconds / JOULES
    return Energy(kwh, kwh * grams_per_kwh)


@contextlib.contextmanager
def measure(*, watts: float, grams_per_kwh: float) -> Iterator[Measurement]:
    """Seconds and energy of a block.

    The energy is that of codecarbon's offline tracker where codecarbon is installed
    (the extra ``energy``) and works, of the whole machine; else ``watts`` over the
    seconds. ``source`` tells which. JAX returns before it is done: wait in the block,
    with `jax.block_until_ready`.

    Args:
      watts: the power drawn, where there is no tracker.
      grams_per_kwh: the grid's carbon intensity, in grams of CO2 a kilowatt-hour.

    Yields:
      A `Spent`, filled in at the end of the block, also where that raises.

    Bias: where a machine has no counters, codecarbon models its power by its load.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> with hg.cost.measured(watts=65.0, grams_per_kwh=300.0) as spent:
    ...     _ = jax.block_until_ready(jnp.ones(10) + 1)
    >>> 0 < spent.seconds < 60
    True
    """
    spent, tracker = Measurement(), _tracker(grams_per_kwh)
    if tracker is not None:
        tracker.start()
    started = time.perf_counter()
    try:
        yield spent
    finally:
        spent.seconds = time.perf_counter() - started
        found = energy(spent.seconds, watts=watts, grams_per_kwh=grams_per_kwh)
        if tracker is not None:
            tracker.stop()
        # A tracker that fails logs why, raises nothing and leaves no data.
        if tracked := getattr(tracker, "final_emissions_data", None):
            kwh = tracked.energy_consumed
            found, spent.source = Energy(kwh, kwh * grams_per_kwh), "codecarbon"
        spent.kwh, spent.grams = found


def _tracker(grams_per_kwh: float) -> Any:
    """codecarbon's, which writes no file and asks no server; None without it."""
    if find_spec("codecarbon") is None:
        return None
    from codecarbon import OfflineEmissionsTracker  # pyright: ignore

    return OfflineEmissionsTracker(
        force_carbon_intensity_g_co2e_kwh=grams_per_kwh,
        output_methods=[],
        log_level="error",
        allow_multiple_runs=True,
    )
