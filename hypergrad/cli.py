"""The command line: ``hypergrad run NAME``, ``tasks``, ``estimators``."""

import sys
from pathlib import Path
from typing import Annotated, Literal

HELP = "the command line needs its extra: pip install 'hypergrad-jax[cli]'"


def run(
    task: Literal["cleaning"],
    estimator: Literal["all", "implicit", "neumann", "unrolled"] = "all",
    seeds: int = 10,
    out: Path = Path("runs"),
) -> None:
    """Run a task's table and write its rows, its Markdown and its figure.

    Args:
      task: name of the task, see `hypergrad tasks`.
      estimator: of the hypergradient; all runs every row of the table.
      seeds: number of seeds, from 0.
      out: folder for NAME.jsonl, NAME.md and NAME.png.
    """
    from rich.console import Console

    from . import studies

    if seeds < 1:
        sys.exit(f"hypergrad: --seeds must be at least 1, got {seeds}")
    study = studies.STUDIES[task]
    methods = [
        method
        for method in study.methods
        if estimator == "all" or method == estimator or method not in study.learned
    ]
    console = Console(soft_wrap=True, width=max(Console().width, 110))
    console.print(f"{study.name}: {study.data_name}, {seeds} seeds", highlight=False)
    with studies.progress(len(methods) * (len(study.grid) + 1)) as tick:
        results = studies.run(study, methods, range(seeds), tick)
    command = (
        f"hypergrad run {task} --estimator {estimator} --seeds {seeds} --out {out}"
    )
    report = studies.report.markdown(study, results, command)
    console.print(_table(study, results))
    for line in studies.report.verdicts(study, results):
        console.print(line, highlight=False)
    for path in studies.write(study, results, range(seeds), report, out):
        console.print(f"wrote {path}", highlight=False)


def _table(study, results):
    from rich import box
    from rich.table import Table

    from .studies import report

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("method", no_wrap=True)
    for title, *_ in report.COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for method, result in results.items():
        table.add_row(method, *report.cells(result))
    return table


def tasks() -> None:
    """List the tasks, with paradigm and source."""
    import jax
    from rich.console import Console
    from rich.table import Table

    from .tasks import TASKS

    table = Table("task", "paradigm", "source")
    for name, module in TASKS.items():
        task = module.make(key=jax.random.key(0))
        table.add_row(name, task.paradigm, task.source)
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
    positional = Annotated[Literal["cleaning"], tyro.conf.Positional]
    run.__annotations__["task"] = positional
    tyro.extras.subcommand_cli_from_dict(
        {"run": run, "tasks": tasks, "estimators": estimators},
        prog="hypergrad",
        description="Hypergradients for JAX: run a task's table, list what there is.",
    )


if __name__ == "__main__":
    main()
