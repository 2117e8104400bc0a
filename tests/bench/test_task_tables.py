"""Tests of the tables of architecture search and of learned schedules."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.studies import architecture as architecture_table
from hypergrad.studies import record
from hypergrad.studies import schedules as schedules_table
from hypergrad.tasks import architecture, schedules
from hypergrad.tasks.architecture import CELLS, OPERATIONS


def test_the_ranking_contains_the_cells_as_the_table_trains_them():
    """A row per cell, in order, from the same data and number of steps."""
    path = Path(architecture.__file__).with_name(architecture.RANKING)
    rows = record.read(path)
    names = [" ".join(OPERATIONS[o] for o in cell) for cell in CELLS]
    assert [row["cell"] for row in rows] == names
    assert {row["steps"] for row in rows} == {architecture_table.STEPS}
    fingerprint = record.fingerprint(hg.datasets.load("digits"))
    assert {row["data_sha256"] for row in rows} == {fingerprint}


def test_the_best_cell_has_no_regret_and_the_price_adds_operations():
    accuracy = np.mean(architecture.ranking()["test_accuracy"], axis=1)
    best = architecture_table.judged(CELLS[int(np.argmax(accuracy))], 0.0)
    assert (best["regret"], best["rank"]) == (0.0, 1)
    free, priced = (architecture_table.judged((4, 4, 4), price) for price in (0.0, 0.5))
    assert priced["objective"] - free["objective"] == pytest.approx(0.5)
    assert architecture_table.judged((1, 0, 1), 0.0)["flops"] == 0.0


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
    trace = jax.jit(learn)(schedules_table.digits(), jax.random.key(0), *arguments)
    budget, step_cost = schedules_table.budget("100 steps"), np.diff(trace.cost).max()
    assert budget - 2 * step_cost < trace.cost[-1] <= budget
