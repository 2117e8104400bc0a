"""The tables of the single-loop family: what they measure, and how they judge."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypergrad.studies import record
from matplotlib import pyplot

import hypergrad as hg
from benchmarks import (
    corruption,
    logistic,
    quadratics,
    single_loop,
    single_loop_grid,
    single_loop_table,
    soba_step,
)
from benchmarks.shared.single_loop import Drawn
from hypergrad.tasks import cleaning
from tests.loops import run_loop


def test_the_closed_form_of_quadratics_is_the_value_function():
    """By exact hypergradients in float64: zero at a*, and values off it."""
    inner, outer = quadratics.samples(0)
    best, Q = quadratics.closed_form(inner, outer)
    problem = hg.Bilevel(quadratics.inner_loss, quadratics.outer_loss, inner, outer)
    look = hg.hypergradient(problem, hg.Implicit(hg.Newton(), hg.CG()))
    w = jnp.zeros(quadratics.NUM_W)
    at_best = look(w, jnp.asarray(best))
    off = np.random.default_rng(0).normal(size=best.size)
    there = look(w, jnp.asarray(best + off))
    scale = np.linalg.norm(there.hypergradient)
    assert np.linalg.norm(at_best.hypergradient) < 1e-8 * scale
    found = quadratics.suboptimality(best, Q, None, best + off, None)
    np.testing.assert_allclose(found, there.value - at_best.value, rtol=1e-8)


def small() -> logistic.Samples:
    """Two features, so that a brute grid of penalties can be trained."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2)).astype(np.float32)
    y = (rng.random(300) < 1 / (1 + np.exp(-x[:, 0]))).astype(np.int32)
    return logistic.Samples("300 of 2", x, y, 150)


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
    parts = logistic.split(small(), 0)
    x, y = (np.asarray(parts["inner"][name], float) for name in "xy")
    far = {name: np.asarray(each, float) for name, each in parts["outer"].items()}

    def h(alpha):
        scores = far["x"] @ trained(x, y, alpha)
        return np.mean(np.logaddexp(0, scores) - far["y"] * scores)

    ticks = np.linspace(logistic.LOW, logistic.HIGH, 29)
    least = min(h(np.array([a, b])) for a in ticks for b in ticks)
    start = np.zeros(2, np.float32), np.full(2, logistic.START, np.float32)
    found = logistic.best(logistic.binary_loss, parts, *start)
    assert least - 1e-3 < found < least + 1e-9
    alpha = np.array([-1.0, 0.5])
    wide = jax.tree.map(lambda x: jnp.asarray(x, float), parts)
    key = jax.random.key(0)
    metric = logistic.suboptimality(
        *(logistic.binary_loss, wide, found, jnp.zeros(2), jnp.asarray(alpha), key)
    )
    np.testing.assert_allclose(metric, h(alpha) - found, rtol=1e-6)


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
    np.testing.assert_array_equal(there, single_loop.evaluated(steps, points))


def tiny() -> single_loop.System:
    """Quadratics of 200 samples and few rates."""

    def draw(arrays):
        drawn = quadratics.plot(arrays)
        few = lambda data: hg.Batches(jax.tree.map(lambda x: x[:200], data.data), 20)
        problem = drawn.problem
        problem = hg.Bilevel(
            *(problem.inner_loss, problem.outer_loss),
            *map(few, (problem.inner_data, problem.outer_data)),
        )
        return Drawn(problem, *drawn[1:])

    return quadratics.SYSTEM._replace(
        name="tiny", draw=draw, budget=30, batches=10, rates=(0.1, 0.01), ratios=(0.1,)
    )


@pytest.mark.slow
def test_a_grid_chooses_and_its_table_goes_with_the_choice(tmp_path, monkeypatch):
    """The lower of the ends; no more than the budget; the same seed, the same run."""
    monkeypatch.setattr(single_loop_grid, "RESULTS", tmp_path)
    system = tiny()
    with pytest.raises(ValueError, match="tiny-grid"):
        single_loop_table.measure(system, {"method": "SOBA", "seed": 0})
    row = single_loop_grid.try_all(system, {"method": "SOBA"})
    assert (row["rate"], row["ratio"]) in system.pairs
    assert single_loop_grid.at_edge(row)
    line = record.line({"method": "SOBA", "seed": 0} | row)
    (tmp_path / "tiny-grid.jsonl").write_text(line)
    found = single_loop_table.measure(system, {"method": "SOBA", "seed": 3})
    assert (found["rate"], found["num_steps"]) == (row["rate"], row["num_steps"])
    assert 0.9 * system.budget < found["gradient_equivalents"] <= system.budget
    assert found["end"] == single_loop_table.end(found["curve"], found["curve_cost"])
    assert len(found["curve"]) == len(found["curve_cost"]) > 10
    again = single_loop_table.measure(system, {"method": "SOBA", "seed": 3})
    assert again["curve"] == found["curve"]
    for other, named in (
        ({"about": lambda: "other data"}, "other data"),
        ({"budget": 31}, "budget 30"),
        ({"rates": (0.1, 0.02)}, "pairs of rates"),
    ):
        with pytest.raises(ValueError, match=named):
            single_loop_table.measure(
                system._replace(**other), {"method": "SOBA", "seed": 3}
            )


