"""`Unrolled` against closed forms and central differences of the same run."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks import adjoint
from benchmarks.shared.reference_problems import central, error
from tests.estimator_cases import (
    RIDGE,
    RIDGE_DATA,
    batch_hypergradient,
    gradient_equivalents,
    ridge_of_five_examples,
    ridge_outer,
    ridge_penalty,
    ridge_with_few_outer_examples,
    run_estimator,
)
from tests.loops import TO_ZERO
from tests.parameters import slow_except


def test_only_the_full_derivative_is_trusted():
    """Five steps are trusted for their own derivative; the last two are not."""
    solver = hg.Descent(optax.sgd(0.1 * RIDGE.step), 5)
    full = run_estimator(RIDGE, hg.Unrolled(solver))
    truncated = run_estimator(RIDGE, hg.Unrolled(solver, truncation_length=2))
    assert full.trusted
    assert full.stats["error_estimate"] == 0
    assert not truncated.trusted
    assert truncated.stats["error_estimate"] > 0


# Everything through which alpha enters the run.


def gradient_descent(loss, w, alpha, num_steps, rate=0.3):
    """Makes gradient steps in a Python loop."""
    for _ in range(num_steps):
        grad = jax.grad(loss)(w, alpha, RIDGE_DATA[0])
        w = jax.tree.map(lambda w, g: w - rate * g, w, grad)
    return w


def penalized(w, alpha, batch):
    return ridge_penalty(w, alpha["penalty"], batch)


def start_of_alpha(w, alpha):
    return w + jnp.tanh(alpha["start"])


START_PROBLEM = hg.Bilevel(penalized, ridge_outer, *RIDGE_DATA, init_fn=start_of_alpha)
START_ALPHA = {"penalty": RIDGE.alpha, "start": jnp.linspace(-1, 1, 6)}


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoints", "stored"])
def test_truncation_stops_at_the_early_steps(checkpoint):
    """The last 2 of 5 steps, from where the first three ended."""
    w, alpha = jnp.zeros(6), {"penalty": RIDGE.alpha}
    init_fn = lambda w, alpha: w + jnp.tanh(alpha["penalty"])
    problem = hg.Bilevel(penalized, ridge_outer, *RIDGE_DATA, init_fn=init_fn)
    third_w = gradient_descent(penalized, init_fn(w, alpha), alpha, 3)

    @jax.jit
    def value(alpha):
        final_w = gradient_descent(penalized, third_w, alpha, 2)
        return ridge_outer(final_w, None, RIDGE_DATA[1])

    solver = hg.Descent(optax.sgd(0.3), 5)
    estimator = hg.Unrolled(solver, truncation_length=2, checkpoint=checkpoint)
    estimate = hg.hypergradient(problem, estimator)(w, alpha)
    np.testing.assert_allclose(estimate.value, value(alpha), rtol=1e-13)
    assert error(estimate.hypergradient, central(value, alpha)) < 1e-9


def test_truncation_does_not_reach_a_leaf_that_only_the_start_uses():
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.3), 5), truncation_length=2)
    with pytest.raises(ValueError, match="start"):
        hg.hypergradient(START_PROBLEM, estimator)(jnp.zeros(6), START_ALPHA)


def test_schedule_with_one_rate_per_step():
    """``dw_T/d eta_t = -h w_0 prod_{s != t} (1 - eta_s h)`` on ``h w^2 / 2``."""
    h, w0 = 0.8, 1.5
    inner = lambda w, alpha, batch: 0.5 * h * w**2
    outer = lambda w, alpha, batch: w
    rates = jnp.array([0.3, 0.5, 0.1, 0.7, 0.2, 0.9, 0.4])
    optimizer = lambda alpha: optax.sgd(lambda count: alpha[count])
    estimator = hg.Unrolled(hg.Descent(optimizer, 7))
    estimate = hg.hypergradient(hg.Bilevel(inner, outer), estimator)(w0, rates)
    factors = 1 - np.asarray(rates) * h
    exact = [-h * w0 * np.prod(np.delete(factors, t)) for t in range(7)]
    assert error(estimate.hypergradient, jnp.array(exact)) < 1e-13


# Batches.


def test_outer_batches_are_unbiased():
    """Each estimate is that of one outer example, and every example occurs."""
    problem, reference = ridge_of_five_examples()
    solver = hg.Descent(optax.sgd(reference.step), 400)
    gradient_fn = hg.hypergradient(problem, hg.Unrolled(solver, outer_batch_size=1))
    keys = jax.random.split(jax.random.key(3), 60)
    run = lambda key: gradient_fn(reference.w, reference.alpha, key).hypergradient
    actual = np.asarray(jax.vmap(run)(keys))
    num_examples = reference.alpha.size
    expected = np.array(
        [batch_hypergradient(reference, None, j) for j in range(num_examples)]
    )
    distance = np.linalg.norm(actual[:, None] - expected[None], axis=-1)
    assert np.all(distance.min(axis=1) < 1e-9)
    assert set(distance.argmin(axis=1)) == set(range(num_examples))


# Storage.


ALL_CARRIES = {"max_stored_bytes": 5000}
STORAGES = {"all carries": ALL_CARRIES, "checkpoints": {"checkpoint": True}}
STORED_ALPHA = {
    "penalty": RIDGE.alpha,
    "start": jnp.linspace(-1, 1, 6),
    "rate": jnp.asarray(0.1),
    "unused by the optimizer": jnp.asarray(0.3),
}


def stored_problem(num_losses: int) -> hg.Bilevel:
    """Alpha enters the losses, the optimizer and the start; batches have keys."""

    def inner(w, alpha, batch):
        x, key = batch
        noise = jax.random.normal(key, w.shape)
        scaled_w = w * (1 + alpha["unused by the optimizer"] * noise)
        return ridge_penalty(scaled_w, alpha["penalty"], x)

    losses = [
        lambda w, alpha, batch: ridge_outer(w, alpha, batch),
        lambda w, alpha, batch: jnp.sum(w**3) * jnp.exp(alpha["rate"]),
    ]
    return hg.Bilevel(
        inner,
        losses[0] if num_losses == 1 else tuple(losses),
        hg.Batches(RIDGE_DATA[0], 8, with_key=True),
        RIDGE_DATA[1],
        init_fn=start_of_alpha,
    )


@pytest.mark.parametrize("num_losses", [1, 2])
@pytest.mark.parametrize("optimizer", slow_except(["momentum", "Adam"], ["momentum"]))
def test_storages_have_the_same_derivative(optimizer, num_losses):
    """Where carries are stored, the reverse pass goes in mixed mode."""
    optimizer = {
        "momentum": lambda alpha: optax.sgd(alpha["rate"], momentum=0.8),
        "Adam": lambda alpha: optax.adam(alpha["rate"]),
    }[optimizer]
    problem, solver = stored_problem(num_losses), hg.Descent(optimizer, 23)
    run = lambda **options: hg.hypergradient(problem, hg.Unrolled(solver, **options))(
        RIDGE.w, STORED_ALPHA, jax.random.key(2)
    )
    expected = run(checkpoint=False)
    for name, options in STORAGES.items():
        storage = hg.Unrolled(solver, **options).storage(problem, RIDGE.w, STORED_ALPHA)
        assert storage.mixed_mode
        assert storage.checkpoint == (name == "checkpoints")
        actual = run(**options)
        chex.assert_trees_all_close(
            (actual.value, actual.hypergradient, actual.w),
            (expected.value, expected.hypergradient, expected.w),
            rtol=1e-10,
        )
        assert actual.flags == expected.flags
        assert actual.trusted


@pytest.mark.parametrize("options", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev], ids=["forward", "reverse"])
def test_estimates_in_mixed_mode_have_derivatives(mode, options):
    """By both modes, also by a number that the inner loss closes over."""

    def hypergradient(x, **options):
        inner = lambda w, alpha, batch: jnp.sum(x * jnp.cosh(w - alpha) + w**4)
        problem = hg.Bilevel(inner, lambda w, alpha, batch: jnp.sum(w**3))
        estimator = hg.Unrolled(hg.Descent(optax.adam(0.1), 30), **options)
        w, alpha = jnp.full(3, 0.2), x * jnp.linspace(-1, 1, 3)
        return hg.hypergradient(problem, estimator)(w, alpha).hypergradient

    derivative = lambda **options: jax.jit(mode(lambda x: hypergradient(x, **options)))(
        0.7
    )
    expected = derivative(checkpoint=False)
    np.testing.assert_allclose(derivative(**options), expected, rtol=1e-10)


NETWORK = adjoint.WORKLOADS["784-128-10, batches of 128"]


@pytest.mark.parametrize(
    ("work", "max_ratio", "checkpoint", "mixed_mode"),
    [
        (adjoint.WORKLOADS["logistic, full batch"], 2.05, False, False),
        (adjoint.WORKLOADS["784-300-10, full batch"], 2.1, False, False),
        (NETWORK, 2.65, False, True),
        (NETWORK._replace(steps=10_000), 3.6, True, True),
    ],
    ids=["logistic regression", "network", "1,000 steps", "10,000 steps"],
)
def test_operations_of_an_estimate_in_inner_runs(
    work, max_ratio, checkpoint, mixed_mode
):
    """By default, with all statistics and checks. The programs are traced only."""
    shapes = jax.eval_shape(
        functools.partial(adjoint.sample_arrays, work), jax.random.key(0)
    )
    shapes = cast_shapes(shapes, jnp.float32)
    estimator = hg.Unrolled(hg.Descent(work.optimizer, work.steps))
    problem = lambda data: hg.Bilevel(
        work.loss, work.loss, hg.Batches(data, work.batch), data
    )
    storages = []

    def estimate(data, w, alpha):
        storages.append(estimator.storage(problem(data), w, alpha))
        return hg.hypergradient(problem(data), estimator)(w, alpha)

    def solve(data, w, alpha):
        data, key = hg.Batches(data, work.batch), jax.random.key(0)
        return estimator.solver.solve(work.loss, w, alpha, data, key)[0]

    whole, inner = (hg.cost.flops(f, *shapes).total() for f in (estimate, solve))
    assert whole < max_ratio * inner
    assert storages[0][:2] == (checkpoint, mixed_mode)
    assert storages[0].num_bytes <= 1.5e9


def cast_shapes(shapes, dtype):
    """Returns the shapes with their floats in another dtype."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype if is_float(x) else x.dtype),
        shapes,
    )


