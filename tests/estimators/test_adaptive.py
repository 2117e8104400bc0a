"""`Implicit(rtol=...)`: the tolerance is met, at the cost that is reported."""

import bisect
import functools

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    cast,
    error,
    get_reference,
    quadratic,
    two_losses,
)
from hypergrad.implicit.differentiation import Point, implicit_hypergradient
from hypergrad.problem import EstimateData
from hypergrad.trees import relative_error
from tests.estimator_cases import (
    RIDGE,
    RIDGE_DATA,
    counting_problem,
    failed_checks,
    grazzi,
    ridge_outer,
    ridge_penalty,
)
from tests.random_problems import (
    LOSSES,
    dense_hypergradient,
    max_curvature,
    random_problem,
)

LOGISTIC = get_reference("logistic per-weight")
DESCENT = hg.Descent(optax.sgd(LOGISTIC.step), 1000)
MAX_STEPS = 3000


@jax.jit
def estimate(estimator, problem, state, alpha, key):
    """One program for all tests with the same losses, solver and shapes."""
    return estimator.estimate(problem, state, alpha, key)


def run_estimator(problem, estimator, w, alpha, key=None):
    """Returns a first estimate."""
    key = jax.random.key(0) if key is None else key
    state = estimator.init(problem, w, alpha)
    return estimate(estimator, problem, state, alpha, key)[0]


def is_wrongly_trusted(estimate, exact, rtol):
    return bool(estimate.trusted) and error(estimate.hypergradient, exact) > rtol


# The tolerance on random problems.


def with_rate_in_alpha(problem):
    """Returns the problem with the learning rate of the inner solver in alpha."""
    inner, outer = problem.inner_loss, problem.outer_loss
    return hg.Bilevel(
        lambda w, alpha, batch: inner(w, alpha["alpha"], batch),
        lambda w, alpha, batch: outer(w, alpha["alpha"], batch) + 0 * alpha["rate"],
        problem.inner_data,
        problem.outer_data,
    )


RATE_OF_ALPHA = hg.Descent(lambda alpha: optax.sgd(alpha["rate"]), MAX_STEPS)


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.vmap, in_axes=(0, None, None, None))
def estimate_random_problem(key, kind, num_newton_steps, rtol):
    problem, w, alpha = random_problem(key, kind)
    rate = 1 / max_curvature(problem, w, alpha)
    estimator = hg.Implicit(RATE_OF_ALPHA, num_newton_steps=num_newton_steps, rtol=rtol)
    gradient_fn = hg.hypergradient(with_rate_in_alpha(problem), estimator)
    result = gradient_fn(w, {"alpha": alpha, "rate": rate}, key)
    is_minimum, exact = dense_hypergradient(problem, result.w, alpha)
    return {
        "is_minimum": is_minimum,
        "error": relative_error(result.hypergradient["alpha"], exact),
        "error_estimate": result.stats["error_estimate"],
        "trusted": result.trusted,
    }


@pytest.mark.parametrize(
    ("kinds", "num_problems", "num_newton_steps", "rtol"),
    [
        pytest.param(("logistic",), 30, 1, 1e-2, id="30 logistic problems"),
        pytest.param(tuple(LOSSES), 250, 1, 1e-2, id="1e-2", marks=pytest.mark.slow),
        pytest.param(tuple(LOSSES), 250, 2, 1e-4, id="1e-4", marks=pytest.mark.slow),
    ],
)
def test_adaptive_estimates_meet_their_tolerance(
    kinds, num_problems, num_newton_steps, rtol
):
    """Trusted estimates are right, and most estimates are trusted."""
    keys = jax.random.split(jax.random.key(0), num_problems)
    results = [
        estimate_random_problem(keys, kind, num_newton_steps, rtol) for kind in kinds
    ]
    results = jax.tree.map(lambda *columns: np.concatenate(columns), *results)
    is_minimum = results["is_minimum"]
    results = {name: column[is_minimum] for name, column in results.items()}
    true, trusted = results["error"], results["trusted"]
    assert np.mean(is_minimum) > 0.6
    assert np.mean(true[trusted] < 2 * rtol) >= 0.99
    assert np.mean(trusted[true < rtol / 5]) >= 0.9
    assert np.mean(trusted) >= 0.9
    assert np.median(results["error_estimate"][trusted] / true[trusted]) > 1


