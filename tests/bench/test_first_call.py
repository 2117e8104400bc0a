"""Tests of the table of first calls: its programs, its ratios and its claims."""

import numpy as np
import pytest

from benchmarks import first_call
from benchmarks.shared import first_call_programs as programs
from hypergrad.bench import Finding, ratio_interval


def rows_of(default: float, option: float = 1.0) -> list[dict]:
    """Returns nine repetitions in which plain JAX takes about one second."""
    rows = []
    for program in programs.ESTIMATORS:
        for seed in range(9):
            unit = 1 + 0.001 * seed
            row = {"method": program, "seed": seed, programs.PLAIN: unit}
            row |= dict.fromkeys(programs.ESTIMATORS[program], default * unit)
            row |= dict.fromkeys(programs.OPTIONS, default * option * unit**2)
            rows.append(row)
    return rows


def outcomes(rows: list[dict], part: str) -> list[Finding]:
    return [x.outcome for x in first_call.findings(rows) if part in x.text]


def test_each_ratio_has_the_bound_that_the_protocol_states():
    """1.3 with trust off and for SOBA, 1.7 by default, 1.05 for an option."""
    findings = first_call.findings(rows_of(1.25))
    assert len(findings) == 4 + 3 * len(programs.OPTIONS)
    assert {x.outcome for x in findings} == {"supported"}
    rows = rows_of(1.5)
    assert outcomes(rows, "Implicit, trust off over") == ["not supported"]
    assert outcomes(rows, "SOBA, default over plain") == ["not supported"]
    assert outcomes(rows, "Implicit, default over plain") == ["supported"]
    assert set(outcomes(rows_of(1.8), "default over plain")) == {"not supported"}
    assert set(outcomes(rows_of(1.2, 1.06), "over default")) == {"not supported"}
    table = "\n".join(first_call.body(rows_of(1.25)))
    assert "| SOBA | 1.00 | - | 1.25 | 1.26 | 1.26 | 1.26 |" in table


def test_intervals_are_corrected_for_the_number_of_claims():
    """A single 95% interval below the bound is not enough for one of thirteen."""
    rows = rows_of(1.25, 1.043)
    ratio = first_call.ratios(rows, "SOBA", "limits", "default")
    single = ratio_interval(ratio, np.ones(ratio.size))
    assert single.high < first_call.MAX_OPTION_RATIO
    assert set(outcomes(rows, "over default")) == {"not supported"}


def test_programs_that_differ_are_an_error(monkeypatch):
    """A benchmark against a program of another result would compare nothing."""
    values = {programs.PLAIN: 1.0, "default": 1.005}
    run = lambda program, name: {"seconds": 1.0, "value": values.get(name, 1.0)}
    monkeypatch.setattr(first_call, "run", run)
    row = first_call.measure({"method": "SOBA", "seed": 0}, [])
    assert set(row) == set(programs.variants_of("SOBA"))
    values["default"] = 1.02
    with pytest.raises(ValueError, match="SOBA, default ends at"):
        first_call.measure({"method": "SOBA", "seed": 0}, [])


def test_the_plain_program_makes_the_steps_of_the_library():
    """All outer values of SOBA, which amplifies any difference."""
    train, val, w, alpha = programs.make_data()
    estimator = programs.ESTIMATORS["SOBA"]["default"]
    data = train, val, w, alpha
    expected_alpha, (expected, *_) = programs.run_plain("SOBA", w, alpha, train, val)
    actual_alpha, (actual,) = programs.run_library(estimator, {}, *data)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(actual_alpha, expected_alpha, rtol=1e-6)
