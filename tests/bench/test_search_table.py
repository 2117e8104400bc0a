"""The table `search`: its problem, its runs and its findings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import hypergrad as hg
from benchmarks import search
from benchmarks.shared import searching
from benchmarks.shared.searching import Gaussian, Target, Until
from hypergrad.bench import Finding

# The problem.


def test_penalties_are_those_of_their_groups():
    """Halves of the pixels, classes within them, single weights; nested."""
    two = np.array([-1.0, -2.0])
    penalties = searching.penalties(jnp.asarray(two))
    assert penalties.shape == (50, 10)
    np.testing.assert_allclose(penalties[:25], math.exp(-1))
    np.testing.assert_allclose(penalties[25:], math.exp(-2))
    twenty = np.arange(20.0) / 10
    penalties = searching.penalties(jnp.asarray(twenty))
    np.testing.assert_allclose(penalties[24], np.exp(twenty[:10]))
    np.testing.assert_allclose(penalties[25], np.exp(twenty[10:]))
    single = np.arange(500.0) / 500
    penalties = searching.penalties(jnp.asarray(single))
    np.testing.assert_allclose(np.ravel(penalties), np.exp(single))


def test_parts_are_apart_and_two_fifths_of_the_labels_are_wrong():
    """Sizes; the pixels' means on the training digits are out; the seed decides."""
    parts = searching.split(0)
    assert [len(parts[name]["y"]) for name in parts] == [200, 800, 797]
    np.testing.assert_allclose(parts["train"]["x"].mean(axis=0), 0, atol=1e-6)
    right = LogisticRegression().fit(parts["val"]["x"], parts["val"]["y"])
    wrong = 1 - right.score(parts["train"]["x"], parts["train"]["y"])
    assert 0.3 < wrong < 0.55  # 0.4 drawn, and the model's own errors
    again, other = searching.split(0), searching.split(1)
    np.testing.assert_array_equal(again["train"]["y"], parts["train"]["y"])
    assert (other["train"]["y"] != parts["train"]["y"]).any()