# Inner steps and a Newton step on the problem of Grazzi et al. 2020. The evaluations of
# the inner loss are counted.

GRAZZI_SOLVER = hg.Descent(optax.sgd(0.1), 1000)


@functools.cache
def counted_grazzi():
    """Returns the problem and the list of the evaluations of its inner loss."""
    return counting_problem(grazzi()[0])


def run_on_grazzi(rtol, state=None, alpha=None, seed=0):
    """Returns the estimate and the next state."""
    (reference, _), (problem, _) = grazzi(), counted_grazzi()
    estimator = hg.Implicit(GRAZZI_SOLVER, num_newton_steps=1, rtol=rtol)
    alpha = reference.alpha if alpha is None else alpha
    state = estimator.init(problem, reference.w, alpha) if state is None else state
    return estimate(estimator, problem, state, alpha, jax.random.key(seed))


def test_every_estimate_of_a_run_meets_its_tolerance():
    """Later estimates of a moving alpha start warm and need fewer steps."""
    reference, _ = grazzi()
    alpha, state, num_steps = reference.alpha, None, []
    for seed in range(5):
        result, state = run_on_grazzi(1e-3, state, alpha, seed)
        assert result.trusted
        assert error(result.hypergradient, reference.exact(alpha)) <= 1e-3
        num_steps.append(float(result.stats["num_inner_steps"]))
        alpha = alpha - result.hypergradient
    assert max(num_steps[1:]) < num_steps[0]


