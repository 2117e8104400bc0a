"""What a method of a table must have and may cost."""

import dataclasses
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.bench import Table, baselines, with_options
from hypergrad.bench.methods import MethodError, check_method, run_method
from hypergrad.tasks import Task

TRACE = hg.Trace(
    alpha=jnp.zeros(2),
    w=jnp.zeros(2),
    best_alpha=jnp.zeros(2),
    value=jnp.zeros(1),
    stats={},
    metrics={},
    status_code=jnp.asarray(0),
)
TASK = Task("none", None, None, TRACE.w, TRACE.alpha, None, {})


def run_at_cost(row_costs: list[float], record_every: int, budget: float):
    """Runs a method whose trace has rows of these costs."""
    stats = {
        "gradient_equivalents": jnp.asarray(row_costs, "float32"),
        "num_hvps": jnp.zeros(len(row_costs)),
        "trusted": jnp.ones(len(row_costs), bool),
    }
    trace = dataclasses.replace(
        TRACE, value=jnp.zeros(len(row_costs)), stats=stats, record_every=record_every
    )
    method = lambda task, *, budget, key: trace
    return run_method(method, TASK, budget=budget, key=jax.random.key(0), settings={})


@pytest.mark.parametrize(
    ("row_costs", "record_every"),
    [
        ([500.0], 10),  # steps of 50, of which the last ones start above 100
        ([100.0, 100.0], 10),
        ([60.0, 60.0, 60.0], 1),
        ([60.0, 60.0, 60.0, 0.0], 1),  # no step was made in the last row
    ],
)
def test_a_run_that_starts_a_step_above_its_budget_fails(row_costs, record_every):
    with pytest.raises(MethodError, match=r"its budget is 100.*record_every"):
        run_at_cost(row_costs, record_every, budget=100)


@pytest.mark.parametrize(
    ("row_costs", "record_every"),
    [
        ([], 1),
        ([500.0], 1),  # a method of a single step
        ([110.0], 10),  # steps of 11
        ([60.0, 60.0], 1),
        ([60.0, 60.0, 0.0, 0.0], 1),
        ([50.0, 50.0, 60.0], 1),  # the budget was spent up to the last step
    ],
)
def test_the_last_step_may_cost_more_than_is_left(row_costs, record_every):
    run = run_at_cost(row_costs, record_every, budget=100)
    assert run.costs["gradient_equivalents"] == sum(row_costs)


def test_the_sum_of_many_small_costs_does_not_drift():
    """The cost of each step is in float32, in which their sum would be rounded."""
    num, cost = 100_000, float(np.float32(0.1))
    run = run_at_cost([cost] * num, 1, budget=cost * (num - 1))
    np.testing.assert_allclose(
        run.costs["gradient_equivalents"], cost * num, rtol=1e-12
    )


@pytest.mark.parametrize(
    "values",
    [{0.1, 0.2}, frozenset({0.1}), {0.1: "a"}, {0.1: 1}.keys(), "ab", (), np.array(1)],
)
def test_a_grid_without_an_order_or_a_value_is_refused(values):
    """Rows number the settings, and the order of a set depends on the process."""
    method = lambda task, *, budget, key, rate: None
    with pytest.raises(MethodError, match="a list, a tuple or an array"):
        check_method("mine", with_options(method, grid={"rate": values}))


@pytest.mark.parametrize(
    "values", [(0.1,), [0.1, 0.2], range(2), deque([1]), np.arange(2), jnp.arange(2)]
)
def test_a_grid_of_sequences_and_arrays_is_taken(values):
    method = lambda task, *, budget, key, rate: None
    check_method("mine", with_options(method, grid={"rate": values}))


def test_a_run_that_is_not_finite_states_its_cost():
    """It counts in the cost of tuning."""
    stats = {"gradient_equivalents": jnp.array([40.0]), "num_hvps": jnp.zeros(1)}
    stats["trusted"] = jnp.ones(1, bool)
    trace = dataclasses.replace(TRACE, alpha=jnp.full(2, jnp.nan), stats=stats)
    method = lambda task, *, budget, key: trace
    with pytest.raises(MethodError, match="not finite") as error:
        run_method(method, TASK, budget=60, key=jax.random.key(0), settings={})
    assert error.value.costs["gradient_equivalents"] == 40.0