def test_the_target_is_below_a_brute_grid_of_scikit_learn():
    """Where pixels over the root of their penalty make every penalty 1."""
    target, parts = searching.known(0, 2), searching.split(0)

    def h(alpha):
        root = np.exp(np.repeat(alpha, 25) / 2)
        model = LogisticRegression(
            C=1 / 200, fit_intercept=False, tol=1e-8, max_iter=5000
        )
        model.fit(parts["train"]["x"] / root, parts["train"]["y"])
        scores = parts["val"]["x"] / root @ model.coef_.T
        each = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
        return -np.mean(each[np.arange(800), parts["val"]["y"]])

    assert h(target.alpha) == pytest.approx(target.target, abs=1e-5)
    assert h(np.full(2, searching.START)) == pytest.approx(target.start, abs=1e-5)
    near = [target.alpha + np.array([i, j]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    inside = [a for a in near if np.all((a >= searching.LOW) & (a <= searching.HIGH))]
    assert min(map(h, inside)) >= target.target - 1e-6


# Searchers.


def test_the_gaussian_that_goes_on_proposes_what_a_replay_does(key):
    """Three generations in three axes, all within the box; cmaes by the searcher."""
    space = hg.spaces.Interval(-1.0, 1.0, shape=(3,))
    ours, theirs = Gaussian(0.05), hg.searchers.CMAES(0.05)
    mine, other = ours.init(space, key), theirs.init(space, key)
    for i in range(25):
        each = jax.random.fold_in(key, i)
        (here, mine), (there, other) = ours.ask(mine, each), theirs.ask(other, each)
        np.testing.assert_allclose(here, there, rtol=1e-12)
        value = jnp.sum((here - 0.3) ** 2)
        mine, other = ours.tell(mine, here, value), theirs.tell(other, there, value)


@pytest.mark.parametrize(("bound", "most", "trials"), [(0.05, 99, 5), (-1, 7, 7)])
def test_a_search_ends_at_the_bound_or_with_its_trials(bound, most, trials):
    """A grid of eleven points from 0 to 1, whose fifth is the first within 0.05."""
    square = lambda w, alpha, batch: (w - alpha) ** 2
    outer = lambda w, alpha, batch: (w - 0.6) ** 2
    trace = hg.search(
        hg.Bilevel(square, outer), hg.Newton(),
        Until(hg.searchers.Grid(11), bound, most), 0.0,
        space=hg.spaces.Unit(), budget=1000,
    )  # fmt: skip
    assert len(trace.value) == trials


# One run.

TARGET = Target(start=2.0, target=1.0, alpha=np.zeros(2))


def test_a_run_is_there_at_its_first_value_within_one_per_cent():
    """1.01 here; what is beyond the budget, or has no number, is not looked at."""
    h, cost = [2.0, math.nan, 1.02, 1.01, 1.0], [10.0, 20.0, 30.0, 40.0, 50.0]
    row = searching.evaluate_run(h, cost, TARGET, 100)
    assert row["cost"] == 40
    assert row["left"] == pytest.approx(0)
    assert row["evaluations"] == 4
    row = searching.evaluate_run(h, cost, TARGET, 39)
    assert row["cost"] is None
    assert row["spent"] == 30
    assert row["left"] == pytest.approx(0.02)
    assert row["curve"] == pytest.approx([1.0, 0.02])
    none = searching.evaluate_run(h, cost, TARGET, 5)
    assert (none["cost"], none["spent"], none["left"]) == (None, 0, 1)


def test_of_a_long_run_few_points_are_kept():
    """Of the best so far, the first and the last among them."""
    left = np.tile([1.0, 2.0], 500) * np.linspace(1.0, 0.5, 1000)
    row = searching.course(left, np.arange(1000.0))
    assert 40 < len(row["curve"]) == len(row["curve_cost"]) <= 60
    assert row["curve"] == sorted(row["curve"], reverse=True)
    assert (row["curve"][0], row["curve_cost"][0]) == (1.0, 0.0)
    assert (row["curve_cost"][-1], row["spent"]) == (999.0, 999.0)
    assert row["left"] == row["curve"][-1] == left[998]


def test_tuning_prefers_to_be_there_sooner_then_nearer():
    """Any run that is there to any that is not."""
    rows = [
        {"cost": 100.0, "left": 0.01},
        {"cost": 8000.0, "left": 0.0},
        {"cost": None, "left": 0.011},
        {"cost": None, "left": 0.5},
    ]
    scores = list(map(searching.score, rows))
    assert scores == sorted(scores)
    assert scores[3] - scores[2] == pytest.approx(math.log(0.5 / 0.011))


def test_a_search_is_charged_for_the_start_and_its_trials(monkeypatch):
    """Twenty training digits and twenty to validate."""
    few = lambda part: jax.tree.map(lambda x: jnp.asarray(x[:20]), part)
    parts = {name: few(part) for name, part in searching.split(0).items()}
    monkeypatch.setattr(searching, "arrays", lambda seed: parts)
    monkeypatch.setattr(
        searching, "known", lambda seed, size: Target(9, -1, np.zeros(2))
    )
    row = searching.run.__wrapped__("Random", 0, 2, 1.0, 300.0)
    _, first = searching.first_w(parts["train"], jnp.full(2, searching.START))
    assert row["cost"] is None
    assert first < row["curve_cost"][0] < row["spent"] <= 300
    assert np.all(np.abs(np.array(row["alpha"]) - searching.START) <= 1)
    assert row["curve"] == sorted(row["curve"], reverse=True)


# Findings.


def make_rows(cost: dict, spent: float = 1e6) -> list[dict]:
    """Returns all planned rows; the cost of (method, size) is 100 if not stated."""
    return [
        cell
        | {
            "cost": None
            if cell["method"] in searching.REFERENCES
            else cost.get((cell["method"], cell["size"]), 100.0),
            "spent": spent,
            "left": 0.5,
            "best": "implicit",
        }
        for cell in search.table.cells("small", 5)
    ]


def line(rows: list[dict], *words: str) -> Finding:
    """Returns the one finding with all of the words."""
    (finding,) = [x for x in search.findings(rows) if all(w in x.text for w in words)]
    assert not finding.failed
    return finding


LARGE = ("Random", 500), ("CMAES", 500)


def test_fifty_times_is_supported_and_less_is_not():
    """The claim is about 500 hyperparameters alone."""
    rows = make_rows({LARGE[0]: 6000.0, LARGE[1]: 4000.0})
    random = line(rows, "500 hyper", "Random over")
    assert random.outcome == "supported"
    assert "60 [60, 60] times" in random.text
    assert line(rows, "500 hyper", "CMAES over").outcome == "not supported"
    assert line(rows, "20 hyperparameters", "CMAES over").outcome is None


def test_a_black_box_that_misses_the_target_counts_with_its_bound():
    """The claim is supported only if the bound is high enough."""
    cmaes = line(make_rows(dict.fromkeys(LARGE), spent=6000.0), "500 hyper", "CMAES")
    assert "at least, 5 of 5 seeds miss the target" in cmaes.text
    assert cmaes.outcome == "supported"
    rows = make_rows(dict.fromkeys(LARGE), spent=3000.0)
    assert line(rows, "500 hyper", "CMAES over").outcome == "not supported"


def test_no_claim_is_supported_if_hypergradients_miss_the_target():
    """The black boxes do not matter then."""
    rows = make_rows({("implicit", 500): None} | dict.fromkeys(LARGE))
    random = line(rows, "500 hyper", "Random over")
    assert "implicit misses the target on 5 of 5 seeds" in random.text
    assert random.outcome == "not supported"


def test_the_winner_is_the_first_of_those_that_reach_the_target():
    """A method that ended below its cost is undecided."""
    rows = make_rows({("TPE", 2): 40.0, ("SOBA", 2): 60.0, ("Sobol", 2): None}, 30.0)
    text = line(rows, "2 hyperparameters: first").text
    assert "first is TPE, 40, then SOBA, 60; undecided" in text
    assert "Sobol" in text


def test_the_best_row_with_hypergradients_tuned_best():
    """It is chosen by the rows of the stage; without them the error says so."""
    scores = {"implicit": 2.0, "implicit, 10 steps": 1.5, "unrolled": 3.0, "SOBA": 1.7}
    rows = [
        {"stage": "tuning", "method": x, "size": 2, "scores": [9.0, score]}
        for x, score in scores.items()
    ]
    assert search.best_descent(2, rows) == "implicit, 10 steps"
    with pytest.raises(ValueError, match="run without --only"):
        search.best_descent(20, rows)
