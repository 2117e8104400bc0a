"""The command line: ``hypergrad run NAME``, ``tasks``, ``estimators``."""

import sys
from pathlib import Path
from typing import Annotated, Literal

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
    from rich.markdown import Markdown

    from . import studies
    from .studies.table import Request

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
    console = Console(soft_wrap=True, width=max(Console().width, 110))
    console.print(f"{task}: {study.data()[0]}, {seeds} seeds", highlight=False)
    command = f"hypergrad run {task} --seeds {seeds} --out {out}"
    if methods:
        command += f" --methods {' '.join(map(repr, methods))}"
    table = studies.table(study)
    try:
        table.run(table, Request("small", seeds, out, command, methods))
    except ValueError as error:
        sys.exit(f"hypergrad: {error}")
    console.print(Markdown(table.file(out, "md").read_text()))
    for ending in ("jsonl", "md", "png"):
        console.print(f"wrote {table.file(out, ending)}", highlight=False)


def tasks() -> None:
    """List the tasks: paradigm, source, and how long a table takes on two cores."""
    from rich.console import Console
    from rich.table import Table

    from .studies import STUDIES

    table = Table("task", "paradigm", "source", "minutes")
    for study in STUDIES.values():
        table.add_row(study.name, study.paradigm, study.source, f"{study.minutes:g}")
    Console().print(table)


def estimators() -> None:
    """List the estimators: what each is for, what it costs, what it sees."""
    from rich.console import Console
    from rich.table import Table

    from . import choose

    console = Console()
    console = Console(width=max(console.width, 110))
    for name in ("advice", "costs"):
        columns = choose.TABLES[name]
        table = Table()
        for i, column in enumerate(columns):
            table.add_column(column, no_wrap=i == 0)
        for row in choose.rows():
            table.add_row(*(row[column] for column in columns))
        console.print(table)


def main() -> None:
    """Entry point of the ``hypergrad`` command."""
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
