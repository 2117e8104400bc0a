"""Values and labels in the formats of other programs."""

import csv
import json

from hypergrad.bench import Column, export, report
from tests.bench.toy_table import empty_table


def make_result(label: str, **fields) -> report.TableResult:
    table = empty_table(columns=(Column("x"),))
    row = {"method": label, "seed": 0, "x": 1.0, "scale": "small", "command": "run"}
    return report.TableResult("toy", table, [row | fields])


def test_settings_that_are_lists_are_columns_of_csv(tmp_path):
    result = make_result("a", settings={"betas": [0.1, 0.9], "rate": 1, "name": "x"})
    path = export.export(result, "csv", tmp_path)
    with path.open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["settings.betas"] == "[0.1, 0.9]"
    assert (line["settings.rate"], line["settings.name"]) == ("1", "x")


def test_settings_are_those_of_each_cell_that_has_some(tmp_path):
    """`corruption` chooses a rate for each share of wrong labels."""
    table = empty_table(
        cells=lambda scale, seeds: [{"method": "a", "share": 0.5, "seed": 0}],
    )
    rows = [
        {"method": "a", "share": share, "seed": seed, "settings": {"rate": rate}}
        for share, seed, rate in ((0.5, 0, 1.0), (0.7, 0, 1.4), (0.7, 1, 2.0))
    ]
    common = {"table": "toy", "scale": "small", "command": "run", "commit": "c"}
    without = {"method": "b", "share": 0.5, "seed": 0, "settings": {}}
    printed = [row | common | {"error": 0.1} for row in (*rows, without)]
    result = report.TableResult("toy", table, printed)
    record = json.loads(export.export(result, "settings", tmp_path).read_text())
    assert record == common | {"settings": rows}


def test_characters_with_a_meaning_in_latex_are_escaped(tmp_path):
    result = make_result(r"a^2_b ~ {\T} < 3 > 1 | 5%")
    text = export.export(result, "latex", tmp_path).read_text()
    assert (
        r"a\textasciicircum{}2\_b \textasciitilde{} \{\textbackslash{}T\} $<$ 3 $>$ 1 "
        r"$|$ 5\% & " in text
    )
