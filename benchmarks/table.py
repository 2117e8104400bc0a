"""What a table is: planned cells, rows written as they come, verdicts on the rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hypergrad.studies import progress, record
from hypergrad.studies.record import Row
from hypergrad.studies.report import paired

LEAST_SEEDS = 5
# What names a row beside its cell's own fields: it must be made in one way throughout.
VERSIONS = ("device", "python", *record.PACKAGES)


class Request(NamedTuple):
    """What was asked for on the command line."""

    scale: str
    seeds: int
    folder: Path
    command: str


class Verdict(NamedTuple):
    """A line under the table; ``failed`` makes the check fail."""

    text: str
    failed: bool = False


@dataclass(frozen=True)
class Table:
    """A table that `python -m benchmarks` runs and checks.

    name, source: what it is, and where its claims are from.
    minutes: expected for the small scale on two cores.
    seeds: how many, unless told.
    plan: number of seeds -> cells; a cell is a dict that names it, "seed" included,
        and every row holds the names of its cell.
    run: ``(table, request)`` writes NAME.jsonl, NAME.md and NAME.png.
    judge: rows of all planned cells -> verdicts.
    """

    name: str
    source: str
    minutes: float
    seeds: int
    plan: Callable[[int], list[Row]]
    run: Callable[["Table", Request], None]
    judge: Callable[[list[Row]], list[Verdict]]
    scales: tuple[str, ...] = ("small",)

    def file(self, folder: Path, ending: str) -> Path:
        return folder / f"{self.name}.{ending}"


# Running, cell by cell.


def cell_by_cell(
    measure: Callable[[Row], Row],
    markdown: Callable[[Table, list[Row], str], str],
    draw: Callable[[list[Row], Path], None],
) -> Callable[[Table, Request], None]:
    """A `Table.run` that measures one cell after the other, and resumes.

    measure: cell -> its other columns.
    markdown, draw: the table and the figure, from all rows.
    """

    def run(table: Table, request: Request) -> None:
        request.folder.mkdir(parents=True, exist_ok=True)
        path = table.file(request.folder, "jsonl")
        made = {"table": table.name, "scale": request.scale} | record.versions()
        made["command"] = request.command
        cells = table.plan(request.seeds)
        there = {name_of(row, cells[0]) for row in resume(path, made)}
        with progress(len(cells)) as tick, path.open("a") as file:
            for cell in cells:
                if name_of(cell, cell) not in there:
                    file.write(record.line(cell | measure(cell) | made))
                    file.flush()
                tick(str(cell.get("method", "")))
        rows = record.read(path)
        text = markdown(table, rows, request.command)
        table.file(request.folder, "md").write_text(text + "\n")
        draw(rows, table.file(request.folder, "png"))

    return run


def resume(path: Path, made: Row) -> list[Row]:
    """The rows of an interrupted run; a last line that was cut off is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    path.write_text(text[: text.rfind("\n") + 1])
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
    cells = table.plan(1 + max(row.get("seed", 0) for row in rows))
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


def within(
    what: str, values: Sequence[float], expected: float, tolerance: float
) -> Verdict:
    """Whether the mean over seeds is ``expected``, as far as its interval can tell.

    Reproduced where the 95% interval lies within the tolerance; an interval that is
    wider than what it is to tell apart is a failure, as are too few seeds.
    """
    mean, low, high = paired(values, 0.0)
    met = expected - tolerance <= low and high <= expected + tolerance
    text = (
        f"{what}: {mean:.3g} [{low:.3g}, {high:.3g}] over {len(values)} seeds, "
        f"{expected:.3g} ± {tolerance:.2g} claimed"
    )
    return conclude(text, met, len(values), (high - low) / 2, tolerance)


def conclude(
    text: str, met: bool, num_seeds: int, half_width: float, effect: float
) -> Verdict:
    """*Reproduced* or not, unless there is too little to say so."""
    if num_seeds < LEAST_SEEDS:
        return Verdict(f"{text}: too few seeds, {LEAST_SEEDS} are needed", failed=True)
    if not half_width <= effect:  # it could not tell the claim from no effect
        return Verdict(f"{text}: interval wider than the effect", failed=True)
    return Verdict(f"{text}: {'reproduced' if met else 'not reproduced'}")
