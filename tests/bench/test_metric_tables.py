"""The tables `surrogates` and `average_precision`: data, rules and claims."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as skm

from benchmarks import average_precision, surrogates
from benchmarks.shared import joint
from benchmarks.shared import metric_learning as learning
from benchmarks.shared import metric_tasks as tasks
from hypergrad.bench import Finding, mean_interval

# Data.


@pytest.mark.parametrize("name", ["digits", "attributes", "retrieval"])
def test_parts_are_disjoint_and_of_one_shape(name: str):
    """No image is in two parts; seeds differ, and one seed is always the same."""
    system = tasks.SYSTEMS[name]
    data = system.load()
    first, again, other = (system.split(data, seed) for seed in (0, 0, 1))
    where = {row.tobytes(): i for i, row in enumerate(data["x"])}
    indices = [where[row.tobytes()] for part in first.values() for row in part["x"]]
    assert len(set(indices)) == len(indices)
    shapes = lambda parts: jax.tree.map(np.shape, parts)
    assert shapes(first) == shapes(other)
    same = lambda a, b: all(
        np.array_equal(*xs)
        for xs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert same(first, again)
    assert not same(first, other)


def test_retrieval_is_of_classes_not_seen():
    """Each class of digits is in one part only."""
    data = tasks.digits()
    label = {row.tobytes(): y for row, y in zip(data["x"], data["y"], strict=True)}
    parts = tasks.disjoint(data, 0)
    classes = [{label[row.tobytes()] for row in part["x"]} for part in parts.values()]
    assert [len(x) for x in classes] == [4, 3, 3]
    assert len(set.union(*classes)) == 10


def test_the_attributes_of_seven():
    """Prime and at least five, and none of the rest."""
    names = [name for name, has in tasks.ATTRIBUTES.items() if 7 in has]
    assert names == ["prime", "at least five"]


def test_metrics_are_scikit_learns():
    """On random scores, with examples out of use that may hold anything."""
    rng = np.random.default_rng(0)
    use, y = rng.uniform(size=40) < 0.7, rng.integers(0, 3, 40)
    x = rng.normal(size=(40, 5))
    x[~use] = 1e3
    w = {"W": jnp.asarray(rng.normal(size=(5, 3))), "b": jnp.zeros(3)}
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y), "use": jnp.asarray(use)}
    system = tasks.SYSTEMS["digits"]
    views = system.views(w, batch)
    actual = {m: learning.exact_value(system, m, views[m]) for m in learning.METRICS}
    s, true = (x @ np.asarray(w["W"]))[use], y[use]
    best = s.argmax(1)
    assert np.isclose(actual["accuracy"], skm.accuracy_score(true, best))
    assert np.isclose(actual["F1"], skm.f1_score(true, best, average="macro"))
    ap = skm.average_precision_score(np.eye(3)[true], s, average="macro")
    assert np.isclose(actual["mAP"], ap)


@pytest.mark.slow
def test_retrieval_ranks_all_others_by_cosine():
    """Every image in use is a query; mAP and the nearest neighbour by a loop."""
    parts = tasks.disjoint(tasks.digits(), 0)
    system, w = tasks.SYSTEMS["retrieval"], tasks.network(0)
    val = jax.tree.map(lambda x: jnp.asarray(x[::8]), parts["val"])
    n = len(val["y"])
    val["use"] = jnp.arange(n) % 4 != 0
    views = system.views(w, val)
    e = np.tanh(np.asarray(val["x"], float) @ np.asarray(w["V"]))
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    y, rows = np.asarray(val["y"]), np.flatnonzero(val["use"])
    ap, right = [], []
    for i in rows:
        others = rows[rows != i]
        similar = e[others] @ e[i]
        ap.append(skm.average_precision_score(y[others] == y[i], similar))
        by_class = [np.exp(similar[y[others] == c] / 0.1).sum() for c in range(3)]
        right.append(np.argmax(by_class) == y[i])
    exact = lambda metric: learning.exact_value(system, metric, views[metric])
    assert np.isclose(exact("mAP"), np.mean(ap), rtol=1e-6)
    assert np.isclose(exact("accuracy"), np.mean(right))
    loss = system.cross_entropy
    value, gradient = jax.value_and_grad(loss)(w, system.alpha, val)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((value, gradient)))


# Tuning.


def test_thirds_share_nothing_and_leave_nothing():
    """Of the examples in use."""
    use = jnp.arange(10) != 4
    some, held_out = learning.hold_out_third({"use": use})
    assert jnp.array_equal(some["use"] | held_out["use"], use)
    assert not jnp.any(some["use"] & held_out["use"])
    assert int(held_out["use"].sum()) == 4


def test_the_rate_is_chosen_on_what_was_held_out():
    """A run that fails (NaN) is not chosen; costs are of all runs."""
    val, indices = {"use": jnp.ones(9, bool)}, []

    def run(val, held_out, rate):
        indices.append((int(val["use"].sum()), int(held_out["use"].sum()), rate))
        selection = {0.1: 1.0, 0.2: 3.0, 0.3: np.nan}[rate]
        return {"selection": selection, "gradient_equivalents": rate, "num_hvps": 1}

    actual = learning.tune_rate(run, val, (0.1, 0.2, 0.3))
    assert indices == [(6, 3, 0.1), (6, 3, 0.2), (6, 3, 0.3), (9, 9, 0.2)]
    assert (actual["rate"], actual["num_hvps"], actual["last_cost"]) == (0.2, 4, 0.2)
    assert np.isclose(actual["gradient_equivalents"], 0.8)


def test_the_first_evaluation_as_good_counts():
    """Also where the curve falls again; None where there is none."""
    curve, cost = [0.1, 0.5, 0.4, 0.6], [1.0, 2.0, 3.0, 4.0]
    assert joint.cost_to_reach(curve, cost, 0.5) == 2.0
    assert joint.cost_to_reach(curve, cost, 0.7) is None


def test_one_seed_shows_no_spread():
    """In percent; a dash where there is no number."""
    assert surrogates.spread_text(np.array([0.5, 0.7])) == "60.0 ± 14.1"
    assert surrogates.spread_text(np.array([0.5, np.nan])) == "50.0"
    assert surrogates.spread_text(np.array([np.nan])) == "-"


# Findings.


def make_rows(own: float, noise: float = 0.01, seeds: int = 10) -> list[dict]:
    """All rows alike but those of the metric's own surrogate, which are ``own`` better.

    SOBA reaches at a quarter of the double loop's cost.
    """
    rows = surrogates.cells("small", seeds)
    for row in rows:
        rng = np.random.default_rng(row["seed"])
        row["reason"] = None
        for metric in learning.METRICS:
            is_own = row["method"] == surrogates.OWN_SURROGATE[metric]
            wobble = noise * rng.normal() if is_own else 0
            row[metric] = row[f"val_{metric}"] = 0.8 + (own + wobble if is_own else 0)
        soba = row["method"] == "SOBA"
        row["cost_to_reach"] = 25.0 if soba else 100.0
        row |= {"last_cost": 200.0, "end": 0.9}
        row |= {"curve": [0.5, 0.7, 0.8], "curve_cost": [100.0, 200.0, 300.0]}
    return rows


def findings(rows: list[dict], start: str) -> list[Finding]:
    """Returns the findings whose text starts so."""
    return [x for x in surrogates.findings(rows) if x.text.startswith(start)]


def test_own_is_best_or_tied():
    """A claim holds for a better and an equal surrogate, not for a worse one."""
    for own, noise, met in ((0.1, 0.01, True), (0.0, 0.0, True), (-0.1, 0.01, False)):
        lines = findings(make_rows(own, noise), "o1")
        outcome = "supported" if met else "not supported"
        assert [line.outcome for line in lines] == [outcome] * 12


def test_one_rival_is_enough():
    """To keep a metric from being its own surrogate's."""
    rows = make_rows(0.1)
    for row in rows:
        if (row["task"], row["method"]) == ("reuters", "cross-entropy"):
            row["F1"] = 0.99
    (lost,) = [x for x in findings(rows, "o1") if x.outcome == "not supported"]
    assert lost.text.startswith("o1, reuters, F1: sigmoid F1 minus cross-entropy")