def test_the_pair_is_chosen_whose_worse_run_is_lowest():
    """A run that broke off is as bad as can be; where all did, nothing is chosen."""
    pairs = [(1.0, 0.1), (0.1, 0.1), (0.01, 0.1)]
    ends = [[1e-9, np.nan], [1e-3, 1e-2], [1e-4, 1e-1]]
    row = single_loop_grid.chosen(pairs, ends, "SOBA")
    assert (row["rate"], row["ratio"]) == (0.1, 0.1)
    assert row["ends"] == [np.inf, 1e-2, 1e-1]
    with pytest.raises(ValueError, match="SOBA"):
        single_loop_grid.chosen(pairs, [[np.nan, 1.0]] * 3, "SOBA")


def test_an_edge_is_where_nothing_within_is_as_good():
    """Of nine pairs the middle one alone is within; among equals nothing is chosen."""
    pairs = [(rate, ratio) for rate in (1.0, 0.1, 0.01) for ratio in (0.3, 0.1, 0.03)]
    row = lambda ends: single_loop_grid.chosen(pairs, [[end] for end in ends], "SOBA")
    assert single_loop_grid.at_edge(row([1.0, 9, 9, 9, 2, 9, 9, 9, 9]))
    assert single_loop_grid.at_edge(row([9.0, 9, 9, 9, np.nan, 1, 9, 9, 9]))
    assert not single_loop_grid.at_edge(row([9.0, 9, 9, 9, 1, 9, 9, 9, 2]))
    assert not single_loop_grid.at_edge(row([1.0] * 9))


def test_no_method_spends_more_than_its_budget():
    """A period of 64 steps that begins with 65: the first 36 cost 100."""

    def run(steps):
        dear = jnp.where(jnp.arange(steps) % 64 == 0, 65.0, 1.0)
        return lambda rate, ratio: types.SimpleNamespace(cost=jnp.cumsum(dear))

    slow = 0.1, 0.1
    steps = lambda method: single_loop_grid.steps_for(100.0, method, run, (), slow)
    assert steps("SRBA") == 36
    assert steps("TTSA") == 50
    assert steps(single_loop.DOUBLE_LOOP) == 1
    single_loop_table.within_budget("SOBA", 104.0, 100.0)
    with pytest.raises(ValueError, match="SOBA cost 106"):
        single_loop_table.within_budget("SOBA", 106.0, 100.0)


