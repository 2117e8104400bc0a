"""The list of heavy tests names tests that exist, and is made from durations."""

import ast
from pathlib import Path

import pytest

from tests.heavy import FILE, heavy_tests
from tests.planted_errors import ERRORS

TESTS = Path(__file__).parents[1]


def test_every_heavy_test_exists():
    """A test that was renamed would run where it takes too long."""
    names = FILE.read_text().splitlines()
    assert len(set(names)) == len(names)
    functions = {name.partition("[")[0] for name in names}
    for file in {name.partition("::")[0] for name in names}:
        tree = ast.parse((TESTS / file).read_text())
        defined = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
        listed = {x.rpartition("::")[2] for x in functions if x.startswith(f"{file}::")}
        assert listed <= defined, file


def test_a_guard_is_never_heavy():
    guard = next(error.guard for error in ERRORS if error.guard)
    log = f"9.00s call     tests/{guard}\n9.00s call     tests/a/test_b.py::test_c"
    assert heavy_tests(log) == ["a/test_b.py::test_c"]


def test_a_rule_of_the_house_is_never_heavy():
    """Not even if it was named before."""
    tests = ("house/test_a.py::test_b", "a.py::test_c")
    log = "\n".join(f"9.00s call     tests/{test}" for test in tests)
    assert heavy_tests(log, ["house/test_a.py::test_d"]) == ["a.py::test_c"]


def test_a_test_is_heavy_if_its_call_takes_long():
    log = """
    ============ slowest durations ============
    9.00s call     tests/a/test_b.py::test_cases[x, y::z]
    0.20s call     tests/a/test_b.py::test_cases[z]
    3.00s setup    tests/a/test_c.py::test_with_a_fixture
    """
    log = "\n".join(line.strip() for line in log.splitlines())
    slow = "a/test_b.py::test_cases[x, y::z]"
    assert heavy_tests(log) == [slow]
    quick = "a/test_b.py::test_cases[z]"
    assert heavy_tests(log, [quick, "a/test_d.py::test_e"]) == [
        slow,
        "a/test_d.py::test_e",
    ]
    with pytest.raises(ValueError, match="log"):
        heavy_tests("")