def test_how_many_cells_are_surely_won():
    """All, none where all tie, all but one where one rival is ahead."""
    count = lambda rows: findings(rows, "a metric's own surrogate")[0].text
    assert "in 12 of 12 cells" in count(make_rows(0.1))
    assert "in 0 of 12 cells" in count(make_rows(0.0, 0.01))
    rows = make_rows(0.1)
    for row in rows:
        if (row["task"], row["method"]) == ("digits", "Smooth-AP"):
            row["F1"] = 0.99
    assert "in 11 of 12 cells" in count(rows)
    (line,) = findings(rows, "digits, F1 on validation itself")
    assert "+10." in line.text or "+9." in line.text


def test_comparisons_are_corrected_for_re_splits_and_for_their_number():
    """The same leads on digits, whose splits overlap, and on reuters."""
    rows = make_rows(0.1)
    half_widths = {}
    for task in ("reuters", "digits"):
        (line,) = findings(rows, f"{task}, F1: ")
        low, high = re.findall(r"\[\+([\d.]+), \+([\d.]+)\]", line.text)[0]
        half_widths[task] = (float(high) - float(low)) / 2
    own = surrogates.column(rows, "F1", task="reuters", method="sigmoid F1")
    single = 100 * mean_interval(own).high - 100 * np.mean(own)
    assert half_widths["reuters"] > 1.5 * single
    assert half_widths["digits"] > 2 * half_widths["reuters"]


