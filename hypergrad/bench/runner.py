"""Runs the cells of a table one by one, in this process or on an executor.

Every finished cell is a line on the disk, so that a run that was killed continues where
it stopped. Rows of other source code, data or settings are refused.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime import atomic_io
from ..runtime.executors import Executor
from ..runtime.fingerprint import digest
from ..runtime.machine import describe_machine, warn_of_other_machines
from ..runtime.provenance import utc_now
from . import provenance
from .loading import TableRef, error_position, imported_digest
from .methods import MethodError
from .provenance import PROCESS_FIELDS
from .rows import (
    Cell,
    Row,
    append_row,
    cell_key,
    key_in_words,
    move_incomplete_line,
    not_serializable,
    parse_line,
    read_rows,
    repeated_keys,
    to_line,
)
from .source import digest_package
from .table import BaseTable
from .workers import await_outcomes

#: Fields of a row that must be equal in all rows of a file.
COMMON_FIELDS = ("table", "scale", "budget", "data", "source", *PROCESS_FIELDS)
#: Fields of a row that neither its cell nor a measurement may have.
RESERVED_FIELDS = {
    *COMMON_FIELDS, "commit", "command", "converted_from", "machine", "method_source",
    "time", "sha256",
}  # fmt: skip


@dataclass(frozen=True)
class RunOptions:
    """The request of a run.

    Args:
      scale: Scale of the table.
      seeds: Number of seeds.
      folder: Where the rows, the printed table and the figure are written.
      command: The command, as it is shown under the table.
      only: Labels of the methods to run; empty for all.
      executor: Where cells run. Defaults to this process, one after the other.
      max_pending: Number of cells that are submitted to the executor at once.
    """

    scale: str
    seeds: int
    folder: Path
    command: str
    only: tuple[str, ...] = ()
    executor: Executor | None = None
    max_pending: int = 8

    def with_executor(self, executor: Executor | None, workers: int) -> "RunOptions":
        """Returns the same options with an executor of so many workers."""
        return dataclasses.replace(self, executor=executor, max_pending=2 * workers)


@dataclass
class RunResult:
    """The rows of a run, and the cells that failed.

    Attributes:
      rows: All rows of the requested cells.
      failures: ``{label: message}`` of methods of which a cell failed.
    """

    rows: list[Row]
    failures: dict[str, str] = field(default_factory=dict)


def run_table(
    ref: TableRef,
    options: RunOptions,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> RunResult:
    """Runs all cells of a table that have no row yet.

    Args:
      ref: The table.
      options: What to run and where.
      progress: Called with the number of finished and of all cells, and a label.

    Raises:
      ValueError: The file of rows belongs to other source, data or settings, or another
        process is writing to it; the message says which field differs.
    """
    table = ref.load()
    check_options(table, options)
    stages = [
        [cell for cell in stage if not options.only or cell["method"] in options.only]
        for stage in table.stages(options.scale, options.seeds)
    ]
    common, method_sources = _common_fields(ref, table, options), ref.method_sources()
    key_fields = table.key_fields
    key_of = lambda row: cell_key(row, key_fields)
    atomic_io.make_directory(options.folder)
    path = options.folder / f"{ref.name}.jsonl"
    result = RunResult([])
    with path.open("a", encoding="utf-8") as file:
        atomic_io.lock_file(file, path)
        atomic_io.fsync_path(options.folder)  # the name of a new file
        result.rows = read_rows(path, allow_cut=True)
        if options.executor is not None and result.rows:
            common |= {name: result.rows[0].get(name) for name in PROCESS_FIELDS}
        for row in result.rows:
            check_row_origin(row, common, method_sources, path)
        check_no_cell_is_repeated(result.rows, table, path)
        machines = [row.get("machine") for row in result.rows]
        warn_of_other_machines(f"rows of {path} were made", machines)
        move_incomplete_line(path)
        num_cells, num_done = sum(map(len, stages)), 0
        num_rows = len(result.rows)
        for stage in stages:
            done = set(map(key_of, result.rows))
            pending = [
                cell
                for cell in stage
                if key_of(cell) not in done and cell["method"] not in result.failures
            ]
            num_done += len(stage) - len(pending)
            num_made = sum(key_of(cell) in done for cell in stage)
            progress(num_done, num_cells, f"{num_made} made before" * (num_made > 0))
            for cell, outcome in _measure_all(ref, pending, options, result.rows):
                num_done += 1
                label = str(cell["method"])
                if isinstance(outcome, str):
                    result.failures.setdefault(label, outcome)
                else:
                    if num_rows == 0:  # a worker may have another device
                        common |= {name: outcome[name] for name in PROCESS_FIELDS}
                    num_rows += 1
                    origin = common | {"time": utc_now()}
                    if label in method_sources:
                        origin["method_source"] = method_sources[label]
                    append_row(path, _make_row(cell, outcome, origin, key_fields))
                progress(num_done, num_cells, label)
            result.rows = read_rows(path)
    requested = {key_of(cell) for stage in stages for cell in stage}
    result.rows = [row for row in result.rows if key_of(row) in requested]
    return result


def measure_cell(ref: TableRef, cell: Cell, scale: str, rows: list[Row]) -> Row | str:
    """Returns the row fields of a cell, or a message if it failed; runs in a worker."""
    try:
        origin = _origin(ref, cell["method"])
        return _measure(ref, cell, scale, rows) | origin
    except MethodError as error:
        return str(error)
    except (Exception, SystemExit) as error:  # of a method; the run goes on
        return f"{type(error).__name__} in {error_position(error)}: {error}"


def _measure(ref: TableRef, cell: Cell, scale: str, rows: list[Row]) -> Row:
    try:
        row = ref.load().measure(cell, scale, rows)
    except MethodError as error:
        if cell.get("stage") != "tuning":
            raise
        # A setting that diverges is a bad setting.
        failed = {"selection": None, "gradient_equivalents": None, "error": str(error)}
        return failed | error.costs
    _check_measured_fields(row, cell)
    return row


def _check_measured_fields(row: Row, cell: Cell) -> None:
    """Raises MethodError if a line of the file of rows cannot be made of a result."""
    taken = RESERVED_FIELDS & row.keys()
    if "stage" in row and row["stage"] != cell.get("stage"):
        taken |= {"stage"}
    if taken:
        raise MethodError(
            f"the measurement must not return the fields {', '.join(sorted(taken))}, "
            "which state the origin and the stage of each row. Give them other names."
        )
    if names := not_serializable(row):
        raise MethodError(
            f"the measurement must return numbers, strings, or lists and dictionaries "
            f"of them; got {row[names[0]]!r} for {names[0]!r}."
        )


def _origin(ref: TableRef, label: str) -> Row:
    """Returns the fields of a row that describe this process and its source code."""
    source, method_sources = loaded_sources(ref)
    origin: Row = {"machine": describe_machine(), "source": source}
    origin |= provenance.describe_process()
    if label in method_sources:
        origin["method_source"] = method_sources[label]
    return origin


@functools.cache
def loaded_sources(ref: TableRef) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the digests of the source code that this process has imported.

    Files that change later are not imported again.
    """
    ref.load()
    source = {"package": _imported_package(), "table": imported_digest(ref.path)}
    methods = {function: imported_digest(file) for file, function in ref.methods}
    return source, methods


