"""The outer loop against closed-form optima and loops written by hand."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    cast,
    error,
    flat,
    get_reference,
    quadratic,
    ridge,
    ridge_outer,
)
from tests.estimator_cases import quadratic_solution
from tests.loops import (
    TO_ONE,
    TO_ZERO,
    ExactEstimator,
    Stateless,
    assert_same_bits,
    run_loop,
    square,
)

QUADRATIC = quadratic("30", seed=9)
SGD = optax.sgd(0.1)
RECORD_ALPHA = {"alpha": lambda w, alpha, key: jnp.sum(flat(alpha))}


EXACT = ExactEstimator(quadratic_solution)


def run_quadratic(optimizer, alpha=QUADRATIC.alpha, **options) -> hg.Trace:
    options = {"num_steps": 10} | options
    return run_loop(QUADRATIC.problem, EXACT, optimizer, QUADRATIC.w, alpha, **options)


def run_by_hand(reference, optimizer, u, num_steps, forward=None, project=None):
    """Returns alphas and values of gradient steps on u with exact hypergradients."""
    forward, project = forward or (lambda u: u), project or (lambda u: u)
    state = optimizer.init(u)
    alphas, values = [], []
    for _ in range(num_steps):
        alpha, pullback = jax.vjp(forward, u)
        alphas.append(alpha)
        w = reference.solution(alpha)
        values.append(
            reference.problem.outer_value(w, alpha, reference.problem.outer_data)
        )
        (gradient,) = pullback(reference.exact(alpha))
        updates, state = optimizer.update(gradient, state, u)
        u = project(optax.apply_updates(u, updates))
    return [*alphas, forward(u)], jnp.stack(values)


# Convergence.


def test_the_best_ridge_penalty_is_found():
    """SciPy minimizes the closed-form validation loss over one log-penalty."""
    reference = ridge("scalar", seed=3, n=15)
    data = reference.problem.outer_data
    value = lambda a: float(ridge_outer(reference.solution(a), a, data))
    options = {"xatol": 1e-10}
    best = minimize_scalar(value, bounds=(-8, 4), method="bounded", options=options)
    trace = hg.minimize(
        reference.problem, hg.Implicit(hg.Newton()), optax.adam(0.2), reference.w,
        reference.alpha, num_steps=300,
    )  # fmt: skip
    assert trace.status == "completed"
    assert -7 < best.x < 3
    np.testing.assert_allclose(trace.alpha, best.x, atol=1e-3)
    np.testing.assert_allclose(trace.value[-1], best.fun, rtol=1e-7)
    assert np.all(trace.stats["trusted"])


@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw(0.1, weight_decay=0.3), optax.sgd(0.1, momentum=0.9)],
    ids=["adamw", "momentum"],
)
def test_a_run_equals_a_loop_by_hand(optimizer):
    """Weight decay needs alpha to be passed to the optimizer."""
    alphas, values = run_by_hand(QUADRATIC, optimizer, QUADRATIC.alpha, 10)
    trace = run_quadratic(optimizer, record_alphas=True)
    assert error(trace.alphas, jnp.stack(alphas[:-1])) < 1e-9  # before each step
    assert error(trace.alpha, alphas[-1]) < 1e-9
    assert error(trace.value, values) < 1e-9
    assert error(trace.w, QUADRATIC.solution(alphas[-2])) < 1e-9


def test_minimize_passes_checkpoints_and_record_every_to_the_run(tmp_path):
    """A second call continues the finished run, that is, it makes no step."""
    loss = lambda w, alpha, batch: jnp.sum((w - alpha - 1) ** 2)
    problem, estimator = hg.Bilevel(loss, loss), hg.Implicit(hg.Newton())
    run = functools.partial(
        hg.minimize, problem, estimator, optax.sgd(0.1), jnp.zeros(2), jnp.zeros(2),
        num_steps=6, record_every=3,
    )  # fmt: skip
    trace = run(checkpoints=hg.Checkpoints(tmp_path))
    assert trace.value.shape == (2,)
    assert_same_bits(trace, run())
    assert_same_bits(trace, run(checkpoints=hg.Checkpoints(tmp_path)))
    assert (tmp_path / "step-000000006.json").exists()


def test_the_optimizer_receives_the_outer_value():
    """Polyak's step (M - 0) / |h|^2 on M = alpha^2 halves alpha every time."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: w**2)
    trace = hg.minimize(
        problem, ExactEstimator(),
        optax.polyak_sgd(max_learning_rate=9.0), 0.0, 1.0, num_steps=4,
    )  # fmt: skip
    np.testing.assert_allclose(trace.value, [1, 1 / 4, 1 / 16, 1 / 64], rtol=1e-9)


