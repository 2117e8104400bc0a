"""Searches that continue from recorded trials: to the same bits, or refused."""

import json
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.spaces import Unit
from hypergrad.trials.records import RecordedTrials, add_checksum
from tests.search.problems import (
    TRIAL_COST,
    RecordingSearcher,
    inner_loss,
    outer_loss,
    record,
    search,
)

METRICS = {"norm": lambda w, alpha, key: w[0], "nan": lambda w, alpha, key: jnp.nan}
FIRST = r"previous_trials\[0\]"


@pytest.fixture(scope="module")
def recorded() -> tuple[list[dict], hg.Trace]:
    """Twelve random trials and their trace."""
    return record()


@pytest.mark.parametrize("name", ["Random", "Sobol", "Grid", "TPE", "CMAES"])
def test_killed_search_continues_to_the_same_trace(name):
    """Bits, dtypes and cost are equal wherever it was killed; no trial is repeated."""
    searcher = getattr(hg.searchers, name)(*[4] * (name in ("Grid", "TPE")))
    options = {"searcher": searcher, "metrics": METRICS}
    trials, trace = record(**options)
    best = int(np.argmin(trace.value))
    for num_previous in (1, best, best + 1, 12):
        new_trials, resumed = record(**options, previous_trials=trials[:num_previous])
        assert json.dumps(new_trials) == json.dumps(trials[num_previous:])
        chex.assert_trees_all_equal(resumed, trace, strict=True)


def test_values_that_are_not_finite_survive_strict_json():
    """NaN, both infinities and a number, one for each quarter of the interval."""
    values = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5])
    outer = lambda w, alpha, batch: values[(4 * alpha).astype(int)]
    options = {
        "problem": hg.Bilevel(lambda w, alpha, batch: (w - alpha) ** 2, outer),
        "solver": hg.ClosedForm(lambda alpha, batch: alpha),
        "searcher": hg.searchers.Grid(8), "w": 0.0, "space": Unit(),
        "metrics": {"again": lambda w, alpha, key: outer(w, alpha, None)},
    }  # fmt: skip
    trials, trace = record(**options)
    expected = [None, None, "inf", "inf", "-inf", "-inf", 0.5, 0.5]
    assert [trial["metrics"]["again"] for trial in trials] == expected
    assert [trial["value"] for trial in trials] == [None] * 6 + [0.5] * 2
    assert [trial["flags"]["not_finite"] for trial in trials] == [True] * 6 + [
        False
    ] * 2
    _, resumed = record(**options, previous_trials=trials[:7])
    chex.assert_trees_all_equal(resumed, trace, strict=True)


def test_recorded_trials_are_told_but_not_run(recorded):
    """A value that no run would give is kept, told, and found to be the best.

    So is an alpha that differs from the proposal by rounding.
    """
    trials = json.loads(json.dumps(recorded[0][:6]))
    trials[2]["value"] = -1.0
    trials[2]["alpha"][0][0] *= 1 + 1e-7
    trials[2] = add_checksum(trials[2])
    searcher, calls = RecordingSearcher(), []
    progress = lambda *call: calls.append(call)
    with pytest.warns(UserWarning, match=r"trial, 2, has the recorded value -1\.0"):
        trace = search(searcher=searcher, previous_trials=trials, progress=progress)
    assert trace.value[2] == -1.0
    assert [value for _, value in searcher.told] == trace.value.tolist()
    np.testing.assert_array_equal(trace.best_alpha, trials[2]["alpha"][0])
    np.testing.assert_array_equal(searcher.told[2][0], trials[2]["alpha"][0])
    np.testing.assert_allclose(trace.w, 2 * trace.best_alpha)
    assert calls == [(done, -1.0) for done in range(7, 13)]


# Damaged trials.


def test_each_of_a_thousand_flipped_bits_is_noticed(recorded):
    """The line is no JSON any more, means the same, or its trial is refused."""
    lines = [json.dumps(trial).encode() for trial in recorded[0]]
    generator = random.Random(0)
    for _ in range(1000):
        content = bytearray(generator.choice(lines))
        bit = generator.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        try:
            trial = json.loads(content)
        except ValueError:
            continue
        if trial in recorded[0]:  # "1e-05" is "1E-05"
            continue
        with pytest.raises(ValueError, match=FIRST):
            RecordedTrials([trial], trial.get("search"))


