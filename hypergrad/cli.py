"""The command line: ``hypergrad run NAME``, ``tasks``, ``estimators``, --version."""

import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from . import __version__

if TYPE_CHECKING:
    from rich.console import Console

HELP = "the command line needs its extra: pip install 'hypergrad-jax[cli]'"


def run(
    task: str,
    methods: tuple[str, ...] = (),
    seeds: int | None = None,
    out: Path = Path("runs"),
) -> None:
    """Run a task's table and write its rows, its Markdown and its figure.

    A run that was interrupted goes on where it stopped.

    Args:
      task: name of the task, see `hypergrad tasks`.
      methods: rows of the table; none stands for all.
      seeds: number of seeds, from 0; the table's own number, unless told.
      out: folder for NAME.jsonl, NAME.md and NAME.png.
    """
    from rich.console import Console

    from . import studies
    from .studies.table import Request
    from .studies.verdict import number_of_seeds

    study = studies.STUDIES[task]
    unknown = set(methods) - set(study.methods)
    if unknown:
        sys.exit(
            f"hypergrad: {task} has no method {', '.join(sorted(unknown))}; it has "
            f"{', '.join(study.methods)}"
        )
    seeds = study.seeds if seeds is None else seeds
    if seeds < 1:
        sys.exit(f"hypergrad: --seeds must be at least 1, got {seeds}")
    console = Console()
    show(f"{task}: {study.data()[0]}, {number_of_seeds(seeds)}", console)
    command = f"hypergrad run {task} --seeds {seeds} --out {out}"
    if methods:
        command += f" --methods {' '.join(map(repr, methods))}"
    table = studies.table(study)
    try:
        table.run(table, Request("small", seeds, out, command, methods))
    except ValueError as error:
        sys.exit(f"hypergrad: {error}")
    show(table.file(out, "md").read_text(), console)
    for ending in ("jsonl", "md", "png"):
        print(f"wrote {table.file(out, ending)}")  # a path in one piece


def tasks() -> None:
    """List the tasks: paradigm, source, and how long a table takes on two cores."""
    from rich.console import Console

    from .studies import STUDIES

    rows = [(s.name, s.paradigm, s.source, f"{s.minutes:g}") for s in STUDIES.values()]
    draw(("task", "paradigm", "source", "minutes"), rows, Console())


def estimators() -> None:
    """List the estimators: what each is for, what it costs, what it sees."""
    from rich.console import Console

    from . import choose

    console = Console(width=max(Console().width, 110))
    for name in ("advice", "costs"):
        columns = choose.TABLES[name]
        rows = [[row[column] for column in columns] for row in choose.rows()]
        draw(columns, rows, console)


def show(text: str, console: "Console") -> None:
    """A study's Markdown: its table drawn, and other lines as they are, wrapped."""
    from rich.text import Text

    is_row = lambda line: line.startswith("|")
    for drawn, lines in itertools.groupby(text.splitlines(), is_row):
        if drawn:
            head, _, *rows = ([c.strip() for c in x[1:-1].split("|")] for x in lines)
            draw(head, rows, console)
        else:
            for line in lines:
                console.print(Text(line))


def draw(
    columns: Sequence[str], rows: Iterable[Sequence[str]], console: "Console"
) -> None:
    """A table in which no word and no name of a row is broken, if it is too wide."""
    from rich.table import Table
    from rich.text import Text

    rows, table, least = list(rows), Table(), 1
    for i, column in enumerate(columns):
        cells = [column, *(row[i] for row in rows)]
        width = max(map(len, cells if i == 0 else " ".join(cells).split()))
        table.add_column(Text(column), min_width=width)
        least += width + 3  # with a blank on either side and the border
    for row in rows:
        table.add_row(*map(Text, row))
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def main() -> None:
    """Entry point of the ``hypergrad`` command."""
    if sys.argv[1:] == ["--version"]:
        print(f"hypergrad {__version__}")
        return
    try:
        import tyro
    except ImportError:
        sys.exit(f"hypergrad: {HELP}")
    from .studies import STUDIES

    names = Literal[tuple(STUDIES)]  # pyright: ignore[reportInvalidTypeForm]
    run.__annotations__["task"] = Annotated[names, tyro.conf.Positional]
    tyro.extras.subcommand_cli_from_dict(
        {"run": run, "tasks": tasks, "estimators": estimators},
        prog="hypergrad",
        description="Hypergradients for JAX: run a task's table, list what there is.",
    )


if __name__ == "__main__":
    main()
