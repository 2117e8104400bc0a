"""Parameters of tests of which only some run in CI."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Returns the cases as parameters; those that are not in ``fast`` are slow.

    For a property that is tested in many cases: CI runs the fast ones and `make full`
    runs all. A case is a value, or a tuple of one value per argument.

    Raises:
      ValueError: A fast case is not among the cases.
    """
    cases = list(cases)
    unknown = [case for case in fast if case not in cases]
    if unknown:
        raise ValueError(f"fast cases that do not exist: {unknown}")
    slow = pytest.mark.slow
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in fast else slow,
        )
        for case in cases
    ]
