"""Penalty, finite differences and evolution: rates, and what they converge to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import any_known, error, quadratic, two_losses
from hypergrad.problem import EstimateData


@functools.cache
def sgd(step: float) -> optax.GradientTransformation:
    return optax.sgd(step)


def ask(known, estimator, key=None):
    return hg.hypergradient(known.problem, estimator)(known.w, known.alpha, key)


def slope(x, y):
    return np.polyfit(np.log(x), np.log(y), 1)[0]


# Penalty.


@pytest.mark.parametrize(("symmetric", "order"), [(False, -1), (True, -2)])
@pytest.mark.parametrize("name", ["logistic per-weight", "ridge per-weight"])
def test_the_bias_of_the_penalty(name: str, symmetric: bool, order: int):
    """Falls as 1/strength, and as 1/strength^2 if symmetric."""
    known = any_known(name)
    strengths = np.array([30.0, 100.0, 300.0, 1000.0])
    errors = [
        error(
            ask(
                known, hg.Penalty(hg.Newton(), strength, symmetric=symmetric)
            ).hypergradient,
            known.exact(known.alpha),
        )
        for strength in strengths
    ]
    assert slope(strengths, errors) == pytest.approx(order, abs=0.1)


def test_the_penalty_needs_no_second_derivative():
    """Descent with a loss whose second derivative raises."""

    @jax.custom_vjp
    def square(x):
        return 0.5 * x**2

    def backward(x, ct):
        return (once(x) * ct,)

    @jax.custom_jvp
    def once(x):
        return x

    @once.defjvp
    def forbidden(primals, tangents):
        raise AssertionError("a second derivative was taken")

    square.defvjp(lambda x: (square(x), x), backward)
    problem = hg.Bilevel(
        lambda w, alpha, batch: square(w - 3 * alpha), lambda w, alpha, batch: square(w)
    )
    solver = hg.Descent(sgd(0.5), 100)
    found = hg.hypergradient(problem, hg.Penalty(solver, 1e3))(0.0, 1.0)
    assert found.hypergradient == pytest.approx(9.0, rel=1e-2)
    with pytest.raises(AssertionError, match="second derivative"):
        hg.hypergradient(problem, hg.Implicit(solver))(0.0, 1.0)


def test_the_penalty_of_several_losses():
    """K leads; each that of its loss alone; warm and cold agree."""
    known = quadratic("nested", seed=2)
    problem = two_losses(known, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    estimator = hg.Penalty(hg.Newton(), 1e3, symmetric=True)
    state = estimator.init(problem, known.w, known.alpha)
    for _ in range(2):
        found, state = estimator.estimate(
            problem, state, known.alpha, jax.random.key(0)
        )
        first = jax.tree.map(lambda x: x[0], found.hypergradient)
        assert error(first, known.exact(known.alpha)) < 1e-4
    assert not found.stats["trusted"]


def test_one_sided_penalties_of_several_losses():
    """A closed form: ``l (alpha - t) / (l + 1)`` where ``M = ||w - t||² / 2``."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    outer = [lambda w, alpha, batch, t=t: 0.5 * jnp.sum((w - t) ** 2) for t in (1, 2)]
    estimator = hg.Penalty(hg.Descent(sgd(0.5), 60), 10.0)
    alpha = jnp.array([0.1, -0.4, 3.0])
    look = hg.hypergradient(hg.Bilevel(inner, tuple(outer)), estimator)
    expected = 10 / 11 * np.stack([alpha - 1, alpha - 2])
    np.testing.assert_allclose(look(jnp.zeros(3), alpha).hypergradient, expected, 1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_penalty_counts_its_outer_value_and_grads(symmetric: bool, batch_size):
    """Every step of a nudged solve evaluates the outer loss, a mini-batch step too."""
    known = any_known("ridge per-weight")
    calls = []

    def outer(w, alpha, batch):
        jax.debug.callback(lambda: calls.append(1))
        return known.problem.outer_loss(w, alpha, batch)

    train = hg.Batches(known.problem.inner_data, batch_size)
    problem = hg.Bilevel(
        known.problem.inner_loss, outer, train, known.problem.outer_data
    )
    estimator = hg.Penalty(hg.Descent(sgd(0.1), 7), 10.0, symmetric=symmetric)
    gradient = hg.hypergradient(problem, estimator)
    jax.block_until_ready(gradient(known.w, known.alpha))
    calls.clear()
    stats = jax.block_until_ready(gradient(known.w, known.alpha)).stats
    jax.effects_barrier()
    assert len(calls) == stats["num_outer_grads"] + stats["num_outer_values"]


# Finite differences.


def test_the_difference_of_gradients_is_the_cross_term():
    """H = I: exact up to epsilon^2, with the best epsilon to the cube root of eps."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum(w**2) - jnp.sum(w * jnp.sin(alpha))
    outer = lambda w, alpha, batch: jnp.sum((w - 1) ** 2) + jnp.sum(alpha)
    problem = hg.Bilevel(inner, outer)
    alpha = jnp.array([0.3, 0.7])
    solver = hg.Descent(sgd(1.0), 1)
    found = hg.hypergradient(problem, hg.FiniteDifference(solver))(jnp.zeros(2), alpha)
    exact = 1 + 2 * (jnp.sin(alpha) - 1) * jnp.cos(alpha)
    assert error(found.hypergradient, exact) < 1e-9


def test_the_second_order_update_of_darts():
    """One inner step of size s: its formula, by hand, differences taken at w'."""
    inner = lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha)) + jnp.sum(w**4) / 4
    outer = lambda w, alpha, batch: jnp.sum(jnp.sin(w)) + jnp.sum(alpha**2)
    w, alpha, s, length = jnp.array([0.2, -0.4]), jnp.array([0.5, 0.1]), 0.1, 0.01
    ahead = w - s * jax.grad(inner)(w, alpha, None)
    b = jax.grad(outer)(ahead, alpha, None)
    e = length / jnp.linalg.norm(b)
    of_alpha = lambda w: jax.grad(inner, 1)(w, alpha, None)
    expected = 2 * alpha - s * (of_alpha(ahead + e * b) - of_alpha(ahead - e * b)) / (
        2 * e
    )
    estimator = hg.FiniteDifference(hg.Descent(sgd(s), 1), length, s)
    found = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(w, alpha)
    assert error(found.hypergradient, expected) < 1e-12


