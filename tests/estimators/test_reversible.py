"""Tests of reversed momentum descent: every bit returns, and reverse mode agrees."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.shared.reference_problems import (
    central,
    error,
    get_reference,
    quadratic,
)
from hypergrad.estimators import reversible_arithmetic as arithmetic
from hypergrad.runtime.compat import enable_x64
from hypergrad.trees import random_like, relative_error
from tests.estimator_cases import failed_checks, run_estimator
from tests.parameters import slow_except

MOMENTUM = 3686 / 4096  # the fraction nearest to 0.9


def test_equals_reverse_mode_up_to_the_resolution():
    """1000 steps give the derivative of the same steps in floating point."""
    reference, num_steps = get_reference("logistic per-weight"), 1000
    unrolled = hg.Unrolled(hg.Descent(optax.sgd(0.3, MOMENTUM), num_steps))
    actual = run_estimator(reference, hg.Reversible(0.3, MOMENTUM, num_steps))
    expected = run_estimator(reference, unrolled)
    assert actual.trusted
    assert error(actual.hypergradient, expected.hypergradient) < 1e-8
    assert error(actual.w, expected.w) < 1e-8
    assert actual.stats["num_grads"] == 2 * num_steps + 1
    assert actual.stats["num_hvps"] == num_steps


def test_rates_momenta_and_initial_points_are_differentiated():
    """A schedule, a momentum and a starting point may depend on alpha."""
    reference = quadratic("nested")
    inner_loss, outer_loss = reference.problem.inner_loss, reference.problem.outer_loss
    problem = hg.Bilevel(
        lambda w, alpha, batch: inner_loss(w, alpha["x"], batch),
        lambda w, alpha, batch: outer_loss(w, alpha["x"], batch),
        reference.problem.inner_data,
        reference.problem.outer_data,
        init_fn=lambda w, alpha: jax.tree.map(jnp.add, w, alpha["init"]),
    )
    alpha = {
        "x": reference.alpha,
        "init": random_like(jax.random.key(0), reference.w),
        "rates": jnp.linspace(0.05, 0.1, 12),
        "momentum": jnp.asarray(0.75),
    }
    rate_fn = lambda alpha: lambda count: alpha["rates"][count]
    momentum_fn = lambda alpha: alpha["momentum"]
    make_optimizer = lambda alpha: optax.chain(
        optax.trace(alpha["momentum"]), optax.scale_by_learning_rate(rate_fn(alpha))
    )
    reversible = hg.Reversible(rate_fn, momentum_fn, 12, min_momentum=0.5)
    unrolled = hg.Unrolled(hg.Descent(make_optimizer, 12))
    actual = hg.hypergradient(problem, reversible)(reference.w, alpha)
    expected = hg.hypergradient(problem, unrolled)(reference.w, alpha)
    assert actual.trusted
    for name in alpha:
        leaf_error = error(actual.hypergradient[name], expected.hypergradient[name])
        assert leaf_error < 1e-7, name


def test_mini_batches_equal_central_differences():
    """Both directions see the same batches."""
    reference = get_reference("ridge per-weight")
    problem = hg.Bilevel(
        reference.problem.inner_loss,
        reference.problem.outer_loss,
        hg.Batches(reference.problem.inner_data, 8),
        reference.problem.outer_data,
    )
    hypergradient_fn = functools.partial(
        hg.hypergradient(problem, hg.Reversible(0.2, 0.75, 20)),
        reference.w,
        key=jax.random.key(1),
    )
    estimate = hypergradient_fn(reference.alpha)
    expected = central(lambda alpha: hypergradient_fn(alpha).value, reference.alpha)
    assert error(estimate.hypergradient, expected) < 1e-5
    assert estimate.stats["num_grads"] == pytest.approx(2 * 20 * 8 / 40 + 1)


def test_ten_thousand_steps_return_every_bit():
    """The buffer holds log2(1 / m) bits per number and step, and at most 10% more."""
    reference = quadratic("30", seed=1)
    estimator = hg.Reversible(0.05, 0.9, 10_000)
    estimate = run_estimator(reference, estimator)
    assert estimate.trusted
    assert error(estimate.hypergradient, reference.exact(reference.alpha)) < 1e-7
    bits_per_step = 8 * estimator.num_buffer_bytes / 10_000
    assert 0.9 * np.log2(1 / 0.9) < bits_per_step < 1.1 * np.log2(1 / 0.9)


@pytest.fixture(scope="module")
def tuned_estimate_fn():
    """The estimate of 100 steps at a rate and a momentum of at least 0.7."""
    reference = quadratic("30", seed=1)
    inner_loss = reference.problem.inner_loss
    problem = hg.Bilevel(
        lambda w, alpha, batch: inner_loss(w, alpha["x"], batch),
        lambda w, alpha, batch: jnp.sum(w**2),
        reference.problem.inner_data,
    )
    estimator = hg.Reversible(
        lambda alpha: alpha["rate"], lambda alpha: alpha["momentum"], 100, 0.7
    )
    hypergradient_fn = hg.hypergradient(problem, estimator)
    return lambda rate, momentum: hypergradient_fn(
        reference.w, {"x": reference.alpha, "rate": rate, "momentum": momentum}
    )


@pytest.mark.parametrize(
    ("rate", "momentum", "failed"),
    [
        pytest.param(0.05, 0.75, set(), id="valid"),
        pytest.param(0.05, 0.3, {"not_reversed"}, id="buffer too small"),
        pytest.param(1.0, 0.9, {"out_of_range"}, id="diverging run"),
        pytest.param(1e-3, 1.2, {"out_of_range"}, id="momentum above 1"),
        pytest.param(1e-3, 0.05, {"out_of_range"}, id="momentum below 1/16"),
    ],
)
def test_lost_bits_are_flagged(tuned_estimate_fn, rate, momentum, failed):
    """A flag tells which promise about the integers was broken."""
    estimate = tuned_estimate_fn(rate, momentum)
    assert failed <= failed_checks(estimate)
    assert estimate.trusted == (not failed)


def test_memory_grows_by_the_buffer_only():
    """Sixteen times the steps need 0.15 bits more per number and step, and the keys."""

    def temporary_bytes(num_steps):
        problem = hg.Bilevel(
            lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
            lambda w, alpha, batch: jnp.sum(w**2),
        )
        hypergradient_fn = hg.hypergradient(problem, hg.Reversible(0.1, 0.9, num_steps))
        run = lambda w, alpha: hypergradient_fn(w, alpha).hypergradient
        return hg.cost.memory(run, jnp.zeros(10_000), jnp.zeros(())).temporaries

    growth = temporary_bytes(1600) - temporary_bytes(100)
    buffer_bytes = 1500 * np.log2(1 / 0.9) / 8 * 10_000
    # The compiler may hold the stack twice while a byte is written.
    assert growth < 2.2 * buffer_bytes + 1500 * 64


def test_a_float32_run_returns_every_bit():
    """Without 64-bit types the arithmetic is coarser, and still reversible."""
    with enable_x64(False):
        problem = hg.Bilevel(
            lambda w, alpha, batch: 0.5 * jnp.sum((w - jnp.sin(alpha)) ** 2),
            lambda w, alpha, batch: 0.5 * jnp.sum((w - 0.5) ** 2),
        )
        alpha = jnp.linspace(-1, 1, 50)
        estimator = hg.Reversible(0.1, 0.9, 3000)
        estimate = hg.hypergradient(problem, estimator)(jnp.zeros(50), alpha)
        assert estimate.hypergradient.dtype == jnp.float32
        assert estimate.trusted
        exact = (jnp.sin(alpha) - 0.5) * jnp.cos(alpha)
        assert jnp.linalg.norm(estimate.hypergradient - exact) < 1e-3


def quadratic_problem(target):
    """Returns a problem with the inner solution ``3 alpha``."""
    return hg.Bilevel(
        lambda w, alpha, batch: 0.5 * jnp.sum((w - 3 * alpha) ** 2),
        lambda w, alpha, batch: 0.5 * jnp.sum((w - target) ** 2),
    )


def error_against_reverse_mode(problem, w, alpha, rate, momentum, num_steps, dtype):
    """Returns the estimate in ``dtype`` and its error against float64."""
    reversible = hg.Reversible(rate, momentum, num_steps)
    args = w.astype(dtype), alpha.astype(dtype)
    estimate = hg.hypergradient(problem, reversible)(*args)
    unrolled = hg.Unrolled(hg.Descent(optax.sgd(rate, momentum), num_steps))
    wide_args = [x.astype("float64") for x in args]
    expected = hg.hypergradient(problem, unrolled)(*wide_args).hypergradient
    return estimate, error(estimate.hypergradient.astype("float64"), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("momentum", slow_except([0.5, 0.9, 0.99, 0.998], [0.9, 0.998]))
def test_short_runs_are_right_for_every_momentum(momentum, dtype):
    """The mean of the rounded momenta is the momentum, whatever its digits."""
    alpha = jnp.linspace(0.05, 0.25, 5)
    problem, num_steps = quadratic_problem(0.0), 100
    rate = 2 * (1 - momentum) / num_steps
    estimate, relative_error = error_against_reverse_mode(
        problem, 0.1 * alpha, alpha, rate, momentum, num_steps, dtype
    )
    assert relative_error < max(4e-3, float(3 * jnp.finfo(dtype).eps))
    assert estimate.trusted
    assert relative_error < 10 * estimate.stats["error_estimate"]


@pytest.mark.parametrize("target", slow_except([0.0, 1e-3, 1.0], [0.0, 1e-3]))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_unresolved_numbers_are_not_trusted(dtype, target):
    """Whatever the size of alpha, a trusted estimate is right to 2%.

    With ``w`` below the resolution of 2^-23, or 2^-46, the run does not move.
    """
    num_trusted, min_exponent = 0, -6 if dtype == "float16" else -16
    for exponent in range(0, min_exponent - 1, -2):
        alpha = jnp.array([1.0, -0.5, 0.25]) * 10.0**exponent
        estimate, relative_error = error_against_reverse_mode(
            quadratic_problem(target), 0 * alpha, alpha, 0.1, 0.5, 60, dtype
        )
        num_trusted += int(estimate.trusted)
        assert relative_error < 2e-2 or not estimate.trusted
        is_resolved = 10.0**exponent > (1e-10 if dtype == "float64" else 1e-3)
        assert estimate.trusted or not is_resolved
    assert num_trusted < (2 - min_exponent) / 2


def test_a_loss_without_w_has_an_exact_hypergradient():
    inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    problem = hg.Bilevel(inner, lambda w, alpha, batch: jnp.sum(alpha**3))
    estimate = hg.hypergradient(problem, hg.Reversible(0.1, 0.5, 100))(
        jnp.zeros(2), jnp.array([1.0, 2.0])
    )
    assert failed_checks(estimate) == set()
    assert estimate.stats["error_estimate"] == 0
    np.testing.assert_allclose(estimate.hypergradient, [3.0, 12.0])


def test_numbers_that_leave_the_range_for_a_moment_are_flagged():
    """A displacement by a multiple of 2^9 would wrap around to the same float32."""
    problem = quadratic_problem(0.0)
    for rate, momentum, scale in [(512 / 3, 0.5, 1.0), (1e-3, 0.99, 10.0)]:
        gradient_fn = hg.hypergradient(problem, hg.Reversible(rate, momentum, 40))
        estimate = gradient_fn(jnp.zeros(1, "float32"), jnp.full(1, scale, "float32"))
        assert estimate.flags["out_of_range"]
        assert not estimate.trusted


@pytest.mark.parametrize(("num_steps", "min_trusted"), [(10, 3), (20, 0)])
def test_trusted_runs_do_not_depend_on_their_last_digits(num_steps, min_trusted):
    """Steps of 5 lead to chaos; another last digit of ``w_0`` changes the derivative.

    After 20 steps the outer value is right to 1e-4 and the derivative wrong by 6% and
    more in some of the runs.
    """
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum(alpha * jnp.cos(w)),
        lambda w, alpha, batch: jnp.sum((w - 0.3) ** 2),
    )
    gradient_fn = hg.hypergradient(problem, hg.Reversible(5.0, 0.5, num_steps))

    @jax.jit
    @jax.vmap
    def run(shift):
        w, alpha = jnp.linspace(0.3, 1.0, 4) + shift, jnp.linspace(0.9, 1.1, 4)
        estimate, other = gradient_fn(w, alpha), gradient_fn(w + 2.0**-34, alpha)
        difference = relative_error(other.hypergradient, estimate.hypergradient)
        return estimate.trusted, difference

    trusted, difference = run(jnp.arange(6) / 100)
    assert jnp.all((difference < 2e-2) | ~trusted)
    assert jnp.sum(trusted) >= min_trusted


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ((0.1, 0.0, 5), "momentum"),
        ((0.1, 1.0, 5), "momentum"),
        ((0.1, lambda alpha: 0.9, 5), "min_momentum"),
        ((0.1, 0.9, 0), "num_steps"),
        ((jnp.ones(3), 0.9, 5), "learning_rate"),
        ((0.1, np.ones(2), 5), "momentum"),
        ((0.1, "0.9", 5), "momentum"),
        ((0.1, None, 5), "momentum"),
        ((0.1, lambda alpha: 0.9, 5, "0.5"), "min_momentum"),
        ((0.1, 0.5, 5, 0.9), "min_momentum"),
    ],
)
def test_invalid_settings_raise(args, name):
    """Invalid settings are named before anything runs."""
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        hg.Reversible(*args)


@pytest.mark.parametrize(
    ("rate", "momentum", "name"),
    [
        (lambda alpha: 0.1 * alpha, 0.9, "learning_rate"),
        (lambda alpha: None, 0.9, "learning_rate"),
        (0.1, lambda alpha: 0.5 * alpha, "momentum"),
        (lambda alpha: lambda step: 0.1 * alpha, 0.9, "learning_rate"),
    ],
)
def test_rates_and_momenta_that_are_no_numbers_are_named(rate, momentum, name):
    loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
    estimator = hg.Reversible(rate, momentum, 5, min_momentum=0.5)
    with pytest.raises(ValueError, match=f"^{name} must be a function of alpha"):
        hg.hypergradient(hg.Bilevel(loss, loss), estimator)(jnp.zeros(3), jnp.ones(3))


def test_an_optax_schedule_is_not_a_function_of_alpha():
    """A schedule would receive alpha in place of the step."""
    with pytest.raises(TypeError, match="learning_rate"):
        hg.Reversible(optax.constant_schedule(0.1), 0.9, 5)


def test_unsupported_problems_raise():
    """Unused leaves, mixed precision and several outer losses raise before tracing."""
    inner_loss = lambda w, alpha, batch: jnp.sum((w["a"] - alpha["used"]) ** 2)
    outer_loss = lambda w, alpha, batch: jnp.sum(w["a"] ** 2)
    estimator = hg.Reversible(0.1, 0.9, 5)
    problem, w, alpha = hg.Bilevel(inner_loss, outer_loss), {"a": 0.0}, {"used": 1.0}
    with pytest.raises(ValueError, match=r"alpha\['unused'\]"):
        hg.hypergradient(problem, estimator)(w, alpha | {"unused": 1.0})
    mixed_w = w | {"b": jnp.zeros(2, jnp.float32)}
    with pytest.raises(ValueError, match="one dtype"):
        hg.hypergradient(problem, estimator)(mixed_w, alpha)
    two_losses = hg.Bilevel(inner_loss, (outer_loss, outer_loss))
    with pytest.raises(ValueError, match="outer_loss"):
        hg.hypergradient(two_losses, estimator)(w, alpha)


NUM_BYTES = arithmetic.num_stack_bytes(500, 0.1)


@jax.jit
def multiply_and_divide(v, like, momentum):
    """Returns buffers and velocities after 500 steps, and after their reversal."""
    steps = jnp.arange(500)
    buffer = arithmetic.empty_buffer(like, NUM_BYTES, 500)

    def multiply(carry, step):
        buffer, v = arithmetic.multiply(*carry, momentum, step)
        return (buffer, v + 1000), v

    def divide(carry, step):
        buffer, v = carry
        return arithmetic.divide(buffer, v - 1000, momentum, step), None

    end, products = jax.lax.scan(multiply, (buffer, v), steps)
    start, _ = jax.lax.scan(divide, end, steps, reverse=True)
    return end[0], products[0], start


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 0.99])
def test_a_division_undoes_a_multiplication(momentum, dtype):
    """500 steps on integers of either sign are undone in the promised space."""
    v = jax.random.randint(jax.random.key(0), (40,), -(2**20), 2**20, dtype)
    like = jnp.zeros(40, jnp.float64 if dtype == "int64" else jnp.float32)
    full, product, (empty, restored) = multiply_and_divide(v, like, momentum)
    assert not arithmetic.is_empty(full)
    assert full.stack_size <= arithmetic.num_stack_bytes(500, momentum)
    n = arithmetic.numerator(jnp.asarray(momentum), v.dtype, jnp.asarray(0))
    d = arithmetic.denominator(v.dtype)
    chex.assert_trees_all_close(product, v * float(n) / d, atol=d)
    chex.assert_trees_all_equal(restored, v)
    assert arithmetic.is_empty(empty)


@pytest.mark.parametrize(
    ("momentum", "num_steps"),
    [(1 / 16, 1000), (0.9, 10_000), (0.999, 597_264), (0.9995, 525_439)],
)
def test_a_buffer_has_room_for_every_step(momentum, num_steps):
    """Against the exact bound of the remainders, in integers of Python."""
    for dtype in (jnp.dtype("int32"), jnp.dtype("int64")):
        n = arithmetic.numerator(jnp.asarray(momentum), dtype, jnp.arange(num_steps))
        d, bound, num_bytes = arithmetic.denominator(dtype), 1, 0
        for n_of_step in np.asarray(n).tolist():
            bound = -(-bound * d // n_of_step)
            if bound > arithmetic.MAX_BOUND:
                bound, num_bytes = -(-bound // arithmetic.BYTE), num_bytes + 1
        assert num_bytes <= arithmetic.num_stack_bytes(num_steps, momentum)


@pytest.mark.parametrize(
    "decay",
    [lambda t: 1 / (1 + t), lambda t: 1 / jnp.sqrt(1.0 + t)],
    ids=["1/t", "sqrt"],
)
def test_a_schedule_need_not_be_defined_before_the_first_step(decay):
    """The rate of step -1 multiplies a velocity of zero, and is not evaluated."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - 1) ** 2, lambda w, alpha, batch: 0.5 * w**2
    )
    schedule = lambda alpha: lambda t: jnp.exp(alpha) * decay(t)
    sgd = lambda alpha: optax.sgd(schedule(alpha), momentum=0.5)
    run = lambda estimator: hg.hypergradient(problem, estimator)(0.0, -1.0)
    expected = run(hg.Unrolled(hg.Descent(sgd, 20)))
    estimate = run(hg.Reversible(schedule, 0.5, 20))
    np.testing.assert_allclose(
        estimate.hypergradient, expected.hypergradient, rtol=1e-6
    )


def test_an_outer_gradient_that_underflows_is_flagged_as_by_unrolled():
    """In float16 ``dM/dw`` is 0 here, and with it the whole hypergradient."""
    n = 4096
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.float16(n / 128) * jnp.mean((w - alpha) ** 2),
        lambda w, alpha, batch: jnp.float16(1e-4) * jnp.mean(w**2),
    )
    w, alpha = jnp.full(n, 0.1, "float16"), jnp.ones((), "float16")
    descent = hg.Descent(optax.sgd(0.1, momentum=0.5), 20)
    for estimator in (hg.Reversible(0.1, 0.5, 20), hg.Unrolled(descent)):
        estimate = hg.hypergradient(problem, estimator)(w, alpha)
        assert estimate.hypergradient == 0
        assert "rounding_error" in failed_checks(estimate)