def test_optimizers_with_a_line_search_are_refused():
    """They need outer values at other alphas."""
    with pytest.raises(ValueError, match="optimizer"):
        run_quadratic(optax.lbfgs())


def test_l_bfgs_without_a_line_search_converges():
    """On a quadratic it needs a few steps, where gradient descent needs many."""
    stiffness = jnp.array([1.0, 10.0, 100.0])
    problem = hg.Bilevel(
        square, lambda w, alpha, batch: 0.5 * jnp.sum(stiffness * (w - 1.0) ** 2)
    )
    estimator = ExactEstimator()
    errors = [
        np.abs(hg.minimize(
            problem, estimator, optimizer, jnp.zeros(3), jnp.zeros(3), num_steps=30
        ).alpha - 1).max()
        for optimizer in (optax.lbfgs(1.0, linesearch=None), optax.sgd(0.01))
    ]  # fmt: skip
    assert errors[0] < 1e-6
    assert errors[1] > 0.5


# Metrics.


def test_metrics_are_evaluated_every_few_steps_and_at_the_end():
    """Steps 0, 3, 6 and the last of 8; NaN elsewhere; without influence on the run."""
    metrics = RECORD_ALPHA | {
        "w": lambda w, alpha, key: jnp.sum(w),
        "key": lambda w, alpha, key: jax.random.uniform(key),
    }
    run = functools.partial(run_quadratic, SGD, num_steps=8)
    trace, plain, every = (
        run(metrics=metrics, eval_every=3),
        run(),
        run(metrics=metrics),
    )
    alphas, _ = run_by_hand(QUADRATIC, SGD, QUADRATIC.alpha, 8)
    steps = [0, 3, 6, 7]
    assert np.flatnonzero(~np.isnan(trace.metrics["alpha"])).tolist() == steps
    for name, expected in (
        ("alpha", [jnp.sum(alphas[i]) for i in steps]),
        ("w", [jnp.sum(QUADRATIC.solution(alphas[i])) for i in steps]),
        ("key", every.metrics["key"][np.array(steps)]),
    ):
        np.testing.assert_allclose(
            trace.metrics[name][np.array(steps)], expected, rtol=1e-9
        )
    assert len({*every.metrics["key"].tolist()}) == 8
    assert plain.metrics == {}
    assert_same_bits((trace.cost, trace.alpha), (plain.cost, plain.alpha))


def test_metrics_may_read_arrays_and_depend_on_the_step():
    """A Partial over data, and a metric with a method at_step."""

    class StepMetric:
        def __call__(self, w, alpha, key):
            return jnp.zeros(())

        def at_step(self, step):
            return lambda w, alpha, key: 10.0 * step

    data = {"x": jnp.ones((5, 30)), "y": jnp.arange(5.0)}
    mse = lambda data, w, alpha, key: 2 * ridge_outer(w, alpha, data)
    metrics = {"mse": jax.tree_util.Partial(mse, data), "ten times": StepMetric()}
    trace = run_quadratic(SGD, num_steps=3, metrics=metrics)
    w = np.asarray(QUADRATIC.solution(QUADRATIC.alpha))
    expected = np.mean((np.ones((5, 30)) @ w - np.arange(5)) ** 2)
    np.testing.assert_allclose(trace.metrics["mse"][0], expected, rtol=1e-9)
    assert trace.metrics["ten times"].tolist() == [0.0, 10.0, 20.0]


def test_metrics_have_keys_of_their_own():
    """The randomness of a metric is not that of the estimate that it reads."""
    metric = lambda w, alpha, key: jax.random.key_data(key)[1].astype(float)
    estimator = Stateless(
        lambda w, alpha, key: hg.Estimate(metric(w, alpha, key), alpha, alpha, {})
    )
    trace = hg.minimize(
        TO_ZERO, estimator, SGD, 0.0, 1.0, num_steps=3, metrics={"key": metric}
    )
    keys = trace.value.tolist() + trace.metrics["key"].tolist()
    assert len(set(keys)) == 6


@pytest.mark.parametrize("name", ["value", "num_hvps"])
def test_a_metric_with_the_name_of_a_column_is_refused(name: str):
    with pytest.raises(ValueError, match="metrics"):
        run_quadratic(SGD, metrics={name: lambda w, alpha, key: 0.0})


# Spaces and projections.

