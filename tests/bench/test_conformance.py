"""Tests of the conformance table: its checks, its measurement and its problems."""

import math

import jax
import numpy as np
import pytest

from benchmarks import conformance
from benchmarks.shared import conformance_cases as cases
from benchmarks.shared.outcomes import within
from benchmarks.shared.problem_setup import count_to, sensitivity
from benchmarks.shared.reference_problems import (
    central,
    dense,
    error,
    get_reference,
    mlp,
    mlp_outer,
    quadratic,
)
from hypergrad.bench import select
from hypergrad.runtime.compat import enable_x64


def perfect_rows() -> list[dict]:
    """Returns rows in which every estimator has exactly the error that it states."""
    rows = []
    for cell in cases.cells("small", 5):
        method, value = cell["method"], cell["setting"]
        law = {
            "Penalty": lambda x: 1 / x,
            "Penalty, symmetric": lambda x: 1 / x**2,
            "CentralDifference": lambda x: x**2,
            "Implicit, Nystrom": lambda x: x,
            "Implicit, correct=1": lambda x: 1e-3 * x,
            cases.EARLY: lambda x: x,
            "Evolution": lambda x: x**-0.5,
            "PersistentEvolution": lambda x: x**-0.5,
        }.get(method, lambda x: 0.5 ** count_to(0.5, math.exp(-x)))
        refused = (method, cell["problem"]) in cases.REFUSED
        row = cell | {
            "value": 1e-12 if value is None else law(value),
            "reason": "one loss only" if refused else None,
            "condition": 1.0,
            "amplification": 1.0,
            "contraction": 0.5,
            "declared": 0.1,
            "cosine": 1.0,
            "to_formula": 1e-12,
            "standard_error": 0.1,
            "trusted": method not in cases.NEVER_TRUSTED,
            "gradient_equivalents": 10.0,
            "num_hvps": 1.0,
        }
        if refused:
            row["value"] = None
        rows.append(row)
    return rows


def test_rows_without_error_pass():
    """Every bound, formula, sign and rate holds; both statistical claims do."""
    outcomes = [finding.outcome for finding in conformance.findings(perfect_rows())]
    assert outcomes.count("supported") == 2
    assert set(outcomes) == {"holds", "supported"}


DOCTORED = {
    "an exact method off by 1e-8": ("Implicit, CG", "float64", {"value": 1e-8}),
    "float32 above eps^(3/4) condition": ("Forward", "float32", {"value": 1e-4}),
    "a series above q^K": ("FixedPoint", "float64", {"value": 0.2}),
    "away from its formula": ("Implicit, Identity", "float64", {"to_formula": 1e-6}),
    "four standard errors off": ("Evolution", "float32", {"value": 0.5}),
    "an exact one untrusted": ("Implicit, LU", "float64", {"trusted": False}),
    "a blind one trusted": ("Penalty", "float64", {"trusted": True}),
    "trusted and 3% off": ("Reversible", "float32", {"value": 0.03}),
    "no number": ("Implicit, GMRES", "float64", {"value": None}),
    "no number but a reason": (
        *("Unrolled", "float64", {"value": None, "reason": "tired"}),
    ),
}


def has_failed(rows: list[dict]) -> bool:
    """Returns True if a check of the rows fails."""
    return any(finding.failed for finding in conformance.findings(rows))


@pytest.mark.parametrize("label", DOCTORED)
def test_one_bad_cell_fails(label: str):
    """Each statement of an estimator is checked in every cell."""
    method, dtype, change = DOCTORED[label]
    rows = perfect_rows()
    select(rows, method=method, dtype=dtype, kind="error")[7].update(change)
    assert has_failed(rows)


def test_descent_direction_fails():
    """An estimator that declares no error must at least have the right sign."""
    rows = perfect_rows()
    penalty_rows = select(rows, method="Penalty")
    for row in penalty_rows:
        row["declared"] = None
    assert not has_failed(rows)
    penalty_rows[0]["cosine"] = -0.1
    assert has_failed(rows)


@pytest.mark.parametrize(
    "method",
    sorted({method for method, *_ in cases.RATES} - {cases.EARLY}),
)
def test_wrong_rate_fails(method: str):
    """The last error is a hundredfold; claims on random methods are not supported."""
    rows = perfect_rows()
    values = {m: v for m, _, v in cases.RATES}[method]
    for row in select(rows, method=method, setting=values[-1]):
        row["value"] *= 100
    outcomes = {finding.outcome for finding in conformance.findings(rows)}
    is_random = cases.METHODS[method].is_random
    assert ("FAILED" in outcomes) != is_random
    assert ("not supported" in outcomes) == is_random


