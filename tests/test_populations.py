"""Searchers that train populations: against runs written out here, step by step."""

import itertools
import math
import os
import re
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import population
from hypergrad.inner import inner_stats
from hypergrad.inner.descent import run_inner_steps
from hypergrad.searchers import halving, populations

SPACE = {"center": hg.spaces.Interval(-2.0, 2.0, shape=(2,))}
A = jnp.array([[3.0, 1.0], [1.0, 2.0]]) / 4


def inner(w, alpha, batch):
    """Its minimum is at ``alpha``."""
    off = w - alpha["center"]
    return 0.5 * off @ A @ off


def outer(w, alpha, batch):
    """Least at ``w = (1, -1)``."""
    return jnp.sum((w - jnp.array([1.0, -1.0])) ** 2)


PROBLEM = hg.Bilevel(inner, outer)
MOMENTUM = optax.sgd(0.3, momentum=0.5)


def setting(num_steps):
    return populations.PopulationConfig(
        PROBLEM, hg.Descent(MOMENTUM, num_steps), {}, jnp.zeros(2), SPACE,
        {"num_grads": 1.0, "num_hvps": 0.0, "num_values": 0.0}, (1.0, 1 / 3),
    )  # fmt: skip


def written_out(alpha, num_steps):
    """Heavy ball by hand."""
    w, v = np.zeros(2), np.zeros(2)
    for _ in range(num_steps):
        v = 0.5 * v + np.asarray(A) @ (w - np.asarray(alpha["center"]))
        w = w - 0.3 * v
    return w


