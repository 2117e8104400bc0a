"""The table `rq1`: its systems, runs whose costs are known, and its findings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import rq1
from benchmarks.shared import rq1_running, rq1_tasks
from benchmarks.shared.rq1_findings import BLACK_BOXES, findings
from benchmarks.shared.rq1_running import (
    DESCENTS,
    METHODS,
    PARTS,
    Target,
    evaluate_run,
)
from benchmarks.shared.rq1_tasks import SYSTEMS, SameDraws, System
from hypergrad.tasks import federated, random_walk, semi_supervised

# The systems.


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_has_two_hyperparameters_that_begin_in_its_box(name):
    """And a reason for each method that it leaves out."""
    system = SYSTEMS[name]
    start = jax.tree.map(lambda x: jnp.asarray(x, float), system.alpha)
    hg.spaces.check(system.space, start)
    assert len(hg.spaces.axes(system.space)) == len(jax.tree.leaves(start)) == 2
    assert set(system.absent) <= set(METHODS) - set(BLACK_BOXES)
    assert all(system.absent.values())
    assert system.solver(3) == system.solver(3)


def test_pseudo_labels_weigh_alike_and_the_penalty_is_learned():
    """By the task's own loss."""
    part = lambda n: {"x": jnp.eye(n, 12), "y": jnp.arange(n)}
    train = {"labeled": part(5), "unlabeled": part(8)}
    w = {"W": jnp.arange(120.0).reshape(12, 10) / 99, "b": jnp.ones(10)}
    batch = train | {"penalty": 0.3}
    expected = semi_supervised.train_loss(w, jnp.full(8, 0.7), batch)
    actual = rq1_tasks.pseudo_loss(w, {"weight": 0.7, "penalty": 0.3}, train)
    np.testing.assert_allclose(actual, expected)


def test_powers_of_a_frequency_make_weights_and_shifts():
    """``f^-weight`` and ``shift log f``; neutral at zero."""
    x, y = jnp.ones((2, 3, 4)), jnp.array([[0, 1, 1], [1, 2, 9]])
    f = jnp.linspace(0.5, 2.0, 10)
    batch = {"x": x, "y": y, "frequency": jnp.broadcast_to(f, (2, 10))}
    w = {"W": jnp.arange(40.0).reshape(4, 10) / 40, "b": jnp.zeros(10)}
    ones = jnp.ones(10)
    for weight, shift in ((0.0, 0.0), (0.5, 1.5)):
        alpha = {"omega": f**-weight, "delta": ones, "iota": shift * jnp.log(f)}
        actual = rq1_tasks.scaled_loss(w, {"weight": weight, "shift": shift}, batch)
        np.testing.assert_allclose(actual, federated.train_loss(w, alpha, batch))


def test_even_states_have_one_discount_and_odd_ones_another():
    """As far below 1 as is said; the losses are the task's."""
    actual = rq1_tasks.by_state({"even": 0.25, "odd": 0.5})
    np.testing.assert_allclose(actual[:3], [0.75, 0.5, 0.75])
    batch = {"P": jnp.eye(19, k=1), "r": jnp.ones(19)}
    w = jnp.arange(19.0)
    theirs = random_walk.bellman_error(w, actual, batch)
    ours = rq1_tasks.bellman_error(w, {"even": 0.25, "odd": 0.5}, batch)
    np.testing.assert_allclose(ours, theirs)


def test_body_and_head_adapt_by_rates_of_their_own():
    """A step from zero, along gradients of one."""
    optimizer = rq1_tasks.adaptation({"body": 0.2, "head": 0.5})
    w = {"body": {"W": jnp.zeros(2)}, "head": jnp.zeros(3)}
    ones = jax.tree.map(jnp.ones_like, w)
    updates, _ = optimizer.update(ones, optimizer.init(w), w)
    np.testing.assert_allclose(updates["body"]["W"], -0.2)
    np.testing.assert_allclose(updates["head"], -0.5)


