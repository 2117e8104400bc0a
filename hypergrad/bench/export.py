"""Rows and tables in the formats of other programs."""

import csv
import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .figures import draw
from .report import TableResult, main_table
from .rows import Row

FORMATS = ("csv", "latex", "pdf", "mlflow", "tensorboard")
EXTRA = "needs its extra: pip install 'hypergrad-jax[{}]'"


def export(result: TableResult, kind: str, folder: Path) -> Path:
    """Writes a result in a format and returns the path.

    Args:
      result: The rows of a table.
      kind: One of `FORMATS`.
      folder: Where the file or the store is written.

    Raises:
      ValueError: The format is unknown.
      ImportError: The package of the format is not installed.
    """
    writers = {
        "csv": write_csv,
        "latex": write_latex,
        "pdf": write_pdf,
        "mlflow": write_mlflow,
        "tensorboard": write_tensorboard,
    }
    if kind not in writers:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {kind!r}.")
    folder.mkdir(parents=True, exist_ok=True)
    return writers[kind](result, folder)


def write_csv(result: TableResult, folder: Path) -> Path:
    """Writes one line per row with all scalar fields."""
    rows = result.printed_rows
    names = list(
        dict.fromkeys(k for row in rows for k, x in row.items() if _is_scalar(x))
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: row.get(k, "") for k in names} for row in rows)
    path = folder / f"{result.name}.csv"
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def write_latex(result: TableResult, folder: Path) -> Path:
    """Writes the printed table as a ``booktabs`` tabular."""
    headings, cells = main_table(result)
    line = lambda row: " & ".join(map(_latex, row)) + r" \\"
    body = "\n".join(map(line, cells))
    columns = "l" + "r" * (len(headings) - 1)
    path = folder / f"{result.name}.tex"
    path.write_text(
        f"% {result.rows[0]['command']}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
        f"{line(headings)}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n",
        encoding="utf-8",
    )
    return path


def write_pdf(result: TableResult, folder: Path) -> Path:
    """Writes the figure as a PDF."""
    path = folder / f"{result.name}.pdf"
    draw(result, path)
    return path


def write_mlflow(result: TableResult, folder: Path) -> Path:
    """Writes one MLflow run per row into the store ``folder/mlflow.db``.

    A row that the store has already, by a digest of its numbers, is not written again.
    """
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag
    except ImportError as error:
        raise ImportError(f"MLflow {EXTRA.format('mlflow')}") from error
    path = folder.resolve() / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name(result.name)
    experiment_id = (
        client.create_experiment(result.name)
        if experiment is None
        else experiment.experiment_id
    )
    existing = {
        run.data.tags.get("digest") for run in client.search_runs([experiment_id])
    }
    for row in result.printed_rows:
        if (digest := _digest(row)) in existing:
            continue
        run = client.create_run(
            experiment_id, tags={"digest": digest}, run_name=_name(row)
        )
        metrics = [Metric(name, x, 0, step) for name, x, step in _numbers(row)]
        params = [Param(k, str(x)[:500]) for k, x in row.items() if isinstance(x, str)]
        tags = [RunTag("mlflow.note.content", str(row["command"]))]
        for start in range(0, max(len(metrics), 1), 1000):  # MLflow's limit
            client.log_batch(run.info.run_id, metrics[start : start + 1000], [], [])
        client.log_batch(run.info.run_id, [], params[:100], tags)
        client.set_terminated(run.info.run_id)
    return path


def write_tensorboard(result: TableResult, folder: Path) -> Path:
    """Writes one folder of event files per row, named by method and seed."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise ImportError(f"TensorBoard {EXTRA.format('tensorboard')}") from error
    for row in result.printed_rows:
        path = folder / "tensorboard" / result.name / _name(row) / _digest(row)
        if path.exists():
            continue
        writer = EventFileWriter(str(path))
        for name, value, step in _numbers(row):
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            writer.add_event(Event(step=step, summary=summary))
        writer.close()
    return folder / "tensorboard"


def _numbers(row: Row) -> Iterator[tuple[str, float, int]]:
    """Yields name, value and step of all finite numbers of a row, curves included."""
    for name, value in row.items():
        for step, number in enumerate(value if isinstance(value, list) else [value]):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and math.isfinite(number):
                yield name, float(number), step


def _digest(row: Row) -> str:
    numbers = repr((row.get("method"), row.get("seed"), list(_numbers(row))))
    return hashlib.sha256(numbers.encode()).hexdigest()[:16]


def _name(row: Row) -> str:
    return f"{row['method']}, seed {row['seed']}"


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _latex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$")
