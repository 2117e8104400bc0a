"""Runs of a table: tuning, resuming, refusing, and methods of a user's own."""

import concurrent.futures
import dataclasses
import importlib.metadata
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import subprocess
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from hypergrad.bench import (
    Table,
    baselines,
    loading,
    provenance,
    select,
    with_options,
)
from hypergrad.bench.check import mixed_fields
from hypergrad.bench.methods import MethodError, check_method
from hypergrad.bench.report import TableResult, to_markdown
from hypergrad.bench.rows import read_rows
from hypergrad.bench.runner import RunOptions, run_table
from hypergrad.bench.source import package_files
from hypergrad.bench.timing import measure_seconds
from hypergrad.bench.workers import WorkerPool, executor_of
from hypergrad.runtime import machine
from hypergrad.runtime.atomic_io import lock_file
from tests.processes import start_python

TIMES = {"run_seconds", "compile_seconds", "time"}


def numbers_of(rows: list[dict]) -> list[dict]:
    """Returns rows without what differs from run to run, in a fixed order."""
    rows = [{k: x for k, x in row.items() if k not in TIMES} for row in rows]
    names = ("stage", "method", "setting_index", "seed")
    return sorted(rows, key=lambda row: str([row.get(name) for name in names]))


def labels_and_seeds(rows: list[dict]) -> set:
    return {(row.get("stage"), row["method"], row["seed"]) for row in rows}


def test_every_method_is_tuned_on_held_out_data_and_reported_without(run):
    result = run()
    reported = [row for row in result.rows if "stage" not in row]
    assert labels_and_seeds(reported) == {
        (None, method, seed)
        for method in ("nothing", "random", "descent")
        for seed in range(2)
    }
    tuning = select(result.rows, stage="tuning")
    assert {row["method"] for row in tuning} == {"descent"}  # others have no grid
    for row in select(reported, method="descent"):
        # A rate of 0.2 contracts the distance by 0.6 a step, and 0.01 by 0.98.
        assert row["settings"] == {"learning_rate": 0.2}
        costs = [x["gradient_equivalents"] for x in tuning if x["seed"] == row["seed"]]
        np.testing.assert_allclose(row["tuning_cost"], sum(costs))
        assert row["distance"] < 0.2


def test_an_interrupted_run_continues_and_ends_with_the_same_rows(run, tmp_path):
    whole = run().rows
    path = tmp_path / "out" / "quadratic.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    result = run()
    assert numbers_of(result.rows) == numbers_of(whole)
    assert path.read_bytes().splitlines()[:4] == [x.rstrip(b"\n") for x in lines[:4]]


def test_rows_of_other_source_are_refused(run_own, own_file):
    run_own(only=("nothing",))
    own_file.write_text(own_file.read_text() + "\n# another version\n")
    with pytest.raises(ValueError, match="another source"):
        run_own()


@pytest.mark.parametrize("name", ["quadratic.py", "mine.py"])
def test_source_that_changes_after_its_import_is_refused(run_own, own_file, name):
    """The process, or a worker, would run other code than its rows would name.

    The source is that of the import also if the table is loaded with another budget, as
    in a notebook.
    """
    run_own("mine.py:stay", only=("stay",), seeds=1)
    path = own_file.with_name(name)
    text = path.read_text()
    path.write_text(text + "\n# another version\n")
    with pytest.raises(ValueError, match="source of the table changed"):
        run_own("mine.py:stay", only=("stay",), seeds=1, out="other", budget=30)
    assert not read_rows(own_file.parent / "other" / "quadratic.jsonl")
    path.write_text(text)
    assert len(run_own("mine.py:stay", only=("stay",), seeds=1, out="other").rows) == 1