# Cost.


def count_primitive(name: str, jaxpr) -> int:
    """Returns how often a program runs a primitive; a scan counts with its length."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        length = equation.params.get("length", 1)
        for value in equation.params.values():
            for sub_jaxpr in value if isinstance(value, tuple | list) else (value,):
                sub_jaxpr = getattr(sub_jaxpr, "jaxpr", sub_jaxpr)
                if hasattr(sub_jaxpr, "eqns"):
                    total += length * count_primitive(name, sub_jaxpr)
    return total


def marked_ridge(w, alpha, batch):
    return ridge_penalty(w, alpha, batch) + jnp.tanh(w[0])


@pytest.mark.parametrize(
    ("num_steps", "truncation_length", "checkpoint", "num_recomputed"),
    [
        (16, None, False, 0),
        (16, None, True, 16),
        (16, 8, True, 8),  # the early steps are not run again
        (16, 9, True, 8),  # two halves of four, and one step between them
        (16, 5, True, 0),  # halves that are too short for a segment
        (16, 99, True, 16),
        (3, None, True, 0),  # too short for a segment
    ],
)
def test_cost_counts_recomputed_steps(
    num_steps, truncation_length, checkpoint, num_recomputed
):
    """A tanh in the loss marks each gradient of the program.

    A product in mixed mode, which checkpoints imply, makes one of its own.
    """
    data = ridge_with_few_outer_examples(10)
    problem = hg.Bilevel(marked_ridge, ridge_outer, data.inner_data, data.outer_data)
    solver = hg.Descent(optax.sgd(0.3), num_steps)
    estimator = hg.Unrolled(solver, truncation_length, checkpoint)
    gradient_fn = hg.hypergradient(problem, estimator)
    hypergradient = lambda w, alpha: gradient_fn(w, alpha).hypergradient
    program = jax.make_jaxpr(hypergradient)(RIDGE.w, RIDGE.alpha)
    num_differentiated = min(truncation_length or num_steps, num_steps)
    num_grads = count_primitive("tanh", program.jaxpr) - 1  # one is the residual's
    num_grads -= num_differentiated if checkpoint else 0
    assert num_grads == num_steps + num_recomputed
    stats = gradient_fn(RIDGE.w, RIDGE.alpha).stats
    assert stats["num_grads"] == pytest.approx(num_grads / 4 + 1)
    assert stats["num_hvps"] == pytest.approx(num_differentiated / 4)
    assert stats["num_outer_grads"] == 1
    expected = gradient_equivalents(stats)
    assert stats["gradient_equivalents"] == pytest.approx(expected)


def test_cost_of_several_losses():
    """Three outer losses need three reverse passes of 12 steps."""
    data = ridge_with_few_outer_examples(None)
    losses = (ridge_outer, ridge_penalty, ridge_outer)
    problem = hg.Bilevel(ridge_penalty, losses, data.inner_data, data.outer_data)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.3), 12), checkpoint=False)
    stats = hg.hypergradient(problem, estimator)(RIDGE.w, RIDGE.alpha).stats
    assert stats["num_hvps"] == 36
    assert stats["num_outer_grads"] == 3


@pytest.mark.parametrize("truncation_length", [None, 5], ids=["all", "truncated"])
def test_a_loss_without_w_needs_no_reverse_pass(truncation_length):
    """Its derivative is ``dM/dalpha``, and changes nothing in the others."""
    data = ridge_with_few_outer_examples(None)
    squares = lambda w, alpha, batch: jnp.sum(alpha**2)
    estimator = hg.Unrolled(hg.Descent(optax.sgd(0.3), 12), truncation_length)

    def run(*losses):
        problem = hg.Bilevel(ridge_penalty, losses, data.inner_data, data.outer_data)
        return hg.hypergradient(problem, estimator)(RIDGE.w, RIDGE.alpha)

    pair, triple = (
        run(ridge_outer, ridge_penalty),
        run(ridge_outer, squares, ridge_penalty),
    )
    assert triple.stats["num_hvps"] == pair.stats["num_hvps"]
    assert triple.stats["num_outer_grads"] == 3
    assert triple.flags == pair.flags
    h = pair.hypergradient
    expected = jnp.stack([h[0], 2 * RIDGE.alpha, h[1]])
    chex.assert_trees_all_close(triple.hypergradient, expected, rtol=1e-14)


@pytest.mark.parametrize("truncation_length", [None, 2], ids=["all", "truncated"])
def test_a_loss_without_a_finite_derivative_leaves_the_others_theirs(truncation_length):
    """``sqrt(0 w)`` has the derivative 0 / 0; each loss has a reverse pass alone."""
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    square = lambda w, alpha, batch: jnp.sum(w**2)
    root = lambda w, alpha, batch: jnp.sum(jnp.sqrt(0 * w))
    solver, w, alpha = hg.Descent(optax.sgd(0.1), 5), jnp.zeros(2), jnp.ones(2)

    def run(losses, estimator):
        problem = hg.Bilevel(inner, losses)
        return hg.hypergradient(problem, estimator)(w, alpha).hypergradient

    estimator = hg.Unrolled(solver, truncation_length)
    actual = run((square, root), estimator)
    assert np.isfinite(actual[0]).all()
    assert np.isnan(actual[1]).all()
    np.testing.assert_allclose(actual[0], run(square, estimator), rtol=1e-15)
    if truncation_length is None:
        expected = run((square, root), hg.Forward(solver))
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-14)


def test_a_truncated_run_still_names_the_derivative_that_its_steps_lose():
    """The sign of Lion has none."""
    estimator = hg.Unrolled(hg.Descent(optax.lion(0.1), 5), 3)
    flags = hg.hypergradient(TO_ZERO, estimator)(0.0, 1.0).flags
    assert flags["truncated"]
    assert flags["lost_derivative"]


def test_the_error_of_a_small_hypergradient_is_not_zero_in_float32():
    """The squares of both halves of its contributions underflow."""

    def error_estimate(factor):
        problem = hg.Bilevel(
            lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
            lambda w, alpha, batch: factor * jnp.sum((w - 2.0) ** 2),
        )
        solver = hg.Descent(optax.sgd(0.1), 40)
        estimator = hg.Unrolled(solver, truncation_length=10)
        w, alpha = jnp.zeros(3, jnp.float32), jnp.ones(3, jnp.float32)
        estimate = hg.hypergradient(problem, estimator)(w, alpha)
        return float(estimate.stats["error_estimate"])

    assert error_estimate(2.0**-90) == pytest.approx(error_estimate(1.0), rel=1e-3)
    assert error_estimate(1.0) > 0
