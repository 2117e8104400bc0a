"""Momentum descent reversed: every bit comes back, and reverse mode agrees."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from benchmarks.known import any_known, error, quadratic
from hypergrad.estimators import reversible_arithmetic

MOMENTUM = 3686 / 4096  # the fraction nearest to 0.9


def pair(num_steps, rate=0.3, momentum=MOMENTUM, **least):
    """Reversible, and Unrolled over the same steps."""
    as_function = lambda x: x if callable(x) else lambda alpha: x
    make = lambda alpha: optax.sgd(
        as_function(rate)(alpha), momentum=as_function(momentum)(alpha)
    )
    return (
        hg.Reversible(rate, momentum, num_steps, **least),
        hg.Unrolled(hg.Descent(make, num_steps)),
    )


@pytest.mark.parametrize("num_steps", [2, 7, 100, 1000])
@pytest.mark.parametrize("name", ["logistic per-weight", "quadratic nested"])
def test_equals_reverse_mode(name: str, num_steps: int):
    """To the resolution of the velocities, 2^-34."""
    known = any_known(name)
    ask = lambda estimator: hg.hypergradient(known.problem, estimator)(
        known.w, known.alpha
    )
    rate = 0.3 if name.startswith("logistic") else 0.05
    found, expected = map(ask, pair(num_steps, rate))
    assert found.stats["trusted"]
    assert error(found.hypergradient, expected.hypergradient) < 1e-8
    assert error(found.w, expected.w) < 1e-8


def test_rates_momenta_and_starts_are_seen():
    """A schedule, a momentum and a start from alpha."""
    known = any_known("ridge per-weight")
    inner = lambda w, alpha, batch: known.problem.inner_loss(w, alpha["l2"], batch)
    alpha = {
        "l2": known.alpha,
        "start": jnp.linspace(-1, 1, 6),
        "rates": jnp.linspace(0.05, 0.2, 12),
        "momentum": jnp.asarray(0.75),
    }
    rate = lambda alpha: lambda count: alpha["rates"][count]
    momentum = lambda alpha: alpha["momentum"]
    estimators = (
        hg.Reversible(rate, momentum, 12, min_momentum=0.5),
        hg.Unrolled(
            hg.Descent(
                lambda alpha: optax.chain(
                    optax.trace(alpha["momentum"]),
                    optax.scale_by_learning_rate(rate(alpha)),
                ),
                12,
            )
        ),
    )
    problem = hg.Bilevel(
        inner,
        lambda w, alpha, batch: known.problem.outer_loss(w, alpha["l2"], batch),
        known.problem.inner_data,
        known.problem.outer_data,
        init_fn=lambda w, alpha: w + alpha["start"],
    )
    found, expected = (
        hg.hypergradient(problem, estimator)(known.w, alpha) for estimator in estimators
    )
    assert found.stats["trusted"]
    for name in alpha:
        part, exact = found.hypergradient[name], expected.hypergradient[name]
        assert error(part, exact) < 1e-7, name


def test_mini_batches_equal_central_differences():
    """The same key throughout, by the loss's own alpha."""
    known = any_known("ridge per-weight")
    problem = hg.Bilevel(
        known.problem.inner_loss,
        known.problem.outer_loss,
        hg.Batches(known.problem.inner_data, 8),
        known.problem.outer_data,
    )
    estimator = hg.Reversible(0.2, 0.75, 20)
    gradient = hg.hypergradient(problem, estimator)
    key = jax.random.key(1)
    found = gradient(known.w, known.alpha, key)
    e = 1e-4 * jnp.eye(known.alpha.size)
    value = lambda alpha: float(gradient(known.w, alpha, key).value)
    slopes = [(value(known.alpha + d) - value(known.alpha - d)) / 2e-4 for d in e]
    assert error(found.hypergradient, jnp.array(slopes)) < 1e-5


def test_ten_thousand_steps_come_back():
    """At momentum 0.9: every bit, and no more than 10% over log2(1/0.9) bits."""
    known = quadratic("30", seed=1)
    estimator = hg.Reversible(0.05, 0.9, 10_000)
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert found.stats["trusted"]
    assert error(found.hypergradient, known.exact(known.alpha)) < 1e-7
    bits = 8 * estimator.num_words / 10_000
    assert 0.9 * np.log2(1 / 0.9) < bits < 1.1 * np.log2(1 / 0.9)


def test_too_small_a_buffer_is_flagged():
    """A momentum below the least that was promised loses bits."""
    known = quadratic("30", seed=1)
    momentum = lambda alpha: jnp.asarray(0.3)
    run = lambda least: hg.hypergradient(
        known.problem, hg.Reversible(0.05, momentum, 500, least)
    )(known.w, known.alpha)
    assert run(0.3).stats["trusted"]
    assert not run(0.95).stats["trusted"]


def test_leaving_the_range_is_flagged():
    """A rate that diverges runs over the integers."""
    known = quadratic("30", seed=1)
    estimator = hg.Reversible(1.0, 0.9, 60)
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert not found.stats["trusted"]


def test_memory_is_the_buffer():
    """Sixteen times the steps: 0.15 bits a number and step more, and the keys."""

    def planned(num_steps):
        problem = hg.Bilevel(
            lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2),
            lambda w, alpha, batch: jnp.sum(w**2),
        )
        gradient = hg.hypergradient(problem, hg.Reversible(0.1, 0.9, num_steps))
        f = jax.jit(lambda w, alpha: gradient(w, alpha).hypergradient)
        compiled = f.lower(jnp.zeros(10_000), jnp.zeros(())).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    more = planned(1600) - planned(100)
    buffer = 1500 * np.log2(1 / 0.9) / 8 * 10_000
    # the compiler may hold the stack twice, while it writes to it
    assert more < 2.2 * buffer + 1500 * 64


