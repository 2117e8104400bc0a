"""Claims that a method needs fewer gradient-equivalents to reach a target."""

import math

import numpy as np

from hypergrad.bench import Finding, ratio_interval

from .outcomes import conclude, count_seeds


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