def test_the_same_is_drawn_whatever_the_key():
    """At every step anew; a noisy loss then has one outcome."""
    noisy = lambda w, alpha, key: w * (alpha + jax.random.normal(key))
    data = hg.Batches(None, with_key=True)
    solver = SameDraws(hg.Descent(optax.sgd(1.0), 3))
    ends = [solver.solve(noisy, 0.0, 0.0, data, jax.random.key(i))[0] for i in (1, 2)]
    assert ends[0] == ends[1]
    draws = [jax.random.fold_in(jax.random.key(0), k) for k in range(3)]
    by_hand = -sum(jax.random.normal(draw) for draw in draws)
    np.testing.assert_allclose(ends[0], by_hand, rtol=1e-6)


# A run whose costs are known: w_4 = (1 - 1/16) alpha, and h is least at 1/2, on the
# grid.

SHORT = 1 - 2.0**-4
NO_DATA = hg.Bilevel(
    lambda w, alpha, batch: 0.5 * ((w[0] - alpha["a"]) ** 2 + (w[1] - alpha["b"]) ** 2),
    lambda w, alpha, batch: 0.5 * jnp.sum((w - SHORT / 2) ** 2),
)
SQUARES = System(
    "-", "-", lambda seed: (NO_DATA, jnp.zeros(2)),
    rq1_tasks.descent(optax.sgd(0.5)), 4, {"a": 0.9, "b": 0.8},
    {"a": hg.spaces.Unit(), "b": hg.spaces.Unit()}, optax.sgd(0.5),
)  # fmt: skip


@pytest.fixture
def squares(monkeypatch):
    """In place of the first system."""
    monkeypatch.setitem(SYSTEMS, "squares", SQUARES)
    return "squares"


def h_of(a, b):
    return 0.5 * SHORT**2 * ((a - 0.5) ** 2 + (b - 0.5) ** 2)


def test_a_grid_is_there_at_its_first_point_near_the_best(squares):
    """In an order drawn from the seed; a trial costs four gradients and a value."""
    row = rq1_running.run(squares, "grid", 3, 0.0)
    a, b = np.meshgrid(np.linspace(0, 1, 9), np.linspace(0, 1, 9), indexing="ij")
    h = np.random.default_rng(3).permutation(h_of(a, b).ravel())
    assert row["target"] == pytest.approx(0, abs=1e-12)
    assert row["start"] == pytest.approx(h_of(0.9, 0.8))
    steps = 1 + int(np.flatnonzero(h <= 0.1 * h_of(0.9, 0.8))[0])
    assert row["steps"] == steps
    assert row["evaluations"] == 81
    assert row["inner"] == pytest.approx(4 * steps)
    assert row["hypergradient"] == 0
    assert row["outer"] == pytest.approx(steps / 3)
    assert row["cost"] == pytest.approx(steps * (4 + 1 / 3))


def test_an_unrolled_descent_is_there_when_adam_is(squares):
    """Adam along the derivative by hand; its steps are made twice, with a product."""
    row = rq1_running.run(squares, "unrolled", 0, 0.3)
    logit = lambda x: np.log(x / (1 - x))
    u, optimizer = jnp.array([logit(0.9), logit(0.8)]), optax.adam(0.3)
    state, steps = optimizer.init(u), 1
    while h_of(*jax.nn.sigmoid(u)) > 0.1 * h_of(0.9, 0.8):
        slope = jax.grad(lambda u: h_of(*jax.nn.sigmoid(u)))(u)
        update, state = optimizer.update(slope, state)
        u, steps = u + update, steps + 1
    assert steps > 3
    assert row["steps"] == steps
    assert (row["inner"], row["outer"]) == pytest.approx((4 * steps, steps))
    # Four steps again, four products, the gradient whose norm is reported.
    assert row["hypergradient"] == pytest.approx((4 + 2 * 4 + 1) * steps)
    assert row["cost"] == pytest.approx(18 * steps)


def test_a_round_counts_all_its_gradients_on_the_way_back_too(squares, monkeypatch):
    """Three rounds of two local steps and a correction, none made a second time."""
    loss = lambda w, alpha, batch: jnp.mean((w - batch["t"] * alpha["a"]) ** 2) / 2
    outer = lambda w, alpha, batch: (w - 0.3) ** 2 + alpha["b"] ** 2
    problem = hg.Bilevel(loss, outer, {"t": jnp.array([[0.5], [1.5]])})
    rounds = lambda num: federated.FedAvg(0.3, num, 2)
    system = SQUARES._replace(
        make=lambda seed: (problem, jnp.zeros(())), solver=rounds, num_steps=3,
        gradients=3.0,
    )  # fmt: skip
    monkeypatch.setitem(SYSTEMS, squares, system)
    columns = rq1_running.descend(
        squares, "unrolled", problem, jnp.zeros(()), jnp.asarray(0.1)
    )
    first = [float(columns[part][0]) for part in PARTS]
    assert first == pytest.approx([9, 2 * 9 + 1, 1])


