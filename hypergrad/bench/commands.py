"""The work of the commands of ``hypergrad``, without printing."""

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..runtime import atomic_io
from ..runtime.progress_bar import progress_bar
from . import check as checks
from . import compare as comparisons
from . import export as exports
from . import recompute as recomputing
from .claims import MISSING_ROWS, Finding
from .dry_run import plan
from .figures import plot
from .loading import (
    TableRef,
    error_position,
    find_table,
    load_listed_table,
    load_table,
    parse_method,
    table_files,
)
from .pages import IndexEntry, to_error_page, to_html, to_index, to_leaderboard
from .report import TableResult, to_markdown
from .rows import read_rows
from .runner import RunOptions, RunResult, run_table
from .source import digest_sources
from .table import BaseTable, Table
from .workers import executor_of

#: Columns of `overview`.
OVERVIEW = ("table", "paradigm", "minutes", "--method", "result", "source")
RUNS = Path("runs")  # where `hypergrad run` writes if no folder is given


def results_folder(table_file: Path) -> Path:
    """Returns the folder of the committed rows of a table: ``results`` beside it."""
    return table_file.parent / "results"


def overview(folder: Path) -> tuple[list[list[str]], dict[str, str]]:
    """Returns a row of `OVERVIEW` for each table.

    The second value has the errors of tables that cannot be imported, by name.

    Raises:
      ValueError: The folder holds no table.
    """
    files = table_files(folder)
    if not files:
        if not folder.is_dir():
            raise ValueError(
                f"there is no folder {folder} in {Path.cwd()}. Call from a clone of "
                "hypergrad, whose tables it holds, or name a folder of your own tables."
            )
        raise ValueError(f"{folder} holds no table: no file with a line `table = ...`.")
    rows, errors = [], {}
    for file in files:
        try:
            table = load_listed_table(file)
        except ValueError as error:
            errors[file.stem] = str(error)
            rows.append([file.stem, "-", "-", "-", "FAILED", "-"])
            continue
        status = status_of(file.stem, table, results_folder(file))
        minutes = f"{table.minutes:g}"
        takes_methods = "yes" if isinstance(table, Table) else "no"
        rows.append(
            [file.stem, table.paradigm, minutes, takes_methods, status, table.source]
        )
    return rows, errors


def status_of(name: str, table: BaseTable, folder: Path) -> str:
    """Returns the outcomes of the committed rows of a table, in a few words."""
    if not (folder / f"{name}.jsonl").exists():
        return "not run"
    return summarize(checks.check_result(name, table, folder))


def summarize(findings: Sequence[Finding]) -> str:
    """Returns the number of findings of each outcome, in words."""
    outcomes = [finding.outcome for finding in findings if finding.outcome is not None]
    counts = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "no claim"


def resolve_run(
    name: str,
    methods: Sequence[str],
    only: Sequence[str],
    seeds: int | None,
    scale: str | None,
    budget: float | None,
    out: Path,
    arguments: Sequence[str],
) -> tuple[TableRef, RunOptions]:
    """Returns table and options of a run from the arguments of the command line."""
    ref = TableRef(find_table(name), tuple(map(parse_method, methods)), budget)
    table = ref.load()
    command = shlex.join(["hypergrad", *arguments])
    options = RunOptions(
        scale=table.scales[0] if scale is None else scale,
        seeds=table.seeds if seeds is None else seeds,
        folder=out,
        command=command,
        only=tuple(only),
    )
    return ref, options


def run(
    ref: TableRef, options: RunOptions, workers: int = 1
) -> tuple[str, list[Path], dict[str, str]]:
    """Runs a table and writes its rows, printed form and figure.

    Returns:
      The printed form, the written files, and ``{label: message}`` of what failed.
    """
    with progress_bar() as progress, executor_of(workers) as executor:
        result = run_table(ref, options.with_executor(executor, workers), progress)
    try:
        return write_result(ref, options, result)
    except OSError:
        raise
    except Exception as error:  # must not hide why cells failed
        text = (
            f"the rows cannot be printed: {type(error).__name__} in "
            f"{error_position(error)}: {error}"
        )
        rows = options.folder / f"{ref.name}.jsonl"
        return "", [rows], result.failures | {ref.name: text}


