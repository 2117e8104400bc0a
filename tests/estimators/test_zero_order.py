"""Tests of penalty, difference and evolution estimators: their rates and limits."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    dense,
    error,
    get_reference,
    quadratic,
    two_losses,
)
from hypergrad.problem import EstimateData
from tests.estimator_cases import (
    counted,
    failed_checks,
    ridge_solution,
    run_estimator,
)
from tests.loops import TO_ZERO

HALF_STEPS = hg.Descent(optax.sgd(0.5), 100)


def fitted_rate(x, y):
    """Returns the slope of log y over log x."""
    return np.polyfit(np.log(x), np.log(y), 1)[0]


# Penalty.


@pytest.mark.parametrize(
    ("name", "symmetric", "rate"),
    [("ridge per-weight", False, -1), ("logistic per-weight", True, -2)],
)
def test_the_bias_of_the_penalty_falls_with_its_strength(name, symmetric, rate):
    """The error falls as 1 / l, and as 1 / l^2 if symmetric."""
    reference = get_reference(name)
    exact, strengths = reference.exact(reference.alpha), np.array([30.0, 100.0, 300.0])
    solver = hg.Descent(optax.sgd(reference.step), 600)
    estimators = [hg.Penalty(solver, l, symmetric=symmetric) for l in strengths]
    errors = [
        error(run_estimator(reference, estimator).hypergradient, exact)
        for estimator in estimators
    ]
    assert fitted_rate(strengths, errors) == pytest.approx(rate, abs=0.1)


def test_the_penalty_takes_no_second_derivative():
    """It works with a loss whose second derivative raises, unlike Implicit."""

    @jax.custom_vjp
    def square(x):
        return 0.5 * x**2

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def raise_error(primals, tangents):
        raise AssertionError("a second derivative was taken")

    square.defvjp(lambda x: (square(x), x), lambda x, ct: (identity(x) * ct,))
    problem = hg.Bilevel(
        lambda w, alpha, batch: square(w - 3 * alpha), lambda w, alpha, batch: square(w)
    )
    estimate = hg.hypergradient(problem, hg.Penalty(HALF_STEPS, 1e3))(0.0, 1.0)
    assert estimate.hypergradient == pytest.approx(9.0, rel=1e-2)
    assert failed_checks(estimate) == {"biased"}
    # JAX may refuse the forward mode of the rule before the rule is differentiated.
    errors, texts = (AssertionError, TypeError), "second derivative|forward-mode"
    with pytest.raises(errors, match=texts):
        hg.hypergradient(problem, hg.Implicit(HALF_STEPS))(0.0, 1.0)


def test_warm_started_penalties_of_several_losses_converge():
    """Each of K losses continues its own two solves, which 15 steps do not finish."""
    reference = quadratic("nested", seed=2)
    w, alpha = reference.w, reference.alpha
    problem = two_losses(reference, lambda w, alpha, batch: jnp.sum(w["b"]["c"]))
    expected = dense(problem, w, alpha)["hypergradient"]
    solver = hg.Descent(optax.sgd(2 / 11), 15)
    estimator = hg.Penalty(solver, 1e3, symmetric=True)
    state, errors = estimator.init(problem, w, alpha), []
    estimate_fn = jax.jit(estimator.estimate)
    for _ in range(4):
        estimate, state = estimate_fn(problem, state, alpha, jax.random.key(0))
        errors.append(error(estimate.hypergradient, expected))
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-4


def test_one_sided_penalties_of_several_losses_equal_the_closed_form():
    """h = l (alpha - t) / (l + 1) for ||w - t||^2 / 2 and ||w - alpha||^2 / 2."""
    inner_loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    losses = tuple(
        lambda w, alpha, batch, t=t: 0.5 * jnp.sum((w - t) ** 2) for t in (1, 2)
    )
    problem, alpha = hg.Bilevel(inner_loss, losses), jnp.array([0.1, -0.4, 3.0])
    estimate = hg.hypergradient(problem, hg.Penalty(HALF_STEPS, 10.0))(
        jnp.zeros(3), alpha
    )
    expected = 10 / 11 * np.stack([alpha - 1, alpha - 2])
    np.testing.assert_allclose(estimate.hypergradient, expected, 1e-9)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_loss_that_is_undefined_leaves_the_others_as_they_are(symmetric):
    """The entropy of ``w`` has no derivative at the zero from which a run starts."""
    inner_loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    outer_loss = lambda w, alpha, batch: jnp.sum(w**2)
    entropy = lambda w, alpha, batch: jnp.sum(w * jnp.log(w))
    estimator = hg.Penalty(hg.Newton(), 100.0, symmetric=symmetric)
    estimate, estimate_of_both = (
        hg.hypergradient(hg.Bilevel(inner_loss, losses), estimator)(
            jnp.zeros(2), jnp.ones(2)
        )
        for losses in (outer_loss, (outer_loss, entropy))
    )
    h = estimate_of_both.hypergradient[0]
    np.testing.assert_allclose(h, estimate.hypergradient, 1e-9)
    assert estimate_of_both.flags["not_converged"]


def test_the_penalty_reports_a_nudged_solve_that_stopped_early():
    """Two Newton steps minimize a quadratic, but not the second of these losses."""
    inner_loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    easy = lambda w, alpha, batch: jnp.sum(w**2)
    hard = lambda w, alpha, batch: jnp.sum(jnp.cosh(3 * w))
    flags = [
        hg.hypergradient(hg.Bilevel(inner_loss, losses), hg.Penalty(solver, 10.0))(
            jnp.zeros(2), jnp.ones(2)
        ).flags["not_converged"]
        for solver, losses in [
            (hg.Newton(max_steps=2), (easy, easy)),
            (hg.Newton(max_steps=2), (easy, hard)),
            (hg.Newton(), (easy, hard)),
        ]
    ]
    assert flags == [False, True, False]


@pytest.mark.parametrize("num_losses", [1, 2])
@pytest.mark.parametrize(
    ("symmetric", "batch_size"),
    [(True, None), (False, 8)],
    ids=["symmetric", "mini-batches"],
)
def test_the_penalty_counts_its_outer_evaluations(symmetric, batch_size, num_losses):
    """Every step of a nudged solve evaluates one outer loss, mini-batch steps too."""
    reference = get_reference("ridge per-weight")
    outer_loss, calls = counted(reference.problem.outer_loss, per_point=True)
    doubled = lambda w, alpha, batch: outer_loss(2 * w, alpha, batch)
    problem = hg.Bilevel(
        reference.problem.inner_loss,
        outer_loss if num_losses == 1 else (outer_loss, doubled),
        hg.Batches(reference.problem.inner_data, batch_size),
        reference.problem.outer_data,
    )
    solver = hg.Descent(optax.sgd(0.1), 7)
    estimator = hg.Penalty(solver, 10.0, symmetric=symmetric)
    estimate = hg.hypergradient(problem, estimator)(reference.w, reference.alpha)
    stats = jax.block_until_ready(estimate).stats
    jax.effects_barrier()
    assert len(calls) == stats["num_outer_grads"] + stats["num_outer_values"]


# Differences.


def test_the_difference_of_gradients_is_the_cross_term():
    """If H = I, FiniteDifference is exact up to epsilon^2 for each of K losses."""
    inner_loss = lambda w, alpha, batch: (
        0.5 * jnp.sum(w**2) - jnp.sum(w * jnp.sin(alpha))
    )
    losses = (
        lambda w, alpha, batch: jnp.sum((w - 1) ** 2) + jnp.sum(alpha),
        lambda w, alpha, batch: jnp.sum(w**3),
    )
    alpha, solver = jnp.array([0.3, 0.7]), hg.Descent(optax.sgd(1.0), 1)
    estimate = hg.hypergradient(
        hg.Bilevel(inner_loss, losses), hg.FiniteDifference(solver)
    )(jnp.zeros(2), alpha)
    w = jnp.sin(alpha)
    expected = jnp.stack([1 + 2 * (w - 1) * jnp.cos(alpha), 3 * w**2 * jnp.cos(alpha)])
    assert error(estimate.hypergradient, expected) < 1e-9
    assert failed_checks(estimate) == {"biased"}


@pytest.mark.parametrize("factor", [1e-30, 1e-22, 1e20, 1e30])
def test_a_finite_difference_has_the_factor_of_the_outer_loss(factor):
    """The square of ``dM/dw`` leaves the range of float32."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2)
    outer = lambda w, alpha, batch: jnp.float32(factor) * 0.5 * jnp.sum(w**2)
    estimator = hg.FiniteDifference(hg.Descent(optax.sgd(1.0), 1))
    args = jnp.float32(0.0), jnp.float32(1.0)
    estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(*args)
    assert error(estimate.hypergradient / jnp.float32(factor), 9.0) < 1e-3


