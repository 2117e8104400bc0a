"""How seconds grow: rows whose exponents are known, and rounds whose clock is."""

import pytest

from benchmarks import growth_seconds as growth
from benchmarks.growth import BLIND, METHODS, Sizes, theory
from hypergrad.studies import record
from hypergrad.studies.table import Request, Table, cell_by_cell, check

FIXED = 1e-6


def synthetic(off: float = 0.0) -> list[dict]:
    """Rows of exact powers, those of theory and ``off`` more; two rounds are wild."""
    rows = []
    for cell in growth.plan("small", 1):
        sizes = list(growth.sizes_of(cell["method"], cell["axis"]))
        power = theory(cell["method"], "operations", cell["axis"]) + off
        seconds = [1e-3 * size**power for size in sizes]
        wild = [[s, s / 3, s, 9 * s, s] for s in seconds]
        took = {"sizes": sizes, "seconds": wild, "fixed": [FIXED] * 5}
        machine = {"cpu": "one", "cores": 2, "memory": 2**30, "discarded": 0}
        rows.append(cell | took | machine)
    return rows


def judged(rows: list[dict], what: str = "") -> list[str]:
    """What is said of them."""
    return [v.text for v in growth.judge(rows) if what in v.text]


def test_rows_of_theory_are_reproduced_and_others_are_not():
    """By more than the tolerance no exponent is, and each is named."""
    assert all(text.endswith(": reproduced") for text in judged(synthetic()))
    near, off = judged(synthetic(0.09), "exponents"), judged(synthetic(0.11))
    assert all(text.endswith(": reproduced") for text in near)
    assert all(text.endswith(": not reproduced") for text in off)
    assert len(near) == len(growth.AXES) == len(off) - 1
    assert f"against steps: 0 of {len(METHODS)} exponents" in off[0]
    assert "Forward 1.11 for 1" in off[2]
    assert "SOBA 0.11 for 0" in off[2]


def test_what_is_to_be_flat_is_told_by_its_spread():
    """0.02 a decade over seven is within 1.5 times, 0.03 is not."""
    near, far = (judged(synthetic(off), "over all") for off in (0.02, 0.03))
    assert "1.38 times the least" in near[0]
    assert f"of {len(BLIND)}; 1.5 claimed: reproduced" in near[0]
    assert "1.62 times the least" in far[0]
    assert far[0].endswith(": not reproduced")


def line(fixed: float, sizes: list[int]) -> dict:
    """Seconds in proportion to the size, and what is fixed."""
    seconds = [[fixed + 1e-5 * size] * 5 for size in sizes]
    return {"sizes": sizes, "seconds": seconds, "fixed": [fixed] * 5}


def test_sizes_at_which_much_is_fixed_are_left_out():
    """Of 100 µs that never change: half at the first size, under a tenth after it."""
    found = growth.exponent(line(1e-4, [10, 100, 1000, 9000]))
    kept = growth.slope([100, 1000, 9000], [1.1e-3, 1.01e-2, 9.01e-2])
    assert found == pytest.approx(kept, abs=1e-12)
    assert found > growth.slope([10, 100, 1000, 9000], [2e-4, 1.1e-3, 1.01e-2, 9.01e-2])


def test_a_line_that_tells_nothing_fails():
    """Too few sizes above what is fixed, or too few clean rounds; it is named."""
    for change in (
        line(1e-4, [10, 100, 1000]),
        {"fixed": [FIXED] * 4},
    ):
        rows = synthetic()
        rows[7] |= change
        (failed,) = growth.judge(rows)
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
    monkeypatch.setattr(growth, "timed", clock.timed)
    clean, discarded = growth.in_rounds(clock.calls)
    assert clean == [[0.06, 0.5]] * 5
    assert discarded == 2
    assert "".join(clock.called) == "aabb" + 7 * "aaab"


def test_a_busy_machine_keeps_what_was_measured(monkeypatch, tmp_path):
    """The line at which it was too busy is measured by the next call."""
    monkeypatch.setattr(growth, "ready", lambda method, sizes: lambda: None)
    monkeypatch.setattr(growth, "least", lambda method: lambda: None)
    others = iter([0.0] * 5 + [1.0] * 20 + [0.0] * 5)
    one_round = lambda calls, numbers: ([0.2] * len(calls), next(others))
    monkeypatch.setattr(growth, "one_round", one_round)
    table = Table(
        name="small",
        source="here",
        minutes=0,
        seeds=1,
        plan=lambda scale, seeds: growth.plan(scale, seeds)[:2],
        run=cell_by_cell(growth.measure, lambda *_: "", lambda rows, path: None),
        judge=lambda rows: [],
    )
    ask = Request("small", 1, tmp_path, "the command")
    with pytest.raises(ValueError, match="busy in 20 of 20 rounds of Implicit, CG"):
        table.run(table, ask)
    assert len(record.read(tmp_path / "small.jsonl")) == 1
    table.run(table, ask)
    assert check(table, tmp_path) == []


def test_one_line_is_measured(monkeypatch):
    """Small, and on a machine as busy as it is: seconds of every size and round."""
    small = {10: Sizes(parameters=10), 20: Sizes(parameters=20)}
    monkeypatch.setattr(growth, "sizes_of", lambda method, axis: small)
    monkeypatch.setattr(growth, "OTHERS", float("inf"))
    monkeypatch.setattr(growth, "SECONDS", 1e-3)
    row = growth.measure({"method": "FiniteDifference", "axis": "parameters"})
    assert row["sizes"] == [10, 20]
    assert [len(seconds) for seconds in row["seconds"]] == [growth.CLEAN] * 2
    assert all(s > 0 for seconds in [*row["seconds"], row["fixed"]] for s in seconds)
    assert row["discarded"] == 0
    assert row["cores"] >= 1


def test_the_report_holds_every_line(tmp_path):
    """A row an estimator, a column an axis; and a figure."""
    rows = synthetic()
    text = growth.markdown(growth.TABLE, rows, "the command")
    assert f"| Forward {len(growth.AXES) * '| 1.00 [1] '}| 1 |" in text.splitlines()
    growth.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
