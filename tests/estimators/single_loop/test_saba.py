"""SABA: its tables, its rate, and the memory of its compiled step."""

import re
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.estimators.single_loop import sample_batches
from hypergrad.estimators.single_loop.variance_reduction import (
    empty_table,
    saga_estimate,
)
from hypergrad.problem import EstimateData
from tests.estimators.single_loop.problems import (
    ALPHA,
    FULL,
    SGD,
    W,
    examples,
    inner_loss,
    outer_loss,
    run_steps,
    with_batches,
)

NUM_EXAMPLES = 4


def quadratic_inner(w, alpha, batch):
    """Returns squared residuals, whose targets alpha shifts, and a penalty."""
    residual = batch["x"] @ w - batch["y"] - batch["z"] @ alpha
    return 0.5 * jnp.mean(residual**2) + 0.1 * jnp.sum(w**2)


def quadratic_outer(w, alpha, batch):
    """Returns squared residuals and a penalty on alpha."""
    residual = batch["x"] @ w - batch["y"]
    return 0.5 * jnp.mean(residual**2) + 0.5 * jnp.mean((batch["z"] @ alpha) ** 2)


def state_after_three_steps(method, problem):
    """Returns a state, whose memory holds derivatives of different points."""
    state = method.init(problem, W, ALPHA)
    for key in jax.random.split(jax.random.key(1), 3):
        _, state = jax.jit(method.estimate)(problem, state, ALPHA, key)
    return state


@pytest.mark.parametrize("order", ["iid", "blocks"])
@pytest.mark.parametrize("method", [hg.SOBA(SGD), hg.SABA(SGD), hg.SRBA(SGD, period=5)])
def test_value_is_the_outer_loss_on_the_batch_of_the_step(method, order: str):
    data = [hg.Batches(examples(seed, NUM_EXAMPLES), 2, order=order) for seed in (1, 2)]
    problem = hg.Bilevel(inner_loss, outer_loss, *data)
    state = state_after_three_steps(method, problem)
    key = jax.random.key(3)
    estimate, _ = jax.jit(method.estimate)(problem, state, ALPHA, key)
    _, outer_batch = sample_batches(EstimateData.sample(problem, key))
    value = outer_loss(state.w, ALPHA, outer_batch)
    np.testing.assert_allclose(estimate.value, value, rtol=1e-12)


@pytest.mark.parametrize("method", [hg.SABA(SGD), hg.SRBA(SGD, period=5)])
def test_no_state_depends_on_the_outer_value(method):
    """A value that nobody records is not evaluated, which saves a pass over a batch."""
    data = [
        hg.Batches(examples(seed, NUM_EXAMPLES), 2, order="blocks") for seed in (1, 2)
    ]
    problem = hg.Bilevel(inner_loss, outer_loss, *data)
    shifted_loss = lambda *args: outer_loss(*args) + 1.0
    shifted = hg.Bilevel(inner_loss, shifted_loss, *data)
    states = [state_after_three_steps(method, each) for each in (problem, shifted)]
    chex.assert_trees_all_equal(*states)


@pytest.mark.parametrize(("size", "order"), [(3, "iid"), (1, "blocks"), (2, "blocks")])
def test_mean_of_each_table_is_the_mean_of_its_rows(size: int, order: str):
    """Batches of 3 of 4 examples repeat examples, which count once in the table."""
    data = [
        hg.Batches(examples(seed, NUM_EXAMPLES), size, order=order) for seed in (1, 2)
    ]
    problem = hg.Bilevel(inner_loss, outer_loss, *data)
    state = state_after_three_steps(hg.SABA(SGD), problem)
    for table in state.memory:
        mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), table.updated_rows())
        chex.assert_trees_all_close(table.mean, mean, rtol=1e-12)
        assert optax.tree.norm(mean) > 0.1


def test_mean_over_all_examples_is_the_step_of_soba_on_all_data():
    """The estimates are unbiased whatever the tables hold."""
    saba, problem = hg.SABA(optax.sgd(0.5)), with_batches(1, 1)
    state = state_after_three_steps(saba, problem)

    @jax.jit
    @jax.vmap
    def outcome(key):
        estimate, next_state = saba.estimate(problem, state, ALPHA, key)
        return jnp.hstack([estimate.hypergradient, next_state.w, next_state.v])

    outcomes = np.asarray(outcome(jax.random.split(jax.random.key(0), 200)))
    rounded, first = np.unique(np.round(outcomes, 9), axis=0, return_index=True)
    assert len(rounded) == 3 * 3
    soba = hg.SOBA(optax.sgd(0.5))
    soba_state = replace(state, memory=None)
    estimate, expected = soba.estimate(FULL, soba_state, ALPHA, jax.random.key(0))
    expected = jnp.hstack([estimate.hypergradient, expected.w, expected.v])
    np.testing.assert_allclose(outcomes[first].mean(axis=0), expected, rtol=1e-12)


class BatchesOfOne(hg.Batches):
    """Batches of one example, drawn as a block of one example is."""

    def draw_indices(self, key):
        return self.draw_block(key)[None]


