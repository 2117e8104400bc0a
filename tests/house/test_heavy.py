"""The list of heavy tests names tests that exist, and is made from durations."""

import ast
from pathlib import Path

from tests.heavy import FILE, heavy_tests

TESTS = Path(__file__).parents[1]


def test_every_heavy_test_exists():
    """A test that was renamed would run where it takes too long."""
    names = FILE.read_text().split()
    assert len(set(names)) == len(names)
    for file in {name.partition("::")[0] for name in names}:
        tree = ast.parse((TESTS / file).read_text())
        defined = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
        listed = {x.partition("::")[2] for x in names if x.startswith(f"{file}::")}
        assert listed <= defined, file


def test_a_test_is_heavy_if_one_of_its_cases_takes_long():
    log = """
    ============ slowest durations ============
    9.00s call     tests/a/test_b.py::test_long[x y]
    0.20s call     tests/a/test_b.py::test_long[z]
    0.30s setup    tests/a/test_b.py::test_short
    3.00s setup    tests/a/test_c.py::test_with_a_fixture
    """
    expected = ["a/test_b.py::test_long", "a/test_c.py::test_with_a_fixture"]
    assert heavy_tests("\n".join(x.strip() for x in log.splitlines())) == expected
