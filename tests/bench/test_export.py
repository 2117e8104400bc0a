"""Runs in the stores of MLflow and TensorBoard, read back by their own readers."""

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
from tests.bench.test_runs import start
from tests.loops import run_loop

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# What either library warns of when it is imported or used.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def trace() -> hg.Trace:
    """Of two losses, so that a value is a list; a metric every other step."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        (lambda w, alpha, batch: jnp.sum((w - 1.0) ** 2), lambda w, a, batch: w @ w),
    )
    return run_loop(
        problem, hg.Implicit(hg.Newton()), optax.sgd(0.1), jnp.zeros(2), jnp.ones(2),
        num_steps=3, aggregator=hg.objectives.WeightedSum(jnp.ones(2) / 2),
        metrics={"F1@5": lambda w, alpha, key: jnp.sum(alpha)}, eval_every=2,
    )  # fmt: skip


def shown_trace(trace) -> runs.Shown:
    return runs.of_trace(trace, "toy/learned", {"rate": 0.1})


def test_a_row_is_a_run_with_its_curves():
    """Of the committed table: each finite number, and a step an entry of a curve."""
    run = runs.load(RESULTS / "cleaning")
    shown = runs.of_run(run)
    assert len({one.name for one in shown}) == len(shown) == len(run.rows) == 70
    for one, row in zip(shown, run.rows, strict=True):
        assert one.name == f"cleaning/{row['method']}/seed {row['seed']}"
        assert one.settings["method"] == row["method"]
        assert one.settings["setting"] == str(row["setting"])
        assert one.numbers["test_accuracy"] == row["test_accuracy"]
        assert [step["value"] for step in one.steps] == row.get("curve_value", [])
        assert [step["cost"] for step in one.steps] == row.get("curve_cost", [])


STUDIES_WITH_ROWS = sorted(
    path.stem for path in RESULTS.glob("*.jsonl") if path.stem in STUDIES
)


@pytest.mark.parametrize("name", STUDIES_WITH_ROWS)
def test_no_number_of_a_row_is_lost(name: str):
    """Learned hyperparameters, which are lists, and curves of whatever length too."""
    for row in record.read(RESULTS / f"{name}.jsonl"):
        one = export._of_row(name, {}, row, 0.0)
        told = [*one.numbers.values(), *(x for s in one.steps for x in s.values())]
        own = {k: x for k, x in row.items() if k not in export.OF_ONE}
        leaves = [x for x in jax.tree.leaves(own) if not isinstance(x, str)]
        assert sorted(told) == sorted(map(float, leaves))


def test_what_is_not_finite_is_left_out(tmp_path):
    """JSON has null for it."""
    row = {"method": "one", "seed": 0, "a": None, "b": 1, "curve": [None, 2.0]}
    run = start(tmp_path, seeds=1)
    one = export._of_row("toy", {}, row, 0.0)
    assert one.numbers == {"b": 1.0}
    assert one.steps == [{}, {"curve": 2.0}]
    assert runs.of_run(run)[0].started > 1.7e9


def test_a_trace_is_a_run(trace):
    """Each step's numbers as its rows have them; of several losses one a loss."""
    shown = shown_trace(trace)
    assert shown.settings == {"rate": "0.1", "status": "completed"}
    for step, row in zip(shown.steps, trace.rows(), strict=True):
        assert [step["value/0"], step["value/1"]] == row["value"]
        assert step["trusted"] == row["trusted"]
        assert ("F1@5" in step) == ("F1@5" in row)
        assert all(math.isfinite(x) for x in step.values())
    assert shown.digest == shown_trace(trace).digest
    assert shown.digest != shown._replace(started=1.0).digest


@pytest.mark.parametrize("to", ["mlflow", "tensorboard"])
def test_what_is_not_installed_is_named(to: str, tmp_path, monkeypatch):
    """Through the command, as README writes it."""
    monkeypatch.setitem(sys.modules, to, None)
    monkeypatch.chdir(tmp_path)
    run = start(tmp_path, seeds=1)
    monkeypatch.setattr(sys, "argv", ["hypergrad", "runs", "export", str(run.path), to])
    with pytest.raises(SystemExit, match=rf"pip install 'hypergrad-jax\[{to}\]'"):
        cli.main()
    assert not (tmp_path / "mlflow.db").exists()