def test_finite_difference_is_a_difference_at_the_solution():
    """Computed by hand, on the batch that was sampled; DARTS takes it at another w."""
    inner_loss = lambda w, alpha, batch: jnp.mean((w - alpha * batch) ** 4)
    outer_loss = lambda w, alpha, batch: jnp.mean(jnp.sin(w - batch)) + alpha**2
    x, key = jnp.linspace(0.5, 2.0, 10), jax.random.key(3)
    problem = hg.Bilevel(inner_loss, outer_loss, hg.Batches(x), x)
    w, alpha, s, length = jnp.asarray(1.0), jnp.asarray(0.7), 0.1, 0.01
    solver = hg.Descent(optax.sgd(s), 1)
    estimator = hg.FiniteDifference(solver, length, s, adjoint_batch_size=4)
    state = estimator.init(problem, w, alpha)
    estimate, _ = jax.jit(estimator.estimate)(problem, state, alpha, key)

    new_w = w - s * jax.grad(inner_loss)(w, alpha, x)
    b = jax.grad(outer_loss)(new_w, alpha, x)
    e = length / jnp.abs(b)
    batch = EstimateData.sample(problem, key).inner_batch(4)
    alpha_grad_fn = lambda w: jax.grad(inner_loss, 1)(w, alpha, batch)
    difference = alpha_grad_fn(new_w + e * b) - alpha_grad_fn(new_w - e * b)
    expected = 2 * alpha - s * difference / (2 * e)
    assert error(estimate.hypergradient, expected) < 1e-12
    inner_grad = jax.grad(inner_loss)(new_w, alpha, batch)
    assert error(estimate.stats["inner_grad_norm"], jnp.abs(inner_grad)) < 1e-9
    assert estimate.stats["num_grads"] == pytest.approx(1 + 3 * 0.4)


