"""Properties of the estimates of every family of estimators.

All tests of an estimator on one problem share a compiled program: only numbers differ.
"""

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    cast,
    dense,
    error,
    flat,
    quadratic,
    two_losses,
)
from hypergrad.estimators.base import REASONS, STATS
from tests.estimator_cases import (
    RIDGE,
    RIDGE_DATA,
    converging_descent,
    failed_checks,
    noisy_ridge,
    problem_of_episodes,
    ridge_outer,
    ridge_penalty,
    ridge_solution,
)
from tests.loops import TO_ZERO, Stateless

QUADRATIC = quadratic("nested")
SOLVER = converging_descent(QUADRATIC)


def second_loss(w, alpha, batch):
    return jnp.sum(jnp.sin(flat(w))) * alpha["a"]


PROBLEM = two_losses(QUADRATIC, second_loss)
#: Estimator and relative error on the quadratic, of smooth outer losses.
ESTIMATORS = {
    "Implicit": (hg.Implicit(SOLVER), 1e-9),
    "Implicit, LU": (hg.Implicit(SOLVER, lx.LU()), 1e-9),
    "Implicit, rtol": (hg.Implicit(SOLVER, num_newton_steps=1, rtol=1e-8), 1e-8),
    "Implicit, certified": (hg.Implicit(SOLVER, certify=True), 1e-9),
    "Unrolled": (hg.Unrolled(SOLVER), 1e-9),
    "Forward": (hg.Forward(SOLVER), 1e-9),
    "FixedPoint": (hg.FixedPoint(SOLVER, 300), 1e-9),
    "Penalty": (hg.Penalty(SOLVER, 1e6, symmetric=True), 1e-5),
    "CentralDifference": (hg.CentralDifference(SOLVER), 1e-7),
    "Average": (hg.Average(hg.Implicit(SOLVER), num_samples=2), 1e-9),
}
UNTRUSTED = {"Penalty", "CentralDifference"}  # their bias is not measured


def test_a_hypergradient_of_nan_is_not_trusted_whatever_the_flags():
    """The estimator has a check of its own that misses the NaN."""
    flags = {"own check": jnp.asarray(False)}
    estimator = Stateless(
        lambda w, alpha, key: hg.Estimate(jnp.ones(()), alpha * jnp.nan, w, flags=flags)
    )
    estimate = hg.hypergradient(TO_ZERO, estimator)(0.0, 1.0)
    assert estimate.flags["not_finite"]
    assert not estimate.trusted


@pytest.fixture(scope="module")
def exact():
    return dense(PROBLEM, QUADRATIC.w, QUADRATIC.alpha)


def run(name, problem=PROBLEM):
    estimator, _ = ESTIMATORS[name]
    return hg.hypergradient(problem, estimator)(QUADRATIC.w, QUADRATIC.alpha)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimate_of_two_losses_equals_the_dense_solution(name, exact):
    """Values are ``[2]``, and each leaf of the hypergradient has two rows."""
    _, rtol = ESTIMATORS[name]
    estimate = run(name)
    chex.assert_shape(estimate.value, (2,))
    chex.assert_trees_all_equal_shapes(estimate.hypergradient, exact["hypergradient"])
    scale = np.max(np.abs(flat(exact["hypergradient"])))
    chex.assert_trees_all_close(
        estimate.hypergradient, exact["hypergradient"], rtol=rtol, atol=rtol * scale
    )
    chex.assert_trees_all_close(estimate.value, exact["value"], rtol=10 * rtol)
    assert bool(estimate.trusted) == (name not in UNTRUSTED)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_statistics_and_reasons_are_complete(name):
    """Every estimate has all statistics, and each failed check has a sentence."""
    estimate = run(name)
    assert set(estimate.stats) == {*STATS, "trusted"}
    assert bool(estimate.stats["trusted"]) == (not failed_checks(estimate))
    assert len(estimate.reasons) == len(failed_checks(estimate))
    assert set(estimate.flags) <= set(REASONS)
    assert estimate.stats["gradient_equivalents"] > 0


@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_nan_in_the_data_is_not_trusted(name, where):
    """A single NaN in the data of one of the losses turns trust off."""
    train, val = PROBLEM.inner_data, PROBLEM.outer_data
    if where == "inner":
        train = train | {"C": train["C"].at[0, 0].set(jnp.nan)}
    else:
        val = val | {"t": val["t"].at[0].set(jnp.nan)}
    problem = hg.Bilevel(PROBLEM.inner_loss, PROBLEM.outer_loss, train, val)
    assert not run(name, problem).trusted


RIDGE_ESTIMATORS = {
    "Newton": hg.Implicit(hg.Newton()),
    "LBFGS, LU": hg.Implicit(hg.LBFGS(), lx.LU()),
    "Descent, Neumann": hg.Implicit(hg.Descent(optax.sgd(0.3), 300), hg.Neumann(200)),
    "ClosedForm": hg.Implicit(hg.ClosedForm(ridge_solution)),
    "Unrolled": hg.Unrolled(converging_descent(RIDGE)),
}


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-4), ("float64", 1e-9)])
@pytest.mark.parametrize("name", RIDGE_ESTIMATORS)
def test_an_estimate_is_exact_in_the_precision_of_its_problem(name, dtype, rtol):
    """Under x64, float32 problems give float32 estimates."""
    problem, w, alpha = cast((RIDGE.problem, RIDGE.w, RIDGE.alpha), dtype)
    estimate = hg.hypergradient(problem, RIDGE_ESTIMATORS[name])(w, alpha)
    assert error(estimate.hypergradient, RIDGE.exact(RIDGE.alpha)) < rtol
    assert estimate.trusted
    leaves = jax.tree.leaves((estimate.value, estimate.hypergradient, estimate.w))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


