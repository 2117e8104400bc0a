"""Folders with damaged files: each is named, and all others are listed and reported."""

import re
import shutil
from pathlib import Path

import pytest

from hypergrad import cli
from hypergrad.bench import commands
from hypergrad.bench.loading import TableRef
from hypergrad.bench.rows import read_rows, to_line
from hypergrad.bench.runner import RunOptions, run_table

BROKEN_TABLES = {
    "raises": b"table = 1 / 0\n",
    "exits": b"import sys\nsys.exit(0)\ntable = None\n",
    "no_table": b"table = 3\n",
    "no_syntax": b"table = (\n",
    "no_text": b"table = '\xff'\n",
    "own_error": b"raise ValueError('no such data')\ntable = 3\n",
}


@pytest.fixture(scope="module")
def good_rows(shared_file, tmp_path_factory) -> list[dict]:
    """Returns the rows of the table of quadratics."""
    folder = tmp_path_factory.mktemp("good")
    options = RunOptions("small", 2, folder, "hypergrad run quadratic.py")
    return run_table(TableRef(shared_file), options).rows


@pytest.fixture
def tables(shared_file, good_rows, tmp_path, monkeypatch) -> Path:
    """Returns a folder of tables of which most cannot be imported, with ``results``."""
    folder = tmp_path / "tables"
    folder.mkdir()
    shutil.copy(shared_file, folder / "quadratic.py")
    for name, content in BROKEN_TABLES.items():
        (folder / f"{name}.py").write_bytes(content)
    (folder / "folder.py").mkdir()
    (folder / "lost.py").symlink_to(tmp_path / "absent")
    (folder / "results").mkdir()
    write_rows(folder / "results" / "quadratic.jsonl", good_rows)
    monkeypatch.chdir(tmp_path)
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(map(to_line, rows)))


def damaged_results(good_rows: list[dict]) -> dict[str, str]:
    """Returns the text of files of rows that cannot be reported."""
    text = "".join(map(to_line, good_rows))
    without = lambda field: "".join(
        to_line({name: x for name, x in row.items() if name != field})
        for row in good_rows
    )
    other = {"package": "0" * 16, "table": "0" * 16}
    mixed = [good_rows[0] | {"source": other}, *good_rows[1:]]
    return {
        "flipped": text.replace("1", "2", 1),
        "cut_off": text[:-10],
        "empty": "",
        "no_json": "no row\n",
        "without_method": without("method"),
        "without_scale": without("scale"),
        "without_seed": without("seed"),
        "tuning_only": "".join(to_line(x | {"stage": "tuning"}) for x in good_rows),
        "mixed": "".join(map(to_line, mixed)),
        "repeated": text + to_line(good_rows[-1]),
        "orphan": text,
        "of_broken_table": text,
    }


@pytest.fixture
def results(tables, good_rows) -> Path:
    """Returns the folder of rows, most of which are damaged."""
    for name, text in damaged_results(good_rows).items():
        (tables / "results" / f"{name}.jsonl").write_text(text)
        if name != "orphan":
            shutil.copy(tables / "quadratic.py", tables / f"{name}.py")
    (tables / "of_broken_table.py").write_bytes(BROKEN_TABLES["raises"])
    (tables / "results" / "a_folder.jsonl").mkdir()
    shutil.copy(tables / "quadratic.py", tables / "a_folder.py")
    return tables / "results"


def call(capsys, command, *args, **options) -> tuple[int, str, str]:
    """Returns exit status, output and errors of a command."""
    status = 0
    try:
        command(*args, **options)
    except SystemExit as error:
        status = error.code or 0
    output, errors = capsys.readouterr()
    assert isinstance(status, int), status
    return status, output, errors


