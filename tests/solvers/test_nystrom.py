"""One sketch for several estimates: the same hypergradients for fewer products."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg

D, RANK, STEPS = 30, 6, 7
SPECTRUM = np.concatenate([10.0 ** np.arange(4, 4 - RANK, -1), np.ones(D - RANK)])
TARGET = np.linspace(-1.0, 2.0, D)


def fixed(w, alpha, batch):
    """``H`` is the spectrum, whatever ``alpha`` is; ``w* = alpha``."""
    return 0.5 * jnp.vdot(batch, (w - alpha) ** 2)


def moving(w, alpha, batch):
    """``H = diag(spectrum exp(alpha))``, and ``w* = exp(-alpha) / spectrum``."""
    return 0.5 * jnp.vdot(batch * jnp.exp(alpha), w**2) - jnp.sum(w)


def outer(w, alpha, batch):
    del alpha, batch
    return 0.5 * jnp.sum((w - TARGET) ** 2)


SOLVERS = {
    fixed: hg.ClosedForm(lambda alpha, batch: alpha),
    moving: hg.ClosedForm(lambda alpha, batch: jnp.exp(-alpha) / batch),
}


def run(inner, refresh, outers=outer, **settings):
    """Estimates along one path of ``alpha``, whatever they are."""
    problem = hg.Bilevel(inner, outers, jnp.asarray(SPECTRUM))
    linear_solver = hg.NystromCG(RANK, rtol=1e-12, refresh_every=refresh)
    estimator = hg.Implicit(SOLVERS[inner], linear_solver, **settings)
    alpha = jnp.zeros(D)
    state = estimator.init(problem, jnp.zeros(D), alpha)
    step = jax.jit(estimator.estimate)
    found = []
    for i in range(STEPS):
        alpha = 0.1 * i * jnp.sin(jnp.arange(D))
        estimate, state = step(problem, state, alpha, jax.random.key(i))
        found.append((alpha, estimate))
    return found


@pytest.mark.parametrize("several", [False, True])
def test_where_h_stands_still_a_sketch_is_saved_to_the_product(several):
    """All else is the same: by so many products fewer, where none is made."""
    outers = (outer, lambda w, alpha, batch: jnp.sum(w**4)) if several else outer
    for i, ((_, once), (_, anew)) in enumerate(
        zip(run(fixed, 3, outers), run(fixed, 1, outers), strict=True)
    ):
        np.testing.assert_allclose(
            once.hypergradient, anew.hypergradient, rtol=1e-9, atol=1e-9
        )
        saved = float(anew.stats["num_hvps"] - once.stats["num_hvps"])
        assert saved == (0 if i % 3 == 0 else RANK)


def test_an_old_sketch_of_an_h_that_moves_brings_no_bias():
    """The closed form at each ``alpha``: ``dM/dalpha = -(w* - target) w*``."""
    for alpha, estimate in run(moving, STEPS):
        w = np.exp(-alpha) / SPECTRUM
        np.testing.assert_allclose(estimate.hypergradient, -(w - TARGET) * w, rtol=1e-9)
        assert estimate.stats["trusted"]


def test_an_old_sketch_costs_less_than_new_ones():
    """Products in all, though ``H`` moves from one estimate to the next."""
    cost = lambda refresh: sum(
        float(estimate.stats["num_hvps"]) for _, estimate in run(moving, refresh)
    )
    assert cost(3) < cost(1)


def test_a_sketch_that_is_not_finite_is_made_anew():
    """At the next estimate, not when it is due."""
    problem = hg.Bilevel(moving, outer, jnp.asarray(SPECTRUM))
    estimator = hg.Implicit(SOLVERS[moving], hg.NystromCG(RANK, refresh_every=100))
    state = estimator.init(problem, jnp.zeros(D), jnp.zeros(D))
    step = jax.jit(estimator.estimate)
    for alpha, is_finite in ((jnp.full(D, jnp.nan), False), (jnp.zeros(D), True)):
        estimate, state = step(problem, state, alpha, jax.random.key(0))
        assert bool(jnp.all(jnp.isfinite(estimate.hypergradient))) == is_finite
        assert bool(jnp.all(jnp.isfinite(state.prepared[0]))) == is_finite


def test_minimize_carries_the_sketch():
    """The same path as with a sketch a step, and fewer products."""
    problem = hg.Bilevel(moving, outer, jnp.asarray(SPECTRUM))
    traces = [
        hg.minimize(
            problem, hg.Implicit(SOLVERS[moving], hg.NystromCG(RANK, refresh_every=refresh)),
            optax.sgd(0.1), jnp.zeros(D), jnp.zeros(D), num_steps=6,
        )
        for refresh in (6, 1)
    ]  # fmt: skip
    np.testing.assert_allclose(traces[0].alpha, traces[1].alpha, rtol=1e-6)
    first, second = (trace.stats["num_hvps"].sum() for trace in traces)
    assert first < second


def test_what_cannot_be():
    with pytest.raises(ValueError, match="refresh"):
        hg.NystromCG(3, refresh_every=0)
    descent = hg.Descent(optax.sgd(0.1), 10)
    with pytest.raises(ValueError, match="does not go with rtol"):
        hg.Implicit(descent, hg.NystromCG(3, refresh_every=2), rtol=1e-2)
