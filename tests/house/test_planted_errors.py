"""The list of planted errors fits the library; `tests.planted_errors` plants them."""

import ast
import subprocess
import sys

import pytest

from tests.planted_errors import ERRORS, ROOT, occurrences


def test_the_guards_are_fast_tests_that_exist():
    """Pytest selects each of them by its name."""
    guards = [f"tests/{error.guard}" for error in ERRORS if error.guard]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *guards]
    options = ["-m", "not slow and not heavy", "-p", "no:cacheprovider"]
    output = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    assert set(guards) <= set(output.splitlines()), output


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.name)
def test_a_planted_error_changes_one_line_and_leaves_valid_code(error):
    assert occurrences(error) == 1
    text = (ROOT / "hypergrad" / error.path).read_text()
    wrong = text.replace(error.old, error.new)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(text))
