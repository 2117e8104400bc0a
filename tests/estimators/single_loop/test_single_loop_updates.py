"""Each single-loop method against its published update in dense matrices.

The method is compared with the update along a run on all data, and in the mean over
all possible samples: three examples in batches of one have few combinations. The losses
are curved and ``w`` moves within a step, so that the mean is not the step on all data.
"""

import functools
import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.estimators.single_loop import SingleLoopState, pzobo
from hypergrad.problem import EstimateData
from hypergrad.trees import random_like
from tests.estimators.single_loop.dense_updates import CASES, LONG_CASES, POOLS, Case
from tests.estimators.single_loop.problems import (
    ALPHA,
    FULL,
    TRAIN,
    VAL,
    V,
    W,
    outer_loss,
    with_batches,
)

GAMMA = 0.1  # rate of alpha


def samples_on_all_data(kinds: tuple, key: jax.Array) -> tuple:
    """Returns the samples of a step with this key if each batch is all data."""
    data = EstimateData.sample(FULL, key)
    vectors = iter(jax.random.split(data.inner_key, jax.tree.leaves(kinds).count("u")))
    _, series_key = jax.random.split(data.inner_key)
    _, length_key = jax.random.split(series_key)
    sample_fns = {
        "i": lambda: TRAIN,
        "o": lambda: VAL,
        "u": lambda: random_like(next(vectors), ALPHA),
        "p": lambda: jax.random.randint(length_key, (), 0, 3),
    }
    return jax.tree.map(lambda kind: sample_fns[kind](), kinds)


@pytest.mark.parametrize("name", CASES | LONG_CASES)
def test_run_on_all_data_follows_the_update(name: str):
    """Direction, value and state of six steps equal those of the update."""
    case = (CASES | LONG_CASES)[name]
    step = jax.jit(functools.partial(case.method.estimate, FULL))
    update = jax.jit(case.update)
    state = expected_state = case.method.init(FULL, W, ALPHA)
    alpha = ALPHA
    for key in jax.random.split(jax.random.key(0), 6):
        estimate, state = step(state, alpha, key)
        samples = samples_on_all_data(case.samples, key)
        num_steps = expected_state.num_steps + 1
        direction, w, expected_state = update(expected_state, alpha, *samples)
        expected_state = replace(expected_state, num_steps=num_steps)
        chex.assert_trees_all_close(
            (estimate.hypergradient, estimate.w, state),
            (direction, w, expected_state),
            rtol=1e-10,
            atol=1e-12,
        )
        if name != "DARTS":  # whose value is that of the virtual w
            # The value of VRBO is at the point of its direction, before w moves.
            point = expected_state.memory[1] if name == "VRBO" else (w, alpha)
            value = outer_loss(*point, VAL)
            np.testing.assert_allclose(estimate.value, value, rtol=1e-12)
        alpha = alpha - GAMMA * direction


def mean_of_update(case: Case, state: SingleLoopState) -> jax.Array:
    """Returns the mean of direction, next ``w`` and ``v`` over all samples."""
    kinds, structure = jax.tree.flatten(case.samples)

    def update(indices):
        take = lambda kind, i: jax.tree.map(
            lambda x: jnp.asarray(x)[i][None] if kind in "io" else x[i], POOLS[kind]
        )
        samples = [take(*pair) for pair in zip(kinds, indices, strict=True)]
        samples = jax.tree.unflatten(structure, samples)
        direction, _, next_state = case.update(state, ALPHA, *samples)
        return to_row(direction, next_state)

    sizes = [len(jax.tree.leaves(POOLS[kind])[0]) for kind in kinds]
    indices = jnp.array(list(itertools.product(*map(range, sizes))))
    return jnp.mean(jax.jit(jax.vmap(update))(indices), axis=0)


def to_row(direction: jax.Array, next_state: SingleLoopState) -> jax.Array:
    """Returns direction, next ``w`` and ``v`` as one vector."""
    v = () if next_state.v is None else next_state.v
    return jnp.hstack([direction, next_state.w, jnp.asarray(v)])


def distinct_outcomes(
    case: Case, problem: hg.Bilevel, state: SingleLoopState, num_keys: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns all distinct outcomes of a step as rows, and their numbers of products.

    The norm of the inner gradient tells outcomes apart in which BOME has no barrier.
    """

    @jax.jit
    @jax.vmap
    def step(key):
        estimate, next_state = case.method.estimate(problem, state, ALPHA, key)
        row = to_row(estimate.hypergradient, next_state)
        return row, estimate.stats["num_hvps"], estimate.stats["inner_grad_norm"]

    rows, num_hvps, norms = step(jax.random.split(jax.random.key(0), num_keys))
    table = np.round(np.column_stack([rows, num_hvps, norms]), 9)
    _, first = np.unique(table, axis=0, return_index=True)
    return np.asarray(rows)[first], np.asarray(num_hvps)[first]


@pytest.mark.parametrize("name", CASES)
def test_mean_over_all_batches_is_the_mean_of_the_update(name: str, monkeypatch):
    """Each outcome occurs, and their mean is the mean of the update."""
    corner = lambda key, like: 2.0 * jax.random.bernoulli(key, shape=like.shape) - 1
    monkeypatch.setattr(pzobo, "random_like", corner)
    case, problem = CASES[name], with_batches(1, 1)
    state = case.method.init(problem, W, ALPHA)
    state = replace(state, memory=case.memory, num_steps=jnp.asarray(1))
    if case.method.uses_adjoint:
        state = replace(state, v=V)

    kinds = jax.tree.leaves(case.samples)
    total = 3 ** (kinds.count("i") + kinds.count("o")) * 8 ** kinds.count("u")
    # A series of random length samples a batch per product: none, one or two.
    sizes = [total // 9, total // 3, total] if "p" in kinds else [total]
    # The probability that an outcome is missed is below exp(-12).
    num_keys = int(total * len(sizes) * (np.log(total) + 12))
    rows, num_products = distinct_outcomes(case, problem, state, num_keys)
    groups = [rows[num_products == n] for n in np.unique(num_products)]
    assert [len(group) for group in groups] == sizes
    mean = np.mean([group.mean(axis=0) for group in groups], axis=0)
    expected = mean_of_update(case, state)
    np.testing.assert_allclose(mean, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["SRBA", "VRBO"])
def test_first_step_uses_all_data(name: str):
    """The first step of a recursion is the same with batches and with all data."""
    method = CASES[name].method
    results = []
    for problem in (FULL, with_batches(1, 1)):
        state = method.init(problem, W, ALPHA)
        step = jax.jit(functools.partial(method.estimate, problem))
        estimate, state = step(state, ALPHA, jax.random.key(0))
        results.append((estimate.value, estimate.hypergradient, state))
    chex.assert_trees_all_close(*results, rtol=1e-12)