# TensorBoard.


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By its own reader; in single precision, as it keeps them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def expected(shown: runs.Shown, legal=lambda name: name) -> dict[str, list]:
    """Of its steps and, apart, of the whole run."""
    series: dict[str, list] = {}
    for step, numbers in enumerate(shown.steps):
        for name, x in numbers.items():
            series.setdefault(legal(name), []).append((step, x))
    return series | {legal(f"run/{k}"): [(0, x)] for k, x in shown.numbers.items()}


def in_single(series: dict) -> dict:
    return {
        k: [(step, float(jnp.float32(x))) for step, x in v] for k, v in series.items()
    }


def test_tensorboard_reads_what_was_written(trace, tmp_path, capsys):
    """Every number of every step, the settings, the time; nothing twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = start(tmp_path / "runs", seeds=1)
    out = tmp_path / "events"
    commands.export_run(run.path, "tensorboard", out)
    assert f"wrote 2 rows\ntensorboard --logdir {out}" in capsys.readouterr().out
    for shown, row in zip(runs.of_run(run), run.rows, strict=True):
        folder = out / "toy" / row["method"] / "seed-0" / shown.digest
        assert scalars(folder) == in_single(expected(shown))
        found = EventAccumulator(str(folder)).Reload()
        assert found.FirstEventTimestamp() == shown.started
        text = found.Tensors("settings")[0].tensor_proto.string_val[0].decode()
        assert f"- method: {row['method']}\n" in text
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    run = start(tmp_path / "runs", seeds=2)
    commands.export_run(run.path, "tensorboard", out)
    assert "wrote 2 rows, 2 were there" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in files} == files
    assert len([path for path in out.rglob("*") if path.is_file()]) == 4
    shown = shown_trace(trace)._replace(name="../x y")
    again = shown._replace(numbers=shown.numbers | {"extra": 1.0})
    assert runs.to_tensorboard([shown, again], out) == 2
    for one in (shown, again):
        folder = out / "-" / "x-y" / one.digest
        assert scalars(folder) == in_single(expected(one))
    assert not list(tmp_path.rglob("*.part"))


# MLflow.


def test_mlflow_reads_what_was_written(trace, tmp_path, capsys):
    """Every number of every step, the settings, the time; what was begun, anew."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = start(tmp_path / "runs", seeds=1)
    out = tmp_path / "store" / "mlflow.db"
    legal = lambda name: re.sub("[^A-Za-z0-9_. :/-]", "_", name)
    commands.export_run(run.path, "mlflow", out)
    said = capsys.readouterr().out
    assert f"wrote 2 rows\nmlflow ui --backend-store-uri sqlite:///{out}" in said
    client = mlflow.MlflowClient(f"sqlite:///{out}")

    def there(group: str) -> dict:
        experiment = client.get_experiment_by_name(group)
        found = client.search_runs([experiment.experiment_id])
        return {one.info.run_name: one for one in found}

    def series(one) -> dict:
        history = lambda name: client.get_metric_history(one.info.run_id, name)
        return {
            name: [(x.step, x.value) for x in history(name)]
            for name in one.data.metrics
        }

    found = there("toy")
    for shown in runs.of_run(run):
        one = found.pop(shown.name)
        assert series(one) == expected(shown, legal)
        assert one.data.params == {legal(k): x for k, x in shown.settings.items()}
        assert one.info.status == "FINISHED"
        assert one.info.start_time == 1000 * shown.started
    assert not found
    run = start(tmp_path / "runs", seeds=2)
    begun = client.create_run(client.get_experiment_by_name("toy").experiment_id)
    digest = runs.of_run(run)[-1].digest
    client.set_tag(begun.info.run_id, "hypergrad", digest)  # what a kill leaves
    commands.export_run(run.path, "mlflow", out)
    assert "wrote 2 rows, 2 were there" in capsys.readouterr().out
    assert set(there("toy")) == {shown.name for shown in runs.of_run(run)}
    many = shown_trace(trace)
    many = many._replace(steps=[many.steps[0]] * 100)  # beyond a thousand at a time
    assert runs.to_mlflow([many], out) == 1
    assert series(there("toy")["toy/learned"]) == expected(many, legal)
    assert "F1_5" in expected(many, legal)