@pytest.mark.parametrize(
    ("dtype", "unit", "epsilon", "is_resolved"),
    [
        ("float32", 1.0, 0.01, True),
        ("float32", 1e6, 0.01, False),  # entries of w are rounded to 0.06
        ("float32", 1e6, None, True),
        ("bfloat16", 1.0, 0.01, False),
        ("bfloat16", 1.0, None, True),
        ("float16", 1.0, 0.01, False),
    ],
)
def test_a_step_that_rounding_changes_is_flagged(dtype, unit, epsilon, is_resolved):
    """Otherwise the indirect term, here all of the hypergradient, is about zero."""
    target = unit * (1 + jax.random.normal(jax.random.key(0), (400,)))
    target = target.astype(dtype)
    problem = hg.Bilevel(
        lambda w, alpha, t: 0.5 * jnp.sum((w - alpha * t) ** 2),
        lambda w, alpha, t: 0.5 * jnp.mean((w / unit - 1) ** 2),
        target,
    )
    estimator = hg.FiniteDifference(hg.Descent(optax.sgd(1.0), 1), epsilon)
    w, alpha = jnp.zeros(400, dtype), jnp.asarray(2.0, dtype)
    estimate = hg.hypergradient(problem, estimator)(w, alpha)
    unresolved = set() if is_resolved else {"unresolved_step"}
    assert failed_checks(estimate) == {"biased"} | unresolved
    t = np.asarray(target, float) / unit
    expected = np.mean(t * (2 * t - 1))
    relative = abs(float(estimate.hypergradient) / expected - 1)
    assert relative < 0.05 if is_resolved else relative > 0.05


