"""The single-loop family against dense matrices and exact expectations."""

import itertools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import soba_step
from benchmarks.known import error, quadratic, ridge
from hypergrad.estimators import single_loop
from hypergrad.problem import EstimateData
from hypergrad.trees import random_like
from tests.loops import run_loop

RHO, GAMMA, ETA = 0.05, 0.02, 0.1
KNOWN = quadratic("30", seed=3)


class Dense:
    """The quadratic as matrices: ``dL/dw = H w - C alpha``, ``dM/dw = w - t``."""

    def __init__(self):
        data = {k: np.asarray(x) for k, x in KNOWN.problem.inner_data.items()}
        self.H, self.C, self.t, self.k = (data[name] for name in ("H", "C", "t", "k"))
        self.w, self.alpha = np.zeros(len(self.t)), np.asarray(KNOWN.alpha)
        self.v = np.zeros(len(self.t))
        self.draws: Any = None

    def g(self, w, alpha):
        return self.H @ w - self.C @ alpha

    def g_alpha(self, w):
        """``dL/dalpha``, without what does not depend on ``w``."""
        return -self.C.T @ w

    def b(self, w):
        return w - self.t

    def direction(self, v, alpha):
        return self.k * alpha + self.C.T @ v

    def contracted(self, w, times):
        """``(I - eta H)^times b``."""
        p = self.b(w)
        for _ in range(times):
            p = p - ETA * self.H @ p
        return p

    def series(self, w, num_terms):
        return ETA * sum(self.contracted(w, k) for k in range(num_terms))

    def looking(self, w, alpha, num_terms):
        return self.g(w, alpha), self.direction(self.series(w, num_terms), alpha)

    def length(self):
        """This step's draw of 0, 1 or 2, by the keys that the estimator splits."""
        _, series_key = jax.random.split(self.draws.inner_key)
        _, length_key = jax.random.split(series_key)
        return int(jax.random.randint(length_key, (), 0, 3))

    def looking_at_random(self, w, alpha):
        v = 3 * ETA * self.contracted(w, self.length())
        return self.g(w, alpha), self.direction(v, alpha)


# Each yields, step by step, the direction for alpha, while ``d.w`` is the ``w`` that is
# reported; before the next step ``d.alpha`` has moved and ``d.draws`` has new keys.


def soba(d):
    while True:
        dw, dv = d.g(d.w, d.alpha), d.H @ d.v - d.b(d.w)
        yield d.direction(d.v, d.alpha)
        d.w, d.v = d.w - RHO * dw, d.v - RHO * dv


saba = srba = soba  # on full batches


def stocbio(d):
    while True:
        for _ in range(3):
            d.w = d.w - RHO * d.g(d.w, d.alpha)
        yield d.direction(d.series(d.w, 4), d.alpha)


def amigo(d):
    while True:
        for _ in range(3):
            d.w = d.w - RHO * d.g(d.w, d.alpha)
        for _ in range(2):
            d.v = d.v - RHO * (d.H @ d.v - d.b(d.w))
        yield d.direction(d.v, d.alpha)


def ttsa(d):
    """A series of three terms, of random length."""
    while True:
        d.w = d.w - RHO * d.g(d.w, d.alpha)
        yield d.looking_at_random(d.w, d.alpha)[1]


def mrbo(d, look=lambda d, w, alpha: d.looking(w, alpha, 4)):
    last = directions = None
    while True:
        new = look(d, d.w, d.alpha)
        if last is None:
            directions = new
        else:
            old = look(d, *last)
            directions = [
                x + 0.9 * (m - y) for x, y, m in zip(new, old, directions, strict=True)
            ]
        last = d.w, d.alpha
        yield directions[1]
        d.w = d.w - RHO * directions[0]


def sustain(d):
    """Of one random length at both places."""
    return mrbo(d, Dense.looking_at_random)


def vrbo(d):
    """Three inner steps, period 2."""
    last = directions = None
    for k in itertools.count():
        if k:
            for _ in range(3):
                new, old = d.looking(d.w, d.alpha, 4), d.looking(*last, 4)
                directions = [
                    x + m - y for x, y, m in zip(new, old, directions, strict=True)
                ]
                last = d.w, d.alpha
                d.w = d.w - RHO * directions[0]
        if k % 2 == 0:
            directions, last = list(d.looking(d.w, d.alpha, 4)), (d.w, d.alpha)
        yield directions[1]


def fsla(d):
    found = a = None
    while True:
        before = d.v
        d.w = d.w - RHO * d.g(d.w, d.alpha)
        d.v = d.v - RHO * (d.H @ d.v - d.b(d.w))
        new = d.direction(d.v, d.alpha)
        found = new if found is None else new + 0.9 * (found - d.direction(before, a))
        a = d.alpha
        yield found


def f2sa(d):
    y = z = d.w
    penalties = (10.0 * (1 + k) for k in itertools.count())
    for penalty in penalties:
        for _ in range(3):
            y = y - RHO * (d.g(y, d.alpha) + d.b(y) / penalty)
            z = z - RHO * d.g(z, d.alpha)
        d.w = y
        yield d.k * d.alpha + penalty * (d.g_alpha(y) - d.g_alpha(z))


def bome(d):
    while True:
        lower = d.w
        for _ in range(3):
            lower = lower - ETA * d.g(lower, d.alpha)
        q = np.concatenate([d.g(d.w, d.alpha), d.g_alpha(d.w) - d.g_alpha(lower)])
        M = np.concatenate([d.b(d.w), d.k * d.alpha])
        mu = max((0.5 * q @ q - M @ q) / (q @ q), 0.0) if q @ q else 0.0
        both = M + mu * q
        yield both[len(d.w) :]
        d.w = d.w - RHO * both[: len(d.w)]