def test_rows_that_were_not_made_are_not_counted_as_untrusted():
    """Rows after a failure are blank."""
    stats = {
        "gradient_equivalents": jnp.array([3.0, 3.0, 0.0, 0.0]),
        "num_hvps": jnp.array([1.0, 1.0, jnp.nan, jnp.nan]),
        "trusted": jnp.array([True, False, False, False]),
    }
    value = jnp.array([1.0, jnp.nan, jnp.nan, jnp.nan])
    trace = dataclasses.replace(TRACE, value=value, stats=stats)
    method = lambda task, *, budget, key: trace
    run = run_method(method, TASK, budget=60, key=jax.random.key(0), settings={})
    assert run.costs["num_untrusted"] == 1.0


@pytest.mark.parametrize(
    "values",
    [(jnp.tanh,), ((1, optax.sgd(0.1)),), (1j,), ({"rate": object()},)],
    ids=["function", "optimizer in a list", "complex", "object in a dictionary"],
)
def test_a_grid_that_a_row_cannot_hold_is_refused(values):
    """The run would end when it writes its first row."""
    method = lambda task, *, budget, key, rate: None
    with pytest.raises(
        MethodError, match=r"mine.grid must hold numbers, strings.*rate"
    ):
        check_method("mine", with_options(method, grid={"rate": values}))


@pytest.mark.parametrize("attribute", ["grid", "task_settings"])
def test_a_method_does_not_set_what_the_table_tunes(attribute):
    method = lambda task, *, budget, key, penalty: None
    method = with_options(method, **{attribute: {"penalty": (1.0, 2.0)}})
    table = Table(task=None, methods={}, metrics=("x",), budget=1.0)
    table.with_methods({"mine": method})
    table = dataclasses.replace(table, task_grid={"penalty": (0.1,)})
    with pytest.raises(MethodError, match=rf"mine.{attribute} must not name penalty"):
        table.with_methods({"mine": method})


def test_a_task_of_any_options_holds_out_data():
    calls = []
    table = Table(task=None, methods={}, metrics=("x",), budget=1.0)
    table = dataclasses.replace(table, task=lambda *_, **options: calls.append(options))
    table.make_task(jax.random.key(0), "small", lambda: None, {}, hold_out=True)
    assert calls == [{"hold_out": True}]


def test_a_baseline_pays_for_the_products_of_its_training():
    """Newton's method spends most of its cost on them."""
    outer = lambda w, alpha, batch: jnp.mean(
        jax.nn.softplus(-batch[1] * (batch[0] @ w))
    )
    inner = lambda w, alpha, batch: (
        outer(w, alpha, batch) + jnp.exp(alpha) * jnp.sum(w**2)
    )
    x = jax.random.normal(jax.random.key(0), (50, 20))
    data, w, alpha = (x, jnp.sign(x[:, 0])), jnp.zeros(20), jnp.asarray(-5.0)
    task = dataclasses.replace(
        TASK, problem=hg.Bilevel(inner, outer, data, data), solver=hg.Newton(), w=w,
        alpha=alpha,
    )  # fmt: skip
    key = jax.random.key(0)
    stats = baselines.no_hyperparameters(task, budget=1000, key=key).stats
    _, solver_stats = task.solver.solve(inner, w, alpha, data, key)
    assert solver_stats["num_hvps"] > solver_stats["num_grads"]
    assert stats["num_hvps"] == solver_stats["num_hvps"]
    total = (
        solver_stats["num_grads"]
        + 2 * solver_stats["num_hvps"]
        + solver_stats["num_values"] / 3
    )
    np.testing.assert_allclose(stats["gradient_equivalents"][0], total, rtol=1e-6)


def test_a_search_is_tuned_by_its_best_trial_unless_a_metric_is_named():
    """The last point of the grid is the worst one."""
    inner = lambda w, alpha, batch: (w - alpha) ** 2
    outer = lambda w, alpha, batch: (w + 2.0) ** 2
    trace = hg.search(
        hg.Bilevel(inner, outer), hg.Newton(), hg.searchers.Grid(5), 0.0,
        space=hg.spaces.Interval(-2.0, 2.0), budget=500,
    )  # fmt: skip
    assert np.max(trace.value) == trace.value[-1] == 16
    table = Table(task=None, methods={}, metrics=("x",), budget=500)
    assert table.selection_scores(TASK, trace, trace.w, jax.random.key(0)) == [0.0]