def test_a_single_loop_begins_with_a_training_and_moves_w_by_half_a_product(squares):
    """Of three a step: a gradient that trains, one that differentiates, one outer."""
    problem, w = SQUARES.make(0)
    columns = rq1_running.descend(squares, "single loop", problem, w, jnp.asarray(0.03))
    assert rq1_running.init_cost(squares, "single loop") == 4
    assert len(columns["h"]) == int((100 * (4 + 1 / 3) - 4) / 3)
    for part in PARTS:
        np.testing.assert_allclose(columns[part], 1)


# One run.

TARGET = Target(start=2.0, target=1.0)


def columns(h):
    """Two of inner, one of each other part, and three products a step."""
    cost = {"inner": 2.0, "hypergradient": 1.0, "outer": 1.0, "products": 3.0}
    return {"h": np.array(h)} | {name: np.full(len(h), x) for name, x in cost.items()}


def test_a_run_is_there_at_its_first_value_within_a_tenth():
    """1.1 here; what has no number or is beyond the budget is not looked at."""
    h = [2.0, math.nan, 1.2, 1.1, 0.9]
    row = evaluate_run(columns(h), 10.0, TARGET, 100)
    assert (row["cost"], row["gradient_equivalents"], row["steps"]) == (26, 30, 4)
    assert (row["inner"], row["hypergradient"], row["outer"]) == (18, 4, 4)
    assert row["products"] == 12
    assert row["left"] == pytest.approx(-0.1)
    row = evaluate_run(columns(h), 10.0, TARGET, 25)
    assert (row["cost"], row["gradient_equivalents"], row["steps"]) == (None, 22, 3)
    assert row["left"] == pytest.approx(0.2)
    none = evaluate_run(columns(h), 10.0, TARGET, 11)
    assert (none["cost"], none["gradient_equivalents"], none["inner"]) == (None, 10, 10)


def test_of_shared_weights_the_truth_about_the_best_so_far_counts():
    """Asked for once a new best."""
    indices = []
    evaluate = lambda index: indices.append(index) or 10.0 + index
    actual = rq1_running.evaluate_incumbents(
        np.array([3.0, 4.0, 2.0, 2.5, 1.0]), evaluate
    )
    np.testing.assert_allclose(actual, [10, 10, 12, 12, 14])
    assert indices == [0, 2, 4]


def test_tuning_prefers_to_be_there_sooner_then_nearer():
    """Any run that is there to any that is not."""
    rows = [
        {"cost": 10.0, "left": 0.05},
        {"cost": 99.0, "left": 0.0},
        {"cost": None, "left": 0.2},
        {"cost": None, "left": 3.0},
        {"cost": None, "left": None},
    ]
    scores = [rq1_running.score(row, 100.0) for row in rows]
    assert scores == sorted(scores)
    assert scores[3] - scores[2] == pytest.approx(math.log(15))


def test_tuning_costs_what_its_runs_need_until_there(monkeypatch):
    """Of a run that never is, all that it spent; two seeds a rate."""
    cost = {0.1: 40.0, 0.3: None, 1.0: 20.0, 3.0: 30.0, 10.0: None}
    monkeypatch.setattr(
        rq1_running, "run",
        lambda task, method, seed, x: {
            "cost": cost[x], "gradient_equivalents": 90.0, "left": 1.0,
        },
    )  # fmt: skip
    actual = rq1_running.tune.__wrapped__("unsupervised", "implicit")
    assert actual["setting"] == 1.0
    assert actual["tuning_cost"] == 2 * (40 + 90 + 20 + 30 + 90)
    assert rq1_running.tune("unsupervised", "random")["tuning_cost"] == 0


