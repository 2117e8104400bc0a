"""Checks of the rows of the conformance table.

A bound is a statement about one cell, a rate about several; see the protocol of the
table.
"""

import math
from collections.abc import Callable

import numpy as np

from hypergrad.bench import Finding, Row, select
from hypergrad.estimators.implicit_solve import NEWTON_RTOL

from .conformance_cases import (
    DTYPES,
    EARLY,
    EXACT_RTOL,
    METHODS,
    NEVER_TRUSTED,
    RATES,
    REFUSED,
    SERIES,
    SIGMA,
    TABLE_METHODS,
    TRUSTED_RTOL,
    cells,
    tolerance,
)
from .outcomes import within
from .problem_setup import count_to

RATE_TOLERANCE = 0.05  # of the rate of a series, relative
POWER_TOLERANCE = 0.1
POWERS = {
    "Penalty": -1,
    "Penalty, symmetric": -2,
    "CentralDifference": 2,
    "Implicit, Nystrom": 1,
}


def rounding(row: Row) -> float:
    """Returns the error after solves to residuals of ``eps^(3/4)``, the default."""
    return row["condition"] * tolerance(row["dtype"])


def max_error(row: Row) -> float:
    """Returns the relative error that an estimator admits; infinite if none."""
    method = METHODS[row["method"]]
    if method.is_random:
        return 4 * row["standard_error"] + SIGMA
    if method.promise == "exact":
        return EXACT_RTOL if row["dtype"] == "float64" else rounding(row)
    if row["declared"] is None:
        return math.inf
    return row["declared"] * row["amplification"] + rounding(row)


def max_distance_to_formula(row: Row) -> float:
    """Returns the error of the formula; differences of gradients add ``epsilon²``."""
    if row["method"] == "FiniteDifference":
        epsilon = float(np.finfo(row["dtype"]).eps) ** (1 / 3)
        return 10 * epsilon**2 * row["amplification"] + rounding(row)
    return EXACT_RTOL if row["dtype"] == "float64" else rounding(row)


def holds_if(is_true: bool, text: str) -> Finding:
    """Returns the outcome of a check."""
    return Finding(text, "holds" if is_true else "FAILED")


def bound(label: str, rows: list[Row], column: str, limit: Callable) -> Finding:
    """Returns whether all rows are within their limits, and the row that is nearest."""
    worst = max(rows, key=lambda row: row[column] / limit(row))
    problem = f"{worst['problem']} {worst['structure']}"
    return holds_if(
        all(row[column] <= limit(row) for row in rows),
        f"{label}: {worst[column]:.1e} on {problem}, allowed {limit(worst):.1e}",
    )


def findings(rows: list[Row]) -> list[Finding]:
    """Returns the checks of bounds, formulas and trust, then those of the rates."""
    missing = [
        row for row in rows if row["value"] is None and not is_expected_refusal(row)
    ]
    if missing:
        fields = cells("small", 1)[0]
        cell = lambda row: [row[field] for field in fields]
        return [Finding(f"no number: {cell(row)}", "FAILED") for row in missing]
    rows = [row for row in rows if row["value"] is not None]
    single = select(rows, kind="error")
    return [*bounds(single), *trust(single), *rates(select(rows, kind="rate"))]


def is_expected_refusal(row: Row) -> bool:
    """Returns True if the estimator does not apply, and its error says why."""
    return (row["method"], row["problem"]) in REFUSED and bool(row["reason"])


def bounds(rows: list[Row]) -> list[Finding]:
    """Returns the checks of errors, formulas and signs, per method and precision."""
    outcomes = []
    for method in TABLE_METHODS:
        for dtype in DTYPES:
            method_rows = select(rows, method=method, dtype=dtype)
            label = f"{method}, {dtype}"
            if METHODS[method].is_random:
                text = f"{label}, error, allowed four standard errors"
                outcomes.append(bound(text, method_rows, "value", max_error))
            elif math.isfinite(max(map(max_error, method_rows))):
                text = f"{label}, error"
                outcomes.append(bound(text, method_rows, "value", max_error))
            if METHODS[method].biased:
                text, limit = (
                    f"{label}, distance to its formula",
                    max_distance_to_formula,
                )
                outcomes.append(bound(text, method_rows, "to_formula", limit))
            if method_rows[0]["declared"] is None:
                cosine = min(row["cosine"] for row in method_rows)
                text = f"{label}, smallest cosine with the exact hypergradient: "
                text += f"{cosine:.2f}, more than 0 needed"
                outcomes.append(holds_if(cosine > 0, text))
    return outcomes


