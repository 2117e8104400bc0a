"""Discounts and entropy weight: closed forms, Gymnasium, and central differences."""

import dataclasses

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
LONG = dataclasses.replace(random_walk.TD, num_steps=2000)
TINY = {"num_episodes": 4, "horizon": 25, "num_steps": 3, "rate": 0.3}


@pytest.mark.parametrize("shape", [(), (19,)])
@pytest.mark.parametrize(
    "estimator",
    [
        hg.Implicit(hg.Newton(), lineax.LU()),
        hg.Unrolled(LONG),
        hg.FixedPoint(LONG, num_terms=1000),
    ],
)
def test_the_hypergradient_of_a_discount_is_the_closed_form(estimator, shape, key):
    """``V = (I - gamma P)^-1 r``: for one discount and for one a state, to 1e-8."""
    alpha = jax.random.uniform(key, shape, minval=0.5, maxval=0.95)
    estimate = hg.hypergradient(MRP.problem, estimator)(MRP.w, alpha)
    exact = MRP.exact(alpha)
    assert exact.shape == shape
    scale = jnp.max(jnp.abs(exact))
    np.testing.assert_allclose(estimate.hypergradient / scale, exact / scale, atol=1e-8)
    assert estimate.stats["trusted"]


def test_the_closed_form_is_the_central_difference_of_the_whole_pipeline(key):
    """Newton's solve and the outer loss, at both shifts of every discount."""
    alpha = jax.random.uniform(key, (19,), minval=0.5, maxval=0.95)
    estimator = hg.CentralDifference(hg.Newton(tolerance=1e-14))
    found = hg.hypergradient(MRP.problem, estimator)(MRP.w, alpha).hypergradient
    exact = MRP.exact(alpha)
    np.testing.assert_allclose(found, exact, atol=1e-6 * jnp.max(jnp.abs(exact)))


def test_what_episodes_show_are_frequencies_and_means():
    """Against loops over the same walks."""
    walks = jax.tree.map(
        np.asarray, random_walk.walks(jax.random.key(3), num_episodes=5, horizon=60)
    )
    counts, rewards, returns = np.zeros((19, 19)), np.zeros(19), np.zeros(19)
    visits = np.zeros(19)
    for i in range(5):
        for t in range(60):
            if not walks["alive"][i, t]:
                continue
            state, after = walks["state"][i, t], walks["next"][i, t]
            visits[state] += 1
            rewards[state] += walks["reward"][i, t]
            returns[state] += walks["reward"][i, t:].sum()
            if 0 <= after < 19:
                counts[state, after] += 1
    share = 1 / np.maximum(visits, 1)
    found = random_walk.counted(walks)
    np.testing.assert_allclose(found["P"], share[:, None] * counts, rtol=1e-12)
    np.testing.assert_allclose(found["r"], share * rewards, atol=1e-12)
    np.testing.assert_allclose(found["G"], share * returns, atol=1e-12)
    np.testing.assert_allclose(found["d"], visits / visits.sum(), rtol=1e-12)
    assert visits.sum() > 100


def test_cartpole_is_gymnasiums_step_by_step():
    """Every state and every end of 20 episodes, to 1e-6."""
    env = gymnasium.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    step = jax.jit(cartpole.dynamics)
    ends = 0
    for episode in range(20):
        state, _ = env.reset(seed=episode)
        state = np.asarray(env.state, dtype=float)
        for _ in range(60):
            action = int(rng.integers(2))
            _, reward, ended, _, _ = env.step(action)
            state = step(state, action)
            np.testing.assert_allclose(state, env.state, rtol=0, atol=1e-6)
            assert reward == 1
            assert bool(cartpole.fallen(state)) == ended
            ends += ended
            if ended:
                break
    assert ends > 10