def darts(d):
    for k in itertools.count():
        if k:
            d.w = d.w - RHO * d.g(d.w, d.alpha)
        ahead = d.w - ETA * d.g(d.w, d.alpha)
        yield d.k * d.alpha - ETA * (-d.C.T @ d.b(ahead))


def darts_first(d):
    for k in itertools.count():
        if k:
            d.w = d.w - RHO * d.g(d.w, d.alpha)
        yield d.k * d.alpha


def pzobo(d):
    def steps(alpha):
        w = start
        for _ in range(3):
            w = w - RHO * d.g(w, alpha)
        return w

    while True:
        start = d.w
        d.w = steps(d.alpha)
        indirect = []
        for key in jax.random.split(d.draws.inner_key, 2):
            u = np.asarray(random_like(key, KNOWN.alpha))
            response = (steps(d.alpha + 0.01 * u) - d.w) / 0.01
            indirect.append(response @ d.b(d.w) * u)
        yield d.k * d.alpha + np.mean(indirect, axis=0)


SGD = optax.sgd(RHO)
METHODS = {
    "SOBA": (hg.SOBA(SGD), soba),
    "SABA": (hg.SABA(SGD), saba),
    "SRBA": (hg.SRBA(SGD, period=3), srba),
    "StocBiO": (hg.StocBiO(SGD, 3, 4, step_size=ETA), stocbio),
    "AmIGO": (hg.AmIGO(SGD, 3, 2), amigo),
    "TTSA": (hg.TTSA(SGD, 3, step_size=ETA), ttsa),
    "MRBO": (hg.MRBO(SGD, 4, step_size=ETA), mrbo),
    "SUSTAIN": (hg.SUSTAIN(SGD, 3, step_size=ETA), sustain),
    "VRBO": (hg.VRBO(SGD, 3, 4, period=2, step_size=ETA), vrbo),
    "FSLA": (hg.FSLA(SGD), fsla),
    "F2SA": (hg.F2SA(SGD, 3, penalty=lambda k: 10.0 * (1 + k)), f2sa),
    "BOME": (hg.BOME(SGD, 3, step_size=ETA), bome),
    "DARTS": (hg.DARTS(SGD, step_size=ETA), darts),
    "DARTS, first order": (hg.DARTS(SGD), darts_first),
    "PZOBO": (hg.PZOBO(SGD, 3, 2), pzobo),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_step_is_that_of_the_dense_matrices(name: str):
    """``alpha`` and ``w`` of each of 30 full-batch steps, to 1e-10."""
    estimator, method = METHODS[name]
    num_w, num_alpha = KNOWN.w.size, KNOWN.alpha.size
    metrics = {f"w{i}": lambda w, alpha, key, i=i: w[i] for i in range(num_w)}
    metrics |= {f"a{i}": lambda w, alpha, key, i=i: alpha[i] for i in range(num_alpha)}
    trace = hg.minimize(
        KNOWN.problem, estimator, optax.sgd(GAMMA), KNOWN.w, KNOWN.alpha, num_steps=30,
        metrics=metrics,
    )  # fmt: skip
    dense = Dense()
    steps, ws, alphas = method(dense), [], []
    _, key = jax.random.split(jax.random.key(0))  # minimize's own
    for _ in range(30):
        key, estimate_key, _ = jax.random.split(key, 3)
        dense.draws = EstimateData.sample(KNOWN.problem, estimate_key)
        direction = next(steps)
        ws.append(dense.w)
        alphas.append(dense.alpha)
        dense.alpha = dense.alpha - GAMMA * direction
    for letter, expected in (("w", ws), ("a", alphas)):
        for i, column in enumerate(np.transpose(expected)):
            found = trace.metrics[f"{letter}{i}"]
            np.testing.assert_allclose(found, column, rtol=1e-10)
    np.testing.assert_allclose(trace.w, ws[-1], rtol=1e-10)
    np.testing.assert_allclose(trace.alpha, dense.alpha, rtol=1e-10)
    assert not trace.stats["trusted"].any()


# Precision: 64-bit numbers are enabled, and leaves are of less.

SLOWER = lambda step: 1 - 1 / (step + 2.0)
TYPED = METHODS | {
    "MRBO, a schedule": (hg.MRBO(SGD, 4, step_size=ETA, momentum=SLOWER), None),
    "FSLA, a schedule": (hg.FSLA(SGD, momentum=SLOWER), None),
}


def inner_typed(w, alpha, x):
    shift = jnp.mean((w["p"][None] - alpha["p"][None] * x) ** 2)
    return 0.5 * shift + 0.5 * w["p"] @ w["p"] + 0.5 * (w["q"] - alpha["q"]) ** 2


def outer_typed(w, alpha, x):
    far = jnp.mean((w["p"][None] - x) ** 2) + (w["q"] - 1) ** 2
    return 0.5 * far + 0.1 * alpha["q"] ** 2


def typed_run(estimator, of_p, of_q):
    """Three steps on batches; leaves ``p`` and ``q`` of these dtypes."""
    leaves = lambda p, q: {"p": jnp.asarray(p, of_p), "q": jnp.asarray(q, of_q)}
    x = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
    batches = [hg.Batches(jnp.asarray(each, of_p), 2) for each in x]
    w, alpha = leaves([0.0, 1.0], 0.25), leaves([0.5, -0.5], 0.75)
    problem = hg.Bilevel(inner_typed, outer_typed, *batches)
    trace = hg.minimize(problem, estimator, optax.sgd(GAMMA), w, alpha, num_steps=3)
    for found, given in ((trace.w, w), (trace.alpha, alpha)):
        assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
            lambda x: x.dtype, given
        )
    return trace