def test_a_run_in_float32_comes_back():
    """In a process without x64: coarser, and still every bit."""
    code = """
        import jax.numpy as jnp, optax, hypergrad as hg
        inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - jnp.sin(alpha)) ** 2)
        outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 0.5) ** 2)
        problem = hg.Bilevel(inner, outer)
        alpha = jnp.linspace(-1, 1, 50)
        estimator = hg.Reversible(0.1, 0.9, 3000)
        found = hg.hypergradient(problem, estimator)(jnp.zeros(50), alpha)
        exact = (jnp.sin(alpha) - 0.5) * jnp.cos(alpha)
        assert found.stats["trusted"]
        assert jnp.linalg.norm(found.hypergradient - exact) < 1e-3
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0.0, 5), "momentum must lie"),
        ((0.1, 1.0, 5), "momentum must lie"),
        ((0.1, lambda alpha: 0.9, 5), "min_momentum"),
        ((0.1, 0.9, 0), "num_steps"),
    ],
)
def test_wrong_settings_are_named(arguments, message: str):
    """Before anything runs."""
    with pytest.raises(ValueError, match=message):
        hg.Reversible(*arguments)


def test_alpha_that_nothing_reads_is_refused():
    """As everywhere."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: 0.5 * (w - alpha["a"]) ** 2,
        lambda w, alpha, batch: w**2,
    )
    with pytest.raises(ValueError, match=r"alpha\['b'\]"):
        hg.hypergradient(problem, hg.Reversible(0.1, 0.9, 5))(0.0, {"a": 1.0, "b": 1.0})


def test_an_optax_schedule_in_place_of_a_function_of_alpha():
    """It would be given alpha for the step."""
    schedule = optax.constant_schedule(0.1)
    with pytest.raises(TypeError, match="learning_rate is optax's function"):
        hg.Reversible(schedule, 0.9, 5)


def test_a_momentum_out_of_range_is_flagged():
    """1.2 is taken for 4095/4096, which is not what was asked."""
    known = quadratic("30", seed=1)
    estimator = hg.Reversible(0.001, lambda alpha: 1.2, 3, 0.5)
    found = hg.hypergradient(known.problem, estimator)(known.w, known.alpha)
    assert not found.stats["trusted"]


def test_mixed_precision_is_refused():
    """Other integers have another denominator."""
    problem = hg.Bilevel(
        lambda w, alpha, batch: jnp.sum((w["a"] - alpha) ** 2) + jnp.sum(w["b"] ** 2),
        lambda w, alpha, batch: jnp.sum(w["a"] ** 2),
    )
    w = {"a": jnp.zeros(2), "b": jnp.zeros(2, jnp.float32)}
    with pytest.raises(ValueError, match="cast w to one dtype"):
        hg.hypergradient(problem, hg.Reversible(0.1, 0.9, 3))(w, jnp.ones(2))


def test_the_rate_is_data():
    """Another number runs the same program, and rates can be swept by vmap."""
    traces = []

    def inner(w, alpha, batch):
        traces.append(1)
        return 0.5 * jnp.sum((w - alpha) ** 2)

    problem = hg.Bilevel(inner, lambda w, alpha, batch: jnp.sum(w**2))
    run = lambda rate: hg.hypergradient(problem, hg.Reversible(rate, 0.5, 9))(
        jnp.zeros(3), jnp.ones(3)
    )
    first = run(0.1)
    count = len(traces)
    second = run(0.2)
    assert len(traces) == count
    swept = jax.vmap(run)(jnp.array([0.1, 0.2]))
    for i, alone in enumerate((first, second)):
        np.testing.assert_allclose(
            swept.hypergradient[i], alone.hypergradient, rtol=1e-9
        )
        assert swept.stats["trusted"][i]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int64])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 0.99])
def test_a_division_undoes_a_multiplication(momentum: float, dtype):
    """500 steps on random integers of either sign, pushed and popped."""
    v = jax.random.randint(jax.random.key(0), (40,), -(2**20), 2**20, dtype)
    like = jnp.zeros(40, jnp.float64 if dtype == jnp.int64 else jnp.float32)
    steps = jnp.arange(500)
    words = reversible_arithmetic.num_words(500, momentum)
    begun = reversible_arithmetic.empty(like, words, 500)
    m = jnp.asarray(momentum)

    def ahead(carry, step):
        buffer, v = reversible_arithmetic.multiply(*carry, m, step)
        return (buffer, v + 1000), v

    def back(carry, step):
        buffer, v = carry
        return reversible_arithmetic.divide(buffer, v - 1000, m, step), None

    (buffer, after), seen = jax.lax.scan(ahead, (begun, v), steps)
    assert not reversible_arithmetic.is_empty(buffer)
    n = reversible_arithmetic.numerator(m, jnp.dtype(dtype))
    d = reversible_arithmetic.denominator(jnp.dtype(dtype))
    np.testing.assert_allclose(seen[0], v * float(n) / d, atol=d)
    (buffer, before), _ = jax.lax.scan(back, (buffer, after), steps, reverse=True)
    assert jnp.array_equal(before, v)
    assert reversible_arithmetic.is_empty(buffer)
