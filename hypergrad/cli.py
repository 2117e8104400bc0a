"""The command line ``hypergrad``: tables are listed, run, checked and reported."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from . import __version__
from .runtime.console import (
    escape_warnings,
    exit_quietly,
    exit_with_errors,
    exit_with_message,
    print_entries,
    print_line,
    print_markdown,
    print_table,
    printable,
)

MIN_TABLE_WIDTH = 110  # characters that the tables of `estimators` need
MISSING_EXTRA = "the command line needs its extra: pip install 'hypergrad-jax[cli]'"


def list_tables(folder: Path = Path("benchmarks")) -> None:
    """List the tables of a folder, and which of them take a method of one's own.

    A file that cannot be imported is named, and the exit status is 1.

    Args:
      folder: Folder whose files define tables.
    """
    from rich.console import Console

    from .bench import commands

    with exit_with_message():
        rows, errors = commands.overview(folder)
        print_table(commands.OVERVIEW, rows, Console())
    exit_with_errors(errors)


def run(
    table: str,
    method: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    seeds: int | None = None,
    scale: str | None = None,
    budget: float | None = None,
    out: Path = Path("runs"),
    workers: int = 1,
    dry_run: bool = False,
) -> None:
    """Run a table and write its rows, its printed form and its figure.

    A run that was interrupted continues with the next cell.

    Args:
      table: NAME for ./benchmarks/NAME.py, or a file that defines `table`.
      method: A method of one's own as FILE.py:FUNCTION, which makes one more row. It is
        tuned over FUNCTION.grid by the rule of the table, at the same budget. May be
        given several times.
      only: Label of a method to run. May be given several times. Defaults to all.
      seeds: Number of seeds, starting at 0. Defaults to that of the table.
      scale: Scale at which to run. Defaults to the first of the table.
      budget: Gradient-equivalents of a run in place of those of the table.
      out: Folder for NAME.jsonl, NAME.md and NAME.png.
      workers: Number of processes in which cells run.
      dry_run: Print which cells would run and what they may cost; run nothing.
    """
    from rich.console import Console

    from .bench import commands

    with exit_with_message():
        ref, options = commands.resolve_run(
            table, method, only, seeds, scale, budget, out, sys.argv[1:]
        )
        if dry_run:
            columns, rows = commands.planned_rows(ref, options)
            print_table(columns, rows, Console())
            return
        text, paths, failures = commands.run(ref, options, workers)
    # The protocol would move the table out of sight; it is in the file NAME.md.
    print_markdown(text.partition("\n## Protocol\n")[0], Console())
    for path in paths:
        print_line(f"wrote {path}")  # rich would break a long path
    exit_with_errors(failures)


def check(target: str) -> None:
    """Judge rows again; exit 1 for a failed check, a missing cell or damaged rows.

    Args:
      target: NAME or FILE of a table, whose rows are in the folder `results` beside
        its file or else in `runs`, or a folder of rows.
    """
    from .bench import commands

    failed = False
    with exit_with_message():
        for name, findings in commands.check(target):
            failed |= any(finding.failed for finding in findings)
            print_line(f"{name}")
            for finding in findings:
                print_line(f"  {finding.outcome or '-':13} {finding.text}")
    sys.exit(failed)


def write_report(folder: Path, out: Path | None = None, update: bool = False) -> None:
    """Write one page of HTML for each table of a folder, and a page of all.

    Args:
      folder: Folder of rows.
      out: Folder of the pages. Defaults to `html` in the folder.
      update: Also write the printed forms and the figures beside the rows anew.
    """
    from .bench import commands

    with exit_with_message():
        out = folder / "html" if out is None else out
        path, errors = commands.write_report(folder, out, update=update)
        print_line(f"wrote {path}")
    exit_with_errors(errors)


def compare(folder: Path, reference: Path) -> None:
    """Show in what two results differ; exit 1 if a number or a cell does.

    Args:
      folder: Folder of rows.
      reference: Folder of rows with which they are compared.
    """
    from .bench import commands

    with exit_with_message():
        differences = commands.compare(folder, reference)
    if not differences:
        print_line("no difference")
    else:
        print_line(f"{folder} | {reference}")
    for name, difference in differences:
        print_line(f"{name}: {difference.kind}: {difference.text}")
    sys.exit(any(x.kind != "provenance" for _, x in differences))


def recompute(
    folder: Path,
    cells: int = 24,
    seed: int = 0,
    max_seconds: float = 120,
    skip: tuple[str, ...] = (),
) -> None:
    """Measure randomly chosen cells again, and compare the printed numbers.

    The exit status is 1 if a number differs, a cell cannot be measured, or none is
    chosen.

    Args:
      folder: Folder of rows.
      cells: Number of cells, from as many tables as possible.
      seed: Seed of the choice.
      max_seconds: Cells that took longer are not chosen.
      skip: Name of a table to leave out, such as one that only measures times. May be
        given several times.
    """
    from .bench import commands

    outcomes = []
    with exit_with_message():
        for cell in commands.recompute(folder, cells, max_seconds, seed, skip):
            print_line(
                f"{cell.outcome:10} {cell.name}: {cell.cell}  {cell.text}".strip()
            )
            outcomes.append(cell.outcome)
    counts = {kind: outcomes.count(kind) for kind in dict.fromkeys(outcomes)}
    print_line(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    sys.exit(not counts or bool(counts.keys() - {"equal", "as printed"}))


def export(
    folder: Path,
    to: Literal["csv", "latex", "pdf", "settings", "splits", "mlflow", "tensorboard"],
    out: Path | None = None,
) -> None:
    """Write the tables of a folder in the format of another program.

    Args:
      folder: Folder of rows.
      to: The format; `settings` are those that were chosen, `splits` the data.
      out: Where to write. Defaults to `export` in the folder.
    """
    from .bench import commands

    with exit_with_message():
        out = folder / "export" if out is None else out
        paths, errors = commands.export(folder, to, out)
        for path in dict.fromkeys(paths):
            print_line(f"wrote {path}")
    exit_with_errors(errors)


def write_solvers(folder: Path) -> None:
    """Write the single-loop methods as solvers of benchopt.

    They run with `benchopt run` beside the solvers of benchmark_bilevel, and are drawn
    in its figures.

    Args:
      folder: The folder `solvers` of a checkout of benchmark_bilevel.
    """
    from .bench import benchopt

    with exit_with_message():
        for path in benchopt.write_solvers(folder):
            print_line(f"wrote {path}")


def estimators() -> None:
    """List the estimators: their purpose, their cost, and the alpha they support."""
    from rich.console import Console

    from . import method_tables

    console = Console()
    table_rows = method_tables.table_rows()
    is_narrow = console.is_terminal and console.width < MIN_TABLE_WIDTH
    if not console.is_terminal:  # whose width is unknown
        console = Console(width=max(console.width, MIN_TABLE_WIDTH))
    print_rows = print_entries if is_narrow else print_table
    for name in ("advice", "costs"):
        columns = method_tables.TABLES[name]
        rows = [[row[column] for column in columns] for row in table_rows]
        print_rows(columns, rows, console)


def cite(names: tuple[str, ...] = ()) -> None:
    """Print BibTeX of hypergrad and of estimators, solvers, searchers or surrogates.

    Args:
      names: Names of public classes or functions, such as Implicit, SOBA, TPE or FBeta.
    """
    from .citation import citation, find_public

    try:
        objects = [find_public(name) for name in names]
    except ValueError as error:
        sys.exit(printable(f"hypergrad: {error}"))
    print_line(citation(*objects))


#: How the values of arguments are called in the texts of ``--help``.
NAMES_IN_HELP: dict[Callable, dict[str, str]] = {
    list_tables: {"folder": "FOLDER"},
    run: {
        "table": "TABLE",
        "method": "FILE.py:FUNCTION",
        "only": "LABEL",
        "seeds": "NUMBER",
        "scale": "SCALE",
        "budget": "COST",
        "out": "FOLDER",
        "workers": "NUMBER",
    },
    check: {"target": "TABLE|FOLDER"},
    write_report: {"folder": "FOLDER", "out": "FOLDER"},
    compare: {"folder": "FOLDER", "reference": "REFERENCE"},
    recompute: {"folder": "FOLDER", "skip": "TABLE"},
    export: {"folder": "FOLDER", "out": "FOLDER"},
    write_solvers: {"folder": "FOLDER"},
    cite: {"names": "[NAME ...]"},
}


def main() -> None:
    """Entry point of the command ``hypergrad``."""
    with exit_quietly():
        _run_command()


def _run_command() -> None:
    """Runs the command that the arguments name."""
    if sys.argv[1:] == ["--version"]:
        print_line(f"hypergrad {__version__}")
        return
    escape_warnings()
    try:
        import tyro
    except ImportError:
        sys.exit(f"hypergrad: {MISSING_EXTRA}")
    for function, names in NAMES_IN_HELP.items():
        for argument, name in names.items():
            _mark(function, argument, tyro.conf.arg(metavar=name))
    _mark(list_tables, "folder", tyro.conf.Positional)
    _mark(cite, "names", tyro.conf.Positional)
    _mark(write_solvers, "folder", tyro.conf.Positional)
    _mark(run, "method", tyro.conf.UseAppendAction)
    _mark(run, "only", tyro.conf.UseAppendAction)
    tyro.extras.subcommand_cli_from_dict(
        {
            "list": list_tables,
            "run": run,
            "check": check,
            "report": write_report,
            "compare": compare,
            "recompute": recompute,
            "export": export,
            "write-solvers": write_solvers,
            "estimators": estimators,
            "cite": cite,
        },
        prog="hypergrad",
        description="Hypergradients for JAX: run, check and report tables of methods. "
        "`hypergrad --version` prints the version.",
        config=(tyro.conf.PositionalRequiredArgs,),
    )


def _mark(function, argument: str, marker) -> None:
    """Marks how an argument is written; a decorator would import tyro too early."""
    kind = function.__annotations__[argument]
    function.__annotations__[argument] = Annotated[kind, marker]


if __name__ == "__main__":
    main()