@pytest.mark.parametrize("name", TYPED)
def test_each_leaf_keeps_its_dtype(name: str, monkeypatch):
    """Under x64, of 32 or fewer bits, or mixed; with 32 the numbers are those of 64."""
    in_single = lambda key, like: jax.tree.map(
        lambda u, x: u.astype(x.dtype),
        random_like(key, jax.tree.map(lambda x: x.astype(jnp.float32), like)),
        like,
    )  # PZOBO's directions: 64 bits would draw others
    monkeypatch.setattr(single_loop.pzobo, "normal", in_single)
    estimator, _ = TYPED[name]
    exact = typed_run(estimator, jnp.float64, jnp.float64)
    for of_p in (jnp.float32, jnp.float64):
        found = typed_run(estimator, of_p, jnp.float32)
        assert error((found.w, found.alpha), (exact.w, exact.alpha)) < 1e-6
        np.testing.assert_allclose(found.value, exact.value, rtol=1e-6)
    short = typed_run(estimator, jnp.bfloat16, jnp.float16)
    assert np.isfinite(short.value).all()


# Batches: n = 8, one example a batch; each outcome once is the exact expectation.

N = 8


def shifted(w, alpha, batch):
    """Squares whose targets alpha moves by example, and a penalty."""
    residual = batch["x"] @ w - batch["y"] - batch["z"] @ alpha
    return 0.5 * jnp.mean(residual**2) + 0.1 * jnp.sum(w**2)


def validated(w, alpha, batch):
    residual = batch["x"] @ w - batch["y"]
    return 0.5 * jnp.mean(residual**2) + 0.5 * jnp.mean((batch["z"] @ alpha) ** 2)


def examples(seed, n=N):
    x, z = np.random.default_rng(seed).normal(size=(2, n, 3))
    return {"x": x, "z": z, "y": x @ np.ones(3) + z[:, 0]}


FULL = hg.Bilevel(shifted, validated, examples(1), examples(2))
BATCHED = hg.Bilevel(
    FULL.inner_loss,
    FULL.outer_loss,
    hg.Batches(FULL.inner_data, batch_size=1),
    hg.Batches(FULL.outer_data, batch_size=1),
)
ALPHA, ELSEWHERE = jnp.array([0.1, -0.4, 0.3]), jnp.array([0.3, -0.1, 0.2])
W, V, W_ELSEWHERE, V_ELSEWHERE = jnp.asarray(
    np.random.default_rng(0).normal(size=(4, 3))
)
STAY, TERM = optax.sgd(0.0), 0.2


def full_parts(w=W, alpha=ALPHA):
    """``dL/dw``, H, J, ``dM/dw`` and ``dM/dalpha`` of all data, densely."""
    inner = lambda w, a: FULL.inner_loss(w, a, FULL.inner_data)
    outer = lambda w, a: FULL.outer_loss(w, a, FULL.outer_data)
    H, J = (jax.jacfwd(jax.grad(inner), argnums=k)(w, alpha) for k in (0, 1))
    return jax.grad(inner)(w, alpha), H, J, *jax.grad(outer, argnums=(0, 1))(w, alpha)


def along(v, w=W, alpha=ALPHA):
    """``dM/dalpha - J' v``."""
    _, _, J, _, direct = full_parts(w, alpha)
    return direct - J.T @ v


def by_terms(num_terms, w=W, alpha=ALPHA):
    """The same with ``v`` of the series."""
    _, H, _, b, _ = full_parts(w, alpha)
    power = lambda k: jnp.linalg.matrix_power(jnp.eye(3) - TERM * H, k)
    return along(TERM * sum(power(k) @ b for k in range(num_terms)), w, alpha)


def at(estimator, w=W, v=None, alpha=ALPHA):
    """The estimator's state, at ``w`` and, where it has one, ``v``."""
    state = estimator.init(BATCHED, w, alpha)
    if v is not None:
        state = eqx.tree_at(lambda s: s.v, state, v)
    return state


def outcomes(
    estimator, state, num_keys, look=lambda estimate, after: (), problem=BATCHED
):
    """Every distinct outcome of a step: direction, products, what ``look`` looks at."""

    @jax.jit
    @jax.vmap
    def step(key):
        estimate, after = estimator.estimate(problem, state, ALPHA, key)
        seen = look(estimate, after)
        return estimate.hypergradient, estimate.stats["num_hvps"][None], *seen

    columns = step(jax.random.split(jax.random.key(0), num_keys))
    table = np.concatenate([np.asarray(x) for x in columns], axis=1)
    return table[np.unique(np.round(table, 9), axis=0, return_index=True)[1]]


def test_saga_is_unbiased_whatever_its_table_holds():
    """The mean over all pairs of examples is the full direction, to 1e-12.

    And the table's means are those of its rows, also where an example came twice.
    """
    saba = hg.SABA(optax.sgd(RHO))
    problem = hg.Bilevel(
        FULL.inner_loss,
        FULL.outer_loss,
        hg.Batches(FULL.inner_data, batch_size=3),
        hg.Batches(FULL.outer_data, batch_size=3),
    )
    state = saba.init(problem, W, ALPHA)
    for key in jax.random.split(jax.random.key(1), 3):
        _, state = saba.estimate(problem, state, ALPHA, key)
    for table in state.memory:
        means = jax.tree.map(lambda rows: jnp.mean(rows, axis=0), table.written())
        assert error(table.mean, means) < 1e-12
        assert optax.tree.norm(means) > 0.1
    g, H, _, b, _ = full_parts(state.w)
    found = outcomes(saba, state, 3000, lambda estimate, after: (after.w, after.v))
    assert len(found) == N * N
    mean = found.mean(axis=0)
    assert error(mean[:3], along(state.v, state.w)) < 1e-12
    assert error(mean[4:7], state.w - RHO * g) < 1e-12
    assert error(mean[7:], state.v - RHO * (H @ state.v - b)) < 1e-12