# Random data.


@pytest.mark.parametrize("make_estimator", [hg.Implicit, hg.Unrolled])
def test_each_estimate_sees_one_episode(make_estimator):
    """With ``data_fn`` an estimate is the closed form of one of three episodes."""
    problem, episodes = problem_of_episodes()
    alpha = episodes[0].alpha
    estimator = make_estimator(converging_descent(episodes[0], 600))
    gradient_fn = hg.hypergradient(problem, estimator)
    batched = jax.vmap(lambda key: gradient_fn(jnp.zeros(6), alpha, key).hypergradient)
    actual = batched(jax.random.split(jax.random.key(0), 12))
    expected = np.stack([reference.exact(alpha) for reference in episodes])
    errors = np.linalg.norm(actual[:, None] - expected[None], axis=-1)
    assert np.all(errors.min(axis=1) < 1e-9 * np.linalg.norm(expected))
    assert set(errors.argmin(axis=1)) == {0, 1, 2}


@pytest.mark.parametrize("with_key", [False, True], ids=["batches", "keyed batches"])
@pytest.mark.parametrize("make_estimator", [hg.Implicit, hg.Unrolled])
def test_estimate_is_determined_by_its_key(make_estimator, with_key):
    """The same key gives the same bits; another key gives another estimate."""
    loss = noisy_ridge if with_key else ridge_penalty
    train = hg.Batches(RIDGE_DATA[0], 8, with_key=with_key)
    problem = hg.Bilevel(loss, ridge_outer, train, hg.Batches(RIDGE_DATA[1]))
    estimator = make_estimator(hg.Descent(optax.sgd(0.1), 20), outer_batch_size=7)
    gradient_fn = hg.hypergradient(problem, estimator)
    results = [
        (estimate.hypergradient, estimate.w)
        for seed in (1, 1, 2)
        for estimate in [gradient_fn(RIDGE.w, RIDGE.alpha, jax.random.key(seed))]
    ]
    chex.assert_trees_all_equal(results[0], results[1])
    for first, other in zip(results[0], results[2], strict=True):
        assert not np.any(np.asarray(first) == np.asarray(other))


@pytest.mark.parametrize("make_estimator", [hg.Implicit, hg.Unrolled])
def test_outer_loss_uses_all_examples_by_default(make_estimator):
    """The batch size of the outer data applies to single-loop methods only."""
    val = hg.Batches(RIDGE_DATA[1], 7)
    problem = hg.Bilevel(ridge_penalty, ridge_outer, RIDGE_DATA[0], val)
    estimator = make_estimator(converging_descent(RIDGE))
    estimate = hg.hypergradient(problem, estimator)(RIDGE.w, RIDGE.alpha)
    expected = RIDGE.exact(RIDGE.alpha)
    chex.assert_trees_all_close(estimate.hypergradient, expected, rtol=1e-8)


# Starting points.


@pytest.mark.parametrize("make_estimator", [hg.Implicit, hg.Unrolled])
def test_start_that_depends_on_alpha_is_computed_for_each_estimate(make_estimator):
    """With ``init_fn`` a second estimate starts where the first did."""
    init_fn = lambda w, alpha: w + alpha
    problem = hg.Bilevel(ridge_penalty, ridge_outer, *RIDGE_DATA, init_fn=init_fn)
    estimator = make_estimator(hg.Descent(optax.sgd(0.3), 5))
    state = estimator.init(problem, RIDGE.w, RIDGE.alpha)
    step = jax.jit(estimator.estimate)
    first, state = step(problem, state, RIDGE.alpha, jax.random.key(0))
    second, _ = step(problem, state, RIDGE.alpha, jax.random.key(0))
    chex.assert_trees_all_close(second.w, first.w, rtol=1e-14)


@pytest.mark.parametrize("make_estimator", [hg.Implicit, hg.Unrolled])
def test_inner_grad_norm_is_the_norm_at_the_estimate(make_estimator):
    """``||dL/dw||`` where five steps of gradient descent stopped, by NumPy."""
    estimator = make_estimator(hg.Descent(optax.sgd(0.1), 5))
    estimate = hg.hypergradient(RIDGE.problem, estimator)(RIDGE.w, RIDGE.alpha)
    x, y = RIDGE_DATA[0]["x"], RIDGE_DATA[0]["y"]
    w = estimate.w
    inner_grad = x.T @ (x @ w - y) / len(y) + jnp.exp(RIDGE.alpha) * w
    np.testing.assert_allclose(
        estimate.stats["inner_grad_norm"], jnp.linalg.norm(inner_grad), rtol=1e-12
    )


@pytest.mark.parametrize("make_estimator", [hg.Implicit, hg.Unrolled])
def test_diverging_inner_loop_is_not_trusted(make_estimator):
    """Gradient descent with five times the largest stable step overflows."""
    estimator = make_estimator(hg.Descent(optax.sgd(5 * RIDGE.step), 2000))
    estimate = hg.hypergradient(RIDGE.problem, estimator)(RIDGE.w, RIDGE.alpha)
    assert not estimate.trusted