def test_darts_difference_on_a_batch():
    """Of the examples that the key draws; the ledger counts their share."""
    inner = lambda w, alpha, batch: jnp.mean((w - alpha * batch) ** 4)
    outer = lambda w, alpha, batch: jnp.mean((w - batch) ** 2)
    x = jnp.linspace(0.5, 2.0, 10)
    problem = hg.Bilevel(inner, outer, hg.Batches(x), x)
    solver, key = hg.Descent(sgd(0.1), 2), jax.random.key(3)
    estimator = hg.FiniteDifference(solver, 0.01, 0.1, adjoint_batch_size=4)
    w, alpha = jnp.asarray(1.0), jnp.asarray(0.7)
    state = estimator.init(problem, w, alpha)
    found, _ = estimator.estimate(problem, state, alpha, key)
    batch = EstimateData.sample(problem, key).inner_batch(4)
    plain = hg.FiniteDifference(hg.Descent(sgd(0.1), 0), 0.01, 0.1)
    there = hg.Bilevel(inner, outer, batch, x)
    expected = hg.hypergradient(there, plain)(found.w, alpha)
    assert error(found.hypergradient, expected.hypergradient) < 1e-12
    assert (
        error(found.stats["inner_grad_norm"], expected.stats["inner_grad_norm"]) < 1e-9
    )
    assert found.stats["num_grads"] == pytest.approx(2 + 3 * 0.4)


@pytest.mark.parametrize(
    "name", ["ridge per-weight", "logistic scalar", "quadratic nested", "quadratic 0-d"]
)
def test_central_differences_of_whole_runs(name: str):
    """The closed form at convergence, to what differences can do in float64."""
    known = any_known(name)
    found = ask(known, hg.CentralDifference(hg.Newton()))
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-7
    assert not found.stats["trusted"]


def test_central_differences_are_second_order():
    """Error as epsilon^2, on a finite procedure, against reverse mode."""
    known = any_known("logistic per-weight")
    solver = hg.Descent(sgd(0.5), 10)
    exact = ask(known, hg.Unrolled(solver)).hypergradient
    epsilons = np.array([1e-3, 3e-3, 1e-2, 3e-2])
    errors = [
        error(ask(known, hg.CentralDifference(solver, e)).hypergradient, exact)
        for e in epsilons
    ]
    assert slope(epsilons, errors) == pytest.approx(2, abs=0.05)