# searcher -> (steps of its solver, budget in gradient-equivalents), as its docstring
# states it: twice what the slower of seeds 100 and 101 needed, rounded up to hundreds.
BUDGETS = {
    "pbt": (hg.searchers.PopulationBasedTraining(16), 5, 200),
    "halving": (hg.searchers.SuccessiveHalving(27), 27, 600),
    "hyperband": (hg.searchers.Hyperband(), 27, 1000),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_each_finds_the_optimum_within_its_budget(name):
    """On the median of seeds 0..9: a member trained in full, a tenth of an axis off.

    The best centre is (1, -1), in a square with edges of 4.
    """
    searcher, num_steps, budget = BUDGETS[name]
    solver, best = hg.Descent(MOMENTUM, num_steps), []
    for seed in range(10):
        trace = hg.search(
            PROBLEM, solver, searcher, jnp.zeros(2), space=SPACE, budget=budget,
            key=jax.random.key(seed),
        )  # fmt: skip
        assert trace.cost[-1] <= budget
        full = trace.metrics["steps"] >= num_steps
        best.append(min(trace.value[full], default=np.inf))
    assert np.median(best) <= 0.01 * 4**2
    stated = " ".join(type(searcher).__doc__.split("Budget: ")[1].split())
    assert f"{budget} gradient-equivalents" in stated.split(" Source: ")[0]


def all_of(searcher, given, count):
    """What the first so many rounds leave."""
    found = []
    for index in range(count):
        before = found[-1] if found else None
        found.append(searcher.round(given, index, before, jax.random.key(0)))
    return found


def one_of(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def test_those_who_are_kept_train_on_as_if_unbroken():
    """Momentum goes on too: a survivor's w is that of so many steps by hand."""
    given = setting(27)
    found = all_of(hg.searchers.SuccessiveHalving(9), given, 3)
    assert [len(rung.rows.value) for rung in found] == [9, 3, 1]
    assert [rung.rows.stats["num_inner_steps"][0] for rung in found] == [3, 6, 18]
    for rung, made in zip(found, (3, 9, 27), strict=True):
        for i in range(len(rung.rows.value)):
            alpha, w = one_of((rung.members.alpha, rung.members.carry[0]), i)
            np.testing.assert_allclose(w, written_out(alpha, made), rtol=1e-12)
    first, second = found[:2]
    best = np.argsort(first.rows.value)[:3]
    np.testing.assert_array_equal(
        second.members.alpha["center"], first.members.alpha["center"][best]
    )


def test_the_best_is_one_that_was_trained_in_full():
    """An early stop may look better: w there is halfway to an alpha that is too far."""
    trace = hg.search(
        PROBLEM, hg.Descent(optax.sgd(0.3), 27), hg.searchers.Hyperband(),
        jnp.zeros(2), space=SPACE, budget=2000,
    )  # fmt: skip
    full = trace.metrics["steps"] == 27
    assert trace.value.min() < trace.value[full].min()
    value = outer(trace.w, trace.best_alpha, None)
    np.testing.assert_allclose(value, trace.value[full].min(), rtol=1e-12)


def test_every_rung_makes_a_step():
    """Of 1, 1, 1, 1 and 5 steps only the first and the last are rungs."""
    rungs = hg.searchers.SuccessiveHalving(81).rungs(5)
    assert [tuple(rung) for rung in rungs] == [(81, 0, 1), (1, 1, 5)]
    for searcher in (hg.searchers.SuccessiveHalving(27, 2), hg.searchers.Hyperband(2)):
        for steps in range(1, 30):
            rungs = searcher.rungs(steps)
            assert all(rung.begin < rung.end for rung in rungs)
            assert rungs[-1].end == steps


@pytest.mark.parametrize("failed", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize(
    ("searcher", "num_steps"),
    [
        (hg.searchers.PopulationBasedTraining(4), 2),
        (hg.searchers.SuccessiveHalving(4, eta=2), 4),
    ],
    ids=["pbt", "halving"],
)
def test_a_member_that_failed_is_never_the_best(searcher, num_steps, failed):
    """A step adds one to ``w``; beyond two of them there is no value."""
    count = lambda w, alpha, batch: -w
    late = lambda w, alpha, batch: jnp.where(w > 2, failed, alpha)
    trace = hg.search(
        hg.Bilevel(count, late), hg.Descent(optax.sgd(1.0), num_steps), searcher, 0.0,
        space=hg.spaces.Unit(), budget=20,
    )  # fmt: skip
    steps = trace.metrics["steps"]
    assert steps.max() == 4
    np.testing.assert_array_equal(jnp.isfinite(trace.value), steps <= 2)
    assert trace.w == 2
    assert trace.best_alpha == trace.value[steps == 2].min()


def test_brackets_of_hyperband_are_those_of_its_table():
    """R = 81, eta = 3: 81, 34, 15, 8 and 5 draws of 1, 3, 9, 27 and 81 steps."""
    given = setting(81)
    rungs = [rung.rows for rung in all_of(hg.searchers.Hyperband(), given, 15)]
    found = [(len(rows.value), rows.metrics["steps"][0]) for rows in rungs]
    assert found == [
        *((81, 1), (27, 3), (9, 9), (3, 27), (1, 81)),
        *((34, 3), (11, 9), (3, 27), (1, 81)),
        *((15, 9), (5, 27), (1, 81)),
        *((8, 27), (2, 81)),
        (5, 81),
    ]


def test_a_population_inherits_every_bit_and_moves_alpha_by_a_step_of_u():
    """Carries are copied; alpha moves by 0.2 of u; the best stay as they are."""
    searcher, given = hg.searchers.PopulationBasedTraining(8), setting(3)
    start = given.start(8, jax.random.key(0))
    trained, rows = given.train(start, 3, jax.random.key(1))
    value = rows.value.at[2].set(jnp.nan)
    members, parents = searcher.replaced(SPACE, trained, value, jax.random.key(2))
    order = np.argsort(np.where(np.isnan(value), np.inf, value))
    assert order[-1] == 2
    assert set(np.asarray(parents)[order[-2:]]) <= set(order[:2].tolist())
    for i, parent in enumerate(np.asarray(parents)):
        for mine, theirs in zip(
            *(jax.tree.leaves(m.carry) for m in (members, trained)), strict=True
        ):
            assert np.array_equal(mine[i], theirs[parent])
        moved = hg.spaces.inverse(SPACE, one_of(members.alpha, i))
        old = one_of(trained.alpha, parent)
        change = moved["center"] - hg.spaces.inverse(SPACE, old)["center"]
        expected = 0.2 if i in order[-2:] else 0.0
        np.testing.assert_allclose(np.abs(change), expected, rtol=1e-9)
        if not expected:
            assert parent == i


def test_rates_of_a_population_may_be_its_hyperparameters():
    """The solver reads alpha; the ledger counts a gradient a step and member."""
    loss = lambda w, alpha, batch: 0.5 * jnp.sum(w**2)
    solver = hg.Descent(lambda alpha: optax.sgd(alpha), 4)
    trace = hg.search(
        hg.Bilevel(loss, loss), solver, hg.searchers.PopulationBasedTraining(4), jnp.ones(2),
        space=hg.spaces.Interval(1e-3, 1.0, log=True), budget=100,
        metrics={"rate": lambda w, alpha, key: alpha},
    )  # fmt: skip
    each = 4 + 1 / 3
    np.testing.assert_allclose(trace.cost[-1], len(trace.value) * each)
    assert len(trace.value) == 4 * int(100 / (4 * each))
    parent = np.asarray(trace.metrics["parent"]).reshape(-1, 4)
    np.testing.assert_array_equal(parent[0], np.arange(4))
    first = trace.metrics["rate"][:4]
    np.testing.assert_allclose(trace.value[:4], (1 - first) ** 8, rtol=1e-9)


def test_a_users_draw_is_not_run_by_the_host_every_round():
    """More rounds call it no more often; costs are those of its sizes."""

    def calls(budget):
        seen = []

        def draw(key):
            seen.append(None)
            batch = hg.Batches(jax.random.normal(key, (6, 1)), 2)
            return batch, jnp.ones((3, 1))

        mean = lambda w, alpha, batch: jnp.mean((w - alpha - batch) ** 2)
        trace = hg.search(
            hg.Bilevel(mean, mean, data_fn=draw), hg.Descent(MOMENTUM, 6),
            hg.searchers.PopulationBasedTraining(4), 0.0, space=hg.spaces.Unit(), budget=budget,
        )  # fmt: skip
        each = 6 * 2 / 6 + 0.5 / 3
        np.testing.assert_allclose(trace.cost[-1], len(trace.value) * each)
        assert len(trace.value) == 4 * int(budget / (4 * each))
        return len(seen)

    # Both budgets pay for a second round, which has a program of its own.
    assert calls(20.0) == calls(60.0)


class HeavyBall(eqx.Module):
    """A user's own solver: no optimizer of optax, and two gradients a step."""

    rate: float
    num_steps: int = eqx.field(static=True)
    differentiable = True

    def init(self, inner_loss, w, alpha, data, key):
        return w, jnp.zeros_like(w)

    def step(self, inner_loss, carry, alpha, data, key):
        w, v = carry
        v = 0.5 * v + jax.grad(inner_loss)(w, alpha, None)
        return w - self.rate * v, v

    def solve(self, inner_loss, w, alpha, data, key):
        w, _ = run_inner_steps(self, inner_loss, w, alpha, data, key)
        return w, inner_stats(self.num_steps, num_grads=2 * self.num_steps)


@pytest.mark.parametrize(
    "searcher",
    [hg.searchers.PopulationBasedTraining(8), hg.searchers.SuccessiveHalving(9)],
    ids=["pbt", "halving"],
)
def test_a_solver_of_ones_own_is_trained_step_by_step(searcher):
    """Like optax's with the same step; its cost is what its solve reports."""
    run = lambda solver: hg.search(
        PROBLEM, solver, searcher, jnp.zeros(2), space=SPACE, budget=700,
        key=jax.random.key(0),
    )  # fmt: skip
    own, optaxs = run(HeavyBall(0.3, 9)), run(hg.Descent(MOMENTUM, 9))
    trials = len(own.value)
    assert 0 < trials < len(optaxs.value)
    np.testing.assert_allclose(own.value, optaxs.value[:trials], rtol=1e-9)
    steps = own.stats["num_inner_steps"]
    np.testing.assert_array_equal(own.stats["num_grads"], 2 * steps)
    np.testing.assert_allclose(own.cost, np.cumsum(2 * steps + 1 / 3), rtol=1e-12)


# One shot: two choices, of three and of four, each with weights of its own.

NODES = {"first": hg.spaces.Choice(3), "second": hg.spaces.Choice((5, 7, 8, 9))}
FIRST, SECOND = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.2, -0.3, 0.7])


def picked(tables, alpha):
    """The weights that ``alpha`` names, one of each table."""
    second = jnp.argmax(jnp.array([5, 7, 8, 9]) == alpha["second"])
    return jnp.stack([tables[0][alpha["first"]], tables[1][second]])


SUPERNET = hg.Bilevel(
    lambda w, alpha, batch: (
        0.5 * jnp.sum((picked(w, alpha) - picked((FIRST, SECOND), alpha)) ** 2)
    ),
    lambda w, alpha, batch: jnp.sum(jnp.array([1.0, 3.0]) * picked(w, alpha) ** 2),
)
SHOT = hg.Descent(optax.sgd(1.0), 60)
TRUE = np.add.outer(np.asarray(FIRST) ** 2, 3 * np.asarray(SECOND) ** 2)


def shoot(solver, budget, **changes):
    tables = jnp.zeros(3), jnp.zeros(4)
    return hg.search(
        SUPERNET, solver, hg.searchers.OneShot(16), tables, space=NODES, budget=budget,
        metrics={
            "first": lambda w, alpha, key: alpha["first"],
            "second": lambda w, alpha, key: alpha["second"],
        },
        **{"key": jax.random.key(0)} | changes,
    )  # fmt: skip


def test_shared_weights_rank_as_trainings_do_where_they_factorise():
    """A step of rate 1 fits the rows it meets; all are met but for 4 (3/4)^60."""
    trace = shoot(SHOT, 90.0)
    assert len(trace.value) > 40
    np.testing.assert_allclose(trace.w[0], FIRST, atol=1e-12)
    np.testing.assert_allclose(trace.w[1], SECOND, atol=1e-12)
    first = np.asarray(trace.metrics["first"], int)
    second = np.searchsorted([5, 7, 8, 9], trace.metrics["second"])
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 12
    np.testing.assert_allclose(trace.value, TRUE[first, second], rtol=1e-9)
    trained = hg.search(
        SUPERNET, SHOT, hg.searchers.Grid(1),
        (jnp.zeros(3), jnp.zeros(4)), space=NODES, budget=1e4,
    )  # fmt: skip
    np.testing.assert_allclose(trained.value, TRUE.ravel(), rtol=1e-9)
    assert (trace.best_alpha["first"], trace.best_alpha["second"]) == (0, 7)
    np.testing.assert_allclose(trace.value.min(), TRUE.min(), rtol=1e-9)


@pytest.mark.parametrize(("steps", "budget", "rounds"), [(7, 9.0, 0), (7, 20.0, 2)])
def test_one_shot_costs_one_training_and_a_value_a_draw(steps, budget, rounds):
    trace = shoot(hg.Descent(optax.sgd(0.5), steps), budget)
    assert len(trace.value) == 1 + 16 * rounds
    np.testing.assert_array_equal(trace.stats["num_grads"][:1], steps)
    np.testing.assert_array_equal(trace.stats["num_grads"][1:], 0)
    np.testing.assert_array_equal(trace.stats["num_outer_values"], 1)
    np.testing.assert_array_equal(trace.metrics["steps"], steps)
    cost = steps + np.arange(1, 1 + len(trace.value)) / 3
    np.testing.assert_allclose(trace.cost, cost, rtol=1e-12)
    assert trace.cost[-1] <= budget < trace.cost[-1] + 16 / 3


def test_one_shot_compares_all_choices_on_the_same_data():
    """Of a draw that is the value but for alpha: equal choices are equal."""
    noise = lambda key: (None, jax.random.normal(key, (1,)))
    read = lambda w, alpha, batch: jnp.sum(batch) + alpha
    trace = hg.search(
        hg.Bilevel(lambda w, alpha, batch: w**2, read, data_fn=noise),
        hg.Descent(optax.sgd(0.5), 2), hg.searchers.OneShot(4), 0.0,
        space=hg.spaces.Choice(3), budget=10, key=jax.random.key(0),
        metrics={"choice": lambda w, alpha, key: alpha},
    )  # fmt: skip
    assert len(set(trace.metrics["choice"].tolist())) == 3
    off = trace.value - trace.metrics["choice"]
    np.testing.assert_allclose(off, off[0], atol=1e-14)


def test_one_shot_draws_a_choice_a_step_uniformly():
    """A counter a choice, moved by one where it is drawn: chi-square of 600 steps."""
    counts = lambda w, alpha, batch: -w[alpha]
    trace = hg.search(
        hg.Bilevel(counts, counts), hg.Descent(optax.sgd(1.0), 600),
        hg.searchers.OneShot(4), jnp.zeros(3), space=hg.spaces.Choice(3), budget=1,
    )  # fmt: skip
    assert trace.w.sum() == 600
    assert np.sum((trace.w - 200) ** 2 / 200) < 18.4  # chi2(2): p = 1e-4


def test_one_shot_finds_the_optimum_within_its_budget():
    """Of 48 draws one is the best of twelve choices but for (11/12)^48 = 0.015."""
    found = []
    for seed in range(10):
        trace = shoot(SHOT, 60 + 49 / 3 + 0.1, key=jax.random.key(seed))
        assert len(trace.value) == 49
        found.append(trace.value.min())
    np.testing.assert_allclose(np.median(found), TRUE.min(), rtol=1e-9)
    stated = " ".join(hg.searchers.OneShot.__doc__.split("Budget: ")[1].split())
    assert "four draws a choice" in stated


RESUMED = {
    "pbt": (hg.searchers.PopulationBasedTraining(4), 3, 70.0, 5),
    "halving": (hg.searchers.SuccessiveHalving(9), 9, 45.0, 5),
    "hyperband": (hg.searchers.Hyperband(), 9, 90.0, 7),
    "one shot": (hg.searchers.OneShot(4), 6, 10.0, 3),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_search_killed_after_any_round_goes_on_to_the_same_trace(name, tmp_path):
    """To the bit, ledger and dtypes included; no round is trained twice or lost."""
    searcher, num_steps, budget, rounds = RESUMED[name]
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), MOMENTUM)
    solver = hg.Descent(noisy, num_steps)  # its state holds a key

    def search(**changes):
        saved, done = [], []

        def record(known):
            file = tmp_path / f"{len(saved)}.npz"
            np.savez(file, **known)
            saved.append(file)

        trace = hg.search(
            problem, solver, searcher, {"w": jnp.zeros(2)}, space=SPACE,
            key=jax.random.key(0), trial_callback=record,
            progress=lambda *seen: done.append(seen),
            metrics={"a": lambda w, alpha, key: w["w"][0], "no": lambda *_: jnp.nan},
            **{"budget": budget} | changes,
        )  # fmt: skip
        known = []
        for file in saved:
            with np.load(file, allow_pickle=False) as arrays:
                known.append(dict(arrays))
        return trace, known, done

    problem = hg.Bilevel(
        lambda w, alpha, batch: inner(w["w"], alpha, batch),
        lambda w, alpha, batch: outer(w["w"], alpha, batch),
    )
    trace, known, done = search()
    assert len(known) == rounds
    for k in range(1, rounds + 1):
        resumed, later, seen = search(previous_trials=known[k - 1 : k])
        jax.tree.map(np.testing.assert_array_equal, trace, resumed)
        assert jax.tree.all(
            jax.tree.map(lambda x, y: x.dtype == y.dtype, trace, resumed)
        )
        assert seen == done[k:]
        jax.tree.map(np.testing.assert_array_equal, later, known[k:])
    # A search that ended goes on with a larger budget.
    longer, *_ = search(budget=2 * budget)
    resumed, *_ = search(budget=2 * budget, previous_trials=known)
    assert len(longer.value) > len(trace.value)
    jax.tree.map(np.testing.assert_array_equal, longer, resumed)


