"""How costs grow: the fit on rows whose exponents are known, and counts by hand."""

import numpy as np
import pytest

from benchmarks import growth


def synthetic(off: float = 0.0) -> list[dict]:
    """Rows of exact powers, those of theory, and ``off`` more or less."""
    rows = []
    for cell in growth.plan("small", 1):
        power = lambda column, cell=cell: (
            7.0
            * cell["size"]
            ** (growth.theory(cell["method"], column, cell["axis"]) + off)
        )
        counts = {column: power(column) for column in growth.COLUMNS}
        rows.append(cell | counts | {"unknown": []})
    return rows


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_fit_finds_a_power_exactly(power):
    sizes = growth.decades(1, 5)
    found = growth.exponent(sizes, [3.0 * size**power for size in sizes])
    assert found == pytest.approx(power, abs=1e-12)


def test_the_fit_is_of_the_last_two_decades():
    """What stands still below them does not count, and order does not matter."""
    sizes = np.array(growth.decades(0, 5))
    values = np.where(sizes < 1000, 1000.0, sizes)
    order = np.array([3, 0, 5, 1, 4, 2])
    found = growth.exponent(sizes[order], values[order])
    assert found == pytest.approx(1.0, abs=1e-12)


def judged(off: float, what: str) -> list[str]:
    """What is said of rows that are so far off theory."""
    found = [verdict.text for verdict in growth.judge(synthetic(off))]
    return [text for text in found if what in text]


def test_rows_of_theory_are_reproduced_and_others_are_not():
    """By more than the tolerance, no exponent is, and each is named."""
    assert all("not reproduced" not in text for text in judged(0.0, ""))
    assert all("not" not in text for text in judged(0.09, "exponents"))
    off = judged(0.11, "exponents")
    assert len(off) == len(growth.COLUMNS) * len(growth.AXES)
    assert all(f": 0 of {len(growth.METHODS)}" in text for text in off)
    assert all(text.endswith("not reproduced") for text in off)
    assert all("Forward 1.11 for 1" in text for text in off if "against hyper" in text)


def test_what_is_to_be_flat_is_told_by_its_spread():
    """0.11 a decade: beyond 1.1 times over five and 1.5 times over seven."""
    steps, hyperparameters = judged(0.11, "over all")
    assert "scratch over all steps: 3.55 times" in steps
    assert "operations over all hyperparameters: 5.89 times" in hyperparameters
    assert all(text.endswith("not reproduced") for text in (steps, hyperparameters))


def test_an_operation_that_is_not_counted_fails():
    """By its name."""
    rows = synthetic()
    assert not any(verdict.failed for verdict in growth.judge(rows))
    rows[3]["unknown"] = ["fft"]
    (failed,) = [verdict for verdict in growth.judge(rows) if verdict.failed]
    asked = [row for row in rows if row["axis"] != "devices"]  # those are XLA's
    assert failed.text.startswith(f"1 of {len(asked)} ")
    assert failed.text.endswith("fft")


def test_operations_are_those_counted_by_hand():
    """A step makes ``X w`` and ``X' r``, ``2 n d`` operations each, and stores nothing.

    The difference of two lengths leaves out what is made once. The rest is elementwise:
    penalty, momentum and update, at most a dozen operations a weight.
    """
    cell = {"method": "FiniteDifference", "axis": "steps", "seed": 0}
    short, long = (growth.measure(cell | {"size": size}) for size in (10, 100))
    a_step = (long["operations"] - short["operations"]) / 90
    sizes = growth.sizes_of(cell | {"size": 10})
    products = 2 * 2 * sizes.examples * sizes.parameters
    assert products <= a_step <= products + 12 * sizes.parameters
    assert long["scratch"] == short["scratch"]
    assert long["unknown"] == []


def test_a_population_is_so_many_of_one():
    """Operations of an estimator without a branch, and what each holds of its own."""
    cell = {"method": "Unrolled, stored", "axis": "population", "seed": 0}
    one, ten = (growth.measure(cell | {"size": size}) for size in (1, 10))
    assert ten["operations"] == pytest.approx(10 * one["operations"], rel=1e-3)
    assert 8 < ten["scratch"] / one["scratch"] < 10.1


@pytest.mark.slow  # two processes of their own
def test_a_device_does_what_its_own_examples_ask_for():
    """By hand: a gradient of n examples is two products of ``2 n d`` operations.

    `FiniteDifference` makes two: of the step, and of the outer loss. The derivative in
    ``alpha`` at its two points needs no product.
    """
    cell = {"method": "FiniteDifference", "axis": "devices", "seed": 0}
    two, four = (growth.measure(cell | {"size": size}) for size in (2, 4))
    assert two["examples"] == four["examples"] == 1000
    assert four["operations"] == pytest.approx(two["operations"], rel=1e-2)
    assert four["scratch"] == pytest.approx(two["scratch"], rel=1e-2)
    products = 2 * two["examples"] * two["parameters"]
    assert 4 * products < two["operations"] < 5 * products
