"""Tests of the discounts and the entropy weight against closed forms and Gymnasium."""

import dataclasses

import chex
import gymnasium
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import hypergrad as hg
from hypergrad.problem import EstimateData
from hypergrad.tasks import cartpole, random_walk, reinforcement

MRP = reinforcement.make(key=jax.random.key(0), variant="mrp")
LONG_TD = dataclasses.replace(random_walk.TD, num_steps=2000)
TINY = {"num_episodes": 4, "horizon": 25, "num_steps": 3, "step_size": 0.3}


@pytest.mark.parametrize(
    ("estimator", "shape"),
    [
        pytest.param(hg.Implicit(hg.Newton(), lineax.LU()), (19,), id="implicit"),
        pytest.param(hg.Unrolled(LONG_TD), (), id="unrolled, shared discount"),
        pytest.param(hg.FixedPoint(LONG_TD, num_terms=1000), (19,), id="fixed point"),
    ],
)
def test_hypergradient_of_the_discounts_equals_the_closed_form(estimator, shape, key):
    """Newton's method and 2,000 TD steps agree with the formula to 1e-8."""
    alpha = jax.random.uniform(key, shape, minval=0.5, maxval=0.95)
    estimate = hg.hypergradient(MRP.problem, estimator)(MRP.w, alpha)
    expected = MRP.exact(alpha)
    assert expected.shape == shape
    scale = jnp.max(jnp.abs(expected))
    np.testing.assert_allclose(estimate.hypergradient, expected, atol=1e-8 * scale)
    assert estimate.trusted


def test_closed_form_equals_the_central_difference_of_the_pipeline(key):
    """The formula is the derivative of Newton's solve followed by the outer loss."""
    alpha = jax.random.uniform(key, (19,), minval=0.5, maxval=0.95)
    estimator = hg.CentralDifference(hg.Newton(tolerance=1e-14))
    estimate = hg.hypergradient(MRP.problem, estimator)(MRP.w, alpha)
    expected = MRP.exact(alpha)
    scale = jnp.max(jnp.abs(expected))
    np.testing.assert_allclose(estimate.hypergradient, expected, atol=1e-6 * scale)


def test_empirical_model_holds_frequencies_and_means():
    """`empirical_model` equals loops over the same walks."""
    walks = random_walk.simulate_walks(jax.random.key(3), num_episodes=5, horizon=60)
    walks = jax.tree.map(np.asarray, walks)
    transitions = np.zeros((19, 19))
    rewards, returns, visits = np.zeros((3, 19))
    for i, t in np.argwhere(walks["alive"]):
        state, next_state = walks["state"][i, t], walks["next_state"][i, t]
        visits[state] += 1
        rewards[state] += walks["reward"][i, t]
        returns[state] += walks["reward"][i, t:].sum()
        if 0 <= next_state < 19:
            transitions[state, next_state] += 1
    assert visits.sum() > 100
    scale = 1 / np.maximum(visits, 1)
    expected = {
        "P": scale[:, None] * transitions,
        "r": scale * rewards,
        "G": scale * returns,
        "d": visits / visits.sum(),
    }
    chex.assert_trees_all_close(
        random_walk.empirical_model(walks), expected, rtol=1e-12, atol=1e-12
    )


def test_cartpole_moves_and_ends_as_in_gymnasium():
    """Every state and every end of 20 random episodes is the one of CartPole-v1."""
    env = gymnasium.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    step = jax.jit(cartpole.dynamics)
    num_falls = 0
    for episode in range(20):
        env.reset(seed=episode)
        state, has_fallen = np.asarray(env.state, dtype=float), False
        for _ in range(60):
            action = int(rng.integers(2))
            _, reward, has_fallen, _, _ = env.step(action)
            state = step(state, action)
            np.testing.assert_allclose(state, env.state, rtol=0, atol=1e-6)
            assert reward == 1
            assert bool(cartpole.has_fallen(state)) == has_fallen
            if has_fallen:
                break
        num_falls += has_fallen
    assert num_falls > 10


def test_meta_gradient_equals_the_central_difference_for_fixed_keys(key):
    """Three updates and a policy gradient are differentiated on the same episodes."""
    task = reinforcement.make(key=key, **TINY)
    estimator = hg.Unrolled(task.solver, checkpoint=False)
    problem, w = task.problem, task.w
    alpha = {"discount": jnp.asarray(0.8), "entropy": jnp.asarray(0.1)}
    data = EstimateData.sample(problem, key)
    state = estimator.init(problem, w, alpha, key)
    estimate, _ = jax.jit(estimator.estimate)(problem, state, alpha, key)
    losses = cartpole.Losses(TINY["num_episodes"], TINY["horizon"])

    @jax.jit
    def outer_value(alpha):
        new_w, _ = task.solver.solve(
            problem.inner_loss, w, alpha, data.inner_data, data.solver_key
        )
        return -losses.expected_return(new_w, estimate.w, data.outer_batch())

    np.testing.assert_allclose(outer_value(alpha), estimate.value, rtol=1e-12)
    for name in alpha:
        plus, minus = (alpha | {name: alpha[name] + h} for h in (1e-5, -1e-5))
        expected = (outer_value(plus) - outer_value(minus)) / 2e-5
        assert abs(expected) > 1e-6
        np.testing.assert_allclose(estimate.hypergradient[name], expected, rtol=1e-5)