def test_half_precision_goes_on_as_well(tmp_path):
    """NumPy stores a bfloat16 as two bytes of no name."""
    known = []
    search = lambda **changes: hg.search(
        PROBLEM, hg.Descent(MOMENTUM, 3), hg.searchers.PopulationBasedTraining(4),
        jnp.zeros(2, jnp.bfloat16), space=SPACE, budget=60, trial_callback=known.append,
        **changes,
    )  # fmt: skip
    trace = search()
    np.savez(tmp_path / "known.npz", **known[0])
    with np.load(tmp_path / "known.npz", allow_pickle=False) as arrays:
        resumed = search(previous_trials=[dict(arrays)])
    assert resumed.w.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, trace, resumed)


def test_rounds_of_another_search_are_refused():
    known = []

    def search(searcher=None, num_steps=3, w=None, problem=PROBLEM, **changes):
        searcher = (
            hg.searchers.PopulationBasedTraining(4) if searcher is None else searcher
        )
        settings = {"space": SPACE, "budget": 40} | changes
        w = jnp.zeros(2) if w is None else w
        hg.search(problem, hg.Descent(MOMENTUM, num_steps), searcher, w, **settings)

    search(trial_callback=known.append)
    for changes in (
        {"searcher": hg.searchers.PopulationBasedTraining(8)},
        {"searcher": hg.searchers.SuccessiveHalving(9)},
        {"num_steps": 4},
        {"key": jax.random.key(1)},
        {"searcher": hg.searchers.PopulationBasedTraining(4, perturbation=0.3)},
        {
            "searcher": hg.searchers.PopulationBasedTraining(
                4, perturbation=jnp.array(0.3)
            )
        },
        {"space": {"center": hg.spaces.Interval(-2.0, 3.0, shape=(2,))}},
        {"space": {"center": hg.spaces.Interval(jnp.full(2, -1.0), 2.0, shape=(2,))}},
        {"w": jnp.ones(2)},
        {"problem": hg.Bilevel(inner, outer, None, jnp.ones(3))},
    ):
        with pytest.raises(ValueError, match=r"trials\[-1\] was recorded by Pop.*key"):
            search(previous_trials=known, **changes)
    with pytest.raises(ValueError, match=r"trials\[-1\] was recorded by None"):
        search(previous_trials=[{}])
    with pytest.raises(
        ValueError, match=r"by Pop.* metrics \[\],.* search is .* metrics \['more'\]"
    ):
        search(previous_trials=known, metrics={"more": lambda w, alpha, key: 0.0})
    with pytest.raises(ValueError, match=r"no round .* best\.value"):
        search(previous_trials=[{"search": known[-1]["search"]}])
    for name, shape in (
        ("last.members.carry.0", (4, 3)), ("last.members.carry.0", ()),
        ("best.w", (3,)), ("rows.value", (4, 2)),
    ):  # fmt: skip
        cut = known[-1] | {name: np.zeros(shape)}
        with pytest.raises(
            ValueError, match=rf"{name} of shape {re.escape(str(shape))}"
        ):
            search(previous_trials=[cut])
    for name in ("rounds", "rows.value"):
        with pytest.raises(ValueError, match=f"{name} that is no number"):
            search(previous_trials=[known[-1] | {name: np.asarray("many")}])
    for name in ("rows.value", "last.rows.value", "last.members.alpha.center"):
        cut = known[-1] | {name: known[-1][name][:1]}
        with pytest.raises(ValueError, match=f"cut short.*{name}': 1"):
            search(previous_trials=[cut])
    for broken in (None, 5, "rounds.npz", known[-1]):
        with pytest.raises(TypeError, match="trials must be a list of dicts"):
            search(previous_trials=broken)
    for broken in (None, 5, "rounds.npz"):
        with pytest.raises(TypeError, match="must be a dict"):
            search(previous_trials=[broken])


