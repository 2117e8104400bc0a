"""How the rows of the conformance table are judged.

A bound is a statement about one cell, a rate one about several. See README.md.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hypergrad.certificate import NEWTON_RTOL
from hypergrad.studies.record import Row
from hypergrad.studies.verdict import Verdict, within

from .conformance_cases import (
    DTYPES,
    EARLY,
    EXACT,
    METHODS,
    NEVER_TRUSTED,
    RATES,
    REFUSED,
    SERIES,
    SHOWN,
    SIGMA,
    TRUSTED,
    plan,
    tolerance,
)
from .setting import count_to

RATE_TOLERANCE = 0.05  # of a series' rate, relative
SLOPE_TOLERANCE = 0.1  # of a power
SLOPES = {
    "Penalty": -1,
    "Penalty, symmetric": -2,
    "CentralDifference": 2,
    "Implicit, Nystrom": 1,
}


def rounding(row: Row) -> float:
    """What solves to residuals of ``eps^(3/4)``, all solvers' default, may leave."""
    return row["condition"] * tolerance(row["dtype"])


def allowed(row: Row) -> float:
    """The relative error that an estimator admits of a cell; infinite if none."""
    exact = METHODS[row["method"]].promise == "exact"
    if METHODS[row["method"]].random:
        return 4 * row["standard_error"] + SIGMA
    if exact:
        return EXACT if row["dtype"] == "float64" else rounding(row)
    if row["declared"] is None:
        return math.inf
    return row["declared"] * row["amplification"] + rounding(row)


def allowed_of_formula(row: Row) -> float:
    """As exact as the formula is; a difference of gradients adds ``epsilon²``."""
    if row["method"] == "FiniteDifference":
        epsilon = float(np.finfo(row["dtype"]).eps) ** (1 / 3)
        return 10 * epsilon**2 * row["amplification"] + rounding(row)
    return EXACT if row["dtype"] == "float64" else rounding(row)


def bound(what: str, rows: list[Row], column: str, most: Callable) -> Verdict:
    """Whether all rows keep their bounds; the one that comes nearest is named."""
    worst = max(rows, key=lambda row: row[column] / most(row))
    value, limit = worst[column], most(worst)
    at = f"{worst['problem']} {worst['structure']}"
    kept = all(row[column] <= most(row) for row in rows)
    return Verdict(
        f"{what}: {value:.1e} on {at}, allowed {limit:.1e}: "
        f"{'kept' if kept else 'broken'}",
        failed=not kept,
    )


def judge(rows: list[Row]) -> list[Verdict]:
    """Bounds, formulas and trust cell by cell, then the rates."""
    lost = [row for row in rows if row["value"] is None and not expected_refusal(row)]
    if lost:
        name = lambda row: [row[field] for field in plan("small", 1)[0]]
        return [Verdict(f"no number: {name(row)}", failed=True) for row in lost]
    rows = [row for row in rows if row["value"] is not None]
    single = [row for row in rows if row["kind"] == "error"]
    return [*bounds(single), *trust(single), *rates(rows)]


def expected_refusal(row: Row) -> bool:
    return (row["method"], row["problem"]) in REFUSED and bool(row["reason"])


def bounds(rows: list[Row]) -> list[Verdict]:
    verdicts = []
    for method in SHOWN:
        for dtype in DTYPES:
            mine = of(rows, method=method, dtype=dtype)
            what = f"{method}, {dtype}"
            if METHODS[method].random:
                standard = "error, allowed four standard errors"
                verdicts.append(bound(f"{what}, {standard}", mine, "value", allowed))
            elif math.isfinite(max(map(allowed, mine))):
                verdicts.append(bound(f"{what}, error", mine, "value", allowed))
            if METHODS[method].biased:
                to = f"{what}, distance to its formula"
                verdicts.append(bound(to, mine, "to_formula", allowed_of_formula))
            low = min(row["cosine"] for row in mine)
            if mine[0]["declared"] is None:
                verdicts.append(
                    Verdict(
                        f"{what}, least cosine with the truth: {low:.2f}, more than 0 "
                        f"needed: {'kept' if low > 0 else 'broken'}",
                        failed=not low > 0,
                    )
                )
    return verdicts


def trust(rows: list[Row]) -> list[Verdict]:
    exact = [row for row in rows if METHODS[row["method"]].promise == "exact"]
    never = [row for row in rows if row["method"] in NEVER_TRUSTED]
    trusted = [row for row in rows if row["trusted"]]
    far = max(row["value"] for row in trusted)
    lines = [
        ("exact estimates that are trusted", sum(r["trusted"] for r in exact), exact),
        ("never trusted of themselves", sum(not r["trusted"] for r in never), never),
    ]
    return [
        *[
            Verdict(f"{what}: {count} of {len(of_all)}", failed=count != len(of_all))
            for what, count, of_all in lines
        ],
        Verdict(
            f"largest error of {len(trusted)} trusted estimates: {far:.1e}, allowed "
            f"{TRUSTED}",
            failed=not far <= TRUSTED,
        ),
    ]


def of(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(row[k] == v for k, v in fields.items())]


def rates(rows: list[Row]) -> list[Verdict]:
    """Slopes of log error; those of random methods seed by seed."""
    verdicts = []
    rows = of(rows, kind="rate")
    for method, (problem, structure), values in RATES:
        mine = of(rows, method=method, problem=problem, structure=structure)
        what = f"{method} on {problem} {structure}"
        if method == EARLY:
            continue
        if METHODS[method].random:
            seeds = sorted({row["seed"] for row in mine})
            slopes = [power(values, errors(mine, values, seed)) for seed in seeds]
            what += ", error as a power of the pairs"
            verdicts.append(within(what, slopes, -0.5, SLOPE_TOLERANCE))
            continue
        found = errors(mine, values, 0)
        if method == "Implicit, correct=1":
            before = errors(
                of(rows, method=EARLY, problem=problem, structure=structure), values, 0
            )
            verdicts.append(correction(what, found, before, mine[0]["contraction"]))
        elif method in SERIES:
            q = mine[0]["contraction"]
            counts = [count_to(q, math.exp(-value)) for value in values]
            slope = float(np.polyfit(counts, np.log(found), 1)[0] / math.log(q))
            what += ", error as a power of q^K"
            verdicts.append(near(what, slope, 1, RATE_TOLERANCE))
        else:
            slope = power(values, found)
            what += ", error as a power of its setting"
            verdicts.append(near(what, slope, SLOPES[method], SLOPE_TOLERANCE))
    return verdicts


def errors(rows: list[Row], values: tuple, seed: int) -> list[float]:
    by_value = {row["setting"]: row["value"] for row in of(rows, seed=seed)}
    return [by_value[value] for value in values]


def power(x: tuple, y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def near(what: str, found: float, expected: float, tolerance: float) -> Verdict:
    kept = abs(found - expected) <= tolerance
    return Verdict(
        f"{what}: {found:.3f}, {expected} ± {tolerance} needed: "
        f"{'kept' if kept else 'broken'}",
        failed=not kept,
    )


def correction(what: str, after: list, before: list, q: float) -> Verdict:
    """A Newton step solved to 1e-3 leaves at most ``1e-3 kappa`` of the distance."""
    most = NEWTON_RTOL * (1 + q) / (1 - q)
    ratio = max(a / b for a, b in zip(after, before, strict=True))
    return Verdict(
        f"{what}, error after over before: {ratio:.1e}, allowed {most:.1e}: "
        f"{'kept' if ratio <= most else 'broken'}",
        failed=not ratio <= most,
    )
