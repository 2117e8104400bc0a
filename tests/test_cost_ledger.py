"""How many examples a run sees, against batches counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

N, N_VAL = 42, 14  # no power of two: fractions of the data are rounded
SOLVER = hg.Descent(optax.sgd(0.1), 5)


def inner(w, alpha, batch):
    return jnp.mean((batch @ w - 1.0) ** 2) + 0.5 * jnp.exp(alpha) * jnp.vdot(w, w)


def outer(w, alpha, batch):
    return jnp.mean((batch @ w - 1.0) ** 2)


def problem_with(batch_size, outer_batch_size, dtype=float):
    train, val = jnp.ones((N, 3), dtype), jnp.ones((N_VAL, 3), dtype)
    if batch_size is not None:
        train = hg.Batches(train, batch_size)
    if outer_batch_size is not None:
        val = hg.Batches(val, outer_batch_size)
    return hg.Bilevel(inner, outer, train, val)


def seen(problem, estimator, dtype=float) -> float:
    arguments = jnp.zeros(3, dtype), jnp.zeros((), dtype)
    return float(hg.hypergradient(problem, estimator)(*arguments).stats["num_examples"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_size", [None, 1, 5, 11])
def test_unrolling_sees_a_batch_a_step_each_way(batch_size, dtype: str):
    """5 steps, run twice for their checkpoints; all for the residual, and the outer."""
    problem = problem_with(batch_size, None, dtype)
    n = batch_size or N
    assert seen(problem, hg.Unrolled(SOLVER), dtype) == 3 * 5 * n + N + N_VAL
    once = hg.Unrolled(SOLVER, checkpoint=False)
    assert seen(problem, once, dtype) == 2 * 5 * n + N + N_VAL


@pytest.mark.parametrize("adjoint", [None, 13])
@pytest.mark.parametrize("outer_batch_size", [None, 3])
def test_implicit_sees_the_batch_that_it_holds(adjoint, outer_batch_size):
    """5 steps; 4 products, whose last yields the cross term; 2 outer gradients."""
    problem = problem_with(5, 7)
    estimator = hg.Implicit(
        SOLVER,
        hg.Neumann(4, 0.1),
        adjoint_batch_size=adjoint,
        outer_batch_size=outer_batch_size,
    )
    by_hand = 5 * 5 + 4 * (adjoint or N) + 2 * (outer_batch_size or N_VAL)
    assert seen(problem, estimator) == by_hand


STEPS = {
    # One product, which yields the gradient and the cross term too; one outer batch.
    "SOBA": (hg.SOBA(optax.sgd(0.1)), 5 + 3),
    # m + 2 gradients, and an outer one.
    "BOME": (hg.BOME(optax.sgd(0.1), 3, step_size=0.1), (3 + 2) * 5 + 3),
}


@pytest.mark.parametrize("method", STEPS)
def test_each_step_of_a_run_says_what_it_saw(method: str):
    """By what the method is said to cost."""
    estimator, by_hand = STEPS[method]
    trace = hg.minimize(
        problem_with(5, 3), estimator, optax.sgd(0.1), jnp.zeros(3), jnp.zeros(()),
        num_steps=4, key=jax.random.key(0),
    )  # fmt: skip
    np.testing.assert_array_equal(trace.stats["num_examples"], 4 * [by_hand])


def test_data_without_a_size_has_no_number_of_examples():
    """NaN, as the statistics that do not apply; calls are counted all the same."""
    free = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    problem = hg.Bilevel(free, free)
    stats = hg.hypergradient(problem, hg.Implicit(SOLVER))(0.0, 1.0).stats
    assert np.isnan(stats["num_examples"])
    assert stats["num_grads"] == 5


def test_every_call_sees_its_data():
    """By the ledger itself."""
    inner_data, outer_data = jnp.ones((N, 2)), jnp.ones((N_VAL, 2))
    found = hg.cost.cost_stats(
        inner_data, outer_data, num_grads=2, num_hvps=3, num_values=4,
        num_outer_grads=5, num_outer_values=6,
    )  # fmt: skip
    assert found["num_examples"] == N * (2 + 3 + 4) + N_VAL * (5 + 6)