def test_operations_are_those_of_the_steps_and_of_the_iterations(monkeypatch):
    """Twelve products of four estimates, one each beyond CG; 4 joules a 1e9."""
    counts = rq1_running.Operations(init=1e9, step=2e9, solve=5e8, unknown=())
    monkeypatch.setattr(rq1_running, "operations", lambda task, method: counts)
    row = {"steps": 4, "products": 12.0}
    actual = rq1_running.flops_of("physics", "implicit", row)
    assert actual["flops"] == 1e9 + 4 * 2e9 + 8 * 5e8
    assert actual["grams"] == pytest.approx(13 * 4 / 3.6e6 * 400)


# Findings.


def make_rows(cost: dict, spent: float = 5000.0, inner: float = 0.9) -> list[dict]:
    """All planned rows; ``cost`` of a (task, method), else 100; None: never there."""
    rows = []
    for cell in rq1.table.cells("small", 5):
        task, method = cell["task"], cell["method"]
        if method in SYSTEMS[task].absent:
            rows.append(cell | {"reason": "it cannot be"})
            continue
        here = cost.get((task, method), 100.0)
        rows.append(
            cell | {
                "cost": here, "gradient_equivalents": spent, "left": 0.0,
                "evaluations": 9,
                "inner": 100 * inner, "hypergradient": 0.0, "outer": 100 * (1 - inner),
                "steps": 4, "flops": 1e6, "grams": 1e-3, "unknown": [],
                "setting": 0.3,
                "score": {"unrolled": 1.0}.get(method, 2.0)
                if method in DESCENTS else None,
                "tuning_cost": 7.0 * (method in DESCENTS),
            }
        )  # fmt: skip
    return rows


def line(rows: list[dict], *words: str) -> str:
    """Returns the one finding with all of the words, with its outcome."""
    (finding,) = [x for x in findings(rows) if all(w in x.text for w in words)]
    assert not finding.failed
    return finding.markdown


EVERY = {(task, "random"): 300.0 for task in SYSTEMS}


def test_the_inner_loop_must_be_half_of_what_implicit_spends():
    """On every task where it can be, the least of which is named."""
    text = line(make_rows({}), "inner training is", "at least 50% claimed")
    assert "90% [90%, 90%]" in text
    assert "**supported**" in text
    rows = make_rows({})
    for row in rows:
        if (row["task"], row["method"]) == ("physics", "implicit"):
            row |= {"inner": 40.0 + row["seed"], "hypergradient": 50.0, "outer": 10.0}
            row["outer"] -= row["seed"]
    text = line(rows, "inner training is")
    assert "is 42% [40%, 44%]" in text  # 40 to 44, t 2.776, sd 1.58 over 5 seeds
    assert "on physics" in text
    assert "**not supported**" in text


def test_inner_shares_are_told_by_method_and_task():
    """Those of black boxes without a claim, as they follow from the sizes."""
    rows = make_rows({})
    for row in rows:
        if (row["task"], row["method"]) == ("federated", "unrolled"):
            row |= {"inner": 25.0, "hypergradient": 65.0, "outer": 10.0}
        if (row["task"], row["method"]) == ("few_shot", "TPE"):
            row |= {"inner": 60.0, "outer": 40.0}
    text = line(rows, "inner training in the cost of unrolled:")
    assert "federated 25%" in text
    assert "physics 90%" in text
    assert "few_shot" not in line(rows, "inner training in the cost of implicit:")
    text = line(rows, "follows from sizes")
    assert "few_shot 80%" in text  # of 90, 90 and 60
    assert "**" not in text


@pytest.mark.parametrize(
    ("cost", "outcome"), [(300.0, "supported"), (150.0, "not supported")]
)
def test_hypergradients_must_need_twice_fewer_than_random(cost, outcome):
    """The row that tuned best is compared."""
    text = line(make_rows(dict.fromkeys(EVERY, cost)), "best with", "against random")
    assert f"{cost / 100:.3g} [" in text
    assert f"**{outcome}**" in text


def test_the_tuning_of_all_rows_counts_against_the_best():
    """100, and 7 for each of five rows, where five can be, against 300."""
    text = line(make_rows(EVERY), "best with all the tuning")
    few_shot = (100 + 7) / 300  # only `unrolled` can be
    by_hand = ((100 + 5 * 7) / 300) ** (7 / 8) * few_shot ** (1 / 8)
    assert f"needs {by_hand:.3g} [" in text
    assert "**" not in text


