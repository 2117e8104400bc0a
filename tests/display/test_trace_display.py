"""A batch of runs prints as one table, of its columns alone."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax

import hypergrad as hg
from hypergrad.display.tables import format_numbers
from hypergrad.estimators.base import REASONS
from tests.display.printed_tables import read_html, read_text
from tests.loops import TO_ONE, TO_ZERO, Stateless


def make_batch(values, **fields) -> hg.Trace:
    """Returns the trace of several runs, whose rows are blank where values are NaN."""
    values = np.asarray(values)
    is_made = np.isfinite(values).all(axis=tuple(range(2, values.ndim)))
    is_large = values > 8 if values.ndim == 2 else np.zeros_like(is_made)
    return hg.Trace(
        **{
            "alpha": jnp.array([0.5, 1.0, 1.5])[: len(values)],
            "w": jnp.zeros((len(values), 4)),
            "best_alpha": None,
            "value": jnp.asarray(values),
            "stats": {
                "trusted": jnp.where(is_made, is_made[:, :1], jnp.nan),
                "gradient_equivalents": 2.0 * is_made,
                "num_grads": 2.0 * is_made,
            },
            "metrics": {},
            "status_code": jnp.where(is_made.all(1), 0, 1),
            "flags": {"inner_error": is_made & is_large},
        }
        | fields
    )


RUNS = [[3.0, 2.0, 1.0, 0.5], [5.0, 4.0, np.nan, np.nan], [9.0, 8.5, 7.0, 6.0]]


def test_a_batch_of_runs_prints_ranges_and_counts():
    """The second run fails after two steps; the others end at 0.5 and at 6."""
    batch = make_batch(RUNS)
    assert read_text(batch).keys() == read_html(batch).keys()
    assert read_text(batch) == {
        "runs": "3; jax.tree.map(lambda x: x[0], trace) is the first",
        "status": "2 completed 1 stopped: the outer value is not finite; hg.diagnose "
        "says where",
        "steps": "2 to 4 of 4 per run",
        "last value": "0.5 to 6",
        "alpha": "[0.5, 1, 1.5]",
        "w": f"{batch.w.dtype}[3,4]",
        "trusted": "10 of 10",
        "reasons": f"2 of 10 rows: {REASONS['inner_error']}",
        "total cost": "20 gradient-equivalents: 20 gradients",
    }
    table = read_text(dataclasses.replace(batch, record_every=10))
    assert table["steps"] == "20 to 40 of 40 per run, one row per 10"
    table = read_text(dataclasses.replace(batch, row_kind="trial"))
    assert table["lowest value"] == "0.5 to 6"
    assert table["finite"] == "10 of 10"


def test_a_batch_of_runs_with_several_losses_prints_the_range_of_each():
    batch = make_batch([[[3.0, 1.0], [2.0, 2.0]], [[3.0, 1.0], [1.0, 4.0]]])
    assert read_text(batch)["last value"] == "loss 0: 1 to 2 loss 1: 2 to 4"


def test_a_batch_prints_without_its_large_leaves():
    """They may be donated, and a batch may have no run or no row."""
    batch = make_batch(RUNS)
    batch.w.delete()
    assert read_text(batch)["w"] == f"{batch.w.dtype}[3,4]"
    assert read_html(batch)["w"] == f"{batch.w.dtype}[3,4]"
    assert read_text(make_batch(np.zeros((0, 4))))["runs"] == "0"
    assert read_text(make_batch(np.zeros((2, 0))))["last value"] == "none is finite"


def test_a_failed_row_without_a_cost_is_printed():
    """The table in a terminal counts the rows that the table in a notebook counts."""

    def fail_below(w, alpha, key):
        value = jnp.where(alpha < 0.9, jnp.nan, alpha**2)
        return hg.Estimate(value, 2 * alpha, w, {})

    failing = Stateless(fail_below)
    trace = hg.minimize(TO_ZERO, failing, optax.sgd(0.1), 0.0, 1.0, num_steps=5)
    assert read_text(trace)["steps"] == read_html(trace)["steps"] == "2 of 5"
    assert trace.last_row == 1


def run_with_metrics(metrics):
    """Returns the trace of seven steps, of which 0, 2, 4 and 6 are evaluated."""
    loop = hg.OuterLoop(
        *(TO_ONE, hg.Implicit(hg.Newton()), optax.sgd(0.25)),
        metrics=metrics,
        eval_every=2,
    )
    return loop.run(loop.init(0.0, 3.0), num_steps=7)


def test_a_metric_that_became_nan_is_told_from_one_that_was_not_evaluated():
    """The hyperparameter falls from 3 towards 1, and below 1.5 before step 6."""
    metrics = {
        "never": lambda w, alpha, key: jnp.log(-1.0 - w**2),
        "late": lambda w, alpha, key: jnp.log(alpha - 1.5),
    }
    trace = run_with_metrics(metrics)
    table = str(trace)
    assert "never: nan at step 6" in table
    assert "then nan at step 6" in table
    rows = trace.rows()
    assert [row["step"] for row in rows if "never" in row] == [6]
    assert np.isnan(rows[-1]["late"])


def test_a_part_of_a_run_does_not_evaluate_its_last_row():
    trace = run_with_metrics({"w": lambda w, alpha, key: w})
    part = dataclasses.replace(
        trace,
        value=trace.value[:4],
        stats={name: x[:4] for name, x in trace.stats.items()},
        flags={name: x[:4] for name, x in trace.flags.items()},
        metrics={name: x[:4] for name, x in trace.metrics.items()},
    )
    assert [row["step"] for row in part.rows() if "w" in row] == [0, 2]


def test_a_metric_of_a_search_is_evaluated_in_every_trial():
    trace = hg.search(
        *(TO_ONE, hg.Newton(), hg.searchers.Grid(3), 0.0),
        space=hg.spaces.Box(2.0, 4.0),
        budget=1e18,
        metrics={"log": lambda w, alpha, key: jnp.log(-w)},
        progress=True,
    )
    assert "log: nan at trial 2" in str(trace)
    assert all("log" in row for row in trace.rows())


def test_a_metric_of_a_search_is_that_of_the_best_trial():
    """The first trial has the lowest value, and the last one the lowest metric."""
    trace = hg.search(
        *(TO_ONE, hg.Newton(), hg.searchers.Grid(3), 0.0),
        space=hg.spaces.Box(2.0, 4.0),
        budget=1e18,
        metrics={"negative": lambda w, alpha, key: -alpha},
    )
    best = int(np.nanargmin(trace.value))
    number = format_numbers(trace.metrics["negative"][best])
    assert trace.best_row == best
    assert f"negative: {number} at the best trial, {best}, lowest" in str(trace)


def test_the_total_cost_is_summed_in_float64():
    trace = hg.minimize(
        *(TO_ONE, hg.Implicit(hg.Newton()), optax.sgd(0.25), 0.0, 3.0), num_steps=50
    )
    costs = np.full(50, 1000001.0, np.float32)
    stats = trace.stats | {"gradient_equivalents": costs}
    assert "50,000,050 gradient-eq" in str(dataclasses.replace(trace, stats=stats))