def test_each_estimate_has_the_tolerance_of_its_number():
    """The last tolerance holds for all further estimates."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum(jnp.cosh(w - alpha)),
        lambda w, alpha, batch: jnp.sum((w - 2.0) ** 2),
    )
    w, alpha, key = jnp.zeros(2), jnp.ones(2), jax.random.key(0)
    solver = hg.Descent(optax.sgd(0.05), 1000)

    def run_with(rtols, state):
        estimator = hg.Implicit(solver, rtol=jnp.asarray(rtols), warm_start=False)
        return estimate(estimator, problem, state, alpha, key)

    estimator = hg.Implicit(solver, rtol=jnp.full(2, 0.1), warm_start=False)
    state = estimator.init(problem, w, alpha)
    for rtol in (1e-1, 1e-6, 1e-6):
        expected, _ = run_with([rtol, rtol], state)
        actual, state = run_with([1e-1, 1e-6], state)
        chex.assert_trees_all_equal(actual.stats, expected.stats)
        is_tight = rtol < 1e-2
        assert (expected.stats["error_estimate"] < 1e-5) == is_tight


def test_cost_equals_the_evaluations_of_the_inner_loss():
    """Steps, checks of the gradient, Newton steps and adjoint solves are counted.

    Products in one batch evaluate the loss once: in each adjoint solve two columns of
    ``J`` and two at the corrected point, and from the second one the three previous
    solutions.
    """
    _, calls = counted_grazzi()
    jax.effects_barrier()
    calls.clear()
    result, _ = jax.block_until_ready(run_on_grazzi(1e-4))
    jax.effects_barrier()
    num_rounds = result.stats["num_outer_grads"] / 2
    num_batched = num_rounds * 2 * (2 - 1) + (num_rounds - 1) * (3 - 1)
    counted = result.stats["num_grads"] + result.stats["num_hvps"]
    assert counted == len(calls) + num_batched


def min_cost(max_error):
    """Returns the lowest cost of `Implicit` with an error of at most ``max_error``.

    The minimum is over the number of inner steps and the tolerance of the adjoint.
    """
    reference, exact = grazzi()
    problem, alpha = reference.problem, reference.alpha

    @jax.jit
    def trajectory():
        def step(w, _):
            w = w - 0.1 * jax.grad(problem.inner_loss)(w, alpha, problem.inner_data)
            return w, w

        return jax.lax.scan(step, reference.w, length=MAX_STEPS)[1]

    @jax.jit
    def differentiate(w, rtol):
        point = Point(problem, w, alpha, problem.inner_data, problem.outer_data)
        result = implicit_hypergradient(point, hg.CG(rtol), jnp.zeros_like(w))
        return result.hypergradient, result.linear_stats["num_products"]

    points, costs = trajectory(), []
    for rtol in 10.0 ** -np.arange(5, 12):
        is_enough = lambda i, rtol=rtol: (
            error(differentiate(points[i], rtol)[0], exact) <= max_error
        )
        if is_enough(MAX_STEPS - 1):
            i = bisect.bisect_left(range(MAX_STEPS), True, key=is_enough)
            num_products = float(differentiate(points[i], rtol)[1])
            costs.append(i + 1 + 2 * num_products + 2)
    return min(costs)


def test_adaptive_estimate_costs_no_more_than_the_best_settings():
    """At most 1.1 of the best plain solves with the same true error.

    Nobody knows the settings of those; their error is not estimated, and `CG` has no
    scaling to find, as all eigenvalues are alike.
    """
    result, _ = run_on_grazzi(1e-6)
    true = error(result.hypergradient, grazzi()[1])
    assert result.trusted
    assert true <= 1e-6
    assert 0.5 * true <= result.stats["error_estimate"] <= 1e-6
    assert result.stats["gradient_equivalents"] <= 1.1 * min_cost(true)


def test_new_numbers_compile_nothing():
    """Neither the state after an estimate nor another ``rtol`` is traced again."""
    _, state = run_on_grazzi(1e-2)
    num_programs = estimate._cache_size()
    for seed, rtol in enumerate((1e-3, np.float64(1e-4))):
        _, state = run_on_grazzi(rtol, state, seed=seed)
    assert estimate._cache_size() == num_programs


# Ridge regression whose solution is linear in alpha, and is zero for alpha = 0.

SCALED_X = jax.random.normal(jax.random.key(0), (50, 10))
SCALED_Y = SCALED_X @ jnp.arange(10.0)


def scaled_inner(w, alpha, batch):
    residual = SCALED_X @ w - alpha * SCALED_Y
    return 0.5 * jnp.mean(residual**2) + 0.05 * jnp.sum(w**2)


SCALED_PROBLEM = hg.Bilevel(
    scaled_inner, lambda w, alpha, batch: jnp.mean((SCALED_X @ w - SCALED_Y) ** 2)
)


def scaled_solution(alpha):
    matrix = SCALED_X.T @ SCALED_X / 50 + 0.1 * jnp.eye(10)
    return jnp.linalg.solve(matrix, SCALED_X.T @ (alpha * SCALED_Y) / 50)


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_start_at_the_argmin_takes_no_more_steps_than_a_far_start(alpha):
    """The gradient at the start is rounding, or zero, which is no scale for others."""

    def num_steps(w):
        trace = hg.minimize(
            SCALED_PROBLEM, hg.Implicit(hg.Descent(optax.sgd(0.2), 2000), rtol=1e-3),
            optax.adam(0.02), w, jnp.asarray(alpha), num_steps=5,
        )  # fmt: skip
        assert np.all(trace.stats["trusted"])
        return np.sum(trace.stats["num_inner_steps"])

    assert num_steps(scaled_solution(alpha)) <= num_steps(jnp.full(10, 10.0))


def test_no_round_repeats_a_solve_that_cannot_change():
    """The steps are used up after the first round, whose adjoint is accurate."""
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.2), 5), rtol=1e-3)
    result = run_estimator(SCALED_PROBLEM, estimator, jnp.zeros(10), jnp.asarray(0.5))
    assert failed_checks(result) == {"inner_error"}
    assert result.stats["num_outer_grads"] == 2  # of one round


# Other configurations.

NESTED = quadratic("nested", seed=1)
NO_STEPS = hg.Descent(optax.sgd(0.1), 0)


def test_decreasing_tolerances_of_hoag_halve_the_inner_steps():
    """``1e-2 / k^2`` against 1e-10 throughout, both to a suboptimality of 1e-3."""
    schedule = 1e-2 / jnp.arange(1.0, 31.0) ** 2

    def run(rtol):
        trace = hg.minimize(
            LOGISTIC.problem, hg.Implicit(DESCENT, rtol=rtol), optax.sgd(3.0),
            LOGISTIC.w, LOGISTIC.alpha, num_steps=30,
        )  # fmt: skip
        assert np.all(trace.stats["error_estimate"] <= rtol)
        return trace

    inexact, exact = run(schedule), run(jnp.full(30, 1e-10))
    best_value = exact.value.min()

    def num_steps_to_optimum(trace):
        gap = (trace.value - best_value) / (exact.value[0] - best_value)
        first = int(np.argmax(np.asarray(gap) < 1e-3))
        assert first > 3
        return float(np.sum(trace.stats["num_inner_steps"][: first + 1]))

    assert num_steps_to_optimum(inexact) <= 0.5 * num_steps_to_optimum(exact)


@pytest.mark.parametrize(
    ("solver", "rtol"),
    [(hg.ClosedForm(lambda alpha, batch: NESTED.w), 1e-8), (NO_STEPS, 1e-6)],
    ids=["runs once", "no steps"],
)
def test_newton_steps_meet_the_tolerance(solver, rtol):
    """Two losses of a tree, the second one without w, from the starting point."""
    reference = NESTED
    problem = two_losses(reference, lambda w, alpha, batch: alpha["a"] ** 2)
    estimator = hg.Implicit(solver, num_newton_steps=1, rtol=rtol)
    result = run_estimator(problem, estimator, reference.w, reference.alpha)
    assert result.trusted
    first, second = (
        jax.tree.map(lambda leaf, k=k: leaf[k], result.hypergradient) for k in (0, 1)
    )
    assert error(first, reference.exact(reference.alpha)) <= rtol
    assert second["a"] == 2 * reference.alpha["a"]


def test_single_precision_is_kept():
    """Under x64, float32 arguments give a float32 estimate that meets 1e-3."""
    problem, w, alpha = cast((LOGISTIC.problem, LOGISTIC.w, LOGISTIC.alpha), "float32")
    estimator = hg.Implicit(DESCENT, num_newton_steps=1, rtol=1e-3)
    result = run_estimator(problem, estimator, w, alpha)
    assert result.hypergradient.dtype == jnp.float32
    assert result.trusted
    assert error(result.hypergradient, LOGISTIC.exact(LOGISTIC.alpha)) <= 1e-3


@pytest.mark.parametrize(
    "linear_solver",
    [hg.NystromCG(5), hg.CG(preconditioner=lambda r: 2 * r)],
    ids=["NystromCG", "preconditioned CG"],
)
def test_inner_steps_do_not_stop_at_the_rounding_in_other_units(linear_solver):
    """Curvatures 1000 and 1 in float32: scaled coordinates have the curvature 1."""
    curvatures = jnp.array([1e3] + 9 * [1.0], jnp.float32)
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * jnp.sum(curvatures * (w - jnp.sin(alpha)) ** 2),
        lambda w, alpha, batch: 0.5 * jnp.sum((w - 0.3) ** 2),
    )
    solver = hg.Descent(optax.sgd(1e-3), 40_000)
    estimator = hg.Implicit(solver, linear_solver, rtol=1e-2)
    alpha = jnp.linspace(0.2, 1, 10, dtype=jnp.float32)
    result = run_estimator(problem, estimator, jnp.full_like(alpha, 30.0), alpha)
    expected = (jnp.sin(alpha) - 0.3) * jnp.cos(alpha)
    assert result.trusted
    assert error(result.hypergradient, expected) <= 1e-2


def test_certificate_has_the_same_tolerance():
    """With ``certify=True`` an error of 10% is trusted if ``rtol`` is 30%."""
    solver = hg.Descent(optax.sgd(0.05 * LOGISTIC.step), 2000)
    estimator = hg.Implicit(solver, rtol=0.3, certify=True)
    result = run_estimator(LOGISTIC.problem, estimator, LOGISTIC.w, LOGISTIC.alpha)
    assert set(result.flags) == {"certificate"}
    assert 1e-2 < result.stats["error_estimate"] <= 0.3
    assert result.trusted


def test_interrupted_steps_are_the_beginning_of_a_whole_run():
    """Mini-batches and momentum, against a loop over the keys of the solver."""
    train = hg.Batches(RIDGE_DATA[0], batch_size=20)
    problem = hg.Bilevel(ridge_penalty, ridge_outer, train, RIDGE_DATA[1])
    optimizer, key = optax.sgd(0.05, momentum=0.5), jax.random.key(3)
    estimator = hg.Implicit(hg.Descent(optimizer, 500), rtol=0.5)
    result = run_estimator(problem, estimator, RIDGE.w, RIDGE.alpha, key)
    num_steps = int(result.stats["num_inner_steps"])
    assert 0 < num_steps < 500

    @jax.jit
    def step(w, state, step_key):
        grad = jax.grad(ridge_penalty)(w, RIDGE.alpha, train.sample(step_key))
        updates, state = optimizer.update(grad, state)
        return optax.apply_updates(w, updates), state

    _, steps_key = jax.random.split(EstimateData.sample(problem, key).solver_key)
    w, state = RIDGE.w, optimizer.init(RIDGE.w)
    for step_key in jax.random.split(steps_key, 500)[:num_steps]:
        w, state = step(w, state, step_key)
    chex.assert_trees_all_close(result.w, w, rtol=1e-9)


@pytest.mark.slow
def test_adam_with_warm_starts_is_right_where_trusted():
    """Ten estimates of a moving alpha, each from the previous solution."""
    reference, _ = grazzi()
    estimator = hg.Implicit(hg.Descent(optax.adam(0.03), 1000), rtol=1e-2)
    state = estimator.init(reference.problem, reference.w, reference.alpha)
    alpha, num_trusted = reference.alpha, 0
    for seed in range(10):
        key = jax.random.key(seed)
        result, state = estimate(estimator, reference.problem, state, alpha, key)
        num_trusted += bool(result.trusted)
        assert not is_wrongly_trusted(result, reference.exact(alpha), 1e-2)
        alpha = alpha - 5 * result.hypergradient
    assert num_trusted > 5


# Traps of the error estimate. Quadratics of two parameters, each with its own curvature
# and rate, share one program:
#     L = sum(h (w - t)^2) / 2,    M = sum(m (w - c)^2) / 2 + k w[1].


def separable_inner(w, alpha, batch):
    return 0.5 * jnp.sum(batch["h"] * (w - alpha["t"]) ** 2)


def separable_outer(w, alpha, batch):
    value = 0.5 * jnp.sum(batch["m"] * (w - batch["c"]) ** 2) + alpha["k"] * w[1]
    return value + 0 * jnp.sum(alpha["rates"])


def descent_with_rates(alpha):
    update = lambda grad, state, w=None: (-alpha["rates"] * grad, state)
    return optax.GradientTransformation(lambda w: (), update)


class Separable:
    """A quadratic of two parameters; all arguments are pairs of numbers."""

    def __init__(self, *, h, t, m, c, rates):
        h, t, m, c, rates = map(jnp.array, (h, t, m, c, rates))
        data = {"h": h}, {"m": m, "c": c}
        self.problem = hg.Bilevel(separable_inner, separable_outer, *data)
        self.alpha = {"t": t, "k": jnp.zeros(()), "rates": rates}
        self.exact = {"t": m * (t - c), "k": t[1], "rates": 0 * rates}

    def run(self, rtol, w=(0.0, 0.0), state=None):
        """Returns the estimate and the next state."""
        estimator = hg.Implicit(hg.Descent(descent_with_rates, 20_000), rtol=rtol)
        if state is None:
            state = estimator.init(self.problem, jnp.array(w), self.alpha)
        key = jax.random.key(0)
        return estimate(estimator, self.problem, state, self.alpha, key)


@pytest.mark.parametrize("rate", [1e-5, 0.0, 0.01])
def test_slow_part_of_w_is_not_overlooked(rate):
    """The outer loss depends on the part with the slow rate; the other one is far."""
    quadratic = Separable(
        h=(1.0, 1.0), t=(1e3, 1.0), m=(0.0, 1.0), c=(0.0, 5.0), rates=(0.05, rate)
    )
    result, _ = quadratic.run(rtol=1e-2)
    assert not is_wrongly_trusted(result, quadratic.exact, 1e-2)
    assert bool(result.trusted) == (rate == 0.01)
    if not result.trusted:
        assert failed_checks(result) == {"inner_error"}
        assert result.stats["num_inner_steps"] == 20_000
        assert result.stats["error_estimate"] > 1e-2


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_flat_direction_is_waited_for(rtol):
    """Curvatures 1 and 1e-3; only the hypergradient depends on the flat direction."""
    quadratic = Separable(
        h=(1.0, 1e-3), t=(1.0, 1.0), m=(1.0, 0.0), c=(3.0, 0.0), rates=(0.5, 0.5)
    )
    result, _ = quadratic.run(rtol)
    assert result.trusted
    assert error(result.hypergradient, quadratic.exact) <= rtol


def test_tolerance_survives_an_exact_solution():
    """One step of size 1 solves ``H = I``; later problems need few steps too."""
    state = None
    for h in (1.0, 0.9, 0.8):
        quadratic = Separable(
            h=(h, h), t=(h, h), m=(1.0, 1.0), c=(0.0, 0.0), rates=(1.0, 1.0)
        )
        result, state = quadratic.run(1e-2, w=(1.0, 1.0), state=state)
        assert result.trusted
        assert result.stats["num_inner_steps"] <= 60


def test_ill_conditioned_adjoint_is_not_overlooked():
    """Condition 1e4 with an exact ``w``; ``b`` and ``J`` hide the small curvatures."""
    h = jnp.logspace(-4, 0, 30)
    inner = lambda w, alpha, batch: 0.5 * w @ (h * w) - w @ (alpha / h**0.5)
    outer = lambda w, alpha, batch: w @ h**0.5
    solver = hg.ClosedForm(lambda alpha, batch: alpha / h**1.5)
    estimator = hg.Implicit(solver, rtol=1e-3, num_newton_steps=1)
    problem = hg.Bilevel(inner, outer)
    result = run_estimator(problem, estimator, jnp.zeros(30), jnp.ones(30))
    assert not is_wrongly_trusted(result, 1 / h, 1e-3)


def double_well(w, alpha, batch):
    """Has a maximum at ``alpha``; ``batch`` is a factor."""
    return batch * (0.25 * (w - alpha) ** 4 - 0.5 * (w - alpha) ** 2)


def squared_distance(w, alpha, batch):
    return (w - 3.0) ** 2


def run_double_well(w, factor=1.0):
    estimator = hg.Implicit(
        hg.Descent(optax.sgd(0.1), 50), num_newton_steps=1, rtol=1e-2
    )
    problem = hg.Bilevel(double_well, squared_distance, factor)
    return run_estimator(problem, estimator, jnp.asarray(w), jnp.asarray(1.0))


def test_maximum_is_not_trusted_but_a_start_beside_it_is():
    """Descent from the maximum of a double well stays there."""
    assert "negative_curvature" in failed_checks(run_double_well(1.0))
    beside = run_double_well(1.1)
    assert beside.trusted
    np.testing.assert_allclose(beside.w, 2.0, rtol=1e-2)


@pytest.mark.parametrize("num_newton_steps", [0, 1])
def test_a_start_beside_a_saddle_is_left(num_newton_steps):
    """The gradient is small there, and the outer loss ignores the flat direction."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: (
            0.5 * (w[0] - alpha) ** 2 + 0.25 * w[1] ** 4 - 0.5 * w[1] ** 2
        ),
        lambda w, alpha, batch: w[0] ** 2 + 0 * w[1],
    )
    solver = hg.Descent(optax.sgd(0.1), 500)
    estimator = hg.Implicit(solver, num_newton_steps=num_newton_steps, rtol=1e-2)
    result = run_estimator(problem, estimator, jnp.array([1.0, 5e-3]), jnp.asarray(1.0))
    assert result.trusted
    np.testing.assert_allclose(result.w, 1.0, rtol=1e-1)


