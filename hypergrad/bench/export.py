"""Rows and tables in the formats of other programs."""

import csv
import datetime
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..runtime import atomic_io
from ..tasks.task import Task
from . import baselines
from .figures import plot
from .report import TableResult, main_table
from .rows import Row
from .table import Table

EXTRA = "needs its extra: pip install 'hypergrad-jax[{}]'"
MAX_METRICS_PER_CALL = 1000  # of MLflow
#: What LaTeX prints as the character.
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "±": r"$\pm$",
}


class TableError(Exception):
    """The data of a table cannot be exported, though those of others may be."""


def export(result: TableResult, kind: str, folder: Path) -> Path | None:
    """Writes a result in a format.

    Args:
      result: The rows of a table.
      kind: One of `WRITERS`.
      folder: Where the file or the store is written.

    Returns:
      The path; None if the table has nothing of this kind.

    Raises:
      ValueError: The format is unknown, or its package is not installed.
      TableError: The data of this table cannot be loaded.
    """
    if kind not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}; got {kind!r}.")
    atomic_io.make_directory(folder)
    return WRITERS[kind](result, folder)


def write_csv(result: TableResult, folder: Path) -> Path:
    """Writes one line per row with all scalar fields and the tuned settings.

    A setting that is a list or a dictionary is JSON.
    """
    as_text = lambda x: x if _is_scalar(x) else json.dumps(x)
    rows = [
        row | {name: as_text(x) for name, x in _setting_fields(row).items()}
        for row in result.printed_rows
    ]
    scalars = (name for row in rows for name, x in row.items() if _is_scalar(x))
    names = list(dict.fromkeys(scalars))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row.get(name, "") for name in names} for row in rows)
    path = folder / f"{result.name}.csv"
    atomic_io.atomic_write(path, text.getvalue())
    return path


def _settings(row: Row) -> dict[str, Any]:
    """Returns the settings of the method of a row, if it has any."""
    settings = row.get("settings")
    return settings if isinstance(settings, dict) else {}


def _setting_fields(row: Row) -> dict[str, Any]:
    """Returns the settings of a row as fields ``settings.NAME``."""
    return {f"settings.{name}": value for name, value in _settings(row).items()}


def write_latex(result: TableResult, folder: Path) -> Path | None:
    """Writes the printed table as a ``booktabs`` tabular.

    Returns None for a table that prints other things than columns of its rows.
    """
    if result.table.body is not None:
        return None
    headings, cells = main_table(result)
    command = result.printed_rows[0]["command"]
    line = lambda row: " & ".join(map(_to_latex, row)) + r" \\"
    columns = "l" + "r" * (len(headings) - 1)
    lines = [
        f"% {command}",
        r"% needs \usepackage{booktabs}",
        f"\\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        line(headings),
        r"\midrule",
        *map(line, cells),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    path = folder / f"{result.name}.tex"
    atomic_io.atomic_write(path, "\n".join(lines) + "\n")
    return path


def write_pdf(result: TableResult, folder: Path) -> Path | None:
    """Writes the figure as a PDF, if the table has one."""
    path = folder / f"{result.name}.pdf"
    return path if plot(result, path) else None


# What others build on: chosen settings, and the data of each seed.


def write_settings(result: TableResult, folder: Path) -> Path | None:
    """Writes the settings that were chosen in each cell as a list in JSON."""
    settings: list[dict[str, Any]] = []
    for row in result.printed_rows:
        chosen = _settings(row) or row.get("setting")  # a dictionary, or one value
        if chosen not in ({}, None):
            names = set(result.table.key_fields) - {"stage", "setting", "setting_index"}
            cell = {name: value for name, value in row.items() if name in names}
            settings.append(cell | {"settings": chosen})
    if not settings:
        return None
    row = result.printed_rows[0]
    record = {name: row.get(name) for name in ("table", "scale", "command", "commit")}
    path = folder / f"{result.name}.settings.json"
    text = json.dumps(record | {"settings": settings}, indent=1)
    atomic_io.atomic_write(path, text + "\n")
    return path


def write_splits(result: TableResult, folder: Path) -> Path | None:
    """Writes the examples of each seed into ``NAME-splits/seed-S.npz``.

    An array is named ``split/name``, such as ``train/x``. The file ``SHA256SUMS``
    beside them is for ``sha256sum --check``.
    """
    table = result.table
    if not isinstance(table, Table):
        return None
    directory, sums = folder / f"{result.name}-splits", []
    for seed in sorted({row["seed"] for row in result.printed_rows}):
        try:
            splits = make_task(table, seed, result.scale).splits
        except (OSError, ValueError) as error:
            raise TableError(f"its data cannot be loaded: {error}") from error
        if splits is None:
            return None
        leaves, _ = jax.tree_util.tree_flatten_with_path(splits)
        name_of = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        arrays = {name_of(path): np.asarray(leaf) for path, leaf in leaves}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)  # pyright: ignore - no name is allow_pickle
        atomic_io.make_directory(directory)
        atomic_io.atomic_write(directory / f"seed-{seed}.npz", file.getvalue())
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        sums.append(f"{digest}  seed-{seed}.npz\n")
    atomic_io.atomic_write(directory / "SHA256SUMS", "".join(sums))
    return directory