def write_result(
    ref: TableRef, options: RunOptions, result: RunResult
) -> tuple[str, list[Path], dict[str, str]]:
    """Writes the printed form and the figure of rows; see `run`."""
    paths = [
        options.folder / f"{ref.name}{ending}" for ending in (".jsonl", ".md", ".png")
    ]
    # The budget of the rows is compared with that of the file.
    table = dataclasses.replace(ref, budget=None).load()
    table_result = TableResult(ref.name, table, result.rows)
    if not table_result.printed_rows:
        failures = result.failures or {ref.name: "it has no rows"}
        return "No row was made.\n", paths[:1], failures
    text = to_markdown(table_result, result.failures)
    atomic_io.atomic_write(paths[1], text)
    try:
        if not plot(table_result, paths[2]):
            paths = paths[:2]
    except MISSING_ROWS as error:
        paths[2].unlink(missing_ok=True)  # of other rows
        paths = paths[:2]
        reason = f"No figure was drawn: it needs rows that are missing ({error!r}).\n"
        head, mark, protocol = text.partition("\n## Protocol\n")
        text = f"{head}\n{reason}{mark}{protocol}"
    return text, paths, result.failures


def planned_rows(
    ref: TableRef, options: RunOptions
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Returns headings and rows of the cells that a run would measure."""
    paths = [
        folder / f"{ref.name}.jsonl"
        for folder in (options.folder, results_folder(ref.path))
    ]
    finished, committed = (
        read_rows(path, allow_cut=True) if path.exists() else [] for path in paths
    )
    text = lambda number: "-" if number is None else f"{number:,.0f}"
    columns = ("method", "tuning runs", "runs", "grad-eq, at most", "seconds, about")
    rows = [
        [label, str(num_tuning), str(num_runs), text(max_cost), text(seconds)]
        for label, num_tuning, num_runs, max_cost, seconds in plan(
            ref, options, finished, committed
        )
    ]
    return columns, rows


def check(target: str) -> list[tuple[str, list[Finding]]]:
    """Returns the findings of each table: of a name, a file, or a folder of rows.

    The rows of a name or file are those in ``results`` beside it, or else in ``runs``.
    """
    if Path(target).is_dir():
        return [(x, _check_in(x, Path(target))) for x in result_names(Path(target))]
    file = find_table(target)
    folders = (results_folder(file), RUNS)
    folder = next((x for x in folders if (x / f"{file.stem}.jsonl").exists()), RUNS)
    table = load_table(file)
    findings = checks.check_result(file.stem, table, folder)
    text = f"the rows are those in {folder}"
    if _have_other_source(file, folder):
        text += (
            "; the file of the table, or one that it imports, has changed since "
            f"(`hypergrad recompute {folder}` measures drawn cells again)"
        )
    return [(file.stem, [*findings, Finding(text)])]


def _have_other_source(file: Path, folder: Path) -> bool:
    """Returns whether rows were made from another text of the table."""
    try:
        rows = read_rows(folder / f"{file.stem}.jsonl")
    except (ValueError, OSError):  # which is a finding of its own
        return False
    now = digest_sources(file)["table"]
    return any(row.get("source", {}).get("table", now) != now for row in rows)


def _check_in(name: str, folder: Path) -> list[Finding]:
    """Returns the findings of one of the files of rows in a folder."""
    try:
        table = load_listed_table(table_of_rows(name, folder))
    except ValueError as error:
        return [Finding(str(error), "FAILED")]
    return checks.check_result(name, table, folder)


def result_names(folder: Path) -> list[str]:
    """Returns the names of the files of rows in a folder.

    Raises:
      ValueError: The folder has no rows.
    """
    names = sorted(path.stem for path in folder.glob("*.jsonl"))
    if not names:
        raise ValueError(f"{folder} holds no rows (NAME.jsonl).")
    return names


def table_of_rows(name: str, folder: Path) -> Path:
    """Returns the file of the table of some rows.

    Tables are looked up beside a folder ``results``, in ``benchmarks``, in the folder
    above, in the current one, and where the command of the rows found them.

    Raises:
      ValueError: The table is not found.
    """
    parent = folder.resolve().parent
    folders: tuple[Path, ...] = (parent, Path("benchmarks"), Path())
    if folder.name != "results":
        folders = (Path("benchmarks"), parent, Path())
    files = [directory / f"{name}.py" for directory in folders]
    files += _files_of_command(name, folder)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(
            f"the table of {folder / name}.jsonl was not found; looked for "
            f"{', '.join(map(str, files))}. Call from the folder of the table, or put "
            "its file beside the folder of rows."
        )
    return file


def _files_of_command(name: str, folder: Path) -> list[Path]:
    """Returns the file that was run, if the command of the rows names one."""
    try:
        with (folder / f"{name}.jsonl").open() as rows:
            words = shlex.split(json.loads(rows.readline())["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # damaged rows are reported where they are read
    return [Path(word) for word in words if Path(word).name == f"{name}.py"]


def load_results(folder: Path) -> tuple[list[TableResult], dict[str, str]]:
    """Returns the results of all tables of a folder, and the errors of the others."""
    results, errors = [], {}
    for name in result_names(folder):
        try:
            table = load_listed_table(table_of_rows(name, folder))
            results.append(checks.load_result(name, table, folder))
        except (ValueError, OSError) as error:
            errors[name] = str(error)
    return results, errors


def write_report(
    folder: Path, out: Path, *, update: bool = False
) -> tuple[Path, dict[str, str]]:
    """Writes a page per table, ``index.html``, and ``leaderboard.html``.

    A table without undamaged rows of one run has a page that names the error.

    Args:
      folder: Folder of rows.
      out: Folder of the pages.
      update: Whether ``NAME.md`` and ``NAME.png`` beside the rows are written anew.

    Returns:
      The path of ``index.html``, and the errors by the names of their tables.
    """
    results, errors = load_results(folder)
    atomic_io.make_directory(out)
    entries = {}
    for result in results:
        try:
            page, entry = _make_page(result, folder, update=update)
        except OSError:
            raise
        except Exception as error:  # of rows without a field that the table prints
            text = f"the rows cannot be printed: {type(error).__name__}: {error}"
            errors[result.name] = text
            continue
        atomic_io.atomic_write(out / f"{result.name}.html", page)
        entries[result.name] = entry
    for name, text in errors.items():  # also replaces the page of earlier rows
        atomic_io.atomic_write(out / f"{name}.html", to_error_page(name, text))
        entries[name] = IndexEntry(name=name, status=f"FAILED: {text}")
    pages = [entries[name] for name in sorted(entries)]
    atomic_io.atomic_write(out / "index.html", to_index(pages))
    ranked = [result for result in results if result.name not in errors]
    atomic_io.atomic_write(out / "leaderboard.html", to_leaderboard(ranked))
    return out / "index.html", errors


def _make_page(
    result: TableResult, folder: Path, *, update: bool
) -> tuple[str, IndexEntry]:
    """Returns the page of a table and its entry on the page of all tables."""
    findings = checks.check_result(result.name, result.table, folder)
    markdown = to_markdown(result)
    if update:
        atomic_io.atomic_write(folder / f"{result.name}.md", markdown)
    with tempfile.TemporaryDirectory() as temporary:
        # An older figure beside the rows may be of other rows.
        path = (folder if update else Path(temporary)) / f"{result.name}.png"
        try:
            figure = path.read_bytes() if plot(result, path) else None
        except MISSING_ROWS:  # the rows that are there can be printed without it
            path.unlink(missing_ok=True)
            figure = None
    page = to_html(result, figure, markdown)
    return page, _index_entry(result, findings, figure)


def _index_entry(
    result: TableResult, findings: Sequence[Finding], figure: bytes | None
) -> IndexEntry:
    commits = [x.get("commit") or x.get("converted_from") for x in result.printed_rows]
    return IndexEntry(
        name=result.name,
        summary=result.table.protocol.partition("\n")[0],
        paradigm=result.table.paradigm,
        status=summarize(findings),
        commit=" and ".join(str(x or "unknown") for x in dict.fromkeys(commits)),
        time=max(str(row.get("time", "")) for row in result.rows),
        figure=figure,
    )


def recompute(
    folder: Path, num_cells: int, max_seconds: float, seed: int, skip: Sequence[str]
) -> Iterator[recomputing.Recomputed]:
    """Measures randomly chosen cells of a folder of rows again.

    Raises:
      ValueError: No row can be chosen, or `skip` names a table without rows.
    """
    if num_cells < 1:
        raise ValueError(f"--cells must be at least 1; got {num_cells}.")
    if unknown := set(skip) - set(result_names(folder)):
        raise ValueError(
            f"--skip names {sorted(unknown)}, which {folder} has no rows of."
        )
    results, errors = load_results(folder)
    for name, text in errors.items():
        if name not in skip:
            yield recomputing.Recomputed(name, "all", recomputing.FAILED, text)
    results = [result for result in results if result.name not in skip]
    chosen = recomputing.choose_cells(results, num_cells, max_seconds, seed)
    if not chosen and not errors:
        raise ValueError(
            f"{folder} has no row that was measured in at most {max_seconds:g} seconds "
            "and was not converted from an older form."
        )
    for result, row in chosen:
        is_budgeted = isinstance(result.table, Table)
        budget = row.get("budget") if is_budgeted else None  # that of the run
        ref = TableRef(table_of_rows(result.name, folder), budget=budget)
        yield recomputing.recompute(result, ref, row)


def compare(folder: Path, reference: Path) -> list[tuple[str, comparisons.Difference]]:
    """Returns the differences of two folders, with the names of their tables.

    Raises:
      ValueError: They have no table in common.
    """
    (results, errors), (references, reference_errors) = (
        load_results(path) for path in (folder, reference)
    )
    expected = {result.name: result for result in references}
    names = {result.name for result in results}
    failed = errors | reference_errors
    if not names & expected.keys() and not failed:
        raise ValueError(f"{folder} and {reference} have no table in common.")
    differences = [
        (name, comparisons.Difference("damaged", text)) for name, text in failed.items()
    ]
    for path, only in (
        (folder, names - expected.keys() - failed.keys()),
        (reference, expected.keys() - names - failed.keys()),
    ):
        if only:
            text = f"only in {path}: {', '.join(sorted(only))}"
            differences.append(("all", comparisons.Difference("tables", text)))
    return differences + [
        (result.name, difference)
        for result in results
        if result.name in expected
        for difference in comparisons.compare(result, expected[result.name])
    ]


def export(folder: Path, kind: str, out: Path) -> tuple[list[Path], dict[str, str]]:
    """Writes all tables of a folder in a format.

    Returns:
      The paths, and the errors of damaged tables by name.

    Raises:
      ValueError: No table has what is asked for.
    """
    results, errors = load_results(folder)
    paths = []
    for result in results:
        try:
            path = exports.export(result, kind, out)
            paths += [] if path is None else [path]
        except exports.TableError as error:
            errors[result.name] = str(error)
        except (KeyError, IndexError, TypeError) as error:
            text = f"the rows lack a field: {type(error).__name__}: {error}"
            errors[result.name] = text
    if not paths and not errors:
        raise ValueError(f"no table of {folder} has {kind}.")
    return paths, errors
