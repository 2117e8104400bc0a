"""Tables: cells to measure, rows that are written one by one, and a check of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import lock_file
from ..runtime import atomic_io
from . import record
from .progress import progress
from .record import Row
from .verdict import Verdict

# Columns that must have the same value in all rows of a table.
VERSIONS = ("device", "python", *record.PACKAGES)


class Request(NamedTuple):
    """A request of the command line.

    Attributes:
      scale: Scale of the table.
      seeds: Number of seeds.
      folder: Folder for the files.
      command: Command line, which is saved with the rows.
      methods: Methods to run; empty for all methods.
    """

    scale: str
    seeds: int
    folder: Path
    command: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table that can be run and checked.

    Attributes:
      name, source: Name of the table, and publication of its claims.
      minutes: Expected minutes of the small scale on two cores.
      seeds: Default number of seeds.
      plan: ``(scale, seeds) -> cells``. A cell is a dict with "seed" that identifies
        it; its row contains it.
      run: ``(table, request)``, which writes NAME.jsonl, NAME.md and NAME.png.
      judge: ``rows -> verdicts``, for the rows of all planned cells.
      scales: Available scales.
    """

    name: str
    source: str
    minutes: float
    seeds: int
    plan: Callable[[str, int], list[Row]]
    run: Callable[["Table", Request], None]
    judge: Callable[[list[Row]], list[Verdict]]
    scales: tuple[str, ...] = ("small",)

    def file(self, folder: Path, ending: str) -> Path:
        """Returns the path of one of the table's files."""
        return folder / f"{self.name}.{ending}"


# Running.


def cell_by_cell(
    measure: Callable[[Row], Row],
    markdown: Callable[[Table, list[Row], str], str],
    draw: Callable[[list[Row], Path], None],
) -> Callable[[Table, Request], None]:
    """Returns a `Table.run` that measures the cells in order and can be resumed.

    Args:
      measure: ``cell -> columns``, without those of the cell.
      markdown: ``(table, rows, command) -> text``, for the requested rows.
      draw: ``(rows, path)``, which draws the figure of the requested rows.
    """

    def run(table: Table, request: Request) -> None:
        make_folder(request.folder)
        path = table.file(request.folder, "jsonl")
        metadata = {"table": table.name, "scale": request.scale} | record.versions()
        metadata["command"] = request.command
        cells = [
            cell
            for cell in table.plan(request.scale, request.seeds)
            if not request.methods or cell["method"] in request.methods
        ]
        with path.open("a") as file, progress(len(cells)) as tick:
            lock_file(file, path)
            atomic_io.fsync_path(request.folder)
            completed = {cell_key(row, cells[0]) for row in resume(path, metadata)}
            for cell in cells:
                is_completed = cell_key(cell, cell) in completed
                if not is_completed:
                    row = cell | measure(cell) | metadata
                    atomic_io.append_durably(file, record.line(row))
                tick(str(cell.get("method", "")) + ", kept" * is_completed)
        # A file that was resumed may contain more rows than were requested.
        requested = {cell_key(cell, cell) for cell in cells}
        rows = [r for r in record.read(path) if cell_key(r, cells[0]) in requested]
        text = markdown(table, rows, request.command)
        atomic_io.atomic_write(table.file(request.folder, "md"), text + "\n")
        draw(rows, table.file(request.folder, "png"))

    return run


def make_folder(folder: Path) -> None:
    """Creates a folder, or raises ValueError, for example if it is a file."""
    try:
        atomic_io.make_directory(folder)
    except OSError as error:
        raise ValueError(
            f"--out must be a folder; {folder} cannot be made one ({error.strerror})."
        ) from error


def resume(path: Path, metadata: Row) -> list[Row]:
    """Returns the rows of an interrupted run and removes an incomplete last line."""
    with path.open("rb+") as file:  # truncated in place: a kill loses no row
        file.truncate(file.read().rfind(b"\n") + 1)
    rows = record.read(path)
    for name in (*VERSIONS, "scale"):
        for row in rows:
            if row.get(name) != metadata[name]:
                raise ValueError(
                    f"{path} contains rows with {name} {row.get(name)}, not "
                    f"{metadata[name]}. Move it, or give another --out."
                )
    return rows


def cell_key(row: Row, cell: Row) -> tuple[Any, ...]:
    """Returns the values of a row that identify its cell."""
    return tuple(row.get(field) for field in cell)


# Checking.


def check(table: Table, folder: Path) -> list[Verdict]:
    """Returns errors of the rows in a folder, or the table's verdicts if none."""
    path = table.file(folder, "jsonl")
    fail = lambda text: Verdict(text, failed=True)
    if not path.exists():
        return [fail(f"{path} is missing; python -m benchmarks {table.name} writes it")]
    try:
        rows = record.read(path)
    except ValueError as error:
        return [fail(str(error))]
    if not rows:
        return [fail(f"{path} is empty")]
    num_seeds = 1 + max(row.get("seed", 0) for row in rows)
    cells = table.plan(rows[0].get("scale", "small"), num_seeds)
    planned = [cell_key(cell, cell) for cell in cells]
    actual = [cell_key(row, cells[0]) for row in rows]
    missing = [key for key in planned if key not in set(actual)]
    unplanned = [key for key in actual if key not in planned]
    repeated = [key for key in set(actual) if actual.count(key) > 1]
    errors = [
        *(fail(f"missing: {key}") for key in missing),
        *(fail(f"not planned: {key}") for key in unplanned),
        *(fail(f"twice: {key}") for key in repeated),
    ]
    for name in VERSIONS:
        values = sorted({str(row.get(name)) for row in rows})
        if len(values) > 1:
            errors.append(fail(f"rows were made with several {name}: {values}"))
    return errors or table.judge(rows)
