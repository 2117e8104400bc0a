"""The list of planted errors fits the library; `tests.planted_errors` plants them."""

import ast

import pytest

from tests.heavy import FILE
from tests.planted_errors import ERRORS, ROOT, occurrences


def test_the_guards_are_fast_tests_that_exist():
    """A guard that was renamed would find nothing."""
    guards = {error.guard for error in ERRORS if error.guard}
    assert not guards & set(FILE.read_text().splitlines())
    for guard in guards:
        file, _, name = guard.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert f"def {name.partition('[')[0]}(" in text, guard


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.name)
def test_a_planted_error_changes_one_line_and_leaves_valid_code(error):
    assert occurrences(error) == 1
    text = (ROOT / "hypergrad" / error.path).read_text()
    wrong = text.replace(error.old, error.new)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(text))