@functools.cache
def _imported_package() -> str:
    """Returns the digest of hypergrad at the first call in this process."""
    return digest_package()


def _make_row(cell: Cell, outcome: Row, origin: Row, key_fields: Sequence[str]) -> Row:
    """Returns the row of a cell.

    Args:
      cell: The cell.
      outcome: What `measure_cell` returned.
      origin: Fields of the run; those of the outcome must be equal.
      key_fields: Fields that identify a row.

    Raises:
      ValueError: The cell was measured by another source or on another device, or its
        row would not be that of the cell.
    """
    row = cell | outcome | origin
    _check_measured_origin(outcome, row)
    _check_cell_is_unchanged(cell, row, key_fields)
    return row


def _check_measured_origin(outcome: Row, row: Row) -> None:
    """Raises ValueError if a cell was measured by other source or another process."""
    for name in ("source", "method_source", *PROCESS_FIELDS):
        measured, expected = outcome.get(name), row.get(name)
        if measured == expected:
            continue
        if name in PROCESS_FIELDS:
            raise ValueError(
                f"a worker measured with another {name} ({measured}, before "
                f"{expected}). Rows of both must not share a file; give workers that "
                "are alike, or another --out."
            )
        raise ValueError(
            f"the {name} of the table changed after it was imported ({measured}, now "
            f"{expected}). Rows of both must not share a file; restore it, or start a "
            "new process with another --out."
        )


