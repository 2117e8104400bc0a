"""Searches by rounds that continue from a recorded round."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.searchers import (
    Hyperband,
    OneShot,
    PopulationBasedTraining,
    SuccessiveHalving,
)
from tests.search.populations import (
    MOMENTUM,
    inner_loss,
    outer_loss,
    search,
    search_supernet,
)

PBT = PopulationBasedTraining(4)


@pytest.fixture(scope="module")
def rounds() -> list[dict]:
    """The recorded rounds of a search by `PBT`."""
    recorded = []
    search(PBT, trial_callback=recorded.append)
    return recorded


# searcher, steps of its solver, budget, rounds that it buys
SEARCHES = {
    "pbt": (PBT, 3, 45.0, 3),
    "one shot": (OneShot(4), 6, 10.0, 3),
    "halving": (SuccessiveHalving(9), 9, 45.0, 5),
    "hyperband": (Hyperband(), 9, 90.0, 7),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("halving", "hyperband")]


@pytest.mark.parametrize("name", ["pbt", "one shot", *SLOW])
def test_killed_search_continues_to_the_same_trace(name, tmp_path):
    """Bits, dtypes and cost are equal after any round; no round is repeated."""
    searcher, num_steps, budget, num_rounds = SEARCHES[name]
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), MOMENTUM)
    solver = hg.Descent(noisy, num_steps)  # its state contains a key
    problem = hg.Bilevel(
        lambda w, alpha, batch: inner_loss(w["w"], alpha, batch),
        lambda w, alpha, batch: outer_loss(w["w"], alpha, batch),
    )
    metrics = {"w": lambda w, alpha, key: w["w"][0], "nan": lambda *args: jnp.nan}

    def run(**options):
        rounds, calls = [], []

        def save_and_load(state):
            np.savez(tmp_path / "round.npz", **state)
            with np.load(tmp_path / "round.npz", allow_pickle=False) as arrays:
                rounds.append(dict(arrays))

        trace = search(
            searcher, problem=problem, solver=solver, w={"w": jnp.zeros(2)},
            metrics=metrics, trial_callback=save_and_load,
            progress=lambda *call: calls.append(call), **{"budget": budget} | options,
        )  # fmt: skip
        return trace, rounds, calls

    trace, rounds, calls = run()
    assert len(rounds) == len(calls) == num_rounds
    for k in range(1, num_rounds + 1):
        resumed, new_rounds, new_calls = run(previous_trials=rounds[k - 1 : k])
        chex.assert_trees_all_equal(resumed, trace, strict=True)
        assert new_calls == calls[k:]
        chex.assert_trees_all_equal(new_rounds, rounds[k:])
    # A search that has ended continues with a larger budget.
    longer, *_ = run(budget=1.7 * budget)
    resumed, *_ = run(budget=1.7 * budget, previous_trials=rounds)
    assert len(longer.value) > len(trace.value)
    chex.assert_trees_all_equal(resumed, longer)


def test_half_precision_survives_numpy(tmp_path):
    """NumPy saves a bfloat16 as two bytes without a type."""
    recorded = []
    run = lambda **options: search(
        PBT, w=jnp.zeros(2, jnp.bfloat16), trial_callback=recorded.append, **options
    )
    trace = run()
    np.savez(tmp_path / "round.npz", **recorded[0])
    with np.load(tmp_path / "round.npz", allow_pickle=False) as arrays:
        resumed = run(previous_trials=[dict(arrays)])
    assert resumed.w.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(resumed, trace)


def test_recorded_round_is_kept_even_if_it_exceeds_the_budget():
    recorded = []
    trace = search_supernet(90.0, trial_callback=recorded.append)
    resumed = search_supernet(10.0, previous_trials=recorded)
    chex.assert_trees_all_equal(resumed, trace)


# Rounds of another search.


BOUNDS = hg.spaces.Interval(-2.0, 3.0, shape=(2,))
ARRAY_BOUNDS = hg.spaces.Interval(jnp.full(2, -1.0), 2.0, shape=(2,))
OTHER_SEARCHES = {
    "size": {"searcher": PopulationBasedTraining(8)},
    "searcher": {"searcher": SuccessiveHalving(9)},
    "perturbation": {"searcher": PopulationBasedTraining(4, perturbation=0.3)},
    "array": {"searcher": PopulationBasedTraining(4, perturbation=jnp.array(0.3))},
    "steps": {"num_steps": 4},
    "key": {"key": jax.random.key(1)},
    "bounds": {"space": {"center": BOUNDS}},
    "array of bounds": {"space": {"center": ARRAY_BOUNDS}},
    "w": {"w": jnp.ones(2)},
    "data": {"problem": hg.Bilevel(inner_loss, outer_loss, None, jnp.ones(3))},
    "metrics": {"metrics": {"more": lambda w, alpha, key: 0.0}},
}


@pytest.mark.parametrize("name", OTHER_SEARCHES)
def test_rounds_of_another_search_are_refused(rounds, name):
    with pytest.raises(ValueError, match=r"previous_trials\[-1\]"):
        search(**{"searcher": PBT} | OTHER_SEARCHES[name], previous_trials=rounds)


def test_rounds_with_other_closed_over_numbers_are_refused():
    """The same functions made anew with the same numbers are accepted."""

    def run(inner=1.0, outer=1.0, metric=1.0, rate=0.1, **options):
        times = lambda factor, fn: lambda *args: factor * fn(*args)
        problem = hg.Bilevel(times(inner, inner_loss), times(outer, outer_loss))
        metrics = {"sum": lambda w, alpha, key: jnp.sum(metric * w)}
        solver = hg.Descent(optax.sgd(rate), 3)
        options = {"solver": solver, "metrics": metrics, "budget": 10} | options
        return search(PBT, problem=problem, **options)

    recorded = []
    trace = run(trial_callback=recorded.append)
    chex.assert_trees_all_equal(run(previous_trials=recorded), trace)
    for name in ("inner", "outer", "metric", "rate"):
        with pytest.raises(ValueError, match=r"previous_trials\[-1\]"):
            run(previous_trials=recorded, **{name: 0.4})


def test_incomplete_rounds_are_refused(rounds):
    for incomplete in ({}, {"search": rounds[-1]["search"]}):
        with pytest.raises(ValueError, match=r"previous_trials\[-1\]"):
            search(PBT, previous_trials=[incomplete])


def test_a_changed_array_is_refused(rounds):
    """Also one that no other search could have: of the same shape and dtype."""
    names = rounds[-1].keys() - {"search"}
    for name, array in ((name, rounds[-1][name]) for name in names):
        content = bytearray(np.asarray(array).tobytes())
        content[len(content) // 2] ^= 1
        changed = np.frombuffer(content, array.dtype).reshape(array.shape)
        with pytest.raises(ValueError, match=r"previous_trials\[-1\].*checksum"):
            search(PBT, previous_trials=[rounds[-1] | {name: changed}])
