"""Tests of the table `trainings`: its target, costs of runs, and findings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import trainings
from benchmarks.shared import grouped_penalties
from benchmarks.shared.grouped_penalties import Reference
from benchmarks.trainings import progress_columns
from hypergrad.runtime.compat import enable_x64


def numpy_value(splits, alpha: np.ndarray) -> float:
    """Returns the outer loss after 300 steps, in NumPy and float64."""
    x, y = splits["train"]["x"].astype(float), splits["train"]["y"].astype(float)
    penalty = np.exp(np.repeat(alpha, trainings.NUM_FEATURES // alpha.size))
    w, v = np.zeros(trainings.NUM_FEATURES), 0.0
    for _ in range(trainings.NUM_STEPS):
        error = 1 / (1 + np.exp(y * (w @ x)))
        v = 0.9 * v - x @ (y * error) / y.size + penalty * w
        w = w - 0.5 * v
    val = splits["val"]
    return float(np.mean(np.logaddexp(0, -val["y"] * (w @ val["x"].astype(float)))))


def test_a_training_is_that_of_the_protocol(key):
    """Against the same training in NumPy."""
    splits = trainings.split(100)
    alpha = np.linspace(-4, 0, 10)
    with enable_x64(True):
        double = grouped_penalties.in_double(splits)
        args = double["train"], double["val"], jnp.zeros(trainings.NUM_FEATURES)
        actual = jax.jit(trainings.trained_value)(*args, jnp.asarray(alpha), key)
    assert float(actual) == pytest.approx(numpy_value(splits, alpha), rel=1e-9)


def test_ten_groups_and_single_features_are_one_problem():
    """Where penalties are equal within groups, so are the losses."""
    splits, alpha = trainings.split(0), jnp.linspace(-4.0, 0.0, 10)
    w = jnp.linspace(-1.0, 1.0, trainings.NUM_FEATURES)
    of_groups = grouped_penalties.inner_loss(w, alpha, splits["train"])
    of_features = grouped_penalties.inner_loss(
        w, jnp.repeat(alpha, 50), splits["train"]
    )
    np.testing.assert_allclose(of_groups, of_features, rtol=1e-6)


ENDS = Reference(ridge=1.0, target=0.0)


def test_costs_until_each_fraction_of_the_way_are_in_trainings():
    """A value that is not finite or beyond the budget does not count."""
    values = [0.9, 0.45, np.nan, 0.5, 0.15, 0.04]
    cost = [300 * n for n in (1, 2, 3, 4, 5, 6)]
    row = progress_columns(values, cost, ENDS, budget=5.5)
    assert row["trainings"] == [2.0, 5.0, None]
    assert row["spent"] == 5.0
    assert row["left"] == pytest.approx(0.15)
    assert row["curve"][-1] == pytest.approx(0.15)
    row = progress_columns(values, cost, ENDS, budget=6)
    assert row["trainings"] == [2.0, 5.0, 6.0]


def test_scores_prefer_runs_that_get_there_and_then_runs_that_are_near():
    """Scores increase with trainings, then with the remaining fraction."""
    row = lambda last, left: {"trainings": [1.0, 1.0, last], "left": left}
    order = [row(5.0, 0.0), row(999.0, 0.0), row(None, 0.1), row(None, 0.5)]
    scores = [trainings.score(x) for x in order]
    assert scores == sorted(scores)
    assert len(set(scores)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["L-BFGS", "Adam, warm start", "Random"])
def test_the_cost_of_a_run_is_that_of_its_steps(method, monkeypatch):
    """A cold estimate is 300 gradients, 30 products of two, and a few others."""
    monkeypatch.setattr(trainings, "reference", lambda seed, size: ENDS)
    monkeypatch.setattr(trainings, "SEARCH_BUDGET", 5.0)
    row = trainings.run(method, trainings.settings_of(method)[-1], 100, 10)
    costs = np.array(row["curve_cost"])
    step_cost = {"L-BFGS": 1.2, "Adam, warm start": 0.2, "Random": 1.0}[method]
    assert np.diff(costs)[0] == pytest.approx(step_cost, rel=0.15)
    init_cost = step_cost + (method == "Adam, warm start")
    assert costs[0] == pytest.approx(init_cost, rel=0.15)


# Findings.


def make_rows(cost: float, seeds: int = 5) -> list[dict]:
    """Returns rows: hypergradients at a cost, black boxes at 100, Random never."""
    rows = []
    for cell in trainings.cells("small", seeds):
        is_gradient = cell["method"] in trainings.GRADIENT_METHODS
        last = None if cell["method"] == "Random" else cost if is_gradient else 100.0
        rows.append(
            cell
            | {
                "trainings": [1.0, 2.0, last],
                "spent": last or 1000.0,
                "left": 0.04,
                "curve": [1.0, 0.04],
                "curve_cost": [1.0, 100.0],
                "setting": 1.0,
                "scores": [3.0, 2.0 if cell["method"] == "L-BFGS" else 2.5],
                "tuning": 60.0,
            }
        )
    return rows


def texts(rows) -> list[str]:
    """Returns the texts of all findings."""
    return [finding.text for finding in trainings.findings(rows)]


def test_claims_are_about_the_method_that_tuned_best():
    """The expected texts contain numbers computed by hand."""
    rows = make_rows(12.0)
    outcomes = [x.text for x in trainings.findings(rows) if x.outcome == "supported"]
    assert outcomes == [
        "10 hyperparameters, L-BFGS: 95% of the way in 12 [12, 12] trainings, at most "
        "26 claimed; the goal of 10 is not reached",
        "500 hyperparameters, L-BFGS: 95% of the way in 12 [12, 12] trainings, at most "
        "36 claimed; the goal of 15 is reached",
    ]
    assert (
        "10 hyperparameters, CMAES: 100 trainings, 8.33 [8.33, 8.33] times as many as "
        "L-BFGS"
    ) in texts(rows)
    assert (
        "500 hyperparameters, Random: 1e+03 trainings at least, never there on 5 of 5 "
        "seeds, 83.3 [83.3, 83.3] times as many as L-BFGS"
    ) in texts(rows)


def test_a_method_that_is_slow_or_never_there_is_not_supported():
    """Too few seeds decide nothing."""
    assert trainings.findings(make_rows(27.0))[0].outcome == "not supported"
    rows = make_rows(12.0)
    next(r for r in rows if r["method"] == "L-BFGS")["trainings"][-1] = None
    first, second, *_ = trainings.findings(rows)
    assert "never on 1 seed" in first.text
    assert first.outcome == "not supported"
    # A ratio of two bounds would mean nothing.
    assert second.text.endswith("; L-BFGS is never there on 1 seed")
    assert trainings.findings(make_rows(12.0, seeds=4))[0].outcome == "undecided"


def test_settings_at_an_end_of_those_tried_are_named():
    """1 is the last of the rates of Adam only; 0.05 the first step of CMAES."""
    rows = make_rows(12.0)
    for row in rows:
        row["setting"] = {"Adam": 1.0, "CMAES": 0.05}.get(row["method"], 0.6)
        if (row["method"], row["size"]) == ("CMAES", 500):
            row["setting"] = 0.1
    last = texts(rows)[-1]
    assert last == "at an end of the settings tried: Adam (10), CMAES (10), Adam (500)"


def test_the_table_shows_every_method(tmp_path):
    """A bound is marked with >."""
    rows = make_rows(12.0)
    lines = trainings.body(rows)
    assert "| L-BFGS | 1 | 2 | 12 | 5 of 5 | 4.0% | 1 | 60 |" in lines
    assert "| Random | 1 | 2 | > 1e+03 | 0 of 5 | 4.0% | 1 | 60 |" in lines
    trainings.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
