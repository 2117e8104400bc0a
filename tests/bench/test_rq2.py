"""The table `rq2`: runs whose metrics and costs are known, and its findings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics as skm

import hypergrad as hg
from benchmarks import rq2
from benchmarks.shared import metric_learning as learning
from benchmarks.shared import metric_tasks as tasks
from benchmarks.shared import rq2_plot
from benchmarks.shared import rq2_running as running
from benchmarks.shared.metric_learning import METRICS, splits_of
from benchmarks.shared.rq2_running import EXACT, LEARNED, METHODS, evaluate_run
from hypergrad.bench import Finding

# The systems.


def test_noisy_digits_are_disjoint_and_of_fixed_sizes():
    """Two fifths of the training labels are wrong, and no other; one seed, one draw."""
    data = tasks.digits()
    true = {row.tobytes(): y for row, y in zip(data["x"], data["y"], strict=True)}
    parts, again, other = (tasks.noisy(data, seed) for seed in (0, 0, 1))
    assert {part: len(x["y"]) for part, x in parts.items()} == {
        "train": 200, "val": 150, "test": 300,
    }  # fmt: skip
    rows = [row.tobytes() for part in parts.values() for row in part["x"]]
    assert len(set(rows)) == len(rows)
    wrong = {
        part: np.mean([true[row.tobytes()] for row in x["x"]] != x["y"])
        for part, x in parts.items()
    }
    # A binomial of 200 at 0.4 is within 0.12, 3.5 standard deviations.
    assert abs(wrong["train"] - tasks.NOISE) < 0.12
    assert wrong["val"] == wrong["test"] == 0
    np.testing.assert_array_equal(parts["train"]["y"], again["train"]["y"])
    assert not np.array_equal(parts["val"]["x"], other["val"]["x"])


@pytest.mark.parametrize("task", running.TASKS)
def test_a_system_has_one_penalty_for_all_features(task):
    """The loss of the same penalty for each."""
    system = tasks.SYSTEMS[task]
    w = jax.tree.map(
        lambda x: jnp.arange(x.size).reshape(x.shape) / x.size, system.start(0)
    )
    assert system.alpha["penalties"].shape == (1,)
    alone = tasks.penalty(w, system.alpha)
    features = jnp.full(w["W"].shape[0], system.alpha["penalties"][0])
    np.testing.assert_allclose(
        alone, tasks.penalty(w, {"penalties": features}), rtol=1e-12
    )
    hg.spaces.check(system.space, system.alpha)


def test_exact_metrics_of_labels_are_scikit_learns():
    """With one label, as in few words."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.integers(0, 2, (60, 1))
    w = {"W": jnp.asarray(rng.normal(size=(4, 1))), "b": jnp.array([0.3])}
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y), "use": jnp.ones(60, bool)}
    s = x @ np.asarray(w["W"]) + 0.3
    exact = {
        "accuracy": skm.accuracy_score(y, s > 0),
        "F1": skm.f1_score(y, s > 0),
        "mAP": skm.average_precision_score(y, s),
    }
    for metric in METRICS:
        actual = running.exact_at("few words", metric)(batch, w, None, None)
        assert actual == pytest.approx(exact[metric], rel=1e-9)


def test_a_box_is_about_the_start_and_within_that_of_the_task():
    """Half a width on either side, cut."""
    system = tasks.SYSTEMS["few words"]
    alpha = system.alpha | {"penalties": jnp.array([-11.5])}
    box = running.box_around("few words", alpha, 1.0)
    np.testing.assert_allclose(box["penalties"].low, -12.0)
    np.testing.assert_allclose(box["penalties"].high, -10.5)
    np.testing.assert_allclose([box["margins"].low, box["margins"].high], [[-1], [1]])
    assert box["weights"].shape == alpha["weights"].shape


# One run.


def columns(val, cost):
    """F1 on validation; the other metrics, on test too, are told apart by a shift."""
    val = np.array(val)
    shifts = dict(zip(EXACT, (0.1, 0.0, 0.2, 0.3, 0.4, 0.5), strict=True))
    actual = {name: val + shift for name, shift in shifts.items()}
    return actual | {"0": 10 * val, "1": -val, "cost": np.array(cost, float)}


START = {name: float(x[0]) for name, x in columns([0.3], [50.0]).items()}
VAL = [0.2, 0.6, math.nan, 0.5, 0.6, 0.9]
COST = [100, 200, 300, 400, 500, 600]


