"""The table `peers`: each work by all contenders that offer it, and what is claimed."""

from collections.abc import Callable
from pathlib import Path

from hypergrad.checkpoint import lock_file
from hypergrad.runtime import atomic_io
from hypergrad.studies import record
from hypergrad.studies.progress import progress
from hypergrad.studies.record import Row
from hypergrad.studies.table import Request, Table, make_folder, resume

from .. import plots
from .claims import JAX, TORCH, by_work, judge, seconds
from .harness import OTHERS, measure, offers
from .work import WORKS

OURS = ("ours", "defaults", "base", "gauss_newton")
ORDER = ("inner", "plain", *OURS, *JAX, *TORCH)


def contenders(work: str) -> list[str]:
    """That offer it, in the order of their turns."""
    return [name for name in ORDER if work in offers(name)]


def plan(scale: str, seeds: int) -> list[Row]:
    """Work by work; data are of one seed."""
    del scale, seeds
    return [
        {"work": work, "method": name, "seed": 0}
        for work in WORKS
        for name in contenders(work)
    ]


def running(python: Callable[[str], Path]) -> Callable[[Table, Request], None]:
    """A `Table.run`; ``python`` says which Python runs a contender.

    The contenders of a work are measured together or not at all: of a work that was
    broken off nothing is kept.
    """

    def run(table: Table, request: Request) -> None:
        make_folder(request.folder)
        path = table.file(request.folder, "jsonl")
        made = {"table": table.name, "scale": request.scale} | record.versions()
        made["command"] = request.command
        with path.open("a") as file, progress(len(WORKS)) as tick:
            lock_file(file, path)
            there = by_work(resume(path, made))
            for work in WORKS:
                names = contenders(work)
                rows = list(there.get(work, {}).values())
                if [row["method"] for row in rows] != names:
                    found = measure(work, {name: python(name) for name in names})
                    there[work] = {row["method"]: row | made for row in found}
                    kept = [r for w in WORKS for r in there.get(w, {}).values()]
                    file.truncate(0)
                    atomic_io.append_durably(file, "".join(map(record.line, kept)))
                tick(work)
        rows = record.read(path)
        text = markdown(table, rows, request.command)
        table.file(request.folder, "md").write_text(text + "\n")
        draw(rows, table.file(request.folder, "png"))

    return run


def cells(row: Row, floor: Row | None) -> list[str]:
    """Of a contender: seconds, its ratio to the inner run, what it took, its error."""
    number = lambda x, form, scale=1.0: "" if x is None else format(x * scale, form)
    took, ratio = row["reason"] or "no clean repetition", ""
    if row["seconds"] and not row["reason"]:
        least, most = min(row["seconds"]), max(row["seconds"])
        took = f"{least:.3g} / **{seconds(row):.3g}** / {most:.3g}"
        if floor is not None and floor["seconds"]:
            ratio = f"{seconds(row) / seconds(floor):.3g}"
    return [
        row["method"],
        took,
        ratio,
        f"{len(row['seconds'])} of {len(row['seconds']) + row['discarded']}",
        number(row["first"], ".2f"),
        number(row["peak"], ".0f", 1e-6),
        number(row["scratch"], ".3g", 1e-6),
        number(row["error"], ".1e"),
    ]


def markdown(table: Table, rows: list[Row], command: str) -> str:
    """A table a work, then the claims."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    heads = [
        "contender", "seconds: min / median / max", "over inner", "clean",
        "first call, s", "peak, MB", "scratch, MB", "error",
    ]  # fmt: skip
    lines = [f"# {table.name}", "", f"{made_on(rows)} Command: `{command}`"]
    for work, found in by_work(rows).items():
        lines += ["", f"**{work}**: {WORKS[work].text}", "", line(heads)]
        lines.append("|---" * len(heads) + "|")
        lines += [line(cells(row, found.get("inner"))) for row in found.values()]
    return "\n".join([*lines, "", *(v.line for v in judge(rows))])


def made_on(rows: list[Row]) -> str:
    """Hardware and versions, in one sentence each.

    Two peers are distributed as `hypergrad`: they go by their contenders' names.
    """
    row = rows[0]
    versions = {
        (each["method"] if name == "hypergrad" else name, version)
        for each in rows
        for name, version in each["versions"].items()
    } | {("hypergrad-jax", each["hypergrad-jax"]) for each in rows}
    told = ", ".join(f"{name} {version}" for name, version in sorted(versions))
    return (
        f"{row['cpu']}, {row['cores']} cores, {row['memory'] / 2**30:.0f} GiB, float32;"
        f" repetitions in turns, discarded while others took over {OTHERS:.0%} of a "
        f"core. Versions: {told}."
    )


def draw(rows: list[Row], path: Path) -> None:
    """A panel a work, the seconds of each contender that was right."""
    panels = {
        work: {
            name: row["seconds"]
            for name, row in found.items()
            if row["seconds"] and not row["reason"]
        }
        for work, found in by_work(rows).items()
    }
    plots.contenders({work: of for work, of in panels.items() if of}, path)


def of(python: Callable[[str], Path]) -> Table:
    """The table, by the Python that runs each contender."""
    return Table(
        name="peers",
        source="measured side by side; each library by its own documentation",
        minutes=60,
        seeds=1,
        plan=plan,
        run=running(python),
        judge=judge,
    )
