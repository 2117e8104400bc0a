"""Tests of the tables of the federated and self-supervised tasks."""

import jax
import numpy as np
import pytest

from benchmarks import federated as federated_table
from benchmarks import self_supervised as self_supervised_table
from hypergrad.tasks import federated


def test_random_search_samples_from_the_space_around_the_neutral_alpha():
    """Its full width is the space of the task, and smaller widths are inside."""
    task = federated.make(key=jax.random.key(0))
    space = federated_table.narrow_space(1.0)
    assert jax.tree.structure(space) == jax.tree.structure(task.space)
    for actual, expected in zip(
        jax.tree.leaves(space), jax.tree.leaves(task.space), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
    narrow = federated_table.narrow_space(0.1)
    assert narrow["omega"].low * narrow["omega"].high == pytest.approx(1)
    assert narrow["omega"].high == pytest.approx(10**0.1)
    assert narrow["iota"].high == pytest.approx(0.3)


def test_baseline_is_evaluated_on_other_encoders_than_it_is_selected_on(monkeypatch):
    """Its error is not the error of the encoders that were best on validation."""
    table, key = self_supervised_table, jax.random.key(0)
    make_rows = lambda best: [{"val_error": float(i != best)} for i in range(12)]
    results = {table.SELECTION: make_rows(3), table.REPORTED: make_rows(0)}
    monkeypatch.setattr(
        table, "measure_temperatures", lambda data, purpose: results[purpose]
    )
    task = table.make_task(key, "small")
    trace = table.best_temperature(task, budget=0, key=key)
    np.testing.assert_allclose(trace.alpha["temperature"], table.TEMPERATURES[3])
    monkeypatch.setattr(table, "train_encoders", lambda *arguments: arguments[-1])
    assert table.retrain(task, trace.alpha, key) == table.REPORTED
    assert table.SELECTION != table.REPORTED
