"""The list of planted errors fits the library; `tests.planted_errors` plants them."""

import ast

import pytest

from tests.planted_errors import ERRORS, ROOT, occurrences


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.name)
def test_a_planted_error_changes_one_line_and_leaves_valid_code(error):
    assert occurrences(error) == 1
    text = (ROOT / "hypergrad" / error.path).read_text()
    wrong = text.replace(error.old, error.new)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(text))
