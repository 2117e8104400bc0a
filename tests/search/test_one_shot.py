"""One-shot search: a supernet against separate trainings of its choices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.searchers import OneShot
from tests.search.populations import (
    FIRST,
    NODE_VALUES,
    NODES,
    SECOND,
    SUPERNET,
    SUPERNET_SOLVER,
    search,
    search_supernet,
)


def test_shared_weights_rank_choices_as_separate_trainings_do():
    """If each choice has its own weights; a step of rate 1 fits the selected ones.

    All are selected in 60 steps, except with probability 4 (3/4)^60.
    """
    trace = search_supernet(budget=90.0)
    assert len(trace.value) > 40
    chex.assert_trees_all_close(trace.w, (FIRST, SECOND), atol=1e-12)
    first = np.asarray(trace.metrics["first"], int)
    second = np.searchsorted([5, 7, 8, 9], trace.metrics["second"])
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 12
    np.testing.assert_allclose(trace.value, NODE_VALUES[first, second], rtol=1e-9)
    separate = hg.search(
        SUPERNET, SUPERNET_SOLVER, hg.searchers.Grid(1), (jnp.zeros(3), jnp.zeros(4)),
        space=NODES, budget=1e4,
    )  # fmt: skip
    np.testing.assert_allclose(separate.value, NODE_VALUES.ravel(), rtol=1e-9)
    assert (trace.best_alpha["first"], trace.best_alpha["second"]) == (0, 7)


@pytest.mark.parametrize(("budget", "num_rounds"), [(9.0, 0), (20.0, 2)])
def test_one_shot_costs_one_training_and_a_value_per_sample(budget, num_rounds):
    trace = search_supernet(budget, hg.Descent(optax.sgd(0.5), 7))
    assert len(trace.value) == 1 + 16 * num_rounds
    np.testing.assert_array_equal(trace.stats["num_grads"][:1], 7)
    np.testing.assert_array_equal(trace.stats["num_grads"][1:], 0)
    np.testing.assert_array_equal(trace.stats["num_outer_values"], 1)
    np.testing.assert_array_equal(trace.metrics["steps"], 7)
    cost = 7 + np.arange(1, 1 + len(trace.value)) / 3
    np.testing.assert_allclose(trace.cost, cost, rtol=1e-12)
    assert trace.cost[-1] <= budget < trace.cost[-1] + 16 / 3


def test_one_shot_compares_all_choices_on_the_same_data():
    """The value of random data cancels in a comparison."""
    noise = lambda key: (None, jax.random.normal(key, (1,)))
    outer = lambda w, alpha, batch: jnp.sum(batch) + alpha
    trace = search(
        OneShot(4), problem=hg.Bilevel(lambda w, *_: w**2, outer, data_fn=noise), w=0.0,
        solver=hg.Descent(optax.sgd(0.5), 2), space=hg.spaces.Choice(3), budget=10,
        metrics={"choice": lambda w, alpha, key: alpha},
    )  # fmt: skip
    assert len(set(trace.metrics["choice"].tolist())) == 3
    data_value = trace.value - trace.metrics["choice"]
    np.testing.assert_allclose(data_value, data_value[0], atol=1e-14)


def test_one_shot_samples_the_choice_of_each_step_uniformly():
    """Each step adds 1 to the entry of its choice: chi-square of 600 steps."""
    counts = lambda w, alpha, batch: -w[alpha]
    trace = search(
        OneShot(4), problem=hg.Bilevel(counts, counts), w=jnp.zeros(3),
        solver=hg.Descent(optax.sgd(1.0), 600), space=hg.spaces.Choice(3), budget=1,
    )  # fmt: skip
    assert trace.w.sum() == 600
    assert np.sum((trace.w - 200) ** 2 / 200) < 18.4  # chi2(2): p = 1e-4


@pytest.mark.slow
def test_one_shot_finds_the_optimum_within_its_stated_budget():
    """Of 48 samples none is the best of twelve with probability (11/12)^48 = 0.015."""
    best = []
    for seed in range(10):
        trace = search_supernet(60 + 49 / 3 + 0.1, key=jax.random.key(seed))
        assert len(trace.value) == 49
        best.append(trace.value.min())
    np.testing.assert_allclose(np.median(best), NODE_VALUES.min(), rtol=1e-9)
    assert "four samples per choice" in OneShot.__doc__