def test_with_empty_tables_a_step_is_that_of_soba():
    """Of the same key, whose batch both draw; the next one is not."""
    saba, soba = (
        [hg.minimize(BATCHED, method, SGD, W, ALPHA, num_steps=n) for n in (1, 2)]
        for method in (hg.SABA(SGD), hg.SOBA(SGD))
    )
    assert error(saba[0].alpha, soba[0].alpha) < 1e-12
    assert error(saba[1].w, soba[1].w) < 1e-12  # before the second step
    assert error(saba[1].alpha, soba[1].alpha) > 1e-6


def test_momentum_has_the_conditional_mean_of_its_paper():
    """``D(t) + momentum (d_{t-1} - D(t-1))``, both directions; K = 1."""
    mrbo = hg.MRBO(optax.sgd(RHO), 1, step_size=TERM)
    directions = V, V_ELSEWHERE
    state = eqx.tree_at(
        lambda s: (s.last, s.directions, s.step),
        at(mrbo),
        ((W_ELSEWHERE, ELSEWHERE), directions, jnp.asarray(7)),
    )
    found = outcomes(mrbo, state, 3000, lambda estimate, after: (after.w,))
    assert len(found) == N * N
    old = by_terms(1, W_ELSEWHERE, ELSEWHERE)
    mean = found.mean(axis=0)
    assert error(mean[:3], by_terms(1) + 0.9 * (directions[1] - old)) < 1e-12
    g, g_old = full_parts()[0], full_parts(W_ELSEWHERE, ELSEWHERE)[0]
    assert error(mean[4:], W - RHO * (g + 0.9 * (directions[0] - g_old))) < 1e-12


def test_recursion_has_the_conditional_mean_of_its_paper():
    """SRBA between full passes: ``d_{t-1} + D(t) - D(t-1)``."""
    srba = hg.SRBA(optax.sgd(RHO), period=5)
    state = at(srba, v=V)
    elsewhere = type(state.memory.at)(W_ELSEWHERE, V_ELSEWHERE, ELSEWHERE)
    parts = jax.tree.map(lambda x: x + 0.5, state.memory.parts)
    memory = type(state.memory)(parts, elsewhere, jnp.asarray(3))
    state = eqx.tree_at(lambda s: s.memory, state, memory)
    found = outcomes(srba, state, 3000)
    assert len(found) == N * N
    # Of the parts, all 1/2, dM/dalpha less Jᵀ v is 0.
    expected = along(V) - along(V_ELSEWHERE, W_ELSEWHERE, ELSEWHERE)
    assert error(found.mean(axis=0)[:3], expected) < 1e-12


def test_fsla_has_the_conditional_mean_of_its_paper():
    """At a place that stays: ``D(t) + momentum (d_{t-1} - D(t-1))``."""
    fsla = hg.FSLA(STAY)
    state = at(fsla, v=V)
    elsewhere = type(state.memory.at)(W_ELSEWHERE, V_ELSEWHERE, ELSEWHERE)
    memory = type(state.memory)(ELSEWHERE, elsewhere, jnp.asarray(3))
    state = eqx.tree_at(lambda s: s.memory, state, memory)
    found = outcomes(fsla, state, 3000)
    assert len(found) == N * N
    old = along(V_ELSEWHERE, W_ELSEWHERE, ELSEWHERE)
    expected = along(V) + 0.9 * (ELSEWHERE - old)
    assert error(found.mean(axis=0)[:3], expected) < 1e-12


def test_f2sa_has_the_mean_of_its_two_gradients():
    """``dM/dalpha(y) + penalty (dL/dalpha(y) - dL/dalpha(z))`` of all data.

    Its bias against the hypergradient is that of the penalty, below.
    """
    f2sa = hg.F2SA(STAY, 1, penalty=5.0)
    state = eqx.tree_at(lambda s: s.z, at(f2sa), W_ELSEWHERE)
    found = outcomes(f2sa, state, 8000)
    of_alpha = jax.grad(FULL.inner_loss, argnums=1)
    assert len(found) == N**3
    difference = [of_alpha(w, ALPHA, FULL.inner_data) for w in (W, W_ELSEWHERE)]
    expected = full_parts()[4] + 5.0 * (difference[0] - difference[1])
    assert error(found.mean(axis=0)[:3], expected) < 1e-12


