"""Two rules by which settings are chosen, and the cells and columns of many tables."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hypergrad import datasets
from hypergrad.bench import Cell, Row
from hypergrad.bench.timing import measure_seconds
from hypergrad.trace import Trace

TUNING_SEEDS = (100, 101)  # no seed of a table
DIGITS = "scikit-learn digits (1,797 real 8x8 images)"


@functools.cache
def digits() -> dict[str, np.ndarray]:
    """Returns the digits, which are loaded once per process."""
    return datasets.load("digits")


def grid_cells(**fields: Iterable[Any]) -> Callable[[str, int], list[Cell]]:
    """Returns ``(scale, seeds) -> cells`` with all combinations, seeds innermost.

    Args:
      fields: Values of each field, of which the first one is outermost.
    """
    combinations = list(itertools.product(*fields.values()))
    return lambda scale, seeds: [
        dict(zip(fields, values, strict=True)) | {"seed": seed}
        for values in combinations
        for seed in range(seeds)
    ]


def cells_of(methods: Iterable[str]) -> Callable[[str, int], list[Cell]]:
    """Returns ``(scale, seeds) -> cells`` with a cell per method and seed."""
    return grid_cells(method=methods)


def cells_with_seeds(
    max_seeds: Mapping[str, float],
) -> Callable[[str, int], list[Cell]]:
    """Returns `cells_of` the methods, each with at most its own number of seeds."""
    return lambda scale, seeds: [
        {"method": label, "seed": seed}
        for label, max_num in max_seeds.items()
        for seed in range(int(min(seeds, max_num)))
    ]


def with_seconds(run: Callable[[Cell], Row]) -> Callable[[Cell, list[Row]], Row]:
    """Returns ``measure_cell`` of a table: a run, and the seconds that it took."""

    def measure(cell: Cell, rows: list[Row]) -> Row:
        del rows
        with measure_seconds() as seconds:
            row = run(cell)
        return row | {
            "compile_seconds": seconds.compilation,
            "run_seconds": seconds.total - seconds.compilation,
        }

    return measure


class TuningResult(NamedTuple):
    """The setting that is chosen on the tuning seeds.

    Attributes:
      setting: The chosen setting.
      score: Its mean score.
      scores: Mean score of each setting.
      tuning_cost: Cost of all runs.
    """

    setting: Any
    score: float
    scores: list[float]
    tuning_cost: float

    @property
    def row(self) -> Row:
        """All fields but the scores, as columns of a row."""
        return {name: x for name, x in self._asdict().items() if name != "scores"}


def choose_on_seeds(
    run: Callable[[Any, int], Row],
    settings: Sequence[Any],
    score: Callable[[Row], float],
    *,
    cost: Callable[[Row], float] = lambda row: row["gradient_equivalents"],
    higher_is_better: bool = False,
) -> TuningResult:
    """Returns the setting with the best mean score on `TUNING_SEEDS`.

    All reported seeds have the same setting, unlike in `tune_and_run`.

    Args:
      run: ``(setting, seed) -> row``.
      settings: Settings to try.
      score: Score of a row; lower is better unless ``higher_is_better``.
      cost: Cost of a row.
      higher_is_better: Whether larger scores are better.
    """
    runs = [[run(setting, seed) for seed in TUNING_SEEDS] for setting in settings]
    scores = [float(np.mean([score(row) for row in rows])) for rows in runs]
    best = int(np.argmax(scores) if higher_is_better else np.argmin(scores))
    tuning_cost = sum(cost(row) for rows in runs for row in rows)
    return TuningResult(settings[best], scores[best], scores, tuning_cost)


def tune_and_run(run: Callable[[Any, bool], Row], settings: Sequence[Any]) -> Row:
    """Returns the row of the setting that is best on held-out data of its own seed.

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