def make_task(table: Table, seed: int, scale: str) -> Task:
    """Returns the task of a seed, with all validation examples in use."""
    settings = {name: values[0] for name, values in table.task_grid.items()}
    key, method = jax.random.key(seed), baselines.no_hyperparameters
    return table.make_task(key, scale, method, settings, hold_out=False)


# MLflow.


def write_mlflow(result: TableResult, folder: Path) -> Path:
    """Writes one MLflow run per row into the store ``mlflow.db``, an SQLite file.

    View it with ``mlflow ui --backend-store-uri sqlite:///PATH``. A row that the store
    has already, by a digest of its content, is not written again; an incomplete run of
    it is replaced.
    """
    try:
        from mlflow import MlflowClient  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"MLflow {EXTRA.format('mlflow')}") from error
    path = folder.resolve() / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    experiment = client.get_experiment_by_name(result.name)
    if experiment is None:
        artifacts = (path.parent / "mlruns" / result.name).as_uri()
        experiment_id = client.create_experiment(result.name, artifacts)
    else:
        experiment_id = experiment.experiment_id
    for row in result.printed_rows:
        _write_mlflow_run(client, experiment_id, row)
    return path


def _write_mlflow_run(client: Any, experiment_id: str, row: Row) -> None:
    from mlflow.entities import Metric, Param  # pyright: ignore

    digest, milliseconds = _digest(row), round(1000 * _timestamp(row))
    existing = client.search_runs([experiment_id], f"tags.digest = '{digest}'")
    if any(run.info.status == "FINISHED" for run in existing):
        return
    for incomplete in existing:
        client.delete_run(incomplete.info.run_id)
    run = client.create_run(experiment_id, milliseconds, {"digest": digest}, _name(row))
    run_id = run.info.run_id
    metrics = [
        Metric(_safe(name), x, milliseconds, step) for name, x, step in _numbers(row)
    ]
    for offset in range(0, len(metrics), MAX_METRICS_PER_CALL):
        client.log_batch(
            run_id, metrics=metrics[offset : offset + MAX_METRICS_PER_CALL]
        )
    params = [Param(_safe(k), x[:500]) for k, x in _texts(row).items()]
    client.log_batch(run_id, params=params[:100])
    client.set_terminated(run_id, "FINISHED")


# TensorBoard.


def write_tensorboard(result: TableResult, folder: Path) -> Path:
    """Writes one folder of event files per row, for ``tensorboard --logdir PATH``."""
    try:
        from tensorboard.summary.writer.record_writer import RecordWriter  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"TensorBoard {EXTRA.format('tensorboard')}") from error
    for row in result.printed_rows:
        directory = (
            folder / "tensorboard" / result.name / _safe(_name(row)) / _digest(row)
        )
        path = directory / "events.out.tfevents.rows"
        if path.exists():
            continue
        atomic_io.make_directory(directory)
        draft = path.with_name("draft")  # TensorBoard ignores this name
        draft.unlink(missing_ok=True)  # incomplete, or a link to another file
        with draft.open("xb") as file:
            writer = RecordWriter(file)
            for event in _tensorboard_events(row):
                writer.write(event.SerializeToString())
        draft.replace(path)
    return folder / "tensorboard"


def _tensorboard_events(row: Row) -> Iterator[Any]:
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

    time = _timestamp(row)
    yield Event(wall_time=time, file_version="brain.Event:2")
    for name, value, step in _numbers(row | _setting_fields(row)):
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        yield Event(wall_time=time, step=step, summary=summary)


# Rows.


def _numbers(row: Row) -> Iterator[tuple[str, float, int]]:
    """Yields name, value and step of all finite numbers of a row, curves included."""
    for name, value in row.items():
        for step, number in enumerate(value if isinstance(value, list) else [value]):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and math.isfinite(number):
                yield name, float(number), step


def _texts(row: Row) -> dict[str, str]:
    """Returns the fields of a row that are text, and its settings."""
    texts = {name: x for name, x in row.items() if isinstance(x, str)}
    return texts | {name: str(x) for name, x in _setting_fields(row).items()}


def _digest(row: Row) -> str:
    return hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()[:16]


def _name(row: Row) -> str:
    return f"{row['method']}, seed {row.get('seed', 0)}"


def _safe(name: str) -> str:
    """Returns a name of characters that are allowed in a path and in a metric."""
    return re.sub(r"[^\w\-., ]", "_", name).strip(". ") or "_"


def _timestamp(row: Row) -> float:
    """Returns when the row was made, in seconds since 1970; 0 if it does not say."""
    try:
        return datetime.datetime.fromisoformat(str(row.get("time"))).timestamp()
    except ValueError:
        return 0.0


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _to_latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


WRITERS = {
    "csv": write_csv,
    "latex": write_latex,
    "pdf": write_pdf,
    "settings": write_settings,
    "splits": write_splits,
    "mlflow": write_mlflow,
    "tensorboard": write_tensorboard,
}