SPACES = {
    "Positive": (hg.spaces.Positive(), jnp.exp, jnp.log),
    "log Interval": (
        hg.spaces.Interval(1e-3, 10.0, log=True),
        lambda u: jnp.exp(jnp.log(1e-3) + jnp.log(1e4) * jax.nn.sigmoid(u)),
        lambda a: jnp.log(jnp.log(a / 1e-3) / jnp.log(10.0 / a)),
    ),
    "Simplex": (
        hg.spaces.Simplex(),
        jax.nn.softmax,
        lambda a: jnp.log(a) - jnp.mean(jnp.log(a)),
    ),
}
INSIDE = jnp.array([0.1, 0.2, 0.3, 0.4])  # in each of the spaces


@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_a_reparametrization(name: str):
    """Momentum on u written by hand; every alpha lies in the space."""
    space, forward, inverse = SPACES[name]
    optimizer = optax.sgd(0.5, momentum=0.9)
    alphas, values = run_by_hand(QUADRATIC, optimizer, inverse(INSIDE), 15, forward)
    trace = run_quadratic(
        optimizer, INSIDE, space=space, num_steps=15, record_alphas=True
    )
    assert error(trace.alphas, jnp.stack(alphas[:-1])) < 1e-8
    assert error(trace.alpha, alphas[-1]) < 1e-8
    assert error(trace.value, values) < 1e-8
    assert np.all(jax.vmap(space.contains)(trace.alphas))
    assert error(trace.best_alpha, alphas[int(np.argmin(values))]) < 1e-8


BOUNDS = jnp.array([0.0, 0.15, -1.0, 0.3]), jnp.array([0.5, 0.25, 0.35, 0.9])


@pytest.mark.parametrize(
    ("options", "project"),
    [
        ({"space": hg.spaces.Box(*BOUNDS)}, lambda u: jnp.clip(u, *BOUNDS)),
        (
            {"project": optax.projections.projection_simplex},
            optax.projections.projection_simplex,
        ),
    ],
    ids=["Box", "project"],
)
def test_boxes_and_projections_are_projected_gradient_descent(options, project):
    """The projection follows each step."""
    optimizer = optax.sgd(0.5)
    alphas, values = run_by_hand(QUADRATIC, optimizer, INSIDE, 15, project=project)
    trace = run_quadratic(optimizer, INSIDE, num_steps=15, **options)
    assert error(trace.alpha, alphas[-1]) < 1e-9
    assert error(trace.value, values) < 1e-9
    assert error(project(trace.alpha), trace.alpha) < 1e-12
    free, _ = run_by_hand(QUADRATIC, optimizer, INSIDE, 15)
    assert error(trace.alpha, free[-1]) > 1e-3


def test_a_tree_of_spaces_applies_leaf_by_leaf():
    """None among them leaves a leaf unconstrained."""
    reference = quadratic("nested", seed=9)
    alpha = {"a": jnp.array(0.5), "b": [jnp.array([0.2, 0.3, 0.5])]}
    forward = lambda u: {"a": u["a"], "b": [jax.nn.softmax(u["b"][0])]}
    u = {"a": alpha["a"], "b": [jnp.log(alpha["b"][0])]}
    alphas, _ = run_by_hand(reference, optax.sgd(0.2), u, 6, forward)
    trace = hg.minimize(
        reference.problem, hg.Implicit(hg.Newton()), optax.sgd(0.2), reference.w, alpha,
        num_steps=6, space={"a": None, "b": [hg.spaces.Simplex()]},
    )  # fmt: skip
    assert error(trace.alpha, alphas[-1]) < 1e-8


def test_outer_data_of_another_structure_or_of_a_function_are_refused():
    with pytest.raises((TypeError, ValueError), match="outer_data_fn"):
        run_quadratic(SGD, outer_data_fn=lambda step, data: data | {"more": step})
    sampled = hg.Bilevel(
        QUADRATIC.problem.inner_loss, QUADRATIC.problem.outer_loss,
        data_fn=lambda key: (jnp.ones(1),) * 2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="outer_data_fn"):
        hg.OuterLoop(sampled, EXACT, SGD, outer_data_fn=lambda step, data: data)


# Failures. M = alpha^2 through w* = alpha; the run moves from 3 towards 0.

NUM_STEPS = 15


def run_until_failure(outer_loss, optimizer=SGD, estimator=None) -> hg.Trace:
    estimator = estimator or ExactEstimator()
    return run_loop(
        hg.Bilevel(square, outer_loss), estimator, optimizer, 0.0, 3.0,
        num_steps=NUM_STEPS, metrics=RECORD_ALPHA,
    )  # fmt: skip