@pytest.mark.parametrize("name", ["inner", "outer", "metric", "rate"])
def test_rounds_by_other_closed_over_numbers_are_refused(name):
    """Two rates of optax, two factors in a loss or a metric; not the same anew."""

    def search(inner=1.0, outer=1.0, metric=1.0, rate=0.1, **changes):
        close = lambda f, factor: lambda *inputs: factor * f(*inputs)
        problem = hg.Bilevel(close(LOSSES[0], inner), close(LOSSES[1], outer))
        searcher = hg.searchers.PopulationBasedTraining(4)
        return hg.search(
            problem, hg.Descent(optax.sgd(rate), 3), searcher, jnp.zeros(2),
            space=SPACE, budget=40, **changes,
            metrics={"sum": lambda w, alpha, key: jnp.sum(metric * w)},
        )  # fmt: skip

    known = []
    trace = search(trial_callback=known.append)
    resumed = search(previous_trials=known)
    jax.tree.map(np.testing.assert_array_equal, trace, resumed)
    with pytest.raises(ValueError, match=r"trials\[-1\] was recorded by .* program"):
        search(previous_trials=known, **{name: 0.4})


LOSSES = inner, outer


def test_the_shared_weights_of_another_supernet_are_refused():
    """Their first axis is no axis of members."""
    known = []
    shoot(SHOT, 60.0, trial_callback=known.append)
    cut = known[-1] | {"last.members.shared.0.0": np.zeros(2)}
    with pytest.raises(ValueError, match=r"shared\.0\.0 of shape \(2,\)"):
        shoot(SHOT, 60.0, previous_trials=[cut])