@pytest.mark.parametrize(
    "estimator",
    [
        hg.StocBiO(STAY, 1, 2, step_size=TERM),
        hg.MRBO(STAY, 2, step_size=TERM),
        hg.TTSA(STAY, 2, step_size=TERM),
        hg.SUSTAIN(STAY, 2, step_size=TERM),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_series_has_the_mean_of_its_terms(estimator):
    """Products of two terms by independent batches; of random length as well.

    Outcomes differ by the outer example, that of J, and that of the product if any.
    """
    found = outcomes(estimator, at(estimator), 20_000)
    products = found[:, 3]
    each = [found[products == n].mean(axis=0) for n in np.unique(products)]
    sizes = [np.sum(products == n) for n in np.unique(products)]
    random = isinstance(estimator, hg.TTSA | hg.SUSTAIN)
    assert sizes == ([N**2, N**3] if random else [N**3])
    assert error(np.mean(each, axis=0)[:3], by_terms(2)) < 1e-12


def test_pzobo_has_the_mean_of_the_derivative_of_its_steps():
    """Four standard errors over 4,000 directions; its bias is that of two steps."""
    pzobo = hg.PZOBO(optax.sgd(0.3), 2, 4000, sigma=1e-4)
    found, _ = pzobo.estimate(
        FULL, pzobo.init(FULL, W, ALPHA), ALPHA, jax.random.key(0)
    )
    steps = hg.Unrolled(hg.Descent(optax.sgd(0.3), 2))
    exact = hg.hypergradient(FULL, steps)(W, ALPHA).hypergradient
    indirect = exact - full_parts()[4]
    spread = 2 * jnp.linalg.norm(indirect) / 4000**0.5
    assert jnp.linalg.norm(found.hypergradient - exact) < 4 * spread


# The same of losses that are curved, and of steps that move: what is averaged is no
# longer linear in the batches, and each method has an expectation of its own. Below,
# each method's step on given batches, by dense matrices; all batches once are the
# expectation, and how far it is from the step on all data is the bias.

RATE = 0.5
MOVE = optax.sgd(RATE)


def bent(w, alpha, batch):
    residual = batch["x"] @ w - batch["y"] - batch["z"] @ alpha
    return jnp.mean(jnp.logaddexp(residual, -residual)) + 0.1 * jnp.sum(w**2)


def bent_outer(w, alpha, batch):
    residual = batch["x"] @ w - batch["y"] + 0.5 * batch["z"] @ alpha
    return jnp.mean(jnp.logaddexp(residual, -residual))


def g(w, batch, alpha=ALPHA, argnum=0):
    return jax.grad(bent, argnum)(w, alpha, batch)


def H(w, batch, alpha=ALPHA):
    return jax.hessian(bent)(w, alpha, batch)


def indirect(w, batch, v, alpha=ALPHA):
    """``-J' v``."""
    return -jax.jacfwd(jax.grad(bent), 1)(w, alpha, batch).T @ v


def outer_parts(w, batch, alpha=ALPHA):
    return jax.grad(bent_outer, (0, 1))(w, alpha, batch)


def two_terms(w, b, batch, alpha=ALPHA):
    return TERM * (2 * b - TERM * H(w, batch, alpha) @ b)


def one_of_two(w, b, batch, p, alpha=ALPHA):
    return 2 * TERM * jnp.where(p == 1, b - TERM * H(w, batch, alpha) @ b, b)


def stocbio_once(step, outer, product, cross):
    w = W - RATE * g(W, step)
    b, direct = outer_parts(w, outer)
    return direct + indirect(w, cross, two_terms(w, b, product)), w


def amigo_once(step, outer, product, cross):
    w = W - RATE * g(W, step)
    b, direct = outer_parts(w, outer)
    return direct + indirect(w, cross, V - RATE * (H(w, product) @ V - b)), w


def ttsa_once(step, outer, product, cross, p):
    w = W - RATE * g(W, step)
    b, direct = outer_parts(w, outer)
    return direct + indirect(w, cross, one_of_two(w, b, product, p)), w


HERE, THERE, BEFORE = (W, ALPHA), (W_ELSEWHERE, ELSEWHERE), (V, V_ELSEWHERE)


def recursive(here, there, before, batch, outer, adjoint, momentum):
    """Both directions, from those before and where these were taken."""

    def look(w, alpha):
        b, direct = outer_parts(w, outer, alpha)
        hypergradient = direct + indirect(w, batch, adjoint(w, b, alpha), alpha)
        return g(w, batch, alpha), hypergradient

    parts = zip(look(*here), look(*there), before, strict=True)
    return tuple(new + momentum * (last - old) for new, old, last in parts)


def mrbo_once(batch, outer, product):
    adjoint = lambda w, b, alpha: two_terms(w, b, product, alpha)
    d = recursive(HERE, THERE, BEFORE, batch, outer, adjoint, 0.9)
    return d[1], W - RATE * d[0]


def sustain_once(batch, outer, product, p):
    adjoint = lambda w, b, alpha: one_of_two(w, b, product, p, alpha)
    d = recursive(HERE, THERE, BEFORE, batch, outer, adjoint, 0.9)
    return d[1], W - RATE * d[0]


def vrbo_once(batch, outer, next_batch, next_outer):
    """Two steps of one term."""
    adjoint = lambda w, b, alpha: TERM * b
    d = recursive(HERE, THERE, BEFORE, batch, outer, adjoint, 1.0)
    w = W - RATE * d[0]
    d = recursive((w, ALPHA), HERE, d, next_batch, next_outer, adjoint, 1.0)
    return d[1], w - RATE * d[0]


def f2sa_once(of_y, of_z, end_y, end_z):
    b, _ = outer_parts(W, VAL)
    y = W - RATE * (g(W, of_y) + b / 5.0)
    z = W_ELSEWHERE - RATE * g(W_ELSEWHERE, of_z)
    difference = g(y, end_y, argnum=1) - g(z, end_z, argnum=1)
    return outer_parts(y, VAL)[1] + 5.0 * difference, y


def bome_once(batch, outer):
    lower = W - TERM * g(W, batch)
    lower = lower - TERM * g(lower, batch)
    below = g(W, batch, argnum=1) - g(lower, batch, argnum=1)
    q, M = (jnp.concatenate(x) for x in ((g(W, batch), below), outer_parts(W, outer)))
    both = M + jnp.maximum(0.5 - M @ q / (q @ q), 0) * q
    return both[3:], W - RATE * both[:3]


def darts_once(step, outer, batch):
    w = W - RATE * g(W, step)
    b, direct = outer_parts(w - TERM * g(w, batch), outer)
    shift = 0.01 * b / jnp.linalg.norm(b)
    rise = g(w + shift, batch, argnum=1) - g(w - shift, batch, argnum=1)
    return direct - TERM * jnp.linalg.norm(b) * rise / 0.02, w


def darts_first_once(step, outer):
    w = W - RATE * g(W, step)
    return outer_parts(w, outer)[1], w


def pzobo_once(step, outer, u):
    """Along corners of a cube, in place of normal directions, 1/2 away."""
    w, moved = (W - RATE * g(W, step, alpha) for alpha in (ALPHA, ALPHA + 0.5 * u))
    b, direct = outer_parts(w, outer)
    return direct + (moved - w) @ b / 0.5 * u, w


TRAIN, VAL = FULL.inner_data, FULL.outer_data
CORNERS = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))
#: What is drawn: an inner or outer example, a corner, a number of products.
POOLS = {"i": TRAIN, "o": VAL, "u": CORNERS, "p": jnp.arange(2)}
ONCE = {
    "StocBiO": (hg.StocBiO(MOVE, 1, 2, step_size=TERM), stocbio_once, "ioii"),
    "AmIGO": (hg.AmIGO(MOVE, 1, 1), amigo_once, "ioii"),
    "TTSA": (hg.TTSA(MOVE, 2, step_size=TERM), ttsa_once, "ioiip"),
    "MRBO": (hg.MRBO(MOVE, 2, step_size=TERM), mrbo_once, "ioi"),
    "SUSTAIN": (hg.SUSTAIN(MOVE, 2, step_size=TERM), sustain_once, "ioip"),
    "VRBO": (hg.VRBO(MOVE, 2, 1, period=5, step_size=TERM), vrbo_once, "ioio"),
    "F2SA": (hg.F2SA(MOVE, 1, penalty=5.0), f2sa_once, "iiii"),
    "BOME": (hg.BOME(MOVE, 2, step_size=TERM), bome_once, "io"),
    "DARTS": (hg.DARTS(MOVE, step_size=TERM), darts_once, "ioi"),
    "DARTS, first order": (hg.DARTS(MOVE), darts_first_once, "io"),
    "PZOBO": (hg.PZOBO(MOVE, 1, 1, sigma=0.5), pzobo_once, "iou"),
}