def test_random_search_keeps_the_best_so_far():
    """By the outer value, never better by looking at the metric."""
    system = tiny()
    arrays = jax.tree.map(jnp.asarray, system.prepare(0))
    key = jax.random.key(0)
    row = single_loop_table.by_random_search(system, 3000, arrays, key)
    start = quadratics.suboptimality(
        arrays["best"], arrays["Q"], None, jnp.zeros(10), None
    )
    assert row["curve"][-1] <= start * (1 + 1e-6)
    assert len(row["curve"]) == len(row["curve_cost"]) == system.points
    assert row["num_steps"] > 2
    assert row["end"] == row["curve"][-1]
    assert row["gradient_equivalents"] <= row["curve_cost"][-1] == 3000
    shorter = single_loop_table.by_random_search(system, 1500, arrays, key)
    assert shorter["end"] == row["curve"][system.points // 2 - 1]
    poor = single_loop_table.by_random_search(system, 1, arrays, key)
    assert np.isnan(poor["curve"]).all()
    assert poor["end"] == np.inf


def rows_of(method: str, ends: list[float], **columns) -> list[dict]:
    return [
        {"method": method, "seed": seed, "end": end, **columns}
        for seed, end in enumerate(ends)
    ]


def test_how_much_lower_is_a_ratio_paired_by_seed():
    """Reproduced where its interval is above what is claimed; a broken run is said."""
    spread = np.exp(np.linspace(-1, 1, 5))
    rows = rows_of("A", list(0.01 * spread)) + rows_of("B", list(1.0 * spread))
    verdict = single_loop_table.lower_end(rows, "A", "B", 10)
    assert "100 [100, 100] times lower" in verdict.text
    assert verdict.text.endswith(": reproduced")
    assert not verdict.failed
    verdict = single_loop_table.lower_end(rows, "A", "B", 200)
    assert "not reproduced" in verdict.text
    assert verdict.failed
    assert not single_loop_table.lower_end(rows, "A", "B", 200, "(o) ").failed
    broken = [*rows[:-1], rows[-1] | {"end": None}]
    assert single_loop_table.lower_end(broken, "A", "B", 10).failed
    assert single_loop_table.lower_end(rows[:4] + rows[5:9], "A", "B", 10).failed


def test_who_is_first_at_a_plateau():
    """Cost of the first evaluation within twice of the end."""
    early = {"curve": [99.0, 1.9, 1.0], "curve_cost": [0.0, 10.0, 20.0]}
    late = {"curve": [99.0, 2.1, 1.0], "curve_cost": [0.0, 10.0, 20.0]}
    rows = rows_of("SOBA", [1.0] * 5, **early) + rows_of("SABA", [1.0] * 5, **late)
    assert single_loop_table.first_there(rows, "SOBA").text.endswith(": reproduced")
    assert "not reproduced" in single_loop_table.first_there(rows, "SABA").text


def test_who_hardly_moved_is_at_no_plateau():
    """An end less than ten times below the start."""
    still = {"curve": [9.0, 1.9, 1.0], "curve_cost": [0.0, 1.0, 20.0]}
    fell = {"curve": [11.0, 2.1, 1.0], "curve_cost": [0.0, 10.0, 20.0]}
    rows = rows_of("SOBA", [1.0] * 5, **fell) + rows_of("DARTS", [1.0] * 5, **still)
    assert single_loop_table.first_there(rows, "SOBA").text.endswith(": reproduced")
    assert "not reproduced" in single_loop_table.first_there(rows[5:], "DARTS").text


def test_the_figure_of_a_step_shows_what_is_claimed(tmp_path, monkeypatch):
    """A vertical line at five gradients."""
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    soba_step.plot([{"soba": 3.0, "plain": 4.0}], tmp_path / "step.png")
    drawn = [set(line.get_xdata()) for line in pyplot.gcf().axes[0].lines]
    assert {soba_step.MOST_GRADIENTS} in drawn
    assert (tmp_path / "step.png").exists()


def test_the_gap_is_closed_by_parts():
    """Baseline 80, oracle 90, a method at 86 on average: 60%."""
    cells = [("baseline", 0.80), ("oracle", 0.90), ("SOBA", 0.86), ("SABA", 0.85)]
    rows = [
        {"method": method, "share": 0.5, "seed": seed, "accuracy": x + 0.01 * seed}
        for method, x in cells
        for seed in range(5)
    ]
    for method, part in (("SOBA", 0.6), ("SABA", 0.5)):
        np.testing.assert_allclose(corruption.closed(rows, method, 0.5), part)
    first, *rest = corruption.judge(rows)
    assert "1 methods of the family close at least 60%" in first.text
    assert first.text.endswith("not reproduced")
    assert len(rest) == 2


@pytest.mark.slow
def test_batches_of_cleaning_are_its_losses_on_average():
    """Value and both gradients over all batches of one, held-out examples and all."""
    data = jax.tree.map(jnp.asarray, hg.datasets.load("digits"))
    make = functools.partial(
        cleaning.make, key=jax.random.key(0), hold_out=True, corruption=0.7, data=data
    )
    all_of, batched = make().problem, make(batch_size=1).problem
    keys = jax.random.split(jax.random.key(1), 3)
    w = {"W": jax.random.normal(keys[0], (64, 10)), "b": jnp.ones(10)}
    alpha = jax.random.uniform(keys[1], (1000,))
    for side in ("inner", "outer"):
        loss, batch_loss = (
            getattr(problem, f"{side}_loss") for problem in (all_of, batched)
        )
        batches = getattr(batched, f"{side}_data")
        mean = lambda w, alpha, loss=batch_loss, batches=batches: jnp.mean(
            jax.vmap(lambda i: loss(w, alpha, batches.take(i[None])))(
                jnp.arange(batches.num_examples)
            )
        )
        both = functools.partial(jax.value_and_grad, argnums=(0, 1))
        expected = both(loss)(w, alpha, getattr(all_of, f"{side}_data"))
        found = both(mean)(w, alpha)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    wrong = cleaning.split(data, jax.random.key(0), True, 0.7)["train"]["wrong"]
    assert 0.65 < np.mean(wrong) < 0.75


@pytest.mark.slow
def test_a_series_of_random_length_ends_within_the_budget(tmp_path, monkeypatch):
    """It stays where its last evaluation was that the budget pays for."""
    monkeypatch.setattr(single_loop_grid, "RESULTS", tmp_path)
    system = tiny()
    row = single_loop_grid.try_all(system, {"method": "SUSTAIN"}) | {"num_steps": 200}
    line = record.line({"method": "SUSTAIN", "seed": 0} | row)
    (tmp_path / "tiny-grid.jsonl").write_text(line)
    found = single_loop_table.measure(system, {"method": "SUSTAIN", "seed": 3})
    cost, curve = (np.array(found[name]) for name in ("curve_cost", "curve"))
    assert 0.8 * system.budget < cost[-1] <= system.budget
    kept = np.unique(cost)
    assert len(kept) < len(cost)
    assert np.all(curve[cost == kept[-1]] == curve[-1])
    assert found["end"] == single_loop_table.end(curve, cost)
    assert found["gradient_equivalents"] == cost[-1]


@pytest.mark.slow
def test_weights_rest_where_the_budget_ends(monkeypatch):
    """As in a run of fewer steps, which costs as much: six of 0.3 each."""
    monkeypatch.setattr(corruption, "BUDGET", 2)
    data, lane = corruption.digits(), corruption.lane_of(0, 0.5, 1e-3, False)
    alpha, cost, _ = corruption.learn("SOBA", 12, (0.3, 0.1), data, lane)
    run = functools.partial(corruption.weights, "SOBA", 6, paid=6)
    shorter = jax.jit(run)(data, lane, 0.3, 0.1)
    np.testing.assert_allclose(alpha, shorter.alpha, rtol=1e-5)
    assert cost["gradient_equivalents"] == pytest.approx(1.8)
    assert cost["num_hvps"] == pytest.approx(0.6)


def test_random_search_takes_the_best_that_was_paid_for(monkeypatch):
    """Not a trial that ended beyond the budget, though it was begun within."""
    data, lane = corruption.digits(), corruption.lane_of(0, 0.5, 1e-3, False)
    trials = [
        {"alpha": [[x]], "value": x, "cost": cost}
        for x, cost in ((0.3, 40.0), (0.2, 90.0), (0.1, 101.0))
    ]

    def search(*args, trial_callback, **settings):
        for trial in trials:
            trial_callback(trial)
        cost = jnp.array([trial["cost"] for trial in trials])
        return types.SimpleNamespace(
            value=jnp.array([trial["value"] for trial in trials]),
            cost=cost,
            stats={"num_grads": jnp.ones(3), "num_hvps": jnp.ones(3)},
            status="completed",
        )

    monkeypatch.setattr(hg, "search", search)
    alpha, cost, _ = corruption.by_random_search(100, data, lane)
    assert alpha.tolist() == [0.2]
    assert (cost["gradient_equivalents"], cost["num_grads"]) == (90.0, 2.0)


def test_a_run_ends_where_its_last_step_leads():
    """The last tenth of the cost alone counts, the alpha after the last step too."""
    cost = np.array([0.0, 50.0, 90.0, 100.0])
    assert single_loop_table.end([9.0, 9.0, 4.0, 1.0], cost) == pytest.approx(2.0)
    assert single_loop_table.end([9.0, 9.0, 4.0, np.nan], cost) == np.inf
    assert single_loop_table.end([9.0, 1.0], np.array([0.0, 50.0])) == pytest.approx(
        1.0
    )
    system = tiny()
    arrays = jax.tree.map(jnp.asarray, system.prepare(0))
    given = arrays, jnp.float32(0.1), jnp.float32(0.1), jax.random.key(0)
    found = single_loop.curve(system, "SOBA", 7, 20, *given)
    trace = single_loop.run(system, "SOBA", 7, 20, *given)
    of = functools.partial(quadratics.suboptimality, arrays["best"], arrays["Q"], None)
    np.testing.assert_allclose(found["curve"][0], of(jnp.zeros(10), None), rtol=1e-5)
    np.testing.assert_allclose(found["curve"][-1], of(trace.alpha, None), rtol=1e-5)
    np.testing.assert_allclose(found["curve_cost"][0], 0, atol=1e-6)
    np.testing.assert_allclose(found["curve_cost"][1:], trace.cost, rtol=1e-5)