def test_a_recorded_round_is_kept_whole_under_a_smaller_budget():
    known = []
    whole = shoot(SHOT, 90.0, trial_callback=known.append)
    again = shoot(SHOT, 10.0, previous_trials=known)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_what_each_population_rests_on_is_cited():
    for searcher, key in (
        (hg.searchers.PopulationBasedTraining(4), "jaderberg2017"),
        (hg.searchers.SuccessiveHalving(9), "jamieson2016"),
        (hg.searchers.Hyperband(), "li2018"),
        (hg.searchers.OneShot(4), "bender2018"),
        (hg.searchers.OneShot(4), "guo2020"),
    ):
        assert f"{{{key}," in hg.citation(searcher)


def test_what_no_population_can_train_is_refused():
    """A solver without steps; settings out of range."""
    for solver, match in (
        (hg.Newton(), "Newton lacks init, step"),
        (hg.LBFGS(), r"hg\.Descent.* lacks"),
        (hg.Descent, r"write Descent\(...\)"),
    ):
        with pytest.raises(TypeError, match=match):
            hg.search(
                PROBLEM, solver, hg.searchers.PopulationBasedTraining(4), jnp.zeros(2),
                space=SPACE, budget=10,
            )  # fmt: skip
    with pytest.raises(ValueError, match="num_steps"):
        hg.search(
            PROBLEM, hg.Descent(MOMENTUM, 0), hg.searchers.PopulationBasedTraining(4),
            jnp.zeros(2), space=SPACE, budget=10,
        )  # fmt: skip
    with pytest.raises(ValueError, match="share"):
        hg.searchers.PopulationBasedTraining(4, share=0.7)
    with pytest.raises(ValueError, match="size"):
        hg.searchers.PopulationBasedTraining(1)
    with pytest.raises(ValueError, match="eta"):
        hg.searchers.SuccessiveHalving(8, eta=1)
    assert halving.whole_log(243, 3) == round(math.log(243, 3)) == 5


