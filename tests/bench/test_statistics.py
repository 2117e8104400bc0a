"""Intervals and corrections against SciPy and against published formulas."""

import numpy as np
import pytest
import scipy.stats

from hypergrad.bench import Resplits, difference_interval, mean_interval, ratio_interval
from hypergrad.bench.statistics import holm_levels, p_value

FIRST = np.array([0.91, 0.88, 0.93, 0.95, 0.90])
SECOND = np.array([0.89, 0.87, 0.94, 0.91, 0.86])


@pytest.mark.parametrize("level", [0.95, 0.99])
def test_the_interval_is_that_of_the_paired_t_test(level):
    expected = scipy.stats.ttest_rel(FIRST, SECOND).confidence_interval(level)
    interval = difference_interval(FIRST, SECOND, level=level)
    np.testing.assert_allclose(interval[1:], expected)
    np.testing.assert_allclose(interval.mean, np.mean(FIRST - SECOND))


def test_the_p_value_is_that_of_the_paired_t_test():
    expected = scipy.stats.ttest_rel(FIRST, SECOND).pvalue
    np.testing.assert_allclose(p_value(FIRST - SECOND), expected)


def test_ratios_are_differences_of_logarithms():
    interval = difference_interval(np.log(FIRST), np.log(SECOND))
    np.testing.assert_allclose(ratio_interval(FIRST, SECOND), np.exp(interval))


def test_resplits_widen_the_interval_by_nadeau_and_bengio():
    # Eq. 7: the variance of the mean is (1/n + n_test/n_train) s^2.
    plain = mean_interval(FIRST)
    corrected = mean_interval(FIRST, resplits=Resplits(test_to_train=0.25))
    ratio = (corrected.high - corrected.mean) / (plain.high - plain.mean)
    np.testing.assert_allclose(ratio, np.sqrt((1 / 5 + 0.25) / (1 / 5)))


def test_one_value_says_nothing():
    assert mean_interval([1.0])[1:] == (-np.inf, np.inf)
    assert p_value([1.0]) == 1.0


def test_values_without_spread_are_certain():
    assert p_value([1.0, 1.0, 1.0]) == 0.0
    assert p_value([0.0, 0.0, 0.0]) == 1.0


def test_holm_corrects_step_by_step():
    # 0.001 <= 0.05 / 3, then 0.03 > 0.05 / 2: both others keep that level.
    np.testing.assert_allclose(
        holm_levels([0.03, 0.001, 0.04]), [1 - 0.05 / 2, 1 - 0.05 / 3, 1 - 0.05 / 2]
    )
    np.testing.assert_allclose(holm_levels([0.03, 0.02, 0.04]), 1 - 0.05 / 3)