def test_a_step_out_of_the_domain_of_the_loss_does_not_end_the_rounds():
    """The second entry of the minimum is 1; a Newton step from 100 is negative."""
    inner = lambda w, alpha, batch: (
        0.5 * (w[0] - alpha) ** 2 + 2 / 3 * w[1] ** 1.5 - alpha * w[1]
    )
    outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 2.0) ** 2)
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 5000), rtol=1e-2)
    w, problem = jnp.array([1e5, 100.0]), hg.Bilevel(inner, outer)
    estimate = hg.hypergradient(problem, estimator)(w, 1.0)
    assert estimate.trusted
    # dw*/dalpha = (1, 2 alpha) and dM/dw = (-1, -1)
    np.testing.assert_allclose(estimate.hypergradient, -3.0, rtol=1e-2)


def test_a_step_out_of_the_domain_is_not_the_fault_of_the_adjoint():
    inner = lambda w, alpha, batch: alpha * 2 / 3 * w**1.5 - w
    problem = hg.Bilevel(inner, lambda w, alpha, batch: 0.5 * (w - 2.0) ** 2)
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 10))
    estimate = hg.hypergradient(problem, estimator)(100.0, 1.0)
    assert failed_checks(estimate) == {"inner_error"}


def test_nan_ends_the_rounds():
    """No further inner steps are made, and the estimate is not trusted."""
    result = run_double_well(1.1, factor=jnp.nan)
    assert "not_finite" in failed_checks(result)
    assert result.stats["num_inner_steps"] <= 10