def test_printed_table_shows_the_worst_structure():
    """Cells are float64 / float32, and - where an estimator does not apply."""
    rows = perfect_rows()
    rows[0]["value"] = 0.5
    lines = conformance.body(rows)
    row, *_ = (line for line in lines if line.startswith("| Implicit, "))
    assert "| 5e-01 / 1e-12 |" in row
    (reversible,) = (line for line in lines if line.startswith("| Reversible"))
    assert reversible.count("| - |") == 1
    texts = [finding.markdown for finding in conformance.findings(rows)]
    assert texts[0].startswith("- **FAILED**: Implicit, CG, float64")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_cell_is_measured_in_its_precision(dtype: str):
    """Identity on scalar ridge has the closed-form bias, not the exact gradient."""
    cell = cases.cell("error", "Implicit, Identity", ("ridge", "scalar"), dtype)
    row = conformance.measure(cell, [])
    reference = get_reference("ridge scalar")
    data, alpha = reference.problem.outer_data, reference.alpha
    w = np.asarray(reference.solution(alpha))
    b = np.asarray(data["x"].T @ (data["x"] @ w - data["y"])) / len(data["y"])
    biased, exact = -np.exp(alpha) * w @ b, reference.exact(alpha)
    expected = float(abs(biased / exact - 1))
    rounding = row["condition"] * float(np.finfo(dtype).eps) ** 0.75
    assert row["value"] == pytest.approx(expected, abs=rounding)
    assert 0 <= row["to_formula"] < rounding < 1e-3
    assert not row["trusted"]
    assert row["num_hvps"] >= 1
    assert row["truth"] == "closed form"


def test_sensitivity_of_the_quadratic():
    """By NumPy: h = k a + C'H^-1 (w - t), so that dh/dw = C'H^-1."""
    with enable_x64(True):
        reference = quadratic("30", seed=3)
        matrices = dense(reference.problem, reference.w, reference.alpha)
        amplification, condition = sensitivity(reference, matrices)
    data = jax.tree.map(np.asarray, reference.problem.inner_data)
    H, C, alpha = data["H"], data["C"], np.asarray(reference.alpha)
    v = np.linalg.solve(H, np.linalg.solve(H, C @ alpha) - data["t"])
    h = np.linalg.norm(data["k"] * alpha + C.T @ v)
    amplified = np.linalg.norm(C, 2) * np.linalg.norm(v) / h
    assert amplification == pytest.approx(amplified, rel=1e-9)
    w_term = np.linalg.norm(C.T @ np.linalg.inv(H), 2) * np.linalg.norm(C @ alpha) / h
    assert condition == pytest.approx(10 * amplified + w_term, rel=1e-9)


@pytest.mark.parametrize(
    "kind", ["scalar", pytest.param("tree", marks=pytest.mark.slow)]
)
def test_network_has_a_strict_minimum(kind: str):
    """Curvature is positive; the hypergradient is that of central differences."""
    reference = mlp(kind)
    assert np.linalg.eigvalsh(reference.hessian)[0] > 0
    data = reference.problem.outer_data
    value = lambda alpha: mlp_outer(reference.solution(alpha), None, data)
    expected = central(value, reference.alpha, 1e-2)
    assert error(reference.exact(reference.alpha), expected) < 1e-6


@pytest.mark.parametrize(
    ("values", "outcome", "reason"),
    [
        ([0.95, 1.0, 1.05, 1.0, 1.0], "supported", ""),
        ([1.35, 1.4, 1.45, 1.4, 1.4], "not supported", ""),
        ([0.0, 2.0, 1.0, 0.5, 1.5], "undecided", "wider than the effect"),
        ([1.0, 1.0, 1.01], "undecided", "3 seeds of 5"),
        ([1.0, 1.0, 1.0, 1.0, math.nan], "undecided", "no number"),
    ],
)
def test_hypothesis_about_a_mean(values, outcome: str, reason: str):
    """It needs five numbers and an interval that is narrower than the tolerance."""
    finding = within("slope", values, 1.0, 0.2)
    assert finding.outcome == outcome
    assert reason in finding.text
