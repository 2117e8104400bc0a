"""Energy and carbon dioxide, measured by codecarbon or computed from a stated power."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

JOULES_PER_KWH = 3.6e6


class Energy(NamedTuple):
    """An amount of energy and the carbon dioxide of its generation.

    Attributes:
      kwh: Kilowatt-hours.
      grams: Grams of carbon dioxide.
    """

    kwh: float
    grams: float


@dataclasses.dataclass
class Measurement:
    """Time and energy of a block, which are NaN until the block ends.

    Attributes:
      seconds: Wall-clock time.
      kwh: Kilowatt-hours.
      grams: Grams of carbon dioxide.
      source: Source of the energy, 'codecarbon' or 'stated'.
    """

    seconds: float = math.nan
    kwh: float = math.nan
    grams: float = math.nan
    source: str = "stated"


def energy(seconds: float, *, watts: float, grams_per_kwh: float) -> Energy:
    """Returns the energy ``watts * seconds`` and its carbon dioxide.

    Args:
      seconds: Duration.
      watts: Power of everything that counts.
      grams_per_kwh: Carbon intensity of the grid, in grams of CO2 per kilowatt-hour.

    >>> import hypergrad as hg
    >>> hg.cost.energy(3600, watts=500.0, grams_per_kwh=300.0)
    Energy(kwh=0.5, grams=150.0)
    """
    kwh = watts * seconds / JOULES_PER_KWH
    return Energy(kwh, kwh * grams_per_kwh)


@contextlib.contextmanager
def measure(*, watts: float, grams_per_kwh: float) -> Iterator[Measurement]:
    """Measures the time and the energy of a block.

    If codecarbon is installed (the extra ``energy``) and works, its offline tracker
    measures the energy of the whole machine. Otherwise the energy is ``watts`` times
    the seconds. ``source`` states which of them it is.

    JAX returns before a computation is finished: call `jax.block_until_ready` in the
    block.

    Args:
      watts: Power that is used without a tracker.
      grams_per_kwh: Carbon intensity of the grid, in grams of CO2 per kilowatt-hour.

    Yields:
      A `Measurement`, which is filled in at the end of the block, even if that raises.

    Bias: on a machine without counters codecarbon models the power by the load.

    >>> import jax, jax.numpy as jnp, hypergrad as hg
    >>> with hg.cost.measure(watts=65.0, grams_per_kwh=300.0) as measurement:
    ...     _ = jax.block_until_ready(jnp.ones(10) + 1)
    >>> 0 < measurement.seconds < 60
    True
    """
    measurement, tracker = Measurement(), _make_tracker(grams_per_kwh)
    if tracker is not None:
        tracker.start()
    start_time = time.perf_counter()
    try:
        yield measurement
    finally:
        measurement.seconds = time.perf_counter() - start_time
        result = energy(measurement.seconds, watts=watts, grams_per_kwh=grams_per_kwh)
        if tracker is not None:
            tracker.stop()
        # A tracker that fails logs the reason, raises nothing and leaves no data.
        if emissions := getattr(tracker, "final_emissions_data", None):
            kwh = emissions.energy_consumed
            result = Energy(kwh, kwh * grams_per_kwh)
            measurement.source = "codecarbon"
        measurement.kwh, measurement.grams = result


def _make_tracker(grams_per_kwh: float) -> Any:
    """Returns a tracker that writes no file and uses no network, or None."""
    if find_spec("codecarbon") is None:
        return None
    from codecarbon import OfflineEmissionsTracker  # pyright: ignore

    return OfflineEmissionsTracker(
        force_carbon_intensity_g_co2e_kwh=grams_per_kwh,
        output_methods=[],
        log_level="error",
        allow_multiple_runs=True,
    )
