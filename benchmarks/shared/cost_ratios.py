"""Costs until a target: bounds, the cheapest method, and claims of a saving."""

import math
from collections.abc import Mapping

import numpy as np

from hypergrad.bench import Finding, geometric_mean, ratio_interval

from .outcomes import conclude, count_seeds


def costs_or_bounds(cost: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns costs by seed, and how many are bounds of runs that miss the target.

    Args:
      cost: Cost until the target, NaN for a run that misses it.
      total: Whole cost of a run, which then is a lower bound.
    """
    is_missed = np.isnan(cost)
    return np.where(is_missed, total, cost), int(np.sum(is_missed))


def rank_by_cost(
    costs: Mapping[str, tuple[np.ndarray, int]], form: str
) -> tuple[dict[str, float], str]:
    """Returns mean costs of methods that reach the target on every seed, and a text.

    Args:
      costs: ``{method: costs_or_bounds}``.
      form: Format of a mean cost in the text, which names the two cheapest methods, and
        those whose bounds leave undecided whether they are cheaper.
    """
    means, bounds = {}, {}
    for method, (cost, num_misses) in costs.items():
        (bounds if num_misses else means)[method] = geometric_mean(cost)
    if not means:
        return means, "no method reaches the target on every seed"
    order = sorted(means, key=lambda method: means[method])
    text = f"first is {order[0]}, {means[order[0]]:{form}}"
    if order[1:]:
        text += f", then {order[1]}, {means[order[1]]:{form}}"
    undecided = [method for method in bounds if bounds[method] < means[order[0]]]
    if undecided:
        text += f"; undecided, as they ended below that: {', '.join(undecided)}"
    return means, text


def mean_over_tasks(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns by seed the geometric mean over tasks of the first over the second."""
    return np.exp(np.mean([np.log(first / second) for first, second in pairs], axis=0))


def saving_claim(
    label: str, ratios: np.ndarray, min_ratio: float, misses: list[str]
) -> Finding:
    """Returns whether the mean ratio is at least ``min_ratio``.

    Args:
      label: The two methods.
      ratios: Cost of the second method over that of the first, by seed.
      min_ratio: The claimed saving.
      misses: Runs that did not reach the target; with any the claim is not supported.
    """
    claim = f"at least {min_ratio:g} claimed"
    if misses:
        text = f"{label}: target not reached: {', '.join(misses)}, {claim}"
        return Finding(text, "not supported")
    ratio = ratio_interval(ratios, np.ones(ratios.size))
    text = f"{label}: {ratio:.3g} times fewer, {claim}"
    is_met = bool(ratio.mean >= min_ratio and ratio.low > 1)
    half_width = math.log(ratio.high / ratio.mean)
    return conclude(text, is_met, ratios.size, half_width, math.log(min_ratio))


def miss_texts(misses: dict[str, int]) -> list[str]:
    """Returns each run that did not reach the target with its number of seeds."""
    return [f"{name} on {count_seeds(n)}" for name, n in misses.items() if n]