def expected(once, kinds, all_data=False):
    """Mean over all that is drawn; of examples, or at once on all of them."""
    fixed = lambda kind: all_data and kind in "io"
    sizes = [
        1 if fixed(kind) else len(jax.tree.leaves(POOLS[kind])[0]) for kind in kinds
    ]

    def one(indices):
        take = lambda kind, i: jax.tree.map(
            lambda x: x[i][None] if kind in "io" else x[i], POOLS[kind]
        )
        pairs = zip(kinds, indices, strict=True)
        parts = [POOLS[kind] if fixed(kind) else take(kind, i) for kind, i in pairs]
        return jnp.concatenate(once(*parts))

    rows = jnp.array(list(itertools.product(*map(range, sizes))))
    return jnp.mean(jax.vmap(one)(rows), axis=0)


@pytest.mark.parametrize("name", ONCE)
def test_a_step_has_its_own_expectation(name: str, monkeypatch):
    """Of direction and next ``w``, to 1e-12; prints how far that is from all data's."""
    corner = lambda key, like: 2.0 * jax.random.bernoulli(key, shape=like.shape) - 1
    monkeypatch.setattr(single_loop.pzobo, "normal", corner)
    estimator, once, kinds = ONCE[name]
    batches = lambda data, kind: hg.Batches(data, 1) if kind in kinds else data
    problem = hg.Bilevel(bent, bent_outer, batches(TRAIN, "i"), batches(VAL, "o"))
    state = at(estimator, v=V if name == "AmIGO" else None)
    if name in ("MRBO", "SUSTAIN", "VRBO"):
        memory = lambda s: (s.last, s.directions, s.step)
        state = eqx.tree_at(memory, state, (THERE, BEFORE, jnp.asarray(1)))
    if name == "F2SA":
        state = eqx.tree_at(lambda s: s.z, state, W_ELSEWHERE)
    if "DARTS" in name:
        state = eqx.tree_at(lambda s: s.step, state, jnp.asarray(1))
    several = N ** len(kinds.replace("p", ""))
    sizes = [several // N, several] if "p" in kinds else [several]
    look = lambda estimate, after: (
        after.y if name == "F2SA" else after.w,
        estimate.stats["inner_grad_norm"][
            None
        ],  # BOME's batch, where it has no barrier
    )
    num_keys = int(sum(sizes) * (np.log(several) + 12))
    found = outcomes(estimator, state, num_keys, look, problem)
    groups = [found[found[:, 3] == n] for n in np.unique(found[:, 3])]
    assert [len(group) for group in groups] == sizes  # each outcome once
    mean = np.mean([group.mean(axis=0) for group in groups], axis=0)
    stated, on_all = expected(once, kinds), expected(once, kinds, all_data=True)
    assert error(mean[:3], stated[:3]) < 1e-12
    assert error(mean[4:7], stated[3:]) < 1e-12
    bias = error(stated[:3], on_all[:3])
    print(f"{name}: the mean direction is {bias:.1e} off that of all data")  # noqa: T201 - for the reader
    assert (bias < 1e-12) == (name in ("MRBO", "SUSTAIN"))


# Rates.


def test_the_bias_of_f2sa_falls_as_its_penalty_grows():
    """Settled at one alpha: slope -1 of log error against log penalty, within 5%."""
    known = ridge("per-weight", n=20, d=3)
    exact = known.exact(known.alpha)
    penalties, errors = [100.0, 1000.0, 10_000.0], []
    for penalty in penalties:
        settled = hg.testing.Settled(
            hg.F2SA(optax.sgd(known.step), 10, penalty=penalty), 100
        )
        state = settled.init(known.problem, known.w, known.alpha)
        found, _ = settled.estimate(
            known.problem, state, known.alpha, jax.random.key(0)
        )
        errors.append(float(error(found.hypergradient, exact)))
    slopes = np.diff(np.log(errors)) / np.diff(np.log(penalties))
    np.testing.assert_allclose(slopes, -1, atol=0.05)


@pytest.mark.parametrize("name", ["StocBiO", "MRBO", "VRBO", "DARTS"])
def test_what_a_series_leaves_of_the_adjoint(name: str):
    """``q^K`` along the worst eigenvector: 4 terms of 1/10, or one step ahead."""
    num_terms = 1 if name == "DARTS" else 4
    for spectrum in ((0.5, 1.5), (1.0, 25.0)):
        left = [(1 - ETA * x) ** num_terms for x in spectrum]
        found = METHODS[name][0].error_bound(*spectrum)
        np.testing.assert_allclose(found, np.max(np.abs(left)), rtol=1e-12)


def test_saba_converges_linearly_below_the_plateau_of_soba():
    """Batches of 4 of 32: log suboptimality falls on a line, and ends 10 times lower.

    At equal cost: both see a product and an outer gradient a batch. Every 25 steps.
    """
    train, val = examples(1, 32), examples(2, 32)
    problem = hg.Bilevel(
        shifted, validated, hg.Batches(train, batch_size=4), hg.Batches(val, 4)
    )

    def value(alpha):
        x, target = train["x"], train["y"] + train["z"] @ alpha
        H = x.T @ x / 32 + 0.2 * jnp.eye(3)
        return validated(jnp.linalg.solve(H, x.T @ target / 32), alpha, val)

    zero = jnp.zeros(3)
    best = -jnp.linalg.solve(jax.hessian(value)(zero), jax.grad(value)(zero))

    def course(estimator):
        trace = run_loop(
            problem, estimator, optax.sgd(0.05), W, ALPHA, num_steps=601,
            metrics={str(i): lambda w, alpha, key, i=i: alpha[i] for i in range(3)},
            eval_every=25,
        )  # fmt: skip
        alphas = np.stack([trace.metrics[str(i)] for i in range(3)], axis=1)[::25]
        gaps = [float(value(alpha) - value(best)) for alpha in alphas]
        return np.array(gaps), trace.cost[-1]

    (saba, cost), (soba, same) = map(course, (hg.SABA(SGD), hg.SOBA(SGD)))
    assert cost == same
    falling = saba[: 1 + np.argmin(saba > 1e-13)] if saba.min() < 1e-13 else saba
    steps = np.arange(len(falling))
    slope, start = np.polyfit(steps, np.log(np.abs(falling)), 1)
    left = np.log(np.abs(falling)) - (start + slope * steps)
    assert len(falling) >= 4
    assert slope < -0.5
    assert np.var(left) < 0.05 * np.var(np.log(np.abs(falling)))
    assert np.median(np.abs(soba[-5:])) > 10 * np.median(np.abs(saba[-5:]))


def test_a_step_of_saba_copies_no_table():
    """Nor does a run select between tables: by the compiled program of `minimize`."""
    x = jnp.ones((512, 37), jnp.float32)
    inner = lambda w, alpha, x: 0.5 * jnp.mean(((w - alpha)[None] - x) ** 2)
    outer = lambda w, alpha, x: 0.5 * jnp.mean((w[None] - x) ** 2)

    def run(x, key):
        data = hg.Batches(x, 4)
        problem = hg.Bilevel(inner, outer, data, data)
        saba, zero = hg.SABA(optax.sgd(0.1)), jnp.zeros(37, jnp.float32)
        sgd = optax.sgd(0.1)
        return hg.minimize(problem, saba, sgd, zero, zero, num_steps=9, key=key).alpha

    text = jax.jit(run).lower(x, jax.random.key(0)).compile().as_text()
    of_table = r"= f32\[512,37\]\S* "
    assert re.search(of_table + "(fusion|scatter)", text)
    copies = re.findall(of_table + r"(copy|select)\(", text)
    assert len(copies) <= 4  # of the zeros that five tables begin with


def test_one_step_of_soba_holds_few_copies_of_w():
    """10 million parameters, batch 256: at most 8 copies, by the compiled program."""
    assert soba_step.NUM_PARAMETERS > 10e6
    assert 3 < soba_step.copies(soba_step.step) <= 8


def test_the_step_that_is_timed_is_the_one_written_out():
    """From the same point, on the same examples, the same next one."""
    w, alpha, data, key = soba_step.shapes()
    state = soba_step.begin(w, alpha, data)
    data = jax.tree.map(lambda x: jnp.tile(x[:1], (len(x), 1)), data)  # all alike
    v = jax.tree.map(jnp.ones_like, w)
    state = eqx.tree_at(lambda s: s.v, state, v)
    ours, ours_alpha = jax.jit(soba_step.step)(state, alpha, data, key)
    (plain_w, plain_v), plain_alpha = jax.jit(soba_step.plain_step)(
        (w, v), alpha, data, key
    )
    for found, expected in ((ours.w, plain_w), (ours.v, plain_v)):
        moved = optax.tree.norm(optax.tree.sub(found, expected))
        assert moved < 1e-5 * optax.tree.norm(expected)
    np.testing.assert_allclose(ours_alpha, plain_alpha, rtol=1e-5)
    assert np.any(ours_alpha != alpha)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [
        hg.SABA(optax.sgd(0.5)),
        hg.MRBO(optax.sgd(0.5), 10, step_size=0.6),
        hg.F2SA(optax.sgd(0.5), 2, penalty=1000.0),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_conformance(estimator):
    """What every estimator must do, after 300 steps at one alpha."""
    hg.testing.check_estimator(estimator)


def test_what_each_refuses():
    """One shot, several losses, no optimizer."""
    problem = hg.Bilevel(shifted, (validated, validated), examples(1), examples(2))
    for estimator, _ in METHODS.values():
        with pytest.raises(TypeError, match="run it by"):
            hg.hypergradient(FULL, estimator)
        with pytest.raises(ValueError, match="takes one outer loss"):
            estimator.init(problem, W, ALPHA)
        settings = {field: getattr(estimator, field) for field in estimator.__dict__}
        with pytest.raises(TypeError, match="optimizer must be an optax"):
            type(estimator)(**settings | {"optimizer": 0.1})


#: By setting: what is refused, and why.
WRONG: dict[str, list] = {
    "step_size": [(-0.1, "at least 0"), ("small", "a number"), (True, "a number")],
    "momentum": [(-0.1, "in .0, 1."), (1.1, "in .0, 1."), (np.nan, "in"), ("0", "a n")],
    "penalty": [(0.0, "above 0"), (-1, "above 0"), ("grows", "a number")],
    "sigma": [(0.0, "above 0"), (jnp.array(-1.0), "above 0"), (None, "a number")],
    "eta": [(-0.5, "at least 0"), ("half", "a number")],
}
COUNTS = "num_steps", "num_terms", "num_directions", "num_adjoint_steps", "period"
WRONG |= {name: [(x, "an integer") for x in (0, 2.0, True, None)] for name in COUNTS}


@pytest.mark.parametrize("setting", WRONG)
def test_numbers_that_are_refused(setting: str):
    """By every method that has the setting; the message names it and the value."""
    found = 0
    for estimator, _ in METHODS.values():
        settings = {field: getattr(estimator, field) for field in estimator.__dict__}
        for value, expected in WRONG[setting] if setting in settings else ():
            said = rf"^{setting}.* must be {expected}.*; got .*{re.escape(repr(value))}"
            with pytest.raises((TypeError, ValueError), match=said):
                type(estimator)(**settings | {setting: value})
            found += 1
    assert found
    assert hg.DARTS(SGD, step_size=None).step_size is None
    assert hg.MRBO(SGD, 1, step_size=0, momentum=1).momentum == 1.0
    rates = jnp.array([0.1, -0.1])  # traced numbers are not judged
    steps = jax.vmap(lambda x: hg.TTSA(SGD, 1, step_size=x).step_size)(rates)
    np.testing.assert_array_equal(steps, rates)


@pytest.mark.parametrize(
    ("estimator", "instead"),
    [
        (hg.SABA(SGD), "hg.SOBA"),
        (hg.SRBA(SGD, period=2), "hg.SOBA"),
        (hg.VRBO(SGD, 1, 1, period=2, step_size=ETA), "hg.MRBO"),
    ],
)
def test_data_that_change_have_no_full_pass(estimator, instead: str):
    """By the run, before it is traced: what is seen once is not there again."""
    drawn = hg.Bilevel(
        shifted, validated, data_fn=lambda key: (examples(1), examples(2))
    )
    keyed = lambda w, alpha, batch: shifted(w, alpha, batch[0])
    keys = lambda w, alpha, key: jnp.sum(jax.random.normal(key, (3,)) * w * alpha)
    augmented = hg.Batches(examples(1), 2, with_key=True)
    rollouts = hg.Batches(None, with_key=True)
    for problem, said in (
        (hg.Bilevel(keyed, validated, augmented, examples(2)), "keyed inner_data"),
        (hg.Bilevel(shifted, keys, examples(1), rollouts), "keyed outer_data"),
        (drawn, "a problem with draw"),
    ):
        with pytest.raises(ValueError, match=f"{said} .* pass arrays.* use {instead}"):
            hg.minimize(problem, estimator, SGD, W, ALPHA, num_steps=1)


def test_vrbo_makes_no_inner_steps_before_alpha_has_moved():
    """Nor counts them; every step sees an outer value of all data."""
    vrbo, _ = METHODS["VRBO"]
    trace = hg.minimize(FULL, vrbo, SGD, W, ALPHA, num_steps=3)
    assert trace.stats["num_inner_steps"].tolist() == [0, 3, 3]
    assert trace.stats["num_grads"].tolist() == [1, 6, 7]
    assert trace.stats["num_outer_values"].tolist() == [1, 1, 1]


def test_darts_makes_no_step_of_w_before_alpha_has_moved():
    """The look ahead is none; the trace says so."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    outer = lambda w, alpha, batch: 0.5 * (w - 1.0) ** 2
    trace = hg.minimize(
        hg.Bilevel(inner, outer), hg.DARTS(SGD, ETA), SGD, 0.0, 3.0, num_steps=3
    )
    assert trace.stats["num_inner_steps"].tolist() == [0, 1, 1]
    assert trace.value[0] == pytest.approx(0.5 * (3.0 * ETA - 1.0) ** 2)