def test_a_run_that_diverged_says_nothing_about_the_step():
    """Its numbers are not finite, which is the reason to look at."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.sum(w**2),
    )
    solver = hg.Descent(optax.sgd(1e30), 20)
    estimate = hg.hypergradient(problem, hg.FiniteDifference(solver))(1.0, 2.0)
    assert failed_checks(estimate) == {"biased", "not_finite"}


def test_the_coarsest_of_several_losses_decides_a_step():
    """The values of all losses are stacked in the longest dtype."""
    inner = lambda w, alpha, x: 0.5 * jnp.mean((w - alpha * x) ** 2)
    loss = lambda w, alpha, x: 0.5 * jnp.mean((w - x) ** 2)
    coarse = lambda *args: loss(*args).astype(jnp.float32)
    x, estimator = jnp.array([1.0, 2.0, 4.0]), hg.CentralDifference(hg.Newton())
    both, alone = (
        hg.hypergradient(hg.Bilevel(inner, outer, x, x), estimator)(0.0, 2.0)
        for outer in ((loss, coarse), coarse)
    )
    assert error(both.hypergradient[1], alone.hypergradient) < 1e-6
    assert error(both.hypergradient, np.full(2, np.mean(x) ** 2)) < 1e-4


def test_the_error_of_central_differences_is_second_order():
    """On a finite run the error against reverse mode falls as epsilon^2."""
    reference = get_reference("logistic per-weight")
    solver = hg.Descent(optax.sgd(0.5), 10)
    exact = run_estimator(reference, hg.Unrolled(solver)).hypergradient
    epsilons = np.array([1e-3, 3e-3, 1e-2, 3e-2])
    estimates = [
        run_estimator(reference, hg.CentralDifference(solver, epsilon))
        for epsilon in epsilons
    ]
    errors = [error(estimate.hypergradient, exact) for estimate in estimates]
    assert fitted_rate(epsilons, errors) == pytest.approx(2, abs=0.05)
    assert failed_checks(estimates[0]) == {"difference_error"}
    num_runs = 2 * reference.alpha.size + 1
    assert estimates[0].stats["num_grads"] == 10 * num_runs + 1
    assert estimates[0].stats["num_outer_values"] == num_runs


# Evolution.


def test_evolution_has_the_error_of_gaussian_samples():
    """The relative error is sqrt((N + 1) / n), and the standard error estimates it."""
    reference, num_pairs = get_reference("ridge per-weight"), 8
    exact = np.asarray(reference.exact(reference.alpha))
    solver = hg.ClosedForm(ridge_solution)
    estimator = hg.Evolution(solver, 1e-3, num_pairs)
    hypergradient_fn = functools.partial(
        hg.hypergradient(reference.problem, estimator), reference.w, reference.alpha
    )
    estimates = jax.vmap(hypergradient_fn)(jax.random.split(jax.random.key(1), 1000))
    root_mean_square = lambda x: np.sqrt(np.mean(np.square(x)))
    samples = np.asarray(estimates.hypergradient)
    deviations = np.linalg.norm(samples - exact, axis=1)
    norms = np.linalg.norm(samples, axis=1)
    actual = root_mean_square(deviations) / np.linalg.norm(exact)
    assert actual == pytest.approx(np.sqrt((exact.size + 1) / num_pairs), rel=0.08)
    estimated = root_mean_square(estimates.stats["standard_error"] * norms)
    assert estimated / np.linalg.norm(exact) == pytest.approx(actual, rel=0.1)


def test_the_bias_of_evolution_is_the_smoothing():
    """M = alpha^4 smoothed by sigma has the derivative 4 alpha^3 + 12 sigma^2 alpha."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2, lambda w, alpha, batch: w**4
    )
    solver = hg.ClosedForm(lambda alpha, batch: alpha)
    estimator = hg.Evolution(solver, 0.5, 40_000)
    estimate = hg.hypergradient(problem, estimator)(0.0, 1.0)
    expected = 4 + 12 * 0.25
    standard_error = float(estimate.stats["standard_error"])
    assert standard_error < 0.02
    assert abs(estimate.hypergradient - expected) < 4 * standard_error * expected
    assert failed_checks(estimate) == {"random"}