def test_differences_of_several_losses():
    """K leads."""
    known = quadratic("nested", seed=2)
    problem = two_losses(known, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    exact = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(known.w, known.alpha)
    found = hg.hypergradient(problem, hg.CentralDifference(hg.Newton()))(
        known.w, known.alpha
    )
    assert error(found.hypergradient, exact.hypergradient) < 1e-7
    identity = hg.hypergradient(problem, hg.Implicit(hg.Newton(), hg.Identity()))(
        known.w, known.alpha
    )
    found = hg.hypergradient(problem, hg.FiniteDifference(hg.Newton()))(
        known.w, known.alpha
    )
    assert error(found.hypergradient, identity.hypergradient) < 1e-7


# Evolution.


def test_the_error_of_evolution_falls_as_the_root_of_the_pairs():
    """Root mean square over 40 keys; and the standard error says so."""
    known = any_known("ridge per-weight")
    exact = known.exact(known.alpha)
    counts = np.array([4, 16, 64, 256])
    errors, stated = [], []
    for count in counts:
        estimator = hg.Evolution(hg.Newton(), 1e-3, int(count))
        gradient = hg.hypergradient(known.problem, estimator)
        keys = jax.random.split(jax.random.key(1), 40)
        at = functools.partial(gradient, known.w, known.alpha)
        found = jax.vmap(at)(keys)
        off = np.linalg.norm(found.hypergradient - exact[None], axis=1)
        errors.append(np.sqrt(np.mean(off**2)) / np.linalg.norm(exact))
        size = np.linalg.norm(found.hypergradient, axis=1)
        spread = found.stats["standard_error"] * size
        stated.append(np.sqrt(np.mean(spread**2)) / np.linalg.norm(exact))
    assert slope(counts, errors) == pytest.approx(-0.5, abs=0.08)
    np.testing.assert_allclose(stated, errors, rtol=0.25)


def test_the_bias_of_evolution_is_the_smoothing():
    """M = alpha^4 smoothed by sigma has the derivative 4 alpha^3 + 12 sigma^2 alpha."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2, lambda w, alpha, batch: w**4
    )
    estimator = hg.Evolution(hg.Newton(), 0.5, 40_000)
    found = hg.hypergradient(problem, estimator)(0.0, 1.0)
    smoothed = 4 + 12 * 0.25
    standard_error = float(found.stats["standard_error"])
    assert standard_error < 0.02
    assert abs(found.hypergradient - smoothed) < 4 * standard_error * smoothed


def test_evolution_needs_no_derivative_of_the_metric():
    """Accuracy itself, counted: flat almost everywhere, and still it climbs."""
    x = jnp.linspace(-1, 1, 41)
    labels = (x > 0.3).astype(float)
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    wrong = lambda w, alpha, batch: jnp.mean(((batch["x"] > w) != batch["y"]) * 1.0)
    problem = hg.Bilevel(inner, wrong, None, {"x": x, "y": labels})
    trace = hg.minimize(
        problem, hg.Evolution(hg.Newton(), 0.2, 64), optax.adam(0.05), 0.0, -0.5,
        num_steps=60,
    )  # fmt: skip
    assert trace.value[0] > 0.3
    assert trace.value[-1] < 0.05


# Influence balancing (Vicol et al. 2021): s' = A s + theta z, loss (s[0] - 1)^2 / 2.

SIZE = 23
MATRIX = 0.5 * jnp.eye(SIZE) + 0.5 * jnp.eye(SIZE, k=1)
SIGNS = jnp.where(jnp.arange(SIZE) < 10, 1.0, -1.0)


class Influence:
    """The linear system as an iterative solver; the inner loss is not asked."""

    differentiable = True

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def init(self, inner_loss, w, alpha, data, key):
        return w, ()

    def step(self, inner_loss, carry, alpha, data, key):
        return MATRIX @ carry[0] + alpha * SIGNS, ()

    def solve(self, inner_loss, w, alpha, data, key):
        run = lambda _, w: self.step(None, (w, ()), alpha, None, None)[0]
        w = jax.lax.fori_loop(0, self.num_steps, run, w)
        return w, hg.inner.inner_stats(self.num_steps)


INFLUENCE = hg.Bilevel(
    lambda w, alpha, batch: jnp.sum(w**2), lambda w, alpha, batch: w[0]
)
BALANCED = hg.Bilevel(
    lambda w, alpha, batch: jnp.sum(w**2),
    lambda w, alpha, batch: 0.5 * (w[0] - 1) ** 2,
)


@pytest.mark.parametrize(
    ("last", "derivative"), [(1, 1), (10, 10), (23, 15.486953), (None, -6)]
)
def test_influence_balancing_by_truncation(last, derivative: float):
    """ds[0]/dtheta over the last K steps has the wrong sign; in full it is -6."""
    estimator = hg.Unrolled(Influence(500), truncation_length=last)
    found = hg.hypergradient(INFLUENCE, estimator)(jnp.ones(SIZE), 0.5)
    np.testing.assert_allclose(found.hypergradient, derivative, rtol=1e-6)
    forward = hg.hypergradient(INFLUENCE, hg.Forward(Influence(500)))(
        jnp.ones(SIZE), 0.5
    )
    np.testing.assert_allclose(forward.hypergradient, -6, rtol=1e-6)


def test_persistent_evolution_is_unbiased_where_truncation_is_not():
    """Mean over a run's windows: the derivative of the mean loss at their ends."""
    num_steps, window = 40, 4
    solver = Influence(num_steps)

    def mean_loss(theta):
        w, losses = jnp.ones(SIZE), []
        for step in range(num_steps):
            w = MATRIX @ w + theta * SIGNS
            if (step + 1) % window == 0:
                losses.append(0.5 * (w[0] - 1) ** 2)
        return jnp.mean(jnp.stack(losses))

    exact = jax.grad(mean_loss)(0.5)
    estimator = hg.PersistentEvolution(solver, 0.1, 2000, unroll_length=window)
    state = estimator.init(BALANCED, jnp.ones(SIZE), jnp.asarray(0.5))
    step = jax.jit(functools.partial(estimator.estimate, BALANCED))
    found, num_runs = [], 8
    for i in range(num_runs * num_steps // window):
        estimate, state = step(state, jnp.asarray(0.5), jax.random.key(i))
        found.append(float(estimate.hypergradient))
    per_run = np.mean(np.reshape(found, (num_runs, -1)), axis=1)
    standard_error = np.std(per_run, ddof=1) / np.sqrt(num_runs)
    assert standard_error < 0.1 * abs(exact)
    assert abs(np.mean(per_run) - exact) < 4 * standard_error
    truncated = hg.hypergradient(
        BALANCED, hg.Unrolled(Influence(num_steps), truncation_length=window)
    )
    wrong = truncated(jnp.ones(SIZE), 0.5).hypergradient
    assert abs(wrong - exact) > 0.9 * abs(exact)


def test_persistent_evolution_finds_the_balance():
    """theta* = -1/6, within 0.01; truncation at 1 and 10 moves away from it.

    The paper's rate, pairs, sigma and iterations.
    """
    start, target = 0.5, -1 / 6
    steps, optimizer = 3000, optax.sgd(1e-4)
    persistent = hg.PersistentEvolution(Influence(500), 0.1, 1000, unroll_length=1)
    trace = hg.minimize(
        BALANCED, persistent, optimizer, jnp.ones(SIZE), start, num_steps=steps
    )
    assert abs(trace.alpha - target) < 0.01
    for last in (1, 10):
        truncated = hg.Unrolled(
            Influence(500), truncation_length=last, warm_start=False
        )
        trace = hg.minimize(
            BALANCED, truncated, optimizer, jnp.ones(SIZE), start, num_steps=100
        )
        assert abs(trace.alpha - target) > abs(start - target)


def test_a_window_must_divide_the_run():
    """Refused by name."""
    with pytest.raises(ValueError, match="must divide"):
        hg.PersistentEvolution(hg.Descent(sgd(0.1), 10), unroll_length=3)


def test_particles_need_a_solver_that_goes_step_by_step():
    """Newton does not; that it has no derivative is no matter."""
    with pytest.raises(TypeError, match="does not go step by step"):
        hg.PersistentEvolution(hg.Newton())


@pytest.mark.parametrize(
    "make",
    [
        hg.CentralDifference,
        lambda solver: hg.Evolution(solver, 0.1, 2),
        lambda solver: hg.PersistentEvolution(solver, 0.1, 2, unroll_length=1),
    ],
)
def test_what_nothing_reads_is_refused(make):
    """A misspelt leaf would be noise, or a zero; what the rate reads is not."""
    inner = lambda w, alpha, batch: (w - alpha["target"]) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    estimator = make(hg.Descent(lambda alpha: optax.sgd(alpha["rate"]), 3))
    read = {"target": 1.0, "rate": 0.1}
    hg.hypergradient(problem, estimator)(0.0, read)
    with pytest.raises(ValueError, match=r"reads alpha\['ratee'\]; take it out"):
        hg.hypergradient(problem, estimator)(0.0, read | {"ratee": 0.1})
