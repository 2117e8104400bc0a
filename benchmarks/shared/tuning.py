"""The rule by which rows are tuned, and what many rows contain."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hypergrad import datasets
from hypergrad.bench import Cell, Row
from hypergrad.trace import Trace

DIGITS = "scikit-learn digits (1,797 real 8x8 images)"


@functools.cache
def digits() -> dict[str, np.ndarray]:
    """Returns the digits, which are loaded once per process."""
    return datasets.load("digits")


def cells_of(methods: Iterable[str]) -> Callable[[str, int], list[Cell]]:
    """Returns ``(scale, seeds) -> cells`` with a cell per method and seed."""
    labels = list(methods)
    return lambda scale, seeds: [
        {"method": label, "seed": seed} for label in labels for seed in range(seeds)
    ]


def tune_and_run(run: Callable[[Any, bool], Row], settings: Sequence[Any]) -> Row:
    """Returns the row of the best setting; every row of a table is tuned by this rule.

    Args:
      run: ``(setting, hold_out) -> row``. With ``hold_out`` a part of the validation
        data is held out, and the entry "selection" of the row, a number or a tuple of
        numbers, is the score on that part; higher is better.
      settings: Settings to try. The best one is run again without ``hold_out``; a
        single setting is run only once.
    """

    def score(row: Row) -> tuple[float, ...]:
        replace_nan = lambda x: -math.inf if math.isnan(x) else float(x)
        return tuple(replace_nan(x) for x in np.ravel(row["selection"]))

    trials = [run(setting, True) for setting in settings] if len(settings) > 1 else []
    best = max(range(len(trials)), key=lambda i: score(trials[i]), default=0)
    setting = settings[best]
    row = run(setting, False)
    row.pop("selection", None)
    if isinstance(setting, int | float | str):
        row = row | {"setting": setting}
    tuning_cost = sum(trial.get("gradient_equivalents", 0.0) for trial in trials)
    return row | ({"tuning_cost": tuning_cost} if tuning_cost else {})


def trace_columns(trace: Trace) -> Row:
    """Returns the cost of a run and the curve of its outer value as columns."""
    return {
        "gradient_equivalents": float(trace.cost[-1]),
        "num_hvps": float(jnp.nansum(trace.stats["num_hvps"])),
        "curve_value": np.asarray(trace.value, float).tolist(),
        "curve_cost": np.asarray(trace.cost, float).tolist(),
    }
