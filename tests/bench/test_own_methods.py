"""A method of a user's own runs on every table that compares methods."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import tasks
from hypergrad.bench import MethodError, Table, baselines, loading
from hypergrad.bench.check import check_result
from hypergrad.bench.runner import RunOptions, run_table
from hypergrad.bench.table import without_test_data
from hypergrad.tasks import Task
from tests.bench.toy_table import TABLE, write_table

FOLDER = Path(__file__).parents[2] / "benchmarks"
FILES = [
    path
    for path in loading.table_files(FOLDER)
    if re.search(r"^table = Table\(", path.read_text(), re.MULTILINE)
]
FAST = ("few_shot",)
BUDGET = 20
RATES = (0.03, 0.1)
METHOD = f"""
from hypergrad.bench import baselines, with_options

mine = with_options(baselines.implicit, grid={{"learning_rate": {RATES}}})
"""
#: For a table whose alpha holds initial values, of which neither loss is a function.
UNROLLED = f"""
import hypergrad as hg, optax

def mine(task, *, budget, key, learning_rate):
    estimator = hg.Unrolled(task.solver, warm_start=False)
    return hg.minimize(
        task.problem, estimator, optax.adam(learning_rate), task.w, task.alpha,
        space=task.space, budget=budget, key=key,
    )

mine.grid = {{"learning_rate": {RATES}}}
"""

TABLES = [
    pytest.param(
        file, id=file.stem, marks=() if file.stem in FAST else pytest.mark.slow
    )
    for file in FILES
]


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("file", TABLES)
def test_hypergradients_are_tuned_and_measured(file: Path, tmp_path: Path):
    method_file = tmp_path / "mine.py"
    method_file.write_text(UNROLLED if file.stem == "omniglot" else METHOD)
    ref = loading.TableRef(file, ((method_file, "mine"),), BUDGET)
    table = ref.load()
    assert isinstance(table, Table)
    options = RunOptions(table.scales[0], 1, tmp_path, "", only=("mine",))
    result = run_table(ref, options)
    assert not result.failures
    *tuning, row = result.rows
    scores = [score for trial in tuning for score in trial["selection"]]
    assert np.all(np.isfinite(np.array(scores, float)))
    assert {trial["settings"]["learning_rate"] for trial in tuning} == set(RATES)
    metrics = [row[name] for name in table.metrics]
    assert np.all(np.isfinite(np.array(metrics, float)))
    assert row["tuning_cost"] > row["gradient_equivalents"] > 0
    if table.plot is not None:
        table.plot(result.rows[-1:], tmp_path / "figure.png")
        assert (tmp_path / "figure.png").exists()


def test_seeds_share_the_program_of_the_implicit_baseline():
    """No loss is traced for a second seed, whose data differ."""
    num_traces = 0

    def inner_loss(w, alpha, batch):
        nonlocal num_traces
        num_traces += 1
        return jnp.sum((w - alpha - batch) ** 2)

    outer_loss = lambda w, alpha, batch: jnp.sum((w - 1) ** 2)
    solver = hg.Descent(optax.sgd(0.25), 5)
    counts = []
    for key in jax.random.split(jax.random.key(0)):
        problem = hg.Bilevel(inner_loss, outer_loss, jax.random.normal(key, (2,)))
        space, zeros = hg.spaces.Real(), jnp.zeros(2)
        task = Task("none", problem, solver, zeros, zeros, space, {})
        baselines.implicit(task, budget=60, key=key, learning_rate=0.1)
        counts.append(num_traces)
    assert counts[0] == counts[1] > 0


def test_an_added_method_is_tuned_on_a_table_whose_own_methods_are_not(tmp_path: Path):
    """The rows of its two settings are told apart, although the table has no tuning."""
    file = write_table(tmp_path)
    tuned = re.compile(r' *"(random|descent)": .*\n| *claims=.*\n')
    assert len(tuned.findall(TABLE)) == 3
    file.write_text(tuned.sub("", TABLE))
    ref = loading.TableRef(file, ((tmp_path / "mine.py", "copy_of_descent"),))
    result = run_table(ref, RunOptions("small", 2, tmp_path / "runs", ""))
    assert not result.failures
    assert [row.get("stage") for row in result.rows].count("tuning") == 4
    findings = check_result("quadratic", loading.load_table(file), tmp_path / "runs")
    assert not [finding for finding in findings if finding.failed]


def test_a_method_gets_training_and_validation_examples_only():
    """The augmentation task has two splits of test images, posed and upright."""
    task = tasks.augmentation.make(key=jax.random.key(0))
    assert {"test", "upright", "held_out"} <= task.splits.keys()
    given = without_test_data(task)
    assert given.splits.keys() == {"train", "val"}
    assert not given.metrics
    given = without_test_data(task, ("upright",))
    assert given.splits.keys() == {"train", "val", "upright"}


def test_an_added_method_gets_no_further_splits(tmp_path: Path):
    """It would be compared with methods that do not see them."""
    file = tmp_path / "mine.py"
    file.write_text(METHOD + 'mine.splits = ("test",)\n')
    with pytest.raises(MethodError, match=r"mine.splits must not be set"):
        loading.load_method(file, "mine")


def test_all_converted_tables_take_methods():
    names = {"architecture", "augmentation", "cleaning", "self_supervised"}
    assert {file.stem for file in FILES} >= {*FAST, *names, "semi_supervised"}
