"""The command line: ``hypergrad`` run, runs, models, tasks, estimators."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from . import __version__
from .runtime.console import exit_with_message, print_markdown, print_table

HELP = "the command line needs its extra: pip install 'hypergrad-jax[cli]'"


def run(
    task: str,
    methods: tuple[str, ...] = (),
    seeds: int | None = None,
    out: Path = Path("runs"),
    dry_run: bool = False,
) -> None:
    """Run a task's table and write its rows, its Markdown and its figure.

    A run that was interrupted goes on where it stopped.

    Args:
      task: name of the task, see `hypergrad tasks`.
      methods: rows of the table; none stands for all.
      seeds: number of seeds, from 0; the table's own number, unless told.
      out: folder for NAME.jsonl, NAME.md, NAME.png, and NAME.run.json of what the
        run was made of. Of the first seed its folder models gets the chosen models,
        where the task has them.
      dry_run: run nothing; print FLOPs, bytes and expected gradient-equivalents of the
        compiled programs. Where a tolerance ends a loop, the cost of an iteration.
    """
    from rich.console import Console

    from . import studies
    from .runs import start
    from .studies import rehearsal
    from .studies.table import Request
    from .studies.verdict import number_of_seeds

    study = studies.STUDIES[task]
    unknown = set(methods) - set(study.methods)
    if unknown:
        sys.exit(
            f"hypergrad: {task} has no method {', '.join(sorted(unknown))}; it has "
            f"{', '.join(study.methods)}"
        )
    if dry_run:
        chosen = [m for m in study.methods if not methods or m in methods]
        print_markdown(rehearsal.report(study, chosen), Console())
        return
    seeds = study.seeds if seeds is None else seeds
    if seeds < 1:
        sys.exit(f"hypergrad: --seeds must be at least 1, got {seeds}")
    console = Console()
    print_markdown(f"{task}: {study.data()[0]}, {number_of_seeds(seeds)}", console)
    command = f"hypergrad run {task} --seeds {seeds} --out {out}"
    if methods:
        command += f" --methods {' '.join(map(repr, methods))}"
    with exit_with_message():
        run = start(study, Request("small", seeds, out, command, methods))
    print_markdown(run.file(".md").read_text(), console)
    for ending in (".jsonl", ".md", ".png", ".run.json", ".data.json"):
        print(f"wrote {run.file(ending)}")  # a path in one piece
    if run.models:
        folder = shlex.quote(str(run.folder))
        print(f"models: hypergrad models list {folder}; show NAME --folder {folder}")


def runs() -> None:
    """List, show, compare, rerun, report or export runs: see hypergrad runs --help."""


def models() -> None:
    """List, show or load models that were kept: see hypergrad models --help."""


def tasks() -> None:
    """List the tasks: paradigm, source, and how long a table takes on two cores."""
    from rich.console import Console

    from .studies import STUDIES

    rows = [(s.name, s.paradigm, s.source, f"{s.minutes:g}") for s in STUDIES.values()]
    print_table(("task", "paradigm", "source", "minutes"), rows, Console())


def estimators() -> None:
    """List the estimators: what each is for, what it costs, what it sees."""
    from rich.console import Console

    from . import method_tables

    console = Console(width=max(Console().width, 110))
    for name in ("advice", "costs"):
        columns = method_tables.TABLES[name]
        table_rows = method_tables.table_rows()
        rows = [[row[column] for column in columns] for row in table_rows]
        print_table(columns, rows, console)


def main() -> None:
    """Entry point of the ``hypergrad`` command."""
    if sys.argv[1:] == ["--version"]:
        print(f"hypergrad {__version__}")
        return
    try:
        import tyro
    except ImportError:
        sys.exit(f"hypergrad: {HELP}")
    if sys.argv[1:2] in (["runs"], ["models"]):
        from .runs import commands, model_commands

        kept = sys.argv[1]
        of_kept = {"runs": commands.COMMANDS, "models": model_commands.COMMANDS}
        tyro.extras.subcommand_cli_from_dict(
            of_kept[kept],
            prog=f"hypergrad {kept}",
            description=f"{kept.capitalize()} that were kept.",
            args=sys.argv[2:],
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        return
    from .studies import STUDIES

    names = Literal[tuple(STUDIES)]  # pyright: ignore[reportInvalidTypeForm]
    run.__annotations__["task"] = Annotated[names, tyro.conf.Positional]
    tyro.extras.subcommand_cli_from_dict(
        {
            "run": run,
            "runs": runs,
            "models": models,
            "tasks": tasks,
            "estimators": estimators,
        },
        prog="hypergrad",
        description="Hypergradients for JAX: run a task's table, list what there is.",
    )


if __name__ == "__main__":
    main()