@pytest.mark.parametrize("kind", [hg.spaces.Integer(1, 4), hg.spaces.Choice(3)])
def test_a_population_of_integers_or_choices_is_refused_before_any_round(kind):
    seen = []
    reads = lambda w, alpha, batch: outer(w, alpha, batch) + 0 * alpha["kind"]
    with pytest.raises(ValueError, match=r"SuccessiveHalving.*Hyperband.*OneShot.*TPE"):
        hg.search(
            hg.Bilevel(inner, reads), hg.Descent(MOMENTUM, 2),
            hg.searchers.PopulationBasedTraining(4),
            jnp.zeros(2), space=SPACE | {"kind": kind}, budget=100,
            progress=lambda *now: seen.append(now),
        )  # fmt: skip
    assert not seen


@pytest.mark.parametrize("u", [-3.0, 0.0, 3.0])
def test_a_step_of_u_is_a_part_of_the_interval_that_shrinks_at_its_bounds(u):
    """To first order; of logarithms from 1e-4 to 1."""
    space, eps = hg.spaces.Interval(1e-4, 1.0, log=True), 1e-3
    searcher = hg.searchers.PopulationBasedTraining(2, perturbation=eps)
    old = space.forward(u)
    new = searcher._moved(space, old, jax.random.key(0))
    t = 1 / (1 + np.exp(-u))
    moved = np.abs(np.log(new / old)) / np.log(1e4)
    np.testing.assert_allclose(moved, eps * t * (1 - t), rtol=eps)


