"""The main job: its split, its scores, its verdicts, its budget, its command."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score

from hypergrad import data as datasets
from hypergrad import studies
from hypergrad.studies import report
from hypergrad.studies.cleaning import BUDGET, learn
from hypergrad.tasks import cleaning

DIGITS = jax.tree.map(jnp.asarray, datasets.load("digits"))


def test_the_split_is_a_partition_and_labels_differ_where_it_says():
    """1,000 + 150 + 647 distinct images; about half the labels are wrong."""
    marked = DIGITS | {"x": jnp.arange(1797)[:, None]}
    parts = cleaning.split(marked, jax.random.key(3), False)
    seen = [np.ravel(parts[name]["x"]) for name in ("train", "val", "test")]
    assert [len(x) for x in seen] == [1000, 150, 647]
    assert sorted(np.concatenate(seen)) == list(range(1797))
    train = parts["train"]
    clean = DIGITS["y"][np.ravel(train["x"])]
    np.testing.assert_array_equal(train["clean"], clean)
    np.testing.assert_array_equal(train["y"] != clean, train["wrong"])
    assert 0.45 < np.mean(train["wrong"]) < 0.55
    assert set(np.unique((train["y"] - clean) % 10)) == set(range(10))


def test_held_out_examples_are_out_of_use():
    """50 of 150, and none where nothing is held out."""
    for hold_out, count in ((True, 50), (False, 0)):
        parts = cleaning.split(DIGITS, jax.random.key(0), jnp.asarray(hold_out))
        assert jnp.sum(parts["held"]["use"]) == count
        np.testing.assert_array_equal(parts["held"]["use"] + parts["val"]["use"], 1)
    batch = cleaning.split(DIGITS, jax.random.key(0), True)["val"]
    w = {"W": jnp.ones((64, 10)) * jnp.arange(10.0)[None], "b": jnp.zeros(10)}
    used = {name: x[np.asarray(batch["use"]) == 1] for name, x in batch.items()}
    loss = functools.partial(cleaning.val_loss, w, None)
    np.testing.assert_allclose(loss(batch), loss(used), rtol=1e-12)
    score = functools.partial(cleaning.accuracy, w=w, alpha=None, key=None)
    np.testing.assert_allclose(score(batch), score(used), rtol=1e-12)


def test_f1_is_scikit_learns():
    """Weights below 1/2 detect wrong labels."""
    keys = jax.random.split(jax.random.key(0))
    alpha = jax.random.uniform(keys[0], (1000,))
    wrong = jax.random.bernoulli(keys[1], 0.3, (1000,))
    found = cleaning.f1_of_wrong_labels(wrong, None, alpha, None)
    expected = f1_score(np.asarray(wrong), np.asarray(alpha) < 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_paired_interval_is_students():
    """Against scipy's interval of the mean difference."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 10))
    mean, low, high = report.paired(first, second)
    difference = first - second
    expected = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), (expected.low, expected.high), rtol=1e-12)
    assert mean == pytest.approx(difference.mean())


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        ([2.5, 2.6, 2.4], "claimed: reproduced"),
        ([1.5, 1.6, 1.4], "not reproduced"),  # too little
        ([-9.0, 9.0, 9.0], "not reproduced"),  # too uncertain
    ],
)
def test_the_verdict_is_the_criterion(gain: list[float], verdict: str):
    """At least two points, interval above zero."""
    base = np.full(3, 0.8)
    results = {
        "baseline": {"test_accuracy": base},
        "implicit": {"test_accuracy": base + np.asarray(gain) / 100},
    }
    (line,) = report.verdicts(studies.STUDIES["cleaning"], results)
    assert line.endswith(verdict)


def test_every_row_keeps_the_budget_and_the_best_penalty_is_chosen():
    """The curve of a hypergradient row ends below 3,000 but would not fit one more."""
    study = studies.STUDIES["cleaning"]
    ticks = []
    results = studies.run(study, ["baseline", "implicit"], [0], ticks.append)
    curve = results["implicit"]["curve_cost"][0]
    assert 2000 < curve[-1] <= study.budget
    assert ticks == ["baseline"] * 4 + ["implicit"] * 4
    scores = {}
    for penalty in study.grid:
        lane = (jax.random.key(0), jnp.float32(penalty), jnp.asarray(True))
        learned = study.learn("baseline", DIGITS, lane)
        measured = study.evaluate(DIGITS, lane, learned)
        scores[penalty] = tuple(measured["selection"].tolist())
    assert results["baseline"]["setting"][0] == max(scores, key=scores.__getitem__)


def test_the_planned_cost_of_a_step_is_an_upper_bound():
    """What `by_gradient` takes a step to cost, against the ledger of one step."""
    lane = (jax.random.key(0), jnp.asarray(1e-3), jnp.asarray(False))
    for method, most in (("implicit", 93), ("neumann", 111), ("unrolled", 202)):
        learned = jax.jit(functools.partial(learn, method))(DIGITS, lane)
        per_step = np.diff(learned["curve_cost"], prepend=0.0)
        assert per_step.max() <= most
        assert learned["curve_cost"][-1] <= BUDGET


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hypergrad.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_command_writes_rows_table_and_figure(tmp_path):
    """One seed, one estimator: the other estimators' rows are left out."""
    out = tmp_path / "out"
    done = run_command(
        "run", "cleaning", "--estimator", "implicit", "--seeds", "1", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    lines = (out / "cleaning.jsonl").read_text().splitlines()
    methods = {json.loads(line)["method"] for line in lines}
    assert {"baseline", "implicit", "oracle"} <= methods
    assert "neumann" not in methods
    assert f"--out {out}" in (out / "cleaning.md").read_text()
    assert (out / "cleaning.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_no_seeds():
    """With a message, not a traceback."""
    done = run_command("run", "cleaning", "--seeds", "0")
    assert done.returncode != 0
    assert "at least 1" in done.stderr
    assert "Traceback" not in done.stderr