SOLVER = hg.Descent(optax.sgd(0.1), 10)
REUSED_SKETCH = hg.NystromCG(2, refresh_every=2)


@pytest.mark.parametrize(
    ("name", "solver", "options"),
    [
        ("linear_solver", SOLVER, {"linear_solver": hg.Neumann(5)}),
        ("linear_solver", SOLVER, {"linear_solver": lx.CG(0.1, 0.1)}),
        ("refresh_every", SOLVER, {"linear_solver": REUSED_SKETCH}),
        ("hvp_fn", SOLVER, {"hvp_fn": lambda w, alpha, batch, v: v}),
        ("damping", SOLVER, {"damping": 0.1}),
        ("solver", hg.Newton, {}),
        ("num_newton_steps", hg.Newton(), {}),
        ("adjoint_batch_size", SOLVER, {"adjoint_batch_size": 5}),
        # On a batch, Newton steps would lead to the minimum of that batch.
        (
            "adjoint_batch_size",
            SOLVER,
            {"rtol": None, "num_newton_steps": 1, "adjoint_batch_size": 5},
        ),
        ("rtol", SOLVER, {"rtol": np.ones((2, 2))}),
        ("rtol", SOLVER, {"rtol": 0.0}),
        ("rtol", SOLVER, {"rtol": 1.5}),
        ("rtol", SOLVER, {"rtol": []}),
    ],
)
def test_unusable_options_are_errors(name, solver, options):
    """The error is raised by the constructor and names the argument."""
    with pytest.raises((ValueError, TypeError), match=name):
        hg.Implicit(solver, **({"rtol": 0.1} | options))