def test_evolution_climbs_a_counted_accuracy():
    """The derivative of a metric that is constant almost everywhere is not zero."""
    x = jnp.linspace(-1, 1, 41)
    error_rate = lambda w, alpha, batch: jnp.mean((batch["x"] > w) != batch["y"]) * 1.0
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2,
        error_rate,
        outer_data={"x": x, "y": x > 0.3},
    )
    solver = hg.ClosedForm(lambda alpha, batch: alpha)
    estimate = hg.hypergradient(problem, hg.Evolution(solver, 0.2, 256))(0.0, -0.2)
    assert estimate.value == pytest.approx(0.25, abs=0.03)
    # 41 points on [-1, 1]: the error rate changes by 1/2 per unit of w.
    assert estimate.hypergradient == pytest.approx(-0.5, abs=0.1)


# Influence balancing (Vicol et al. 2021): s' = A s + theta z, loss (s[0] - 1)^2 / 2.

SIZE = 23
MATRIX = 0.5 * jnp.eye(SIZE) + 0.5 * jnp.eye(SIZE, k=1)
SIGNS = jnp.where(jnp.arange(SIZE) < 10, 1.0, -1.0)


class LinearSystem:
    """The linear system as an iterative solver, which ignores the inner loss."""

    differentiable = True

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def init(self, inner_loss, w, alpha, data, key):
        return w, ()

    def step(self, inner_loss, carry, alpha, data, key):
        return MATRIX @ carry[0] + alpha * SIGNS, ()

    def solve(self, inner_loss, w, alpha, data, key):
        body_fun = lambda _, w: self.step(None, (w, ()), alpha, None, None)[0]
        w = jax.lax.fori_loop(0, self.num_steps, body_fun, w)
        return w, hg.inner.inner_stats(self.num_steps)


FIRST_STATE = hg.Bilevel(
    lambda w, alpha, batch: jnp.sum(w**2), lambda w, alpha, batch: w[0]
)
BALANCED_STATE = hg.Bilevel(
    lambda w, alpha, batch: jnp.sum(w**2),
    lambda w, alpha, batch: 0.5 * (w[0] - 1) ** 2,
)


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [
        pytest.param(hg.Unrolled(LinearSystem(500), 1), 1, id="last step"),
        pytest.param(hg.Unrolled(LinearSystem(500), 10), 10, id="last 10"),
        pytest.param(hg.Unrolled(LinearSystem(500), 23), 15.486953, id="last 23"),
        pytest.param(hg.Unrolled(LinearSystem(500)), -6, id="all, reverse mode"),
        pytest.param(hg.Forward(LinearSystem(500)), -6, id="all, forward mode"),
    ],
)
def test_truncated_derivatives_of_influence_balancing(estimator, derivative):
    """d s[0] / d theta over the last K steps has the wrong sign; in full it is -6."""
    estimate = hg.hypergradient(FIRST_STATE, estimator)(jnp.ones(SIZE), 0.5)
    np.testing.assert_allclose(estimate.hypergradient, derivative, rtol=1e-6)
    is_truncated = getattr(estimator, "is_truncated", False)
    assert failed_checks(estimate) == ({"truncated"} if is_truncated else set())


def test_persistent_evolution_has_no_truncation_bias():
    """The mean over an unroll estimates the derivative of the mean of its losses."""
    num_steps, unroll_length, num_unrolls = 40, 4, 8
    num_parts = num_steps // unroll_length

    def mean_loss(theta):
        step = lambda w, _: (MATRIX @ w + theta * SIGNS,) * 2
        _, states = jax.lax.scan(step, jnp.ones(SIZE), length=num_steps)
        last_states = states[unroll_length - 1 :: unroll_length]
        return jnp.mean(0.5 * (last_states[:, 0] - 1) ** 2)

    exact = jax.grad(mean_loss)(0.5)
    estimator = hg.PersistentEvolution(
        LinearSystem(num_steps), 0.1, 2000, unroll_length=unroll_length
    )
    init_state = estimator.init(BALANCED_STATE, jnp.ones(SIZE), jnp.asarray(0.5))

    @jax.jit
    def run(keys):
        def estimate_part(state, key):
            estimate, state = estimator.estimate(
                BALANCED_STATE, state, jnp.asarray(0.5), key
            )
            return state, estimate.hypergradient

        return jax.lax.scan(estimate_part, init_state, keys)[1]

    estimates = run(jax.random.split(jax.random.key(0), num_unrolls * num_parts))
    per_unroll = np.mean(np.reshape(estimates, (num_unrolls, num_parts)), axis=1)
    standard_error = np.std(per_unroll, ddof=1) / np.sqrt(num_unrolls)
    assert standard_error < 0.1 * abs(exact)
    assert abs(np.mean(per_unroll) - exact) < 4 * standard_error


