"""The command line, used in an empty folder as a new user would."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import typing
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from rich.console import Console

from hypergrad import cli, tasks
from hypergrad.bench import (
    Claim,
    Comparison,
    Finding,
    check,
    commands,
    export,
    loading,
    recompute,
)
from hypergrad.bench import compare as comparisons
from hypergrad.bench.dry_run import plan
from hypergrad.bench.rows import read_rows, to_line
from hypergrad.bench.runner import RunOptions
from hypergrad.runtime.console import CONTROL_CHARACTER, print_markdown


def call_in_a_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs ``hypergrad`` in a folder, in an interpreter of its own."""
    command = [sys.executable, "-m", "hypergrad", *arguments]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )


def call(
    folder: Path, *arguments: str, columns: str = "200"
) -> subprocess.CompletedProcess:
    """Runs ``hypergrad`` in a folder, in this interpreter, which is much quicker."""
    code, out, err = None, io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch("sys.argv", ["hypergrad", *arguments]),
        mock.patch.dict("os.environ", COLUMNS=columns),
        mock.patch("warnings.formatwarning", warnings.formatwarning),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
    if isinstance(code, str):  # the interpreter would print it and exit with 1
        err.write(code)
    status = code if isinstance(code, int) else int(code is not None)
    return subprocess.CompletedProcess(
        arguments, status, out.getvalue(), err.getvalue()
    )


@pytest.fixture(scope="module")
def folder(shared_file) -> Path:
    """Returns the folder of the table after ``hypergrad run`` with a method."""
    folder = shared_file.parent
    done = call_in_a_process(folder, "run", "quadratic.py", "--method", "mine.py:stay")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def rows(folder) -> list[dict]:
    """Returns the rows of the run."""
    return read_rows(folder / "runs" / "quadratic.jsonl")


def check_rows(folder: Path, tmp_path: Path, rows: list[dict]) -> list[Finding]:
    """Returns the findings of a file of rows."""
    (tmp_path / "quadratic.jsonl").write_text("".join(map(to_line, rows)))
    table = loading.load_table(folder / "quadratic.py")
    return check.check_result("quadratic", table, tmp_path)


def test_run_writes_rows_table_and_figure(folder):
    names = {path.name for path in (folder / "runs").iterdir()}
    assert names == {"quadratic.jsonl", "quadratic.md", "quadratic.png"}
    text = (folder / "runs" / "quadratic.md").read_text()
    assert "hypergrad run quadratic.py --method mine.py:stay" in text
    assert "| stay * |" in text  # the added row is marked
    assert "stay against descent in distance: worse" in text
    assert "**supported**: descent over nothing" in text


def test_a_second_run_measures_nothing(folder):
    before = (folder / "runs" / "quadratic.jsonl").read_bytes()
    assert call_in_a_process(folder, "run", "quadratic.py").returncode == 0
    assert (folder / "runs" / "quadratic.jsonl").read_bytes() == before


#: A table whose cells of one method fail, and whose body needs them.
BROKEN_BODY = """
from hypergrad.bench import MeasurementTable

def measure(cell, rows):
    if cell["method"] == "bad":
        raise RuntimeError("the disk is full")
    return {{"value": 1.0}}

table = MeasurementTable(
    cells=lambda scale, seeds: [{{"method": x, "seed": 0}} for x in {methods}],
    measure_cell=measure,
    body=lambda rows: [str({body})],
)
"""


@pytest.mark.parametrize(
    ("methods", "body", "message", "num_files"),
    [
        (("good", "bad"), "rows[1]", "others are missing (IndexError", 2),
        (
            ("good", "bad"),
            "1 / 0",
            ": ZeroDivisionError in toy.py, line 12",
            1,
        ),
        (("bad",), "rows[1]", "No row was made", 1),
        ((), "rows[1]", "toy failed: it has no rows", 1),
    ],
)
def test_a_run_says_why_cells_failed_whatever_it_cannot_print(
    tmp_path, methods, body, message, num_files
):
    text = BROKEN_BODY.format(methods=methods, body=body)
    (tmp_path / "toy.py").write_text(text)
    done = call(tmp_path, "run", "toy.py")
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert ("RuntimeError in toy.py, line 6: the disk is full" in done.stderr) == (
        "bad" in methods
    )
    assert done.stdout.count("wrote ") == num_files


