"""Tests of the tables of penalties, schedules, architecture, semi-supervision."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import architecture as architecture_table
from benchmarks import penalties as penalties_table
from benchmarks import schedules as schedules_table
from benchmarks import semi_supervised as semi_supervised_table
from benchmarks.shared import architecture_cells, method_colors
from benchmarks.shared.split_claims import evaluate_split_claims
from benchmarks.shared.tuning import digits
from hypergrad.bench import Claim, Resplits
from hypergrad.tasks import architecture, schedules
from hypergrad.tasks.architecture import CELLS, OPERATIONS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_ranking_contains_the_cells_as_the_table_trains_them():
    """The ranking has a row per cell, in order, of the same data and steps."""
    lines = architecture_cells.PATH.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    names = [" ".join(OPERATIONS[o] for o in cell) for cell in CELLS]
    assert [row["cell"] for row in rows] == names
    assert {row["steps"] for row in rows} == {architecture_cells.STEPS}
    digest = architecture_cells.digest_of_digits()
    assert {row["data_sha256"] for row in rows} == {digest}


@pytest.mark.parametrize("label", ["labels of validation", "oracle"])
def test_a_method_gets_the_splits_that_it_trains_on(label):
    cell = {"method": label, "seed": 0, "setting_index": 0}
    row = semi_supervised_table.table.measure(cell, "small", [])
    assert 0.5 < row["test_accuracy"] < 1


def test_the_best_cell_has_no_regret_and_the_price_adds_operations():
    accuracy = np.mean(architecture.ranking()["test_accuracy"], axis=1)
    evaluate = architecture_table.evaluate_cell
    best = evaluate(CELLS[int(np.argmax(accuracy))], 0.0)
    assert (best["regret"], best["rank"]) == (0.0, 1)
    free, priced = (evaluate((4, 4, 4), price) for price in (0.0, 0.5))
    assert priced["objective"] - free["objective"] == pytest.approx(0.5)
    assert evaluate((1, 0, 1), 0.0)["flops"] == 0.0


def test_a_regret_above_the_noise_of_retraining_on_one_seed_is_not_supported():
    """The standard deviation of retraining the best cell is 0.58 points."""
    make_rows = lambda *regrets: [
        {"method": "implicit", "seed": i, "regret": x} for i, x in enumerate(regrets)
    ]
    outcome = lambda rows: [x.outcome for x in architecture_table.regret_findings(rows)]
    assert outcome(make_rows(0.0, 0.005)) == ["supported"]
    assert outcome(make_rows(0.0, 0.007)) == ["not supported"]


def test_an_added_method_has_a_color_of_its_own():
    """Also where the methods of the table have most of matplotlib's colors."""
    names = ["mine", *(x for x in method_colors.COLORS if x != "forward"), "yours"]
    colors = method_colors.colors_of(name for name in names if name != "reversible")
    assert len(set(colors.values())) == len(colors)
    assert colors["implicit"] == method_colors.COLORS["implicit"]


@pytest.mark.parametrize("init", schedules_table.GRID)
@pytest.mark.parametrize("factor", schedules_table.FACTORS)
def test_random_search_samples_around_the_starting_point(init, factor):
    """The bounds lie within the space of the task and contain the starting point."""
    space = schedules_table.around(jnp.asarray(init), factor)
    bounds = {"rate": schedules.RATES, "momentum": schedules.MOMENTA}
    for (name, (low, high)), value in zip(bounds.items(), init, strict=True):
        assert low <= space[name].low < value < space[name].high <= high


@pytest.mark.slow
@pytest.mark.parametrize("method", schedules_table.LEARNED)
def test_a_learned_schedule_uses_its_budget(method):
    """The cost stays below the budget, which would not pay for two more estimates."""
    arguments = jnp.asarray(False), jnp.array([0.1, 0.9]), jnp.asarray(0.1)
    learn = functools.partial(schedules_table.learn, "100 steps", method)
    trace = jax.jit(learn)(digits(), jax.random.key(0), *arguments)
    budget, step_cost = schedules_table.budget("100 steps"), np.diff(trace.cost).max()
    assert budget - 2 * step_cost < trace.cost[-1] <= budget


def test_a_program_of_more_than_a_gibibyte_fails():
    """At most 1 GiB is allowed in the longest run, on the seed of the largest."""
    make_rows = lambda memory: [
        {"method": "10000 steps, forward", "seed": i, "memory": x}
        for i, x in enumerate((5.0, memory))
    ]
    outcomes = [
        schedules_table.memory_findings(make_rows(memory))[0].outcome
        for memory in (2.0**30, 2.0**30 + 1)
    ]
    assert outcomes == ["holds", "FAILED"]


def test_penalties_fail_if_one_seed_is_far_from_the_grid_or_misses_an_image():
    """All seeds must hold, and rows of other methods are not needed."""
    rows = [
        {"method": "HOAG, cubic", "seed": 0, "from_grid": 0.1},
        {"method": "HOAG, cubic", "seed": 1, "from_grid": 0.6},
        {"method": "overfit, one a weight", "seed": 0, "val_accuracy": 1.0},
        {"method": "overfit, one a weight", "seed": 1, "val_accuracy": 0.98},
    ]
    outcomes = lambda rows: [
        finding.outcome for finding in penalties_table.correctness_findings(rows)
    ]
    assert outcomes(rows) == ["FAILED", "FAILED"]
    assert outcomes(rows[::2]) == ["holds", "holds"]


def test_claims_of_tasks_with_other_splits_are_corrected_together():
    """Both count for Holm's method; only the first one is about re-splits."""
    rows = [
        {"method": label, "seed": seed, "x": gain + 0.1 * seed * gain}
        for label, gain in (("a", 1.0), ("b", 1.0), ("baseline", 0.0))
        for seed in range(5)
    ]
    make = lambda label: Claim(label, "baseline", "x", min_effect=1.15)
    claims = [(make("a"), Resplits(test_to_train=0.5)), (make("b"), None)]
    actual = evaluate_split_claims(claims, rows)
    expected = [claim.evaluate(rows, 0.975, resplits) for claim, resplits in claims]
    assert actual == expected
    assert not evaluate_split_claims([(Claim("c", "baseline", "x"), None)], rows)


@pytest.mark.parametrize(
    ("auroc", "outcome"), [(0.9, "supported"), (0.75, "not supported")]
)
def test_the_whole_interval_of_the_auroc_must_be_above_the_claim(auroc, outcome):
    """The claim is 0.8, and the interval has a half width of about 0.02."""
    rows = [
        {"method": "implicit", "seed": seed, "auroc": auroc + 0.02 * (seed % 2)}
        for seed in range(6)
    ]
    (finding,) = semi_supervised_table.detection_findings(rows)
    assert finding.outcome == outcome