def check_failed(trace: hg.Trace, last: int, reason: str):
    """Rows after ``last`` must be blank and cost nothing; the results stay good."""
    assert reason in trace.status
    blank = slice(last + 1, None)
    assert np.all(np.isfinite(trace.metrics["alpha"][: last + 1]))
    assert np.all(np.isnan(trace.value[blank]))
    assert np.all(np.isnan(trace.metrics["alpha"][blank]))
    for name, column in trace.stats.items():
        if name == "trusted" or name.startswith("num_") or name.endswith("equivalents"):
            # num_inner_steps is a statistic, and NaN.
            is_cost = name != "num_inner_steps"
            assert np.all(column[blank] == 0 if is_cost else np.isnan(column[blank]))
        else:
            assert np.all(np.isnan(column[blank])), name
    for flag in trace.flags.values():
        assert not np.any(flag[blank])
    assert np.all(np.diff(trace.cost[last:]) == 0)
    assert np.all(np.diff(trace.cost[: last + 1]) > 0)
    assert all(np.isfinite(x) for x in (trace.alpha, trace.w, trace.best_alpha))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_value_that_is_not_finite_ends_the_run(bad):
    """Below 1, which is reached at the sixth step (3 x 0.8^5 = 0.98)."""
    trace = run_until_failure(
        lambda w, alpha, batch: jnp.sum(w**2) + jnp.where(alpha < 1, bad, 0.0)
    )
    check_failed(trace, 5, "the outer value is not finite")
    assert not np.isfinite(trace.value[5])
    for result in (trace.alpha, trace.w, trace.best_alpha):
        np.testing.assert_allclose(result, 3 * 0.8**4, rtol=1e-6)


@pytest.mark.parametrize(
    "estimator",
    [None, hg.Unrolled(hg.Descent(optax.sgd(0.5), 5))],
    ids=["exact", "unrolled"],
)
def test_a_hypergradient_that_is_not_finite_ends_the_run(estimator):
    """The classical where-trap: a finite value with a NaN derivative below 1."""
    outer = lambda w, alpha, batch: (
        jnp.sum(w**2) + jnp.where(alpha > 1, 0 * jnp.sqrt(alpha - 1), 0.0)
    )
    trace = run_until_failure(outer, estimator=estimator)
    check_failed(trace, 5, "the hypergradient is not finite")
    np.testing.assert_allclose(trace.value[5], (3 * 0.8**5) ** 2, rtol=1e-6)
    np.testing.assert_allclose(trace.alpha, 3 * 0.8**4, rtol=1e-6)


def test_a_step_that_is_not_finite_ends_the_run():
    """The third step is infinite: alpha and w stay where they were before it."""
    blow_up = optax.scale_by_schedule(
        lambda count: jnp.where(count == 2, -jnp.inf, -0.1)
    )
    trace = run_until_failure(lambda w, alpha, batch: jnp.sum(w**2), optimizer=blow_up)
    check_failed(trace, 2, "the step left alpha not finite")
    for result in (trace.alpha, trace.w, trace.best_alpha):
        np.testing.assert_allclose(result, 3 * 0.8**2, rtol=1e-6)
    np.testing.assert_allclose(trace.value[2], (3 * 0.8**2) ** 2, rtol=1e-6)


def test_one_run_of_a_batch_fails_alone():
    """Under vmap over starts, the neighbor of a failed run continues."""
    outer = lambda w, alpha, batch: jnp.sum(w**2) + 0 * jnp.log(alpha - 1)
    problem = hg.Bilevel(square, outer)
    run = lambda alpha: hg.minimize(
        problem, hg.Implicit(hg.Newton()), SGD, 0.0, alpha, num_steps=8
    )
    batch = jax.vmap(run)(jnp.array([3.0, 30.0]))
    assert batch.status_code.tolist() == [1, 0]
    for i, alpha in enumerate((3.0, 30.0)):
        alone = run(alpha)
        np.testing.assert_allclose(batch.value[i], alone.value, rtol=1e-9)
        np.testing.assert_allclose(batch.cost[i], alone.cost, rtol=1e-9)
        np.testing.assert_allclose(batch.alpha[i], alone.alpha, rtol=1e-9)


# Results of a run.


def test_best_alpha_has_the_lowest_value():
    """Steps that grow overshoot: the best is neither the first nor the last."""
    grow = optax.scale_by_schedule(lambda count: -0.3 * 1.5**count)
    trace = run_loop(
        TO_ONE, ExactEstimator(), grow, 0.0, 3.0, num_steps=12, record_alphas=True
    )
    lowest = int(np.argmin(trace.value))
    assert 0 < lowest < 11
    np.testing.assert_allclose(trace.best_alpha, trace.alphas[lowest])


