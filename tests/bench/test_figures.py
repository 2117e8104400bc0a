"""Figures of tables leave the settings of matplotlib as they are."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
{before}
from hypergrad.bench.figures import import_pyplot
print(import_pyplot().get_backend())
"""


@pytest.mark.parametrize(
    ("before", "variables", "backend"),
    [
        ("", {}, "agg"),
        ("", {"MPLBACKEND": "svg"}, "svg"),
        ("from matplotlib import pyplot; pyplot.switch_backend('pdf')", {}, "pdf"),
    ],
    ids=["default", "variable", "pyplot in use"],
)
def test_a_chosen_backend_stays(before, variables, backend):
    """A notebook draws into its cells after a table was drawn to a file."""
    environment = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip().lower() == backend
