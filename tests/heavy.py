"""Writes ``heavy.txt``, the names of the tests that take most of the time.

    pytest -n 2 --durations=0 --durations-min=0.01 -m "not slow" 2>&1 | tee log
    python -m tests.heavy log

`make test` leaves them out; `.ci/run heavy` runs them. Tests that are not in the log
keep their place, so that a run of the fast tests alone only adds names. If all tests of
a module are named, take the quickest one out of the file. Guards of planted errors are
never in it; if an error without a guard survives after a change of the file, name one.
Nor are the rules of the house, which every change may break.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.planted_errors import ERRORS

FILE = Path(__file__).with_name("heavy.txt")
#: A test is heavy if its call takes longer than this many seconds. What a fixture
#: takes would only move to the next test that uses it.
LIMIT = 1.0
#: A line of pytest's list of durations, such as ``2.04s call     tests/a.py::test[x]``.
DURATION = re.compile(r"^(\d+\.\d+)s call +tests/(\S+?::.+)$")


def heavy_tests(log: str, old_names: Iterable[str] = ()) -> list[str]:
    """Returns the names of the tests whose call is above the limit, with parameters.

    A test that guards against a planted error is not among them, nor is one of the
    house.

    Args:
      log: What pytest printed.
      old_names: Names that stay unless the log has the test.

    Raises:
      ValueError: The log has no durations.
    """
    matches = list(filter(None, map(DURATION.match, log.splitlines())))
    if not matches:
        raise ValueError("the log has no line such as '2.04s call  tests/a.py::test'.")
    guards = {error.guard for error in ERRORS}
    seconds = {match[2]: float(match[1]) for match in matches}
    names = {name for name in seconds if seconds[name] > LIMIT}
    names |= set(old_names) - set(seconds)
    return sorted(name for name in names - guards if not name.startswith("house/"))


if __name__ == "__main__":
    old_names = FILE.read_text().splitlines()
    names = heavy_tests(Path(sys.argv[1]).read_text(), old_names)
    FILE.write_text("".join(f"{name}\n" for name in names))