def test_the_first_of_equal_values_is_the_best():
    problem = hg.Bilevel(square, lambda w, alpha, batch: 0 * w)
    add_one = optax.GradientTransformation(
        lambda u: optax.EmptyState(), lambda g, state, u=None: (g + 1.0, state)
    )
    trace = hg.minimize(problem, ExactEstimator(), add_one, 0.0, 3.0, num_steps=3)
    assert trace.alpha == 6.0
    assert trace.best_alpha == 3.0


def test_equal_keys_give_equal_runs():
    """To the bit; no key is key 0; another key is another run; batches are fresh."""
    reference = get_reference("logistic per-weight")
    problem = hg.Bilevel(
        reference.problem.inner_loss, reference.problem.outer_loss,
        hg.Batches(reference.problem.inner_data, 8), reference.problem.outer_data,
    )  # fmt: skip
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.3), 5))
    run = lambda key=None: hg.minimize(
        problem, estimator, SGD, reference.w, reference.alpha, num_steps=4, key=key
    )
    zero = run(jax.random.key(0))
    assert_same_bits(run(jax.random.key(0)), zero)
    assert_same_bits(run(), zero)
    assert not np.array_equal(zero.value, run(jax.random.key(1)).value)
    assert len({*zero.value.tolist()}) == 4


@pytest.mark.parametrize(
    "space",
    [None, hg.spaces.Interval(0.05, 2.0)],
    ids=["none", "Interval"],
)
def test_float32_stays_float32(space):
    """Also where 64-bit numbers are enabled."""
    problem, w = cast((QUADRATIC.problem, QUADRATIC.w), jnp.float32)
    trace = hg.minimize(
        problem, EXACT, optax.adam(0.1), w, INSIDE.astype(jnp.float32), num_steps=3,
        space=space,
    )  # fmt: skip
    for leaf in (trace.alpha, trace.best_alpha, trace.w, trace.value):
        assert leaf.dtype == jnp.float32
    assert trace.status == "completed"


# Outer data that changes from step to step.


def tempered(w, alpha, batch):
    return batch["temperature"][0, 0] * jnp.sum((w[None] - batch["t"]) ** 2)


@pytest.mark.parametrize(
    "wrap", [lambda data: data, hg.Batches], ids=["dict", "Batches"]
)
def test_the_outer_data_may_change_from_step_to_step(wrap):
    """A loop by hand uses another problem at each step.

    The best alpha is the last one, because values of different losses do not compare.
    """
    data = {"t": jnp.ones((1, 30)), "temperature": jnp.ones((1, 1))}

    def outer_data_fn(step, data):
        temperature = lambda data: data["temperature"]
        if isinstance(data, hg.Batches):
            temperature = lambda batches: batches.data["temperature"]
        return eqx.tree_at(temperature, data, 1.3**step * jnp.ones((1, 1)))

    def make_problem(temperature):
        outer_data = data | {"temperature": jnp.full((1, 1), temperature)}
        inner, inner_data = QUADRATIC.problem.inner_loss, QUADRATIC.problem.inner_data
        return hg.Bilevel(inner, tempered, inner_data, wrap(outer_data))

    estimator = hg.Unrolled(hg.Descent(optax.sgd(QUADRATIC.step), 20))
    trace = run_loop(
        make_problem(1.0), estimator, optax.sgd(0.01), QUADRATIC.w, QUADRATIC.alpha,
        num_steps=4, outer_data_fn=outer_data_fn, record_alphas=True,
    )  # fmt: skip
    w = QUADRATIC.w
    for step, alpha in enumerate(trace.alphas):
        estimate = hg.hypergradient(make_problem(1.3**step), estimator)(w, alpha)
        np.testing.assert_allclose(trace.value[step], estimate.value, rtol=1e-9)
        w, next_alpha = estimate.w, alpha - 0.01 * estimate.hypergradient
        expected = [*trace.alphas, trace.alpha][step + 1]
        np.testing.assert_allclose(next_alpha, expected, rtol=1e-9)
    assert trace.value[-1] > trace.value[0]
    np.testing.assert_array_equal(trace.best_alpha, trace.alphas[-1])


def test_a_step_to_an_infinite_alpha_is_not_made():
    """``exp(u)`` of a finite ``u`` may be infinite, also at the last step."""
    problem = hg.Bilevel(square, lambda w, alpha, batch: jnp.sum((w + 1) ** 2))
    for num_steps in (1, 2):
        trace = run_loop(
            problem, ExactEstimator(), optax.scale(1e4), 0.0, 3.0,
            num_steps=num_steps, space=hg.spaces.Positive(),
        )  # fmt: skip
        assert "alpha" in trace.status
        np.testing.assert_allclose(trace.alpha, 3.0, rtol=1e-12)