def test_random_counts_with_its_bound_and_the_best_must_be_there():
    """Whatever random did."""
    rows = make_rows(EVERY | {("physics", "random"): None})
    text = line(rows, "best with", "random misses some targets: physics")
    assert "**supported**" in text
    rows = make_rows(EVERY | {("physics", "unrolled"): None})
    text = line(rows, "best with", "against random")
    assert "target not reached: unrolled (physics) on 5 seeds" in text
    assert "**not supported**" in text
    assert "needs > " in line(rows, "best with all the tuning")


WARM = "unrolled, warm start"


def test_a_warm_start_is_compared_where_the_cold_one_is_there():
    """Four times fewer on six tasks; the seventh has no cold run, few_shot no warm."""
    cost = {(task, WARM): 25.0 for task in SYSTEMS} | {("physics", "unrolled"): None}
    text = line(make_rows(cost), "unrolled, warm start against")
    assert "physics" not in text
    assert "few_shot" not in text
    assert "4 [4, 4] times fewer" in text
    assert "**supported**" in text
    text = line(
        make_rows(cost | {("federated", WARM): None}), "unrolled, warm start against"
    )
    assert "target not reached: federated on 5 seeds" in text
    assert "**not supported**" in text
    text = line(make_rows({}), "unrolled, warm start against")
    assert "**not supported**" in text


def test_a_warm_start_that_can_be_compared_nowhere_is_not_reproduced():
    """The cold one is there on every seed of no task."""
    cold = dict.fromkeys(((task, "unrolled") for task in SYSTEMS), None)
    text = line(make_rows(cold), "unrolled, warm start against", "on no task")
    assert "unrolled on every seed of any task" in text
    assert "**not supported**" in text


def test_the_winner_is_the_first_of_those_that_are_there():
    """And who ended below it is not batch."""
    rows = make_rows({("physics", "TPE"): 40.0, ("physics", "grid"): None}, spent=30.0)
    text = line(rows, "physics: first is TPE, 40, then")
    assert "undecided, as they ended below that: grid" in text
    assert text.endswith("unrolled tuned best with hypergradients")


def test_who_is_first_is_told_with_tuning_too():
    """97 and a tuning of 7 against 100 without."""
    text = line(make_rows({("physics", "implicit"): 97.0}), "physics: first is")
    assert "first is implicit, 97, then grid, 100" in text
    assert "with its tuning counted, grid, 100;" in text
    rows = make_rows({("physics", "implicit"): 90.0})
    assert "with its tuning counted, implicit, 97;" in line(rows, "physics: first is")
    cells = rq1.table_cells(rows, "physics", "implicit")
    assert cells[:5] == ["implicit", "5 of 5", "90", "90 to 90", "97"]
    assert cells[-1] == "0.3"  # its rate


def test_rates_at_an_end_are_told():
    """Of 36, as few_shot has one row of five; 0.3 is in the middle for Adam."""
    rows = make_rows({})
    for row in rows:
        if row["method"] == "single loop":
            row["setting"] = 1.0 if row["task"] == "physics" else 0.03
        if (row["task"], row["method"]) == ("federated", "unrolled"):
            row["setting"] = 0.1
    text = line(rows, "of 36 rates")
    assert "upper end of those tried 1: single loop (physics);" in text
    assert text.endswith("lower end 1: unrolled (federated)")


def test_sharing_is_told_where_it_is_there():
    """Half of what random needs on all but one."""
    cost = {(task, "sharing"): 50.0 for task in SYSTEMS} | {
        ("physics", "sharing"): None
    }
    text = line(make_rows(cost), "sharing against random")
    assert ": 2 [2, 2] times fewer" in text
    assert text.endswith("target missed on some seed of physics")


def test_an_operation_without_a_cost_fails_and_the_table_is_printed(tmp_path):
    """The printed table names the methods that do not apply."""
    rows = make_rows(EVERY)
    (check,) = rq1.table.checks
    assert check.evaluate(rows).outcome == "holds"
    unknown = check.evaluate([rows[0] | {"unknown": ["fft"]}, *rows[1:]])
    assert unknown.failed
    assert "fft" in unknown.text
    text = "\n".join(rq1.body(rows))
    assert "| implicit (1) | - |" in text
    assert "rates stand in the optimizer" in text
    rq1.plot(rows, tmp_path / "rq1.png")
    assert (tmp_path / "rq1.png").stat().st_size > 10_000
