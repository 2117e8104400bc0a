"""Exported runs, as the readers of TensorBoard and MLflow return them."""

import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from hypergrad import cli, runs
from hypergrad.runs import commands, export
from hypergrad.studies import STUDIES, record
from tests.bench.toy_study import run_study
from tests.loops import run_loop

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# Both libraries cause warnings when they are imported or used.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def trace() -> hg.Trace:
    """A run with two outer losses and a metric that is evaluated every other step."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        (lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2), lambda w, a, batch: w @ w),
    )
    return run_loop(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), jnp.zeros(2), jnp.ones(2),
        num_steps=3, aggregator=hg.objectives.WeightedSum(jnp.ones(2) / 2),
        metrics={"F1@5": lambda w, alpha, key: jnp.sum(alpha)}, eval_every=2,
    )  # fmt: skip


def export_trace(trace) -> runs.ExportedRun:
    return runs.trace_to_exported_run(trace, "toy/learned", {"rate": 0.1})


def test_each_row_is_a_run_with_its_curves():
    """Checks all rows of a committed table."""
    run = runs.load(RESULTS / "cleaning")
    exported_runs = runs.to_exported_runs(run)
    names = {exported.name for exported in exported_runs}
    assert len(names) == len(exported_runs) == len(run.rows) == 70
    for exported, row in zip(exported_runs, run.rows, strict=True):
        assert exported.name == f"cleaning/{row['method']}/seed {row['seed']}"
        assert exported.settings["method"] == row["method"]
        assert exported.settings["setting"] == str(row["setting"])
        assert exported.numbers["test_accuracy"] == row["test_accuracy"]
        values = [step["value"] for step in exported.steps]
        costs = [step["cost"] for step in exported.steps]
        assert values == row.get("curve_value", [])
        assert costs == row.get("curve_cost", [])


STUDIES_WITH_ROWS = sorted(
    path.stem for path in RESULTS.glob("*.jsonl") if path.stem in STUDIES
)


@pytest.mark.parametrize("name", STUDIES_WITH_ROWS)
def test_all_numbers_of_a_row_are_exported(name: str):
    """They include lists of hyperparameters and curves of different lengths."""
    for row in record.read(RESULTS / f"{name}.jsonl"):
        exported = export._row_to_exported_run(name, {}, row, 0.0)
        step_values = [x for step in exported.steps for x in step.values()]
        fields = {k: x for k, x in row.items() if k not in export.ROW_FIELDS}
        leaves = [x for x in jax.tree.leaves(fields) if not isinstance(x, str)]
        actual = [*exported.numbers.values(), *step_values]
        assert sorted(actual) == sorted(map(float, leaves))


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    """JSON has null for such a number."""
    row = {"method": "one", "seed": 0, "a": None, "b": 1, "curve": [None, 2.0]}
    run = run_study(tmp_path, seeds=1)
    exported = export._row_to_exported_run("toy", {}, row, 0.0)
    assert exported.numbers == {"b": 1.0}
    assert exported.steps == [{}, {"curve": 2.0}]
    assert runs.to_exported_runs(run)[0].started > 1.7e9


def test_trace_is_a_run_with_a_step_per_row(trace):
    """The value of each loss is a number of its own."""
    exported = export_trace(trace)
    assert exported.settings == {"rate": "0.1", "status": "completed"}
    for step, row in zip(exported.steps, trace.rows(), strict=True):
        assert [step["value/0"], step["value/1"]] == row["value"]
        assert step["trusted"] == row["trusted"]
        assert ("F1@5" in step) == ("F1@5" in row)
        assert all(math.isfinite(x) for x in step.values())
    assert exported.digest == export_trace(trace).digest
    assert exported.digest != exported._replace(started=1.0).digest


@pytest.mark.parametrize("to", ["mlflow", "tensorboard"])
def test_missing_extra_is_named(to: str, tmp_path, monkeypatch):
    """The command exits with the line that installs the extra."""
    monkeypatch.setitem(sys.modules, to, None)
    monkeypatch.chdir(tmp_path)
    run = run_study(tmp_path, seeds=1)
    monkeypatch.setattr(sys, "argv", ["hypergrad", "runs", "export", str(run.path), to])
    with pytest.raises(SystemExit, match=rf"pip install 'hypergrad-jax\[{to}\]'"):
        cli.main()
    assert not (tmp_path / "mlflow.db").exists()


# TensorBoard.


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns steps and values, which TensorBoard stores in single precision."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def expected_series(
    exported: runs.ExportedRun, to_name=lambda name: name
) -> dict[str, list]:
    """Returns the numbers of all steps, and of the whole run with a prefix."""
    series: dict[str, list] = {}
    for step, numbers in enumerate(exported.steps):
        for name, x in numbers.items():
            series.setdefault(to_name(name), []).append((step, x))
    whole_run = {to_name(f"run/{k}"): [(0, x)] for k, x in exported.numbers.items()}
    return series | whole_run


def to_single_precision(series: dict) -> dict:
    return {
        name: [(step, float(jnp.float32(x))) for step, x in points]
        for name, points in series.items()
    }


def test_tensorboard_reads_all_numbers(trace, tmp_path, capsys):
    """A second export writes only new rows."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_study(tmp_path / "runs", seeds=1)
    out = tmp_path / "events"
    commands.export_run(run.path, "tensorboard", out)
    assert f"wrote 2 rows\ntensorboard --logdir {out}" in capsys.readouterr().out
    for exported, row in zip(runs.to_exported_runs(run), run.rows, strict=True):
        folder = out / "toy" / row["method"] / "seed-0" / exported.digest
        expected = to_single_precision(expected_series(exported))
        assert read_scalars(folder) == expected
        reader = EventAccumulator(str(folder)).Reload()
        assert reader.FirstEventTimestamp() == exported.started
        text = reader.Tensors("settings")[0].tensor_proto.string_val[0].decode()
        assert f"- method: {row['method']}\n" in text
    contents = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run = run_study(tmp_path / "runs", seeds=2)
    commands.export_run(run.path, "tensorboard", out)
    assert "wrote 2 rows, 2 existed" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in contents} == contents
    assert len([path for path in out.rglob("*") if path.is_file()]) == 4
    first = export_trace(trace)._replace(name="../x y")
    second = first._replace(numbers=first.numbers | {"extra": 1.0})
    assert runs.to_tensorboard([first, second], out) == 2
    for exported in (first, second):
        folder = out / "-" / "x-y" / exported.digest
        expected = to_single_precision(expected_series(exported))
        assert read_scalars(folder) == expected
    assert not list(tmp_path.rglob("*.part"))