def test_loops_are_compared_at_equal_cost():
    """The double loop's last evaluation within the other's whole cost."""
    (line,) = findings(make_rows(0.1), "SOBA, its mAP")
    assert "+20.0 points [+20.0, +20.0]" in line.text
    rows = make_rows(0.1)
    for row in rows:
        row["last_cost"] = 299.0 if row["method"] == "SOBA" else 300.0
    assert "+20.0" in findings(rows, "SOBA, its mAP")[0].text
    assert "+10.0" in findings(rows, "truncated, its mAP")[0].text


@pytest.mark.parametrize(
    ("cost", "reached", "outcome"),
    [
        (25.0, True, "supported"),
        (60.0, True, "not supported"),
        (25.0, False, "not supported"),
    ],
)
def test_a_single_loop_reaches_all_or_nothing(cost: float, reached: bool, outcome: str):
    """At most half the cost, on every seed; one that never does is enough to fail."""
    rows = make_rows(0.1)
    for row in rows:
        if row["method"] == "SOBA":
            row["cost_to_reach"] = cost if reached or row["seed"] else None
    (line,) = findings(rows, "o2")
    assert line.outcome == outcome
    assert ("lower bound" in line.text) == (not reached)


def test_missing_data_is_skipped_and_missing_numbers_fail():
    """A reason is no failure; a hole is."""
    rows = make_rows(0.1)
    for row in rows:
        if row["task"] == "reuters":
            row |= {"reason": "not there"} | dict.fromkeys(learning.METRICS)
    lines = surrogates.findings(rows)
    assert lines[0].text == "reuters skipped: not there"
    assert not any(line.failed for line in lines)
    rows[0]["mAP"] = None
    assert all(line.failed for line in surrogates.findings(rows))


def test_few_seeds_say_nothing():
    """Both claims are about means."""
    rows = make_rows(0.1, seeds=3)
    claims = findings(rows, "o1") + findings(rows, "o2")
    assert [claim.outcome for claim in claims] == ["undecided"] * 13


def test_reuters_without_its_files_is_a_reason(monkeypatch):
    """Every column is there, empty."""
    monkeypatch.delenv("HYPERGRAD_DATA_DIR", raising=False)
    tasks.reuters.cache_clear()
    learning.splits_of.cache_clear()
    cell = {"task": "reuters", "method": "baseline", "seed": 0}
    row = surrogates.measure(cell, [])
    assert "HYPERGRAD_DATA_DIR" in row["reason"]
    assert row["mAP"] is None
    assert row["gap"] is None


# Average precision.


def test_all_pairs_and_blocks_are_one_formula():
    """The n x n sum that blocks are timed against, and NumPy's of both."""
    scores, targets = average_precision.data(300, 0)
    value = average_precision.FORMS["n x n"](scores, targets)
    blocks = average_precision.FORMS["blocks (SmoothAP)"](scores, targets)
    formula = average_precision.formula("blocks (SmoothAP)", scores, targets, 0.0)
    assert np.isclose(value, formula, rtol=1e-5)
    assert np.isclose(blocks, formula, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, "supported"),
        ({"per_pair": 3.0, "ratio": 3.0}, "not supported"),
        ({"value": 0.51}, "FAILED"),
        ({"finite": False}, "FAILED"),
    ],
)
def test_claims_on_time(change: dict, outcome: str):
    """A ratio above its bound is not supported; a wrong value fails."""
    rows = [
        cell
        | {"ratio": 0.5 + 0.01 * cell["seed"], "per_pair": 1 + 0.01 * cell["seed"]}
        | {"finite": True, "value": 0.5, "formula": 0.5}
        | change
        for cell in average_precision.table.cells("small", 5)
    ]
    lines = average_precision.findings(rows)
    assert {line.outcome for line in lines} == {outcome}
