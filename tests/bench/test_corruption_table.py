"""The corruption table: closed gaps, budgets of its runs, and its batched task."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import corruption
from benchmarks.cleaning import table as cleaning_table
from benchmarks.shared.wrong_labels import make_config
from hypergrad.bench import mean_interval
from hypergrad.tasks import cleaning


def test_closed_fraction_of_the_gap():
    """With 80 for the baseline and 90 for the oracle, a mean of 86 closes 60%."""
    cells = [("baseline", 0.80), ("oracle", 0.90), ("SOBA", 0.86), ("SABA", 0.85)]
    rows = [
        {"method": method, "share": 0.5, "seed": seed, "accuracy": x + 0.01 * seed}
        for method, x in cells
        for seed in range(5)
    ]
    for method, fraction in (("SOBA", 0.6), ("SABA", 0.5)):
        interval = corruption.closed_fraction(rows, method, 0.5)
        np.testing.assert_allclose(interval, fraction)
    claim, *others = corruption.findings(rows)
    assert "1 methods of the family close at least 60%" in claim.text
    assert claim.outcome == "not supported"
    assert len(others) == 2


def test_closed_fractions_have_intervals_of_re_splits():
    """They are those of `cleaning`, which has the same splits."""
    noise = [0.0, 0.01, 0.03, 0.02, -0.01]
    gains = {"baseline": [0.0] * 5, "oracle": [0.1] * 5, "SOBA": noise}
    rows = [
        {"method": method, "share": 0.5, "seed": seed, "accuracy": 0.8 + gain}
        for method, values in gains.items()
        for seed, gain in enumerate(values)
    ]
    expected = mean_interval(np.array(noise) / 0.1, resplits=cleaning_table.resplits)
    actual = corruption.closed_fraction(rows, "SOBA", 0.5)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.slow
def test_batches_of_cleaning_are_its_losses_on_average():
    """Value and both gradients over all batches of one, held-out examples and all."""
    data = jax.tree.map(jnp.asarray, hg.datasets.load("digits"))
    make = functools.partial(
        cleaning.make, key=jax.random.key(0), hold_out=True, corruption=0.7, data=data
    )
    all_of, batched = make().problem, make(batch_size=1).problem
    keys = jax.random.split(jax.random.key(1), 3)
    w = {"W": jax.random.normal(keys[0], (64, 10)), "b": jnp.ones(10)}
    alpha = jax.random.uniform(keys[1], (1000,))
    for side in ("inner", "outer"):
        loss, batch_loss = (
            getattr(problem, f"{side}_loss") for problem in (all_of, batched)
        )
        batches = getattr(batched, f"{side}_data")
        mean = lambda w, alpha, loss=batch_loss, batches=batches: jnp.mean(
            jax.vmap(lambda i: loss(w, alpha, batches.take(i[None])))(
                jnp.arange(batches.num_examples)
            )
        )
        both = functools.partial(jax.value_and_grad, argnums=(0, 1))
        expected = both(loss)(w, alpha, getattr(all_of, f"{side}_data"))
        found = both(mean)(w, alpha)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    wrong = cleaning.split(data, jax.random.key(0), True, 0.7)["train"]["wrong"]
    assert 0.65 < np.mean(wrong) < 0.75


@pytest.mark.slow
def test_weights_stay_constant_after_the_budget(monkeypatch):
    """They are those of a run of six steps, each of which costs 0.3."""
    monkeypatch.setattr(corruption, "BUDGET", 2)
    data, config = corruption.digits(), make_config(0, 0.5, 1e-3, False)
    alpha, cost, _ = corruption.run_method("SOBA", 12, (0.3, 0.1), data, config)
    run = functools.partial(corruption.learn_weights, "SOBA", 6, num_paid=6)
    shorter = jax.jit(run)(data, config, 0.3, 0.1)
    np.testing.assert_allclose(alpha, shorter.alpha, rtol=1e-5)
    assert cost["gradient_equivalents"] == pytest.approx(1.8)
    assert cost["num_hvps"] == pytest.approx(0.6)


def test_random_search_takes_the_best_that_was_paid_for(monkeypatch):
    """A trial that ends beyond the budget does not count."""
    data, config = corruption.digits(), make_config(0, 0.5, 1e-3, False)
    trials = [
        {"alpha": [[x]], "value": x, "cost": cost}
        for x, cost in ((0.3, 40.0), (0.2, 90.0), (0.1, 101.0))
    ]

    def search(*args, trial_callback, **settings):
        for trial in trials:
            trial_callback(trial)
        cost = jnp.array([trial["cost"] for trial in trials])
        return types.SimpleNamespace(
            value=jnp.array([trial["value"] for trial in trials]),
            cost=cost,
            stats={"num_grads": jnp.ones(3), "num_hvps": jnp.ones(3)},
            status="completed",
        )

    monkeypatch.setattr(hg, "search", search)
    alpha, cost, _ = corruption.random_search(100, data, config)
    assert alpha.tolist() == [0.2]
    assert (cost["gradient_equivalents"], cost["num_grads"]) == (90.0, 2.0)