def _check_cell_is_unchanged(cell: Cell, row: Row, key_fields: Sequence[str]) -> None:
    """Raises ValueError if a row, once it is read again, is not found by its cell."""
    saved = parse_line(to_line(row).rstrip("\n"), "the row")
    old, new = cell_key(cell, key_fields), cell_key(saved, key_fields)
    changed = [
        f"{name} ({x!r}, in the row {y!r})"
        for name, x, y in zip(key_fields, old, new, strict=True)
        if x != y
    ]
    if changed:
        raise ValueError(
            f"the row of a cell must have the cell's {', '.join(changed)}. What "
            "identifies a cell must be finite, and no measured field may have its name."
        )


def check_row_origin(
    row: Row, common: Row, method_sources: dict[str, str], path: Path
) -> None:
    """Raises ValueError if a row was made from other source, data or settings."""
    expected = {name: common.get(name) for name in COMMON_FIELDS}
    if (label := str(row["method"])) in method_sources:
        expected["method_source"] = method_sources[label]
    for name, value in expected.items():
        if row.get(name) == value:
            continue
        old, new = row.get(name), value
        if isinstance(old, dict) and isinstance(new, dict):
            changed = [
                k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
            ]
            old, new = ({k: x.get(k) for k in changed} for x in (old, new))
        raise ValueError(
            f"{path} holds rows made with another {name} ({old}, now {new}). Continue "
            "with what started the run, move the file away, or give another --out."
        )


def check_no_cell_is_repeated(rows: list[Row], table: BaseTable, path: Path) -> None:
    """Raises ValueError if a file has several rows of a cell."""
    if keys := repeated_keys(rows, table.key_fields):
        raise ValueError(
            f"{path} holds several rows of one cell: {key_in_words(keys[0])}. Delete "
            "all but one of them."
        )


def _measure_all(
    ref: TableRef, cells: Sequence[Cell], options: RunOptions, rows: list[Row]
) -> Iterator[tuple[Cell, Row | str]]:
    """Yields each cell with its row fields or its error, as they are finished."""
    earlier = [row for row in rows if row.get("stage") is not None]
    failures: dict[str, str] = {}
    arguments = options.scale, earlier
    if (executor := options.executor) is None:

        def measure(cell):
            failure = failures.get(str(cell["method"]))
            return measure_cell(ref, cell, *arguments) if failure is None else failure

        outcomes = ((cell, measure(cell)) for cell in cells)
    else:
        submit = lambda cell: executor.submit(measure_cell, ref, cell, *arguments)
        outcomes = await_outcomes(submit, cells, options.max_pending, failures)
    for cell, outcome in outcomes:
        # A method of which one tuning run failed is not tuned further.
        if isinstance(outcome, str) and cell.get("stage") is not None:
            failures[str(cell["method"])] = outcome
        yield cell, outcome


def data_fingerprint(table: BaseTable) -> str:
    """Returns a digest of the data that a table reads; empty if it states none."""
    arrays = table.arrays()
    return digest(dict(arrays)) if arrays else ""


def check_options(table: BaseTable, options: RunOptions) -> None:
    """Raises ValueError for options that do not fit the table, and for bad cells."""
    budget = getattr(table, "budget_of", lambda scale: 1.0)
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1; got {options.seeds}.")
    if options.scale not in table.scales:
        raise ValueError(
            f"--scale must be one of {', '.join(table.scales)}; got {options.scale!r}."
        )
    if not 0 < budget(options.scale) < math.inf:
        raise ValueError(
            f"--budget must be positive and finite; got {budget(options.scale)}."
        )
    labels = {
        cell["method"] for stage in table.stages(options.scale, 1) for cell in stage
    }
    if taken := RESERVED_FIELDS & set(table.key_fields):
        raise ValueError(
            f"cells must not have the fields {', '.join(sorted(taken))}, which state "
            "the origin of each row. Give them other names."
        )
    if unknown := set(options.only) - labels:
        raise ValueError(
            f"--only names {', '.join(sorted(unknown))}; the table has the rows "
            f"{', '.join(sorted(map(str, labels)))}."
        )


def _common_fields(ref: TableRef, table: BaseTable, options: RunOptions) -> Row:
    budget = getattr(table, "budget_of", lambda scale: None)(options.scale)
    return {
        "table": ref.name,
        "scale": options.scale,
        "budget": budget,
        "data": data_fingerprint(table),
        **provenance.collect(ref.path, options.command),
    }
