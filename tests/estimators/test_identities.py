"""Tests of estimators against each other, and of the error of truncation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    error,
    get_reference,
    quadratic,
    quadratic_outer,
)
from tests.estimator_cases import run_estimator

# Equal results.

REFERENCE = get_reference("logistic per-weight")


def test_truncation_equals_the_neumann_series():
    """At a stationary point K terms of the series are the last K steps of descent."""
    num_terms, step_size = 5, 0.3 * REFERENCE.step
    solution = REFERENCE.solution(REFERENCE.alpha)
    solver = hg.Descent(optax.sgd(step_size), num_terms + 3)
    series = hg.Implicit(solver, hg.Neumann(num_terms, step_size))
    expected = run_estimator(REFERENCE, series, solution).hypergradient
    assert error(expected, REFERENCE.exact(REFERENCE.alpha)) > 1e-6
    for checkpoint in (True, False):
        truncated = hg.Unrolled(solver, num_terms, checkpoint)
        actual = run_estimator(REFERENCE, truncated, solution).hypergradient
        assert error(actual, expected) < 1e-12


def test_truncation_to_all_steps_is_no_truncation():
    """K = T gives the full derivative, which is trusted; so does a larger K."""
    solver = hg.Descent(optax.sgd(0.1), 9)
    full = run_estimator(REFERENCE, hg.Unrolled(solver))
    estimate = run_estimator(REFERENCE, hg.Unrolled(solver, 9))
    assert error(estimate.hypergradient, full.hypergradient) < 1e-14
    assert estimate.trusted
    is_truncated = [hg.Unrolled(solver, k).is_truncated for k in (8, 9, 20)]
    assert is_truncated == [True, False, False]


def test_no_steps_leave_the_direct_term():
    """With T = 0, w does not depend on alpha."""
    reference = quadratic("2")
    estimate = run_estimator(reference, hg.Unrolled(hg.Descent(optax.sgd(0.1), 0)))
    expected = jax.grad(quadratic_outer, argnums=1)(
        reference.w, reference.alpha, reference.problem.outer_data
    )
    assert error(estimate.hypergradient, expected) < 1e-15
    assert estimate.trusted


# Warm starts.


TUNED_SGD = lambda alpha: optax.sgd(0.05 + 0 * jnp.sum(alpha))
CONSTANT_SGD = optax.sgd(0.05)


@pytest.mark.parametrize(
    ("kind", "optimizer", "warm_start", "is_warm"),
    [
        pytest.param(hg.Implicit, CONSTANT_SGD, True, True, id="Implicit, warm"),
        pytest.param(hg.Implicit, CONSTANT_SGD, False, False, id="Implicit, cold"),
        pytest.param(hg.Unrolled, CONSTANT_SGD, None, True, id="Unrolled, default"),
        pytest.param(hg.Unrolled, CONSTANT_SGD, False, False, id="Unrolled, cold"),
        pytest.param(hg.Unrolled, TUNED_SGD, None, False, id="tuned, default"),
        pytest.param(hg.Unrolled, TUNED_SGD, True, True, id="tuned, warm"),
    ],
)
def test_warm_starts_continue_the_inner_run(kind, optimizer, warm_start, is_warm):
    """Five warm estimates of 20 steps are 100 steps; cold ones repeat the first."""
    reference = get_reference("ridge scalar")
    estimator = kind(hg.Descent(optimizer, 20), warm_start=warm_start)
    state = estimator.init(reference.problem, reference.w, reference.alpha)
    estimate_fn = jax.jit(functools.partial(estimator.estimate, reference.problem))
    for _ in range(5):
        estimate, state = estimate_fn(state, reference.alpha, jax.random.key(0))
    expected = reference.w
    for _ in range(100 if is_warm else 20):
        expected = expected - 0.05 * ridge_grad(expected)
    assert error(estimate.w, expected) < 1e-12


@jax.jit
def ridge_grad(w):
    reference = get_reference("ridge scalar")
    return jax.grad(reference.problem.inner_loss)(
        w, reference.alpha, reference.problem.inner_data
    )


# The error estimate of truncation.


def truncation_errors(reference, num_steps, lengths):
    """Returns true and estimated relative errors of truncated derivatives."""
    solver = hg.Descent(optax.sgd(0.7 * reference.step), num_steps)
    full = run_estimator(reference, hg.Unrolled(solver)).hypergradient
    estimates = [run_estimator(reference, hg.Unrolled(solver, k)) for k in lengths]
    actual = [error(estimate.hypergradient, full) for estimate in estimates]
    estimated = [float(e.stats["error_estimate"]) for e in estimates]
    return np.array(actual), np.array(estimated)


def test_the_truncation_estimate_is_exact_for_one_mode():
    """If every step contributes 0.3 of the next, the geometric series is exact."""
    actual, estimated = truncation_errors(get_reference("quadratic 0-d"), 12, [2, 5])
    assert np.all(actual > 1e-5)
    # The estimate is relative to the truncated derivative, the error to the full one.
    np.testing.assert_allclose(estimated / actual, 1, atol=2 * actual.max())


@pytest.mark.slow
def test_the_truncation_estimate_falls_as_the_error():
    """With 30 modes it is within a factor 10 of the error; a single step has none."""
    actual, estimated = truncation_errors(
        get_reference("quadratic 30"), 200, [4, 16, 64, 1]
    )
    ratios = estimated[:-1] / actual[:-1]
    assert np.all((ratios > 0.1) & (ratios < 10))
    assert actual[2] < 1e-3 * actual[0]
    assert np.isnan(estimated[-1])
