"""Tests of the tables of single-loop methods: their metrics, tuning and claims."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import hypergrad as hg
from benchmarks import quadratics, soba_step
from benchmarks.shared import (
    logistic_systems,
    single_loop,
    single_loop_rates,
    single_loop_table,
)
from benchmarks.shared.single_loop import SeedProblem
from hypergrad.bench import Row
from tests.loops import run_loop


def test_closed_form_of_quadratics_is_the_value_function():
    """Exact hypergradients in float64 vanish at a*, and values differ elsewhere."""
    inner, outer = quadratics.samples(0)
    best, Q = quadratics.closed_form(inner, outer)
    problem = hg.Bilevel(quadratics.inner_loss, quadratics.outer_loss, inner, outer)
    gradient_fn = hg.hypergradient(problem, hg.Implicit(hg.Newton(), hg.CG()))
    w = jnp.zeros(quadratics.NUM_W)
    at_best = gradient_fn(w, jnp.asarray(best))
    shift = np.random.default_rng(0).normal(size=best.size)
    shifted = gradient_fn(w, jnp.asarray(best + shift))
    scale = np.linalg.norm(shifted.hypergradient)
    assert np.linalg.norm(at_best.hypergradient) < 1e-8 * scale
    actual = quadratics.suboptimality(best, Q, None, best + shift, None)
    np.testing.assert_allclose(actual, shifted.value - at_best.value, rtol=1e-8)


def small() -> logistic_systems.Samples:
    """Two features, so that a brute grid of penalties can be trained."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)).astype(np.float32)
    y = (rng.random(300) < 1 / (1 + np.exp(-x[:, 0]))).astype(np.int32)
    return logistic_systems.Samples("300 of 2", x, y, 150)


