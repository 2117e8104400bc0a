"""Single-loop estimators against dense matrices, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import Known, any_known, error, quadratic, ridge, two_losses
from tests.loops import run_loop

RHO, GAMMA = 0.05, 0.02


def by_matrices(known: Known, num_steps: int):
    """SOBA on a quadratic: all values, and where alpha, w and v end."""
    data = {k: np.asarray(x) for k, x in known.problem.inner_data.items()}
    H, C, t, k = (data[name] for name in ("H", "C", "t", "k"))
    w, v, alpha = np.zeros(len(t)), np.zeros(len(t)), np.asarray(known.alpha)
    values = []
    for _ in range(num_steps):
        values.append(0.5 * np.sum((w - t) ** 2) + 0.5 * np.sum(k * alpha**2))
        direction_w = H @ w - C @ alpha
        direction_v = H @ v - (w - t)
        direction_alpha = k * alpha + C.T @ v  # J = -C
        w = w - RHO * direction_w
        v = v - RHO * direction_v
        alpha = alpha - GAMMA * direction_alpha
    return np.array(values), alpha, w, v


def test_soba_is_its_three_lines():
    """50 steps of the full-batch method, by dense matrices, to 1e-10."""
    known = quadratic("30", seed=3)
    trace = hg.minimize(
        known.problem, hg.SOBA(optax.sgd(RHO)), optax.sgd(GAMMA), known.w, known.alpha,
        num_steps=50,
    )  # fmt: skip
    values, alpha, _, _ = by_matrices(known, 50)
    np.testing.assert_allclose(trace.value, values, rtol=1e-10)
    np.testing.assert_allclose(trace.alpha, alpha, rtol=1e-10)
    np.testing.assert_allclose(trace.w, by_matrices(known, 49)[2], rtol=1e-10)


def test_soba_is_unbiased_over_batches():
    """n = 8, batch 1: the mean over all pairs of examples is the full direction."""
    known = ridge("per-weight", n=8, d=3)
    full = known.problem
    one = hg.Bilevel(
        full.inner_loss,
        full.outer_loss,
        hg.Batches(full.inner_data, batch_size=1),
        hg.Batches(full.outer_data, batch_size=1),
    )
    soba = hg.SOBA(optax.sgd(RHO))
    rng = np.random.default_rng(0)
    w, v = jnp.asarray(rng.normal(size=(2, 3)))
    state = soba.init(full, w, known.alpha)
    state = type(state)(w, v, state.w_optimizer, state.v_optimizer, None)
    pick = lambda data, i: jax.tree.map(lambda x: x[i : i + 1], data)
    drawn = []
    for i in range(8):
        for j in range(8):
            problem = hg.Bilevel(
                full.inner_loss,
                full.outer_loss,
                pick(full.inner_data, i),
                pick(full.outer_data, j),
            )
            drawn.append(soba.estimate(problem, state, known.alpha, jax.random.key(0)))
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *drawn)
    whole = soba.estimate(full, state, known.alpha, jax.random.key(0))
    assert error(mean[0].hypergradient, whole[0].hypergradient) < 1e-12
    assert error(mean[1].w, whole[1].w) < 1e-12
    assert error(mean[1].v, whole[1].v) < 1e-12
    # and that is what a key draws from
    found, _ = soba.estimate(one, state, known.alpha, jax.random.key(7))
    each = np.array([pair[0].hypergradient for pair in drawn])
    nearest = np.abs(each - np.asarray(found.hypergradient)[None]).max(axis=1).min()
    assert nearest < 1e-12
    counts = found.stats["num_hvps"], found.stats["num_outer_grads"]
    assert counts == (1 / 8, 1 / 8)


def test_soba_settles_on_the_optimum_with_mini_batches():
    """Decreasing rates on ridge: 1% of the start's suboptimality after 5,000 steps."""
    known = ridge("per-weight", n=100, d=3)
    full = known.problem
    problem = hg.Bilevel(
        full.inner_loss,
        full.outer_loss,
        hg.Batches(full.inner_data, batch_size=10),
        hg.Batches(full.outer_data, batch_size=10),
    )
    decay = lambda rate, power: lambda t: rate / (1 + t / 50) ** power
    trace = hg.minimize(
        problem,
        hg.SOBA(optax.sgd(decay(0.2, 0.4))),
        optax.sgd(decay(2.0, 0.6)),
        known.w,
        known.alpha,
        num_steps=5000,
    )
    exact = hg.minimize(
        full, hg.Implicit(hg.Newton()), optax.adam(0.1), known.w, known.alpha,
        num_steps=300,
    )  # fmt: skip
    value = lambda alpha: float(
        full.outer_loss(known.best(alpha), alpha, full.outer_data)
    )
    best = value(exact.alpha)
    assert value(trace.alpha) - best < 0.01 * (value(known.alpha) - best)


def test_a_certificate_judges_a_single_loop():
    """Untrusted by itself, trusted by the certificate once it has settled."""
    known = any_known("ridge per-weight")
    trace = run_loop(
        known.problem, hg.SOBA(optax.sgd(known.step)), optax.sgd(0.01), known.w,
        known.alpha, num_steps=201, certify_every=200,
    )  # fmt: skip
    assert trace.stats["trusted"].tolist() == [False] * 200 + [True]


def test_conformance():
    """What every estimator must do, after 300 steps at one alpha."""
    hg.testing.check_estimator(hg.SOBA(optax.sgd(0.5)))
    hg.testing.check_estimator(hg.SOBA(optax.sgd(0.3, momentum=0.3), optax.sgd(0.5)))


def test_what_soba_refuses():
    """One shot, several losses, no optimizer."""
    known = any_known("quadratic 30")
    soba = hg.SOBA(optax.sgd(0.1))
    with pytest.raises(TypeError, match="run it by"):
        hg.hypergradient(known.problem, soba)
    problem = two_losses(known, lambda w, alpha, batch: jnp.sum(w))
    with pytest.raises(ValueError, match="one outer loss"):
        soba.init(problem, known.w, known.alpha)
    with pytest.raises(TypeError, match=r"optimizer must be an optax"):
        hg.SOBA(0.1)


def test_an_adjoint_that_is_not_needed_is_exact():
    """Where dM/dw = 0 the residual is 0, not 0 / 0."""
    inner = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    outer = lambda w, alpha, batch: jnp.sum(alpha**2) + 0.0 * jnp.sum(w)
    trace = hg.minimize(
        hg.Bilevel(inner, outer), hg.SOBA(optax.sgd(RHO)), optax.sgd(GAMMA),
        jnp.zeros(2), jnp.ones(2), num_steps=2,
    )  # fmt: skip
    np.testing.assert_array_equal(trace.stats["adjoint_residual"], 0)
