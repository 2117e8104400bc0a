"""Figures of tables leave the settings of matplotlib as they are."""

import os
import subprocess
import sys

import pytest

from hypergrad.bench.figures import import_pyplot, plot_curves
from hypergrad.bench.report import TableResult
from tests.bench.toy_table import empty_table

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


def test_a_seed_without_a_curve_is_left_out_of_the_figure():
    """A run of a single step has none."""
    table = empty_table()
    curve = {"curve_value": [2.0, 1.0], "curve_cost": [1.0, 2.0]}
    rows = [
        {"method": "few steps", "seed": 0},
        {"method": "few steps", "seed": 1, **curve},
        {"method": "one step", "seed": 0},
    ]
    axes = import_pyplot().figure().add_subplot()
    plot_curves(axes, TableResult("toy", table, rows))
    (line,) = axes.lines
    assert line.get_ydata().tolist() == [2.0, 1.0]
