"""What a table is: planned cells, rows written as they come, a check of the rows."""

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

# What names a row beside its cell's own fields: it must be made in one way throughout.
VERSIONS = ("device", "python", *record.PACKAGES)


class Request(NamedTuple):
    """What was asked for on the command line; no methods stands for all."""

    scale: str
    seeds: int
    folder: Path
    command: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table that can be run and checked.

    name, source: what it is, and where its claims are from.
    minutes: expected for the small scale on two cores.
    seeds: how many, unless told.
    plan: ``(scale, seeds) -> cells``; a cell is a dict that names it, "seed" included,
        and every row holds the names of its cell.
    run: ``(table, request)`` writes NAME.jsonl, NAME.md and NAME.png.
    judge: rows of all planned cells -> verdicts.
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
        """Where it is written."""
        return folder / f"{self.name}.{ending}"


# Running, cell by cell.


def cell_by_cell(
    measure: Callable[[Row], Row],
    markdown: Callable[[Table, list[Row], str], str],
    draw: Callable[[list[Row], Path], None],
) -> Callable[[Table, Request], None]:
    """A `Table.run` that measures one cell after the other, and resumes.

    measure: cell -> its other columns.
    markdown, draw: the table and the figure, from the rows that were asked for.
    """

    def run(table: Table, request: Request) -> None:
        make_folder(request.folder)
        path = table.file(request.folder, "jsonl")
        made = {"table": table.name, "scale": request.scale} | record.versions()
        made["command"] = request.command
        cells = [
            cell
            for cell in table.plan(request.scale, request.seeds)
            if not request.methods or cell["method"] in request.methods
        ]
        with path.open("a") as file, progress(len(cells)) as tick:
            lock_file(file, path)
            atomic_io.fsync_path(request.folder)
            there = {name_of(row, cells[0]) for row in resume(path, made)}
            for cell in cells:
                kept = name_of(cell, cell) in there
                if not kept:
                    row = cell | measure(cell) | made
                    atomic_io.append_durably(file, record.line(row))
                tick(str(cell.get("method", "")) + ", kept" * kept)
        # A file that is resumed may hold more than was asked for.
        asked = {name_of(cell, cell) for cell in cells}
        rows = [row for row in record.read(path) if name_of(row, cells[0]) in asked]
        text = markdown(table, rows, request.command)
        atomic_io.atomic_write(table.file(request.folder, "md"), text + "\n")
        draw(rows, table.file(request.folder, "png"))

    return run


def make_folder(folder: Path) -> None:
    """ValueError where there can be none, such as in place of a file."""
    try:
        atomic_io.make_directory(folder)
    except OSError as error:
        raise ValueError(
            f"{folder} is no folder and cannot be made one ({error.strerror}); give "
            "another --out"
        ) from error


def resume(path: Path, made: Row) -> list[Row]:
    """The rows of an interrupted run; a last line that was cut off is dropped."""
    with path.open("rb+") as file:  # cut in place: a kill loses no row
        file.truncate(file.read().rfind(b"\n") + 1)
    rows = record.read(path)
    for name in (*VERSIONS, "scale"):
        for row in rows:
            if row.get(name) != made[name]:
                raise ValueError(
                    f"{path} holds rows made with {name} {row.get(name)}, not "
                    f"{made[name]}; move it away, or give another --out"
                )
    return rows


def name_of(row: Row, cell: Row) -> tuple[Any, ...]:
    """What tells a row from those of other cells."""
    return tuple(row.get(field) for field in cell)


# Checking.


def check(table: Table, folder: Path) -> list[Verdict]:
    """Flaws of the rows; where there is none, the table's verdicts on them."""
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
    seeds = 1 + max(row.get("seed", 0) for row in rows)
    cells = table.plan(rows[0].get("scale", "small"), seeds)
    planned = [name_of(cell, cell) for cell in cells]
    there = [name_of(row, cells[0]) for row in rows]
    flaws = [fail(f"missing: {cell}") for cell in planned if cell not in set(there)]
    flaws += [fail(f"not planned: {cell}") for cell in there if cell not in planned]
    flaws += [fail(f"twice: {cell}") for cell in set(there) if there.count(cell) > 1]
    for name in VERSIONS:
        found = sorted({str(row.get(name)) for row in rows})
        if len(found) > 1:
            flaws.append(fail(f"rows were made with several {name}: {found}"))
    return flaws or table.judge(rows)