def test_a_descent_returns_its_last_model_within_the_budget():
    """The fifth, at 500 and the 50 before; what was not evaluated is not looked at."""
    row = evaluate_run(columns(VAL, COST), START, 550.0, None)
    assert row["gradient_equivalents"] == 550
    assert row["evaluations"] == 4
    assert row["curve_cost"] == [50, 150, 250, 450, 550]
    np.testing.assert_allclose(row["curve"]["F1"], [0.3, 0.2, 0.6, 0.5, 0.6])
    np.testing.assert_allclose(row["curve"]["mAP"], [0.5, 0.4, 0.8, 0.7, 0.8])
    np.testing.assert_allclose(row["test accuracy"], 0.9)
    np.testing.assert_allclose(row["alpha"], [6.0, -0.6])
    last = evaluate_run(columns(VAL, COST), START, 549.0, None)
    np.testing.assert_allclose(last["val F1"], 0.5)


def test_a_search_returns_the_first_of_its_best():
    """At what it had spent by then; all that it spent is told too."""
    row = evaluate_run(columns(VAL, COST), START, 550.0, "F1")
    assert (row["gradient_equivalents"], row["evaluations"]) == (550, 4)
    assert row["curve_cost"] == [50, 250]
    np.testing.assert_allclose(row["curve"]["F1"], [0.3, 0.6])
    np.testing.assert_allclose(row["test mAP"], 1.1)


def test_where_no_trial_is_better_the_start_is_returned():
    """This includes a budget without any trial."""
    for most in (150.0, 60.0):
        row = evaluate_run(columns(VAL, COST), START, most, "F1")
        assert row["curve_cost"] == [50]
        np.testing.assert_allclose(row["val F1"], 0.3)
        np.testing.assert_allclose(row["alpha"], [3.0, -0.3])


def test_tuning_takes_the_own_metric_and_for_cross_entropy_their_mean():
    """On what stands in the place of the test part."""
    row = {"test accuracy": 0.9, "test F1": 0.6, "test mAP": 0.3, "val F1": 1.0}
    assert running.score(row, "F1") == 0.6
    assert running.score(row, "cross-entropy") == pytest.approx(0.6)


def test_tuning_sees_no_test_example():
    """A third of validation stands there, what is learned from has the rest."""
    seed = running.TUNING_SEEDS[0]
    whole, splits = (of("noisy digits", seed) for of in (splits_of, running.run_splits))
    num = len(whole["val"]["use"])
    used = {part: np.asarray(batch["use"]) for part, batch in splits.items()}
    np.testing.assert_array_equal(used["val"], np.arange(num) % 3 != 0)
    np.testing.assert_array_equal(used["test"][:num], ~used["val"])
    assert not used["test"][num:].any()
    assert len(used["test"]) == len(whole["test"]["use"])
    for name in ("x", "y"):
        np.testing.assert_array_equal(splits["test"][name][:num], whole["val"][name])
    assert running.run_splits("noisy digits", 0) is splits_of("noisy digits", 0)


def test_the_setting_with_the_best_mean_is_taken(monkeypatch):
    """And what all runs cost is told."""
    value = {0.01: (0.5, 0.5), 0.03: (0.9, 0.3), 0.1: (0.4, 0.9), 0.3: (0.1, 0.1)}

    def run(task, name, seed, setting):
        return {"test F1": value[setting][seed - 100], "gradient_equivalents": 10.0}

    monkeypatch.setattr(running, "run", run)
    actual = running.tune.__wrapped__("few words", "sigmoid F1, converged")
    assert actual == {
        "setting": 0.1, "score": pytest.approx(0.65), "tuning_cost": 80.0,
    }  # fmt: skip


# Runs of one hyperparameter, whose metrics and costs are known: w is alpha where it
# is trained, and accuracy is 1 where it is positive, else 0.

NUM = 4