def test_a_solver_without_steps_is_differentiated_where_it_starts():
    """The adjoint is solved in a first round, though nothing can move ``w = 3``."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - 3 * alpha) ** 2,
        lambda w, alpha, batch: 0.5 * w**2,
    )
    estimator = hg.Implicit(hg.Descent(optax.sgd(0.5), 0), rtol=1e-3)
    estimate = run_estimator(problem, estimator, jnp.array(3.0), jnp.array(1.0))
    assert estimate.value == 4.5
    assert estimate.hypergradient == pytest.approx(9.0)
    assert estimate.trusted


@pytest.mark.parametrize("power", [-90, 90])
def test_a_tiny_or_huge_loss_is_solved_like_any_other_in_float32(power):
    """The squares of its gradient underflow or overflow."""
    factor = 2.0**power
    problem = hg.Bilevel(
        lambda w, alpha, batch: factor * 0.5 * jnp.sum((w - alpha) ** 2),
        lambda w, alpha, batch: 0.5 * jnp.sum((w - 2.0) ** 2),
    )
    w, alpha = jnp.zeros(3, jnp.float32), jnp.ones(3, jnp.float32)
    solver = hg.Descent(optax.sgd(0.1 / factor), 1000)
    estimate = hg.hypergradient(problem, hg.Implicit(solver, rtol=1e-2))(w, alpha)
    assert 0 < estimate.stats["num_inner_steps"] < 1000
    np.testing.assert_allclose(estimate.hypergradient, -1.0, rtol=2e-2)
    short = hg.Descent(optax.sgd(0.1 / factor), 3)
    estimate = hg.hypergradient(problem, hg.Implicit(short, num_newton_steps=1))(
        w, alpha
    )
    np.testing.assert_allclose(estimate.w, 1.0, rtol=1e-3)