@pytest.mark.parametrize("name", ["steps", "parent"])
def test_metrics_of_a_populations_own_are_not_taken_from_it(name):
    for searcher in (hg.searchers.PopulationBasedTraining(2), hg.searchers.OneShot(2)):
        with pytest.raises(ValueError, match=f"called '{name}'.*steps and parent"):
            hg.search(
                PROBLEM, hg.Descent(MOMENTUM, 2), searcher, jnp.zeros(2), space=SPACE,
                budget=10, metrics={name: lambda w, alpha, key: 7.0},
            )  # fmt: skip


SPREAD = """
import jax, jax.numpy as jnp, optax, hypergrad as hg
jax.config.update("jax_enable_x64", True)
space = {"center": hg.spaces.Interval(-2.0, 2.0, shape=(2,))}
held = lambda x: jax.device_put(x, jax.devices()[0])


class Watched(hg.searchers.PopulationBased):
    def round(self, setting, index, before, key):
        found = super().round(setting, index, before, key)
        assert len(found.members.carry[0].devices()) == jax.device_count()
        return found


values = []
for searcher in (
    Watched(8), hg.searchers.SuccessiveHalving(8, eta=2), hg.searchers.OneShot(8)
):
    trace = hg.search(
        hg.Bilevel(
            lambda w, alpha, batch: jnp.sum((w - alpha["center"]) ** 2) + batch.sum(),
            lambda w, alpha, batch: jnp.sum((w - 1) ** 2) * batch.sum(),
            held(jnp.ones((3, 1))), held(jnp.ones((2, 1))),
        ),
        hg.Descent(optax.sgd(0.1), 4), searcher, held(jnp.zeros(2)),
        space=space, budget=100, key=held(jax.random.key(0)),
    )
    values += map(float, trace.value)
print(jax.device_count(), *values)
"""