def test_expected_return_predicts_the_return_of_another_policy():
    """Reweighted episodes of one policy have the mean return of another policy."""
    w = reinforcement.make(key=jax.random.key(0), **TINY).w
    behavior = w | {"actor": jax.tree.map(jnp.zeros_like, w["actor"])}
    *hidden_layers, final_layer = w["actor"]
    w = w | {"actor": [*hidden_layers, final_layer | {"b": jnp.array([0.0, 0.5])}]}
    losses = cartpole.Losses(256, 20)
    keys = jax.random.split(jax.random.key(1), 64)
    over_keys = lambda fn: jax.jit(jax.vmap(fn, in_axes=(None, None, 0)))
    predicted = over_keys(losses.expected_return)(w, behavior, keys)
    mean_return = over_keys(losses.mean_return)
    expected = mean_return(w, None, keys) / 20
    behavior_return = mean_return(behavior, None, keys) / 20
    standard_error = jnp.sqrt((jnp.var(predicted) + jnp.var(expected)) / 64)
    difference = lambda x: abs(jnp.mean(x) - jnp.mean(expected))
    assert difference(predicted) < 4 * standard_error
    assert difference(behavior_return) > 8 * standard_error


def test_outer_derivative_is_the_policy_gradient():
    """It equals ``sum_t dlog pi(a_t) (remaining return - baseline)`` in loops.

    The baseline is the mean remaining return of the other living episodes.
    """
    num_episodes, horizon, key = 4, 40, jax.random.key(2)
    losses = cartpole.Losses(num_episodes, horizon)
    w = reinforcement.make(key=jax.random.key(0), **TINY).w
    episodes = jax.jit(cartpole.rollout, static_argnums=(2, 3))(
        w, key, num_episodes, horizon
    )
    alive = np.asarray(episodes["alive"][:-1])
    assert alive[-1].sum() < num_episodes
    remaining = np.cumsum(alive[::-1], axis=0)[::-1] - alive
    weights = np.zeros((horizon, num_episodes))
    for t, i in np.argwhere(alive):
        is_other = (np.arange(num_episodes) != i) & (alive[t] == 1)
        baseline = remaining[t, is_other].mean() if is_other.any() else 0.0
        weights[t, i] = (remaining[t, i] - baseline) / num_episodes / horizon
    log_prob_fn = lambda w: cartpole.action_log_probs(w, episodes)[0]
    score = jax.jit(jax.jacrev(log_prob_fn))(w)
    expected = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 2), score)
    actual = jax.jit(jax.grad(losses.expected_return))(w, w, key)
    chex.assert_trees_all_close(actual, expected, atol=1e-12)
    assert max(jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(expected)) > 1e-3


@pytest.mark.parametrize("variant", ["mrp", "cartpole"])
def test_tasks_of_several_keys_are_made_at_once(variant):
    make = lambda key: reinforcement.make(key=key, variant=variant)
    tasks = jax.vmap(make)(jax.random.split(jax.random.key(0), 2))
    for leaf in jax.tree.leaves(tasks.alpha):
        assert leaf.shape[0] == 2


def test_a_traced_step_size_is_an_error():
    make = lambda x: reinforcement.make(key=jax.random.key(0), step_size=x).w
    with pytest.raises(TypeError, match="step_size must be concrete"):
        jax.vmap(make)(jnp.array([0.1, 0.2]))


@pytest.mark.parametrize("variant", ["mrp", "cartpole"])
def test_paper_scale_has_scalar_losses(variant):
    """The task of the paper's scale is consistent; checked on shapes only."""

    def evaluate_losses(key):
        task = reinforcement.make(key=key, scale="paper", variant=variant)
        data = EstimateData.sample(task.problem, key)
        return (
            task.problem.inner_loss(task.w, task.alpha, data.inner_batch()),
            task.problem.outer_loss(task.w, task.alpha, data.outer_batch()),
        )

    values = jax.eval_shape(evaluate_losses, jax.random.key(0))
    assert [value.shape for value in values] == [(), ()]
