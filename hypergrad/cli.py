"""The command line ``hypergrad``: run, runs, models, tasks and estimators."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

from . import __version__
from .runtime.console import exit_with_message, print_markdown, print_table

MISSING_EXTRA = "the command line needs its extra: pip install 'hypergrad-jax[cli]'"


def run(
    task: str,
    methods: tuple[str, ...] = (),
    seeds: int | None = None,
    out: Path = Path("runs"),
    dry_run: bool = False,
) -> None:
    """Run the table of a task and write its rows, its Markdown and its figure.

    An interrupted run continues with the next row.

    Args:
      task: Name of the task, see `hypergrad tasks`.
      methods: Methods to run. Defaults to all methods of the task.
      seeds: Number of seeds, starting at 0. Defaults to the task's own number.
      out: Folder for NAME.jsonl, NAME.md, NAME.png and the metadata NAME.run.json. Its
        subfolder models receives the models of the first seed, if the task has any.
      dry_run: Run nothing; print FLOPs, bytes and expected gradient-equivalents of the
        compiled programs. If a tolerance ends a loop, print the cost of an iteration.
    """
    from rich.console import Console

    from . import studies
    from .runs import start_run
    from .studies import rehearsal
    from .studies.table import Request
    from .studies.verdict import number_of_seeds

    study = studies.STUDIES[task]
    unknown = set(methods) - set(study.methods)
    if unknown:
        sys.exit(
            f"hypergrad: --methods must be methods of {task}, "
            f"{', '.join(study.methods)}; got {', '.join(sorted(unknown))}"
        )
    if dry_run:
        selected = [name for name in study.methods if not methods or name in methods]
        print_markdown(rehearsal.report(study, selected), Console())
        return
    seeds = study.seeds if seeds is None else seeds
    if seeds < 1:
        sys.exit(f"hypergrad: --seeds must be at least 1; got {seeds}")
    console = Console()
    print_markdown(f"{task}: {study.data()[0]}, {number_of_seeds(seeds)}", console)
    command = f"hypergrad run {task} --seeds {seeds} --out {out}"
    if methods:
        command += f" --methods {' '.join(map(repr, methods))}"
    with exit_with_message():
        saved_run = start_run(study, Request("small", seeds, out, command, methods))
    print_markdown(saved_run.file(".md").read_text(), console)
    for ending in (".jsonl", ".md", ".png", ".run.json", ".data.json"):
        print(f"wrote {saved_run.file(ending)}")  # rich would break a long path
    if saved_run.models:
        folder = shlex.quote(str(saved_run.model_folder))
        print(f"models: hypergrad models list {folder}; show NAME --folder {folder}")


def runs() -> None:
    """List, show, compare, rerun, report or export runs: see hypergrad runs --help."""


def models() -> None:
    """List, show or load saved models: see hypergrad models --help."""


def tasks() -> None:
    """List the tasks: paradigm, source, and minutes of their table on two cores."""
    from rich.console import Console

    from .studies import STUDIES

    rows = [(s.name, s.paradigm, s.source, f"{s.minutes:g}") for s in STUDIES.values()]
    print_table(("task", "paradigm", "source", "minutes"), rows, Console())


def estimators() -> None:
    """List the estimators: their purpose, their cost, and the alpha they support."""
    from rich.console import Console

    from . import method_tables

    console = Console(width=max(Console().width, 110))
    table_rows = method_tables.table_rows()
    for name in ("advice", "costs"):
        columns = method_tables.TABLES[name]
        rows = [[row[column] for column in columns] for row in table_rows]
        print_table(columns, rows, console)


def main() -> None:
    """Entry point of the command ``hypergrad``."""
    if sys.argv[1:] == ["--version"]:
        print(f"hypergrad {__version__}")
        return
    try:
        import tyro
    except ImportError:
        sys.exit(f"hypergrad: {MISSING_EXTRA}")
    if sys.argv[1:2] in (["runs"], ["models"]):
        from .runs import commands, model_commands

        group = sys.argv[1]
        commands_by_group = {
            "runs": commands.COMMANDS,
            "models": model_commands.COMMANDS,
        }
        tyro.extras.subcommand_cli_from_dict(
            commands_by_group[group],
            prog=f"hypergrad {group}",
            description=f"Commands for saved {group}.",
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
        description="Hypergradients for JAX: run the tables of tasks, list methods.",
    )


if __name__ == "__main__":
    main()
