"""Export of runs to the viewers of TensorBoard and MLflow.

Each row of a saved run, or a `Trace`, becomes a run of the viewer with its numbers and
its curves, step by step. A run that the viewer already has, by a digest of its content,
is not written again.
"""

import datetime
import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..studies import record
from ..trace import Trace
from .manifest import Run

Numbers = dict[str, float]
CURVE = re.compile(r"curve(_|$)")  # columns of a row with an entry per step
RUN_FIELDS, ROW_FIELDS = ("ended", "seeds", "methods"), ("method", "seed", "setting")
MAX_METRICS_PER_CALL = 1000  # limit of MLflow
EXTRA = "needs its extra: pip install 'hypergrad-jax[{}]'"


class ExportedRun(NamedTuple):
    """A run as a viewer shows it.

    Attributes:
      name: Name such as ``cleaning/implicit/seed 0``. The part before the first "/" is
        the experiment.
      settings: Texts that describe how the run was made.
      numbers: Numbers of the whole run.
      steps: Finite numbers of each step.
      started: Start in seconds since 1970; 0 if it is unknown.
    """

    name: str
    settings: dict[str, str]
    numbers: Numbers
    steps: list[Numbers]
    started: float = 0.0

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the run; settings do not contribute."""
        content = self.name, self.numbers, self.steps, self.started
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def to_exported_runs(run: Run) -> list[ExportedRun]:
    """Returns an exported run per row, with the metadata of the run as settings."""
    started = _to_seconds(run.sessions[0]["started"])
    metadata = {name: x for name, x in run.metadata.items() if name not in RUN_FIELDS}
    return [
        _row_to_exported_run(run.manifest["task"], metadata, row, started)
        for row in run.rows
    ]


def _row_to_exported_run(
    task: str, metadata: dict[str, str], row: record.Row, started: float
) -> ExportedRun:
    texts = {k: str(x) for k, x in row.items() if isinstance(x, str) or k in ROW_FIELDS}
    curves = {name: x for name, x in row.items() if CURVE.match(name)}
    numbers = {k: x for k, x in row.items() if k not in texts and k not in curves}
    names = [CURVE.sub("", name) or name for name in curves]
    steps = itertools.zip_longest(*curves.values())
    return ExportedRun(
        f"{task}/{row['method']}/seed {row['seed']}",
        metadata | texts,  # a row's own text replaces that of its run
        _select_finite(numbers),
        [_select_finite(dict(zip(names, step, strict=True))) for step in steps],
        started,
    )


def trace_to_exported_run(
    trace: Trace, name: str, settings: Mapping[str, Any] | None = None
) -> ExportedRun:
    """Returns a trace as an exported run with a step per row.

    Args:
      trace: Trace of a single run.
      name: Name such as ``penalties/implicit``.
      settings: Values that describe how the run was made.
    """
    texts = {name: str(x) for name, x in (settings or {}).items()}
    steps = [_select_finite(row) for row in trace.rows()]
    for step in steps:
        del step["step"]
    final_step = steps[-1] if steps else {}
    return ExportedRun(name, texts | {"status": trace.status}, final_step, steps)


def _select_finite(row: Mapping[str, Any]) -> Numbers:
    """Returns the finite numbers of a row as floats.

    The entries of a list are named ``name/0``, ``name/1`` and so on.
    """
    numbers: Numbers = {}
    for name, x in row.items():
        if isinstance(x, list):
            numbers |= _select_finite({f"{name}/{i}": item for i, item in enumerate(x)})
        elif isinstance(x, bool | int | float) and math.isfinite(x):
            numbers[name] = float(x)
    return numbers


def _to_seconds(started: str) -> float:
    try:
        return datetime.datetime.fromisoformat(started).timestamp()
    except ValueError:
        return 0.0  # rows without a manifest do not contain the start


def _numbers_by_step(run: ExportedRun) -> list[tuple[int, Numbers]]:
    """Returns the numbers of each step, and of the whole run with a prefix."""
    # The prefix distinguishes a number from a curve of the same name.
    whole_run = {f"run/{name}": x for name, x in run.numbers.items()}
    return [*enumerate(run.steps), (0, whole_run)]


# TensorBoard.


def to_tensorboard(runs: Iterable[ExportedRun], folder: Path) -> int:
    """Writes event files, a folder per run, for ``tensorboard --logdir FOLDER``.

    Returns:
      The number of runs that were written; existing ones are not written again.

    Raises:
      ValueError: TensorBoard is not installed.
    """
    try:
        from tensorboard.summary.writer.record_writer import RecordWriter  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"TensorBoard {EXTRA.format('tensorboard')}") from error
    num_written = 0
    for run in runs:
        path = folder / _safe_path(run.name) / run.digest / "events.out.tfevents.rows"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{run.digest}.part")  # TensorBoard ignores this name
        with draft.open("wb") as file:
            writer = RecordWriter(file)
            for event in _tensorboard_events(run):
                writer.write(event.SerializeToString())
        draft.replace(path)
        num_written += 1
    return num_written


def _tensorboard_events(run: ExportedRun) -> Iterable[Any]:
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore

    settings = Summary.Value(tag="settings")
    settings.metadata.plugin_data.plugin_name = "text"
    settings.tensor.dtype = 7  # DT_STRING
    text = "\n".join(f"- {name}: {x}" for name, x in run.settings.items())
    settings.tensor.string_val.append(text.encode())
    settings.tensor.tensor_shape.dim.add(size=1)

    yield Event(wall_time=run.started, file_version="brain.Event:2")
    yield Event(wall_time=run.started, summary=Summary(value=[settings]))
    for step, numbers in _numbers_by_step(run):
        values = [Summary.Value(tag=k, simple_value=x) for k, x in numbers.items()]
        yield Event(wall_time=run.started, step=step, summary=Summary(value=values))


def _safe_path(name: str) -> Path:
    """Returns a relative path that stays below its folder for any name."""
    replace = lambda part: re.sub(r"[^\w\-.,]+", "-", part).strip(".") or "-"
    return Path(*map(replace, name.split("/")))


# MLflow.


def to_mlflow(runs: Iterable[ExportedRun], store: Path) -> int:
    """Writes runs to a local MLflow store, an SQLite file, with an experiment per task.

    View them with ``mlflow ui --backend-store-uri sqlite:///STORE``. MLflow sends
    anonymous usage data to its makers unless ``MLFLOW_DISABLE_TELEMETRY=true`` is set.

    Returns:
      The number of runs that were written. Existing ones are not written again, but an
      incomplete one is replaced.

    Raises:
      ValueError: MLflow is not installed.
    """
    try:
        from mlflow import MlflowClient  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"MLflow {EXTRA.format('mlflow')}") from error
    store.parent.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(f"sqlite:///{store}")
    return sum(_write_mlflow_run(client, store, run) for run in runs)


def _write_mlflow_run(client: Any, store: Path, run: ExportedRun) -> bool:
    """Returns True if the run was written, False if the store already has it."""
    from mlflow.entities import Metric, Param  # pyright: ignore

    name = run.name.partition("/")[0]
    experiment = client.get_experiment_by_name(name)
    artifacts = (store.parent / "mlruns" / name).absolute().as_uri()
    if experiment is None:
        experiment_id = client.create_experiment(name, artifacts)
    else:
        experiment_id = experiment.experiment_id
    existing = client.search_runs([experiment_id], f"tags.hypergrad = '{run.digest}'")
    if any(x.info.status == "FINISHED" for x in existing):
        return False
    for incomplete in existing:
        client.delete_run(incomplete.info.run_id)
    time, tags = int(1000 * run.started), {"hypergrad": run.digest}
    run_id = client.create_run(experiment_id, time, tags, run.name).info.run_id
    metrics = [
        Metric(_safe_metric_name(name), x, time, step)
        for step, numbers in _numbers_by_step(run)
        for name, x in numbers.items()
    ]
    for i in range(0, len(metrics), MAX_METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[i : i + MAX_METRICS_PER_CALL])
    params = [Param(_safe_metric_name(name), x) for name, x in run.settings.items()]
    client.log_batch(run_id, params=params)
    client.set_terminated(run_id, "FINISHED")
    return True


def _safe_metric_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)
