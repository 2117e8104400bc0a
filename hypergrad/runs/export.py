"""Runs for the viewers of others: TensorBoard's event files, a local MLflow store.

Each row of a kept run, or a `Trace`, is a run there, with its numbers and its curves,
step by step. What is there already, by a digest of all of it, is not written again.
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
CURVE = re.compile(r"curve(_|$)")  # of a row, the columns with an entry a step
OF_ALL, OF_ONE = ("ended", "seeds", "methods"), ("method", "seed", "setting")
MOST = 1000  # metrics at a time, by MLflow's rules
EXTRA = "needs its extra: pip install 'hypergrad-jax[{}]'"


class Shown(NamedTuple):
    """What is one run in a viewer.

    Attributes:
      name: such as ``cleaning/implicit/seed 0``; before its first "/" stands what it
        belongs to.
      settings: what it was made with, in words.
      numbers: of the whole run.
      steps: numbers of each step, none that is not finite.
      started: in seconds since 1970; 0 where it is not known.
    """

    name: str
    settings: dict[str, str]
    numbers: Numbers
    steps: list[Numbers]
    started: float = 0.0

    @property
    def digest(self) -> str:
        """By which it is known again, whatever else is said of it: 16 digits."""
        known = self.name, self.numbers, self.steps, self.started
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def of_run(run: Run) -> list[Shown]:
    """One a row, with the facts of its run; the row's own go over them."""
    started = _seconds(run.sessions[0]["started"])
    facts = {name: x for name, x in run.facts.items() if name not in OF_ALL}
    return [_of_row(run.manifest["task"], facts, row, started) for row in run.rows]


def _of_row(task: str, facts: dict[str, str], row: record.Row, started: float) -> Shown:
    words = {k: str(x) for k, x in row.items() if isinstance(x, str) or k in OF_ONE}
    curves = {name: x for name, x in row.items() if CURVE.match(name)}
    numbers = {k: x for k, x in row.items() if k not in words and k not in curves}
    names = [CURVE.sub("", name) or name for name in curves]
    steps = itertools.zip_longest(*curves.values())
    return Shown(
        f"{task}/{row['method']}/seed {row['seed']}",
        facts | words,
        _finite(numbers),
        [_finite(dict(zip(names, step, strict=True))) for step in steps],
        started,
    )


def of_trace(
    trace: Trace, name: str, settings: Mapping[str, Any] | None = None
) -> Shown:
    """The rows of a trace, as the steps of one run.

    Args:
      trace: of one run, no batch.
      name: such as ``penalties/implicit``.
      settings: what it was made with.
    """
    words = {name: str(x) for name, x in (settings or {}).items()}
    steps = [_finite(row) for row in trace.rows()]
    for step in steps:
        del step["step"]
    last = steps[-1] if steps else {}
    return Shown(name, words | {"status": trace.status}, last, steps)


def _finite(row: Mapping[str, Any]) -> Numbers:
    """Its numbers, truth as 0 and 1; of a list each, as ``name/0`` and so on."""
    found: Numbers = {}
    for name, x in row.items():
        if isinstance(x, list):
            found |= _finite({f"{name}/{i}": each for i, each in enumerate(x)})
        elif isinstance(x, bool | int | float) and math.isfinite(x):
            found[name] = float(x)
    return found


def _seconds(started: str) -> float:
    try:
        return datetime.datetime.fromisoformat(started).timestamp()
    except ValueError:
        return 0.0  # rows alone do not say


def to_tensorboard(shown: Iterable[Shown], folder: Path) -> int:
    """Event files in a folder a run, for ``tensorboard --logdir FOLDER``.

    Returns:
      How many were written; one that is there already is not.

    Raises:
      ValueError: TensorBoard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore
        from tensorboard.summary.writer.record_writer import RecordWriter  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"TensorBoard {EXTRA.format('tensorboard')}") from error

    def events(one: Shown) -> Iterable[Any]:
        yield Event(wall_time=one.started, file_version="brain.Event:2")
        yield Event(wall_time=one.started, summary=Summary(value=[words(one)]))
        for place, numbers in [*enumerate(one.steps), (0, _named(one.numbers))]:
            value = [Summary.Value(tag=k, simple_value=x) for k, x in numbers.items()]
            yield Event(wall_time=one.started, step=place, summary=Summary(value=value))

    def words(one: Shown) -> Any:
        text = "\n".join(f"- {name}: {x}" for name, x in one.settings.items())
        value = Summary.Value(tag="settings")
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.string_val.append(text.encode())
        value.tensor.tensor_shape.dim.add(size=1)
        return value

    written = 0
    for one in shown:
        path = folder / _path(one.name) / one.digest / "events.out.tfevents.rows"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{one.digest}.part")  # no name that is looked for
        with draft.open("wb") as file:
            records = RecordWriter(file)
            for event in events(one):
                records.write(event.SerializeToString())
        draft.replace(path)
        written += 1
    return written


def to_mlflow(shown: Iterable[Shown], store: Path) -> int:
    """Runs in a local MLflow store, a file of SQLite, in experiments by task.

    For ``mlflow ui --backend-store-uri sqlite:///STORE``. MLflow tells its makers,
    without names, what of it is used, but where ``MLFLOW_DISABLE_TELEMETRY=true``.

    Returns:
      How many were written; one that is there already is not, and one that was begun
      and not ended is written anew.

    Raises:
      ValueError: MLflow is not installed.
    """
    try:
        from mlflow import MlflowClient  # pyright: ignore
        from mlflow.entities import Metric, Param  # pyright: ignore
    except ImportError as error:
        raise ValueError(f"MLflow {EXTRA.format('mlflow')}") from error
    store.parent.mkdir(parents=True, exist_ok=True)
    client, written = MlflowClient(f"sqlite:///{store}"), 0
    for one in shown:
        group = one.name.partition("/")[0]
        known = client.get_experiment_by_name(group)
        place = (store.parent / "mlruns" / group).absolute().as_uri()
        where = known.experiment_id if known else client.create_experiment(group, place)
        there = client.search_runs([where], f"tags.hypergrad = '{one.digest}'")
        if any(run.info.status == "FINISHED" for run in there):
            continue
        for run in there:
            client.delete_run(run.info.run_id)
        time = int(1000 * one.started)
        tags = {"hypergrad": one.digest}
        run = client.create_run(where, time, tags, one.name).info.run_id
        steps = [*enumerate(one.steps), (0, _named(one.numbers))]
        metrics = [
            Metric(_legal(name), x, time, step)
            for step, numbers in steps
            for name, x in numbers.items()
        ]
        for first in range(0, len(metrics), MOST):
            client.log_batch(run, metrics=metrics[first : first + MOST])
        params = [Param(_legal(name), x) for name, x in one.settings.items()]
        client.log_batch(run, params=params)
        client.set_terminated(run, "FINISHED")
        written += 1
    return written


def _named(numbers: Numbers) -> Numbers:
    """Apart from a curve of the same name."""
    return {f"run/{name}": x for name, x in numbers.items()}


def _legal(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)


def _path(name: str) -> Path:
    """Below the folder, whatever the name."""
    legal = lambda part: re.sub(r"[^\w\-.,]+", "-", part).strip(".") or "-"
    return Path(*map(legal, name.split("/")))