def test_a_list_names_tables_that_cannot_be_imported(tables, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, output, errors = call(capsys, cli.list_tables, tables)
    assert status == 1
    assert re.search("quadratic .*undecided", output)
    for name in BROKEN_TABLES:
        assert re.search(f"{name} .*FAILED", output)
        assert re.search(f"{name} failed: .*{name}.py", errors)
    assert "ZeroDivisionError in raises.py, line 1" in errors
    assert "no such data" in errors
    shutil.rmtree(tables / "results")
    for name in BROKEN_TABLES:
        (tables / f"{name}.py").unlink()
    status, output, errors = call(capsys, cli.list_tables, tables)
    assert (status, errors) == (0, "")
    assert "not run" in output


def damaged_names(good_rows: list[dict]) -> set[str]:
    return {*damaged_results(good_rows), "a_folder"}


def test_a_check_names_damaged_files_and_goes_on(results, good_rows, capsys):
    status, output, _ = call(capsys, cli.check, str(results))
    assert status == 1
    findings = dict(commands.check(str(results)))
    assert findings.keys() == {*damaged_names(good_rows), "quadratic"}
    for name in damaged_names(good_rows):
        assert all(finding.failed for finding in findings[name]), name
        assert f"{name}\n  FAILED" in output
    assert "quadratic\n  undecided" in output


def test_a_report_names_damaged_files_and_goes_on(results, good_rows, capsys):
    """The pages of damaged files have the error; one of earlier rows is replaced."""
    (results / "html").mkdir()
    (results / "html" / "flipped.html").write_text("earlier rows")
    status, _, errors = call(capsys, cli.write_report, results)
    assert status == 1
    index = (results / "html" / "index.html").read_text()
    for name in damaged_names(good_rows):
        assert f"hypergrad: {name} failed: " in errors
        page = (results / "html" / f"{name}.html").read_text()
        assert "class='bad'" in page
        assert "<table>" not in page
        assert f"href='{name}.html'" in index
    assert "quadratic failed" not in errors
    assert "<table>" in (results / "html" / "quadratic.html").read_text()
    assert index.count("FAILED") == len(damaged_names(good_rows))
    line = lambda name: next(x for x in errors.splitlines() if f"{name} failed" in x)
    assert "mixes runs" in line("mixed")
    assert "several values of source" in line("mixed")
    assert "several rows of one cell: descent, 1" in line("repeated")
    assert "rows of tuning only" in line("tuning_only")
    assert "hypergrad run" in line("tuning_only")


def test_an_export_names_damaged_files_and_goes_on(results, good_rows, capsys):
    status, output, errors = call(capsys, cli.export, results, "latex")
    assert status == 1
    assert "quadratic.tex" in output
    for name in damaged_names(good_rows):
        assert f"hypergrad: {name} failed: " in errors
        assert not (results / "export" / f"{name}.tex").exists()


def test_a_comparison_names_damaged_files_and_goes_on(
    results, tables, good_rows, capsys
):
    reference = tables / "reference"
    reference.mkdir()
    shutil.copy(results / "quadratic.jsonl", reference)
    status, output, _ = call(capsys, cli.compare, results, reference)
    assert status == 1
    for name in (
        "flipped",
        "mixed",
        "repeated",
        "orphan",
        "a_folder",
        "without_method",
    ):
        assert f"{name}: damaged: " in output
    assert "quadratic: " not in output


# Reports of the rows of one run.


def test_a_report_without_the_rows_of_a_figure_prints_the_others(tables, capsys):
    text = (tables / "quadratic.py").read_text()
    text = text.replace("seeds=5,", "seeds=5, plot=lambda rows, path: rows[10_000],")
    (tables / "quadratic.py").write_text(text)
    assert call(capsys, cli.write_report, tables / "results")[0] == 0
    page = (tables / "results" / "html" / "quadratic.html").read_text()
    assert "<table>" in page
    assert "data:image/png" not in page


def test_splits_of_other_tables_are_written_if_the_data_of_one_are_absent(
    tables, good_rows, capsys
):
    results = tables / "results"
    text = (tables / "quadratic.py").read_text()
    without_data = text.replace("    goal =", "    open('/no/such/data')\n    goal =")
    (tables / "a_lost.py").write_text(without_data)
    write_rows(results / "a_lost.jsonl", good_rows)
    with_splits = text.replace(
        "metrics={", "splits={'train': key_data(key)}, metrics={"
    )
    with_splits += "\nkey_data = jax.random.key_data\n"
    (tables / "quadratic.py").write_text(with_splits)
    status, output, errors = call(capsys, cli.export, results, "splits")
    assert status == 1
    assert "a_lost failed: its data cannot be loaded" in errors
    assert "quadratic-splits" in output
    assert (results / "export" / "quadratic-splits" / "SHA256SUMS").is_file()


def test_a_report_draws_the_figure_of_its_rows(tables, capsys):
    """Not an older figure beside the rows."""
    results = tables / "results"
    (results / "quadratic.png").write_bytes(b"a figure of other rows")
    assert call(capsys, cli.write_report, results)[0] == 0
    page = (results / "html" / "quadratic.html").read_text()
    assert "src='data:image/png;base64,iVBORw0KGgo" in page  # the signature of PNG
    assert (results / "quadratic.png").read_bytes() == b"a figure of other rows"
    assert read_rows(results / "quadratic.jsonl")