def test_rows_of_another_machine_are_continued_with_a_warning(run, monkeypatch):
    rows = run("mine.py:stay", seeds=1, only=("nothing",)).rows
    here = machine.describe_machine()
    assert all(row["machine"] == here for row in rows)
    other = {"processor": "other", "vector instructions": "avx"}
    monkeypatch.setattr(machine, "_describe_processor", lambda: other)
    with pytest.warns(UserWarning, match="rows of .*made on another machine.*other"):
        rows = run("mine.py:stay", seeds=2, only=("nothing",)).rows
    assert [row["machine"] for row in rows] == [here, other]


def test_a_continued_run_says_how_many_cells_were_made_before(run):
    run(only=("nothing",), seeds=1)
    labels = []
    run(
        "mine.py:all_settings_fail",
        only=("nothing", "all_settings_fail"),
        progress=lambda done, total, label: labels.append(label),
    )
    # The second stage leaves out the method that failed in the first one.
    tuned = ["all_settings_fail"] * 4
    assert labels == ["", *tuned, "1 made before", "nothing"]


def test_rows_of_another_budget_are_refused(run):
    run(only=("nothing",))
    with pytest.raises(ValueError, match="another budget"):
        run(budget=30)


def test_a_budget_may_be_written_as_an_integer_or_not(run):
    """The command line makes a float of it, and a table usually has an integer."""
    run(only=("nothing",))
    rows = run(budget=60.0).rows
    assert {str(row["budget"]) for row in rows} == {"60", "60.0"}
    assert mixed_fields(rows) == []
    assert len(mixed_fields([*rows, rows[0] | {"budget": 30}])) == 1


def test_rows_of_other_data_are_refused(run, monkeypatch):
    run(only=("nothing",))
    monkeypatch.setattr("hypergrad.bench.runner.data_fingerprint", lambda table: "new")
    with pytest.raises(ValueError, match="another data"):
        run()


def test_rows_of_an_edited_method_are_refused(run_own, own_file):
    run_own("mine.py:stay", only=("stay",))
    run_own(only=("nothing",))  # rows of a method that is not asked for stay there
    path = own_file.with_name("mine.py")
    path.write_text(path.read_text() + "\n# another version\n")
    with pytest.raises(ValueError, match="another method_source"):
        run_own("mine.py:stay")


def test_two_runs_do_not_write_to_one_file(run, tmp_path):
    run(only=("nothing",))
    path = tmp_path / "out" / "quadratic.jsonl"
    with path.open("a") as file:
        lock_file(file, path)
        with pytest.raises(ValueError, match="another process"):
            run()


