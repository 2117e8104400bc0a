"""The commands ``hypergrad runs``: list, show, compare, rerun, report and export."""

import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from ..runtime.console import exit_with_message, print_markdown, print_table
from ..studies import STUDIES
from .compare import compare, have_equal_numbers
from .export import to_exported_runs, to_mlflow, to_tensorboard
from .manifest import find, load, rerun
from .report import write_report


def list_runs(root: tyro.conf.Positional[Path] = Path("runs")) -> None:
    """List the runs in a folder and its subfolders.

    Args:
      root: Folder to search.
    """
    runs, errors = find(root)
    if not runs and not errors:
        sys.exit(f"hypergrad: no run in {root}; make one with hypergrad run NAME")
    columns = ("started", "ended", "seeds")
    rows = [
        [str(run.path), *(run.metadata[name] for name in columns), str(len(run.rows))]
        for run in runs
    ]
    if rows:
        print_table(("run", *columns, "rows"), rows, Console())
    if errors:
        sys.exit("\n".join(f"hypergrad: {error}" for error in errors))


def show_run(path: Path) -> None:
    """Show the metadata and the table of a run.

    Args:
      path: Path of the run, such as runs/cleaning.
    """
    with exit_with_message():
        run = load(path)
    metadata = run.metadata
    references = [model.reference for model in run.models.values()]
    if references:
        metadata["models"] = f"{', '.join(references)} in {run.model_folder}"
    print_table(("", ""), list(metadata.items()), Console())
    if run.file(".md").exists():
        print_markdown(run.file(".md").read_text(), Console())


def compare_runs(first: Path, second: Path) -> None:
    """Compare the configuration, data, versions, models and numbers of two runs.

    Args:
      first: Path of a run.
      second: Path of another run.
    """
    with exit_with_message():
        runs = load(first), load(second)
        differences = compare(*runs)
    for run in runs:
        if "format" not in run.manifest:
            print(f"{run.path} has no manifest: only what its rows contain is compared")
    for category, text in differences:
        print(f"{category}: {text}")
    categories = {category for category, _ in differences}
    if "numbers" not in categories:
        print("the numbers are equal to the bit")
    common_models = runs[0].models.keys() & runs[1].models.keys()
    if common_models and "models" not in categories:
        print("the models that both runs saved are equal to the bit")


def repeat_run(path: Path, out: Path | None = None) -> None:
    """Repeat a run and compare its numbers.

    The data must be those of the run. The exit code is 1 if numbers differ.

    Args:
      path: Path of the run.
      out: Folder of the repetition. Defaults to the folder "rerun" beside the run.
    """
    with exit_with_message():
        run = load(path)
        folder = run.path.parent / "rerun" if out is None else out
        task = run.manifest["task"]
        if task not in STUDIES:
            raise ValueError(
                f"task must be a task of hypergrad tasks; got {task!r} in {run.path}"
            )
        repetition = rerun(run, STUDIES[task], folder)
    compare_runs(run.path, repetition.path)
    if not have_equal_numbers(run, repetition):
        sys.exit(1)


def report_run(path: Path, out: Path | None = None) -> None:
    """Write a run as a self-contained HTML page.

    Args:
      path: Path of the run.
      out: File to write. Defaults to NAME.html beside the run.
    """
    with exit_with_message():
        run = load(path)
        out = run.file(".html") if out is None else out
        write_report(run, out)
    print(f"wrote {out}")


def export_run(
    path: Path, to: Literal["mlflow", "tensorboard"], out: Path | None = None
) -> None:
    """Write the rows of a run, with their curves, for the viewer MLflow or TensorBoard.

    Existing rows are not written again, so a run that has grown can be exported again.

    Args:
      path: Path of the run.
      to: Name of the viewer; its extra must be installed.
      out: For mlflow an SQLite file, by default mlflow.db. For tensorboard a folder, by
        default tensorboard.
    """
    with exit_with_message():
        runs = to_exported_runs(load(path))
        if to == "mlflow":
            out = Path("mlflow.db") if out is None else out
            num_written = to_mlflow(runs, out)
            view_command = f"mlflow ui --backend-store-uri sqlite:///{out}"
        else:
            out = Path("tensorboard") if out is None else out
            num_written = to_tensorboard(runs, out)
            view_command = f"tensorboard --logdir {out}"
    num_existing = len(runs) - num_written
    suffix = f", {num_existing} existed" if num_existing else ""
    print(f"wrote {num_written} rows{suffix}")
    print(view_command)
    if to == "mlflow":
        print("(the viewer is part of the full package: pip install mlflow)")


COMMANDS = {
    "list": list_runs,
    "show": show_run,
    "compare": compare_runs,
    "rerun": repeat_run,
    "report": report_run,
    "export": export_run,
}
