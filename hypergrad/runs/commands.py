"""``hypergrad runs``: list, show, compare, rerun, report, export."""

import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from ..runtime.console import exit_with_message, print_markdown, print_table
from ..studies import STUDIES
from .compare import compare, same_numbers
from .export import of_run, to_mlflow, to_tensorboard
from .manifest import again, find, load
from .report import report as write_report


def list_runs(root: tyro.conf.Positional[Path] = Path("runs")) -> None:
    """List the runs in a folder and those below it.

    Args:
      root: the folder.
    """
    found, flaws = find(root)
    if not found and not flaws:
        sys.exit(f"hypergrad: no run in {root}; hypergrad run NAME makes one")
    fact = lambda run, *names: [run.facts[name] for name in names]
    rows = [
        [str(run.path), *fact(run, "started", "ended", "seeds"), str(len(run.rows))]
        for run in found
    ]
    if rows:
        print_table(("run", "started", "ended", "seeds", "rows"), rows, Console())
    if flaws:
        sys.exit("\n".join(f"hypergrad: {flaw}" for flaw in flaws))


def show_run(path: Path) -> None:
    """Show what a run was made of, and its table.

    Args:
      path: of the run: its files without their endings, such as runs/cleaning.
    """
    with exit_with_message():
        run = load(path)
    facts, kept = run.facts, [model.reference for model in run.models.values()]
    if kept:
        facts |= {"models": f"{', '.join(kept)} in {run.folder}"}
    print_table(("", ""), list(facts.items()), Console())
    if run.file(".md").exists():
        print_markdown(run.file(".md").read_text(), Console())


def compare_runs(first: Path, second: Path) -> None:
    """Line two runs up: what differs in configuration, data, versions, models, numbers.

    Args:
      first: path of a run.
      second: path of another.
    """
    with exit_with_message():
        both = load(first), load(second)
        found = compare(*both)
    for run in both:
        if "format" not in run.manifest:
            print(f"{run.path} is rows alone: only what they tell is compared")
    for about, text in found:
        print(f"{about}: {text}")
    differs = {about for about, _ in found}
    if "numbers" not in differs:
        print("the numbers are the same to the bit")
    kept = both[0].models.keys() & both[1].models.keys()
    if kept and "models" not in differs:
        print("the models that both kept are the same to the bit")


def repeat_run(
    path: Path,
    out: Path | None = None,
) -> None:
    """Repeat a run, and say whether its numbers came back to the bit.

    Other data than the run's are refused. The exit code is 1 where numbers differ.

    Args:
      path: of the run.
      out: folder of the repetition; "rerun" beside the run, unless told.
    """
    with exit_with_message():
        first = load(path)
        folder = first.path.parent / "rerun" if out is None else out
        task = first.manifest["task"]
        if task not in STUDIES:
            raise ValueError(f"there is no task {task!r}, see hypergrad tasks")
        second = again(first, STUDIES[task], folder)
    compare_runs(first.path, second.path)
    if not same_numbers(first, second):
        sys.exit(1)


def report_run(path: Path, out: Path | None = None) -> None:
    """Write a run as one page of HTML that needs nothing beside it.

    Args:
      path: of the run.
      out: the page; NAME.html beside the run, unless told.
    """
    with exit_with_message():
        run = load(path)
        out = run.file(".html") if out is None else out
        write_report(run, out)
    print(f"wrote {out}")


def export_run(
    path: Path, to: Literal["mlflow", "tensorboard"], out: Path | None = None
) -> None:
    """Write a run, each row with its curves, for the viewer of MLflow or TensorBoard.

    Rows that are there already are left as they are, so that a run that grew may be
    exported again.

    Args:
      path: of the run.
      to: whose viewer; the extra of that name has to be installed.
      out: an SQLite file for mlflow, mlflow.db, unless told; a folder for tensorboard,
        tensorboard, unless told.
    """
    with exit_with_message():
        shown = of_run(load(path))
        if to == "mlflow":
            out = Path("mlflow.db") if out is None else out
            written, view = (
                to_mlflow(shown, out),
                f"--backend-store-uri sqlite:///{out}",
            )
        else:
            out = Path("tensorboard") if out is None else out
            written, view = to_tensorboard(shown, out), f"--logdir {out}"
    there = len(shown) - written
    print(f"wrote {written} rows" + f", {there} were there" * (there > 0))
    print(f"{to} {'ui ' * (to == 'mlflow')}{view}")
    if to == "mlflow":
        print("(the viewer is in mlflow itself: pip install mlflow)")


COMMANDS = {
    "list": list_runs,
    "show": show_run,
    "compare": compare_runs,
    "rerun": repeat_run,
    "report": report_run,
    "export": export_run,
}