# MLflow.


def test_mlflow_reads_all_numbers(trace, tmp_path, capsys):
    """A second export writes new and incomplete rows."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = run_study(tmp_path / "runs", seeds=1)
    out = tmp_path / "store" / "mlflow.db"
    to_name = lambda name: re.sub("[^A-Za-z0-9_. :/-]", "_", name)
    commands.export_run(run.path, "mlflow", out)
    output = capsys.readouterr().out
    assert f"wrote 2 rows\nmlflow ui --backend-store-uri sqlite:///{out}" in output
    client = mlflow.MlflowClient(f"sqlite:///{out}")

    def read_runs(experiment_name: str) -> dict:
        experiment = client.get_experiment_by_name(experiment_name)
        mlflow_runs = client.search_runs([experiment.experiment_id])
        return {x.info.run_name: x for x in mlflow_runs}

    def read_series(mlflow_run) -> dict:
        history = lambda name: client.get_metric_history(mlflow_run.info.run_id, name)
        return {
            name: [(x.step, x.value) for x in history(name)]
            for name in mlflow_run.data.metrics
        }

    mlflow_runs = read_runs("toy")
    for exported in runs.to_exported_runs(run):
        mlflow_run = mlflow_runs.pop(exported.name)
        assert read_series(mlflow_run) == expected_series(exported, to_name)
        params = {to_name(k): x for k, x in exported.settings.items()}
        assert mlflow_run.data.params == params
        assert mlflow_run.info.status == "FINISHED"
        assert mlflow_run.info.start_time == 1000 * exported.started
    assert not mlflow_runs
    run = run_study(tmp_path / "runs", seeds=2)
    experiment_id = client.get_experiment_by_name("toy").experiment_id
    incomplete = client.create_run(experiment_id)
    digest = runs.to_exported_runs(run)[-1].digest
    client.set_tag(incomplete.info.run_id, "hypergrad", digest)  # as a kill leaves it
    commands.export_run(run.path, "mlflow", out)
    assert "wrote 2 rows, 2 existed" in capsys.readouterr().out
    names = {exported.name for exported in runs.to_exported_runs(run)}
    assert set(read_runs("toy")) == names
    exported = export_trace(trace)
    exported = exported._replace(steps=[exported.steps[0]] * 100)  # several calls
    assert runs.to_mlflow([exported], out) == 1
    expected = expected_series(exported, to_name)
    assert read_series(read_runs("toy")["toy/learned"]) == expected
    assert "F1_5" in expected