@pytest.fixture
def line(monkeypatch):
    """``w = alpha`` on the line; scores are ``w x``, and accuracy says its sign."""
    batch = {
        "x": jnp.array([1.0, 2.0, 3.0, -1.0]), "y": jnp.array([1, 1, 1, 0]),
        "use": jnp.ones(NUM, bool),
    }  # fmt: skip
    splits = dict.fromkeys(("train", "val", "test"), batch)
    of = lambda w, batch: tasks.View((w["W"] * batch["x"]), batch["y"], batch["use"])
    wide = lambda view: tasks.View(*(x[:, None] for x in view))
    alpha = {"penalties": jnp.array([-0.5])}
    system = tasks.System(
        name="line", load=lambda: None, split=lambda data, seed: splits,
        start=lambda seed: {"W": jnp.zeros(())}, alpha=alpha,
        space={"penalties": hg.spaces.Interval(-1.0, 1.0, shape=(1,))},
        train_loss=lambda w, alpha, batch: 0.5
        * jnp.mean((w["W"] - alpha["penalties"][0]) ** 2 + 0.0 * batch["x"]),
        cross_entropy=lambda w, alpha, batch: (w["W"] - 0.5) ** 2
        + 0.0 * jnp.sum(batch["x"]),
        views=lambda w, batch: {
            "accuracy": of(w, batch), "F1": of(w, batch), "mAP": wide(of(w, batch)),
        },
        axis=0, threshold=0.0,
    )  # fmt: skip
    first = {"W": jnp.array(-0.5)}
    monkeypatch.setitem(tasks.SYSTEMS, "line", system)
    monkeypatch.setitem(running.BUDGETS, "line", 100.0)
    for config in running.DESCENT_CONFIGS.values():
        monkeypatch.setitem(config.min_step_cost, "line", 100 / 12)
    monkeypatch.setattr(running, "splits_of", lambda task, seed: splits)
    monkeypatch.setattr(running, "init_point", lambda task, seed: (alpha, first, 5.0))
    monkeypatch.setattr(
        running,
        "evaluate_w",
        lambda task, w, batch: dict.fromkeys(METRICS, float(w["W"] > 0)),
    )
    learning.value_program.cache_clear()
    return "line"


def test_a_joint_run_is_soba_by_hand(line):
    """12 steps of a product and an outer gradient, 3 each, after the 5 at first.

    ``L = (w - alpha)^2 / 2`` and ``M = (w - 1/2)^2``, so that H is 1 and the cross
    term -1; Adam in the coordinate of the box.
    """
    columns = running.run_descent(line, LEARNED["cross-entropy, joint"], 0, 0.3)
    w, v, u, optimizer = -0.5, 0.0, jnp.log(0.25 / 0.75), optax.adam(0.3)
    state, alphas, ws = optimizer.init(u), [], []
    for _ in range(12):
        alpha, slope = -1 + 2 * jax.nn.sigmoid(u), jax.grad(jax.nn.sigmoid)(u)
        alphas.append(float(alpha))
        ws.append(float(w))
        update, state = optimizer.update(v * 2 * slope, state)
        w, v = w - 0.1 * (w - alpha), v - 0.1 * (v - 2 * (w - 0.5))
        u = u + update
    np.testing.assert_allclose(columns["0"], alphas, rtol=1e-9)
    np.testing.assert_array_equal(
        columns["test accuracy"], np.where(np.array(ws) > 0, 1, 0)
    )
    np.testing.assert_allclose(columns["cost"], 3.0 * np.arange(1, 13))
    row = running.run.__wrapped__(line, "cross-entropy, joint", 0, 0.3)
    assert row["gradient_equivalents"] == 5 + 36
    assert row["alpha"] == [columns["0"][-1]]


def test_a_search_of_known_cost_finds_a_positive_w(line):
    """All of the box above zero is right; half of that below is not."""
    row = running.run.__wrapped__(line, "random, accuracy", 0, 1.0)
    assert row["val accuracy"] == 1.0
    assert row["alpha"][0] > 0
    assert row["curve"]["accuracy"] == [0.0, 1.0]
    assert row["curve_cost"][0] == 5
    assert row["curve_cost"][-1] <= row["gradient_equivalents"] <= 100


# Findings.


def make_rows(own=0.9, search=0.8, reached=100.0, ended=400.0, noise=0.001):
    """Returns all planned rows with the given test metrics and costs.

    Own surrogates end at ``own``, searches at ``search`` on the test data. On
    validation a search ends at 0.8 at the cost ``ended``; an own surrogate is as good
    at ``reached``. The kind "joint" tuned best, and TPE of the searches.
    """
    rows = []
    for cell in rq2.table.cells("small", 5):
        row = cell | {"reason": None, "data_sha256": "x"}
        row |= dict.fromkeys(EXACT, 0.7)
        if cell["method"] not in LEARNED:
            rows.append(row)
            continue
        metric, kind = LEARNED[cell["method"]]
        is_search = kind in running.SEARCHERS
        wobble = noise * np.random.default_rng(cell["seed"]).normal()
        curve = [0.7, 0.8] if metric in METRICS else [0.7, 0.7]
        row |= {
            "curve": dict.fromkeys(METRICS, curve),
            "curve_cost": [50.0, ended if is_search else reached],
            "gradient_equivalents": 500.0, "evaluations": 9, "setting": 0.1,
            "tuning_cost": 7.0, "alpha": [0.0],
            "score": {"joint": 0.9, "TPE": 0.9}.get(kind, 0.8),
        } | {f"retrained {metric}": 0.6 for metric in METRICS}  # fmt: skip
        if metric in METRICS:
            row[f"test {metric}"] = search if is_search else own + wobble
            row[f"val {metric}"] = curve[-1]
        rows.append(row)
    return rows


