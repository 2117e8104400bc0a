"""Writes ``heavy.txt``, the names of the tests that take most of the time.

    make full 2>&1 | tee full.log
    python -m tests.heavy full.log

`make test` leaves them out; `.ci/run heavy` runs them. If all tests of a module are
named, take the quickest one out of the file. Guards of planted errors are never in it;
if an error without a guard survives after a change of the file, name one.
"""

import re
import sys
from pathlib import Path

from tests.planted_errors import ERRORS

FILE = Path(__file__).with_name("heavy.txt")
#: A test is heavy if its call takes longer than this many seconds. What a fixture
#: takes would only move to the next test that uses it.
LIMIT = 1.0
#: A line of pytest's list of durations, such as ``2.04s call     tests/a.py::test[x]``.
DURATION = re.compile(r"^(\d+\.\d+)s call +tests/(\S+?::.+)$")


def heavy_tests(log: str) -> list[str]:
    """Returns the names of the tests whose call is above the limit, with parameters.

    A test that guards against a planted error is not among them.

    Raises:
      ValueError: The log has no durations.
    """
    matches = list(filter(None, map(DURATION.match, log.splitlines())))
    if not matches:
        raise ValueError("the log has no line such as '2.04s call  tests/a.py::test'.")
    guards = {error.guard for error in ERRORS}
    names = {match[2] for match in matches if float(match[1]) > LIMIT}
    return sorted(names - guards)


if __name__ == "__main__":
    names = heavy_tests(Path(sys.argv[1]).read_text())
    FILE.write_text("".join(f"{name}\n" for name in names))
