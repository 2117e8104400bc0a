"""Data of populations: random data is held fixed, and passes go on between rounds."""

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
from tests.search.populations import search

SEARCHERS = {
    "halving": SuccessiveHalving(9),
    "hyperband": Hyperband(),
    "pbt": PopulationBasedTraining(4),
    "one-shot": OneShot(4),
}


@pytest.mark.parametrize("name", SEARCHERS)
def test_members_are_evaluated_on_examples_that_they_never_trained_on(name):
    """``w`` has a number per example, which stays 0 unless it is trained towards 1.

    The data is a random split of the examples. The value is the mean of ``(w - 1)^2``
    over the other half, which is 1 for every member of every round.
    """

    def split(key):
        indices = jax.random.permutation(key, 20)
        return indices[:10], indices[10:]

    loss = lambda w, alpha, batch: jnp.mean((w[batch] - 1) ** 2) + 0 * alpha
    trace = search(
        SEARCHERS[name], problem=hg.Bilevel(loss, loss, data_fn=split),
        w=jnp.zeros(20), solver=hg.Descent(optax.sgd(0.25), 27),
        space=hg.spaces.Unit(), budget=400, metrics={
            "num_trained": lambda w, alpha, key: jnp.sum(w > 0),
        },
    )  # fmt: skip
    assert len(set(trace.metrics["steps"].tolist())) > 1 or name == "one-shot"
    np.testing.assert_array_equal(trace.metrics["num_trained"], 10)
    np.testing.assert_array_equal(trace.value, 1.0)


@pytest.mark.parametrize("order", ["epoch", "epoch_blocks"])
@pytest.mark.parametrize(
    ("searcher", "num_steps", "num_uses"),
    [(SuccessiveHalving(4, eta=2), 8, 2), (PopulationBasedTraining(4), 3, 3)],
    ids=["halving", "pbt"],
)
def test_passes_go_on_from_round_to_round(searcher, num_steps, num_uses, order):
    """Eight examples in batches of two; ``w`` counts how often each was used.

    Rungs of 2, 2 and 4 steps are two passes; four rounds of three are three passes.
    """
    count = lambda w, alpha, batch: -jnp.sum(w[batch])
    batches = hg.Batches(jnp.arange(8), 2, order=order)
    outer = lambda w, alpha, batch: alpha + 0 * jnp.sum(w)
    cost_per_round = 4 * (3 / 4 + 1 / 3)
    trace = search(
        searcher, problem=hg.Bilevel(count, outer, batches), w=jnp.zeros(8),
        solver=hg.Descent(optax.sgd(1.0), num_steps), space=hg.spaces.Unit(),
        budget=4 * cost_per_round,
    )  # fmt: skip
    assert trace.metrics["steps"].max() * 2 == 8 * num_uses
    np.testing.assert_array_equal(trace.w, np.full(8, num_uses))


def test_each_bracket_has_data_of_its_own():
    """Members of one bracket share them; the value is the random number itself."""
    noise = lambda key: (None, jax.random.normal(key, (1,)))
    outer = lambda w, alpha, batch: jnp.sum(batch) + 0 * alpha
    trace = search(
        SuccessiveHalving(4, eta=2), w=0.0,
        problem=hg.Bilevel(lambda w, *_: w**2, outer, data_fn=noise),
        solver=hg.Descent(optax.sgd(0.5), 4), space=hg.spaces.Unit(), budget=35,
    )  # fmt: skip
    brackets = np.asarray(trace.value).reshape(-1, 7)  # rungs of 4, 2 and 1 members
    np.testing.assert_array_equal(brackets, brackets[:, :1] + np.zeros(7))
    assert len(set(brackets[:, 0].tolist())) == len(brackets) > 1
