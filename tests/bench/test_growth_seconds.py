"""Tests of the table of seconds: fits of exact powers, and rounds of a false clock."""

import pytest

from benchmarks import growth_seconds as growth
from benchmarks.shared.growth_programs import BLIND, METHODS, Sizes, fit_power, theory
from hypergrad.bench import Finding

FIXED = 1e-6


def synthetic(deviation: float = 0.0) -> list[dict]:
    """Returns rows of exact powers, those of theory plus a deviation.

    Two rounds of each size are outliers.
    """
    rows = []
    for cell in growth.cells("small", 1):
        sizes = list(growth.sizes_of(cell["method"], cell["axis"]))
        power = theory(cell["method"], "operations", cell["axis"]) + deviation
        seconds = [1e-3 * size**power for size in sizes]
        rounds = [[s, s / 3, s, 9 * s, s] for s in seconds]
        fields = {"sizes": sizes, "seconds": rounds, "fixed": [FIXED] * 5}
        machine = {"cpu": "one", "cores": 2, "memory": 2**30, "discarded": 0}
        rows.append(cell | fields | machine)
    return rows


def findings(rows: list[dict], part: str = "") -> list[Finding]:
    """Returns the findings whose text contains a part."""
    return [x for x in growth.findings(rows) if part in x.text]


def test_rows_of_theory_are_supported_and_others_are_not():
    """Each exponent that differs by more than the tolerance is named."""
    assert {x.outcome for x in findings(synthetic())} == {"supported"}
    near = findings(synthetic(0.09), "exponents")
    deviating = findings(synthetic(0.11))
    assert {x.outcome for x in near} == {"supported"}
    assert {x.outcome for x in deviating} == {"not supported"}
    assert len(near) == len(growth.AXES) == len(deviating) - 1
    assert f"against steps: 0 of {len(METHODS)} exponents" in deviating[0].text
    assert "Forward 1.11 for 1" in deviating[2].text
    assert "SOBA 0.11 for 0" in deviating[2].text


def test_flat_lines_are_checked_by_their_spread():
    """0.02 per decade over seven decades is within 1.5 times, 0.03 is not."""
    (near,), (far,) = (findings(synthetic(x), "over all") for x in (0.02, 0.03))
    assert "1.38 times the least" in near.text
    assert f"of {len(BLIND)}; 1.5 claimed" in near.text
    assert "1.62 times the least" in far.text
    assert (near.outcome, far.outcome) == ("supported", "not supported")


def line(fixed: float, sizes: list[int]) -> dict:
    """Seconds in proportion to the size, and what is fixed."""
    seconds = [[fixed + 1e-5 * size] * 5 for size in sizes]
    return {"sizes": sizes, "seconds": seconds, "fixed": [fixed] * 5}


def test_sizes_at_which_much_is_fixed_are_left_out():
    """Of 100 µs that never change: half at the first size, under a tenth after it."""
    found = growth.exponent(line(1e-4, [10, 100, 1000, 9000]))
    kept = fit_power([100, 1000, 9000], [1.1e-3, 1.01e-2, 9.01e-2])
    assert found == pytest.approx(kept, abs=1e-12)
    assert found > fit_power([10, 100, 1000, 9000], [2e-4, 1.1e-3, 1.01e-2, 9.01e-2])


def test_incomplete_line_fails():
    """Sizes above the fixed cost, or clean rounds, are too few; the line is named."""
    for change in (line(1e-4, [10, 100, 1000]), {"fixed": [FIXED] * 4}):
        rows = synthetic()
        rows[7] |= change
        (failed,) = growth.findings(rows)
        assert failed.failed
        assert failed.text.startswith(f"{rows[7]['method']} against {rows[7]['axis']}")


class Clock:
    """Calls that take seconds of their own, and rounds of which some are not clean."""

    def __init__(self, seconds: dict[str, float], others: list[float]):
        self.seconds, self.others = seconds, iter(others)
        self.called: list[str] = []
        self.calls = [self.call(name) for name in seconds]

    def call(self, name: str):
        one = lambda: self.called.append(name)
        one.name = name
        return one

    def timed(self, call, number: int) -> dict[str, float]:
        for _ in range(number):
            call()
        if not hasattr(call, "name"):  # a round
            return {"seconds": 1.0, "others": next(self.others)}
        return {"seconds": self.seconds[call.name], "others": 9.0}


def test_calls_are_in_turns_and_busy_rounds_are_thrown_away(monkeypatch):
    """Short ones are repeated; others count over a round, not over a call."""
    clock = Clock({"a": 0.06, "b": 0.5}, [0.0, 0.2, 0.01, 0.09, 0.08, 0.0, 0.0])
    monkeypatch.setattr(growth, "time_calls", clock.timed)
    clean, discarded = growth.time_in_rounds(clock.calls)
    assert clean == [[0.06, 0.5]] * 5
    assert discarded == 2
    assert "".join(clock.called) == "aabb" + 7 * "aaab"


def test_busy_machine_is_an_error(monkeypatch):
    """The cell fails after 20 rounds; five clean rounds suffice."""
    monkeypatch.setattr(growth, "make_call", lambda method, sizes: lambda: None)
    monkeypatch.setattr(growth, "minimal_call", lambda method: lambda: None)
    busy = iter([0.0] * 5 + [1.0] * 20)
    time_round = lambda calls, numbers: ([0.2] * len(calls), next(busy))
    monkeypatch.setattr(growth, "time_round", time_round)
    cell, next_cell, *_ = growth.cells("small", 1)
    assert growth.measure(cell, [])["discarded"] == 0
    with pytest.raises(ValueError, match="busy in 20 of 20 rounds of Implicit, CG"):
        growth.measure(next_cell, [])


def test_one_line_is_measured(monkeypatch):
    """Small, and on a machine as busy as it is: seconds of every size and round."""
    small = {10: Sizes(parameters=10), 20: Sizes(parameters=20)}
    monkeypatch.setattr(growth, "sizes_of", lambda method, axis: small)
    monkeypatch.setattr(growth, "MAX_OTHER_LOAD", float("inf"))
    monkeypatch.setattr(growth, "ROUND_SECONDS", 1e-3)
    row = growth.measure({"method": "FiniteDifference", "axis": "parameters"}, [])
    assert row["sizes"] == [10, 20]
    assert [len(seconds) for seconds in row["seconds"]] == [growth.NUM_CLEAN] * 2
    assert all(s > 0 for seconds in [*row["seconds"], row["fixed"]] for s in seconds)
    assert row["discarded"] == 0
    assert row["cores"] >= 1


def test_the_report_holds_every_line(tmp_path):
    """A row an estimator, a column an axis; and a figure."""
    rows = synthetic()
    lines = growth.body(rows)
    assert f"| Forward {len(growth.AXES) * '| 1.00 [1] '}| 1 |" in lines
    growth.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
