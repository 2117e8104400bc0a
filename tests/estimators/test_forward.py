"""Tests of forward mode against reverse mode, closed forms and central differences."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    central,
    error,
    get_reference,
)

KINDS = {"forward": hg.Forward, "reverse": hg.Unrolled}
TUNED_SGD = lambda alpha: optax.sgd(jnp.exp(alpha["rate"]), alpha["momentum"])
NUM_STEPS, BATCH_SIZE = 7, 8


class TunedRun(NamedTuple):
    """A run on mini-batches whose optimizer and starting point depend on alpha."""

    alpha: dict
    key: jax.Array
    hypergradient_fns: dict
    estimates: dict


@pytest.fixture(scope="module")
def tuned_run() -> TunedRun:
    """Both modes at one alpha and key."""
    reference = get_reference("ridge per-weight")
    inner_loss, outer_loss = reference.problem.inner_loss, reference.problem.outer_loss
    problem = hg.Bilevel(
        lambda w, alpha, batch: inner_loss(w, alpha["l2"], batch),
        lambda w, alpha, batch: (
            outer_loss(w, alpha["l2"], batch) + jnp.sum(alpha["init"] ** 2)
        ),
        hg.Batches(reference.problem.inner_data, BATCH_SIZE),
        reference.problem.outer_data,
        init_fn=lambda w, alpha: w + alpha["init"],
    )
    alpha = {
        "l2": reference.alpha,
        "init": jnp.linspace(-1, 1, 6),
        "rate": jnp.asarray(-2.0),
        "momentum": jnp.asarray(0.7),
    }
    key, solver = jax.random.key(5), hg.Descent(TUNED_SGD, NUM_STEPS)
    hypergradient_fns = {
        name: functools.partial(hg.hypergradient(problem, kind(solver)), reference.w)
        for name, kind in KINDS.items()
    }
    estimates = {name: fn(alpha, key) for name, fn in hypergradient_fns.items()}
    return TunedRun(alpha, key, hypergradient_fns, estimates)


@pytest.mark.parametrize("mode", KINDS)
def test_rates_momenta_and_initial_points_equal_central_differences(tuned_run, mode):
    """The hypergradient is the derivative of the value, leaf by leaf."""
    value = lambda alpha: tuned_run.hypergradient_fns[mode](alpha, tuned_run.key).value
    estimate = tuned_run.estimates[mode]
    expected = central(value, tuned_run.alpha)
    for name in expected:
        actual = estimate.hypergradient[name]
        assert error(actual, expected[name]) < 1e-8, name
    assert estimate.trusted


def test_both_modes_agree(tuned_run):
    """Forward and reverse mode differentiate the same run."""
    forward, reverse = tuned_run.estimates["forward"], tuned_run.estimates["reverse"]
    assert error(forward.hypergradient, reverse.hypergradient) < 1e-12
    chex.assert_trees_all_close(
        (forward.w, forward.value), (reverse.w, reverse.value), rtol=1e-12
    )


def test_costs_are_in_passes_over_the_data(tuned_run):
    """Forward mode carries N + 1 tangents; reverse mode stores a short run."""
    fraction, num_params = BATCH_SIZE / 40, 14
    products = {"forward": (num_params + 1) * NUM_STEPS, "reverse": NUM_STEPS}
    for mode, estimate in tuned_run.estimates.items():
        stats = estimate.stats
        assert stats["num_grads"] == pytest.approx(NUM_STEPS * fraction + 1)
        assert stats["num_hvps"] == pytest.approx(products[mode] * fraction)
        assert stats["num_outer_grads"] == 1
        assert stats["num_inner_steps"] == NUM_STEPS


def test_memory_does_not_grow_with_the_number_of_steps():
    """10,000 steps need the temporaries of 100, apart from their keys."""

    def temporary_bytes(num_steps):
        problem = hg.Bilevel(
            lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
            lambda w, alpha, batch: jnp.sum(w**2),
        )
        estimator = hg.Forward(hg.Descent(optax.sgd(0.1), num_steps))
        hypergradient_fn = hg.hypergradient(problem, estimator)
        run = lambda w, alpha: hypergradient_fn(w, alpha).hypergradient
        return hg.cost.memory(run, jnp.zeros(10_000), jnp.zeros(())).temporaries

    assert temporary_bytes(10_000) <= temporary_bytes(100) + 16 * 10_000


def test_every_executed_tangent_is_counted():
    """Eight of the entries of ``alpha``, and that of rounding, in each of 3 steps."""
    num_calls = 0

    def count(tangent):
        nonlocal num_calls
        num_calls += 1

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def identity_jvp(primals, tangents):
        jax.debug.callback(count, tangents[0])
        return primals[0], tangents[0]

    update = lambda grad, state, w=None: (-0.1 * identity(grad), state)
    optimizer = optax.GradientTransformation(lambda w: (), update)
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum(w**2),
    )
    estimator = hg.Forward(hg.Descent(optimizer, 3))
    estimate = hg.hypergradient(problem, estimator)(jnp.zeros(8), jnp.ones(8))
    jax.block_until_ready(estimate)
    jax.effects_barrier()
    assert estimate.stats["num_hvps"] == num_calls == 27


def test_the_derivative_by_a_shared_rate_is_the_sum_over_its_steps():
    """A piecewise constant schedule adds up the derivatives by its steps' rates."""
    reference = get_reference("ridge scalar")
    num_steps, num_values = 12, 3
    problem = hg.Bilevel(
        lambda w, alpha, batch: reference.problem.inner_loss(w, -1.0, batch),
        reference.problem.outer_loss,
        reference.problem.inner_data,
        reference.problem.outer_data,
    )
    shared = lambda rates: optax.sgd(hg.piecewise_constant_schedule(rates, num_steps))
    separate = lambda rates: optax.sgd(lambda count: rates[count])
    rates = jnp.array([0.1, 0.2, 0.05])
    actual = hg.hypergradient(problem, hg.Forward(hg.Descent(shared, num_steps)))(
        reference.w, rates
    )
    per_step = hg.hypergradient(problem, hg.Unrolled(hg.Descent(separate, num_steps)))(
        reference.w, jnp.repeat(rates, num_steps // num_values)
    )
    expected = per_step.hypergradient.reshape(num_values, -1).sum(axis=1)
    assert error(actual.hypergradient, expected) < 1e-12
    chex.assert_trees_all_close(actual.value, per_step.value, rtol=1e-13)


@pytest.mark.parametrize(
    ("num_params", "kind"), [(3, hg.Forward), (4, hg.Unrolled)], ids=["3", "4"]
)
def test_unrolled_estimator_chooses_the_mode_by_the_size_of_alpha(num_params, kind):
    """It counts the numbers in alpha, or in its shapes, and passes its options on."""
    alpha = {"rate": jnp.asarray(-2.0), "rest": jnp.zeros(num_params - 1)}
    solver = hg.Descent(optax.sgd(0.1), 7)
    options = {"warm_start": False, "outer_batch_size": 2}
    for like in (alpha, jax.eval_shape(lambda: alpha)):
        estimator = hg.unrolled_estimator(solver, like, **options)
        assert estimator == kind(solver, **options)
