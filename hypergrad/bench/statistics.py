"""Confidence intervals of paired differences, and the correction for several claims.

The unit of all statistics is one seed, that is one independent repetition of the whole
experiment. Re-splits of one data set are not independent: their training sets overlap,
and the variance of the mean is underestimated by the usual formula. `Resplits` corrects
it (Nadeau & Bengio 2003).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

MIN_SEEDS = 5
LEVEL = 0.95


@dataclass(frozen=True)
class Resplits:
    """States that the seeds of a table are re-splits of one data set.

    Args:
      test_to_train: Number of test examples over the number of training examples.
    """

    test_to_train: float


class Interval(NamedTuple):
    """A mean with its two-sided confidence interval."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Returns ``mean [low, high]``, each number with the format ``spec``."""
        values = (f"{value:{spec}}" for value in (self.mean, self.low, self.high))
        return "{} [{}, {}]".format(*values)


def mean_interval(
    values: ArrayLike, *, level: float = LEVEL, resplits: Resplits | None = None
) -> Interval:
    """Returns the mean of independent values and its interval by Student's t.

    Args:
      values: One value per seed, shape ``[n]``. The interval is infinite for n = 1.
      level: Probability that the interval covers the true mean.
      resplits: If given, the variance of the mean is ``(1/n + test_to_train) s^2``
        instead of ``s^2 / n`` (Nadeau & Bengio 2003, eq. 7).
    """
    values = np.asarray(values, float)
    mean, count = float(np.mean(values)), values.size
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    variance_factor = 1 / count
    if resplits is not None:
        variance_factor += resplits.test_to_train
    standard_error = math.sqrt(variance_factor) * float(np.std(values, ddof=1))
    quantile = float(scipy.stats.t.ppf((1 + level) / 2, count - 1))
    half_width = quantile * standard_error
    return Interval(mean, mean - half_width, mean + half_width)


def difference_interval(
    x: ArrayLike,
    y: ArrayLike,
    *,
    level: float = LEVEL,
    resplits: Resplits | None = None,
) -> Interval:
    """Returns the interval of ``x - y``, paired by seed; shapes ``[n]``."""
    difference = np.asarray(x, float) - np.asarray(y, float)
    return mean_interval(difference, level=level, resplits=resplits)


def ratio_interval(x: ArrayLike, y: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Returns the geometric mean of ``x / y`` and its interval.

    It is `difference_interval` of the logarithms. Values must be positive.
    """
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    logs = difference_interval(log_x, log_y, level=level)
    return Interval(*np.exp(logs).tolist())


def p_value(
    values: ArrayLike, null: float = 0.0, *, resplits: Resplits | None = None
) -> float:
    """Returns the two-sided p-value of ``mean(values) == null`` by Student's t."""
    values = np.asarray(values, float)
    if values.size < 2:
        return 1.0
    interval = mean_interval(values, resplits=resplits)
    quantile = float(scipy.stats.t.ppf((1 + LEVEL) / 2, values.size - 1))
    standard_error = (interval.high - interval.mean) / quantile
    distance = abs(interval.mean - null)
    if standard_error == 0:
        return float(distance == 0)
    return float(2 * scipy.stats.t.sf(distance / standard_error, values.size - 1))


def holm_levels(p_values: ArrayLike) -> list[float]:
    """Returns the level of the interval of each claim under Holm's correction.

    Holm (1979): with the p-values in ascending order, the i-th of m (from 0) is tested
    at ``(1 - LEVEL) / (m - i)``. A claim after the first one that is not rejected keeps
    the level of that one, so that all m decisions together err with probability at
    most ``1 - LEVEL``.
    """
    p_values = np.asarray(p_values, float)
    levels = np.empty(p_values.size)
    error, has_failed = 0.0, False
    for i, index in enumerate(np.argsort(p_values, kind="stable")):
        if not has_failed:
            error = (1 - LEVEL) / (p_values.size - i)
            has_failed = not p_values[index] <= error
        levels[index] = 1 - error
    return levels.tolist()


def geometric_mean(values: ArrayLike) -> float:
    """Returns ``exp(mean(log(values)))``."""
    return float(np.exp(np.mean(np.log(np.asarray(values, float)))))