def test_a_pool_of_processes_measures_the_same_rows(run, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")  # of the workers, as of this process
    alone = run(out="alone").rows
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        together = run(out="together", executor=pool).rows
    assert numbers_of(together) == numbers_of(alone)


@pytest.mark.parametrize("library", ["distributed", "submitit"])
def test_executors_of_other_libraries_measure_the_same_rows(
    run, tmp_path, monkeypatch, library
):
    module = pytest.importorskip(library)
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    options = {"only": ("nothing",), "out": "together"}
    if library == "distributed":
        with module.Client(n_workers=2, threads_per_worker=1) as client:
            together = run(executor=client, **options).rows
    else:
        executor = module.LocalExecutor(folder=tmp_path / "jobs")
        together = run(executor=executor, **options).rows
    alone = run(only=("nothing",), out="alone").rows
    assert numbers_of(together) == numbers_of(alone)


def completed(result):
    """Returns a future that has this result."""
    future = concurrent.futures.Future()
    future.set_result(result)
    return future


class OtherDevice:
    """An executor that measures here and says that it has another device."""

    def __init__(self, device):
        self.device = device

    def submit(self, fn, *arguments):
        return completed(fn(*arguments) | {"device": self.device})


def test_rows_name_the_device_of_the_worker_that_measured_them(run):
    """This process may have another one; workers that differ do not share a file."""
    executor = OtherDevice("GPU")
    rows = run(only=("nothing",), seeds=1, executor=executor).rows
    rows = run(only=("nothing",), seeds=2, executor=executor).rows
    assert [row["device"] for row in rows] == ["GPU", "GPU"]
    with pytest.raises(ValueError, match=r"another device \(TPU, before GPU\)"):
        run(only=("nothing",), seeds=3, executor=OtherDevice("TPU"))
    with pytest.raises(ValueError, match="another device"):
        run(only=("nothing",), seeds=3)


class FragileExecutor:
    """An executor that ends with one method, and once with the cell after it."""

    def __init__(self, label):
        self.label, self.num_calls = label, 0

    def submit(self, fn, *arguments):
        future = concurrent.futures.Future()
        self.num_calls += 1
        if arguments[1]["method"] == self.label or self.num_calls == 3:
            future.set_exception(BrokenProcessPool("it was terminated"))
        else:
            future.set_result(fn(*arguments))
        return future


def test_a_method_that_ends_its_worker_fails_alone(run):
    """The third cell, `random` of seed 0, is measured again and has its row."""
    executor = FragileExecutor("nothing")
    result = run(only=("nothing", "random"), executor=executor)
    assert labels_and_seeds(result.rows) == {(None, "random", 0), (None, "random", 1)}
    message = "BrokenProcessPool of the worker: it was terminated"
    assert result.failures == {"nothing": message}


def test_an_executor_that_has_ended_fails_every_cell(run):
    pool = concurrent.futures.ProcessPoolExecutor(1)
    with mock.patch.object(pool, "submit", side_effect=BrokenProcessPool("it ended")):
        result = run(only=("nothing", "random"), executor=pool)
    assert not result.rows
    assert list(result.failures) == ["nothing", "random"]


def test_a_pool_is_replaced_when_a_process_has_ended():
    pool = WorkerPool(1)
    with pytest.raises(BrokenProcessPool):
        pool.submit(os._exit, 3).result()
    assert pool.submit(abs, -2).result() == 2
    pool.shutdown()


def test_a_run_that_is_stopped_ends_its_processes():
    """Neither the cell that runs nor one that waits is finished."""
    processes, futures = [], []
    others = multiprocessing.active_children()

    def run_until_stopped():
        with executor_of(2) as pool:
            pool.submit(abs, -2).result()
            futures.extend(pool.submit(time.sleep, 10_000) for _ in range(9))
            processes.extend(set(multiprocessing.active_children()) - set(others))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until_stopped()
    assert len(processes) == 2
    # The thread of the pool waits for the same processes, and `is_alive` may be wrong
    # while it does. The sentinel of a process is ready once the process has ended.
    for process in processes:
        assert multiprocessing.connection.wait([process.sentinel], timeout=60)
    with pytest.raises((concurrent.futures.CancelledError, BrokenProcessPool)):
        futures[-1].result()


def test_workers_end_when_their_parent_is_killed():
    """They hold its standard output open, which is read until they have ended."""
    source = """
        import time
        from hypergrad.bench.workers import WorkerPool
        pool = WorkerPool(1)
        pool.submit(abs, -2).result()
        pool.submit(time.sleep, 600)
        print("busy", flush=True)
        time.sleep(600)
    """
    with start_python(source, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        process.kill()
        process.communicate(timeout=60)


def test_blocks_that_are_measured_may_contain_others():
    with measure_seconds() as outer:
        with measure_seconds() as first:
            pass
        with measure_seconds() as second:
            time.sleep(0.01)
    assert outer.total >= first.total + second.total > 0.01


def test_data_files_of_the_package_are_in_its_digest(tmp_path):
    for name in ("code.py", "cells.jsonl", "sizes.json", "py.typed"):
        (tmp_path / name).touch()
    names = [path.name for path in package_files(tmp_path)]
    assert names == ["cells.jsonl", "code.py", "sizes.json"]


def test_a_copied_method_has_the_same_numbers(run):
    result = run("mine.py:copy_of_descent", seeds=5)
    mine = select(result.rows, method="copy_of_descent")
    theirs = select(result.rows, method="descent")
    ignored = {"method", "method_source"}
    without = lambda rows: [
        {k: x for k, x in row.items() if k not in ignored} for row in numbers_of(rows)
    ]
    assert without(mine) == without(theirs)
    assert len(mine) == 15  # five seeds at two rates, and reported


def test_a_method_may_have_a_multiple_of_the_budget(run):
    result = run("mine.py:stay", "mine.py:long_stay", only=("stay", "long_stay"))
    costs = lambda method: [
        row["gradient_equivalents"] for row in select(result.rows, method=method)
    ]
    # A run may exceed its budget by one step.
    assert min(costs("long_stay")) > 1.6 * max(costs("stay"))
    assert not result.failures


def test_methods_get_the_settings_of_their_task_and_the_key_of_the_table(shared_file):
    calls = []
    toy_table = loading.load_table(shared_file)
    assert isinstance(toy_table, Table)

    def make(key, scale, *, penalty=0.0):
        calls.append(penalty)
        return toy_table.task(key, scale)

    def method(task, *, budget, key):
        calls.append(key)
        return baselines.trace_of_point(task, task.w, task.alpha, key)

    other = with_options(method, task_settings={"penalty": 3.0})
    table = dataclasses.replace(
        toy_table,
        task=make,
        methods={"plain": method, "other": other},
        method_key=lambda key: key,
    )
    for label in table.methods:
        table.measure({"method": label, "seed": 3}, "small", [])
    assert calls == [0.0, jax.random.key(3), 3.0, jax.random.key(3)]


def test_the_cost_of_a_selection_is_counted_as_tuning(shared_file):
    toy_table = loading.load_table(shared_file)
    assert isinstance(toy_table, Table)
    cell = {"stage": "tuning", "method": "descent", "setting_index": 0, "seed": 0}
    costs = [
        dataclasses.replace(toy_table, selection_cost=cost).measure(cell, "small", [])
        for cost in (0.0, 7.0)
    ]
    first, second = (row["gradient_equivalents"] for row in costs)
    assert second == first + 7


def test_a_copy_with_options_leaves_the_method_unchanged():
    method = with_options(baselines.implicit, grid={"learning_rate": (1,)})
    copy = with_options(method, budget_factor=2)
    assert vars(copy) == {"grid": {"learning_rate": (1,)}, "budget_factor": 2}
    assert not hasattr(method, "budget_factor")
    check_method("copy", copy)


def test_a_method_does_not_get_the_metrics_of_the_test_data(run):
    assert not run("mine.py:peeks", only=("peeks",)).failures


def test_two_methods_of_one_name_are_refused(run):
    with pytest.raises(ValueError, match="different functions"):
        run("mine.py:stay", "mine.py:stay")


def test_a_foreign_file_is_refused_and_left_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "quadratic.jsonl"
    path.write_text("notes of mine\nwithout an end")
    with pytest.raises(ValueError, match="line 1"):
        run(only=("nothing",))
    assert path.read_text() == "notes of mine\nwithout an end"


def test_a_file_with_a_repeated_row_is_refused_before_anything_is_measured(
    run, tmp_path
):
    rows = run(seeds=1, only=("nothing",)).rows
    path = tmp_path / "out" / "quadratic.jsonl"
    path.write_text(2 * path.read_text())
    labels = []
    with pytest.raises(ValueError, match="several rows of one cell: nothing, 0"):
        run(seeds=2, progress=lambda done, total, label: labels.append(label))
    assert labels == []
    assert read_rows(path) == 2 * rows


@pytest.mark.page
def test_the_table_of_the_documentation_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs/tables.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (text,) = [block for block in blocks if "Task(" in block]
    file = tmp_path / "ridge.py"
    file.write_text(text)
    ref = loading.TableRef(file, (), 100)
    result = run_table(ref, RunOptions("small", 1, tmp_path, ""))
    assert not result.failures
    errors = {
        row["method"]: row["test_error"] for row in select(result.rows, stage=None)
    }
    assert list(errors) == ["no search", "random search", "implicit"]
    assert min(errors.values()) > 1.0  # the variance of the noise


def test_runs_that_stopped_early_are_counted_with_the_reason(run, shared_file):
    rows = run("mine.py:stops", only=("nothing", "stops")).rows
    result = TableResult("quadratic", loading.load_table(shared_file), rows)
    text = to_markdown(result)
    assert (
        "stops: 2 of 2 runs were not completed, of seeds 0, 1 "
        "(stopped: the outer value is not finite)" in text
    )
    assert "nothing: " not in text
    assert "was added with `--method`" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "RuntimeError in mine.py, line .*: the disk is full"),
        ("exits", "SystemExit in mine.py, line .*: 0"),
        ("returns_nan", "not finite"),
        ("returns_number", "must return the hg.Trace .* got float"),
        ("over_budget", r"cost .*; its budget is 60"),
        ("without_cost", "must return its cost"),
        ("all_settings_fail", "RuntimeError .*: no size works"),
        ("ends_in_nan", "no setting of its grid .*: the run ended with values that"),
    ],
)
def test_a_method_that_fails_is_named_and_the_other_rows_stay(run, name, message):
    result = run(f"mine.py:{name}", only=("nothing", name))
    assert labels_and_seeds(select(result.rows, stage=None)) == {
        (None, "nothing", 0),
        (None, "nothing", 1),
    }
    assert list(result.failures) == [name]
    assert re.search(message, result.failures[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong_signature", "budget and key"),
        ("no_grid", "no grid"),
        ("number_grid", r"sequence of its values.*got \{'learning_rate': 0.1\}"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_a_method_that_cannot_be_called_is_refused_before_anything_runs(
    run, tmp_path, name, message
):
    with pytest.raises(MethodError, match=message):
        run(f"mine.py:{name}")
    assert not (tmp_path / "out").exists()


# A row must be found again by the cell whose row it is.

MEASUREMENTS = """
from hypergrad.bench import MeasurementTable, Stage

tuning = Stage(
    "tuning",
    lambda scale, seeds: [{{"method": "a", "seed": 0, "rate": 0.1}}],
    lambda cell, rows: {{"loss": 1.0}},
)
table = MeasurementTable(
    cells=lambda scale, seeds: [{{"method": "a", "seed": 0, **{cell}}}],
    measure_cell=lambda cell, rows: {outcome},
    earlier_stages=(tuning,),
)
"""


def run_measurements(folder: Path, cell: dict, outcome: dict):
    """Runs a table with a tuning stage, and with one cell and its measured fields."""
    file = folder / "toy.py"
    text = lambda fields: repr(fields).replace("inf", "float('inf')")
    file.write_text(MEASUREMENTS.format(cell=text(cell), outcome=text(outcome)))
    options = RunOptions("small", 1, folder / "out", "")
    return run_table(loading.TableRef(file), options)


@pytest.mark.parametrize(
    ("cell", "outcome", "message"),
    [
        ({}, {"rate": 0.2}, r"rate \(None, in the row 0.2\)"),
        ({"size": 3}, {"size": 4}, r"size \(3, in the row 4\)"),
        ({"size": math.inf}, {}, r"size \(inf, in the row None\)"),
    ],
)
def test_a_row_with_other_fields_than_its_cell_is_refused(
    tmp_path, cell, outcome, message
):
    """The run would measure the cell again and again."""
    with pytest.raises(ValueError, match=message):
        run_measurements(tmp_path, cell, outcome)
    (row,) = read_rows(tmp_path / "out" / "toy.jsonl")
    assert row["stage"] == "tuning"


def test_a_measured_field_does_not_hide_the_origin_of_a_row(tmp_path):
    result = run_measurements(tmp_path, {}, {"time": 3.0, "machine": 1, "loss": 2.0})
    assert "must not return the fields machine, time" in result.failures["a"]
    assert [row.get("stage") for row in result.rows] == ["tuning"]


ONE_BAD = """
from hypergrad.bench import MeasurementTable

table = MeasurementTable(
    cells=lambda scale, seeds: [{{"method": x, "seed": 0}} for x in ("bad", "good")],
    measure_cell=lambda cell, rows: {outcome} if cell["method"] == "bad" else {{}},
)
"""


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ("{'stage': 'late'}", "must not return the fields stage"),
        ("{'converted_from': 'a'}", "must not return the fields converted_from"),
        ("{'loss': max}", "got <built-in function max> for 'loss'"),
        ("{'loss': [1.0, 2j]}", "for 'loss'"),
    ],
    ids=["stage", "origin", "function", "complex"],
)
def test_a_result_that_is_no_row_of_its_cell_fails_alone(tmp_path, outcome, message):
    """Its row would not be among the reported ones, or could not be written."""
    file = tmp_path / "toy.py"
    file.write_text(ONE_BAD.format(outcome=outcome))
    result = run_table(
        loading.TableRef(file), RunOptions("small", 1, tmp_path / "out", "")
    )
    assert message in result.failures["bad"]
    assert [row["method"] for row in result.rows] == ["good"]


CALLS = """
calls = []

def fails(task, *, budget, key, rate):
    calls.append(rate)
    raise RuntimeError("it needs another argument")

fails.grid = {"rate": (1, 2, 3)}
"""


def test_a_method_that_fails_in_its_tuning_is_not_run_again(run_own, own_file):
    file = own_file.with_name("calls.py")
    file.write_text(CALLS)
    result = run_own("calls.py:fails", only=("fails", "nothing"))
    assert loading.import_file(file).calls == [1]
    assert "another argument" in result.failures["fails"]
    assert {row["method"] for row in result.rows} == {"nothing"}


def test_an_executor_does_not_tune_a_method_that_failed(run_own, own_file):
    """With one cell at a time; else others may run when the first one fails."""
    file = own_file.with_name("calls.py")
    file.write_text(CALLS)
    executor = mock.Mock()
    executor.submit = lambda fn, *arguments: completed(fn(*arguments))
    run_own("calls.py:fails", only=("fails",), executor=executor, max_pending=1)
    assert loading.import_file(file).calls == [1]


def test_rows_of_other_settings_of_jax_are_refused(run):
    run(only=("nothing",), seeds=1)
    with (
        jax.default_prng_impl("rbg"),
        pytest.raises(ValueError, match=r"another jax_settings.*threefry2x32.*rbg"),
    ):
        run(only=("nothing",), seeds=2)


def test_versions_of_installed_packages_of_some_tables_are_in_the_rows(monkeypatch):
    versions = importlib.metadata.version
    absent = importlib.metadata.PackageNotFoundError

    def version(name):
        if name == "optuna":
            raise absent
        return "9.9" if name == "flax" else versions(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    recorded = provenance.describe_process()["versions"]
    assert recorded["flax"] == "9.9"
    assert "optuna" not in recorded


@pytest.mark.parametrize("name", ["budget", "data", "scale", "time"])
def test_a_cell_with_a_field_of_the_origin_of_rows_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"cells must not have the fields {name}"):
        run_measurements(tmp_path, {name: 3}, {})
    assert not (tmp_path / "out").exists()


def test_a_row_may_repeat_the_fields_of_its_cell(tmp_path):
    result = run_measurements(tmp_path, {"sizes": (1, 2)}, {"seed": 0, "loss": 2.0})
    assert [row["loss"] for row in result.rows] == [1.0, 2.0]
    assert not result.failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "--seeds"),
        ({"scale": "huge"}, "--scale"),
        ({"only": ("absent",)}, "absent"),
    ],
)
def test_bad_options_are_refused(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