# Invalid input.


def test_persistent_evolution_checks_its_solver():
    """The solver needs steps, and the unroll length must divide their number."""
    with pytest.raises(ValueError, match="unroll_length"):
        hg.PersistentEvolution(hg.Descent(optax.sgd(0.1), 10), unroll_length=3)
    with pytest.raises(TypeError, match="solver"):
        hg.PersistentEvolution(hg.Newton())


@pytest.mark.parametrize(
    "make_estimator",
    [hg.CentralDifference, hg.Evolution, hg.PersistentEvolution],
    ids=lambda kind: kind.__name__,
)
def test_unused_hyperparameters_raise(make_estimator):
    """A leaf that nothing uses is an error; the optimizer may use it."""
    inner_loss = lambda w, alpha, batch: (w - alpha["target"]) ** 2
    problem = hg.Bilevel(inner_loss, lambda w, alpha, batch: w**2)
    estimator = make_estimator(hg.Descent(lambda alpha: optax.sgd(alpha["rate"]), 3))
    w, alpha = jnp.zeros(()), {"target": jnp.ones(()), "rate": jnp.asarray(0.1)}
    estimator.init(problem, w, alpha)
    with pytest.raises(ValueError, match=r"alpha\['unused'\]"):
        estimator.init(problem, w, alpha | {"unused": jnp.ones(())})


def test_penalty_refuses_a_solver_that_ignores_its_loss():
    with pytest.raises(TypeError, match="ClosedForm, which ignores it"):
        hg.Penalty(hg.ClosedForm(lambda alpha, batch: 3 * alpha), 100.0)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("strength", lambda x: hg.Penalty(hg.Newton(), x)),
        ("sigma", lambda x: hg.Evolution(hg.Newton(), x)),
        ("sigma", lambda x: hg.PersistentEvolution(hg.Descent(optax.sgd(0.1), 2), x)),
        ("epsilon", lambda x: hg.CentralDifference(hg.Newton(), x)),
        ("epsilon", lambda x: hg.FiniteDifference(hg.Newton(), x)),
    ],
)
def test_lengths_of_zero_are_refused(name, make):
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        make(0.0)


def test_persistent_evolution_counts_all_gradients_of_a_step():
    """Two particles make four steps of three gradients, and one gradient checks w."""

    class Three(hg.Descent):
        grads_per_step = 3

    estimator = hg.PersistentEvolution(Three(optax.sgd(0.1), 4), 0.1, 1, 4)
    estimate = hg.hypergradient(TO_ZERO, estimator)(0.0, 1.0)
    assert estimate.stats["num_grads"] == 2 * 4 * 3 + 1


def count_newton_products(outer_loss):
    """Returns the products of `Penalty` on a quadratic with condition 100."""
    curvatures = jnp.logspace(0, 2, 40)
    problem = hg.Bilevel(
        lambda w, alpha, batch: (
            0.5 * jnp.sum(curvatures * w**2) - jnp.sum(w * jnp.exp(alpha))
        ),
        outer_loss,
    )
    estimator = hg.Penalty(hg.Newton(), 1.0)
    estimate = hg.hypergradient(problem, estimator)(jnp.zeros(40), jnp.zeros(40))
    return estimate.stats["num_hvps"]


def test_the_nudged_solves_of_several_losses_count_one_by_one():
    """They are made one after the other, each with as many products as it needs."""
    losses = lambda w, alpha, batch: w[0], lambda w, alpha, batch: jnp.sum(w**2)
    num_shared = count_newton_products(lambda w, alpha, batch: 0 * w[0]) / 2
    num_nudged = [count_newton_products(loss) - num_shared for loss in losses]
    assert num_nudged[0] != num_nudged[1]
    assert count_newton_products(losses) == num_shared + sum(num_nudged)