@pytest.mark.heavy
def test_eight_devices_train_what_one_does():
    """Members over forced host devices; data that is committed to the first one."""

    def values(count):
        flags = os.environ.get("XLA_FLAGS", "")
        flags += f" --xla_force_host_platform_device_count={count}"
        found = subprocess.run(
            [sys.executable, "-c", SPREAD], capture_output=True, text=True, check=True,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        number, *values = found.stdout.split()
        assert int(number) == count
        return np.array(values, float)

    np.testing.assert_allclose(values(8), values(1), rtol=1e-12)


# The table of what a population costs.


def test_the_table_times_three_ways_to_the_same_trainings(monkeypatch, tmp_path):
    """At a tiny size: all cells, ratios of what was timed, and their agreement."""
    monkeypatch.setattr(population, "SIZES", {"tiny": ((3, 2, 2), 3)})
    monkeypatch.setattr(population, "TURNS", 1)
    cells = population.plan("small", 2)
    rows = [cell | population.measure(cell) for cell in cells]
    for row in rows:
        assert row["parameters"] == 3 * 2 + 2 * 2
        assert min(row[name] for name in row if name.endswith(("_compile", "map"))) > 0
        assert row["difference"] < 1e-12  # float64
    assert not any(verdict.failed for verdict in population.judge(rows))
    text = population.markdown(population.TABLE, rows, "the command")
    assert "| 10 | 3 |" in text
    population.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size
    rows[0]["difference"] = 1e-3
    assert any(verdict.failed for verdict in population.judge(rows))
    # Each way leaves what the solver does with the member's own start and key.
    w, alpha, data, keys = population.members((3, 2, 2), 0)
    solver = hg.Descent(population.OPTIMIZER, 3)
    for way in (population.side_by_side, population.in_a_loop, population.one_by_one):
        found, _ = way(3, w, alpha, data, keys)
        for i in (0, 15):
            alone, _ = solver.solve(
                population.inner_loss, one_of(w, i), alpha[i],
                hg.Batches(data, population.BATCH), keys[i],
            )  # fmt: skip
            for mine, theirs in zip(found, alone, strict=True):
                np.testing.assert_allclose(mine[i], theirs, rtol=1e-12)


def test_the_sizes_of_the_table_are_those_of_its_protocol():
    counts = [
        sum(a * b for a, b in itertools.pairwise(sizes))
        for sizes, _ in population.SIZES.values()
    ]
    assert counts == [1_036, 101_504, 988_880]
