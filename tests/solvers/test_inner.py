"""Tests of `Descent`, of the loop of iterative solvers, and of `ClosedForm`."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.inner.descent import run_inner_steps

KEY = jax.random.key(0)
RNG = np.random.default_rng(11)
DIM = 6
BASIS = np.linalg.qr(RNG.normal(size=(DIM, DIM)))[0]
H = (BASIS * np.linspace(0.5, 1.5, DIM)) @ BASIS.T
ALPHA = RNG.normal(size=DIM)


@eqx.filter_jit
def solve(solver, loss, w, alpha, data=None, key=KEY):
    return solver.solve(loss, w, alpha, data, key)


def quadratic(w, alpha, batch):
    return 0.5 * w @ (H @ w) - alpha @ w


def numpy_descent(num_steps, rate, momentum=0.0, nesterov=False):
    """Returns ``w`` after the steps of momentum as Sutskever et al. 2013 write them."""
    w, velocity = np.zeros(DIM), np.zeros(DIM)
    for t in range(num_steps):
        grad = H @ w - ALPHA
        velocity = momentum * velocity + grad
        step = momentum * velocity + grad if nesterov else velocity
        w = w - (rate(t) if callable(rate) else rate) * step
    return w


# Gradient descent.

DECAY = lambda t: 0.5 / (1 + t)
DESCENTS = {
    "plain": (optax.sgd(0.3), {"rate": 0.3}),
    "momentum": (optax.sgd(0.3, momentum=0.6), {"rate": 0.3, "momentum": 0.6}),
    "nesterov": (
        optax.sgd(0.2, momentum=0.5, nesterov=True),
        {"rate": 0.2, "momentum": 0.5, "nesterov": True},
    ),
    "schedule": (optax.sgd(DECAY), {"rate": DECAY}),
}


@pytest.mark.parametrize("name", DESCENTS)
def test_descent_equals_a_numpy_loop(name):
    """T steps cost T gradients."""
    optimizer, settings = DESCENTS[name]
    w, stats = solve(hg.Descent(optimizer, 13), quadratic, jnp.zeros(DIM), ALPHA)
    np.testing.assert_allclose(w, numpy_descent(13, **settings), rtol=1e-12)
    assert stats["num_grads"] == stats["num_steps"] == 13


def test_descent_of_no_steps_returns_its_start():
    w, stats = solve(hg.Descent(optax.sgd(0.3), 0), quadratic, jnp.ones(DIM), ALPHA)
    np.testing.assert_array_equal(w, np.ones(DIM))
    assert stats["num_grads"] == stats["num_steps"] == 0


DIFFERENTIABLE = {
    "sgd": (optax.sgd(0.1), True),
    "adam": (optax.adam(0.1), True),
    "chain": (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), True),
    "function of alpha": (lambda alpha: optax.sgd(0.1), True),
    "lbfgs": (optax.lbfgs(), False),
    "lbfgs without line search": (optax.lbfgs(linesearch=None), False),
    "zoom": (optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)), False),
    "backtracking": (
        optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        False,
    ),
    "wrapped lbfgs": (optax.apply_if_finite(optax.lbfgs(), 3), False),
    "masked lbfgs": (optax.masked(optax.lbfgs(), True), False),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_line_searches_and_lbfgs_are_not_differentiable(name):
    optimizer, expected = DIFFERENTIABLE[name]
    assert hg.Descent(optimizer, 3).differentiable is expected


def test_a_solver_is_not_differentiable_by_default():
    class Minimal:
        def solve(self, inner_loss, w, alpha, data, key):
            return w, hg.inner.inner_stats(0)

    with pytest.raises(ValueError, match="Minimal"):
        hg.Unrolled(Minimal())


def negative_sum(w, alpha, batch):
    """A loss for which ``w`` counts the samples of each example at a rate of 1."""
    return -jnp.sum(w[batch])


def test_every_step_samples_its_own_batch_uniformly():
    """Checks the number of samples of each example by a chi-square test."""
    data, num_steps = hg.Batches(jnp.arange(5), batch_size=3), 2000
    solver = hg.Descent(optax.sgd(1.0), num_steps)
    counts, stats = solve(solver, negative_sum, jnp.zeros(5), 0.0, data)
    assert counts.sum() == 3 * num_steps
    assert stats["num_grads"] == pytest.approx(num_steps * 3 / 5)
    expected = 3 * num_steps / 5
    assert np.sum((counts - expected) ** 2 / expected) < 23.5  # chi2(4): p = 1e-4


def test_the_batches_depend_on_the_key_alone():
    data = hg.Batches(jnp.arange(5.0), batch_size=3)
    loss = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - 0.1 * batch[:, None]))
    first, second, other = (
        solve(hg.Descent(optax.adam(0.1), 7), loss, jnp.zeros((1, 2)), 0.0, data, key)
        for key in (KEY, KEY, jax.random.key(1))
    )
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[0], other[0])


# The loop.


class NoisySteps(eqx.Module):
    """Steps that depend on their keys, on ``alpha`` and on a second carry."""

    num_steps: int = eqx.field(static=True)

    def init(self, inner_loss, w, alpha, data, key):
        return w, jnp.zeros_like(w)

    def step(self, inner_loss, carry, alpha, data, key):
        w, velocity = carry
        noise = jax.random.key_data(key)[0].astype(float) / 2**32
        velocity = 0.5 * velocity + noise * jnp.sin(w * alpha)
        return w - 0.3 * velocity, velocity


@pytest.mark.parametrize("num_steps", [0, 3, 11, 100])
def test_checkpoints_change_neither_values_nor_derivatives(num_steps):
    """3 steps are all stored; 11 leave a remainder beside the segments."""

    def final(alpha, w, checkpoint):
        carry = run_inner_steps(
            NoisySteps(num_steps), None, w, alpha, None, KEY, checkpoint=checkpoint
        )
        return jnp.sum(carry[0] ** 2), carry

    @jax.jit
    def run(alpha, w):
        grad_fn = jax.grad(final, argnums=(0, 1), has_aux=True)
        return grad_fn(alpha, w, False), grad_fn(alpha, w, True)

    plain, checkpointed = run(jnp.asarray(ALPHA), jnp.ones(DIM))
    chex.assert_trees_all_close(checkpointed, plain, rtol=1e-10, atol=1e-14)
    keys = jax.random.split(jax.random.split(KEY)[1], num_steps)
    w, velocity = np.ones(DIM), np.zeros(DIM)
    for noise in np.asarray(jax.random.key_data(keys))[:, 0] / 2**32:
        velocity = 0.5 * velocity + noise * np.sin(w * ALPHA)
        w = w - 0.3 * velocity
    np.testing.assert_allclose(plain[1][0], w, rtol=1e-9)


TUNED_OPTIMIZERS = {
    "SGD": lambda a: optax.sgd(a["rate"]),
    "momentum": lambda a: optax.sgd(a["rate"], momentum=0.9, nesterov=True),
    "Adam": lambda a: optax.adam(a["rate"], b1=0.8),
    "Polyak": lambda a: optax.polyak_sgd(max_learning_rate=a["rate"]),
    "schedule": lambda a: optax.sgd(lambda count: a["rate"] / (1 + count)),
}


@pytest.mark.parametrize("truncation_length", [None, 9])
@pytest.mark.parametrize("name", TUNED_OPTIMIZERS)
def test_mixed_mode_has_the_derivatives_of_autodiff(name, truncation_length):
    """On keyed batches, with all carries stored and with checkpoints."""
    solver = hg.Descent(TUNED_OPTIMIZERS[name], 23)
    data = hg.Batches(jnp.asarray(RNG.normal(size=(20, DIM))), 4, with_key=True)

    def loss(w, alpha, batch):
        x, key = batch
        x = x + alpha["noise"] * jax.random.normal(key, x.shape)
        return jnp.mean(jnp.cosh(x @ w - alpha["shift"])) + jnp.sum(jnp.tanh(w) ** 2)

    def final(alpha, w, **options):
        w, state = run_inner_steps(
            solver, loss, w, alpha, data, KEY,
            truncation_length=truncation_length, **options,
        )  # fmt: skip
        return jnp.sum(w**3), (w, state)

    @jax.jit
    def run(alpha, w):
        grad_fn = jax.grad(final, argnums=(0, 1), has_aux=True)
        return [
            grad_fn(alpha, w),
            grad_fn(alpha, w, mixed_mode=True),
            grad_fn(alpha, w, mixed_mode=True, checkpoint=True),
        ]

    alpha = {"rate": jnp.asarray(0.1), "noise": jnp.asarray(0.3), "shift": 0.5}
    expected, *results = run(alpha, jnp.linspace(-1, 1, DIM))
    assert np.all(expected[0][0]["noise"] != 0)
    for actual in results:
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-14)


STEP_SIZE, NUM_STEPS = 0.4, 10
SGD = hg.Descent(optax.sgd(STEP_SIZE), NUM_STEPS)
POWERS = [
    np.linalg.matrix_power(np.eye(DIM) - STEP_SIZE * H, k) for k in range(NUM_STEPS + 1)
]


@pytest.mark.parametrize("length", [4, 10, 99])
def test_derivatives_pass_through_the_last_steps_only(length):
    """``dw_T/dalpha = s sum_{k<K} (I - s H)^k``; the value does not change."""

    def final(alpha, w, checkpoint):
        w, _ = run_inner_steps(
            SGD, quadratic, w, alpha, None, KEY,
            truncation_length=length, checkpoint=checkpoint,
        )  # fmt: skip
        return w, w

    @jax.jit
    def run(alpha, w):
        jacobian_fn = jax.jacrev(final, argnums=(0, 1), has_aux=True)
        return jacobian_fn(alpha, w, False), jacobian_fn(alpha, w, True)

    by_alpha = STEP_SIZE * sum(POWERS[: min(length, NUM_STEPS)])
    by_start = POWERS[NUM_STEPS] if length >= NUM_STEPS else np.zeros((DIM, DIM))
    expected = (by_alpha, by_start), numpy_descent(NUM_STEPS, STEP_SIZE)
    for actual in run(ALPHA, jnp.zeros(DIM)):
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("length", [4, 5])
def test_the_halves_of_the_last_steps_have_derivatives_of_their_own(length):
    """The terms k < K/2 belong to the newer half, and the middle step to alpha."""

    def final(older, alpha, newer):
        return run_inner_steps(
            SGD, quadratic, jnp.zeros(DIM), alpha, None, KEY,
            truncation_length=length, halves=(older, newer),
        )[0]  # fmt: skip

    actual = jax.jit(jax.jacrev(final, argnums=(0, 1, 2)))(ALPHA, ALPHA, ALPHA)
    half = length // 2
    older, newer = POWERS[length - half : length], POWERS[:half]
    middle = [*POWERS[half : length - half], np.zeros((DIM, DIM))]
    expected = tuple(STEP_SIZE * sum(terms) for terms in (older, middle, newer))
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-14)


# Schedules and formulas.


def test_a_piecewise_constant_schedule_of_many_windows_does_not_overflow():
    """45,000 times 50,000 exceeds the 32-bit integers of the counts of optax."""
    for num_windows, num_steps in ((50_000, 50_000), (49_999, 100_001)):
        values = jnp.arange(float(num_windows))
        schedule = jax.jit(hg.piecewise_constant_schedule(values, num_steps))
        for count in (0, 1, 2, 33_333, 45_000, num_steps - 1, num_steps + 5, 2**31 - 1):
            expected = min(count * num_windows // num_steps, num_windows - 1)
            assert schedule(jnp.int32(count)) == expected


def test_a_piecewise_constant_schedule_keeps_its_last_value():
    schedule = hg.piecewise_constant_schedule(jnp.array([0.4, 0.2, 0.1]), num_steps=7)
    actual = [float(schedule(jnp.asarray(count))) for count in range(9)]
    np.testing.assert_allclose(actual, 3 * [0.4] + 2 * [0.2] + 4 * [0.1])
    with pytest.raises(ValueError, match="values"):
        hg.piecewise_constant_schedule(jnp.asarray(0.4), num_steps=7)


def test_closed_form_uses_all_of_the_data():
    """It costs one gradient."""
    data = hg.Batches(jnp.array([1.0, 2.0, 4.0, 8.0]), batch_size=2)
    solver = hg.ClosedForm(lambda alpha, batch: alpha * jnp.sum(batch))
    w, stats = solve(solver, None, jnp.zeros(()), jnp.asarray(2.0), data)
    assert float(w) == 30.0
    assert stats["num_grads"] == 1
    assert solver.differentiable


def mean_of_data(alpha, batch):
    return alpha * jnp.mean(batch)


@pytest.mark.parametrize(
    "make_estimator",
    [
        hg.Unrolled,
        hg.Forward,
        lambda solver: hg.FixedPoint(solver, num_terms=2),
        lambda solver: hg.Implicit(solver, rtol=1e-2),
        lambda solver: hg.PersistentEvolution(solver, num_pairs=1),
    ],
    ids=["Unrolled", "Forward", "FixedPoint", "Implicit", "PersistentEvolution"],
)
def test_every_estimator_counts_a_formula_as_a_gradient_on_all_data(make_estimator):
    """The batch size is that of other solvers, and changes nothing."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha * jnp.mean(batch)) ** 2
    outer = lambda w, alpha, batch: 0.5 * (w - 1.0) ** 2
    estimator = make_estimator(hg.ClosedForm(mean_of_data))

    def count_grads(batch_size):
        data = hg.Batches(jnp.arange(100.0), batch_size)
        problem = hg.Bilevel(inner, outer, data)
        estimate = hg.hypergradient(problem, estimator)(0.0, 2.0)
        return float(estimate.stats["num_grads"])

    assert count_grads(batch_size=10) == count_grads(batch_size=None)


def test_an_optimizer_function_may_lack_a_module():
    """As one that `exec` defines."""
    names = {"optax": optax}
    exec("schedule = lambda alpha: optax.sgd(alpha)", names)
    assert names["schedule"].__module__ is None
    assert hg.Descent(names["schedule"], 3).num_steps == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_momentum_in_alpha_may_have_a_wider_dtype_than_w(dtype):
    """The state keeps the dtypes that it starts with, as `jax.lax.scan` demands."""
    loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1) ** 2)
    w, alpha = jnp.zeros(2, dtype), jnp.asarray(0.5, float)
    solver = hg.Descent(lambda alpha: optax.sgd(0.1, momentum=alpha), 30)
    final_w, _ = solve(solver, loss, w, alpha)
    assert final_w.dtype == w.dtype
    expected, _ = solve(solver, loss, w.astype(float), alpha)
    tol = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(final_w.astype(float), expected, rtol=tol)