@pytest.mark.parametrize("sigma", [0.01, 10.0])
@pytest.mark.parametrize("name", ["Evolution", "PersistentEvolution"])
def test_the_standard_error_is_nan_below_the_rounding_of_alpha(name, sigma):
    """In bfloat16, 30 + sigma e rounds to 30 for a small sigma."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w - alpha["a"].astype(jnp.float32)) ** 2),
        lambda w, alpha, batch: jnp.sum(w * alpha["b"]),
    )
    # Both leaves in one vector are float32.
    alpha = {"a": jnp.full(3, 30, jnp.bfloat16), "b": jnp.ones((), jnp.float32)}
    estimator = getattr(hg, name)(hg.Descent(optax.sgd(0.5), 1), sigma, 4)
    estimate = hg.hypergradient(problem, estimator)(jnp.zeros(3, jnp.float32), alpha)
    assert jnp.isnan(estimate.stats["standard_error"]) == (sigma < 0.1)


class DescentToTolerance(eqx.Module):
    """Descends until the gradient is small, and counts the steps that are executed."""

    count_step: Callable

    def solve(self, loss, w, alpha, data, key):
        grad_fn = jax.grad(loss)

        def body_fun(carry):
            w, num_steps = carry
            jax.debug.callback(self.count_step, w)
            return w - 0.1 * grad_fn(w, alpha, data), num_steps + 1

        cond_fun = lambda carry: jnp.abs(grad_fn(carry[0], alpha, data)) > 1e-3
        w, num_steps = jax.lax.while_loop(cond_fun, body_fun, (w, 0))
        return w, hg.inner.inner_stats(num_steps, num_grads=num_steps)


def test_a_batch_of_perturbed_runs_counts_as_often_as_its_slowest():
    """The runs of a batch stop together, after the slowest of them."""
    num_calls = 0

    def count_step(w):
        nonlocal num_calls
        num_calls += 1

    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha) ** 2, lambda w, alpha, batch: w**2
    )
    estimator = hg.Evolution(DescentToTolerance(count_step), 0.5, 4)
    estimate = hg.hypergradient(problem, estimator)(0.0, 1.0)
    jax.block_until_ready(estimate)
    jax.effects_barrier()
    assert estimate.stats["num_grads"] == num_calls + 1  # and one checks w


@pytest.mark.parametrize(
    "estimator",
    [
        hg.Penalty(hg.Newton(), np.float32(100)),
        hg.Evolution(hg.Newton(), np.float32(0.1), 4),
        hg.PersistentEvolution(hg.Descent(optax.sgd(0.1), 8), np.float32(0.1), 4, 2),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_number_of_numpy_does_not_widen_the_hypergradient(estimator):
    problem = hg.Bilevel(
        lambda w, alpha, batch: (w - alpha.astype(jnp.float32)) ** 2,
        lambda w, alpha, batch: w**2,
    )
    trace = hg.minimize(
        problem,
        estimator,
        optax.sgd(0.1),
        jnp.float32(0),
        jnp.ones((), jnp.bfloat16),
        num_steps=2,
    )
    assert trace.status == "completed"
    assert trace.alpha.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "num_runs"),
    [
        (hg.CentralDifference, 3),
        (lambda solver: hg.Evolution(solver, 0.1, 1000), 2001),
        (lambda solver: hg.PersistentEvolution(solver, 0.1, 1000, 1), 2000),
    ],
    ids=["CentralDifference", "Evolution", "PersistentEvolution"],
)
def test_an_inner_loss_without_a_gradient_has_no_norm_of_it(make, num_runs):
    """A loop of unknown length; the formula of the minimum counts as a gradient."""

    def inner(w, alpha, batch):
        add = lambda carry: (carry[0] + (w - alpha) ** 2, carry[1] + 1)
        return jax.lax.while_loop(lambda carry: carry[1] < 3, add, (0.0 * w, 0))[0]

    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    estimator = make(hg.ClosedForm(lambda alpha, batch: alpha))
    estimate = hg.hypergradient(problem, estimator)(0.0, 1.0)
    np.testing.assert_allclose(estimate.hypergradient, 2.0, rtol=0.2)
    assert np.isnan(estimate.stats["inner_grad_norm"])
    assert estimate.stats["num_grads"] == num_runs