def test_blocks_of_one_example_are_batches_of_one_example():
    """Rows of examples and rows of blocks agree in each step, if their draws do."""
    keys = jax.random.split(jax.random.key(3), 8)

    def records(make_batches):
        data = [make_batches(examples(seed)) for seed in (1, 2)]
        problem = hg.Bilevel(inner_loss, outer_loss, *data)
        return run_steps(hg.SABA(SGD), problem, W, ALPHA, 0.05, keys)[1]

    of_blocks = records(lambda data: hg.Batches(data, 1, order="blocks"))
    of_examples = records(lambda data: BatchesOfOne(data, 1))
    chex.assert_trees_all_close(of_blocks, of_examples, rtol=1e-12)


@pytest.mark.parametrize("data", ["batches", "all data"])
def test_first_step_is_that_of_soba(data: str):
    """With empty tables both methods agree; on all data, also in later steps."""
    problem = FULL if data == "all data" else with_batches()
    keys = jax.random.split(jax.random.key(3), 4)
    optimizers = optax.sgd(0.5), optax.sgd(0.4)
    saba, soba = (
        run_steps(method(*optimizers), problem, W, ALPHA, 0.05, keys)[1]
        for method in (hg.SABA, hg.SOBA)
    )
    at_step = lambda records, k: jax.tree.map(lambda x: x[k], records)
    for k in range(4 if data == "all data" else 2):
        chex.assert_trees_all_close(at_step(saba, k), at_step(soba, k), rtol=1e-12)
    is_equal = np.allclose(saba[1], soba[1], rtol=1e-6)
    assert is_equal == (data == "all data")


def test_saba_converges_linearly_below_the_plateau_of_soba():
    """At equal cost, the suboptimality of SABA falls on a line and that of SOBA stalls.

    Batches of 4 of 32 examples; the gap of ``alpha`` every 25 steps.
    """
    train, val = examples(1, 32), examples(2, 32)
    problem = hg.Bilevel(
        quadratic_inner, quadratic_outer, hg.Batches(train, 4), hg.Batches(val, 4)
    )

    @jax.jit
    def value(alpha):
        x, target = train["x"], train["y"] + train["z"] @ alpha
        H = x.T @ x / 32 + 0.2 * jnp.eye(3)
        return quadratic_outer(jnp.linalg.solve(H, x.T @ target / 32), alpha, val)

    zero = jnp.zeros(3)
    best = -jnp.linalg.solve(jax.hessian(value)(zero), jax.grad(value)(zero))
    keys = jax.random.split(jax.random.key(0), 601)

    def gaps_and_cost(method):
        cost = lambda estimate: estimate.stats["gradient_equivalents"]
        _, (_, alphas, costs) = run_steps(method, problem, W, ALPHA, 0.05, keys, cost)
        return jax.vmap(value)(alphas[::25]) - value(best), np.sum(costs)

    (saba_gaps, saba_cost), (soba_gaps, soba_cost) = map(
        gaps_and_cost, (hg.SABA(SGD), hg.SOBA(SGD))
    )
    assert saba_cost == soba_cost
    falling = np.asarray(saba_gaps)[np.asarray(saba_gaps) > 1e-13]
    steps, logs = np.arange(len(falling)), np.log(falling)
    slope, intercept = np.polyfit(steps, logs, 1)
    residuals = logs - (intercept + slope * steps)
    assert len(falling) >= 4
    assert slope < -0.5
    assert np.var(residuals) < 0.05 * np.var(logs)
    assert np.median(soba_gaps[-5:]) > 10 * np.median(np.abs(saba_gaps[-5:]))


@pytest.mark.parametrize(("order", "rows"), [("iid", 512), ("blocks", 128)])
def test_step_does_not_copy_the_tables(order: str, rows: int):
    """The compiled program of a run neither copies a table nor selects between two."""
    x = jnp.ones((512, 37), jnp.float32)
    inner = lambda w, alpha, x: 0.5 * jnp.mean(((w - alpha)[None] - x) ** 2)
    outer = lambda w, alpha, x: 0.5 * jnp.mean((w[None] - x) ** 2)
    sgd = optax.sgd(0.1)

    def run(x, key):
        data = hg.Batches(x, 4, order=order)
        zero = jnp.zeros(37, jnp.float32)
        return hg.minimize(
            hg.Bilevel(inner, outer, data, data), hg.SABA(sgd), sgd, zero, zero,
            num_steps=9, key=key,
        ).alpha  # fmt: skip

    text = jax.jit(run).lower(x, jax.random.key(0)).compile().as_text()
    table = rf"= f32\[{rows},37\]\S* "
    assert re.search(table + "(fusion|scatter|dynamic-update-slice)", text)
    copies = re.findall(table + r"(copy|select)\(", text)
    assert len(copies) <= 4  # of the zeros with which five tables start


@pytest.mark.parametrize("order", ["iid", "blocks"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_mean_of_many_equal_rows_is_not_lost_in_rounding(dtype, order):
    """In bfloat16 a sum of 4,096 equal terms would stop at 256 times the term."""
    data = hg.Batches(jnp.ones(4096, dtype), 1, order=order)
    table = empty_table(jax.ShapeDtypeStruct((), jnp.dtype(dtype)), data)

    @jax.jit
    def estimate_at_the_end(table, key):
        def step(table, key):
            mean = lambda x: (None, jnp.mean(x))
            _, estimate, table = saga_estimate(mean, table, data, key)
            return table, estimate

        _, estimates = jax.lax.scan(step, table, jax.random.split(key, 60_000))
        return estimates[-1]

    estimate = estimate_at_the_end(table, jax.random.key(0))
    assert estimate.dtype == dtype
    np.testing.assert_allclose(float(estimate), 1.0, rtol=0.01)
