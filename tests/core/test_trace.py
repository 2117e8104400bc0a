"""Trace: rows, reasons, and the state of a run as a table of numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.estimators.base import REASONS
from tests.loops import TO_ONE, ExactEstimator, run_loop

TRUSTED = np.array([True, False, True, False, False])


def run(alpha=3.0, num_steps=5, **options) -> hg.Trace:
    estimator = ExactEstimator(trusted=TRUSTED)
    return run_loop(
        TO_ONE, estimator, optax.sgd(0.1), 0.0, alpha, num_steps=num_steps, **options
    )


def test_rows_are_the_trace_step_by_step():
    """Values, cumulative cost, statistics and metrics as Python numbers."""
    trace = run(metrics={"m": lambda w, alpha, key: alpha}, eval_every=2)
    rows = trace.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] == trace.steps.tolist()
    assert ["m" in row for row in rows] == [True, False, True, False, True]
    assert [row["value"] for row in rows] == trace.value.tolist()
    assert [row["cost"] for row in rows] == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert [row["trusted"] for row in rows] == TRUSTED.tolist()
    assert [row["m"] for row in rows[::2]] == trace.metrics["m"][::2].tolist()
    for row in rows:
        assert set(row) - {"m"} == set(trace.stats) | {"step", "value", "cost"}
        assert all(isinstance(x, int | float | bool) for x in row.values())


def test_reasons_list_the_steps_of_each_failed_check():
    """Steps count from the beginning of the first run; blank rows have no reason."""
    trace = run()
    ((sentence, steps),) = trace.reasons().items()
    assert steps == [1, 3, 4]
    assert "trusted=False" in sentence
    assert trace.flags["not_stated"].tolist() == (~TRUSTED).tolist()
    assert run(num_steps=1).reasons() == {}
    stopped = run(on_untrusted="stop")
    assert [*stopped.reasons().values()] == [[1]]


def test_a_step_that_is_not_finite_has_this_reason_alone():
    """NaN in the data also fails the check of the adjoint, which is not the cause."""
    flags = {
        "adjoint_residual": np.array([True, False, True, False, False]),
        "inner_error": np.array([True, False, False, False, False]),
        "not_finite": np.array([True, False, False, False, False]),
    }
    trace = dataclasses.replace(run(), flags=flags)
    assert trace.reasons() == {
        REASONS["not_finite"]: [0],
        REASONS["adjoint_residual"]: [2],
    }
    assert list(trace.reasons()) == [REASONS["not_finite"], REASONS["adjoint_residual"]]
    assert REASONS["inner_error"][:30] not in " ".join(str(trace).split())


def test_a_batch_of_traces_has_leading_axes_and_needs_an_index():
    alphas = jnp.array([-1.0, 0.0, 3.0])
    batch = jax.vmap(run)(alphas)
    assert batch.alpha.shape == batch.best_alpha.shape == batch.w.shape == (3,)
    assert batch.value.shape == batch.cost.shape == (3, 5)
    assert all(column.shape == (3, 5) for column in batch.stats.values())
    getters = (lambda: batch.status, lambda: batch.steps)
    for read in (batch.rows, batch.reasons, *getters):
        with pytest.raises(ValueError, match="single run"):
            read()
    assert "3 completed" in repr(batch)
    last = jax.tree.map(lambda leaf: leaf[2], batch)
    assert last.status == "completed"
    for row, expected in zip(last.rows(), run().rows(), strict=True):
        assert row["value"] == pytest.approx(expected["value"], rel=1e-12)
        assert row["cost"] == expected["cost"]


def test_a_statistic_replaces_no_step_value_or_cost_of_a_row():
    trace = run()
    named_alike = dict.fromkeys(("step", "value", "cost"), trace.value + 100)
    disguised = dataclasses.replace(trace, stats=trace.stats | named_alike)
    for row, expected in zip(disguised.rows(), trace.rows(), strict=True):
        for name in named_alike:
            assert row[name] == expected[name]
