"""Tests of the growth table: fits of exact powers, and counts by hand."""

import numpy as np
import pytest

from benchmarks import growth


def synthetic(deviation: float = 0.0) -> list[dict]:
    """Returns rows of exact powers, those of theory plus a deviation."""
    rows = []
    for cell in growth.cells("small", 1):
        power = lambda column, cell=cell: (
            7.0
            * cell["size"]
            ** (growth.theory(cell["method"], column, cell["axis"]) + deviation)
        )
        counts = {column: power(column) for column in growth.COLUMNS}
        rows.append(cell | counts | {"unknown": []})
    return rows


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_fit_finds_the_power_of_the_last_two_decades(power):
    """What is below them does not count, and order does not matter."""
    sizes = np.array(growth.decades(0, 5))
    values = np.where(sizes < 1000, 1.0, 3.0 * sizes**power)
    order = np.array([3, 0, 5, 1, 4, 2])
    actual = growth.exponent(sizes[order], values[order])
    assert actual == pytest.approx(power, abs=1e-12)


def test_rows_of_theory_are_supported_and_others_are_not():
    """Each exponent that differs by more than the tolerance is named."""
    outcomes = {finding.outcome for finding in growth.findings(synthetic())}
    assert outcomes == {"supported", "holds"}
    near = growth.findings(synthetic(0.09))
    exponents = [x for x in near if "exponents" in x.text]
    assert all(x.outcome == "supported" for x in exponents)
    deviating = [x for x in growth.findings(synthetic(0.11)) if "exponents" in x.text]
    assert len(deviating) == len(growth.COLUMNS) * len(growth.AXES)
    assert all(f": 0 of {len(growth.METHODS)}" in x.text for x in deviating)
    assert all(x.outcome == "not supported" for x in deviating)
    assert all("Forward 1.11 for 1" in x.text for x in deviating if "hyper" in x.text)


def test_flat_lines_are_checked_by_their_spread():
    """0.11 per decade exceeds 1.1 times over five decades and 1.5 times over seven."""
    all_findings = growth.findings(synthetic(0.11))
    steps, hyperparameters = [x for x in all_findings if "over all" in x.text]
    assert "scratch over all steps: 3.55 times" in steps.text
    assert "operations over all hyperparameters: 5.89 times" in hyperparameters.text
    assert {steps.outcome, hyperparameters.outcome} == {"not supported"}


def test_uncounted_operation_fails():
    """It is named; programs of several devices are XLA's to count."""
    rows = synthetic()
    assert not any(finding.failed for finding in growth.findings(rows))
    rows[3]["unknown"] = ["fft"]
    (failed,) = [finding for finding in growth.findings(rows) if finding.failed]
    counted_rows = [row for row in rows if row["axis"] != "devices"]
    assert failed.text.startswith(f"1 of {len(counted_rows)} ")
    assert failed.text.endswith("fft")


def test_operations_are_those_counted_by_hand():
    """A step makes ``X w`` and ``X' r``, ``2 n d`` operations each, and stores nothing.

    The difference of two lengths leaves out what is made once. The rest is elementwise:
    penalty, momentum and update, at most a dozen operations a weight.
    """
    cell = {"method": "FiniteDifference", "axis": "steps", "seed": 0}
    short, long = (growth.measure(cell | {"size": size}, []) for size in (10, 100))
    a_step = (long["operations"] - short["operations"]) / 90
    sizes = growth.sizes_of(cell | {"size": 10})
    products = 2 * 2 * sizes.examples * sizes.parameters
    assert products <= a_step <= products + 12 * sizes.parameters
    assert long["scratch"] == short["scratch"]
    assert long["unknown"] == []


def test_a_population_is_so_many_of_one():
    """Operations of an estimator without a branch, and what each holds of its own."""
    cell = {"method": "Unrolled, stored", "axis": "population", "seed": 0}
    one, ten = (growth.measure(cell | {"size": size}, []) for size in (1, 10))
    assert ten["operations"] == pytest.approx(10 * one["operations"], rel=1e-3)
    assert 8 < ten["scratch"] / one["scratch"] < 10.1


@pytest.mark.slow  # two processes of their own
def test_a_device_does_what_its_own_examples_ask_for():
    """By hand: a gradient of n examples is two products of ``2 n d`` operations.

    `FiniteDifference` makes two: of the step, and of the outer loss. The derivative in
    ``alpha`` at its two points needs no product.
    """
    cell = {"method": "FiniteDifference", "axis": "devices", "seed": 0}
    two, four = (growth.measure(cell | {"size": size}, []) for size in (2, 4))
    assert two["examples"] == four["examples"] == 1000
    assert four["operations"] == pytest.approx(two["operations"], rel=1e-2)
    assert four["scratch"] == pytest.approx(two["scratch"], rel=1e-2)
    products = 2 * two["examples"] * two["parameters"]
    assert 4 * products < two["operations"] < 5 * products