def test_a_table_of_a_body_alone_has_no_figure(tmp_path):
    text = BROKEN_BODY.format(methods=("good",), body="len(rows)")
    (tmp_path / "toy.py").write_text(text)
    done = call(tmp_path, "run", "toy.py")
    assert done.returncode == 0
    assert "No figure was drawn" not in done.stdout
    assert not list((tmp_path / "runs").glob("*.png"))
    done = call(tmp_path, "report", "runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert "<img" not in (tmp_path / "runs" / "html" / "toy.html").read_text()
    assert call(tmp_path, "export", "runs", "pdf").returncode == 1


def test_rows_of_a_file_elsewhere_find_their_table(folder, tmp_path, rows):
    """The command in the rows names the file; without it the table is not found."""
    command = f"hypergrad run {folder / 'quadratic.py'}"
    (tmp_path / "runs").mkdir()
    file = tmp_path / "runs" / "quadratic.jsonl"
    file.write_text("".join(to_line(row | {"command": command}) for row in rows))
    done = call(tmp_path, "check", "runs")
    assert done.returncode == 0, done.stdout
    assert "supported" in done.stdout
    file.write_text("".join(map(to_line, rows)))
    assert "was not found" in call(tmp_path, "check", "runs").stdout


def test_check_of_a_table_finds_the_rows_of_its_last_run(folder):
    """Rows in ``results`` come first; there is no such folder here."""
    done = call(folder, "check", "quadratic.py")
    assert done.returncode == 0, done.stdout
    assert "supported" in done.stdout


def test_check_names_rows_of_another_text_of_the_table(folder, tmp_path):
    (tmp_path / "results").mkdir()
    rows = folder / "runs" / "quadratic.jsonl"
    (tmp_path / "results" / "quadratic.jsonl").write_bytes(rows.read_bytes())
    text = (folder / "quadratic.py").read_text()
    for comment, has_changed in (("", False), ("# changed\n", True)):
        (tmp_path / "quadratic.py").write_text(text + comment)
        done = call(tmp_path, "check", "quadratic.py")
        assert done.returncode == 0, done.stdout
        assert ("has changed since" in done.stdout) == has_changed


def test_an_interrupted_run_is_told_from_a_damaged_one(folder, tmp_path, rows):
    tuning = [row for row in rows if row.get("stage") == "tuning"]
    (finding,) = check_rows(folder, tmp_path, tuning)
    assert f"{len(tuning)} rows of tuning" in finding.text
    assert "continues" in finding.text


def test_list_shows_the_tables_of_a_folder(folder):
    shown = call(folder, "list", ".").stdout
    assert "quadratic" in shown
    assert "--method" in shown
    assert "yes" in shown
    assert "mine" not in shown


@pytest.mark.parametrize("command", ["estimators", "cite", "compare runs runs"])
def test_a_reader_that_closes_the_pipe_ends_a_command_quietly(folder, command):
    """As ``| head`` does once it has its lines."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "hypergrad", *command.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode in (1, 141)  # 1 is that of rich
    assert not done.stderr


def test_ctrl_c_is_one_line(folder):
    with mock.patch("hypergrad.bench.commands.run", side_effect=KeyboardInterrupt):
        done = call(folder, "run", "quadratic.py")
    assert done.returncode == 130
    assert done.stderr == "hypergrad: interrupted\n"


@pytest.mark.parametrize("columns", ["60", "200"])
def test_estimators_fit_the_terminal(folder, columns):
    """A narrow terminal gets a line per property instead of a broken table."""
    with mock.patch("rich.console.Console.is_terminal", True):
        text = call(folder, "estimators", columns=columns).stdout
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert any("SOBA(optimizer)" in line for line in lines)


def test_report_makes_one_page_of_all_and_one_of_each(folder):
    assert call(folder, "report", "runs").returncode == 0
    index = (folder / "runs" / "html" / "index.html").read_text()
    page = (folder / "runs" / "html" / "quadratic.html").read_text()
    assert "href='quadratic.html'" in index
    assert "a &lt;test&gt; &amp; its author" in page  # text is escaped
    assert "src='data:image/png" in page
    assert not re.search(r"(src|href)='https?:", index + page)  # needs no other file


def test_report_ranks_the_methods_of_a_table(folder, rows):
    """The method with the lowest distance to the optimum is first."""
    call(folder, "report", "runs")
    page = (folder / "runs" / "html" / "leaderboard.html").read_text()
    assert "href='leaderboard.html'" in (folder / "runs/html/index.html").read_text()
    distances = {}
    for row in rows:
        if row.get("stage") is None:
            distances.setdefault(row["method"], []).append(row["distance"])
    ordered = sorted(distances, key=lambda x: sum(distances[x]))
    expected = [name + " *" * (name == "stay") for name in ordered]  # it was added
    ranked = re.findall("<tr><td>([^<]*)</td>", page)
    assert ranked == expected
    assert ranked[-1] == "nothing"


def test_compare_finds_a_changed_number(folder, tmp_path, rows):
    rows[-1]["distance"] += 0.5
    (tmp_path / "quadratic.jsonl").write_text("".join(map(to_line, rows)))
    (tmp_path / "quadratic.py").write_bytes((folder / "quadratic.py").read_bytes())
    same = call(folder, "compare", "runs", "runs")
    changed = call(folder, "compare", "runs", str(tmp_path))
    assert (same.returncode, changed.returncode) == (0, 1)
    assert changed.stdout.startswith(f"runs | {tmp_path}\n")
    assert "distance in 1 cell" in changed.stdout


def test_compare_leaves_out_all_seconds(folder):
    result = load_result(folder)
    rows = [row | {"training_seconds": i} for i, row in enumerate(result.rows)]
    assert not comparisons.compare(result, dataclasses.replace(result, rows=rows))


def test_the_origin_of_rows_is_no_number(folder):
    """Converted rows say so, and older ones do not name their precision."""
    result = load_result(folder)
    old = [
        {k: x for k, x in row.items() if k != "float"} | {"converted_from": "0" * 40}
        for row in result.rows
    ]
    differences = comparisons.compare(result, dataclasses.replace(result, rows=old))
    assert {difference.kind for difference in differences} == {"provenance"}


def test_compare_lists_the_tables_of_one_folder_in_one_line(folder, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for name in ("quadratic", "second", "third"):
        rows = (folder / "runs" / "quadratic.jsonl").read_bytes()
        (results / f"{name}.jsonl").write_bytes(rows)
        (tmp_path / f"{name}.py").write_bytes((folder / "quadratic.py").read_bytes())
    output = call(folder, "compare", "runs", str(results)).stdout
    assert f"only in {results}: second, third" in output


def test_recomputed_cells_are_equal_or_named(folder, tmp_path, rows):
    """A change of the last digits is not printed; a larger one is."""
    equal = call_in_a_process(folder, "recompute", "runs", "--cells", "20")
    assert equal.returncode == 0, equal.stdout
    assert equal.stdout.splitlines()[-1] == "15 equal"  # three methods, five seeds
    changed = [row for row in rows if row["method"] == "nothing"]
    changed[0]["distance"] *= 1 + 1e-9
    changed[1]["distance"] *= 1.1
    (tmp_path / "quadratic.jsonl").write_text("".join(map(to_line, rows)))
    (tmp_path / "quadratic.py").write_bytes((folder / "quadratic.py").read_bytes())
    different = call_in_a_process(
        folder, "recompute", str(tmp_path), "--cells", "20", "--seed", "1"
    )
    assert different.returncode == 1
    *lines, counts = different.stdout.splitlines()
    assert counts.count("1 as printed") == counts.count("1 different") == 1
    (line,) = [line for line in lines if line.startswith("different")]
    assert f"nothing, {changed[1]['seed']}" in line
    assert "distance" in line
    assert " | " in line


def test_a_cell_is_recomputed_with_the_budget_of_its_run(shared_file, tmp_path):
    runs, file = tmp_path / "runs", tmp_path / "quadratic.py"
    file.write_bytes(shared_file.read_bytes())
    run = commands.resolve_run(str(file), (), ("random",), 1, None, 30.0, runs, ())
    text, _, _ = commands.run(*run)
    assert "made with the budget 30.0; the table has 60" in text
    (cell,) = commands.recompute(runs, 5, 1e6, 0, ())
    assert cell.outcome == recompute.EQUAL, cell.text


def test_a_damaged_table_is_not_left_out_of_recompute(folder, tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "quadratic.jsonl").write_text("{}\n")
    (tmp_path / "quadratic.py").write_bytes((folder / "quadratic.py").read_bytes())
    (cell,) = commands.recompute(runs, 5, 1e6, 0, ())
    assert cell.outcome == recompute.FAILED
    assert "checksum" in cell.text or "damaged" in cell.text


def test_a_cell_of_other_data_is_not_recomputed(folder):
    """Digests without the prefix are of another kind and tell nothing."""
    result, ref = load_result(folder), loading.TableRef(folder / "quadratic.py")
    row = next(x for x in result.printed_rows if x["method"] == "nothing")
    outcome = lambda data: recompute.recompute(result, ref, row | {"data": data})
    failed = outcome("sha256 00")
    assert failed.outcome == recompute.FAILED
    assert "fingerprint" in failed.text
    assert outcome("00").outcome != recompute.FAILED


def test_chosen_cells_are_of_as_many_tables_as_possible(folder):
    result = load_result(folder)
    results = [dataclasses.replace(result, name=name) for name in "abc"]
    chosen = recompute.choose_cells(results, 7, max_seconds=1e6, seed=3)
    names = [result.name for result, _ in chosen]
    assert sorted(map(names.count, "abc")) == [2, 2, 3]
    cells = [(result.name, row["method"], row["seed"]) for result, row in chosen]
    assert len(set(cells)) == 7
    assert cells != [
        (result.name, row["method"], row["seed"])
        for result, row in recompute.choose_cells(results, 7, max_seconds=1e6, seed=4)
    ]
    assert not recompute.choose_cells(results, 7, max_seconds=0.0, seed=3)


def test_a_dry_run_lists_the_cells_and_writes_nothing(folder, tmp_path):
    shown = call(folder, "run", "quadratic.py", "--dry-run", "--out", str(tmp_path))
    (line,) = [x for x in shown.stdout.splitlines() if "descent" in x]
    # Two rates on five seeds are ten tuning runs; with the five runs 900 grad-eq.
    assert [x.strip() for x in line.split("│")[2:5]] == ["10", "5", "900"]
    assert not list(tmp_path.iterdir())


def planned_cells(folder: Path, *options: str) -> dict[str, list[str]]:
    """Returns the cells of the printed plan of a run, by method."""
    text = call(folder, "run", "quadratic.py", "--dry-run", *options).stdout
    lines = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    return {label.strip(): [x.strip() for x in cells] for label, *cells in lines}


def test_a_dry_run_leaves_out_the_cells_that_have_rows(folder, tmp_path, rows):
    for cells in planned_cells(folder).values():
        assert cells == ["0", "0", "0", "-"]
    rows = [row for row in rows if (row["method"], row["seed"]) != ("descent", 3)]
    (tmp_path / "quadratic.jsonl").write_text("".join(map(to_line, rows)))
    plan = planned_cells(folder, "--out", str(tmp_path))
    assert plan["descent"] == ["2", "1", "180", "-"]
    assert plan["nothing"] == ["0", "0", "0", "-"]


def test_a_dry_run_takes_seconds_of_the_same_budget_and_scale(
    shared_file, folder, rows
):
    """The costs of selection are those of the tuning runs."""
    ref = loading.TableRef(shared_file)
    table = dataclasses.replace(ref.load(), selection_cost=7.0)
    committed = [row | {"run_seconds": 2.0} for row in rows]
    other_scale = [row | {"scale": "paper", "run_seconds": 50.0} for row in rows]
    options = RunOptions("small", 5, folder, "", only=("descent",))
    with mock.patch.object(loading, "load_table", return_value=table):
        (row,) = plan(ref, options, [], [*committed, *other_scale])
        assert row == ("descent", 10, 5, 15 * 60 + 10 * 7, 30.0)
        other_ref = dataclasses.replace(ref, budget=30.0)
        (row,) = plan(other_ref, options, [], committed)
        assert row == ("descent", 10, 5, 15 * 30 + 10 * 7, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "absent"), "no table 'absent'"),
        (("run", "quadratik.py"), "no file quadratik.py: did you mean quadratic.py"),
        (("run", "none/a.py"), "no file none/a.py: there is no folder none, seen"),
        (("run", "quadratic.py", "--method", "mine.txt:f"), "FILE.py:FUNCTION"),
        (("run", "quadratic.py", "--method", "bad.py:f"), "KeyError in bad.py, line 2"),
        (("recompute", "runs", "--cells", "0"), "--cells must be at least 1; got 0"),
        (("run", "mine.py"), "must define `table"),
        (("run", "quadratic.py", "--method", "mine.py"), "FILE.py:FUNCTION"),
        (("run", "quadratic.py", "--method", "mine.py:no_grid"), "no grid"),
        (("check", "absent"), "no table 'absent'"),
        (("report", "absent"), "holds no rows"),
        (("list", "absent"), "there is no folder absent"),
        (("cite", "Nonsense"), "'Nonsense' to cite"),
        (("cite", "SOAB"), "Similar names: SOBA"),
        (("cite", "tasks"), "'tasks' to cite"),
    ],
    ids=[
        *("no such table", "a misspelt file", "a file of no folder"),
        *("a method of a text file", "a method that fails"),
        *("no cells", "a file without a table", "a file without a function"),
        *("a method without a grid", "a check of no table", "a folder without rows"),
        *("no such folder", "nothing to cite", "a misspelt name", "a module"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(folder, arguments, message):
    (folder / "mine.txt").touch()
    (folder / "bad.py").write_text("names = {}\nnames['absent']\n")
    done = call(folder, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("run", " TABLE"),
        ("check", "TABLE|FOLDER"),
        ("compare", "FOLDER REFERENCE"),
        ("cite", "[NAME ...]"),
    ],
)
def test_help_calls_arguments_by_what_they_are(folder, command, usage):
    assert usage in call(folder, command, "--help").stdout


def test_a_misspelled_table_is_answered_by_similar_names(folder):
    with pytest.raises(ValueError, match="did you mean quadratic, seen from"):
        loading.find_table("quadratik", folder)


def test_cite_prints_bibtex_of_what_is_named(folder):
    text = call(folder, "cite", "SOBA").stdout
    assert text.count("@") >= 2
    assert "Dagr" in text


def load_result(folder: Path):
    (result,), errors = commands.load_results(folder / "runs")
    assert not errors
    return result


def test_csv_has_a_line_per_reported_row(folder, tmp_path):
    path = export.export(load_result(folder), "csv", tmp_path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = load_result(folder).printed_rows
    assert [line["method"] for line in lines] == [row["method"] for row in rows]
    assert [float(line["distance"]) for line in lines] == [
        row["distance"] for row in rows
    ]
    rates = [row["settings"].get("learning_rate") for row in rows]
    assert any(rates)
    assert [line["settings.learning_rate"] for line in lines] == [
        "" if rate is None else str(rate) for rate in rates
    ]


def test_latex_escapes_and_has_the_printed_numbers(folder, tmp_path):
    text = export.export(load_result(folder), "latex", tmp_path).read_text()
    assert r"% needs \usepackage{booktabs}" in text.splitlines()
    assert text.count(r"\\") == 1 + 4  # the headings and four methods
    assert r"$\pm$" in text
    assert "±" not in text


def test_the_figure_is_a_pdf(folder, tmp_path):
    assert (
        export.export(load_result(folder), "pdf", tmp_path).read_bytes()[:4] == b"%PDF"
    )


def test_splits_are_the_examples_of_each_seed_with_checksums(tmp_path):
    """The digits of `cleaning`, with the wrong labels of the seed."""
    shutil.copy("benchmarks/results/cleaning.jsonl", tmp_path)
    (result,), _ = commands.load_results(tmp_path)
    rows = [row for row in result.rows if row["seed"] in (0, 3)]
    result = dataclasses.replace(result, rows=rows)
    path = export.export(result, "splits", tmp_path)
    sums = (path / "SHA256SUMS").read_text().splitlines()
    assert [line.split()[1] for line in sums] == ["seed-0.npz", "seed-3.npz"]
    for line, seed in zip(sums, (0, 3), strict=True):
        digest, name = line.split()
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
        expected = tasks.cleaning.make(key=jax.random.key(seed)).splits
        with np.load(path / name) as arrays:
            assert {x.split("/")[0] for x in arrays} == set(expected)
            for split, examples in expected.items():
                for field, values in examples.items():
                    np.testing.assert_array_equal(arrays[f"{split}/{field}"], values)


def test_an_export_says_that_no_table_has_splits(folder):
    result = call(folder, "export", "runs", "splits")
    assert result.returncode == 1
    assert "no table of runs has splits" in result.stderr


def test_stores_of_runs_have_the_settings():
    row = {"method": "descent", "seed": 0, "error": 1.5, "settings": {"rate": 0.1}}
    assert export._texts(row) == {"settings.rate": "0.1", "method": "descent"}
    numbers = list(export._numbers(row | export._setting_fields(row)))
    assert numbers == [("seed", 0.0, 0), ("error", 1.5, 0), ("settings.rate", 0.1, 0)]


def test_the_command_line_names_all_formats(folder, tmp_path):
    formats = typing.get_args(cli.export.__annotations__["to"])
    assert formats == tuple(export.WRITERS)
    message = f"must be one of {', '.join(formats)}; got 'xls'"
    with pytest.raises(ValueError, match=message):
        export.export(load_result(folder), "xls", tmp_path)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # in MLflow
def test_mlflow_has_each_row_once(folder, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    for _ in range(2):
        path = export.export(load_result(folder), "mlflow", tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name("quadratic")
    runs = client.search_runs([experiment.experiment_id])
    rows = load_result(folder).printed_rows
    assert sorted(run.data.metrics["distance"] for run in runs) == sorted(
        row["distance"] for row in rows
    )
    rates = [run.data.params.get("settings.learning_rate") for run in runs]
    assert sorted(filter(None, rates)) == ["0.2"] * 5


def test_tensorboard_has_each_row_once(folder, tmp_path):
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for _ in range(2):
        path = export.export(load_result(folder), "tensorboard", tmp_path)
    files = list(path.rglob("events.*"))
    rows = load_result(folder).printed_rows
    assert len(files) == len(rows)
    events = loader.EventAccumulator(str(files[0].parent)).Reload()
    assert "distance" in events.Tags()["scalars"]
    (file,) = (path / "quadratic").glob("descent, seed 0/*/events.*")
    events = loader.EventAccumulator(str(file.parent)).Reload()
    (rate,) = events.Scalars("settings.learning_rate")
    assert rate.value == np.float32(0.2)


def test_tensorboard_writes_through_no_link(folder, tmp_path):
    pytest.importorskip("tensorboard.summary.writer.record_writer")
    path = export.export(load_result(folder), "tensorboard", tmp_path)
    file, other = sorted(path.rglob("events.*"))[0], tmp_path / "other"
    content = file.read_bytes()
    file.unlink()
    other.write_text("other")
    file.with_name("draft").symlink_to(other)
    export.export(load_result(folder), "tensorboard", tmp_path)
    assert other.read_text() == "other"
    assert file.read_bytes() == content


def test_missing_and_repeated_cells_are_named(folder, tmp_path, rows):
    rows = [row for row in rows if (row["method"], row["seed"]) != ("nothing", 2)]
    findings = check_rows(folder, tmp_path, [*rows, rows[-1]])
    assert all(finding.failed for finding in findings)
    texts = [finding.text for finding in findings]
    assert texts[0] == "missing: nothing, 2"
    assert texts[1].startswith("repeated: ")


def test_an_interrupted_extension_of_the_seeds_lacks_reported_rows(
    folder, tmp_path, rows
):
    """Its tuning runs come first; they are planned."""
    tuning = [row for row in rows if row.get("stage") and row["seed"] == 0]
    rows += [row | {"seed": 5} for row in tuning]
    findings = check_rows(folder, tmp_path, rows)
    assert [finding.text for finding in findings] == [
        f"missing: {name}, 5" for name in ("descent", "nothing", "random", "stay")
    ]


def test_a_claim_of_a_metric_that_no_row_has_fails(folder):
    table = loading.load_table(folder / "quadratic.py")
    pair = ("descent", ("nothing",), "distanse")
    for changes in (
        {"claims": (Claim("descent", "nothing", "distanse"),)},
        {"comparisons": (Comparison(*pair),)},
    ):
        changed = dataclasses.replace(table, **changes)
        (finding,) = check.check_result("quadratic", changed, folder / "runs")
        assert finding.failed
        assert "no row has 'distanse'" in finding.text


def test_a_method_without_rows_is_one_finding(folder, tmp_path, rows):
    """A run with `--only` has none of the rows of the other methods."""
    table = loading.load_table(folder / "quadratic.py")
    selected = [row for row in rows if row["method"] == "nothing"]
    findings = check_rows(folder, tmp_path, selected)
    assert all(finding.failed for finding in findings)
    counts = Counter(
        cell["method"] for stage in table.stages("small", 5) for cell in stage
    )
    assert [finding.text for finding in findings] == [
        f"missing: {name}, all {counts[name]} cells" for name in ("descent", "random")
    ]


def test_rows_of_two_machines_are_judged_with_a_note(folder, tmp_path, rows):
    rows[0]["machine"] = {"processor": "another"}
    findings = check_rows(folder, tmp_path, rows)
    assert not any(finding.failed for finding in findings)
    assert "rows were made on 2 machines" in [finding.text for finding in findings]


# Control characters in files, which a terminal would obey.

#: A color, a title of the window, a return to the start of the line, an 8-bit sequence,
#: a backspace, text from right to left, and markup of rich.
HOSTILE = "\x1b[31m \x1b]0;title\x07 \r \x9b2J \x08 \u202e [/bold] [red]"


def poison(value):
    """Returns a value of a row with hostile text in every string."""
    if isinstance(value, dict):
        return {name: poison(x) for name, x in value.items()}
    return value + HOSTILE if isinstance(value, str) else value


@pytest.fixture(scope="module")
def hostile_folder(folder, tmp_path_factory) -> Path:
    """Returns a folder whose table, rows and file names have hostile text."""
    hostile = tmp_path_factory.mktemp("hostile")
    text = (folder / "quadratic.py").read_text()
    text = text.replace(
        "a <test> & its author", HOSTILE.encode("unicode_escape").decode()
    )
    (hostile / "quadratic.py").write_text(text)
    failing = f"raise RuntimeError({HOSTILE!r})\n"
    (hostile / "mine.py").write_text(
        f"def raises(task, *, budget, key):\n    {failing}"
    )
    for name, changed in (
        ("provenance", ("commit", "command", "device", "versions", "source", "time")),
        ("everything", None),
    ):
        (hostile / name).mkdir()
        rows = read_rows(folder / "runs" / "quadratic.jsonl")
        for row in rows:
            for field in row.keys() & set(changed or row):
                row[field] = poison(row[field])
        lines = "".join(map(to_line, rows))
        (hostile / name / "quadratic.jsonl").write_text(lines)
    (hostile / "orphan").mkdir()
    (hostile / "orphan" / f"{HOSTILE.replace('/', '')}.jsonl").write_text("{}\n")
    return hostile


HOSTILE_CALLS = {
    "list": lambda: cli.list_tables(Path()),
    "run, other rows": lambda: cli.run("quadratic.py", out=Path("provenance")),
    "run, failing method": lambda: cli.run(
        "quadratic.py", ("mine.py:raises",), ("raises", "nothing"), seeds=1
    ),
    "check": lambda: cli.check("provenance"),
    "check, other cells": lambda: cli.check("everything"),
    "check, name of a file": lambda: cli.check("orphan"),
    "compare": lambda: cli.compare(Path("provenance"), Path("everything")),
    "export": lambda: cli.export(Path("provenance"), "csv"),
    "cite": lambda: cli.cite((HOSTILE,)),
}


@pytest.mark.parametrize("name", HOSTILE_CALLS)
def test_no_control_character_of_a_file_is_printed(
    hostile_folder, name, monkeypatch, capsys
):
    monkeypatch.chdir(hostile_folder)
    text = ""
    try:
        HOSTILE_CALLS[name]()
    except SystemExit as error:  # the interpreter prints a text
        text = error.code if isinstance(error.code, str) else ""
    text += "".join(capsys.readouterr())
    assert text
    assert not CONTROL_CHARACTER.search(text)


def test_no_control_character_of_a_file_is_in_a_page_or_warning(hostile_folder):
    """Matplotlib warns of characters that its font does not have."""
    done = call_in_a_process(hostile_folder, "report", "everything", "--update")
    assert done.returncode == 0, done.stderr
    assert "Glyph 27" in done.stderr
    page = (hostile_folder / "everything" / "quadratic.md").read_text()
    assert not CONTROL_CHARACTER.search(done.stdout + done.stderr + page)


def test_a_line_that_starts_with_a_bar_is_no_table():
    """As ``||x||`` after a line break of a protocol."""
    console = Console(file=io.StringIO(), width=60)
    table = "| a | b |\n|---|---|\n| 1 | 2 |"
    print_markdown(f"until\n||x|| falls\n\n{table}", console)
    text = console.file.getvalue()
    assert "||x|| falls" in text
    assert "|---|" not in text  # the table is drawn