def trust(rows: list[Row]) -> list[Finding]:
    """Returns the checks that the right estimates are trusted."""
    exact = [row for row in rows if METHODS[row["method"]].promise == "exact"]
    never = [row for row in rows if row["method"] in NEVER_TRUSTED]
    trusted = [row for row in rows if row["trusted"]]
    num_trusted = sum(row["trusted"] for row in exact)
    num_untrusted = sum(not row["trusted"] for row in never)
    worst = max(row["value"] for row in trusted)
    return [
        holds_if(
            num_trusted == len(exact),
            f"exact estimates that are trusted: {num_trusted} of {len(exact)}",
        ),
        holds_if(
            num_untrusted == len(never),
            "estimates without an error estimate that are not trusted: "
            f"{num_untrusted} of {len(never)}",
        ),
        holds_if(
            worst <= TRUSTED_RTOL,
            f"largest error of {len(trusted)} trusted estimates: {worst:.1e}, allowed "
            f"{TRUSTED_RTOL}",
        ),
    ]


def rates(rows: list[Row]) -> list[Finding]:
    """Returns the checks of slopes of log error, per seed for random methods."""
    outcomes = []
    for method, (problem, structure), values in RATES:
        if method == EARLY:
            continue
        place = {"problem": problem, "structure": structure}
        method_rows = select(rows, method=method, **place)
        label = f"{method} on {problem} {structure}"
        if METHODS[method].is_random:
            seeds = sorted({row["seed"] for row in method_rows})
            powers = [power(values, errors(method_rows, values, x)) for x in seeds]
            label += ", error as a power of the pairs"
            outcomes.append(within(label, powers, -0.5, POWER_TOLERANCE))
            continue
        ordered = errors(method_rows, values, 0)
        contraction = method_rows[0]["contraction"]
        if method == "Implicit, correct=1":
            uncorrected = errors(select(rows, method=EARLY, **place), values, 0)
            outcomes.append(correction(label, ordered, uncorrected, contraction))
        elif method in SERIES:
            counts = [count_to(contraction, math.exp(-value)) for value in values]
            slope = float(np.polyfit(counts, np.log(ordered), 1)[0])
            slope /= math.log(contraction)
            label += ", error as a power of q^K"
            outcomes.append(near(label, slope, 1, RATE_TOLERANCE))
        else:
            label += ", error as a power of its hyperparameter"
            slope = power(values, ordered)
            outcomes.append(near(label, slope, POWERS[method], POWER_TOLERANCE))
    return outcomes


def errors(rows: list[Row], values: tuple, seed: int) -> list[float]:
    """Returns the errors of a seed in the order of the hyperparameter values."""
    by_value = {row["setting"]: row["value"] for row in select(rows, seed=seed)}
    return [by_value[value] for value in values]


def power(x: tuple, y: list[float]) -> float:
    """Returns the exponent of the power law fitted to y over x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def near(label: str, value: float, expected: float, tolerance: float) -> Finding:
    """Returns the check that a value is within a tolerance."""
    is_true = abs(value - expected) <= tolerance
    return holds_if(is_true, f"{label}: {value:.3f}, {expected} ± {tolerance} needed")


def correction(
    label: str, corrected: list, uncorrected: list, contraction: float
) -> Finding:
    """Returns the check that a Newton step reduces errors as far as it must.

    Solved to a relative residual of 1e-3, it leaves at most ``1e-3 kappa`` of the
    distance.
    """
    limit = NEWTON_RTOL * (1 + contraction) / (1 - contraction)
    ratio = max(a / b for a, b in zip(corrected, uncorrected, strict=True))
    text = f"{label}, error after over before: {ratio:.1e}, allowed {limit:.1e}"
    return holds_if(ratio <= limit, text)