def test_the_meta_gradient_is_the_central_difference_on_fixed_keys(key):
    """Three updates and a policy gradient, the validating policy's actions held."""
    task = reinforcement.make(key=key, **TINY)
    estimator = hg.Unrolled(task.solver, checkpoint=False)
    problem, w, alpha = task.problem, task.w, task.alpha
    alpha = {"discount": jnp.asarray(0.8), "entropy": jnp.asarray(0.1)}
    data = EstimateData.sample(problem, key)
    state = estimator.init(problem, w, alpha, key)
    estimate, _ = jax.jit(estimator.estimate)(problem, state, alpha, key)
    losses = cartpole.Losses(TINY["num_episodes"], TINY["horizon"])

    @jax.jit
    def value(alpha):
        found, _ = task.solver.solve(
            problem.inner_loss, w, alpha, data.inner_data, data.solver_key
        )
        return -losses.expected_return(found, estimate.w, data.outer_batch())

    np.testing.assert_allclose(value(alpha), estimate.value, rtol=1e-12)
    for name in alpha:
        shift = lambda by, name=name: value(alpha | {name: alpha[name] + by})
        found = (shift(1e-5) - shift(-1e-5)) / 2e-5
        assert abs(found) > 1e-6
        np.testing.assert_allclose(estimate.hypergradient[name], found, rtol=1e-5)


def test_the_expected_return_is_that_of_a_policy_that_was_not_followed():
    """Reweighted episodes of one policy predict the mean return of another."""
    w = reinforcement.make(key=jax.random.key(0), **TINY).w
    w = jax.tree.map(lambda leaf: leaf, w)
    behaviour = w | {"actor": jax.tree.map(jnp.zeros_like, w["actor"])}
    w["actor"][-1]["b"] = jnp.array([0.0, 0.5])
    losses = cartpole.Losses(256, 20)
    keys = jax.random.split(jax.random.key(1), 64)
    over_keys = lambda f: jax.jit(jax.vmap(f, in_axes=(None, None, 0)))
    found = over_keys(losses.expected_return)(w, behaviour, keys)
    returns = over_keys(losses.mean_return)
    truth, other = returns(w, None, keys) / 20, returns(behaviour, None, keys) / 20
    error = jnp.sqrt((jnp.var(found) + jnp.var(truth)) / 64)
    assert abs(jnp.mean(found) - jnp.mean(truth)) < 4 * error
    assert abs(jnp.mean(other) - jnp.mean(truth)) > 8 * error


def test_the_outer_derivative_is_the_policy_gradient():
    """``sum_t dlog pi(a_t) (return after t, less the others' mean)``, by loops."""
    n, horizon, key = 4, 40, jax.random.key(2)
    losses = cartpole.Losses(n, horizon)
    w = reinforcement.make(key=jax.random.key(0), **TINY).w
    episodes = cartpole.rollout(w, key, n, horizon)
    alive = np.asarray(episodes["alive"][:-1])
    assert alive[-1].sum() < n
    after = np.cumsum(alive[::-1], axis=0)[::-1] - alive
    slopes = jax.jacrev(lambda w: cartpole.log_taken(w, episodes)[0])(w)
    expected = jax.tree.map(jnp.zeros_like, w)
    for t in range(horizon):
        for i in range(n):
            others = [j for j in range(n) if j != i and alive[t, j]]
            level = np.mean([after[t, j] for j in others]) if others else 0.0
            part = alive[t, i] * (after[t, i] - level) / n / horizon
            expected = jax.tree.map(
                lambda sum, slope, t=t, i=i, part=part: sum + part * slope[t, i],
                *(expected, slopes),
            )
    found = jax.grad(losses.expected_return)(w, w, key)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), found, expected
    )
    assert any(np.any(np.abs(leaf) > 1e-3) for leaf in jax.tree.leaves(expected))


def test_an_unknown_variant_or_scale_is_refused():
    """Names what there is."""
    with pytest.raises(ValueError, match="variant must be one of"):
        reinforcement.make(key=jax.random.key(0), variant="go")
    with pytest.raises(ValueError, match="scale must be"):
        reinforcement.make(key=jax.random.key(0), scale="huge")


@pytest.mark.parametrize("variant", ["mrp", "cartpole"])
def test_the_papers_scale_builds(variant):
    """On shapes alone, with both losses."""
    key = jax.random.key(0)

    def losses(key):
        task = reinforcement.make(key=key, scale="paper", variant=variant)
        inner, outer = task.problem.sample_data(key)
        batch = lambda data: data.sample(key) if variant == "cartpole" else data
        return (
            task.problem.inner_loss(task.w, task.alpha, batch(inner)),
            task.problem.outer_loss(task.w, task.alpha, batch(outer)),
        )

    assert [value.shape for value in jax.eval_shape(losses, key)] == [(), ()]