def lines(rows: list[dict], *words: str) -> list[Finding]:
    """Returns the findings whose text has all words."""
    findings = rq2.findings(rows)
    assert not any(finding.failed for finding in findings)
    return [x for x in findings if all(word in x.text for word in words)]


@pytest.mark.parametrize(
    ("own", "outcome"), [(0.9, "supported"), (0.8, "not supported")]
)
def test_an_own_surrogate_must_surely_be_above_the_best_search(own, outcome):
    """The rows that tuned best are compared on each system and metric."""
    claims = lines(make_rows(own=own, noise=0.01), " over TPE", "claimed")
    assert [claim.outcome for claim in claims] == [outcome] * 6
    assert claims[0].text.startswith(
        "smooth accuracy, joint over TPE, accuracy in test accuracy, task noisy digits"
    )


@pytest.mark.parametrize(
    ("ended", "outcome"), [(400.0, "supported"), (250.0, "not supported")]
)
def test_the_own_surrogate_must_reach_the_search_three_times_sooner(ended, outcome):
    """The claim is on each system, over its metrics, paired by seed."""
    claims = lines(make_rows(ended=ended), "own surrogates", "claimed")
    assert [claim.outcome for claim in claims] == [outcome] * 2
    assert all(f"{ended / 100:.3g} [" in claim.text for claim in claims)
    per_metric = lines(make_rows(ended=ended), "times fewer than")
    assert len(per_metric) == 6
    assert f"smooth accuracy, joint needs {ended / 100:.3g} [" in per_metric[0].text


def test_a_run_that_misses_the_target_counts_with_its_bound():
    """One seed of one metric is enough; the other system is not affected."""
    rows, own = make_rows(), "sigmoid F1, joint"
    for row in rows:
        if (row["task"], row["method"], row["seed"]) == ("few words", own, 3):
            row["curve"] = row["curve"] | {"F1": [0.7, 0.75]}
    digits, words = lines(rows, "own surrogates", "claimed")
    assert (digits.outcome, words.outcome) == ("supported", "not supported")
    assert f"target not reached: {own} on 1 seed" in words.text
    cost, num_misses = rq2.costs_to_search(rows, "few words", own, "F1")
    assert (cost.tolist(), num_misses) == ([100, 100, 100, 500, 100], 1)
    (line,) = lines(rows, f"few words, F1: {own} needs")
    assert line.text.endswith(", at most, target not reached on 1 of 5 seeds")


def test_the_first_evaluation_as_good_counts():
    """It counts also if the curve falls again."""
    row = {"curve": {"F1": [0.1, 0.5, 0.4, 0.6]}, "curve_cost": [1.0, 2.0, 3.0, 4.0]}
    assert rq2.cost_to_reach(row, "F1", 0.5) == 2.0
    assert math.isnan(rq2.cost_to_reach(row, "F1", 0.7))


def test_comparisons_without_a_claim():
    """They are with cross-entropy, the other kinds, and rows that learn nothing."""
    rows = make_rows()
    start = "Smooth-AP, joint against"
    compared = lines(rows, start, "in test mAP, task noisy digits")
    assert len(compared) == 6
    assert sum(": better" in line.text for line in compared) == 4
    retrained = lines(rows, "noisy digits, test mAP, retrained")
    expected = "converged -30.0, truncated -30.0, joint -30.0 points"
    assert expected in retrained[0].text


def test_missing_data_is_a_reason(tmp_path):
    """The other system is evaluated and printed."""
    rows = make_rows()
    for row in rows:
        if row["task"] == "few words":
            for name in set(row) - {"task", "method", "seed"}:
                del row[name]
            row["reason"] = "not there"
    findings = rq2.findings(rows)
    assert findings[0].text == "few words skipped: not there"
    assert len([x for x in findings if x.outcome == "supported"]) == 4
    text = "\n".join(rq2.body(rows))
    assert "Skipped: not there" in text
    assert "| untuned | 70.0 ± 0.0 |" in text
    assert text.count("\n| ") == len(METHODS) + 1
    rq2.plot(rows, tmp_path / "rq2.png")
    assert (tmp_path / "rq2.png").stat().st_size > 10_000


def test_a_curve_holds_until_the_next_evaluation():
    """It has no value before the first."""
    costs = np.array([1.0, 2.0, 4.9, 5.0, 9.0])
    actual = rq2_plot.value_at([2.0, 5.0], [0.1, 0.4], costs)
    np.testing.assert_allclose(actual, [np.nan, 0.1, 0.1, 0.4, 0.4])