def trained(x: np.ndarray, y: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Newton's method, dense."""
    w = np.zeros(2)
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = x.T @ (p - y) / len(y) + np.exp(alpha) * w
        H = (x.T * (p * (1 - p))) @ x / len(y) + np.diag(np.exp(alpha))
        w = w - np.linalg.solve(H, gradient)
    return w


def test_the_best_penalties_are_those_of_a_brute_grid():
    """And the metric is the distance of the value function to them."""
    parts = logistic_systems.split(small(), 0)
    x, y = (np.asarray(parts["inner"][name], float) for name in "xy")
    far = {name: np.asarray(each, float) for name, each in parts["outer"].items()}

    def h(alpha):
        scores = far["x"] @ trained(x, y, alpha)
        return np.mean(np.logaddexp(0, scores) - far["y"] * scores)

    ticks = np.linspace(logistic_systems.LOW, logistic_systems.HIGH, 29)
    least = min(h(np.array([a, b])) for a in ticks for b in ticks)
    start = np.zeros(2, np.float32), np.full(2, logistic_systems.INIT_ALPHA, np.float32)
    actual = logistic_systems.minimum(logistic_systems.binary_loss, parts, *start)
    assert least - 1e-3 < actual < least + 1e-9
    alpha = np.array([-1.0, 0.5])
    wide = jax.tree.map(lambda x: jnp.asarray(x, float), parts)
    key = jax.random.key(0)
    metric = logistic_systems.suboptimality(
        *(
            logistic_systems.binary_loss,
            wide,
            actual,
            jnp.zeros(2),
            jnp.asarray(alpha),
            key,
        )
    )
    np.testing.assert_allclose(metric, h(alpha) - actual, rtol=1e-6)


@pytest.mark.parametrize(("steps", "points"), [(1, 20), (7, 20), (50, 10), (53, 20)])
def test_the_evaluated_steps_are_those_of_minimize(steps: int, points: int):
    """Numbers there, NaN elsewhere."""
    square = lambda w, alpha, batch: (w - alpha) ** 2
    trace = run_loop(
        hg.Bilevel(square, square),
        hg.SOBA(optax.sgd(0.1)),
        optax.sgd(0.1),
        *(0.0, 1.0),
        num_steps=steps,
        metrics={"alpha": lambda w, alpha, key: alpha},
        eval_every=single_loop.spacing(steps, points),
    )
    there = np.flatnonzero(np.isfinite(trace.metrics["alpha"]))
    np.testing.assert_array_equal(there, single_loop.evaluated_steps(steps, points))


def tiny() -> single_loop.System:
    """Quadratics of 200 samples and few rates."""

    def make_problem(arrays):
        full = quadratics.make_problem(arrays)
        few = lambda data: hg.Batches(jax.tree.map(lambda x: x[:200], data.data), 20)
        problem = full.problem
        problem = hg.Bilevel(
            *(problem.inner_loss, problem.outer_loss),
            *map(few, (problem.inner_data, problem.outer_data)),
        )
        return SeedProblem(problem, *full[1:])

    return quadratics.SYSTEM._replace(
        name="tiny",
        make_problem=make_problem,
        budget=30,
        batches=10,
        rates=(0.1, 0.01),
        ratios=(0.1,),
    )


@pytest.mark.slow
def test_reported_runs_use_the_rates_that_tuning_chose():
    """The lower final value is chosen; the budget is kept; equal seeds, equal runs."""
    system, cell = tiny(), {"method": "SOBA", "seed": 3}
    tuning = tuning_row(system, "SOBA")
    assert (tuning["rate"], tuning["ratio"]) in system.pairs
    assert single_loop_rates.is_at_edge(tuning)
    row = single_loop_table.measure(system, cell, [tuning])
    assert (row["rate"], row["num_steps"]) == (tuning["rate"], tuning["num_steps"])
    assert 0.9 * system.budget < row["gradient_equivalents"] <= system.budget
    assert row["end"] == single_loop_table.final_value(row["curve"], row["curve_cost"])
    assert len(row["curve"]) == len(row["curve_cost"]) > 10
    rerun = single_loop_table.measure(system, cell, [tuning])
    assert rerun["curve"] == row["curve"]


def tuning_row(system: single_loop.System, method: str) -> Row:
    """Returns the row of the tuning stage as the runner stores it."""
    cell = {"stage": "tuning", "method": method, "seed": 0}
    return cell | single_loop_table.tune(system, cell, [])


def test_the_pair_is_chosen_whose_worse_run_is_lowest():
    """A run that broke off is as bad as can be; where all did, nothing is chosen."""
    pairs = [(1.0, 0.1), (0.1, 0.1), (0.01, 0.1)]
    ends = [[1e-9, np.nan], [1e-3, 1e-2], [1e-4, 1e-1]]
    row = single_loop_rates.choose_pair(pairs, ends, "SOBA")
    assert (row["rate"], row["ratio"]) == (0.1, 0.1)
    assert row["ends"] == [np.inf, 1e-2, 1e-1]
    with pytest.raises(ValueError, match="SOBA"):
        single_loop_rates.choose_pair(pairs, [[np.nan, 1.0]] * 3, "SOBA")


def test_an_edge_is_where_nothing_within_is_as_good():
    """Of nine pairs the middle one alone is within; among equals nothing is chosen."""
    pairs = [(rate, ratio) for rate in (1.0, 0.1, 0.01) for ratio in (0.3, 0.1, 0.03)]
    row = lambda ends: single_loop_rates.choose_pair(
        pairs, [[end] for end in ends], "SOBA"
    )
    assert single_loop_rates.is_at_edge(row([1.0, 9, 9, 9, 2, 9, 9, 9, 9]))
    assert single_loop_rates.is_at_edge(row([9.0, 9, 9, 9, np.nan, 1, 9, 9, 9]))
    assert not single_loop_rates.is_at_edge(row([9.0, 9, 9, 9, 1, 9, 9, 9, 2]))
    assert not single_loop_rates.is_at_edge(row([1.0] * 9))


def test_no_method_spends_more_than_its_budget():
    """A period of 64 steps that begins with 65: the first 36 cost 100."""

    def run(steps):
        dear = jnp.where(jnp.arange(steps) % 64 == 0, 65.0, 1.0)
        return lambda rate, ratio: types.SimpleNamespace(cost=jnp.cumsum(dear))

    slow = 0.1, 0.1
    steps = lambda method: single_loop_rates.count_affordable_steps(
        100.0, method, run, (), slow
    )
    assert steps("SRBA") == 36
    assert steps("TTSA") == 50
    assert steps(single_loop.DOUBLE_LOOP) == 1
    single_loop_table.check_budget("SOBA", 104.0, 100.0)
    with pytest.raises(ValueError, match="SOBA cost 106"):
        single_loop_table.check_budget("SOBA", 106.0, 100.0)


def test_random_search_keeps_the_best_so_far():
    """By the outer value, never better by looking at the metric."""
    system = tiny()
    arrays = jax.tree.map(jnp.asarray, system.prepare(0))
    key = jax.random.key(0)
    row = single_loop_table.random_search(system, 3000, arrays, key)
    start = quadratics.suboptimality(
        arrays["best"], arrays["Q"], None, jnp.zeros(10), None
    )
    assert row["curve"][-1] <= start * (1 + 1e-6)
    assert len(row["curve"]) == len(row["curve_cost"]) == system.points
    assert row["num_steps"] > 2
    assert row["end"] == row["curve"][-1]
    assert row["gradient_equivalents"] <= row["curve_cost"][-1] == 3000
    shorter = single_loop_table.random_search(system, 1500, arrays, key)
    assert shorter["end"] == row["curve"][system.points // 2 - 1]
    poor = single_loop_table.random_search(system, 1, arrays, key)
    assert np.isnan(poor["curve"]).all()
    assert poor["end"] == np.inf


def rows_of(method: str, ends: list[float], **columns) -> list[dict]:
    return [
        {"method": method, "seed": seed, "end": end, **columns}
        for seed, end in enumerate(ends)
    ]


def test_final_values_are_compared_by_ratios_paired_by_seed():
    """A claim needs its interval above the claimed ratio, and no broken run."""
    spread = np.exp(np.linspace(-1, 1, 5))
    rows = rows_of("A", list(0.01 * spread)) + rows_of("B", list(1.0 * spread))
    compare = single_loop_table.compare_final_values
    finding = compare(rows, "A", "B", 10)
    assert "100 [100, 100] times lower" in finding.text
    assert finding.outcome == "supported"
    assert compare(rows, "A", "B", 200).outcome == "not supported"
    assert compare(rows, "A", "B").outcome is None
    broken = [*rows[:-1], rows[-1] | {"end": None}]
    assert compare(broken, "A", "B", 10).outcome == "not supported"
    assert compare(rows[:4] + rows[5:9], "A", "B", 10).outcome == "undecided"


def test_first_at_plateau_has_the_smallest_cost():
    """The cost is that of the first evaluation within twice of the final value."""
    early = {"curve": [99.0, 1.9, 1.0], "curve_cost": [0.0, 10.0, 20.0]}
    late = {"curve": [99.0, 2.1, 1.0], "curve_cost": [0.0, 10.0, 20.0]}
    rows = rows_of("SOBA", [1.0] * 5, **early) + rows_of("SABA", [1.0] * 5, **late)
    assert single_loop_table.first_at_plateau(rows, "SOBA").outcome == "supported"
    assert single_loop_table.first_at_plateau(rows, "SABA").outcome == "not supported"


def test_runs_that_hardly_fell_have_no_plateau():
    """Their final value is less than ten times below the first evaluation."""
    flat = {"curve": [9.0, 1.9, 1.0], "curve_cost": [0.0, 1.0, 20.0]}
    fallen = {"curve": [11.0, 2.1, 1.0], "curve_cost": [0.0, 10.0, 20.0]}
    rows = rows_of("SOBA", [1.0] * 5, **fallen) + rows_of("DARTS", [1.0] * 5, **flat)
    assert single_loop_table.first_at_plateau(rows, "SOBA").outcome == "supported"
    finding = single_loop_table.first_at_plateau(rows[5:], "DARTS")
    assert finding.outcome == "not supported"


@pytest.mark.slow
def test_series_of_random_length_end_within_the_budget():
    """The run ends at its last evaluation that the budget pays for."""
    system = tiny()
    tuning = tuning_row(system, "SUSTAIN") | {"num_steps": 200}
    row = single_loop_table.measure(system, {"method": "SUSTAIN", "seed": 3}, [tuning])
    cost, curve = (np.array(row[name]) for name in ("curve_cost", "curve"))
    assert 0.8 * system.budget < cost[-1] <= system.budget
    paid = np.unique(cost)
    assert len(paid) < len(cost)
    assert np.all(curve[cost == paid[-1]] == curve[-1])
    assert row["end"] == single_loop_table.final_value(curve, cost)
    assert row["gradient_equivalents"] == cost[-1]


def test_a_run_ends_where_its_last_step_leads():
    """The last tenth of the cost alone counts, the alpha after the last step too."""
    cost = np.array([0.0, 50.0, 90.0, 100.0])
    assert single_loop_table.final_value([9.0, 9.0, 4.0, 1.0], cost) == pytest.approx(
        2.0
    )
    assert single_loop_table.final_value([9.0, 9.0, 4.0, np.nan], cost) == np.inf
    assert single_loop_table.final_value(
        [9.0, 1.0], np.array([0.0, 50.0])
    ) == pytest.approx(1.0)
    system = tiny()
    arrays = jax.tree.map(jnp.asarray, system.prepare(0))
    given = arrays, jnp.float32(0.1), jnp.float32(0.1), jax.random.key(0)
    actual = single_loop.curve(system, "SOBA", 7, 20, *given)
    trace = single_loop.run(system, "SOBA", 7, 20, *given)
    of = functools.partial(quadratics.suboptimality, arrays["best"], arrays["Q"], None)
    np.testing.assert_allclose(actual["curve"][0], of(jnp.zeros(10), None), rtol=1e-5)
    np.testing.assert_allclose(actual["curve"][-1], of(trace.alpha, None), rtol=1e-5)
    np.testing.assert_allclose(actual["curve_cost"][0], 0, atol=1e-6)
    np.testing.assert_allclose(actual["curve_cost"][1:], trace.cost, rtol=1e-5)


def test_figure_of_a_step_shows_the_claimed_maximum(tmp_path, monkeypatch):
    """A vertical line at five gradients."""
    figures, savefig = [], Figure.savefig
    save = lambda figure, *args, **options: (
        figures.append(figure) or savefig(figure, *args, **options)
    )
    monkeypatch.setattr(Figure, "savefig", save)
    soba_step.plot([{"soba": 3.0, "plain": 4.0}], tmp_path / "step.png")
    x_values = [set(line.get_xdata()) for line in figures[0].axes[0].lines]
    assert {soba_step.MAX_GRADIENTS} in x_values
    assert (tmp_path / "step.png").exists()
