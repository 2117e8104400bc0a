"""Writes ``heavy.txt``, the names of the tests that take most of the time.

    make full 2>&1 | tee full.log
    python -m tests.heavy full.log

`make test` leaves them out, and CI runs them with the lowest versions. If
all tests of a module are named, take the quickest one out of the file.
"""

import re
import sys
from pathlib import Path

FILE = Path(__file__).with_name("heavy.txt")
#: A test is heavy if its call takes longer than this many seconds. What a fixture
#: takes would only move to the next test that uses it.
LIMIT = 1.0
#: A line of pytest's list of durations, such as ``2.04s call     tests/a.py::test[x]``.
DURATION = re.compile(r"^(\d+\.\d+)s call +tests/(\S+?::.+)$")


def heavy_tests(log: str) -> list[str]:
    """Returns the names of the tests whose call is above the limit, with parameters.

    Raises:
      ValueError: The log has no durations.
    """
    matches = list(filter(None, map(DURATION.match, log.splitlines())))
    if not matches:
        raise ValueError("the log has no line such as '2.04s call  tests/a.py::test'.")
    return sorted({match[2] for match in matches if float(match[1]) > LIMIT})


if __name__ == "__main__":
    names = heavy_tests(Path(sys.argv[1]).read_text())
    FILE.write_text("".join(f"{name}\n" for name in names))