CHANGES = {
    "lower value": {"value": -1.0},
    "no checksum": {"sha256": None},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_trial_is_refused_and_nothing_runs(recorded, name):
    trials, calls = list(recorded[0][:3]), []
    trials[1] = trials[1] | CHANGES[name]
    with pytest.raises(ValueError, match=r"previous_trials\[1\].*checksum"):
        search(previous_trials=trials, trial_callback=calls.append)
    assert not calls


# Trials of another search.


def test_dictionary_that_is_no_trial_is_refused():
    with pytest.raises(ValueError, match=rf"{FIRST}.*checksum"):
        search(previous_trials=[{"value": 1.0}])


def test_trial_that_is_left_out_or_occurs_twice_is_refused(recorded):
    trials, _ = recorded
    with pytest.raises(ValueError, match="trial 1"):
        search(previous_trials=[trials[0], *trials[2:]])
    with pytest.raises(ValueError, match="previous_trials"):
        search(previous_trials=[*trials[:3], trials[1]])


def test_trial_at_another_alpha_is_refused(recorded):
    with pytest.raises(ValueError, match=rf"{FIRST}.*alpha"):
        search(previous_trials=recorded[0], searcher=hg.searchers.Sobol())


def test_trials_of_another_key_are_refused():
    """A grid proposes the same for every key, but batches depend on it."""
    options = {"searcher": hg.searchers.Grid(2)}
    trials, trace = record(**options)
    chex.assert_trees_all_equal(search(**options, previous_trials=trials), trace)
    with pytest.raises(ValueError, match=rf"{FIRST}.*key"):
        search(**options, previous_trials=trials, key=jax.random.key(1))


def test_integers_of_recorded_trials_must_be_equal():
    """The integer after a million differs by less than rounding may change a float."""
    options = {
        "problem": hg.Bilevel(lambda w, a, b: (w - a) ** 2, lambda w, a, b: w),
        "solver": hg.ClosedForm(lambda alpha, batch: 1.0 * alpha), "w": 0.0,
        "space": hg.spaces.Integer(10**6, 2 * 10**6), "budget": 1.0,
    }  # fmt: skip
    (trial,), _ = record(**options)
    changed = add_checksum(trial | {"alpha": [trial["alpha"][0] + 1]})
    search(**options, previous_trials=[trial])
    with pytest.raises(ValueError, match=rf"{FIRST}.*alpha"):
        search(**options, previous_trials=[changed])


@pytest.mark.parametrize("trials", [None, 5, "trials.jsonl", {"value": 1.0}, [None]])
def test_previous_trials_must_be_a_list_of_dictionaries(trials):
    with pytest.raises(TypeError, match="previous_trials"):
        search(previous_trials=trials)


def test_trials_with_other_metrics_are_refused():
    trials, _ = record(metrics=METRICS, budget=1.0)
    for metrics in (None, {"norm": METRICS["norm"]}, METRICS | {"a": METRICS["nan"]}):
        with pytest.raises(ValueError, match=rf"{FIRST}.*metrics"):
            search(previous_trials=trials, metrics=metrics)


@pytest.mark.parametrize("limit", ["budget", "grid"])
def test_more_trials_than_the_search_would_make_are_refused(limit):
    """As many as it would make are taken; nothing runs before the refusal."""
    options = {
        "budget": {"budget": 3.1 * TRIAL_COST},
        "grid": {"searcher": hg.searchers.Grid(2)},
    }[limit]
    trials, trace = record(**options)
    extra = record()[0][3]
    if limit == "grid":
        extra = add_checksum(trials[0] | {"trial": 4})
    new_trials = []
    with pytest.raises(ValueError, match="previous_trials"):
        search(
            **options, previous_trials=[*trials, extra],
            trial_callback=new_trials.append,
        )  # fmt: skip
    assert not new_trials
    chex.assert_trees_all_equal(search(**options, previous_trials=trials), trace)


def make_options(constant, inner=2.0, outer=2.0, metric=2.0, rate=0.1, data=0.5, w=0.0):
    """Returns the arguments of a search, made anew, with numbers in various places."""
    inner, outer, metric = map(constant, (inner, outer, metric))
    times = lambda factor, fn: lambda *args: jnp.sum(factor * fn(*args))
    losses = times(inner, inner_loss), times(outer, outer_loss)
    return {
        "problem": hg.Bilevel(*losses, jnp.array(data), jnp.array(data)),
        "solver": hg.Descent(optax.sgd(rate), 3),
        "w": jnp.full(2, w),
        "metrics": {"sum": lambda w, alpha, key: jnp.sum(metric * w)},
        "budget": 1.0,
    }


@pytest.mark.parametrize("constant", [float, jnp.array], ids=["number", "array"])
def test_trials_with_other_numbers_are_refused(constant):
    """Closed over by the losses, a metric or an optimizer; in the data or in ``w``."""
    trials, trace = record(**make_options(constant))
    resumed = search(**make_options(constant), previous_trials=trials)
    np.testing.assert_array_equal(resumed.value, trace.value)
    for name in ("inner", "outer", "metric", "rate", "data", "w"):
        options = make_options(constant, **{name: 0.4})
        with pytest.raises(ValueError, match=FIRST):
            search(**options, previous_trials=trials)


def test_trials_with_other_arrays_of_a_solver_or_metric_are_refused():
    """These are arguments of the program and no part of it."""
    make = lambda tolerance=0.1, x=1.0: {
        "solver": hg.Newton(tolerance=tolerance),
        "metrics": {"x": jax.tree_util.Partial(lambda x, *_: x, jnp.array(x))},
        "budget": 1.0,
    }
    trials, _ = record(**make())
    search(**make(), previous_trials=trials)
    for changes in ({"tolerance": 0.2}, {"x": 2.0}):
        with pytest.raises(ValueError, match=FIRST):
            search(**make(**changes), previous_trials=trials)
